"""Recordings as they are published, and what is wrong with a line."""

from pathlib import Path

import pytest

from loadtest.trace import Trace, Traced

MOONCAKE = """\
{"timestamp": 3052, "input_length": 2287, "output_length": 316, "hash_ids": [0, 42]}
{"timestamp": 1000, "input_length": 700, "output_length": 50}
"""
AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.4804600,110,27
"""


def loaded(folder: Path, text: str) -> Trace:
    path = folder / "trace"
    path.write_text(text)
    return Trace.load(path)


def test_mooncakes_lines_in_the_order_of_their_times(tmp_path: Path) -> None:
    assert loaded(tmp_path, MOONCAKE).requests == (
        Traced(0.0, 50, input_tokens=700),
        Traced(pytest.approx(2.052), 316, input_tokens=2287, hash_ids=(0, 42)),
    )


def test_azures_columns(tmp_path: Path) -> None:
    assert loaded(tmp_path, AZURE).requests == (
        Traced(0.0, 10, input_tokens=4808),
        Traced(pytest.approx(0.5005, abs=1e-5), 27, input_tokens=110),
    )
    zoned = AZURE.replace("9799600", "979960+00:00").replace("4804600", "480460+00:00")
    assert len(loaded(tmp_path, zoned).requests) == 2


def test_a_line_may_have_its_prompt(tmp_path: Path) -> None:
    trace = loaded(tmp_path, '{"timestamp": 5, "prompt": "hello", "output_length": 3}\n')
    assert trace.requests == (Traced(0.0, 3, text="hello"),)
    assert trace.has_prompts
    assert not loaded(tmp_path, MOONCAKE).has_prompts


def test_what_is_longer_than_the_window_is_left_out_and_the_rest_begins_at_0(tmp_path: Path) -> None:
    trace = loaded(tmp_path, AZURE)
    assert len(trace.fitting(4818).requests) == 2
    assert trace.fitting(4817).requests == (Traced(0.0, 27, input_tokens=110),)
    assert trace.fitting(10).requests == ()


@pytest.mark.parametrize(
    "line",
    [
        "[1]",
        '{"timestamp": 0, "input_length": 5}',
        '{"timestamp": 0, "input_length": 5, "output_length": 0}',
        '{"timestamp": 0, "input_length": "5", "output_length": 1}',
        '{"timestamp": -1, "input_length": 5, "output_length": 1}',
        '{"input_length": 5, "output_length": 1}',
        '{"timestamp": 0, "output_length": 1}',
        '{"timestamp": 0, "input_length": 5, "prompt": "a", "output_length": 1}',
        '{"timestamp": 0, "prompt": "", "output_length": 1}',
        '{"timestamp": 0, "prompt": "a", "output_length": 1, "hash_ids": [1]}',
        '{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": 1}',
        '{"timestamp": 0, "input_length": 5, "output_length": 1, "session_id": "a"}',
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    """A field with a meaning that we do not give it is refused: the load would not be the recorded one."""
    with pytest.raises(ValueError, match="line 3"):
        loaded(tmp_path, MOONCAKE + line + "\n")


@pytest.mark.parametrize(
    "row", ["2023-11-16 18:17:05,1", "yesterday,1,1", "2023-11-16 18:17:05,a,1", "2023-11-16 18:17:05,0,1"]
)
def test_a_bad_row_is_named(tmp_path: Path, row: str) -> None:
    with pytest.raises(ValueError, match="line 4"):
        loaded(tmp_path, AZURE + row + "\n")


def test_nothing_is_no_trace(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no request"):
        loaded(tmp_path, "\n")
