"""Flag over variable over file, each setting once, and a bad value named with its source."""

import sys
from pathlib import Path
from subprocess import run as run_program

import pytest

from service.__main__ import run
from service.cli.flags import bounds, help_text, kind
from service.config import Settings, load_settings
from service.errors import SettingError


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "halftone.toml"
    path.write_text("port = 7001\nmax_n = 3\nprefix_cache = false\n")
    monkeypatch.setenv("HALFTONE_CONFIG", str(path))
    return path


def test_precedence(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().port == 7001
    monkeypatch.setenv("HALFTONE_PORT", "7002")
    assert load_settings().port == 7002
    settings = load_settings(port="7003", max_queue_requests=None)
    assert (settings.port, settings.max_n, settings.prefix_cache) == (7003, 3, False)
    assert settings.max_queue_requests == 512


def test_toml_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HALFTONE_CONFIG")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "halftone.toml").write_text('precision = "nf4:double_quant=off"\n')
    assert load_settings().precision == "nf4:double_quant=off"


def test_a_bad_value_names_its_source(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingError, match=r"setting `port` = `99999` \(from --port\): .*65535"):
        load_settings(port="99999")
    monkeypatch.setenv("HALFTONE_KV_MEMORY_FRACTION", "2")
    with pytest.raises(
        SettingError, match=r"`kv_memory_fraction` = `2` \(from HALFTONE_KV_MEMORY_FRACTION\)"
    ):
        load_settings()
    monkeypatch.delenv("HALFTONE_KV_MEMORY_FRACTION")
    file.write_text('device = "tpu"\n')
    with pytest.raises(SettingError, match=r"`device` = `tpu` \(from .*halftone.toml\)") as error:
        load_settings()
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prot = 1\n", r"setting `prot` \(from .*halftone.toml\) does not exist"),
        ("port = \n", r"halftone.toml` is not TOML"),
    ],
)
def test_a_bad_file_is_named(file: Path, content: str, message: str) -> None:
    file.write_text(content)
    with pytest.raises(SettingError, match=message):
        load_settings()


def test_names_that_do_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFTONE_PROT", "1")
    with pytest.raises(SettingError, match="HALFTONE_PROT") as error:
        load_settings()
    assert "HALFTONE_PORT" in error.value.hint
    monkeypatch.delenv("HALFTONE_PROT")
    monkeypatch.setenv("HALFTONE_CONFIG", "/nowhere/halftone.toml")
    with pytest.raises(SettingError, match="does not exist"):
        load_settings()


def test_keys_are_read_as_they_are_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys behind a space never opened, and `,` started a server that was open to everyone."""
    assert load_settings().api_keys == []
    assert load_settings(api_key="first, second ,").api_keys == ["first", "second"]
    monkeypatch.setenv("HALFTONE_API_KEY", ", ")
    with pytest.raises(SettingError, match=r"`api_key` = `, ` \(from HALFTONE_API_KEY\): it holds no key"):
        load_settings()


def test_a_key_that_every_client_has_does_not_open_admin() -> None:
    assert load_settings(api_key="clients", admin_key="root, other").admin_keys == ["root", "other"]
    with pytest.raises(
        SettingError, match=r"`admin_key` = `\.\.\.` \(from --admin-key\): it is an `api_key`"
    ) as told:
        load_settings(api_key="clients, secret", admin_key="secret")
    assert "secret" not in str(told.value)


def test_home_in_a_file(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No shell replaces `~` in TOML: it made a folder of that name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    file.write_text('cache_dir = "~/cache"\n')
    assert load_settings().cache_dir == tmp_path / "cache"


def test_no_model_is_not_the_working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFTONE_MODEL", "")
    with pytest.raises(SettingError, match="`model` = ``"):
        load_settings()


def test_every_setting_is_a_flag_with_its_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--help"]) == 0
    page = " ".join(capsys.readouterr().out.split())
    for name, field in Settings.model_fields.items():
        assert kind(field)
        if name != "model":
            assert "--" + name.replace("_", "-") in page
            assert " ".join(help_text(field).split()) in page


def test_ranges_as_text() -> None:
    fields = Settings.model_fields
    assert bounds(fields["port"]) == "0 to 65535"
    assert bounds(fields["kv_memory_fraction"]) == "above 0 to 0.98"
    assert bounds(fields["max_queue_requests"]) == "at least 1"
    assert bounds(fields["host"]) == ""


def test_the_engine_gets_the_settings_that_are_its_own(tmp_path: Path) -> None:
    settings = load_settings(precision="int8", kv_tokens="4096", cache_dir=str(tmp_path))
    config = settings.engine_config(tmp_path / "model")
    assert (config.precision, config.kv_tokens, config.cache_dir) == ("int8", 4096, str(tmp_path))
    assert config.model_path == str(tmp_path / "model")


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["serve", "--help"]])
def test_asking_needs_no_torch(arguments: list[str]) -> None:
    program = (
        f"import sys; from service.__main__ import run; code = run({arguments!r}); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    assert run_program([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0
