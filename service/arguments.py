"""How settings are given: by flags and by the environment, and what is said of a wrong one.

In: a command line, or the environment alone. Out: `Settings`, or one line for the operator that
names the flag and the variable of everything that is wrong.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from service.settings import ENV_PREFIX, Settings


class SettingsError(Exception):
    """Settings that cannot be used; the message is for the operator."""


def read_settings(arguments: Sequence[str] | None = None) -> Settings:
    """Settings from the command line and, where a flag is missing, from the environment.

    Raises:
        SettingsError: a value is missing, unknown or out of range; names the flag and the variable.
    """
    parser = argparse.ArgumentParser(
        prog="python -m service.run",
        allow_abbrev=False,
        description=f"Serve a bundle. Every flag has an environment variable {ENV_PREFIX}...",
    )
    for name, field in Settings.model_fields.items():
        default = "" if field.is_required() else f" Default: {field.default}."
        text = f"{field.description}{default}".replace("%", "%%")
        parser.add_argument(_flag(name), default=argparse.SUPPRESS, help=text, metavar="VALUE")
    return _checked(vars(parser.parse_args(arguments)))


def settings_from_environment() -> Settings:
    """Settings from the environment alone.

    Raises:
        SettingsError: as `read_settings`.
    """
    return _checked({})


def _checked(given: Mapping[str, Any]) -> Settings:
    try:
        return Settings.model_validate(given)  # the environment gives the rest
    except ValidationError as error:
        raise SettingsError("; ".join(_explained(entry) for entry in error.errors())) from None


def _explained(entry: object) -> str:
    assert isinstance(entry, dict)
    name = str(entry["loc"][0]) if entry["loc"] else ""
    if not name:
        return str(entry["msg"])
    where = f"{_flag(name)} ({ENV_PREFIX}{name.upper()})"
    if entry["type"] == "missing":
        return f"{where} is required"
    return f"{where} = {entry['input']!r}: {entry['msg']}"


def _flag(setting: str) -> str:
    return "--" + setting.replace("_", "-")
