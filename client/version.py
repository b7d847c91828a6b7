"""Which services this client understands. In: the version that /info tells. Out: yes or no."""

VERSION = "0.1.0"  # of pyproject.toml; tests/client/test_version.py compares them


def compatible(served: str) -> bool:
    """Whether a service of this version speaks this client's API.

    Until 1.0 a minor version may change the API, from then on only a major one. A version that is
    not numbers ("unknown") is taken to be a build of somebody's own, and trusted.
    """
    ours, theirs = _api(VERSION), _api(served)
    return theirs is None or ours == theirs


def _api(version: str) -> tuple[int, ...] | None:
    numbers = version.split(".")
    if len(numbers) < 2 or not (numbers[0].isdecimal() and numbers[1].isdecimal()):
        return None
    major, minor = int(numbers[0]), int(numbers[1])
    return (major,) if major else (major, minor)
