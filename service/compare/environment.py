"""What a comparison ran on: versions, machine, commit of the source, command."""

import platform
import subprocess
import sys
from pathlib import Path

from service import __version__
from service.cores import physical_cores


def environment(torch_version: str) -> dict[str, str]:
    """`torch_version` is the engines', empty where none started."""
    return {
        "halftone": __version__,
        "commit": commit(),
        "torch": torch_version,
        "python": platform.python_version(),
        "system": platform.platform(),
        "machine": f"{platform.machine()}, {physical_cores()} cores usable",
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def commit() -> str:
    """Commit of the source tree that runs, `+` where it was changed since; empty outside one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()
