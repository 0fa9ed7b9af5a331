"""The AWQ quantizer on matrices made to show what each step is for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.quantize.awq import (
    Grid,
    full_range_error,
    inverse_of,
    output_error,
    quantize_layer,
    round_weight,
    search_range,
    search_scale,
)
from service.quantize.calibration import InputStatistics

HIDDEN, INNER, TOKENS = 64, 96, 256
GRIDS = (Grid(4, 32), Grid(3, 32))
GROUPS = {
    "qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_proj": ("self_attn.o_proj",),
    "gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "down_proj": ("mlp.down_proj",),
}


def salient_input(features: int, seed: int = 0) -> Tensor:
    """[TOKENS, features] with a few features thirty times the others, as real activations have."""
    torch.manual_seed(seed)
    x = torch.randn(TOKENS, features)
    x[:, ::17] *= 30
    return x


def make_layer(kv_features: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(1)
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv_features, HIDDEN),
        "self_attn.v_proj": (kv_features, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    tensors = {f"{path}.weight": torch.randn(shape) * 0.05 for path, shape in shapes.items()}
    for path in ("self_attn.v_proj", "mlp.up_proj"):
        tensors[f"{path}.bias"] = torch.randn(shapes[path][0])
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{norm}.weight"] = torch.rand(HIDDEN) + 0.5
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def layer_inputs() -> dict[str, InputStatistics]:
    features = {"qkv_proj": HIDDEN, "o_proj": HIDDEN, "gate_up_proj": HIDDEN, "down_proj": INNER}
    return {
        name: InputStatistics.of(salient_input(count, seed))
        for seed, (name, count) in enumerate(features.items())
    }


@given(st.integers(0, 2**32), st.sampled_from(GRIDS), st.sampled_from([1e-3, 1e-2, 100.0]), st.floats(-1, 1))
@settings(max_examples=40, deadline=None)
def test_rounding_is_within_a_step_and_keeps_zero(seed: int, grid: Grid, size: float, shift: float) -> None:
    """Half a step from the code, and up to half a step more where rounding the zero point cut the range."""
    torch.manual_seed(seed)
    weight = (torch.randn(16, 64) + shift) * size
    weight[:, ::5] = 0
    rounded = round_weight(weight, None, grid)
    assert int(rounded.codes.max()) <= grid.max_code
    assert int(rounded.zeros.max()) <= grid.max_code
    step = rounded.scales.float().repeat_interleave(grid.group_size, 1)
    change = rounded.dequantize() - weight
    # float16 rounds the step itself by up to 2^-11, which counts once for each of the codes
    assert bool((change.abs() <= step * (1.0 + 0.01)).all())
    assert bool((rounded.dequantize()[:, ::5] == 0).all())
    torch.testing.assert_close(change, full_range_error(weight, grid))


def test_a_zero_matrix_stays_zero() -> None:
    rounded = round_weight(torch.zeros(8, 32), torch.eye(32), GRIDS[0])
    assert bool((rounded.scales > 0).all())
    assert not rounded.dequantize().any()


def test_output_error_is_the_mean_square_of_the_output() -> None:
    x, error = salient_input(HIDDEN), torch.randn(24, HIDDEN)
    expected = float((x @ error.t()).square().sum() / TOKENS)
    assert output_error(error.clone(), InputStatistics.of(x).gram) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("grid", GRIDS, ids=["int4", "int3"])
def test_salient_features_are_protected(grid: Grid) -> None:
    """What AWQ is: less error where activations are large, and the output is better for it."""
    torch.manual_seed(2)
    x, weight = salient_input(HIDDEN), torch.randn(48, HIDDEN)
    inputs = InputStatistics.of(x)
    scale, error, plain_error = search_scale(weight, inputs, grid)
    salient = torch.zeros(HIDDEN, dtype=torch.bool)
    salient[::17] = True
    assert scale[salient].min() > 2 * scale[~salient].max()
    plain = full_range_error(weight, grid)
    scaled = full_range_error(weight * scale, grid) / scale
    assert scaled[:, salient].square().mean() < plain[:, salient].square().mean() / 4
    assert error < plain_error / 2
    assert error == pytest.approx(float((x @ scaled.t()).square().sum() / TOKENS), rel=1e-4)


@pytest.mark.parametrize("grid", GRIDS, ids=["int4", "int3"])
def test_no_group_is_worse_for_the_range_search(grid: Grid) -> None:
    torch.manual_seed(3)
    weight = torch.randn(48, HIDDEN)
    weight[:, 5] *= 6  # a heavy tail, which clipping is for
    gram = InputStatistics.of(salient_input(HIDDEN)).gram
    clipped = round_weight(weight, gram, grid).dequantize() - weight
    plain = full_range_error(weight, grid)
    better = 0
    for start in range(0, HIDDEN, grid.group_size):
        group = slice(start, start + grid.group_size)
        block = gram[group, group]
        after = ((clipped[:, group] @ block) * clipped[:, group]).sum(1)
        before = ((plain[:, group] @ block) * plain[:, group]).sum(1)
        assert bool((after <= before * (1 + 1e-4) + 1e-6).all())
        better += int((after < 0.9 * before).sum())
    assert better > 10
    assert search_range(weight, gram, grid)[0].shape == (48, HIDDEN // grid.group_size)


@pytest.mark.parametrize("kv_features", [HIDDEN, HIDDEN // 2], ids=["heads-match", "grouped-query"])
def test_folding_leaves_the_function(kv_features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With rounding taken out, the folded layer computes what the unfolded one did, in float32 to 1e-5."""
    kept: list[Tensor] = []

    class Unrounded:
        def __init__(self, weight: Tensor, gram: Tensor | None, grid: Grid) -> None:
            kept.append(weight)
            self.weight = weight

        def dequantize(self) -> Tensor:
            return self.weight

    monkeypatch.setattr("service.quantize.awq.round_weight", Unrounded)
    tensors = make_layer(kv_features)
    layer = quantize_layer(tensors, GROUPS, layer_inputs(), GRIDS[0])
    after = {**tensors, **layer.folded, **{f"{p}.weight": r.dequantize() for p, r in layer.linears.items()}}
    assert len(kept) == 7
    assert ("o_proj" in layer.losses) == (kv_features == HIDDEN)
    assert not torch.equal(after["mlp.up_proj.bias"], tensors["mlp.up_proj.bias"])
    assert torch.equal(after["self_attn.v_proj.bias"], tensors["self_attn.v_proj.bias"]) == (
        kv_features != HIDDEN
    )
    x = torch.randn(16, HIDDEN)
    for before, now in zip(mlp_and_attention(tensors, x), mlp_and_attention(after, x), strict=True):
        torch.testing.assert_close(now, before, rtol=1e-5, atol=1e-5)


