"""Files of prompts, as users have them, and every way in which a line can be wrong."""

import json
from pathlib import Path

import pytest

from loadtest.prompts import Prompt, Prompts


def written(folder: Path, text: str) -> Path:
    path = folder / "mine"
    path.write_text(text)
    return path


def test_a_line_is_a_text_or_token_ids_and_may_say_how_long_its_answer_is(tmp_path: Path) -> None:
    lines = ['{"prompt": "a", "id": 7}', "", '{"prompt": [1, 0], "output_tokens": 9}']
    prompts = Prompts.load(written(tmp_path, "\n".join(lines)))
    assert prompts.items == (Prompt("a"), Prompt(token_ids=(1, 0), output_tokens=9))
    assert prompts.texts == ("a",)
    assert prompts.source == "mine"


@pytest.mark.parametrize(
    "line",
    [
        *("{", '{"text": "a"}', '{"prompt": ""}', '{"prompt": []}', '{"prompt": [1, -1]}'),
        *('{"prompt": [1.5]}', '{"prompt": [true]}', '{"prompt": {}}', "7"),
        *('{"prompt": "a", "output_tokens": -1}', '{"prompt": "a", "output_tokens": "8"}'),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(ValueError, match="line 2"):
        Prompts.load(written(tmp_path, '{"prompt": "fine"}\n' + line + "\n"))


def test_sharegpt_gives_the_first_question_of_each_answered_conversation(tmp_path: Path) -> None:
    def conversation(*turns: tuple[str, str]) -> dict[str, object]:
        return {"id": "x", "conversations": [{"from": who, "value": text} for who, text in turns]}

    file = [
        conversation(("human", "one"), ("gpt", "1"), ("human", "more"), ("gpt", "2")),
        conversation(("gpt", "hello"), ("human", "not a question of mine")),
        conversation(("human", "never answered")),
        conversation(("user", "two"), ("assistant", "2")),
        conversation(("human", "  "), ("gpt", "what?")),
    ]
    prompts = Prompts.load(written(tmp_path, json.dumps(file)))
    assert prompts.texts == ("one", "two")


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "holds no prompt"), ("[]", "holds no prompt"), ("[1]", "item 1"), ("[{]", "not JSON")],
)
def test_a_file_without_prompts_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Prompts.load(written(tmp_path, text))
