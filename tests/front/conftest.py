import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `import fake_engine`


@pytest.fixture(params=[True, False], ids=["uvloop", "asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """Both event loops: they differ in how they read sockets and reap children."""
    return "asyncio", {"use_uvloop": request.param}


@pytest.fixture(autouse=True)
def endless_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake's answers end only where a test says so, and pace themselves so that tests stay light."""
    monkeypatch.setenv("FAKE_CONTEXT", str(10**9))
    monkeypatch.setenv("FAKE_STEP_MS", "1")
