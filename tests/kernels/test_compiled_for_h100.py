"""The kernels of a GPU step, compiled for an H100 that is not here: what the interpreter cannot show."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

COMPILE = """
import json, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from service.kernels.add_rms_norm.triton import add_rms_norm_kernel
from service.kernels.coded_attention.triton import coded_decode_kernel, coded_prefill_kernel
from service.kernels.dense_linear.triton import STAGES, TILE_IN, TILE_OUT, stream_kernel
from service.kernels.fixed_linear.triton import FEW, MANY, fixed_kernel
from service.kernels.fp8_linear import plan as fp8_plan, triton as fp8
from service.kernels.int8_linear import plan as int8_plan, triton as int8
from service.kernels.int8_rows import triton as int8_rows
from service.kernels.kv_codes.triton import unpack_kernel
from service.kernels.paged_attention.triton import decode_kernel, prefill_kernel
from service.kernels.rotary_kv.triton import rotary_kv_kernel
from service.kernels.sample_likely.triton import collect_kernel, settle_kernel, weigh_kernel

def ptx(kernel, constants, num_warps, num_stages, codes="*fp16", **more_types):
    types = {"num_rows": "i32", "window": "i32", "max_blocks": "i32", "eps": "fp32", "scale": "fp32"}
    types |= {"softcap": "fp32", "in_features": "i32", "share": "i32", "out_features": "i32"}
    types |= dict.fromkeys(("tables_ptr", "lengths_ptr", "starts_ptr", "tiles_ptr", "arrived_ptr"), "*i32")
    types |= dict.fromkeys(("logs_ptr", "parts_ptr"), "*fp32")
    types |= {"top_k_ptr": "*i32", "top_p_ptr": "*fp64", "min_p_ptr": "*fp64", "min_temperature": "fp32"}
    types |= {"places_ptr": "*i16", "counts_ptr": "*i32", "masses_ptr": "*fp64", "vocab": "i32"}
    types |= dict.fromkeys(("temperature_stride", "k_stride", "p_stride", "min_p_stride"), "i32")
    types |= dict.fromkeys(("token_ids_ptr", "last_ptr"), "*i32")
    types |= dict.fromkeys(("temperature_ptr", "highest_ptr", "stretches_ptr", "least_ptr"), "*fp32")
    types |= dict.fromkeys(("edges_ptr", "sums_ptr", "last_edges_ptr", "last_sums_ptr"), "*fp32")
    types |= {"first_sums_ptr": "*fp32"}
    types |= {"keys_ptr": codes, "values_ptr": codes, "scales_ptr": "*bf16"} | more_types
    signature = {name: types.get(name, "*fp16") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name.endswith(("_ptr", "_features")) or name == "share"
    }
    options = {"num_warps": num_warps, "num_stages": num_stages}
    source = ASTSource(kernel, signature, constants, divisible)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

heads = {"GROUP": 4, "KV_HEADS": 8, "DIM": 128, "PAGE": 16, "CAPPED": False, "WIDTH": 128, "TILE": 64}
heads |= {"IS_DEPENDENT": True}
tiles = {"TILE_OUT": TILE_OUT, "TILE_IN": TILE_IN, "LINE": 64, "PREFETCHED": 1024, "IS_DEPENDENT": True}
coded = heads | {"HALF": 64}
del coded["WIDTH"]
def coded_decode(number, codes):
    shape = {"CODES": number, "TILE": 128, "SPLITS": 4, "LEAST": 0, "ROWS": 16}
    return ptx(coded_decode_kernel, coded | shape, 4, 3, codes)

def unpack(number, codes):
    shape = {"CODES": number, "KV_HEADS": 8, "DIM": 128, "PAGE": 16, "PAIRS": 1024, "IS_DEPENDENT": True}
    types = {"pages_ptr": "*i32", "scale_copies_ptr": "*bf16"}
    return ptx(unpack_kernel, shape, 4, 3, codes, **types)

def rotary(number, codes):
    shape = {"ROTATES": True, "NORMS": True, "CODES": number, "Q_HEADS": 32, "KV_HEADS": 8, "DIM": 128}
    shape |= {"PAGE": 16, "COLUMNS": 64, "HEADS": 8, "IS_DEPENDENT": True}
    types = {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "positions_ptr": "*i64", "slots_ptr": "*i64"}
    return ptx(rotary_kv_kernel, shape, 2, 3, codes, **types)

def fixed(tiles, is_apart):
    shape = {"ROWS": tiles.rows, "TILE_OUT": tiles.outputs, "TILE_IN": tiles.inputs, "IS_DEPENDENT": True}
    kind = {"BIASED": False, "SPLITS": 2, "APART": is_apart, "WHOLE": True}
    return ptx(fixed_kernel, kind | shape, tiles.num_warps, tiles.num_stages)