def mlp_and_attention(tensors: dict[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
    """What a layer makes of x, with a softmax-free attention that is linear in v, as attention is."""

    def linear(path: str, value: Tensor) -> Tensor:
        y = value @ tensors[f"{path}.weight"].t()
        return y + tensors[f"{path}.bias"] if f"{path}.bias" in tensors else y

    normed = x * tensors["input_layernorm.weight"]
    q, k, v = (linear(path, normed) for path in GROUPS["qkv_proj"])
    attended = torch.softmax(q[:, :16] @ k[:, :16].t(), -1) @ v
    attended = attended.repeat(1, HIDDEN // attended.shape[1])
    normed = x * tensors["post_attention_layernorm.weight"]
    inner = torch.nn.functional.silu(linear("mlp.gate_proj", normed)) * linear("mlp.up_proj", normed)
    return q, k, linear("self_attn.o_proj", attended), linear("mlp.down_proj", inner)


@pytest.mark.parametrize("grid", GRIDS, ids=["int4", "int3"])
def test_awq_is_no_worse_than_round_to_nearest_on_any_linear(grid: Grid) -> None:
    tensors, inputs = make_layer(HIDDEN), layer_inputs()
    layer = quantize_layer(tensors, GROUPS, inputs, grid)
    assert all(loss <= 1 for loss in layer.losses.values())
    for name in ("qkv_proj", "gate_up_proj", "down_proj"):
        before = after = 0.0
        for path in GROUPS[name]:
            weight = tensors[f"{path}.weight"]
            if path in ("self_attn.v_proj", "mlp.up_proj"):
                continue  # their rows carry the next linear's scale; that is covered by its own error
            norm = {"qkv_proj": "input_layernorm", "gate_up_proj": "post_attention_layernorm"}.get(name)
            back = (
                layer.folded[f"{norm}.weight"] / tensors[f"{norm}.weight"]
                if norm
                else layer.folded["mlp.up_proj.bias"] / tensors["mlp.up_proj.bias"]
            )
            change = layer.linears[path].dequantize() * back - weight
            before += output_error(full_range_error(weight, grid), inputs[name].gram)
            after += output_error(change, inputs[name].gram)
        assert after < before


def test_a_folded_norm_loses_nothing_to_its_sixteen_bits() -> None:
    norm = (torch.rand(HIDDEN) + 0.5).to(torch.bfloat16)
    norm[3] = 0
    wanted = torch.rand(HIDDEN) * 20 + 0.1
    folded, scale = inverse_of(norm, wanted)
    assert folded.dtype == torch.bfloat16
    torch.testing.assert_close(folded.float() * scale, norm.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(scale, wanted, rtol=2**-7, atol=0)
