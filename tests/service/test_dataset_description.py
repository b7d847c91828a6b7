"""service.dataset_description: a child's answer, and every way in which there is none."""

import sys
import time
from typing import Any

import pytest

from service.dataset_description import Description, Undescribed, describe

ANSWER = (
    '{"description": {"task": "single_label", "classes": 2, "class_names": ["a", "b"], '
    '"counts": {"train": 3, "test": 1}, "divided_by_seed": true, "max_skipped": 0.01, '
    '"fingerprint": "f"}}'
)


def said_by(program: str, *, timeout_s: float | None = 30.0, **options: Any) -> Any:
    """What describe makes of a child that runs this."""
    return describe(
        {"name": "set"},
        timeout_s=timeout_s,
        memory_bytes=2**32,
        command=[sys.executable, "-S", "-c", program],
        **options,
    )


def test_describe__reads_the_childs_answer() -> None:
    found = said_by(f"print('''{ANSWER}''')")
    assert isinstance(found, Description)
    assert (found.counts, found.class_names) == ({"train": 3, "test": 1}, ("a", "b"))
    assert Description.of(found.as_dict()) == found


def test_describe__sends_the_spec_and_the_bounds() -> None:
    program = (
        "import sys, json; spec = json.load(open(sys.argv[2])); "
        "print(json.dumps({'error': {'message': spec['name'] + ' ' + ' '.join(sys.argv[3:])}}))"
    )
    assert said_by(program).reason == f"set --memory-bytes {2**32}"
    assert said_by(program, images=True).reason.partition("--images")[2].startswith(" --workers ")


@pytest.mark.parametrize(
    ("program", "reason", "details"),
    [
        ("import sys; sys.exit('last words')", "ended with code 1", "last words"),
        ("print('{')", "ended with code 0", ""),
        ("print('{}')", "ended with code 0", ""),
        ("print('{\"description\": {}}')", "ended with code 0", ""),
        (
            "raise MemoryError",
            "more than the 4,294,967,296 bytes of dataset_memory_bytes",
            "Memory",
        ),
        ("import os; os.kill(os.getpid(), 9)", "dataset_memory_bytes", ""),
    ],
)
def test_describe__of_a_child_without_an_answer(program: str, reason: str, details: str) -> None:
    found = said_by(program)
    assert isinstance(found, Undescribed)
    assert reason in found.reason
    assert details in found.details


def test_describe__ends_a_child_that_takes_too_long_or_is_given_up() -> None:
    began = time.monotonic()
    assert said_by("import time; time.sleep(60)", timeout_s=0.2).reason == (
        "opening it took longer than the 0.2 s of dataset_timeout_s"
    )
    given_up = said_by("import time; time.sleep(60)", stopping=lambda: True)
    assert given_up.reason == "the service is stopping"
    assert time.monotonic() - began < 30
