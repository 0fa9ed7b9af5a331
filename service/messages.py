"""Everything that crosses the socket between the front and the engine, and nothing else.

front  --Submit, Abort, Evaluate, Shutdown-->  engine
front  <--Loading, Ready, Step, Evaluated, Fatal--  engine

The two processes share one UNIX socket pair. A frame is a 4-byte little-endian length and a msgpack
body; the body is a tagged union, so a decoder rejects whatever is not one of these types. Neither side
imports torch for this module.
"""

import struct
from typing import Literal

import msgspec

MAX_FRAME_BYTES = 256 << 20
HEADER = struct.Struct("<I")

FinishReason = Literal["stop", "length", "abort", "error"]

# What Output.error says. An exception's own text can carry tokens, paths or addresses.
MODEL_ERROR = "the model produced numbers that are not finite"
STEP_ERROR = "the engine failed on this request"
NO_MEMORY = "the device ran out of memory on this request"
TOO_LONG = "the prompt leaves no room for an answer in the context window"
BAD_TOKEN = "the prompt holds a token id outside the vocabulary"
EMPTY_PROMPT = "the prompt is empty"
ENGINE_DIED = "engine died"
INTERNAL_ERROR = "internal error"
SHUTTING_DOWN = "server is shutting down"
ERROR_KINDS = {
    MODEL_ERROR: "model",
    STEP_ERROR: "step",
    NO_MEMORY: "memory",
    TOO_LONG: "prompt",
    BAD_TOKEN: "prompt",
    EMPTY_PROMPT: "prompt",
    ENGINE_DIED: "engine_died",
    INTERNAL_ERROR: "internal",
    SHUTTING_DOWN: "shutdown",
}


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine child is started with: a JSON argument on its command line."""

    model_path: str  # local folder; the front has resolved names and downloads
    precision: str  # `name[:option=value,...]`, or `auto`
    device: Literal["auto", "cuda", "cpu"] = "auto"
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # activations of the quantized modes
    kv_dtype: Literal["auto", "int8", "fp8"] = "auto"  # of the KV cache; `auto`: that of activations
    max_context_tokens: int = 0  # 0: what config.json allows
    max_batch_tokens: int = 0  # tokens in one step, prefill and decode together; 0: by device
    max_batch_requests: int = 0  # requests decoding at once; 0: by device
    kv_tokens: int = 0  # size of the KV cache; 0: by device memory
    kv_memory_fraction: float = 0.9  # share of free device memory that `kv_tokens = 0` may take
    prefix_cache: bool = True
    cuda_graphs: Literal["on", "off"] = "on"  # steps captured once, on a GPU
    deterministic: bool = False  # a request's numbers do not depend on what runs beside it
    head: Literal["16bit", "int8"] = "16bit"  # precision of lm_head
    calibration: str = ""  # text file for calibrated modes; empty: the interpreter's documentation
    cache_dir: str = ""
    threads: int = 0  # 0: one per physical core
    cpu_kernels: Literal["auto", "native", "torch"] = "auto"
    tokenizer: str = ""  # folder with tokenizer.json; empty: the model's own
    load_format: Literal["safetensors", "random"] = "safetensors"  # `random` needs config.json alone
    load_seed: int = 0
    random_outliers: int = 0
    random_std: float = 0.0
    save: str = ""  # new folder for the random weights as a checkpoint; empty: none
    time_kernels: bool = False  # each op of a decode step before ready, for EngineInfo.kernel_seconds
    canary: bool = (
        False  # compare with the 16-bit weights before ready; for an engine with another to go back to
    )
    beside: tuple[
        str, ...
    ] = ()  # precisions of the same checkpoint that will load onto the device after this


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How one request's tokens are drawn. Bounds were checked by the front."""

    max_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0  # 64 bits; the front draws one where the client gave none
    sample_index: int = 0  # which of `n` answers to the same prompt
    min_tokens: int = 0  # stop ids are not sampled before this many tokens
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int = -1  # -1: none; k >= 0: the sampled token and the k likeliest
    prompt_logprobs: int = -1  # the same for each prompt token but the first
    presence_penalty: float = 0.0  # of tokens in the answer
    frequency_penalty: float = 0.0  # times their number in the answer
    repetition_penalty: float = 1.0  # of tokens in prompt or answer
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)  # token id -> added to its logit

    @property
    def shapes_logits(self) -> bool:
        """Does it change the model's logits before a token is drawn?"""
        is_penalised = bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1
        return is_penalised or bool(self.logit_bias)


