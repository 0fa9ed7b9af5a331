"""Folders that are there whole or not at all, whatever stops their maker."""

import os
import time
from pathlib import Path

import pytest

from service.errors import SystemProblem
from service.model.folders import MANIFEST, STALE_PARTIAL_S, is_whole, make_whole, write_json


def fill(folder: Path) -> None:
    (folder / "weights").write_bytes(b"1234")
    write_json(folder / MANIFEST, {"files": {"weights": 4}})


def test_it_appears_whole_and_alone(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "one"

    def watched(partial: Path) -> None:
        assert not folder.exists()
        assert list(partial.iterdir()) == []
        (partial.parent / "download").write_bytes(b"what the maker needs on the way")
        fill(partial)

    make_whole(folder, 4, "a model", watched)
    assert is_whole(folder)
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, "weights"]
    assert [path.name for path in folder.parent.iterdir()] == ["one"]


@pytest.mark.parametrize(
    ("name", "content"), [("weights", b"123"), ("weights", None), (MANIFEST, b"{"), (MANIFEST, b"{}")]
)
def test_a_damaged_folder_makes_way(tmp_path: Path, name: str, content: bytes | None) -> None:
    folder = tmp_path / "one"
    make_whole(folder, 4, "a model", fill)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    assert not is_whole(folder)
    make_whole(folder, 4, "a model", fill)
    assert is_whole(folder)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_whatever_stops_the_maker_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def stopped(partial: Path) -> None:
        fill(partial)
        raise error

    with pytest.raises(error):
        make_whole(tmp_path / "one", 4, "a model", stopped)
    assert list(tmp_path.iterdir()) == []


def test_remains_of_killed_makers_go_and_others_work_stays(tmp_path: Path) -> None:
    for name in (".partial-old", ".partial-new", "other"):
        (tmp_path / name).mkdir()
    long_ago = time.time() - STALE_PARTIAL_S - 1
    for name in (".partial-old", "other"):
        os.utime(tmp_path / name, (long_ago, long_ago))
    make_whole(tmp_path / "one", 4, "a model", fill)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".partial-new", "one", "other"]


def test_no_room_is_told_before_work(tmp_path: Path) -> None:
    with pytest.raises(SystemProblem, match="a model needs"):
        make_whole(tmp_path / "one", 1 << 60, "a model", lambda _: pytest.fail("work was begun"))
