"""The rules of this house that a test can hold: size, direction of imports, documentation, words."""

import ast
import re
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

from service import __version__
from service.cli.reference import PAGES
from service.config import Settings
from service.ledger import PARTS
from service.metrics import catalogue
from service.plan.question import PARAMETERS

ROOT = Path(__file__).parents[1]
MAX_LINES = 400
SOURCES = sorted(path for folder in ("service", "loadtest") for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
# what each package of service/ may import from service/; the way of a request, and back never
FREE = {"cli", "__init__"}
BELOW = {"errors", "messages", "config", "disk", "cores", "ledger"}
MAY_IMPORT = {
    "errors": set(),
    "messages": {"errors"},
    "config": {"errors", "messages"},
    "disk": {"errors"},
    "cores": set(),
    "ledger": set(),
    "process_memory": set(),
    "logs": set(),
    "device": BELOW | {"process_memory"},
    "energy": {"errors"},
    "metrics": BELOW | {"energy"},
    "kernels": BELOW | {"device"},
    "precision": BELOW | {"device", "kernels"},
    "model": BELOW | {"device", "kernels", "precision"},
    "quality": BELOW | {"device", "kernels", "model", "precision"},
    "quantize": BELOW | {"device", "kernels", "model", "precision", "quality"},
    "engine": BELOW | {"device", "kernels", "model", "precision", "quality", "quantize", "logs"},
    "kernel_bench": BELOW | {"device", "kernels", "model", "precision", "quantize"},
    "front": BELOW | {"energy", "metrics", "precision"},
    "harness": BELOW | {"api", "front", "metrics"},
    "plan": BELOW | {"model", "precision"},
    "api": BELOW | {"front", "metrics", "plan"},
    "compare": BELOW | {"energy", "front", "metrics", "precision", "quality"},
    "__main__": {"cli", "errors"},
}
MODULES = {path.stem for path in (ROOT / "service").iterdir()}
NO_TORCH = [
    *("service.api.app", "service.front.host", "service.messages", "service.config", "service.cli.app"),
    "service.cli.plan",
]
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "torch.load"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve"}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> set[str]:
    """Full names of modules that a file imports, wherever in it; those under TYPE_CHECKING do not count."""
    module = tree(path)
    typing_only = {
        line
        for block in ast.walk(module)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for line in range(block.lineno, (block.end_lineno or 0) + 1)
    }
    names: set[str] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import) and node.lineno not in typing_only:
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.lineno not in typing_only:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=relative)
def test_files_are_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", [path for path in SOURCES if path.stat().st_size], ids=relative)
def test_modules_say_what_they_are_for(path: Path) -> None:
    assert ast.get_docstring(tree(path))


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_run_one_way(path: Path) -> None:
    top, place = path.relative_to(ROOT).parts[:2]
    place = place.removesuffix(".py")
    ours = {name.split(".")[1] for name in imported(path) if name.startswith("service.")}
    if top == "loadtest":
        assert not ours
    elif place not in FREE:
        assert ours & MODULES <= MAY_IMPORT[place] | {place}


@pytest.mark.parametrize("module", NO_TORCH)
def test_the_front_imports_no_torch(module: str) -> None:
    program = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_nothing_runs_what_it_reads(path: Path) -> None:
    """No pickle, no eval, no code out of a checkpoint."""
    assert not {name.split(".")[0] for name in imported(path)} & FORBIDDEN_MODULES
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in FORBIDDEN_CALLS
            assert not any(keyword.arg == "trust_remote_code" for keyword in node.keywords)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_nothing_is_left_for_later(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text)
    assert "NotImplementedError" not in text


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=relative)
def test_nothing_stands_behind_what_leaves(path: Path) -> None:
    """The second half of a sentence once did, a line below its `return`."""
    blocks = [
        block
        for node in ast.walk(tree(path))
        for _, block in ast.iter_fields(node)
        if isinstance(block, list) and block and isinstance(block[0], ast.stmt)
    ]
    leaving = (ast.Return, ast.Raise, ast.Break, ast.Continue)
    assert not [after.lineno for block in blocks for at, after in pairwise(block) if isinstance(at, leaving)]


def test_no_drawer_for_everything() -> None:
    names = {part for path in SOURCES for part in (*path.relative_to(ROOT).parts[:-1], path.stem)}
    assert not names & {"utils", "util", "helpers", "helper", "common", "misc", "manager"}


@pytest.mark.parametrize("page", sorted(PAGES))
def test_tables_in_docs_are_those_of_the_code(page: str) -> None:
    """Write them anew with `halftone reference settings > docs/settings.md`."""
    assert (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") == PAGES[page]()


def test_parts_of_the_ledger_are_explained_where_users_look() -> None:
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    rows = [f"| `{part.name}` | {part.help} |" for part in PARTS]
    assert "\n".join(rows) in page


def test_parameters_of_a_plan_are_explained_where_users_look() -> None:
    page = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    rows = [f"| `{parameter.name}` | {parameter.help} |" for parameter in PARAMETERS]
    assert "\n".join(rows) in page


def test_settings_say_their_unit() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


def test_metrics_have_one_prefix_and_base_units() -> None:
    for family in catalogue():
        assert family.name.startswith("halftone_")
        assert family.help
        assert not re.search(r"_(ms|milliseconds|mb|gb|kb|percent)\b", family.name)


def test_changelog_and_package_agree_on_the_version() -> None:
    latest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert latest is not None
    assert latest[1] == __version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == __version__


def test_every_requirement_is_pinned() -> None:
    """What `make install` installs is decided here, not by the day on which it runs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    pinned = {
        re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower()
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    names = {re.sub(r"[-_.]+", "-", re.split(r"[<>=!;\[ ]", line)[0]).lower() for line in wanted}
    assert names <= pinned


@pytest.mark.parametrize(("torch", "is_known"), [("cpu", True), ("default", True), ("gpu", False)])
def test_an_unknown_torch_is_refused(torch: str, is_known: bool) -> None:
    """`TORCH=gpu` installed the default without a word."""
    make = subprocess.run(
        ["make", "-n", "clean", f"TORCH={torch}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (make.returncode == 0) == is_known
    assert is_known or "accepted are cpu and default" in make.stderr


def test_a_file_of_tests_runs_alone() -> None:
    """`from tests...` was found only behind a file that put the root on the path; `pytest -m gpu` was not."""
    pytest_program = Path(sys.executable).with_name("pytest")
    command = [pytest_program, "--collect-only", "-q", "tests/quality/test_texts.py"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_the_readme_runs_within_twenty_lines() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert any(line.startswith("make serve") for line in lines[:20])
