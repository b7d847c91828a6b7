"""The public door of the package, and what comes in with it."""

import subprocess
import sys

import pytest

import client
from client import errors, models


def test_all__names_every_exception_and_model_and_nothing_else() -> None:
    public = {
        name
        for module in (errors, models)
        for name, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == module.__name__
    }
    assert set(client.__all__) == public | {"Client", "AsyncClient"}
    assert all(hasattr(client, name) for name in client.__all__)


def test_errors__the_tree_in_the_docstring_is_the_tree() -> None:
    tree = errors.__doc__ or ""
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, errors.InvpropError):
            assert f"{name} " in tree or f"{name}\n" in tree
    for code, kind in errors.BY_CODE.items():
        assert any(line.split()[1:3] == [kind.__name__, code] for line in _branches(tree))


def _branches(tree: str) -> list[str]:
    return [line for line in tree.splitlines() if "──" in line]


def test_import__brings_nothing_heavy() -> None:
    heavy = {"numpy", "PIL", "pandas", "pyarrow", "tqdm", "pydantic"}
    code = f"import client.command_line, sys; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_import__brings_the_http_library_with_the_client_only() -> None:
    code = (
        "import client, sys; before = 'httpx2' in sys.modules; from client import Client; "
        "print(before, 'httpx2' in sys.modules, client.Client is Client, 'Client' in dir(client))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False True True True\n"
    with pytest.raises(AttributeError, match="no attribute 'Klient'"):
        client.Klient  # type: ignore[attr-defined]  # noqa: B018