def few(kernel, plan, constants, codes, parts):
    tile = plan.setting_for(16, 4096, 4096).tile if plan is fp8_plan else plan.tile_for(16, 4096, 4096)
    kind = {"BIASED": False, "SPLITS": 2, "ROWS": 16, "EVEN": True, "LINE": 128, "PREFETCHED": 1024}
    shape = {"TILE_OUT": tile.outputs, "TILE_IN": tile.inputs, "IS_DEPENDENT": True}
    types = {"codes_ptr": codes, "weight_ptr": codes, "row_scales_ptr": "*fp32", "scales_ptr": "*fp32"}
    types["parts_ptr"] = parts
    return ptx(kernel, kind | shape | constants, tile.num_warps, tile.num_stages, **types)

def rows_of_int8(marks):
    kind = {"SOURCE": "x", "ADDS": False, "BY_ROW": True, "HAS_OUTLIERS": True, "LISTS": False}
    kind |= {"MARKS": marks, "KEEPS": marks, "CLEARED": 0, "LEVELS": 1}
    shape = {"WIDTH": 1024, "TILE": 1024, "IS_DEPENDENT": True}
    types = {"slots_ptr": "*i64", "flags_ptr": "*i32", "codes_ptr": "*i8", "scales_ptr": "*fp32"}
    types |= {"counts_ptr": "*i64", "cleared_ptr": "*i32", "slot_stride": "i32", "first_slot": "i32"}
    return ptx(int8_rows.quantize_kernel, kind | shape, 2, 3, **types, threshold="fp32")

def rows_of_fp8():
    kind = {"SOURCE": "x", "ADDS": False, "LARGEST": 448}
    shape = {"WIDTH": 1024, "TILE": 1024, "IS_DEPENDENT": True}
    return ptx(fp8.quantize_kernel, kind | shape, 2, 3, codes_ptr="*fp8e4nv", scales_ptr="*fp32")

