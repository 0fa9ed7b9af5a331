"""config.json alone -> the tensors of a checkpoint, drawn on the device: for timing, not for answers.

engine/startup --config.json, seed--> RandomWeights --read--> precision backends, or a checkpoint folder

Each tensor has a generator of its own, seeded by (seed, name): the order of reading changes nothing, and a
second reading is the first. Values are as transformers initialises a model: linears and embedding normal with
the standard deviation `initializer_range`, norms 1, biases 0. A CPU and a GPU draw different numbers.

AWQ's packed tensors are drawn as they lie: codes evenly over their range, zeros evenly on the two middle
codes, so that the mean is 0, and scales within a factor of three such that the dequantized weights have the
same standard deviation. Nothing is calibrated.

Outlier features, for the timing of int8, are made by gains of norms; the columns of weights behind them are
divided by the gain, so that nothing else grows. AWQ folds such gains away, so its tensors have none.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from service.errors import CheckpointError, SettingError, SystemProblem
from service.model.checkpoint import TensorInfo, TensorSource
from service.model.config import read_config, read_json
from service.model.folders import RANDOM, is_whole, make_whole, random_origin, write_json, write_manifest
from service.model.layout import expected_tensors
from service.model.shards import ShardWriter, copy_companions

Progress = Callable[[str, int, int, str], None]  # stage, done, total, unit: as messages.Loading

DEFAULT_STANDARD_DEVIATION = 0.02
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CHUNK = 1 << 24  # numbers that are drawn in float32 at once: 64 MiB beside the tensor
# a norm's gain that lifts a feature of unit variance beyond LLM.int8()'s threshold of 6 in 93 % of all tokens
OUTLIER_GAIN = 64.0
# linears -> the norm that makes their input
INPUT_NORMS = {
    **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
}
SMALLEST_SCALE, LARGEST_SCALE = 0.5, 1.5  # of AWQ's groups, relative to their root mean square, about
COMPANION_BYTES = 64_000_000  # tokenizer and headers


@dataclass(frozen=True)
class Draw:
    """What random weights depend on besides config.json and the kind of device."""

    seed: int = 0
    outliers: int = 0  # features in the input of each q, k, v and gate, up that a norm's gain lifts
    standard_deviation: float = 0.0  # 0: as config.json says


class RandomWeights(TensorSource):
    """As a Checkpoint, for a folder without weights; `quantization`: of AWQ, whose tensors are drawn packed.

    Raises CheckpointError for a config.json that cannot be served, SettingError for more outliers than
    features.
    """

    def __init__(
        self, path: Path, device: torch.device, draw: Draw, quantization: dict[str, Any] | None = None
    ) -> None:
        self.path, self.device, self.draw = path, device, draw
        self.config, own = read_config(path)
        self.quantization = own if quantization is None else quantization
        self.raw = read_json(path / "config.json")
        self.standard_deviation = draw.standard_deviation or standard_deviation(self.raw)
        if draw.outliers > self.config.hidden_size:
            raise SettingError(
                f"setting `random_outliers` = `{draw.outliers}`: the model's hidden states have "
                f"{self.config.hidden_size} features",
                hint="a handful is what trained models have: 4 to 8",
            )
        self.random_weights = {
            "seed": str(draw.seed),
            "outliers": str(draw.outliers if self.quantization is None else 0),
            "standard_deviation": f"{self.standard_deviation:g}",
            "device": device.type,
        }
        plain, linear = expected_tensors(self.config)
        dtype = dtype_of(self.raw)
        self._tensors = {name: TensorInfo(RANDOM, shape, dtype) for name, shape in plain.items()}
        for name, shape in linear.items():
            if self.quantization is None or name.endswith(".bias"):
                self._tensors[name] = TensorInfo(RANDOM, shape, dtype)
            else:
                self._tensors |= packed_infos(name.removesuffix(".weight"), shape, self.quantization)

    def quantized(self, quantization: dict[str, Any]) -> "RandomWeights":
        """The same model in AWQ's layout."""
        return RandomWeights(self.path, self.device, self.draw, quantization)

    @property
    def num_bytes(self) -> int:
        """Of all tensors, as a checkpoint would hold them."""
        total = 0
        for info in self._tensors.values():
            assert isinstance(info.dtype, torch.dtype), "ours"
            total += torch.Size(info.shape).numel() * info.dtype.itemsize
        return total

    def read(self, name: str) -> Tensor:
        """The tensor, on the device; the same one each time."""
        info = self.info(name)
        assert isinstance(info.dtype, torch.dtype), "ours"
        tensor = torch.empty(info.shape, dtype=info.dtype, device=self.device)
        generator = self._generator(name)
        if name.endswith(("qweight", "qzeros", "scales")):
            assert self.quantization is not None
            return self._fill_packed(tensor, name.rpartition(".")[2], generator, self.quantization["bits"])
        if name.endswith("norm.weight"):
            tensor.fill_(1)
            tensor[self._outlier_features(name)] = OUTLIER_GAIN
            return tensor
        if name.endswith(".bias"):
            return tensor.zero_()
        fill(tensor, lambda chunk: chunk.normal_(0, self.standard_deviation, generator=generator))
        for linear, norm in INPUT_NORMS.items():
            if name.endswith(f"{linear}.weight"):
                made_by = name.replace(linear, norm)
                tensor[:, self._outlier_features(made_by)] /= OUTLIER_GAIN
        return tensor

    def _generator(self, name: str) -> torch.Generator:
        generator = torch.Generator(self.device)
        generator.manual_seed(seed_of(self.draw.seed, name))
        return generator

    def _outlier_features(self, norm: str) -> Tensor:
        """Which features of this norm's output are outliers: int64 [outliers]."""
        is_input = norm.endswith(tuple(f"{name}.weight" for name in INPUT_NORMS.values()))
        if not is_input or self.quantization is not None:
            return torch.empty(0, dtype=torch.int64, device=self.device)
        count = self.config.hidden_size
        order = torch.randperm(count, generator=self._generator(norm), device=self.device)
        return order[: self.draw.outliers]

    def _fill_packed(self, tensor: Tensor, kind: str, generator: torch.Generator, bits: int) -> Tensor:
        """One of AWQ's three tensors, by kind."""
        middle = 1 << bits - 1
        if kind == "scales":
            uniform_variance = (LARGEST_SCALE - SMALLEST_SCALE) ** 2 / 12
            mean = (LARGEST_SCALE + SMALLEST_SCALE) / 2
            # codes have the variance of 2^bits even steps, zeros that of a coin
            code_variance = ((2 * middle) ** 2 - 1) / 12 + 0.25
            unit = self.standard_deviation / (code_variance * (mean**2 + uniform_variance)) ** 0.5
            low, high = SMALLEST_SCALE * unit, LARGEST_SCALE * unit
            return fill(tensor, lambda chunk: chunk.uniform_(low, high, generator=generator))
        words = tensor.random_(-(2**31), 2**31, generator=generator)
        if kind == "qweight":
            return words.bitwise_and_(nibbles(2 * middle - 1))
        return words.bitwise_and_(nibbles(1)).add_(nibbles(middle - 1))


