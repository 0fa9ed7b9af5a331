"""The engine process: `python -m service.engine.child --fd N --config JSON`; with `--check` in the place of
the socket it says on stdout what speaks against the configuration (engine/preflight).

front <--socket--> Link <--messages--> this loop --> Engine, evaluation

On the way to ready it says how far it is; what stops it there is one Fatal with the fix. Idle, it prepares
what steps may need, a little at a time, then waits for the front and gives a sign of life each second.
"""

import argparse
import ctypes
import gc
import os
import signal
import socket
import sys
import time
import traceback
from collections import deque
from typing import TYPE_CHECKING, NoReturn

import msgspec

from service.engine.early import importing, wake_gpu
from service.engine.link import Link
from service.errors import HalftoneError, ShortageError
from service.messages import Abort, EngineConfig, Evaluate, Fatal, Loading, Ready, Submit

if TYPE_CHECKING:  # torch is imported once the front knows that we are on the way
    from service.engine.startup import Serving

HEARTBEAT_S = 1.0
REST_S = 0.1  # nobody who asks for one thing after another shall wait for what is prepared
EXIT_UNUSABLE = 3
EXIT_INTERNAL = 1
PR_SET_PDEATHSIG = 1


def main() -> NoReturn:
    started_at = time.monotonic()
    parser = argparse.ArgumentParser(prog="service.engine.child", description=__doc__)
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--fd", type=int, help="connected socket, inherited from the front")
    way.add_argument("--check", action="store_true", help="load nothing, say whether an engine could begin")
    parser.add_argument("--config", required=True, help="EngineConfig as JSON")
    arguments = parser.parse_args()
    die_with_parent()
    if arguments.check:
        check(arguments.config)
    link = Link(socket.socket(fileno=arguments.fd))
    is_ready = False
    try:
        config = msgspec.json.decode(arguments.config, type=EngineConfig)
        link.send(Loading("import", 0, 1, "modules"))
        opening = wake_gpu() if config.device != "cpu" else None
        with importing():
            set_threads(config.threads)
            from service.engine.startup import start

        link.send(Loading("import", 1, 1, "modules"))
        if opening:
            opening.join()
        serving = start(config, link.send, started_at, opening.used_before if opening else None)
        link.send(Ready(serving.info))
        is_ready = True
        serve(serving, config, link)
    except ShortageError as error:
        fatal = Fatal(
            error.code,
            error.message,
            error.hint,
            needs_bytes=error.needs_bytes,
            has_bytes=error.has_bytes,
        )
        end(link, fatal, EXIT_UNUSABLE)
    except HalftoneError as error:
        end(link, Fatal(error.code, error.message, error.hint), EXIT_UNUSABLE)
    except Exception as error:  # the edge of the process: a trace for the operator, no text for the client
        traceback.print_exc()
        end(link, Fatal("internal_error", type(error).__name__, retryable=is_ready), EXIT_INTERNAL)


def check(config_json: str) -> NoReturn:
    """Exit code 0, or a Fatal in JSON on stdout."""
    try:
        config = msgspec.json.decode(config_json, type=EngineConfig)
        set_threads(config.threads)
        from service.engine.preflight import check_opens

        check_opens(config)
    except HalftoneError as error:
        print(msgspec.json.encode(Fatal(error.code, error.message, error.hint)).decode())
        sys.exit(EXIT_UNUSABLE)
    sys.exit(0)


def serve(serving: "Serving", config: EngineConfig, link: Link) -> NoReturn:
    """Until the front is gone: take what has come, then one step, or what can wait when nobody does."""
    from service.engine.ledger import LedgerWatch
    from service.engine.outliers import OutlierWatch
    from service.engine.peaks import PeakWatch

    engine = serving.engine
    peaks = PeakWatch(serving.model.device, serving.info.peak_load_bytes)
    outliers = OutlierWatch(serving.model.outlier_counts(), serving.model.device)
    ledger = LedgerWatch(serving.ledger, serving.info.memory_bytes)
    evaluations: deque[Evaluate] = deque()
    gc.collect()
    gc.freeze()  # else every full collection walks all of torch's modules in the middle of a step
    has_rested = False
    while True:
        is_idle = not engine.has_work and not evaluations
        prepares = is_idle and engine.may_prepare
        wait_s = (0 if has_rested else REST_S) if prepares else HEARTBEAT_S
        messages = link.receive(wait_s if is_idle else 0)
        has_rested = is_idle and not messages
        if prepares and has_rested:
            engine.prepare()
            continue
        for message in messages:
            if isinstance(message, Submit):
                engine.add(message)
            elif isinstance(message, Abort):
                engine.abort(message.ids)
            elif isinstance(message, Evaluate):
                evaluations.append(message)
        if engine.has_work:
            step = engine.step()
            step.stats.peak_bytes = peaks.after(step.stats)
            step.stats.memory_bytes = ledger.look(is_idle=not engine.has_work)
            step.stats.outliers = outliers.look()
            link.send(step)
        elif evaluations:
            from service.engine.evaluate import Evaluation

            Evaluation(evaluations.popleft(), serving, config, link.send).run()
        elif not messages:
            step = engine.heartbeat()
            step.stats.memory_bytes = ledger.look(is_idle=True)
            step.stats.outliers = outliers.look()
            link.send(step)


def set_threads(num_threads: int) -> None:
    """Before torch is imported, since OpenMP reads its environment then; what is set there already stands."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from service import device as devices

    if num_threads or "OMP_NUM_THREADS" not in os.environ:
        devices.set_threads(num_threads)


def die_with_parent() -> None:
    """Linux kills us when the front dies, even where the socket's other end outlives it."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end(link: Link, fatal: Fatal, exit_code: int) -> NoReturn:
    link.send(fatal)
    link.flush()
    sys.stderr.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    main()
