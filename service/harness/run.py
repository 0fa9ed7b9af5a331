"""Tasks of lm-evaluation-harness on a ready engine, by either way or both, and whether the two agree.

cli/tasks --Host, tasks--> run_tasks() --harness in a thread--> Scores by way --disagreements()--> report

The harness is an optional dependency, the extra `tasks`; nothing else imports it.
"""

import asyncio
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import msgspec

from service.errors import HalftoneError, SettingError
from service.front.host import Host
from service.front.text import TextCodec
from service.harness.scorer import EngineScorer

Way = Literal["engine", "http"]
Through = Literal["engine", "http", "both"]
WAYS: dict[Through, tuple[Way, ...]] = {"engine": ("engine",), "http": ("http",), "both": ("engine", "http")}
MAX_RETRIES = 1  # an error of our own server is to be seen, not asked for again
SEED = 1234  # the harness's own, sent with every request


class TaskRun(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of the harness."""

    tasks: list[str]
    include: str = ""  # folder with tasks of one's own
    limit: int = 0  # documents of each task; 0: all
    num_fewshot: int = -1  # -1: as the task has it
    batch: int = 1  # prompts at once; above 1 only where company changes no bit


class Scores(msgspec.Struct, frozen=True, kw_only=True):
    """What the harness found by one way."""

    results: dict[str, dict[str, float]]  # task -> metric -> value, as the harness names them
    versions: dict[str, str]  # of tasks
    num_fewshot: dict[str, int]
    num_documents: dict[str, int]
    document_hashes: dict[str, str]
    responses: dict[str, list[Any]]  # task -> by document, what the model said: compared, not reported


def require_harness() -> str:
    """Its version; SettingError where it is not installed."""
    if find_spec("lm_eval") is None:
        raise SettingError(
            "`--tasks` runs lm-evaluation-harness, which is not installed",
            hint="in the clone: .venv/bin/pip install -c constraints.txt -e '.[tasks]'",
        )
    return version("lm_eval")


async def run_tasks(host: Host, folder: Path, asked: TaskRun, ways: Sequence[Way]) -> dict[Way, Scores]:
    """Each way in turn; `folder`: of the tokenizer. The engine must be ready and nobody else's.

    Raises HalftoneError with the harness's own words where it fails.
    """
    return {way: await asyncio.to_thread(run_one, model_of(way, host, folder, asked), asked) for way in ways}


def model_of(way: Way, host: Host, folder: Path, asked: TaskRun) -> Any:
    """The harness's own client of OpenAI's completions; in process with another transport under it.

    So tokens, order, batches and truncation are the harness's in both.
    """
    info = host.client.info
    assert info is not None, "the engine is ready"
    base: Any = import_module("lm_eval.models.openai_completions").LocalCompletionsAPI
    arguments = {
        "model": host.settings.name,
        "base_url": f"{host.url}/v1/completions",
        "tokenizer": str(folder),
        "tokenizer_backend": "huggingface",
        "tokenized_requests": True,
        "max_length": info.max_context_tokens,
        "batch_size": asked.batch,
        "num_concurrent": 1,
        "max_retries": MAX_RETRIES,
        "seed": SEED,
    }
    if way == "http":
        return base(**arguments)
    codec = TextCodec.load(folder)
    scorer = EngineScorer(host.client, codec, host.metrics, asyncio.get_running_loop())
    return in_process(base, scorer)(**arguments)


def in_process(base: Any, scorer: EngineScorer) -> Any:
    """A subclass of the harness's completions client that asks the engine instead of an address."""

    class InProcess(base):  # type: ignore[misc]  # the harness is untyped
        def model_call(
            self,
            messages: list[list[int]],
            *,
            generate: bool = True,
            gen_kwargs: dict[str, Any] | None = None,
            **ignored: Any,
        ) -> Any:
            if not generate:
                return {"prompts": messages}
            asked = self._create_payload(
                messages,
                generate=True,
                gen_kwargs=dict(gen_kwargs or {}),
                seed=self._seed,
                eos=self.eos_string,
            )
            known = {"model", "prompt", "max_tokens", "temperature", "stop", "seed"}
            if unknown := sorted(asked.keys() - known):
                raise HalftoneError(
                    f"a task generates with {unknown}, which the in-process way does not take"
                )
            return scorer.texts(
                messages, asked["max_tokens"], asked["temperature"], asked["stop"], asked["seed"]
            )

        @staticmethod
        def parse_logprobs(
            outputs: list[dict[str, Any]], tokens: Any, ctxlens: list[int], **_: Any
        ) -> list[tuple[float, bool]]:
            [asked] = outputs
            return scorer.loglikelihoods(asked["prompts"], ctxlens)

        @staticmethod
        def parse_generations(outputs: list[str], **_: Any) -> list[str]:
            return outputs

    return InProcess


def run_one(model: Any, asked: TaskRun) -> Scores:
    """The harness from its tasks to their metrics; in a thread, for it waits for its own requests."""
    evaluator, tasks = import_module("lm_eval.evaluator"), import_module("lm_eval.tasks")
    try:
        found = evaluator.simple_evaluate(
            model=model,
            tasks=asked.tasks,
            task_manager=tasks.TaskManager(include_path=asked.include or None),
            limit=asked.limit or None,
            num_fewshot=None if asked.num_fewshot < 0 else asked.num_fewshot,
            log_samples=True,
        )
    except HalftoneError:
        raise
    except Exception as error:  # the harness raises what its data sets, templates and requests raise
        raise HalftoneError(
            f"lm-evaluation-harness failed: {type(error).__name__}: {error}",
            hint="data of its own tasks comes from the hub; `--task-path FOLDER` takes tasks on your data",
            code="harness_failed",
        ) from error
    return scores_of(found)


def scores_of(found: dict[str, Any]) -> Scores:
    """What we keep of the harness's result."""
    samples = found["samples"]
    return Scores(
        results={
            # numpy's numbers are Python's too; what else there is are names
            task: {name: float(value) for name, value in metrics.items() if isinstance(value, float)}
            for task, metrics in found["results"].items()
        },
        versions={task: str(number) for task, number in found.get("versions", {}).items()},
        num_fewshot={task: int(count) for task, count in found.get("n-shot", {}).items()},
        num_documents={task: len(rows) for task, rows in samples.items()},
        document_hashes={task: str(text) for task, text in found.get("task_hashes", {}).items()},
        responses={task: [row["resps"] for row in rows] for task, rows in samples.items()},
    )


def disagreements(first: Scores, second: Scores) -> list[str]:
    """Where two ways differ, to the last digit; nothing where they agree."""
    told = []
    for task, rows in first.responses.items():
        others = second.responses.get(task, [])
        apart = [n for n, (one, other) in enumerate(zip(rows, others, strict=False)) if one != other]
        if len(rows) != len(others):
            told.append(f"{task}: {len(rows)} documents and {len(others)}")
        elif apart:
            place = apart[0]
            told.append(
                f"{task}: {len(apart)} of {len(rows)} documents, first number {place}: "
                f"{rows[place]} and {others[place]}"
            )
    if not told and first.results != second.results:
        told.append("the same responses gave other metrics")
    return told
