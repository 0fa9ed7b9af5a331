"""`halftone serve`: settings -> a running server, and the lines that say how to use it."""

import asyncio
import contextlib
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from service import __version__, logs
from service.cli.display import Display, show_loading
from service.cli.model import find_model
from service.config import NO_TOKENIZER, Settings
from service.disk import megabytes
from service.errors import SettingError
from service.front.host import ASGIApp, Host, bind, run_loop
from service.front.residents import precisions_of
from service.messages import EngineInfo
from service.precision import CALIBRATED, parse_known
from service.precision.spec import PrecisionSpec

if TYPE_CHECKING:
    from service.front.residents import Residents
    from service.front.text import TextCodec

QUESTION = "Why is the sky blue?"
OPEN_TO_ALL = "  no key     everyone who can reach `{}` may use it; `--api-key` (HALFTONE_API_KEY) closes it"


def serve(settings: Settings) -> None:
    """Runs until a signal. Raises HalftoneError before the engine is ready; later ones are the clients'."""
    logs.configure(settings.log_level, settings.log_format)
    precisions = precisions_of(settings)
    check_precision(settings.precision)
    check_calibration(settings.calibration, precisions)
    # a taken port is told before minutes of download, not after
    with bind(settings.host, settings.port, "port"):
        pass
    with Display() as display:
        settings, model_path = find_model(settings, display, may_save=True)
        run_loop(run(settings, model_path, display))


def check_precision(text: str) -> None:
    """PrecisionError for a name that is in no table. Options are the backend's, in the engine."""
    parse_known(text, "auto")


def check_calibration(calibration: str, precisions: list[str]) -> None:
    """SettingError for a text that cannot be read, or that no mode would look at."""
    if not calibration:
        return
    from service.quality.texts import calibration_text  # with Python's documentation; most starts need none

    calibration_text(calibration)
    if not any(PrecisionSpec.parse(text).name in CALIBRATED for text in precisions):
        raise SettingError(
            f"setting `calibration` = `{calibration}` is of no use to precision `{','.join(precisions)}`; "
            f"calibrated are {', '.join(CALIBRATED)}",
            hint=f"leave the text out, or name the mode `{CALIBRATED[0]}`",
        )


def create_app(settings: Settings, residents: "Residents", codec: "TextCodec") -> ASGIApp:
    """The API's factory, imported when it is called: by then the engine is on its way in its own process."""
    from service.api import app

    return app.create_app(settings, residents, codec)


async def run(settings: Settings, model_path: Path, display: Display) -> None:
    # until the engine is ready its failure is this command's own, and said once, at the end
    speak_again = logs.hold_back("service.front.supervisor")
    try:
        async with Host(settings, model_path, create_app) as host:
            clients = [resident.client for resident in host.residents.all]
            loading = asyncio.create_task(show_loading(clients, display))

            def on_ready(info: EngineInfo) -> None:
                loading.cancel()
                speak_again()
                display.close()
                Console(highlight=False, soft_wrap=True).print(ready_lines(host, info), markup=False)

            try:
                await host.run(on_ready)
            finally:
                loading.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await loading
    finally:
        speak_again()


def ready_lines(host: Host, info: EngineInfo) -> str:
    """URL, model, precision, bytes, room, and one command that works as pasted."""
    from service.front.chat_template import ChatTemplate  # not before the engine is on its way

    settings = host.settings
    size = f"{info.architecture}, {info.num_parameters / 1e6:,.1f} M parameters"
    drawn = f", random weights (seed {info.random_weights['seed']})" if info.random_weights else ""
    infos = [(resident.name, resident.client.info or info) for resident in host.residents.all]
    served = [line for name, engine in infos for line in engine_lines(name if len(infos) > 1 else "", engine)]
    has_text = settings.tokenizer != NO_TOKENIZER
    folder = settings.tokenizer_folder(host.model_path)
    has_chat = has_text and ChatTemplate.load(folder, settings.chat_template) is not None
    return "\n".join(
        [
            f"Halftone {__version__} is ready at {host.url}",
            f"  model      {settings.name} ({size}{drawn})",
            *served,
            *([] if has_text else ["  tokenizer  none: prompts and answers are token ids"]),
            *([f"  metrics    {host.metrics_url}/metrics"] if settings.metrics_port else []),
            *([] if settings.is_local or settings.api_keys else [OPEN_TO_ALL.format(settings.host)]),
            "",
            curl_line(host.url, settings.name, bool(settings.api_key), has_chat=has_chat, has_text=has_text),
        ]
    )


def engine_lines(name: str, info: EngineInfo) -> list[str]:
    """What one engine serves and holds; `name`: where there are several, the one to send as `model`."""
    kv_bytes = sum(size for part, size in info.memory_bytes.items() if part.startswith("kv."))
    memory = f"{megabytes(kv_bytes)}, " if name else ""
    return [
        *([f"  name       {name}"] if name else []),
        f"  precision  {info.precision} on {info.device} ({info.device_name}), activations {info.dtype}",
        f"  weights    {megabytes(info.weight_bytes)}",
        f"  KV cache   {memory}{info.kv_tokens:,} tokens in {info.kv_dtype}; "
        f"up to {info.max_context_tokens:,} in one request",
    ]


def curl_line(url: str, model: str, has_key: bool, *, has_chat: bool, has_text: bool = True) -> str:
    """A streamed answer: a chat where the checkpoint has a template, else a completion, of ids if need be."""
    question: dict[str, Any] = {"prompt": QUESTION}
    if has_chat:
        question = {"messages": [{"role": "user", "content": QUESTION}]}
    elif not has_text:
        question = {"prompt": [1, 2, 3], "return_token_ids": True}
    body = json.dumps(
        {"model": model, **question, "max_tokens": 100, "temperature": 0, "stream": True}, ensure_ascii=False
    )
    key = '-H "Authorization: Bearer $HALFTONE_API_KEY" ' if has_key else ""
    path = "chat/completions" if has_chat else "completions"
    return f"curl -N {url}/v1/{path} {key}-H 'Content-Type: application/json' -d {shlex.quote(body)}"
