"""A real engine's precision swapped while it serves: there, back, and past a fault that the canary finds."""

import json
import sys
from pathlib import Path
from typing import Any

import httpx2
import torch
from front_thread import running
from tiny_models import make_checkpoint

from service.api.app import create_app
from service.config import Settings
from service.front.host import Host

PLANTED_ENGINE = str(Path(__file__).resolve().parent.parent / "planted_engine.py")
TIMEOUT_S = 120


def swap(http: httpx2.Client, precision: str) -> dict[str, Any]:
    response = http.post(
        "/admin/precision", json={"precision": precision}, headers={"authorization": "Bearer root"}
    )
    assert response.status_code == 200, response.text
    last: dict[str, Any] = json.loads(response.text.splitlines()[-1])
    return last


def greedy(http: httpx2.Client) -> list[list[int]]:
    """Answers to a few prompts of ids."""
    answers = []
    for seed in range(3):
        prompt = [(7 * place + 31 * seed) % 128 for place in range(20)]
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        answer = http.post("/v1/completions", json=body | {"return_token_ids": True}).json()
        answers.append(answer["choices"][0]["token_ids"])
    return answers


def test_there_and_back_and_past_a_planted_fault(tmp_path: Path) -> None:
    """Answers of bf16 are the same behind a swap that was rolled back and behind one to nf4 and back."""
    folder, planted = tmp_path / "tiny", tmp_path / "planted"
    make_checkpoint(folder, "llama", torch.bfloat16, intermediate_size=128)
    planted.touch()
    settings = Settings(
        model=str(folder), precision="bf16", device="cpu", tokenizer="none", kv_tokens=512, port=0,
        admin_key="root", cache_dir=tmp_path,
    )  # fmt: skip
    command = (sys.executable, PLANTED_ENGINE, str(planted))
    with (
        running(lambda: Host(settings, folder, create_app, command=command), TIMEOUT_S) as (host, _),
        httpx2.Client(base_url=host.url, timeout=TIMEOUT_S, verify=False) as http,
    ):
        before = greedy(http)
        refused = swap(http, "nf4")
        assert (refused["outcome"], refused["precision"]) == ("rolled_back", "bf16")
        assert refused["error"]["code"] == "canary_failed"
        assert "`nf4` is" in refused["error"]["message"]
        assert greedy(http) == before
        planted.unlink()
        swapped = swap(http, "nf4")
        assert (swapped["outcome"], swapped["precision"]) == ("swapped", "nf4")
        assert 0 < swapped["canary"]["prefill_kl_nats"] < swapped["canary"]["bound_nats"]
        assert greedy(http) != before
        version = http.get("/version").json()["engine"]
        assert (version["precision"], version["canary"]) == ("nf4", swapped["canary"])
        back = swap(http, "bf16")
        assert (back["outcome"], back["precision"], back["previous"]) == ("swapped", "bf16", "nf4")
        assert greedy(http) == before
