"""The texts that calibrate and judge: two halves that share nothing, and files that may not."""

import gzip
import random
import string
import zipfile
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics

import huggingface_hub
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import SettingError, SystemProblem
from service.quality import hub_texts
from service.quality.texts import (
    OVERLAP_CHARACTERS,
    Text,
    calibration_text,
    documentation,
    evaluation_text,
    normalized,
    read_text,
    refuse_overlap,
    spread,
    token_windows,
)
from tests.tiny_tokenizers import byte_level, sentencepiece


def words(seed: int, count: int) -> str:
    """Random words of seven letters."""
    source = random.Random(seed)
    return " ".join("".join(source.choices(string.ascii_lowercase, k=7)) for _ in range(count))


def test_halves_of_the_documentation_share_nothing() -> None:
    first, second = calibration_text(""), evaluation_text("")
    refuse_overlap(first, second)
    assert first.sha256 != second.sha256
    assert min(len(first.content), len(second.content)) > 100_000
    assert first.provenance.keys() == {"text", "sha256", "python"}


def test_topics_quote_each_other_so_half_b_is_cut() -> None:
    """Without the cut the default texts would overlap, and every default report be refused."""
    topic = topics["augassign"].strip("\n")  # half B; much of it stands in `assignment`, half A
    assert topics["assignment"].strip("\n") in documentation("A").content
    assert topic not in documentation("B").content
    assert topics["assert"].strip("\n") in documentation("B").content


@given(st.integers(0, 300), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_eighty_shared_characters_are_refused_wherever_they_stand(offset: int, seed: int) -> None:
    """Ten words of seven letters are 79 characters; the space and one letter more make the limit."""
    mine, theirs, common = words(seed, 60), words(seed + 1, 60), words(seed + 2, 10)
    at = theirs.find(" ", offset % 400) + 1
    short = f"{theirs[:at]}{common} {theirs[at:]}"
    refuse_overlap(Text("mine", f"{mine} {common}."), Text("theirs", short))
    layout = f"{common} tail".upper().replace(" ", ",\n  ")
    with pytest.raises(SettingError, match="overlap"):
        refuse_overlap(
            Text("mine", f"{mine} {layout} {mine}"), Text("theirs", f"{theirs[:at]}{common} tail {theirs}")
        )


def test_a_text_does_not_judge_what_it_calibrated() -> None:
    with pytest.raises(SettingError, match="overlap"):
        refuse_overlap(Text("a", "short"), Text("b", "short"))


def test_rules_and_tables_are_no_overlap() -> None:
    rule = "-" * 2 * OVERLAP_CHARACTERS
    refuse_overlap(Text("a", f"one {rule} two"), Text("b", f"three {rule} four"))
    assert normalized(f"One, {rule}\n two_three") == "one two three"


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("größe\n", encoding="utf-8")
    text = calibration_text(str(file))
    assert (text.name, text.content) == ("mine.txt", "größe\n")
    assert "python" not in text.provenance
    file.write_bytes(b"gr\xf6\xdfe")
    with pytest.raises(SettingError, match=r"`calibration` .* not UTF-8 at byte 2"):
        read_text(file, "calibration")
    file.write_text(" \n")
    with pytest.raises(SettingError, match="is empty"):
        evaluation_text(str(file))
    with pytest.raises(SettingError, match="no such file"):
        evaluation_text(str(tmp_path / "absent"))


def test_windows_are_disjoint_and_begin_as_the_tokenizer_begins() -> None:
    text = Text("t", words(1, 200))
    plain, with_bos = byte_level(), sentencepiece()
    ids = plain.encode(text.content).ids
    windows = token_windows(text, plain, 64)
    assert list(chain(*windows)) == ids[: len(ids) // 64 * 64]
    windows = token_windows(text, with_bos, 64)
    assert all(window[0] == 1 and len(window) == 64 for window in windows)
    body = with_bos.encode(text.content).ids[1:]
    assert list(chain(*(window[1:] for window in windows))) == body[: 63 * len(windows)]
    with pytest.raises(SettingError, match="one window takes"):
        token_windows(text, plain, 100_000)


def test_spread_takes_from_everywhere() -> None:
    windows = [[number] for number in range(100)]
    assert spread(windows, 4) == [[0], [25], [50], [75]]
    assert spread(windows[:3], 16) == windows[:3]


def test_json_lines_are_documents(tmp_path: Path) -> None:
    lines = '{"text": "one größe", "url": "u"}\n\n{"text": "two"}\n'
    (tmp_path / "mine.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "mine.json.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("mine.jsonl", "mine.json.gz"):
        text = evaluation_text(str(tmp_path / name))
        assert text.documents == ("one größe", "two")
        assert text.content == "one größe\n\ntwo"
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"prompt": "two"}\n')
    with pytest.raises(SettingError, match=r"line 2 is no JSON object with a field `text`"):
        evaluation_text(str(tmp_path / "bad.jsonl"))
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(lines.encode())[:20])
    with pytest.raises(SettingError, match="no whole gzip file"):
        evaluation_text(str(tmp_path / "cut.txt.gz"))


def test_texts_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "wikitext-2-raw-v1.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("wikitext-2-raw/wiki.test.raw", " \n = Title = \n")
    rows = [f'{{"text": "document {n}"}}' for n in range(hub_texts.C4_DOCUMENTS + 1)]
    (tmp_path / "c4-validation.00000-of-00008.json.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    asked = []

    def download(repository: str, file: str, repo_type: str) -> str:
        asked.append((repository, file, repo_type))
        return str(tmp_path / Path(file).name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert evaluation_text("wikitext-2").content == " \n = Title = \n"
    text = evaluation_text("c4")
    assert len(text.documents) == hub_texts.C4_DOCUMENTS
    assert text.content.startswith("document 0 document 1 ")
    assert text.most_windows == 256
    assert {kind for _, _, kind in asked} == {"dataset"}


def test_a_hub_that_cannot_be_reached_is_told_with_the_way_around_it() -> None:
    """The suite is offline."""
    with pytest.raises(SystemProblem, match="text `wikitext-2` cannot be fetched") as error:
        evaluation_text("wikitext-2")
    assert "--text FILE" in error.value.hint
