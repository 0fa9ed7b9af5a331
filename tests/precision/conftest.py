"""Every test of a precision runs with our own CPU kernels and with torch's."""

from collections.abc import Iterator

import pytest

from service.kernels import native


@pytest.fixture(autouse=True, params=["native", "torch"])
def cpu_kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "native" and native.load() is None:
        pytest.skip(native.absence())
    native.choose(request.param)
    yield request.param
    native.choose("auto")
