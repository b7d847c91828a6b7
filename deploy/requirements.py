"""Print what an extra of pyproject.toml asks for, a requirement a line: the images install these.

Run: python deploy/requirements.py EXTRA ... < pyproject.toml

The packages get a layer of the image before the project's own code is copied, so that a change of
code does not install 8 GB anew; pip itself cannot install the requirements of a project alone.
"""

import re
import sys
import tomllib
from collections.abc import Mapping, Sequence

_OURS = re.compile(r"invprop\[([\w,-]+)\]")


def requirements(project: Mapping[str, object], extras: Sequence[str]) -> list[str]:
    """Requirements of the base install and of the extras, sorted, each once.

    Raises:
        KeyError: there is no such extra.
    """
    optional, base = project["optional-dependencies"], project["dependencies"]
    assert isinstance(optional, dict)
    assert isinstance(base, list)
    found, waiting, seen = set(base), list(extras), set()
    while waiting:
        extra = waiting.pop()
        if extra in seen:
            continue
        seen.add(extra)
        for line in optional[extra]:
            ours = _OURS.fullmatch(line)
            if ours:
                waiting += ours[1].split(",")
            else:
                found.add(line)
    return sorted(found)


if __name__ == "__main__":
    project = tomllib.loads(sys.stdin.read())["project"]
    sys.stdout.write("".join(f"{line}\n" for line in requirements(project, sys.argv[1:])))
