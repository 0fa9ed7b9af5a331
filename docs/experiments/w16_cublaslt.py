"""libcublasLt by ctypes: which algorithms it has for x @ W.T in float16, and a launch of each on torch's stream.

Constants and structures are those of cublasLt.h of CUDA 13 (nvidia-cublas 13.1.1.3); w16_cublaslt_fake.c holds them against
that header where a compiler finds it. Rows and columns are the library's, column by column: its A is W transposed, its B is
x, its D is y, so that a tile is outputs x rows of x. The calls and their order are those of torch.mm on a plain weight.
"""

import ctypes
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

WORKSPACE_BYTES = 32 << 20  # torch's own on Hopper (getChosenWorkspaceSize, CublasHandlePool.cpp, sm90)
R_16F, R_32F, COMPUTE_32F, OP_T = 2, 0, 68, 1  # cudaDataType_t, cublasComputeType_t, cublasOperation_t
DESC_TRANSA, PREF_MAX_WORKSPACE_BYTES = 3, 1
CAP_SPLITK, CAP_REDUCTIONS, CAP_SWIZZLING, CAP_TILES, CAP_CUSTOM_MAX, CAP_STAGES = 0, 1, 2, 6, 7, 13
CONFIG = {  # cublasLtMatmulAlgoConfigAttributes_t
    "id": (0, ctypes.c_int32),
    "tile": (1, ctypes.c_uint32),
    "splits": (2, ctypes.c_int32),
    "reduction": (3, ctypes.c_uint32),
    "swizzle": (4, ctypes.c_uint32),
    "custom": (5, ctypes.c_uint32),
    "stages": (6, ctypes.c_uint32),
    "inner": (7, ctypes.c_uint16),
    "cluster": (8, ctypes.c_uint16),
}
IN_PLACE, COMPUTE_TYPE, OUTPUT_TYPE = 1, 2, 4  # cublasLtReductionScheme_t
CLUSTERS = (2, 3, 5, 6, 4, 8)  # cublasLtClusterShape_t: 1x1, 2x1, 1x2, 2x2, 4x1, 1x4
ENUMS = {"tile": "MATMUL_TILE", "stages": "MATMUL_STAGES", "cluster": "CLUSTER_SHAPE"}

Algo = ctypes.c_uint64 * 8


