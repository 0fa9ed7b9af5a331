"""Every setting once: type, range, unit, help. Flag > `HALFTONE_*` variable > TOML file > default.

The command line's flags are made from these fields (cli/), and the documentation's table is checked against
them. No torch here.
"""

import difflib
import os
import re
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from service.errors import SettingError
from service.messages import EngineConfig

ENV_PREFIX = "HALFTONE_"
CONFIG_VARIABLE = "HALFTONE_CONFIG"
PRESET_PREFIX = "preset:"
NO_TOKENIZER = "none"
ORIGIN = re.compile(r"https?://(?:[a-z0-9.-]+|\[[0-9a-f:]+\])(?::[0-9]{1,5})?")
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/halftone, or ~/.cache/halftone."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "halftone"


class Settings(BaseSettings):
    """What a server is started with."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, extra="forbid", frozen=True, protected_namespaces=()
    )

    # what is served
    model: str = Field(
        "demo",
        min_length=1,
        description="`demo`, a local folder, a hub id such as ORG/NAME, or `preset:NAME`, a shape without "
        "weights.",
    )
    revision: str = Field("main", description="Hub branch, tag or commit.")
    precision: str = Field(
        "auto", description="`name[:option=value,...]`: fp32 bf16 fp16 int8 fp8 nf4 awq int3, or `auto`."
    )
    resident: str = Field(
        "",
        description="Precisions served at once, `fp16,nf4`, each by an engine of its own; requests name one "
        "as `NAME@nf4`, plain NAME is the first. Empty: one, of `precision`.",
    )
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="Where the model runs.")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="Type of activations, and of an `auto` KV cache, in the quantized modes."
    )
    kv_dtype: Literal["auto", "int8", "fp8"] = Field(
        "auto",
        description="Type of the KV cache, in every precision. `auto`: that of activations; `int8`, `fp8` "
        "(E4M3): codes of 8 bits with a scale for each token and head.",
    )
    head: Literal["16bit", "int8"] = Field("16bit", description="Precision of lm_head.")
    calibration: str = Field(
        "", description="Text file that calibrated modes use; empty: the interpreter's documentation."
    )
    served_model_name: str = Field(
        "", description="Name in requests and metrics; empty: the last part of `model`."
    )
    chat_template: str = Field("", description="File with a jinja2 chat template; empty: the checkpoint's.")
    tokenizer: str = Field(
        "",
        description="Folder of another tokenizer.json, `demo`, or `none`: token ids only; empty: the "
        "checkpoint's.",
    )
    load_format: Literal["auto", "safetensors", "random"] = Field(
        "auto",
        description="Where weights come from; `random`: drawn, from config.json alone; `auto`: random for a "
        "preset.",
    )
    load_seed: int = Field(0, ge=0, le=2**63 - 1, description="Seed of random weights.")
    random_outliers: int = Field(
        0, ge=0, le=1024, description="Features that random weights lift beyond 6 in each layer, for int8."
    )
    random_std: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Standard deviation of random weights; 0: config.json's initializer_range.",
    )
    save: str = Field(
        "", description="New folder to write random weights to, as a checkpoint; empty: they are not kept."
    )
    cache_dir: Path = Field(
        default_factory=default_cache_dir, description="Demo model and quantized checkpoints."
    )
    # engine
    max_context_tokens: int = Field(
        0, ge=0, description="Longest prompt + answer in tokens; 0: what the model allows."
    )
    max_batch_tokens: int = Field(
        0, ge=0, le=65536, description="Tokens in one step; 0: by device, on a GPU twice as many for a crowd."
    )
    max_batch_requests: int = Field(0, ge=0, le=1024, description="Requests decoding at once; 0: by device.")
    kv_tokens: int = Field(0, ge=0, description="Size of the KV cache in tokens; 0: by device memory.")
    kv_memory_fraction: float = Field(
        0.9, gt=0, le=0.98, description="Share of free device memory for `kv_tokens=0`."
    )
    prefix_cache: bool = Field(True, description="Reuse KV blocks of repeated prefixes.")
    cuda_graphs: Literal["on", "off"] = Field(
        "on",
        description="On a GPU: capture steps and replay them, decodes before ready, those with prompts "
        "while nobody asks; `off` launches kernel by kernel, as always where a precision cannot be captured.",
    )
    time_kernels: bool = Field(
        False,
        description="Before ready, time each op of a decode step, for /metrics (`halftone_kernel_seconds`) "
        "and /version.",
    )
    deterministic: bool = Field(
        False,
        description="A request's tokens and log-probabilities are the same, bit for bit, whatever runs "
        "beside it. Slower; a request waits until the KV cache has room for its prompt and `max_tokens`.",
    )
    threads: int = Field(0, ge=0, le=1024, description="CPU threads of the engine; 0: one per core.")
    cpu_kernels: Literal["auto", "native", "torch"] = Field(
        "auto",
        description="On a CPU: `native` are our own, or an error; `auto` is torch's where they cannot run.",
    )
    # HTTP
    host: str = Field("127.0.0.1", description="Address to bind.")
    port: int = Field(8000, ge=0, le=65535, description="Port of the API; 0: any free one.")
    metrics_port: int = Field(
        0, ge=0, le=65535, description="Own port for /metrics on the same host; 0: the API's port."
    )
    metrics_compat: Literal["none", "vllm"] = Field(
        "none",
        description="`vllm`: /metrics has, beside our names, those that vLLM's dashboards, KServe and llm-d "
        "read.",
    )
    api_key: str = Field(
        "", description="Key that clients must send; several separated by commas; empty: none."
    )
    admin_key: str = Field(
        "",
        description="Key of /admin, which changes what is served; several separated by commas, none of them "
        "an `api_key`. Empty: /admin is off.",
    )
    allowed_origins: str = Field(
        "",
        description="Origins whose pages may use the API from a browser, and which /compare asks for other "
        "precisions: `http://127.0.0.1:8001`, several separated by commas; empty: none but its own.",
    )
    max_queue_requests: int = Field(512, ge=1, description="Requests open at once; one more is answered 429.")
    max_body_bytes: int = Field(4 << 20, ge=1024, description="Largest request body in bytes.")
    max_n: int = Field(8, ge=1, le=128, description="Most answers to one prompt (`n`).")
    max_prompts: int = Field(
        128, ge=1, le=1024, description="Most answers in one request: its prompts times `n`."
    )
    # time
    load_timeout_s: float = Field(3600, gt=0, description="Seconds the engine may take to become ready.")
    step_timeout_s: float = Field(
        60, gt=0, description="Seconds without a sign of life until the engine is restarted."
    )
    drain_timeout_s: float = Field(
        30, ge=0, description="Seconds open requests may take after SIGTERM, or before a swap is given up."
    )
    swap_wait_s: float = Field(
        30,
        ge=0,
        description="Seconds a request waits for the end of a swap of the precision, before it is answered "
        "503 with Retry-After.",
    )
    # logs
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least level written."
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="One line a record, for people or machines."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=config_file())

    @field_validator("cache_dir")
    @classmethod
    def in_the_home_folder(cls, value: Path) -> Path:
        """`~` comes through variables and TOML as it is written; a shell replaces it in flags alone."""
        return value.expanduser()

    @field_validator("api_key", "admin_key")
    @classmethod
    def with_a_key_in_it(cls, value: str) -> str:
        """`,` would start a server that is open to everyone where a key was meant."""
        if value and not keys_in(value):
            raise ValueError("it holds no key")
        return value

    @field_validator("admin_key")
    @classmethod
    def apart_from_clients(cls, value: str, info: ValidationInfo) -> str:
        """A key that every client has would open /admin to every client."""
        if set(keys_in(value)) & set(keys_in(info.data.get("api_key", ""))):
            raise ValueError("it is an `api_key` too; what is served is not for clients to change")
        return value

    @field_validator("allowed_origins")
    @classmethod
    def with_origins_in_it(cls, value: str) -> str:
        """A browser's `Origin` is compared letter by letter; a path or `*` would match nothing."""
        for origin in keys_in(value):
            if ORIGIN.fullmatch(origin) is None:
                raise ValueError(f"`{origin}` is no origin, such as http://127.0.0.1:8001")
        return value

    @property
    def origins(self) -> list[str]:
        """Each origin whose pages may use the API."""
        return keys_in(self.allowed_origins)

    @property
    def api_keys(self) -> list[str]:
        """Each key that opens the API; none where it is open to everyone."""
        return keys_in(self.api_key)

    @property
    def admin_keys(self) -> list[str]:
        """Each key that opens /admin; none where it is off."""
        return keys_in(self.admin_key)

    @property
    def is_local(self) -> bool:
        """Does the API answer this machine alone?"""
        return self.host in LOOPBACK

    @property
    def name(self) -> str:
        """The model's name in requests, metrics and reports."""
        return self.served_model_name or self.model.rstrip("/").rsplit("/", 1)[-1]

    @property
    def is_random(self) -> bool:
        """Are the weights drawn, not read?"""
        drawn_by_default = self.load_format == "auto" and self.model.startswith(PRESET_PREFIX)
        return self.load_format == "random" or drawn_by_default

    def tokenizer_folder(self, model_path: Path) -> Path:
        """Where tokenizer.json and the chat template are, if there is one, and the setting names a folder."""
        return Path(self.tokenizer) if self.tokenizer else model_path

    def engine_config(self, model_path: Path) -> EngineConfig:
        """The part of the settings that crosses to the engine."""
        shared = {
            name: getattr(self, name)
            for name in EngineConfig.__struct_fields__
            if name in type(self).model_fields
        }
        resolved = {
            "model_path": str(model_path),
            "cache_dir": str(self.cache_dir),
            "load_format": "random" if self.is_random else "safetensors",
            "tokenizer": "" if self.tokenizer == NO_TOKENIZER else self.tokenizer,
        }
        return EngineConfig(**{**shared, **resolved})