# --- front to engine ---------------------------------------------------------------------------


class Submit(msgspec.Struct, tag="submit", array_like=True):
    id: int
    prompt: list[int]
    sampling: Sampling
    cache_salt: bytes = b""  # prefix blocks are shared only under the same salt


class Abort(msgspec.Struct, tag="abort", array_like=True):
    ids: list[int]


class Evaluate(msgspec.Struct, tag="evaluate", array_like=True):
    """Quality of the served weights on `windows` of token ids; each window is scored on its own.

    `reference` names a precision whose full-vocabulary distribution the KL divergence is taken against;
    empty: no KL. It never has to fit the device as a whole: one of its layers at a time is there.
    """

    id: int
    windows: list[list[int]]
    modes: list[Literal["prefill", "decode1", "decode8"]]
    decode_tokens: int = 2048  # scored tokens in each decode mode
    reference: str = ""
    reference_path: str = ""  # folder of the reference's checkpoint; empty: the served one's
    # of each window, the place of the first token that counts, 1 or more; empty: the second token's in all.
    # What is before it is context alone; decode modes, which score beginnings, look at nothing but windows.
    scored_from: list[int] = msgspec.field(default_factory=list)
    prompts: list[list[int]] = msgspec.field(
        default_factory=list
    )  # for `Evaluated.greedy`; needs a reference
    greedy_tokens: int = 64  # answered to each prompt


class Shutdown(msgspec.Struct, tag="shutdown", array_like=True):
    pass


FrontMessage = Submit | Abort | Evaluate | Shutdown


# --- engine to front ---------------------------------------------------------------------------


class Loading(msgspec.Struct, tag="loading", array_like=True):
    """Progress on the way to ready.

    `stage` is one of import, device, verify, calibrate, quantize, save, load, kernels, check, canary, warm,
    capture.
    """

    stage: str
    done: int
    total: int
    unit: str  # bytes, layers, graphs


class EngineInfo(msgspec.Struct, kw_only=True):
    """What is served: the source of /version, the ready line and the report's columns."""

    model_path: str
    architecture: str
    precision: str  # canonical
    dtype: str  # of activations
    kv_dtype: str  # of the KV cache: as `dtype`, or int8, fp8
    device: str  # cpu, cuda:0
    device_name: str
    torch_version: str
    num_parameters: int
    vocab_size: int
    max_context_tokens: int
    kv_tokens: int
    kv_block_tokens: int
    max_batch_tokens: int
    max_batch_requests: int
    eos_token_ids: list[int]
    kernels: dict[str, str]  # layer class (qkv_proj, o_proj, ..., lm_head, attention) -> kernel
    memory_bytes: dict[str, int]  # service/ledger's part -> bytes; all parts sum to what the process holds
    weight_bytes: int
    load_seconds: dict[str, float]  # stage -> seconds
    peak_load_bytes: int
    calibration: dict[str, str] = msgspec.field(default_factory=dict)  # text, sha256, python
    random_weights: dict[str, str] = msgspec.field(default_factory=dict)  # seed, ...; empty: trained ones
    deterministic: bool = False
    canary: dict[str, float | str] = msgspec.field(default_factory=dict)  # what it found; empty: not asked
    # op -> rows of a decode step -> seconds of it in all layers, where they were timed
    kernel_seconds: dict[str, dict[str, float]] = msgspec.field(default_factory=dict)
    device_uuid: str = ""  # as NVML names it; empty: a CPU
    device_bytes: int = 0  # memory of the device, whoever has it


class Ready(msgspec.Struct, tag="ready", array_like=True):
    info: EngineInfo


class TokenLogprobs(msgspec.Struct, array_like=True):
    """Log-probability of one token under the unmodified distribution, and of the likeliest few."""

    token_id: int
    logprob: float
    rank: int  # 1 is the likeliest
    top_ids: list[int]
    top_logprobs: list[float]


class Output(msgspec.Struct, array_like=True):
    """What one step did for one request. Exactly one Output of a request carries a finish reason."""

    id: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # once, with the last prefill chunk
    cached_tokens: int = 0  # prompt tokens found in the prefix cache; set on the first Output
    error: str = ""  # for finish reason `error`: a fixed phrase, never an exception's text


