"""`--precisions fp16,nf4,awq=ORG/MODEL-AWQ --kv-dtypes auto,int8` -> the modes, each with a name of its own.

cli --text--> parse_modes() --Modes--> Plan; check_checkpoint() holds a mode's own checkpoint against the
model's
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from service.compare.report import Mode
from service.errors import CheckpointError, PrecisionError, SettingError
from service.precision import TABLE
from service.precision.spec import PrecisionSpec

SIXTEEN_BIT = ("bf16", "fp16")
REFERENCES = (*SIXTEEN_BIT, "fp32")
KV_DTYPES = ("auto", "int8", "fp8")
# what two checkpoints of one model agree in; a default is what config.json means by leaving the field out
SHAPE_FIELDS = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta", "rms_norm_eps"),
)
AGAIN = "again"  # the reference's second name, where it is compared with itself


def split_modes(text: str) -> list[str]:
    """`nf4:block=64,double_quant=off,awq=ORG/X` -> [`nf4:block=64,double_quant=off`, `awq=ORG/X`].

    A comma separates modes and options alike; a piece continues the mode before it, where that has options
    and the piece is `option=value` and no precision's own checkpoint.
    """
    modes: list[str] = []
    for piece in filter(None, (piece.strip() for piece in text.split(","))):
        name = piece.partition("=")[0]
        is_option = "=" in piece and ":" not in name and name not in TABLE
        if is_option and modes and ":" in modes[-1].partition("=")[0]:
            modes[-1] += f",{piece}"
        else:
            modes.append(piece)
    return modes


def parse_modes(precisions: str, kv_dtypes: str = "") -> list[Mode]:
    """Every precision with every type of KV cache, in the order given; names unique.

    Raises PrecisionError for a precision that does not exist or comes twice, SettingError for a KV type.
    """
    caches = [cache.strip() for cache in kv_dtypes.split(",") if cache.strip()] or ["auto"]
    for cache in caches:
        if cache not in KV_DTYPES:
            raise SettingError(
                f"`--kv-dtypes {kv_dtypes}`: `{cache}` does not exist; accepted are {', '.join(KV_DTYPES)}"
            )
    parsed = [parse_mode(text) for text in split_modes(precisions)]
    if not parsed:
        raise PrecisionError("`--precisions` names no mode", hint="write `--precisions bf16,int8,nf4,awq`")
    times = Counter(mode.precision for mode in parsed)
    modes = [
        msgspec.structs.replace(mode, name=name_of(mode, cache, times[mode.precision] > 1), kv_dtype=cache)
        for mode in parsed
        for cache in caches
    ]
    require_unique(modes)
    return modes


def require_unique(modes: Sequence[Mode]) -> None:
    """Raises PrecisionError for a name that comes twice."""
    twice = [name for name, count in Counter(mode.name for mode in modes).items() if count > 1]
    if twice:
        raise PrecisionError(f"mode `{twice[0]}` is named twice", hint="each mode is one row: name it once")


def parse_mode(text: str) -> Mode:
    """`name[:option=value,...]` or `name=CHECKPOINT`. Raises PrecisionError."""
    name, equals, checkpoint = text.partition("=")
    if equals and ":" not in name:
        if not checkpoint:
            raise PrecisionError(
                f"mode `{text}` names no checkpoint", hint="write `awq=ORG/MODEL-AWQ`, or `awq=FOLDER`"
            )
        precision = name.strip()
    else:
        precision, checkpoint = text, ""
    spec = PrecisionSpec.parse(precision)
    if spec.name not in TABLE:
        raise PrecisionError(
            f"precision `{spec.name}` does not exist; accepted are {', '.join(TABLE)}",
            hint="write `--precisions bf16,int8,nf4,awq`",
        )
    return Mode(name=precision, precision=precision, checkpoint=checkpoint)


def parse_server(text: str) -> Mode:
    """`NAME=URL` of a server that runs already. Raises SettingError."""
    name, _, url = text.partition("=")
    if not name or not url.startswith(("http://", "https://")):
        raise SettingError(
            f"`--server {text}` is not a name and an address", hint="write `vllm=http://127.0.0.1:8001`"
        )
    return Mode(name=name, precision="", server=url.rstrip("/"))


def name_of(mode: Mode, cache: str, has_twin: bool) -> str:
    """`awq`; with its checkpoint where another mode has the same precision, with its cache where it is
    coded."""
    own = f" of {mode.checkpoint.rstrip('/').rsplit('/', 1)[-1]}" if mode.checkpoint and has_twin else ""
    return f"{mode.precision}{own}{f' + kv {cache}' if cache != 'auto' else ''}"


def reference_of(modes: Sequence[Mode], asked: str = "") -> Mode:
    """The mode named, or the first of 16 bits, else of 32. Raises PrecisionError where there is none."""
    if asked:
        found = next((mode for mode in modes if mode.name == asked), None)
        if found is None:
            raise PrecisionError(
                f"`--reference {asked}` is none of the modes: {', '.join(mode.name for mode in modes)}",
                hint="name one of them as it is spelled there",
            )
    else:
        of = {name: [mode for mode in modes if spec_name(mode) in name] for name in (SIXTEEN_BIT, REFERENCES)}
        found = next(iter(of[SIXTEEN_BIT] or of[REFERENCES]), None)
    if found is None or spec_name(found) not in REFERENCES or found.checkpoint:
        raise PrecisionError(
            f"`{asked or ','.join(mode.name for mode in modes)}` has no mode to compare against",
            hint=f"add one of {', '.join(REFERENCES)} of the model's own weights: divergence is measured "
            "against it",
        )
    return found


def spec_name(mode: Mode) -> str:
    return PrecisionSpec.parse(mode.precision).name


def again(reference: Mode) -> Mode:
    """The reference as one mode more: what differs between the two is noise."""
    return msgspec.structs.replace(reference, name=f"{reference.name} {AGAIN}")


def check_checkpoint(mode: Mode, own: Path, model: Path, tokenizer: Path, samples: Sequence[str]) -> None:
    """CheckpointError unless a mode's own checkpoint is of the model: same shapes, same tokens for `samples`.

    `tokenizer` is the folder of the model's, `own` and `model` are those of the checkpoints.
    """
    theirs, ours = read_config(own), read_config(model)
    different = [name for name in SHAPE_FIELDS if theirs.get(name) != ours.get(name)]
    if different:
        found = ", ".join(f"{name} {theirs.get(name)} instead of {ours.get(name)}" for name in different)
        raise CheckpointError(
            f"checkpoint `{mode.checkpoint}` of mode `{mode.name}` is another model: {found}",
            hint="compare checkpoints of one model, or each in a report of its own",
        )
    one, other = own / "tokenizer.json", tokenizer / "tokenizer.json"
    if not one.is_file() or one.read_bytes() == other.read_bytes():
        return  # without one of its own it is served with the model's
    left, right = Tokenizer.from_file(str(one)), Tokenizer.from_file(str(other))
    same = left.get_vocab() == right.get_vocab() and all(
        left.encode(text).ids == right.encode(text).ids for text in samples
    )
    if not same:
        raise CheckpointError(
            f"checkpoint `{mode.checkpoint}` of mode `{mode.name}` has another tokenizer than the model: its "
            "tokens would not be those of the other modes",
            hint="name the checkpoint that was made from this model",
        )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json with the defaults that decide a shape. Raises CheckpointError."""
    path = folder / "config.json"
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"`{path}` cannot be read: {error}") from None
    heads = fields.get("num_attention_heads")
    fields.setdefault("num_key_value_heads", heads)
    if fields.get("head_dim") is None and heads:
        fields["head_dim"] = fields.get("hidden_size", 0) // heads
    rope = fields.get("rope_parameters") or {}  # where transformers 5 writes it
    fields["rope_theta"] = fields.get("rope_theta", rope.get("rope_theta", 10_000.0))
    return fields