def keys_in(text: str) -> list[str]:
    """`first, second` -> [`first`, `second`]; what clients send has no spaces around it either."""
    return [key.strip() for key in text.split(",") if key.strip()]


def load_settings(**flags: Any) -> Settings:
    """Flags (None: not given) over environment over TOML; a bad value is one line that names its source."""
    given = {name: value for name, value in flags.items() if value is not None}
    file = config_file()
    refuse_unknown_variables()
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    except tomllib.TOMLDecodeError as error:
        raise SettingError(f"settings file `{file}` is not TOML: {error}") from None
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        raise SettingError(f"setting `{name}` (from {file}) does not exist", hint=nearest(name)) from None
    variable = f"{ENV_PREFIX}{name.upper()}"
    if name in given:
        source = "--" + name.replace("_", "-")
    else:
        source = variable if variable in os.environ else str(file)
    reason = first["msg"].removeprefix("Value error, ")
    reason = reason[0].lower() + reason[1:]
    is_secret = name.endswith("_key") and bool(keys_in(str(first["input"])))
    shown = "..." if is_secret else first["input"]
    raise SettingError(
        f"setting `{name}` = `{shown}` (from {source}): {reason}",
        hint=f"{name}: {Settings.model_fields[name].description}",
    )


def config_file() -> Path:
    """The TOML file: HALFTONE_CONFIG, which must exist, or `halftone.toml` in the working directory."""
    named = os.environ.get(CONFIG_VARIABLE)
    if named and not Path(named).exists():
        raise SettingError(f"settings file `{named}` (from {CONFIG_VARIABLE}) does not exist")
    return Path(named or "halftone.toml")


def refuse_unknown_variables() -> None:
    """A misspelt variable would be ignored in silence."""
    for variable in os.environ:
        name = variable.removeprefix(ENV_PREFIX)
        if name != variable and name.lower() not in Settings.model_fields and variable != CONFIG_VARIABLE:
            hint = nearest(name.lower(), prefix=ENV_PREFIX)
            raise SettingError(f"variable `{variable}` is no setting", hint=hint)


def nearest(name: str, prefix: str = "") -> str:
    """The setting that was probably meant, spelled as its source spells it."""
    similar = difflib.get_close_matches(name, Settings.model_fields, n=1)
    if not similar:
        return "see `halftone serve --help` for the settings"
    return f"did you mean `{prefix + similar[0].upper() if prefix else similar[0]}`?"
