"""Three bits a weight: the words of the layout, the reference, Triton in its interpreter and for an H100."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from service.kernels.int3_linear import int3_linear, reference
from tests.kernels.interpreter import interpreted

RELATIVE_RMS = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def random_layer(in_features: int, out_features: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(in_features * out_features + group)
    num_groups = in_features // group
    codes = torch.randint(0, 8, (in_features, out_features), generator=generator)
    zeros = torch.randint(0, 8, (out_features, num_groups), generator=generator)
    scales = torch.rand(num_groups, out_features, generator=generator) * 0.02 + 1e-3
    return reference.pack(codes), reference.pack_zeros(zeros), scales.half()


def meaning(codes: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """float64 [in, out], bit by bit as README.md draws it: none of the code that is tested."""
    in_features, (num_groups, out_features) = codes.shape[0] * 32, scales.shape
    weight = torch.empty(in_features, out_features, dtype=torch.float64)
    words, pairs = codes.tolist(), zeros.tolist()

    def code(three: list[list[int]], column: int, place: int) -> int:
        low = three[place // 16][column] >> 2 * (place % 16) & 3
        return low + 4 * (three[2][column] >> place & 1)

    for n in range(out_features):
        for k in range(in_features):
            group = k * num_groups // in_features
            zero = pairs[group][n // 2] >> 4 * (n % 2) & 15
            weight[k, n] = (code(words[k // 32], n, k % 32) - zero) * float(scales[group, n])
    return weight


def test_words_are_those_that_are_drawn() -> None:
    """Weight 17 of 32 alone: the second word's second pair, the high word's bit 17."""
    codes = torch.zeros(32, 2, dtype=torch.int64)
    codes[17, 1], codes[31, 0] = 0b110, 0b111
    words = reference.pack(codes)
    assert words.dtype == torch.int32
    assert words[0, :, 1].tolist() == [0, 0b10 << 2, 1 << 17]
    assert words[0, :, 0].tolist() == [0, -(1 << 30), -(1 << 31)]


@pytest.mark.parametrize(("rows", "columns"), [(32, 1), (96, 40), (4096, 3)])
def test_every_code_comes_back(rows: int, columns: int) -> None:
    codes = torch.randint(0, 8, (rows, columns), generator=torch.Generator().manual_seed(rows))
    words = reference.pack(codes)
    assert words.numel() * 4 == rows * columns * 3 / 8
    assert torch.equal(reference.unpack(words), codes.to(torch.uint8))
    pairs = reference.pack_zeros(codes)
    assert pairs.numel() * 2 == codes.numel()
    assert torch.equal(reference.unpack_zeros(pairs).t(), codes.to(torch.uint8))


@pytest.mark.parametrize("dtype", RELATIVE_RMS, ids=str)
@pytest.mark.parametrize(
    ("tokens", "in_features", "out_features", "group"),
    [(1, 64, 32, 64), (7, 192, 96, 64), (33, 256, 64, 128)],
)
def test_the_reference_computes_what_the_bits_mean(
    tokens: int,
    in_features: int,
    out_features: int,
    group: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In blocks of outputs that do not divide them."""
    monkeypatch.setattr(reference, "CHUNK_WEIGHTS", 64 * in_features)
    layer = random_layer(in_features, out_features, group)
    weight = meaning(*layer)
    torch.testing.assert_close(reference.dequantize(*layer).double(), weight, rtol=1e-6, atol=0)
    x = torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    got, want = int3_linear(x, *layer), x.double() @ weight
    assert got.dtype == dtype
    assert (got.double() - want).norm() < RELATIVE_RMS[dtype] * want.norm()


def test_few_weights_are_dequantized_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    right = reference.dequantize

    def counted(codes: Tensor, *others: Tensor | torch.dtype) -> Tensor:
        weight: Tensor = right(codes, *others)  # type: ignore[arg-type]
        sizes.append(weight.numel())
        return weight

    monkeypatch.setattr(reference, "dequantize", counted)
    int3_linear(torch.ones(1, 1024), *random_layer(1024, 2080, 128))
    assert sum(sizes) == 1024 * 2080
    assert max(sizes) <= reference.CHUNK_WEIGHTS


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    with interpreted("service.kernels.int3_linear.triton") as module:
        yield module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "in_features", "out_features", "group"),
    [
        (1, 128, 32, 64),  # half of a tile of outputs
        (3, 192, 96, 64),  # ragged outputs, shares of one group
        (17, 384, 160, 128),
        (33, 576, 64, 64),  # nine groups over eight shares: the last ones are empty or short
        (70, 256, 32, 128),  # two tiles of rows
    ],
)
def test_triton_agrees_with_the_reference(
    kernels: ModuleType, tokens: int, in_features: int, out_features: int, group: int, dtype: torch.dtype
) -> None:
    layer = random_layer(in_features, out_features, group)
    x = torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    got, want = kernels.int3_linear(x, *layer), x.float() @ reference.dequantize(*layer)
    assert got.dtype == dtype
    assert got.shape == want.shape
    assert (got.float() - want).norm() < RELATIVE_RMS[dtype] * want.norm()


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from service.kernels.int3_linear.triton import BLOCK_K, BLOCK_N, STAGES, int3_linear_kernel

block_m, y_type = int(sys.argv[1]), sys.argv[2]
constants = {"GROUP": 64, "BLOCK_M": block_m, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K, "IS_DEPENDENT": True}
signature = {"x_ptr": "*bf16", "codes_ptr": "*i32", "zeros_ptr": "*u8", "scales_ptr": "*fp16"}
signature |= {"y_ptr": f"*{y_type}"}
signature |= dict.fromkeys(("num_rows", "out_features", "in_features", "groups_per_split"), "i32")
divisible = {(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, 3, 4, 6, 7)}
signature |= dict.fromkeys(constants, "constexpr")
source = ASTSource(int3_linear_kernel, signature, constants, divisible)
launch = {"num_warps": 4, "num_stages": STAGES}
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch).asm["ptx"])
"""


@pytest.mark.parametrize(("block_m", "y_type", "product"), [(16, "fp32", "mma.sync"), (64, "bf16", "wgmma.")])
def test_compiles_for_an_h100(block_m: int, y_type: str, product: str, tmp_path: os.PathLike[str]) -> None:
    """Tensor cores of the right kind, and words of codes that travel 16 bytes at a time."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.getcwd()}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", COMPILE, str(block_m), y_type]
    ptx = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert product in ptx
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x\w+)", ptx)
    assert copies.count("0x10") >= 3
