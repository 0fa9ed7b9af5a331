"""The catalogue of bad requests: each has one status, one code, OpenAI's envelope and at most 4 KB."""

import json
import socket
from typing import Any

import httpx2
import pytest
from api_rig import Server

from service.api.schema import CompletionRequest, parse
from service.errors import RequestError

MAX_ERROR_BYTES = 4096
JSON = {"content-type": "application/json"}


def check(response: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    assert (response.status_code, response.content[:200]) == (status, response.content[:200])
    assert len(response.content) <= MAX_ERROR_BYTES
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["code"], bool(error["message"])) == (code, True)
    assert response.headers["x-request-id"]
    return error


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny", "prompt": "hello", **fields}).encode()


def chat(**fields: Any) -> bytes:
    messages = [{"role": "user", "content": "hello"}]
    return json.dumps({"model": "tiny", "messages": messages, **fields}).encode()


def raw(text: str) -> bytes:
    """A completion with one more field, written as it stands."""
    return f'{{"model": "tiny", "prompt": "hello", {text}}}'.encode()


BYTES = {
    "empty": (b"", "invalid_json"),
    "blank": (b" \n ", "invalid_json"),
    "cut": (b'{"model": "tiny"', "invalid_json"),
    "trailing": (body() + b"x", "invalid_json"),
    "array": (b"[]", "invalid_json"),
    "null": (b"null", "invalid_json"),
    "string": (b'"prompt"', "invalid_json"),
    "single_quotes": (b"{'model': 'tiny'}", "invalid_json"),
    "control_character": (b'{"model": "ti\x01ny"}', "invalid_json"),
    "invalid_utf8": (b'{"model": "\xff\xfe"}', "invalid_unicode"),
    "utf16": (body().decode().encode("utf-16"), "invalid_unicode"),
    "bom": (b"\xef\xbb\xbf" + body(), "invalid_unicode"),
    "lone_surrogate": (b'{"model": "tiny", "prompt": "\\ud800"}', "invalid_unicode"),
    "low_surrogate": (b'{"model": "tiny", "prompt": "\\udc00x"}', "invalid_unicode"),
    "encoded_surrogate": (b'{"model": "tiny", "prompt": "\xed\xa0\x80"}', "invalid_unicode"),
    "nan": (raw('"temperature": NaN'), "invalid_number"),
    "infinity": (raw('"temperature": -Infinity'), "invalid_number"),
    "1e400": (raw('"temperature": 1e400'), "invalid_number"),
    "5000_digits": (raw('"max_tokens": ' + "9" * 5000), "invalid_number"),
    "duplicate_key": (raw('"n": 1, "n": 2'), "duplicate_key"),
    "duplicate_escaped_key": (raw('"n": 1, "\\u006e": 2'), "duplicate_key"),
    "duplicate_inner_key": (raw('"stream_options": {"x": 1, "x": 1}'), "duplicate_key"),
    "nested_33": (raw('"stop": ' + "[" * 32 + "]" * 32), "nesting_too_deep"),
    "nested_900": (b"[" * 900 + b"]" * 900, "nesting_too_deep"),
    "nested_100k": (b"[" * 100_000, "nesting_too_deep"),
    "33k_objects": (raw('"stop": [' + "{}," * 33_000 + "{}]"), "too_many_items"),
    "301_keys": (raw(", ".join(f'"k{n}": 1' for n in range(301))), "too_many_items"),
}  # fmt: skip


@pytest.mark.parametrize("name", BYTES)
def test_bytes(http: httpx2.Client, name: str) -> None:
    content, code = BYTES[name]
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
        check(http.post(path, content=content, headers=JSON), 400, code)


