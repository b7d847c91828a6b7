"""Write deploy/constraints.txt anew: what is installed here of all that the images ask for.

Run: .venv/bin/python deploy/freeze.py > deploy/constraints.txt     after ./tests/run passed
"""

import importlib.metadata
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from requirements import requirements

_HEAD = (
    "# What the images install. Written by deploy/freeze.py after the tests passed with these.\n"
)
_CUDA = "onnxruntime-gpu[cuda,cudnn]"  # see the Dockerfiles


def main() -> None:
    """Print a pin for every package that is reached, sorted."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    waiting = [Requirement(line) for line in [*requirements(project, ["worker", "milvus"]), _CUDA]]
    seen: set[tuple[str, frozenset[str]]] = set()
    pins: dict[str, str] = {}
    while waiting:
        asked = waiting.pop()
        name = canonicalize_name(asked.name)
        if (name, frozenset(asked.extras)) in seen:
            continue
        seen.add((name, frozenset(asked.extras)))
        found = importlib.metadata.distribution(name)
        pins[name] = found.version
        for line in found.requires or ():
            each = Requirement(line)
            if each.marker is None or any(
                each.marker.evaluate({"extra": extra}) for extra in (*asked.extras, "")
            ):
                waiting.append(each)
    sys.stdout.write(_HEAD + "".join(f"{name}=={pins[name]}\n" for name in sorted(pins)))


if __name__ == "__main__":
    main()
