"""Compile the native library: `python -m service.kernels.native.build`. Users get the file that lies beside.

sources --cc--> halftone_x86_64.so, with the SHA-256 of the sources in it (`halftone_sources`), so that a test
sees a forgotten build. Nothing of the machine that compiles goes into the file: no paths, no build id, no
host tuning. Who changes a source runs this and commits both.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "halftone_x86_64.so"
# fmt: off
FLAGS = [
    "-std=gnu11", "-O3", "-Wall", "-Wextra", "-Werror", "-ffreestanding", "-fPIC", "-fvisibility=hidden",
    "-fno-ident", "-fno-stack-protector", "-fno-asynchronous-unwind-tables",
    "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
]
TARGETS = {  # end of a source's name -> what its code may use
    "_avx512": [
        "-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni", "-mtune=znver3", "-mprefer-vector-width=512",
    ],
    "": ["-march=x86-64"],
}
LINK = [
    "-shared", "-nostdlib", "-s", "-Wl,--build-id=none", "-Wl,-z,noexecstack", "-Wl,-z,now",
    "-Wl,--no-undefined",
]
# fmt: on


def sources() -> list[Path]:
    return sorted(FOLDER.glob("*.[ch]"))


def sources_sha256() -> str:
    """Of names and contents, and of this file's flags."""
    digest = hashlib.sha256(repr((FLAGS, TARGETS, LINK)).encode())
    for source in sources():
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()


def compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def build(library: Path = LIBRARY) -> None:
    """Write `library`; raises where there is no compiler, or it finds fault with a source."""
    cc = compiler()
    if cc is None:
        raise FileNotFoundError("no C compiler: neither cc, gcc nor clang is on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        stamp = Path(folder, "stamp.c")
        text = (
            f'__attribute__((visibility("default"))) const char halftone_sources[] = "{sources_sha256()}";\n'
        )
        stamp.write_text(text)
        objects = []
        for source in [*(s for s in sources() if s.suffix == ".c"), stamp]:
            target = next(flags for end, flags in TARGETS.items() if source.stem.endswith(end))
            objects.append(f"{source.stem}.o")
            command = [cc, *FLAGS, *target, "-c", str(source), "-o", objects[-1]]
            subprocess.run(command, cwd=folder, check=True)
        subprocess.run([cc, *LINK, "-o", "library.so", *objects], cwd=folder, check=True)
        fresh = library.with_suffix(".fresh")
        shutil.copyfile(Path(folder, "library.so"), fresh)
        fresh.replace(library)  # a process that has the old file mapped keeps it


if __name__ == "__main__":
    build()
    sys.stdout.write(f"{LIBRARY.name}: {LIBRARY.stat().st_size} bytes\n")
