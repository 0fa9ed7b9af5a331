"""transformers' model of the demo checkpoint, plain or with bitsandbytes' own linears: none of our code."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import bitsandbytes.nn as bnb
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

MakeLinear = Callable[[nn.Linear], nn.Linear]


def int8_linear(linear: nn.Linear) -> nn.Linear:
    """LLM.int8() with the paper's threshold."""
    return bnb.Linear8bitLt(
        linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=6.0
    )


def nf4_linear(linear: nn.Linear) -> nn.Linear:
    """NF4 with double quantization."""
    return four_bit_linear(linear, compress_statistics=True)


def plain_nf4_linear(linear: nn.Linear) -> nn.Linear:
    """NF4 with float32 absmax."""
    return four_bit_linear(linear, compress_statistics=False)


def four_bit_linear(linear: nn.Linear, compress_statistics: bool) -> nn.Linear:
    return bnb.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=linear.weight.dtype,
        compress_statistics=compress_statistics,
        quant_type="nf4",
    )


# precision -> the linear that bitsandbytes has for it, None: torch's
LINEARS: Mapping[str, MakeLinear | None] = {
    "fp32": None,
    "bf16": None,
    "int8": int8_linear,
    "nf4": nf4_linear,
    "nf4:double_quant=off": plain_nf4_linear,
}


def load_reference(folder: Path, dtype: torch.dtype, make: MakeLinear | None = None) -> PreTrainedModel:
    """The checkpoint in `dtype`, each linear of its layers replaced by what `make` returns for it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if make is not None:
        for module in list(model.model.layers.modules()):
            for name, linear in list(module.named_children()):
                if type(linear) is nn.Linear:
                    made = make(linear)
                    made.load_state_dict({"weight": linear.weight.data})
                    setattr(module, name, made.to("cpu").eval())  # moving it quantizes it
    return model


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, token_ids: list[int]) -> Tensor:
    """One window in one forward pass -> float32 [tokens, vocab]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes says with each call that it casts bfloat16 to float16
        logits: Tensor = model(torch.tensor([token_ids]), use_cache=False).logits[0].float()
    return logits
