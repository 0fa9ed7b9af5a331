"""A shape without weights through the whole server: ids alone, with another's tokenizer, and saved."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from front_thread import running
from tiny_tokenizers import write_checkpoint

from service.api.app import create_app
from service.cli.display import Display
from service.cli.model import find_model
from service.config import load_settings
from service.errors import CheckpointError
from service.front.host import Host, run_loop

START_TIMEOUT_S = 120
PROMPT = list(range(20, 40))
SHAPE = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 1000,  # the tokenizer has some 420
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}


@contextmanager
def serving(model: Path, **flags: Any) -> Iterator[httpx2.Client]:
    make_host = host_of(model, **flags)
    with (
        running(make_host, START_TIMEOUT_S) as (host, _),
        httpx2.Client(base_url=host.url, timeout=60, verify=False) as http,
    ):
        yield http


def host_of(model: Path, **flags: Any) -> Callable[[], Host]:
    """As `halftone serve` makes it."""
    settings = load_settings(model=str(model), port=0, device="cpu", served_model_name="m", **flags)
    with Display() as display:
        found, path = find_model(settings, display, may_save=True)
    return lambda: Host(found, path, create_app)


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shape")
    (folder / "config.json").write_text(json.dumps(SHAPE))
    return folder


def ids(http: httpx2.Client, **fields: Any) -> list[int]:
    body = {"model": "m", "prompt": PROMPT, "temperature": 0, "max_tokens": 32, **fields}
    answer = http.post("/v1/completions", json={**body, "return_token_ids": True})
    assert answer.status_code == 200, answer.text
    token_ids: list[int] = answer.json()["choices"][0]["token_ids"]
    return token_ids


def test_ids_alone_then_saved_then_with_a_tokenizer(shape: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    with serving(shape, load_format="random", load_seed="5", precision="nf4", save=str(saved)) as http:
        engine = http.get("/version").json()["engine"]
        assert engine["random_weights"]["seed"] == "5"
        assert "save" in engine["load_seconds"]
        answer = ids(http)
        assert len(answer) == 32
        assert ids(http, stream=False) == answer
        assert ids(http, logit_bias={"777": 100}) == [777] * 32
        once = ids(http, logit_bias={"777": 50, "3": 49}, presence_penalty=2, max_tokens=4)
        assert once == [777, 3, 777, 777]
        assert len(set(ids(http, frequency_penalty=2, repetition_penalty=10))) == 32
        refused: dict[str, dict[str, Any]] = {
            "prompt": {"prompt": "text", "return_token_ids": True},
            "text": {},
            "stop": {"stop": "x", "return_token_ids": True},
            "logprobs": {"logprobs": 1, "return_token_ids": True},
            "echo": {"echo": True, "return_token_ids": True},
        }
        for param, fields in refused.items():
            body = {"model": "m", "prompt": PROMPT, "max_tokens": 2, **fields}
            error = http.post("/v1/completions", json=body).json()["error"]
            assert (error["code"], error["param"]) == ("no_tokenizer", param)
        messages = [{"role": "user", "content": "hello"}]
        others = {
            "/v1/chat/completions": {"model": "m", "messages": messages, "return_token_ids": True},
            "/tokenize": {"prompt": "hello"},
            "/detokenize": {"tokens": [1]},
        }
        for path, other in others.items():
            assert http.post(path, json=other).json()["error"]["code"] == "no_tokenizer"
        streamed = http.post(
            "/v1/completions",
            json={
                "model": "m",
                "prompt": PROMPT,
                "temperature": 0,
                "max_tokens": 8,
                "stream": True,
                "return_token_ids": True,
            },
        ).text
        events = [line[6:] for line in streamed.splitlines() if line.startswith("data: {")]
        choices = [json.loads(event)["choices"][0] for event in events]
        assert [id for choice in choices for id in choice.get("token_ids", [])] == answer[:8]

    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    write_checkpoint(tokenizer, "byte_level")
    with serving(saved, tokenizer=str(tokenizer), precision="nf4") as http:
        assert http.get("/version").json()["engine"]["random_weights"]["seed"] == "5"
        assert ids(http) == answer
        assert max(answer) > http.post("/tokenize", json={"prompt": "x"}).json()["count"]
        chat = http.post("/v1/chat/completions", json={"model": "m", "messages": messages, "max_tokens": 40})
        assert chat.status_code == 200, chat.text
        assert chat.json()["usage"]["completion_tokens"] == 40
        scored = http.post(
            "/v1/completions",
            json={"model": "m", "prompt": "hello", "max_tokens": 40, "logprobs": 3, "ignore_eos": True},
        ).json()
        assert len(scored["choices"][0]["logprobs"]["tokens"]) == 40


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(shape: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    (small / "config.json").write_text(json.dumps({**SHAPE, "vocab_size": 100}))
    write_checkpoint(tmp_path, "byte_level")

    async def start() -> None:
        async with host_of(small, load_format="random", tokenizer=str(tmp_path))() as host:
            await host.ready()

    with pytest.raises(CheckpointError, match="vocab_size = 100"):
        run_loop(start())
