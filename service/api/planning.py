"""`GET /plan`: what `halftone plan` answers, for the model that is served and its device or another.

routes --query, EngineInfo, Settings--> answer_plan --> the plan as JSON
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from service.config import Settings
from service.errors import PrecisionError, RequestError, SettingError
from service.messages import EngineInfo
from service.plan.devices import find_device, served_device
from service.plan.estimate import Serving
from service.plan.plan import Server, make_plan, to_json
from service.plan.question import PARAMETERS, read_question
from service.plan.shape import read_config_alone, read_folder

CROWD_FACTOR = 2  # of a GPU's steps while many prompts wait, where the user has set no budget

# of the route, in /openapi.json
DOCUMENTED = {
    "parameters": [
        {
            "name": parameter.name,
            "in": "query",
            "required": False,
            "description": parameter.help,
            "schema": {"type": "string"},
        }
        for parameter in PARAMETERS
    ]
}


async def answer_plan(
    query: Sequence[tuple[str, str]], info: EngineInfo, settings: Settings, folder: Path
) -> dict[str, Any]:
    """`query`: names and values as they came; `folder`: the model's. Raises RequestError, and
    CheckpointError where the model's files have changed under the server."""
    given = dict(query)
    if len(given) < len(query):
        raise RequestError("a parameter of a plan is given twice", code="invalid_value")
    try:
        # files are read: nobody's stream shall wait for that
        return await asyncio.to_thread(plan_for, given, info, settings, folder)
    except (SettingError, PrecisionError) as error:
        raise RequestError(
            error.message, hint=error.hint, param=error.param or "precisions", code="invalid_value"
        ) from None


def plan_for(given: dict[str, str], info: EngineInfo, settings: Settings, folder: Path) -> dict[str, Any]:
    question = read_question(given)
    shape = read_config_alone(folder) if settings.is_random else read_folder(folder)
    is_gpu = info.device.startswith("cuda")
    if question.gpu:
        device = find_device(question.gpu, question.bandwidth)
    elif question.bandwidth:
        raise SettingError("`bandwidth` goes with a `gpu` of its own", param="bandwidth")
    else:
        device = served_device(info.device, info.device_name, info.device_bytes)
    step_tokens = info.max_batch_tokens
    if is_gpu and not settings.max_batch_tokens:
        step_tokens *= CROWD_FACTOR
    serving = Serving(
        info.max_batch_requests,
        step_tokens,
        settings.kv_memory_fraction,
        settings.head,
        max_context_tokens=settings.max_context_tokens,
    )
    own_precision = info.precision if shape.quantization else ""
    return to_json(
        make_plan(settings.name, shape, device, question, Server(settings.kv_dtype, serving), own_precision)
    )
