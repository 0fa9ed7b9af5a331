"""What scoring clients rely on in /v1/completions: echo with log-probabilities, none left out or invented."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import load_instance, logits_of, make_checkpoint
from tiny_tokenizers import write_checkpoint

from tests.e2e.demo_server import serving

PROMPT = [9, 40, 77, 3, 120, 260, 31]


def test_the_prompt_s_log_probabilities_with_no_token_one_token_and_a_stop(tmp_path: Path) -> None:
    """A client drops the last entry, which is the answer's: were a stop token's left out, it would drop the
    prompt's last instead, and score every ending wrongly without a word."""
    write_checkpoint(tmp_path, "byte_level")
    make_checkpoint(tmp_path, "llama", torch.bfloat16, vocab_size=512)
    rows = logits_of(load_instance(tmp_path), PROMPT).double().log_softmax(-1)
    wanted = rows[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0].tolist()
    following = int(rows[-1].argmax())
    base = {"prompt": PROMPT, "temperature": 0, "echo": True, "logprobs": 1}
    more: list[dict[str, Any]] = [{"max_tokens": 0}, {"max_tokens": 1}]
    more.append({"max_tokens": 1, "stop_token_ids": [following]})
    with serving(tmp_path, precision="fp32", kv_tokens=512) as server:
        choices = [server.post("/v1/completions", base | fields)["choices"][0] for fields in more]
    reasons = [choice["finish_reason"] for choice in choices]
    assert reasons == ["length", "length", "stop"]
    for choice, num_answered in zip(choices, (0, 1, 1), strict=True):
        logprobs = choice["logprobs"]
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        assert len(logprobs["token_logprobs"]) == len(logprobs["tokens"]) == len(PROMPT) + num_answered
        assert logprobs["token_logprobs"][1 : len(PROMPT)] == pytest.approx(wanted, rel=1e-4)
        if num_answered:
            assert logprobs["token_logprobs"][-1] == pytest.approx(float(rows[-1, following]), rel=1e-4)
