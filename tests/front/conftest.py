import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `import fake_engine`


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """The event loop that serves."""
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(autouse=True)
def endless_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake's answers end only where a test says so, and pace themselves so that tests stay light."""
    monkeypatch.setenv("FAKE_CONTEXT", str(10**9))
    monkeypatch.setenv("FAKE_STEP_MS", "1")
