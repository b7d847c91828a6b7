"""When the host looks at what the device computed, and where its time goes meanwhile.

In: the figures of each step, still on the device. Out: the same figures read, some steps at a time,
so that the device never stands still between steps; and the seconds that the loop spent waiting for
the loader, launching work, and waiting for the device, which say what bounds the run.
"""

import time
from dataclasses import asdict, dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trainer.distributed import Ranks
from trainer.schedule import Position
from trainer.step import FIGURES, StepFigures, read_figures

# Steps between two readings on a GPU, and the seconds they may take: a signal to several ranks and
# a loss that is no number are seen only then, and a cluster gives 30 s from signal to kill.
READ_EVERY = 32
READ_EVERY_S = 2.0
# Steps that may be launched before the first of them is done: one that runs and two that wait.
IN_FLIGHT = 3

Part = Literal["loader", "host", "device"]
PARTS: tuple[Part, ...] = ("loader", "host", "device")


class Reading(NamedTuple):
    """One step that was read."""

    position: Position
    figures: StepFigures


class Readings:
    """The steps whose figures still lie on the device.

    On a CPU each step is read at once: it is done when it returns.
    """

    def __init__(self, device: torch.device, ranks: Ranks, *, until: int = 1) -> None:
        """Read first after `until` steps: the first one on a GPU may take minutes to compile."""
        self._device, self._ranks = device, ranks
        self._waiting: list[tuple[Position, Tensor]] = []
        self._in_flight: list[torch.cuda.Event] = []
        self._until = until  # steps until the next reading
        self._began = time.monotonic()

    def add(self, position: Position, figures: Tensor) -> None:
        """Remember what a step returned."""
        self._waiting.append((position, figures))
        if self._device.type == "cuda":
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record()
            self._in_flight.append(event)

    def keep_pace(self) -> None:
        """Wait until few steps are in flight.

        A host that ran further ahead would gain nothing, and would wait for a full queue while it
        launches, which could not be told from launching.
        """
        while len(self._in_flight) >= IN_FLIGHT:
            self._in_flight.pop(0).synchronize()

    @property
    def launches(self) -> Part:
        """What the time goes to in which a step is called: a CPU computes it in the call."""
        return "device" if self._device.type == "cpu" else "host"

    @property
    def due(self) -> bool:
        """Whether it is time to read; the same on all ranks."""
        return len(self._waiting) >= self._until

    def read(self) -> list[Reading]:
        """Fetch all that wait, in their order, in one go; all ranks read after the same step."""
        if not self._waiting:
            return []
        positions, figures = zip(*self._waiting, strict=True)
        found = read_figures(torch.stack(figures))
        if self._device.type == "cuda":
            now = time.monotonic()
            step_s = (now - self._began) / len(found)
            wished = int(min(max(READ_EVERY_S / step_s, 1), READ_EVERY))
            # The slowest rank's word counts, and is known to all.
            self._until, self._began = min(self._ranks.gathered(wished)), now
        self._waiting, self._in_flight = [], []
        return [Reading(*each) for each in zip(positions, found, strict=True)]


class Clock:
    """Seconds of a loop, told apart by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._last = time.monotonic()

    def lap(self, part: Part) -> None:
        """The time since the last lap went to `part`."""
        now = time.monotonic()
        self.seconds[part] += now - self._last
        self._last = now

    def take(self) -> dict[str, float]:
        """The seconds since they were taken last."""
        taken, self.seconds = self.seconds, dict.fromkeys(PARTS, 0.0)
        return taken


@dataclass
class EpochSums:
    """What adds up during an epoch; a checkpoint in the middle of one carries it."""

    steps: int = 0
    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(FIGURES, 0.0))

    def add(self, figures: dict[str, float]) -> None:
        """Count a step."""
        self.steps += 1
        for name, value in figures.items():
            self.sums[name] += value

    def spend(self, seconds: dict[str, float]) -> None:
        """Count what steps took, by `PARTS`."""
        for part, value in seconds.items():
            self.parts[part] += value
            self.seconds += value

    def shares(self) -> dict[str, float]:
        """Of the time so far, what went to each of `PARTS`."""
        return {part: value / self.seconds for part, value in self.parts.items()}

    def means(self) -> dict[str, float]:
        """The mean of each figure over the steps so far."""
        return {name: value / self.steps for name, value in self.sums.items()}

    def as_dict(self) -> dict[str, object]:
        """As JSON values; `EpochSums(**values)` reads them back."""
        return asdict(self)


def bound_by(shares: dict[str, float]) -> str:
    """What takes most of the time, in words: `bound by the device (93 %; loader 5 %, host 2 %)`."""
    first, *others = sorted(PARTS, key=lambda part: -shares[part])
    rest = ", ".join(f"{part} {shares[part]:.0%}" for part in others)
    return f"bound by the {first} ({shares[first]:.0%}; {rest})"
