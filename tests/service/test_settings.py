"""service.settings: checked once at the door, and the README's table says the same."""

from pathlib import Path

import pytest

from service.arguments import SettingsError, read_settings
from service.settings import Settings

README = Path(__file__).parents[2] / "service" / "README.md"
NEEDED = ["--bundle", "b", "--state", "s"]


def settings_table() -> str:
    """The table of service/README.md, made from the fields."""
    lines = ["| setting | default | what it is |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "required" if field.is_required() else f"`{field.default}`"
        lines.append(f"| `{name}` | {default} | {field.description} |")
    return "\n".join(lines)


def test_readme__holds_the_table_of_settings() -> None:
    assert settings_table() in README.read_text(), f"put this into it:\n{settings_table()}"


def test_settings__come_from_flags_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVPROP_MAX_IMAGES", "7")
    monkeypatch.setenv("INVPROP_PORT", "1234")
    settings = read_settings([*NEEDED, "--port", "99"])
    assert (settings.max_images, settings.port, settings.bundle) == (7, 99, Path("b"))


def test_settings__may_come_from_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVPROP_BUNDLE", "x")
    monkeypatch.setenv("INVPROP_STATE", "y")
    assert read_settings([]).bundle == Path("x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bundle", "b"], r"--state \(INVPROP_STATE\) is required"),
        ([*NEEDED, "--port", "70000"], r"--port \(INVPROP_PORT\) = '70000'.*less than or equal"),
        ([*NEEDED, "--execution-provider", "tpu"], "'auto', 'cpu' or 'cuda'"),
        ([*NEEDED, "--precision", "int4"], "'fp32', 'fp16', 'int8' or 'auto'"),
        ([*NEEDED, "--max-images", "2000"], "larger than queue_size = 1024"),
        ([*NEEDED, "--gallery", "milvus://h/c"], "keeps no pictures: set thumbnails = false"),
    ],
)
def test_settings__name_what_is_wrong(arguments: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_settings(arguments)


def test_settings__refuse_an_unknown_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_settings([*NEEDED, "--quux", "1"])
    assert "--quux" in capsys.readouterr().err
