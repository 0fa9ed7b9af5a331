"""A front in a thread of its own, for tests that speak to it as clients do."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator

from service.front.host import Host, run_loop


@contextlib.contextmanager
def running(
    make_host: Callable[[], Host], timeout_s: float, *, wait_ready: bool = True
) -> Iterator[tuple[Host, asyncio.AbstractEventLoop]]:
    """The host, serving on its own event loop; what stops it on the way is raised here."""
    up = threading.Event()
    failures: list[BaseException] = []
    served: list[tuple[Host, asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def run() -> None:
        stop = asyncio.Event()
        try:
            async with make_host() as host:
                if wait_ready:
                    await host.ready()
                served.append((host, asyncio.get_running_loop(), stop))
                up.set()
                await stop.wait()
        except BaseException as error:
            failures.append(error)
            raise
        finally:
            up.set()

    thread = threading.Thread(target=lambda: run_loop(run()), name="front")
    thread.start()
    try:
        assert up.wait(timeout_s)
        if failures:
            raise failures[0]
        host, loop, _ = served[0]
        yield host, loop
    finally:
        if served and not failures:
            _, loop, stop = served[0]
            loop.call_soon_threadsafe(stop.set)
        thread.join(timeout_s)
        assert not thread.is_alive()
