"""AWQ: scale up the input features that matter before rounding, scale them down where they are made.

weights and input moments of one layer --quantize_layer()--> codes, and the folded 16-bit remainder

After Lin et al., "AWQ: Activation-aware Weight Quantization" (arXiv 2306.00978): the scale search of
section 3.2, s = mean|x|^alpha on a grid of alphas, and the clipping search of section 4. One scale vector
serves all linears that share an input; its inverse goes into the norm, or into the rows of the linear,
that makes this input. Groups have integer zero points, so a zero weight stays zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from service.quantize.calibration import InputStatistics, blocks

ALPHAS = 20  # resolution of the scale search: alpha is a multiple of 1/20, from 0 (no scaling) on
STRIDE = 3  # of the first pass over these points; the second tries the neighbours of the best
CLIP_STEPS = 20  # shrunken ranges tried beside the full one
SMALLEST_RANGE = 0.4  # of the full range, the last one tried
SMALLEST_SCALE = 2.0**-24  # float16's, so that no stored scale is zero

# what makes a group's input -> the tensor that takes the inverse of its scale
NORMS = {"qkv_proj": "input_layernorm", "gate_up_proj": "post_attention_layernorm"}


@dataclass(frozen=True)
class Grid:
    """Integers 0 .. 2^bits - 1 for each run of `group_size` input features of a row."""

    bits: int
    group_size: int

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1


@dataclass(frozen=True)
class Rounded:
    """A weight on its grid: (codes - zeros) * scales."""

    codes: Tensor  # uint8 [out, in]
    zeros: Tensor  # uint8 [out, in/group]
    scales: Tensor  # float16 [out, in/group]

    def dequantize(self) -> Tensor:
        """-> float32 [out, in]."""
        out, num_groups = self.scales.shape
        codes = self.codes.view(out, num_groups, -1).float()
        return ((codes - self.zeros.unsqueeze(-1)) * self.scales.float().unsqueeze(-1)).flatten(1)


@dataclass(frozen=True)
class QuantizedLayer:
    """One decoder layer: linears on their grids, and the tensors that took up a scale's inverse."""

    linears: dict[str, Rounded]  # by path below the layer: self_attn.q_proj
    folded: dict[str, Tensor]  # by tensor name below the layer, in the checkpoint's dtype
    losses: dict[str, float]  # layer class -> output error relative to rounding without AWQ