COMPLETIONS = {
    "no_model": ({"model": None}, "invalid_type", "model"),
    "other_prompt_type": ({"prompt": 5}, "invalid_type", "prompt"),
    "null_prompt": ({"prompt": None}, "invalid_type", "prompt"),
    "empty_prompt": ({"prompt": ""}, "empty_prompt", "prompt"),
    "no_prompts": ({"prompt": []}, "empty_prompt", "prompt"),
    "one_empty_prompt": ({"prompt": ["a", ""]}, "empty_prompt", "prompt"),
    "one_empty_id_list": ({"prompt": [[1], []]}, "empty_prompt", "prompt"),
    "mixed_prompts": ({"prompt": ["a", 1]}, "invalid_type", "prompt"),
    "mixed_ids": ({"prompt": [1, "a"]}, "invalid_type", "prompt"),
    "boolean_ids": ({"prompt": [1, True]}, "invalid_type", "prompt"),
    "float_ids": ({"prompt": [1, 2.5]}, "invalid_type", "prompt"),
    "nested_ids": ({"prompt": [[[1]]]}, "invalid_type", "prompt"),
    "objects_for_prompts": ({"prompt": [{}]}, "invalid_type", "prompt"),
    "negative_id": ({"prompt": [5, -1]}, "invalid_token_id", "prompt"),
    "id_beyond_vocabulary": ({"prompt": [5, 100_000]}, "invalid_token_id", "prompt"),
    "id_beyond_32_bits": ({"prompt": [2**40]}, "invalid_token_id", "prompt"),
    "too_many_prompts": ({"prompt": ["a"] * 129}, "array_above_max_length", "prompt"),
    "prompt_beyond_window": ({"prompt": [5] * 3000}, "context_length_exceeded", "prompt"),
    "answer_beyond_window": ({"max_tokens": 2048}, "context_length_exceeded", "prompt"),
    "max_tokens_0": ({"max_tokens": 0}, "integer_below_min_value", "max_tokens"),
    "max_tokens_negative": ({"max_tokens": -5}, "integer_below_min_value", "max_tokens"),
    "max_tokens_billions": ({"max_tokens": 10**10}, "integer_above_max_value", "max_tokens"),
    "max_tokens_1e30": ({"max_tokens": 10**30}, "invalid_type", "max_tokens"),
    "max_tokens_true": ({"max_tokens": True}, "invalid_type", "max_tokens"),
    "max_tokens_string": ({"max_tokens": "1"}, "invalid_type", "max_tokens"),
    "max_tokens_float": ({"max_tokens": 1.5}, "invalid_type", "max_tokens"),
    "min_above_max": ({"max_tokens": 3, "min_tokens": 4}, "integer_above_max_value", "min_tokens"),
    "n_0": ({"n": 0}, "integer_below_min_value", "n"),
    "n_9": ({"n": 9}, "integer_above_max_value", "n"),
    "too_many_answers": ({"prompt": [[5]] * 17, "n": 8}, "array_above_max_length", "prompt"),
    "n_1000": ({"n": 1000}, "integer_above_max_value", "n"),
    "n_list": ({"n": [1]}, "invalid_type", "n"),
    "best_of": ({"best_of": 2}, "unsupported_parameter", "best_of"),
    "suffix": ({"suffix": "x"}, "unsupported_parameter", "suffix"),
    "temperature_hot": ({"temperature": "hot"}, "invalid_type", "temperature"),
    "temperature_nan_string": ({"temperature": "nan"}, "invalid_type", "temperature"),
    "temperature_negative": ({"temperature": -0.1}, "decimal_below_min_value", "temperature"),
    "temperature_2.1": ({"temperature": 2.1}, "decimal_above_max_value", "temperature"),
    "temperature_true": ({"temperature": True}, "invalid_type", "temperature"),
    "top_p_0": ({"top_p": 0}, "integer_below_min_value", "top_p"),
    "top_p_1.1": ({"top_p": 1.1}, "decimal_above_max_value", "top_p"),
    "top_k_-2": ({"top_k": -2}, "integer_below_min_value", "top_k"),
    "top_k_2^31": ({"top_k": 2**31}, "integer_above_max_value", "top_k"),
    "min_p_2": ({"min_p": 2.0}, "decimal_above_max_value", "min_p"),
    "seed_2^63": ({"seed": 2**63}, "integer_above_max_value", "seed"),
    "seed_2^70": ({"seed": 2**70}, "invalid_type", "seed"),
    "presence_penalty_2.5": ({"presence_penalty": 2.5}, "decimal_above_max_value", "presence_penalty"),
    "frequency_penalty_-3": ({"frequency_penalty": -3}, "integer_below_min_value", "frequency_penalty"),
    "frequency_penalty_false": ({"frequency_penalty": False}, "invalid_type", "frequency_penalty"),
    "repetition_penalty_0": ({"repetition_penalty": 0}, "integer_below_min_value", "repetition_penalty"),
    "repetition_penalty_11": ({"repetition_penalty": 11.0}, "decimal_above_max_value", "repetition_penalty"),
    "logit_bias_list": ({"logit_bias": [5, 1]}, "invalid_type", "logit_bias"),
    "logit_bias_word": ({"logit_bias": {"the": 1}}, "invalid_token_id", "logit_bias"),
    "logit_bias_negative_id": ({"logit_bias": {"-1": 1}}, "invalid_token_id", "logit_bias"),
    "logit_bias_twice": ({"logit_bias": {"5": 1, "05": 1}}, "invalid_token_id", "logit_bias"),
    "logit_bias_other_digits": ({"logit_bias": {"\u0665": 1}}, "invalid_token_id", "logit_bias"),
    "logit_bias_long_id": ({"logit_bias": {"9" * 5000: 1}}, "invalid_token_id", "logit_bias"),
    "logit_bias_beyond": ({"logit_bias": {"1000000": 1}}, "invalid_token_id", "logit_bias"),
    "logit_bias_101": ({"logit_bias": {"5": 101}}, "invalid_logit_bias", "logit_bias"),
    "logit_bias_true": ({"logit_bias": {"5": True}}, "invalid_logit_bias", "logit_bias"),
    "logit_bias_string": ({"logit_bias": {"5": "1"}}, "invalid_logit_bias", "logit_bias"),
    "logit_bias_null": ({"logit_bias": {"5": None}}, "invalid_logit_bias", "logit_bias"),
    "stop_5": ({"stop": list("abcde")}, "array_above_max_length", "stop"),
    "stop_empty": ({"stop": ""}, "invalid_stop", "stop"),
    "stop_long": ({"stop": ["x" * 257]}, "invalid_stop", "stop"),
    "stop_null_item": ({"stop": ["a", None]}, "invalid_type", "stop"),
    "stop_number": ({"stop": 5}, "invalid_type", "stop"),
    "stop_token_ids_65": ({"stop_token_ids": [5] * 65}, "array_above_max_length", "stop_token_ids"),
    "stop_token_id_string": ({"stop_token_ids": ["5"]}, "invalid_type", "stop_token_ids[0]"),
    "stop_token_id_beyond": ({"stop_token_ids": [10**6]}, "invalid_token_id", "stop_token_ids"),
    "logprobs_21": ({"logprobs": 21}, "integer_above_max_value", "logprobs"),
    "logprobs_-1": ({"logprobs": -1}, "integer_below_min_value", "logprobs"),
    "logprobs_string": ({"logprobs": "5"}, "invalid_type", "logprobs"),
    "stream_string": ({"stream": "true"}, "invalid_type", "stream"),
    "stream_options_alone": ({"stream_options": {}}, "invalid_value", "stream_options"),
    "stream_options_field": (
        {"stream": True, "stream_options": {"x": 1}}, "unknown_parameter", "stream_options.x",
    ),
    "unknown_field": ({"tempature": 1}, "unknown_parameter", "tempature"),
    "user_number": ({"user": 5}, "invalid_type", "user"),
    "guided_json": ({"guided_json": {}}, "unknown_parameter", "guided_json"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPLETIONS)
def test_completions(http: httpx2.Client, name: str) -> None:
    fields, code, param = COMPLETIONS[name]
    error = check(http.post("/v1/completions", content=body(**fields), headers=JSON), 400, code)
    assert error["param"] == param


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y", **fields}]}


CHAT = {
    "no_messages": ({"messages": []}, "empty_prompt", "messages"),
    "messages_string": ({"messages": "hello"}, "invalid_type", "messages"),
    "message_string": ({"messages": ["hello"]}, "invalid_type", "messages[0]"),
    "empty_message": ({"messages": [{}]}, "missing_required_parameter", "messages[0].role"),
    "unknown_role": (message(role="robot"), "invalid_value", "messages[1].role"),
    "tool_role": (message(role="tool"), "invalid_value", "messages[1].role"),
    "content_null": (message(content=None), "invalid_type", "messages[1].content"),
    "content_number": (message(content=5), "invalid_type", "messages[1].content"),
    "content_no_parts": (message(content=[]), "invalid_type", "messages[1].content"),
    "content_string_parts": (message(content=["x"]), "invalid_type", "messages[1].content"),
    "image_part": (
        message(content=[{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]),
        "unsupported_content_part", "messages[1].content",
    ),
    "text_part_number": (
        message(content=[{"type": "text", "text": 5}]), "invalid_type", "messages[1].content",
    ),
    "unknown_message_field": (message(mood="good"), "unknown_parameter", "messages[1].mood"),
    "tool_calls": (message(tool_calls=[{"id": "x"}]), "unsupported_parameter", "messages[1].tool_calls"),
    "1025_messages": (
        {"messages": [{"role": "user", "content": "x"}] * 1025}, "array_above_max_length", "messages",
    ),
    "tools": ({"tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
    "tool_choice": ({"tool_choice": "required"}, "unsupported_parameter", "tool_choice"),
    "response_format": (
        {"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format",
    ),
    "chat_template": ({"chat_template": "{{ 1 }}"}, "unsupported_parameter", "chat_template"),
    "chat_template_kwargs": (
        {"chat_template_kwargs": {"a": 1}}, "unsupported_parameter", "chat_template_kwargs",
    ),
    "both_limits": ({"max_tokens": 1, "max_completion_tokens": 1}, "invalid_value", "max_tokens"),
    "max_tokens_0": ({"max_tokens": 0}, "integer_below_min_value", "max_tokens"),
    "prompt_of_the_other": ({"prompt": "x"}, "unknown_parameter", "prompt"),
    "echo_of_the_other": ({"echo": True}, "unknown_parameter", "echo"),
    "logprobs_number": ({"logprobs": 5}, "invalid_type", "logprobs"),
    "top_logprobs_alone": ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
    "top_logprobs_21": ({"logprobs": True, "top_logprobs": 21}, "integer_above_max_value", "top_logprobs"),
    "beyond_window": (message(content="日" * 3000), "context_length_exceeded", "messages"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAT)
def test_chat(http: httpx2.Client, name: str) -> None:
    fields, code, param = CHAT[name]
    error = check(http.post("/v1/chat/completions", content=chat(**fields), headers=JSON), 400, code)
    assert error["param"] == param


def test_the_window_error_names_both_numbers(server: Server, http: httpx2.Client) -> None:
    response = http.post("/v1/completions", content=body(max_tokens=2047), headers=JSON)
    num_tokens = len(server.codec.encode("hello"))
    text = check(response, 400, "context_length_exceeded")["message"]
    assert f"{num_tokens} tokens" in text
    assert "2047" in text
    assert "2048" in text


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("name", ["gpt-4", "../../etc/passwd", "https://example.com/x", "m" * 500])
def test_other_models(http: httpx2.Client, path: str, name: str) -> None:
    content = (body if path == "/v1/completions" else chat)(model=name)
    error = check(http.post(path, content=content, headers=JSON), 404, "model_not_found")
    assert len(error["message"]) < 200


TOKENIZE = {
    "nothing": ("/tokenize", {}, "invalid_value"),
    "both": ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "invalid_value"),
    "prompt_list": ("/tokenize", {"prompt": ["x"]}, "invalid_type"),
    "unknown": ("/tokenize", {"prompt": "x", "pair": "y"}, "unknown_parameter"),
    "specials_in_chat": (
        "/tokenize",
        {"messages": [{"role": "user", "content": "x"}], "add_special_tokens": True},
        "invalid_value",
    ),
    "no_tokens": ("/detokenize", {}, "missing_required_parameter"),
    "token_string": ("/detokenize", {"tokens": ["1"]}, "invalid_type"),
    "token_negative": ("/detokenize", {"tokens": [-1]}, "integer_below_min_value"),
    "token_beyond": ("/detokenize", {"tokens": [10**6]}, "invalid_token_id"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZE)
def test_tokenize(http: httpx2.Client, name: str) -> None:
    path, fields, code = TOKENIZE[name]
    check(http.post(path, json=fields), 400, code)


def test_many_wrong_items_cost_one_error(http: httpx2.Client) -> None:
    """99 KB of `{}` for a prompt: a validator for each item would answer with megabytes after seconds."""
    wrong: list[Any] = [{}] * 33_000
    with pytest.raises(RequestError) as caught:
        parse(CompletionRequest, {"model": "tiny", "prompt": wrong})
    assert len(caught.value.message) < 200
    response = http.post("/v1/completions", content=body(prompt=wrong), headers=JSON)
    check(response, 400, "too_many_items")
    check(http.post("/v1/completions", content=body(prompt=[{}] * 9000), headers=JSON), 400, "invalid_type")
    check(
        http.post("/v1/chat/completions", content=chat(messages=[{}] * 9000), headers=JSON),
        400,
        "array_above_max_length",
    )
    check(
        http.post("/v1/completions", content=body(stop_token_ids=["x"] * 50_000), headers=JSON),
        400,
        "invalid_type",
    )


def test_a_null_character_is_text(server: Server, http: httpx2.Client) -> None:
    tokens = http.post("/tokenize", json={"prompt": "a\x00b"}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": "a\x00b"}
    response = http.post("/v1/completions", content=body(prompt="a\x00b", max_tokens=1), headers=JSON)
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"content-type": "text/plain"}, 415, "unsupported_media_type"),
        ({"content-type": ""}, 415, "unsupported_media_type"),
        ({"content-type": "application/x-www-form-urlencoded"}, 415, "unsupported_media_type"),
        ({"content-type": "application/json", "content-encoding": "gzip"}, 415, "unsupported_media_type"),
        ({"content-type": "application/json", "x-long": "y" * 17_000}, 431, "headers_too_large"),
        (JSON | {f"x-{n}": "y" for n in range(100)}, 431, "headers_too_large"),
        ({"content-type": "application/json", "host": "evil.example"}, 400, "invalid_host"),
    ],
)  # fmt: skip
def test_headers(http: httpx2.Client, headers: dict[str, str], status: int, code: str) -> None:
    check(http.post("/v1/completions", content=body(), headers=headers), status, code)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),
        ("POST", "/v1/unknown", 404, "not_found"),
        ("GET", "/health/", 404, "not_found"),
        ("GET", "//health", 404, "not_found"),
        ("GET", "/docs", 404, "not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("GET", "/" + "x" * 9000, 414, "url_too_long"),
    ],
)
def test_paths_and_methods(http: httpx2.Client, method: str, path: str, status: int, code: str) -> None:
    response = http.request(method, path)
    check(response, status, code)
    if status == 405:
        assert response.headers["allow"]


def exchange(server: Server, request: bytes) -> bytes:
    """Raw bytes to the port -> everything that comes back until the server closes."""
    port = int(server.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(request)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_a_large_body_is_refused_unread(server: Server) -> None:
    """By its announced length: not one byte of it is waited for."""
    answer = exchange(server, HEAD + b"Content-Length: 200000000\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"body_too_large" in answer


def test_a_large_body_without_a_length_is_refused_on_the_way(server: Server) -> None:
    size = (4 << 20) + 1
    chunk = b"%x\r\n%s\r\n" % (size, b"x" * size)
    answer = exchange(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk)
    assert answer.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\nConnection: close\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
        HEAD + b"Content-Length: -5\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01",
    ],
)
def test_framing(server: Server, request_bytes: bytes) -> None:
    answer = exchange(server, request_bytes)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert len(answer) < MAX_ERROR_BYTES


def test_rejects_are_counted(server: Server, http: httpx2.Client) -> None:
    before = server.metric("halftone_requests_rejected_total", reason="invalid")
    http.post("/v1/completions", content=b"{", headers=JSON)
    http.post("/v1/completions", content=body(n=0), headers=JSON)
    assert server.metric("halftone_requests_rejected_total", reason="invalid") == before + 2


def test_nothing_in_the_catalogue_reached_the_engine(server: Server, http: httpx2.Client) -> None:
    before = server.metric("halftone_requests_accepted_total")
    for fields, *_ in COMPLETIONS.values():
        http.post("/v1/completions", content=body(**fields), headers=JSON)
    assert server.metric("halftone_requests_accepted_total") == before
