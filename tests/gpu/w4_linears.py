"""Linears for our own W4 kernels on a GPU, and those kernels loaded, all at once."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product

import torch
from torch import Tensor

from service.kernels import w4_linear
from service.kernels.w4_linear import Shape, Weight
from service.kernels.w4_linear.plan import TABLES, few_of, tile_of
from tests.kernels.w4_weights import Codes, random_weight

CUDA = torch.device("cuda", 0)
DTYPES = (torch.float16, torch.bfloat16)
AFFINE = Codes("affine", 128)
# Llama-3.1-8B's, Qwen3's and sizes that fill no table evenly
LINEARS = {
    "qkv": ((4096, 1024, 1024), 4096),
    "o": ((4096,), 4096),
    "gate_up": ((14336, 14336), 4096),
    "down": ((4096,), 14336),
    "small": ((128,), 128),
    "narrow": ((1040, 80), 2048),
    "uneven": ((16, 4096, 240), 1536),
    "few in": ((3072, 1024), 896),
}


@cache
def load(codes: Codes) -> None:
    """Every variant that their table has, compiled and loaded."""
    few, few_of_wide, tiles = TABLES[codes.kind]
    shapes = [Shape(codes.kind, (32,), 128, codes.group_size, dtype) for dtype in DTYPES]
    settings = {*few, *few_of_wide}, {each for _, choices in tiles for each in choices}
    variants = {few_of(shape, each) for shape, each in product(shapes, settings[0])}
    variants |= {tile_of(shape, each) for shape, each in product(shapes, settings[1])}
    with ThreadPoolExecutor() as pool:
        list(pool.map(w4_linear.load, variants))


def shape_of(
    codes: Codes, outs: tuple[int, ...], in_features: int, dtype: torch.dtype = torch.float16
) -> Shape:
    load(codes)
    return Shape(codes.kind, outs, in_features, codes.group_size, dtype)


@cache
def packed(codes: Codes, name: str) -> tuple[Weight, Tensor]:
    torch.manual_seed(1)
    outs, in_features = LINEARS[name]
    source = random_weight(codes.kind, outs, in_features, "cuda", codes.group_size)
    return source.pack(outs), source.dense()


def linear(codes: Codes, name: str, dtype: torch.dtype = torch.float16) -> tuple[Weight, Shape, Tensor]:
    """-> packed, its shape, and what it means in float32."""
    weight, dense = packed(codes, name)
    return weight, shape_of(codes, *LINEARS[name], dtype), dense
