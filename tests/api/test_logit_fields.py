"""Penalties and bias from the JSON body to what the engine is told."""

from typing import Any

import pytest
from api_rig import Server

from service.api.admission import sampling_of
from service.api.schema import ChatRequest, CompletionRequest, parse
from service.engine.penalties import MAX_BIASES
from service.messages import Sampling, Submit, encoder, front_decoder


def told(server: Server, **fields: Any) -> Sampling:
    """What crosses the socket."""
    info = server.host.client.info
    assert info is not None
    request = parse(CompletionRequest, {"model": "tiny", "prompt": [1], **fields})
    chat = parse(ChatRequest, {"model": "tiny", "messages": [{"role": "user", "content": "x"}], **fields})
    sampling = sampling_of(request, 5, -1, -1, info)
    other = sampling_of(chat, 5, -1, -1, info)
    names = ("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias")
    assert [getattr(sampling, name) for name in names] == [getattr(other, name) for name in names]
    submit = front_decoder.decode(encoder.encode(Submit(1, [1], sampling)))
    assert isinstance(submit, Submit)
    assert submit.sampling == sampling
    return submit.sampling


def test_values_arrive(server: Server) -> None:
    sampling = told(
        server,
        presence_penalty=-2,
        frequency_penalty=1.25,
        repetition_penalty=10,
        logit_bias={"0": -100, "17": 0.5},
    )
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-2.0, 1.25)
    assert sampling.repetition_penalty == 10.0
    assert sampling.logit_bias == {0: -100.0, 17: 0.5}


@pytest.mark.parametrize(
    ("fields", "shapes"),
    [
        ({}, False),
        ({"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1, "logit_bias": {}}, False),
        ({"presence_penalty": None, "repetition_penalty": None, "logit_bias": None}, False),
        ({"presence_penalty": 0.1}, True),
        ({"frequency_penalty": -0.1}, True),
        ({"repetition_penalty": 0.9}, True),
        ({"logit_bias": {"3": 0}}, True),
    ],
)
def test_only_values_that_ask_cost_the_engine_anything(
    server: Server, fields: dict[str, Any], shapes: bool
) -> None:
    assert told(server, **fields).shapes_logits is shapes


def test_as_many_biases_as_the_engine_holds(server: Server) -> None:
    biases = {str(token): 1.0 for token in range(MAX_BIASES)}
    with server.http() as http:
        body = {"model": "tiny", "prompt": [1], "max_tokens": 2}
        assert http.post("/v1/completions", json={**body, "logit_bias": biases}).status_code == 200
        answer = http.post("/v1/completions", json={**body, "logit_bias": {**biases, "300": 1.0}})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "too_many_items"