def step_and_zero(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Range of each group, any shape -> (step, a float16 value; integer zero point), both float32.

    The range is widened to hold 0, and the step is rounded before any code is, so that codes fit the
    scale that is stored.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = ((high - low) / grid.max_code).half().float().clamp_(min=SMALLEST_SCALE)
    return step, (-low / step).round_().clamp_(0, grid.max_code)


def rounding_error(weight: Tensor, step: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Groups [..., group] with step and zero [...] -> what rounding changes, [..., group]."""
    step, zero = step.unsqueeze(-1), zero.unsqueeze(-1)
    codes = (weight / step).round_().add_(zero).clamp_(0, grid.max_code)
    return codes.sub_(zero).mul_(step).sub_(weight)


def output_error(error: Tensor, gram: Tensor) -> float:
    """Weight error D [out, in] -> tr(D G D^T), the mean squared norm of D x."""
    total = torch.zeros((), dtype=torch.float64, device=error.device)
    for block in blocks(gram):  # what lies on both sides of the diagonal counts twice and is computed once
        product = error[:, block] @ gram[block, block.start :]
        product.mul_(error[:, block.start :])
        width = block.stop - block.start
        total += product[:, :width].sum(dtype=torch.float64) + 2 * product[:, width:].sum(dtype=torch.float64)
    return float(total)


def full_range_error(weight: Tensor, grid: Grid) -> Tensor:
    """[out, in] -> the change that rounding each group over its full range makes, [out, in]."""
    groups = weight.unflatten(1, (-1, grid.group_size))
    low, high = torch.aminmax(groups, dim=-1)
    return rounding_error(groups, *step_and_zero(low, high, grid), grid).flatten(1)


def search_scale(weight: Tensor, inputs: InputStatistics, grid: Grid) -> tuple[Tensor, float, float]:
    """Linears of one input, stacked [out, in] -> (scale [in], its output error, that without scaling).

    Every third alpha first, then the neighbours of the best one: the matmul is what the search costs.
    """
    magnitude = inputs.mean_abs.clamp(min=1e-4)
    scales: dict[int, Tensor] = {}
    errors: dict[int, float] = {}

    def attempt(point: int) -> None:
        scale = magnitude.pow(point / ALPHAS)
        scales[point] = scale.div_((scale.max() * scale.min()).sqrt())
        change = full_range_error(weight * scale, grid).div_(scale)
        errors[point] = output_error(change, inputs.gram)

    for point in range(0, ALPHAS, STRIDE):
        attempt(point)
    coarse = min(errors, key=errors.__getitem__)
    for point in {max(coarse - 1, 0), min(coarse + 1, ALPHAS)} - {coarse}:
        attempt(point)
    best = min(errors, key=errors.__getitem__)
    return scales[best], errors[best], errors[0]


def search_range(weight: Tensor, gram: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """[out, in] -> (step, zero) [out, in/group]: for each group, the range that hurts its outputs least.

    The full range is tried first, so no group gets worse by the search. Errors of different groups are
    taken as uncorrelated: a group sees its own block of `gram`.
    """
    size = grid.group_size
    num_groups = weight.shape[1] // size
    groups = weight.unflatten(1, (num_groups, size)).transpose(0, 1).contiguous()  # [groups, out, size]
    blocks = torch.stack([gram[i : i + size, i : i + size] for i in range(0, weight.shape[1], size)])
    low, high = torch.aminmax(groups, dim=-1)
    best_step, best_zero = step_and_zero(low, high, grid)
    best_error = torch.full_like(low, float("inf"))
    for ratio in torch.linspace(1, SMALLEST_RANGE, CLIP_STEPS + 1).tolist():
        step, zero = step_and_zero(low * ratio, high * ratio, grid)
        change = rounding_error(groups, step, zero, grid)
        error = torch.bmm(change, blocks).mul_(change).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_step = torch.where(better, step, best_step)
        best_zero = torch.where(better, zero, best_zero)
    return best_step.t().contiguous(), best_zero.t().contiguous()


def round_weight(weight: Tensor, gram: Tensor | None, grid: Grid) -> Rounded:
    """[out, in] -> codes; with `gram`, over the ranges that `search_range` finds, else over full ranges."""
    groups = weight.unflatten(1, (-1, grid.group_size))
    if gram is None:
        step, zero = step_and_zero(*torch.aminmax(groups, dim=-1), grid)
    else:
        step, zero = search_range(weight, gram, grid)
    codes = (groups / step.unsqueeze(-1)).round_().add_(zero.unsqueeze(-1)).clamp_(0, grid.max_code)
    return Rounded(codes.flatten(1).to(torch.uint8), zero.to(torch.uint8), step.half())


def inverse_of(norm: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Norm weight and wanted scale [in] -> (norm / scale in the norm's dtype, the scale that it amounts to).

    Weights are multiplied by what the 16-bit division came out as, so folding costs no accuracy.
    """
    folded = (norm.float() / scale).to(norm.dtype)
    usable = (folded != 0) & (norm != 0)
    return folded, torch.where(usable, norm.float() / folded.float(), scale)


def quantize_layer(
    tensors: Mapping[str, Tensor],
    groups: Mapping[str, tuple[str, ...]],
    inputs: Mapping[str, InputStatistics],
    grid: Grid,
) -> QuantizedLayer:
    """One layer's tensors by name below the layer, in the checkpoint's dtype.

    `groups` names the linears of each layer class, `inputs` has the moments of their input. The scale of
    down_proj's input goes into up_proj's rows; that of o_proj's input into v_proj's, if every value head
    serves one query head. Otherwise o_proj is rounded as it is.
    """
    weights = {path: tensors[f"{path}.weight"].float() for paths in groups.values() for path in paths}
    makers = {"down_proj": groups["gate_up_proj"][1], "o_proj": groups["qkv_proj"][2]}
    scales: dict[str, Tensor] = {}
    folded: dict[str, Tensor] = {}
    losses: dict[str, float] = {}
    for name, paths in groups.items():
        if name in makers and weights[makers[name]].shape[0] != weights[paths[0]].shape[1]:
            continue
        wanted, error, plain_error = search_scale(
            torch.cat([weights[path] for path in paths]), inputs[name], grid
        )
        losses[name] = error / max(plain_error, 1e-30)
        if name in NORMS:
            norm = f"{NORMS[name]}.weight"
            folded[norm], scales[name] = inverse_of(tensors[norm], wanted)
        else:
            scales[name] = wanted
    for name, scale in scales.items():
        for path in groups[name]:
            weights[path] = weights[path] * scale
        if name in makers:
            maker = makers[name]
            weights[maker] = weights[maker] / scale.unsqueeze(1)
            bias = f"{maker}.bias"
            if bias in tensors:
                folded[bias] = (tensors[bias].float() / scale).to(tensors[bias].dtype)
    linears = {}
    for name, paths in groups.items():
        moments = inputs[name].divided(scales[name]) if name in scales else inputs[name]
        for path in paths:
            linears[path] = round_weight(weights[path], moments.gram, grid)
    return QuantizedLayer(linears, folded, losses)
