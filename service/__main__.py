"""Program entry: every error that a user can meet ends here as one line, its fix, and an exit code."""

import os
import signal
import sys
from typing import Any, NoReturn

import typer

from service.errors import HalftoneError

# a wrong command line: newer typers carry their own copy of click, which `import click` is not
USAGE_ERROR: Any = typer.BadParameter.__base__
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main() -> None:
    # a server drains on SIGTERM; every other command unwinds and removes its partial files
    signal.signal(signal.SIGTERM, leave)
    sys.exit(run(sys.argv[1:]))


def leave(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


def run(arguments: list[str]) -> int:
    """Command line -> exit code. Tracebacks only under HALFTONE_LOG_LEVEL=debug."""
    from service.cli.app import app

    try:
        return int(app(arguments, prog_name="halftone", standalone_mode=False) or 0)
    except HalftoneError as error:
        if debugging():
            raise
        return say(error.message, error.hint, error.exit_code)
    except USAGE_ERROR as error:
        command = error.ctx.command_path if error.ctx else "halftone"
        return say(error.format_message(), f"see `{command} --help`", 2)
    except typer.Abort:  # older typers raise it for Ctrl-C, newer ones return the same code
        return INTERRUPTED
    except Exception as error:
        if debugging():
            raise
        return say(
            f"{type(error).__name__}: {error}",
            "this is a fault of Halftone; HALFTONE_LOG_LEVEL=debug shows where",
            1,
        )


def debugging() -> bool:
    return os.environ.get("HALFTONE_LOG_LEVEL") == "debug"


def say(message: str, hint: str, code: int) -> int:
    print(f"error: {message}" + (f"\n  hint: {hint}" if hint else ""), file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
