"""Two tasks over a handful of sentences: which ending is likelier, and what is said next."""

from typing import Any

CHOICES = [
    ("the quick brown fox jumps over the", [" lazy dog", " 日本語", " street"]),
    ("stop here. User: what is", [" the end?", " hello"]),
    ("def answer(question):", [" return 42", " größe und straße"]),
    ("naïve café", [" 🙂🙃👍", " 你好世界"]),
]


def simple_evaluate(
    *, model: Any, tasks: list[str], task_manager: Any, limit: int | None, num_fewshot: Any, log_samples: bool
) -> dict[str, Any]:
    if unknown := set(tasks) - {"choose", "say", "warm"}:
        raise ValueError(f"no such task: {unknown}")
    results, samples = {}, {}
    for task in tasks:
        rows = []
        for context, endings in CHOICES[:limit]:
            if task == "choose":
                answers = model.score([(context, ending) for ending in endings])
                rows.append({"resps": [[answer] for answer in answers]})
            else:
                more = {"top_k": 3} if task == "warm" else {}
                rows.append({"resps": [[model.generate(context, ["\n", "e"], 6, **more)]]})
        samples[task] = rows
        results[task] = {"alias": task, "acc,none": len(rows) / 4, "acc_stderr,none": 0.5}
    return {
        "results": results,
        "samples": samples,
        "versions": dict.fromkeys(tasks, 1.0),
        "n-shot": dict.fromkeys(tasks, 0),
        "task_hashes": dict.fromkeys(tasks, "abc"),
    }
