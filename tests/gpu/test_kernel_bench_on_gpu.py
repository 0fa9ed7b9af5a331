"""`halftone bench --kernels` on a GPU: everybody has a figure, and nobody reads faster than reading."""

import json
from pathlib import Path

import pytest

from service.__main__ import run

pytestmark = pytest.mark.gpu


def test_nobody_beats_the_ceiling(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    flags = ["--model", "preset:llama-3.1-8b", "--rows", "1,64", "--precisions", "awq,nf4,int8,fp16"]
    assert run(["bench", "--kernels", "--device", "cuda", "--repeats", "5", *flags, "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert not result["absent"]
    layers = {(layer["contestant"], layer["rows"]): layer for layer in result["layers"]}
    assert {rows for _, rows in layers} == {1, 64}
    assert len(layers) == 2 * (4 + 4)
    for (contestant, _), layer in layers.items():
        assert layer["is_from_memory"]
        assert layer["is_captured"] == (contestant != "bitsandbytes int8")
        assert 0 < layer["ceiling_share"] < 1.05, contestant
    assert 1e12 < result["ceiling_bytes_per_s"] < 1e13