class HeuristicResult(ctypes.Structure):
    _fields_ = [
        ("algo", Algo),
        ("workspace_bytes", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


@dataclass(frozen=True)
class Algorithm:
    """64 bytes that mean something to one version of the library, and what they say by attribute."""

    data: bytes
    config: tuple[int, ...]  # in CONFIG's order
    workspace_bytes: int
    waves: float
    origin: str  # "h3": the heuristics' fourth; "n": made from one of theirs

    def get(self, name: str) -> int:
        return self.config[list(CONFIG).index(name)]


class Library:
    """One handle; descriptors of a product are made once for its shape and never freed: the process is short."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.cublasLtGetVersion.restype = ctypes.c_size_t
        self.library.cublasLtGetStatusName.restype = ctypes.c_char_p
        p, size = ctypes.c_void_p, ctypes.c_size_t
        self.library.cublasLtMatmul.argtypes = [p] * 14 + [size, p]
        self.version = int(self.library.cublasLtGetVersion())
        self.names = read_names(path.parent.parent / "include" / "cublasLt.h")
        self.handle = ctypes.c_void_p()
        self.call("cublasLtCreate", ctypes.byref(self.handle))

    def call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self.library, name)(*arguments):
            told = self.library.cublasLtGetStatusName(status) or b"?"
            raise CublasLtError(f"{name}: {told.decode()}")

    def make(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        place = ctypes.c_void_p()
        self.call(name, ctypes.byref(place), *arguments)
        return place

    def set(self, name: str, target: Any, attribute: int, value: Any) -> None:
        self.call(name, target, attribute, ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value)))

    def config_of(self, algo: Any) -> tuple[int, ...]:
        found = []
        for attribute, kind in CONFIG.values():
            value, written = kind(), ctypes.c_size_t()
            self.call(
                "cublasLtMatmulAlgoConfigGetAttribute", ctypes.byref(algo), attribute, ctypes.byref(value),
                ctypes.c_size_t(ctypes.sizeof(value)), ctypes.byref(written))  # fmt: skip
            found.append(int(value.value))
        return tuple(found)

    def caps_of(self, algo: Any, attribute: int) -> list[int]:
        """Numbers of 32 bits, one or a list; empty where the algorithm does not say."""
        get, written = self.library.cublasLtMatmulAlgoCapGetAttribute, ctypes.c_size_t()
        if get(ctypes.byref(algo), attribute, None, ctypes.c_size_t(0), ctypes.byref(written)):
            return []
        values = (ctypes.c_uint32 * (written.value // 4))()
        if not values or get(ctypes.byref(algo), attribute, values, written, ctypes.byref(written)):
            return []
        return list(values)

    def name(self, algorithm: Algorithm) -> str:
        """Short: tile, stages, cluster, then whatever else is not the default."""
        numbers = {each: algorithm.get(each) for each in ENUMS}
        told = [f"{each} {self.names.get((each, number), number)}" for each, number in numbers.items()]
        for each, usual in (("splits", 1), ("reduction", 0), ("swizzle", 0), ("custom", 0), ("inner", 0)):
            if algorithm.get(each) not in (usual, 0):
                told.append(f"{each} {algorithm.get(each)}")
        return f"{' '.join(told)} #{algorithm.get('id')} {algorithm.origin}"


class CublasLtError(RuntimeError):
    """A status other than success."""


class Product:
    """y [rows, n] = x [rows, k] @ w [n, k].T, float16 with sums in float32."""

    def __init__(self, library: Library, rows: int, n: int, k: int) -> None:
        self.library = library
        i32, u64, i64 = ctypes.c_int32, ctypes.c_uint64, ctypes.c_int64
        self.desc = library.make("cublasLtMatmulDescCreate", COMPUTE_32F, R_32F)
        library.set("cublasLtMatmulDescSetAttribute", self.desc, DESC_TRANSA, i32(OP_T))
        self.a, self.b, self.d = (
            library.make("cublasLtMatrixLayoutCreate", R_16F, u64(height), u64(width), i64(height))
            for height, width in ((k, n), (k, rows), (n, rows))
        )
        self.alpha, self.beta = ctypes.c_float(1), ctypes.c_float(0)

    def heuristics(self, count: int) -> list[Algorithm]:
        """What the library would choose first, and at most `count` in all; without repetitions."""
        library = self.library
        preference = library.make("cublasLtMatmulPreferenceCreate")
        room = ctypes.c_uint64(WORKSPACE_BYTES)
        library.set("cublasLtMatmulPreferenceSetAttribute", preference, PREF_MAX_WORKSPACE_BYTES, room)
        results, found = (HeuristicResult * count)(), ctypes.c_int()
        library.call(
            "cublasLtMatmulAlgoGetHeuristic", library.handle, self.desc, self.a, self.b, self.d, self.d, preference,
            ctypes.c_int(count), results, ctypes.byref(found))  # fmt: skip
        made: dict[bytes, Algorithm] = {}
        for i, result in enumerate(results[: found.value]):
            if result.state == 0:
                made.setdefault(bytes(result.algo), self.algorithm(result, f"h{i}"))
        return list(made.values())

    def algorithm(self, result: Any, origin: str) -> Algorithm:
        config = self.library.config_of(result.algo)
        return Algorithm(bytes(result.algo), config, result.workspace_bytes, result.waves, origin)

    def neighbours(self, parent: Algorithm) -> Iterator[Algorithm]:
        """What differs in one attribute (a split of K also in how its parts are added) and passes the library's check."""
        algo = Algo.from_buffer_copy(parent.data)
        caps = partial(self.library.caps_of, algo)
        custom_most = min((*caps(CAP_CUSTOM_MAX), 0xFFFF)) if caps(CAP_CUSTOM_MAX) else 0
        reductions = next(iter(caps(CAP_REDUCTIONS)), 0)
        choices: list[list[dict[str, int]]] = [
            [{"cluster": cluster} for cluster in CLUSTERS],
            [{"swizzle": way} for way in (0, 1) if any(caps(CAP_SWIZZLING))],
            [{"stages": stages} for stages in caps(CAP_STAGES)],
            [{"custom": option} for option in range(min(custom_most, 15) + 1)],
            [
                {"splits": splits, "reduction": scheme}
                for splits in (2, 3, 4)
                for scheme in (IN_PLACE, COMPUTE_TYPE)
                if any(caps(CAP_SPLITK)) and reductions & scheme
            ],
            [{"splits": 1, "reduction": 0}],
            [{"tile": tile} for tile in caps(CAP_TILES)],
        ]
        in_turn = (
            each for some in zip_longest(*choices) for each in some if each
        )  # a few of each attribute first
        for changes in in_turn:
            if any(parent.get(name) != value for name, value in changes.items()):
                if made := self.changed(parent, changes):
                    yield made

    def changed(self, parent: Algorithm, changes: dict[str, int]) -> Algorithm | None:
        """None where the library does not take it, or wants more workspace than torch has."""
        result = HeuristicResult()
        algo = Algo.from_buffer_copy(parent.data)
        try:
            for name, value in changes.items():
                attribute, kind = CONFIG[name]
                self.library.set(
                    "cublasLtMatmulAlgoConfigSetAttribute", ctypes.byref(algo), attribute, kind(value)
                )
            self.library.call(
                "cublasLtMatmulAlgoCheck", self.library.handle, self.desc, self.a, self.b, self.d, self.d,
                ctypes.byref(algo), ctypes.byref(result))  # fmt: skip
        except CublasLtError:
            return None
        if result.workspace_bytes > WORKSPACE_BYTES:
            return None
        result.algo = algo  # which the check does not fill in
        return self.algorithm(result, f"n{parent.origin[1:]}")

    def bind(
        self, algorithm: Algorithm, x: int, w: int, y: int, workspace: int, stream: Callable[[], int]
    ) -> Callable[[], None]:
        """A launch on the stream that `stream` names when it is called. Operands by address, which the caller keeps."""
        algo = Algo.from_buffer_copy(algorithm.data)
        alpha, beta = ctypes.byref(self.alpha), ctypes.byref(self.beta)
        library, a, b, d = self.library, self.a, self.b, self.d

        def launch() -> None:
            library.call(
                "cublasLtMatmul", library.handle, self.desc, alpha, w, a, x, b, beta, y, d, y, d, ctypes.byref(algo),
                workspace, WORKSPACE_BYTES, stream())  # fmt: skip

        return launch


def read_names(header: Path) -> dict[tuple[str, int], str]:
    """(attribute, number) -> as cublasLt.h spells it. Empty without the header: then numbers are printed."""
    if not header.exists():
        return {}
    text = header.read_text()
    return {
        (name, int(number)): word.removesuffix("x1") if name == "cluster" else word
        for name, prefix in ENUMS.items()
        for word, number in re.findall(rf"CUBLASLT_{prefix}_(\w+) = (\d+)", text)
    }


def loaded_library() -> Path:
    """The libcublasLt that torch has loaded into this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "libcublasLt.so" in line:
            return Path(line.split(maxsplit=5)[5])
    raise CublasLtError("no libcublasLt is loaded; torch loads it with its first product on the GPU")