norm = {"ADDS": True, "WIDTH": 4096, "COLUMNS": 4096, "ROWS": 1, "IS_DEPENDENT": True}
rows = {"CHUNKS": 32, "PADDED": 32, "CHUNK": 4096, "IS_DEPENDENT": True}
print(json.dumps({
    "weigh": ptx(weigh_kernel, rows | {"IS_FIRST": False}, 4, 3),
    "collect": ptx(collect_kernel, rows, 8, 3),
    "settle": ptx(settle_kernel, rows | {"WIDTH": 32, "ID_BITS": 17}, 8, 3),
    "decode": ptx(decode_kernel, heads | {"SPLITS": 4, "LEAST": 0, "ROWS": 16}, 4, 3),
    "rotary": rotary(0, "*fp16"),
    "rotary_int8": rotary(1, "*i8"),
    "rotary_fp8": rotary(2, "*fp8e4nv"),
    "coded_decode": coded_decode(1, "*i8"),
    "coded_decode_fp8": coded_decode(2, "*fp8e4nv"),
    "coded_prefill": ptx(
        coded_prefill_kernel, coded | {"CODES": 1, "FIXED": False, "ROWS": 128}, 8, 3, "*i8"
    ),
    "prefill": ptx(prefill_kernel, heads | {"FIXED": False, "SCALED": False, "ROWS": 128}, 8, 3),
    "scaled_prefill": ptx(prefill_kernel, heads | {"FIXED": False, "SCALED": True, "ROWS": 64}, 4, 2),
    "unpack": unpack(1, "*i8"),
    "unpack_fp8": unpack(2, "*fp8e4nv"),
    "stream": ptx(stream_kernel, tiles | {"BIASED": False, "SPLITS": 4, "ROWS": 16}, 4, STAGES),
    "fixed": fixed(FEW, True),
    "fixed_many": fixed(MANY, False),
    "int8": few(int8.few_rows_kernel, int8_plan, {"LEVELS": 3}, "*i8", "*i32"),
    "fp8": few(fp8.few_rows_kernel, fp8_plan, {}, "*fp8e4nv", "*fp32"),
    "int8_rows": rows_of_int8(False),
    "int8_rows_for_tiles": rows_of_int8(True),
    "fp8_rows": rows_of_fp8(),
    "norm": ptx(add_rms_norm_kernel, norm, 8, 3),
}))
"""
GLOBAL_ACCESS = r"(?:ld|st|atom)\.global|cp\.async\.c[ag]"


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    cache = str(tmp_path_factory.mktemp("triton"))
    environment = {**os.environ, "TRITON_CACHE_DIR": cache, "PYTHONPATH": str(Path.cwd())}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", COMPILE]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    compiled: dict[str, str] = json.loads(found)
    return compiled


@pytest.mark.parametrize(
    ("kernel", "product"),
    [
        ("decode", "mma.sync"),
        ("coded_decode", "mma.sync"),
        ("coded_decode_fp8", "mma.sync"),
        ("coded_prefill", "wgmma.mma_async"),
        ("prefill", "wgmma.mma_async"),
        ("scaled_prefill", "wgmma.mma_async"),
        ("stream", "wgmma.mma_async"),
        ("fixed", "wgmma.mma_async"),
        ("fixed_many", "wgmma.mma_async"),
        ("int8", "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8"),
        ("fp8", "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3"),
    ],
)
def test_tensor_cores_and_wide_copies(ptx: dict[str, str], kernel: str, product: str) -> None:
    """Keys, values and weights travel 16 bytes at a time; only page numbers and scales are narrower."""
    assert product in ptx[kernel]
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x\w+)", ptx[kernel])
    assert copies.count("0x10") >= 16
    narrow = {"0x4"} if "decode" in kernel or "prefill" in kernel else set()
    if kernel in ("coded_prefill", "scaled_prefill"):  # codes of a prompt's values; two tokens' scales
        narrow.add("0x8")
    assert set(copies) <= {"0x10", *narrow}


def test_one_instruction_adds_up_few_rows_and_many(ptx: dict[str, str]) -> None:
    """The order in which another one adds is nowhere promised to be the same."""
    products = {
        name: set(re.findall(r"wgmma\.mma_async[\w.]*", ptx[name])) for name in ("fixed", "fixed_many")
    }
    assert products["fixed"] == products["fixed_many"]
    assert len(products["fixed"]) == 1


@pytest.mark.parametrize("kernel", ["coded_decode", "coded_decode_fp8"])
def test_codes_become_operands_in_registers(ptx: dict[str, str], kernel: str) -> None:
    """Between the copies and the products of a decode no code is stored again, and bytes go by pairs."""
    text = ptx[kernel]
    stored = re.findall(r"st\.shared\S*", text)
    assert len(stored) < 40  # maxima, sums and weights alone; a tile of values in float16 would take 64 more
    assert "ldmatrix.sync.aligned.m8n8.x4.trans" in text
    assert len(re.findall(r"prmt\.b32", text)) >= 64
    assert ("cvt.rn.f16x2.e4m3x2" in text) is (kernel == "coded_decode_fp8")


@pytest.mark.parametrize("kernel", ["unpack", "unpack_fp8"])
def test_pages_are_unpacked_16_bytes_at_a_time(ptx: dict[str, str], kernel: str) -> None:
    """Keys' and values' loads, and twice as many stores each."""
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx[kernel])) == 2
    assert len(re.findall(r"st\.global\.v4\.b32", ptx[kernel])) == 4


def test_codes_are_made_where_k_and_v_are_written(ptx: dict[str, str]) -> None:
    """E4M3 by the instruction that stays finite, with a bfloat16 scale; other caches know nothing of it."""
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx["rotary_fp8"]
    for kernel in ("rotary_int8", "rotary_fp8"):
        assert "cvt.rn.bf16.f32" in ptx[kernel]
    assert "cvt.rn.bf16" not in ptx["rotary"]


def test_sums_of_fp8_are_waited_for_before_they_are_added(ptx: dict[str, str]) -> None:
    """Triton's own way to carry them into float32, an option of `dot`, reads them while they are summed."""
    _, _, behind = ptx["fp8"].rpartition("wgmma.mma_async")
    added = re.search(r"add\.(rn\.)?f32", behind)
    assert added is not None
    assert behind.index("wgmma.wait_group.sync.aligned 0") < added.start()


PREFETCHING = ("stream", "int8", "fp8")


@pytest.mark.parametrize(
    "kernel",
    [
        "decode", "coded_decode", "prefill", "coded_prefill", "scaled_prefill", "unpack", "rotary",
        "rotary_int8", "fixed", "fixed_many", "norm", "int8_rows", "fp8_rows", *PREFETCHING,
    ],
)  # fmt: skip
def test_nothing_is_touched_before_the_predecessor_is_done(ptx: dict[str, str], kernel: str) -> None:
    wait = ptx[kernel].index("griddepcontrol.wait")
    first = re.search(GLOBAL_ACCESS, ptx[kernel])
    assert first is not None
    assert wait < first.start()
    assert ("prefetch.global.L2" in ptx[kernel][:wait]) is (kernel in PREFETCHING)


def test_who_lets_its_successor_begin_before_it_waits(ptx: dict[str, str]) -> None:
    """All but the 8-bit linears of few rows in Triton, and the kernels that make their rows."""
    waiting = {
        name
        for name, text in ptx.items()
        if text.index("griddepcontrol.wait") < text.index("griddepcontrol.launch_dependents")
    }
    assert waiting == {"int8", "fp8", "int8_rows", "fp8_rows"}