class StepStats(msgspec.Struct, array_like=True):
    """Engine-side figures; counters are deltas since the last Step, gauges are of now."""

    step_seconds: float = 0.0  # 0 for a heartbeat
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_running: int = 0
    num_waiting: int = 0
    kv_used_tokens: int = 0
    kv_cached_tokens: int = 0  # in blocks held only for reuse
    memory_bytes: dict[str, int] | None = None  # when it changed
    peak_bytes: dict[str, int] | None = None  # phase (load, prefill, decode) -> peak bytes
    # of each request that ended: seconds in queue, prefill and decode, as far as it came
    ended_phase_seconds: list[list[float]] = msgspec.field(default_factory=list)
    # `layer class.number` -> numbers that int8 multiplied in 16 bits, and all; now and then, from a GPU
    outliers: dict[str, list[int]] | None = None


class Step(msgspec.Struct, tag="step", array_like=True):
    """One message a step. An idle engine sends an empty one every second: its heartbeat."""

    outputs: list[Output]
    stats: StepStats


class Paired(msgspec.Struct, array_like=True):
    """Nats of one way to compute less those of another, token by token at the same positions."""

    tokens: int  # positions that both scored
    mean: float
    standard_error: float  # of the mean: quality/divergence, grouped_mean or crossed_mean
    windows: int  # that it is over


class WindowScores(msgspec.Struct, array_like=True):
    """What each window gave by prefill, in the order of `Evaluate.windows`: what intervals are made of.

    Tokens of one window move together; windows are independent. Sums over the window's scored tokens.
    """

    tokens: list[int]
    nll: list[float]  # nats, of the served weights
    # the same tokens by the reference, where there is one; else these three are empty
    reference_nll: list[float] = msgspec.field(default_factory=list)  # nats
    kl: list[float] = msgspec.field(default_factory=list)  # nats, reference || served
    agreeing: list[int] = msgspec.field(default_factory=list)  # tokens with the same likeliest one


class GreedyAgreement(msgspec.Struct, array_like=True):
    """By prompt: greedy answers of the served weights, and how long the reference would have said the same.

    `agreed` < `generated`: the answers part at token number `agreed`, counted from 0. `agreed` = `generated`:
    they do not, as far as was looked; the place is beyond it.
    """

    generated: list[int]  # tokens
    agreed: list[int]  # tokens before the first that differs


class Evaluated(msgspec.Struct, tag="evaluated", array_like=True):
    """Answer to Evaluate, or its progress while `done` < `total`.

    Standard errors are of a mean per token, windows taken as independent.
    """

    id: int
    done: int
    total: int
    nll: dict[str, float]  # mode -> summed negative log-likelihood, nats
    tokens: dict[str, int]  # mode -> scored tokens
    kl_mean: float = 0.0  # nats per token, reference || served
    kl_tokens: int = 0
    top1_agreement: float = 0.0
    error: str = ""
    paired: dict[str, Paired] = msgspec.field(default_factory=dict)  # decode mode -> against prefill
    nll_standard_error: float = 0.0  # of `nll["prefill"]` per token, nats
    kl_standard_error: float = 0.0
    top1_standard_error: float = 0.0
    kl_quantiles: dict[str, float] = msgspec.field(default_factory=dict)  # p50, p90, p99, max; nats
    # nats of the served weights less those of the reference: exp(mean) is the ratio of the perplexities
    against_reference: Paired | None = None
    windows: WindowScores | None = None
    greedy: GreedyAgreement | None = None


class Fatal(msgspec.Struct, tag="fatal", array_like=True):
    """The engine cannot start or go on; the child exits right after."""

    code: str  # of errors.HalftoneError
    message: str
    hint: str = ""
    retryable: bool = False  # False: starting again would end the same way
    needs_bytes: int = 0  # of a ShortageError
    has_bytes: int = 0


EngineMessage = Loading | Ready | Step | Evaluated | Fatal

encoder = msgspec.msgpack.Encoder()
front_decoder: msgspec.msgpack.Decoder[FrontMessage] = msgspec.msgpack.Decoder(FrontMessage)
engine_decoder: msgspec.msgpack.Decoder[EngineMessage] = msgspec.msgpack.Decoder(EngineMessage)


def frame(message: FrontMessage | EngineMessage) -> bytes:
    """message -> length-prefixed msgpack bytes."""
    body = encoder.encode(message)
    return HEADER.pack(len(body)) + body
