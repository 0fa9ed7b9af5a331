"""The Triton kernel in its interpreter against the reference, and compiled for a GPU that is not here."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from service.kernels.awq_linear import reference
from tests.kernels.interpreter import interpreted

pytest.importorskip("triton")

RELATIVE_RMS = {torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    with interpreted("service.kernels.awq_linear.triton") as module:
        yield module


def random_layer(in_features: int, out_features: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(in_features * out_features + group)
    codes = torch.randint(0, 16, (in_features, out_features), generator=generator)
    zeros = torch.randint(0, 16, (in_features // group, out_features), generator=generator)
    scales = torch.rand(in_features // group, out_features, generator=generator) * 0.02 + 1e-3
    return reference.pack(codes), reference.pack(zeros), scales.half()


@pytest.mark.parametrize("dtype", RELATIVE_RMS, ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("tokens", "in_features", "out_features", "group"),
    [
        (1, 128, 128, 32),
        (3, 192, 72, 64),  # ragged columns, shares of one group
        (17, 384, 136, 128),
        (33, 576, 64, 64),  # nine groups over eight shares: the last ones are empty or short
        (70, 256, 8, 32),  # two row tiles, one word of columns
    ],
)
def test_triton_agrees_with_the_reference(
    kernels: ModuleType, tokens: int, in_features: int, out_features: int, group: int, dtype: torch.dtype
) -> None:
    layer = random_layer(in_features, out_features, group)
    x = torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    got = kernels.awq_linear(x, *layer)
    want = x.float() @ reference.dequantize(*layer)
    assert got.dtype == dtype
    assert got.shape == want.shape
    assert (got.float() - want).norm() < RELATIVE_RMS[dtype] * want.norm()


@pytest.mark.parametrize("dtype", RELATIVE_RMS, ids=["bf16", "fp16"])
@pytest.mark.parametrize(("in_features", "out_features", "group"), [(576, 64, 64), (384, 136, 128)])
def test_a_deterministic_row_is_the_same_in_any_company(
    kernels: ModuleType, in_features: int, out_features: int, group: int, dtype: torch.dtype
) -> None:
    layer = random_layer(in_features, out_features, group)
    x = torch.randn(70, in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    together = kernels.awq_linear(x, *layer, deterministic=True)
    want = x.float() @ reference.dequantize(*layer)
    assert (together.float() - want).norm() < RELATIVE_RMS[dtype] * want.norm()
    for first, rows in ((0, 1), (69, 1), (20, 5), (3, 17), (0, 64)):
        part = slice(first, first + rows)
        assert torch.equal(kernels.awq_linear(x[part], *layer, deterministic=True), together[part])


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from service.kernels.awq_linear.triton import STAGES, awq_linear_kernel, tile

rows, x_type, y_type = int(sys.argv[1]), sys.argv[2], sys.argv[3]
launch = {"num_warps": 4, "num_stages": STAGES}
constants = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), tile(rows, 128)))
constants |= {"GROUP": 128, "IS_DEPENDENT": True}
signature = {"x_ptr": f"*{x_type}", "qweight_ptr": "*i32", "qzeros_ptr": "*i32", "scales_ptr": "*fp16"}
signature |= {"y_ptr": f"*{y_type}"}
signature |= dict.fromkeys(("num_rows", "num_words", "in_features", "groups_per_split"), "i32")
divisible = {(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, 3, 4, 6, 7)}
signature |= dict.fromkeys(constants, "constexpr")
source = ASTSource(awq_linear_kernel, signature, constants, divisible)
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch).asm["ptx"])
"""


@pytest.mark.parametrize(
    ("rows", "x_type", "y_type", "product"),
    [(1, "fp16", "fp32", "mma.sync"), (64, "bf16", "bf16", "wgmma.mma_async")],
)
def test_compiles_for_an_h100(
    rows: int, x_type: str, y_type: str, product: str, tmp_path: os.PathLike[str]
) -> None:
    """Tensor cores of the right kind, and codes that travel 16 bytes at a time."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.getcwd()}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", COMPILE, str(rows), x_type, y_type]
    ptx = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert product in ptx
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x\w+)", ptx)
    assert copies.count("0x10") >= 16
    # all that is narrower is the one row of zeros of each stage
    assert set(copies) <= {"0x10", "0x4"}
    assert copies.count("0x4") <= 4