def fill(tensor: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
    """Draws in float32, a chunk at a time, rounded to the tensor's type: 16-bit drawing has coarse tails."""
    flat = tensor.view(-1)
    for chunk in flat.split(CHUNK):
        chunk.copy_(draw(torch.empty(len(chunk), dtype=torch.float32, device=tensor.device)))
    return tensor


def nibbles(value: int) -> int:
    """0..15 in each of the eight nibbles of a word, as an int32."""
    word = value * 0x11111111
    return word - (1 << 32) if word >> 31 else word


def seed_of(seed: int, name: str) -> int:
    """63 bits for one tensor's generator."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def standard_deviation(raw: dict[str, Any]) -> float:
    value = raw.get("initializer_range", DEFAULT_STANDARD_DEVIATION)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise CheckpointError(
            f"config.json: `initializer_range` is `{value}`, accepted is a number above 0, at most 1",
            hint=f"leave it out for {DEFAULT_STANDARD_DEVIATION}",
        )
    return float(value)


def dtype_of(raw: dict[str, Any]) -> torch.dtype:
    """The type that a checkpoint of this config.json would have; bfloat16 where it does not say."""
    value = raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"
    if not isinstance(value, str) or value not in DTYPES:
        raise CheckpointError(
            f"config.json: `dtype` is `{value}`, accepted are {', '.join(DTYPES)}",
            hint="leave it out for bfloat16",
        )
    return DTYPES[value]


def packed_infos(path: str, shape: tuple[int, ...], quantization: dict[str, Any]) -> dict[str, TensorInfo]:
    """One linear [out, in] -> AWQ's three tensors in AutoAWQ's GEMM layout."""
    out_features, in_features = shape
    bits, group_size = quantization.get("bits"), quantization.get("group_size")
    if bits not in (4, 3) or type(group_size) is not int or group_size < 1 or in_features % group_size:
        raise CheckpointError(
            f"`{path}`: random weights in {bits} bits and groups of {group_size} (`quantization_config`) "
            "cannot be drawn; accepted are AWQ's 4 and 3 bits, in groups that divide the input features",
            hint="take `quantization_config` out of config.json and name a `--precision`",
        )
    groups = in_features // group_size
    return {
        f"{path}.qweight": TensorInfo(RANDOM, (in_features, out_features // 8), torch.int32),
        f"{path}.qzeros": TensorInfo(RANDOM, (groups, out_features // 8), torch.int32),
        f"{path}.scales": TensorInfo(RANDOM, (groups, out_features), torch.float16),
    }


def save_random(source: RandomWeights, tokenizer: Path, folder: Path, progress: Progress) -> None:
    """Write the weights as a checkpoint that this server and transformers load: all of it, or nothing.

    The same weights that are there already stay. Raises SystemProblem for anything else in `folder`, and when
    the disk has no room.
    """
    config = source.raw
    if source.quantization is not None:
        config = config | {"quantization_config": source.quantization}
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        same = random_origin(folder) == source.random_weights and read_json(folder / "config.json") == config
        if same and is_whole(folder):
            return
        raise SystemProblem(
            f"`{folder}` is there already and holds something else",
            hint="choose another folder with `--save`",
        )

    def write(partial: Path) -> None:
        writer = ShardWriter(partial)
        for number, name in enumerate(source.names, 1):
            writer.add(name, source.read(name))
            progress("save", number, len(source.names), "tensors")
        writer.finish()
        copy_companions(source.path, partial)
        if tokenizer != source.path:
            copy_companions(tokenizer, partial)
        write_json(partial / "config.json", config)
        write_manifest(partial, {RANDOM: source.random_weights})

    make_whole(folder, source.num_bytes + COMPANION_BYTES, f"`{source.path.name}` with random weights", write)
