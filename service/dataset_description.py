"""What a labelled data set holds, found out by the trainer's own readers in a child process.

In: the `dataset` of a job, bounds of time and memory. Out: a `Description`, or why there is none.
The service may not import the readers, and a data set that takes all memory must not take it here.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import orjson

COMMAND = (sys.executable, "-m", "trainer.evaluation.describe")
_LOOK_S = 0.1  # how often a running child is looked at
_STDERR_BYTES = 4000


@dataclass(frozen=True)
class Description:
    """What is known of a data set.

    Attributes:
        class_names: the first 1,000 of `classes`.
        counts: images of each split.
        divided_by_seed: it has no test split of its own; counts are those of every seed.
        max_skipped: share of broken images that an evaluation leaves out instead of ending.
        broken: split -> `count` and the `first` with reasons; None where images were not decoded.
    """

    task: Literal["single_label", "multi_label"]
    classes: int
    class_names: tuple[str, ...]
    counts: Mapping[str, int]
    divided_by_seed: bool
    max_skipped: float
    fingerprint: str
    broken: Mapping[str, Mapping[str, Any]] | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Description":
        """From `as_dict`, also once it was JSON.

        Raises:
            TypeError, KeyError: it is something else.
        """
        return cls(**{**values, "class_names": tuple(values["class_names"])})

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


class Undescribed(NamedTuple):
    """Why a data set cannot be described.

    `reason` is for the operator and may name paths; `details` are what a child that died said.
    """

    reason: str
    details: str = ""


def describe(
    spec: Mapping[str, Any],
    *,
    timeout_s: float | None,
    memory_bytes: int,
    images: bool = False,
    stopping: Callable[[], bool] = lambda: False,
    command: Sequence[str] = COMMAND,
) -> Description | Undescribed:
    """Have a child open the data set; it does not outlive this call.

    Args:
        timeout_s: wall time; None waits.
        memory_bytes: address space of each process.
        images: decode every image as well, with one process for each core.
        stopping: asked now and then; True gives up.
    """
    arguments = [*command, "--dataset", "/dev/stdin", "--memory-bytes", str(memory_bytes)]
    if images:
        arguments += ["--images", "--workers", str(len(os.sched_getaffinity(0)))]
    with subprocess.Popen(
        arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # its decoding processes end with it
    ) as child:
        try:
            talked = _converse(child, orjson.dumps(dict(spec)), timeout_s, stopping)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
    if isinstance(talked, Undescribed):
        return talked
    answer, complaints = talked
    try:
        values = orjson.loads(answer)
        if "error" in values:
            return Undescribed(str(values["error"]["message"]))
        return Description.of(values["description"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        details = complaints[-_STDERR_BYTES:].decode(errors="replace").strip()
    if "MemoryError" in details or child.returncode == -signal.SIGKILL:
        return Undescribed(
            f"opening it takes more than the {memory_bytes:,} bytes of dataset_memory_bytes",
            details,
        )
    return Undescribed(
        f"what opens it ended with code {child.returncode}; the service's log has its last words",
        details,
    )


def _converse(
    child: "subprocess.Popen[bytes]",
    sent: bytes,
    timeout_s: float | None,
    stopping: Callable[[], bool],
) -> tuple[bytes, bytes] | Undescribed:
    waited = 0.0
    given: bytes | None = sent
    while True:
        try:
            return child.communicate(given, timeout=_LOOK_S)
        except subprocess.TimeoutExpired:
            given = None  # what is under way goes on
        waited += _LOOK_S
        if stopping():
            return Undescribed("the service is stopping")
        if timeout_s is not None and waited >= timeout_s:
            return Undescribed(
                f"opening it took longer than the {timeout_s:g} s of dataset_timeout_s"
            )
