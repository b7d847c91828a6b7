"""The folder of one run (--output): what stands where, and the lines written as training goes on.

In: metrics, the report. Out: recipe.yaml, metrics.jsonl, histograms.jsonl, pictures.json,
tensorboard/, checkpoints/, report.json, report.html and bundle/ below one root.
"""

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml
from torch.utils.tensorboard import SummaryWriter

from trainer.config import Recipe, RecipeError, load_recipe

# One line of metrics.jsonl; under `HISTOGRAMS` what goes to histograms.jsonl instead.
Metrics = dict[str, Any]
HISTOGRAMS = "histograms"

# Where TensorBoard shows a figure; all others, and what this list does not know, under "training".
BOARD_GROUPS = {
    "losses": ("loss", "instance", "invariance"),
    "accuracy": ("knn",),
    "positives": ("reached", "hard_share", "positives_in_top", "no_background"),
    "purity": ("purity_",),
    "similarity": ("spread", "similarity_"),
    "speed": ("images_per_s",),
}


class OutputError(Exception):
    """A folder that cannot hold this run; the message says why and what to do."""


@dataclass(frozen=True)
class RunFolder:
    """Paths below the root, and the whole files among them."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe; the folder holds a run if and only if this stands."""
        return self.root / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON line for each epoch; epoch 0 is the untrained encoder."""
        return self.root / "metrics.jsonl"

    @property
    def histograms(self) -> Path:
        """One JSON line for each inspected epoch, see `Inspection.histograms`."""
        return self.root / "histograms.jsonl"

    @property
    def pictures(self) -> Path:
        """Some anchors with their positives at the last inspected epoch, see trainer.pictures."""
        return self.root / "pictures.json"

    @property
    def tensorboard(self) -> Path:
        """The same figures for TensorBoard."""
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """See trainer.checkpoint."""
        return self.root / "checkpoints"

    @property
    def report(self) -> Path:
        """What was done, skipped and reached."""
        return self.root / "report.json"

    @property
    def page(self) -> Path:
        """The same for the eye, with curves and pictures: see trainer.training_report."""
        return self.root / "report.html"

    @property
    def bundle(self) -> Path:
        """See trainer.representation.bundle."""
        return self.root / "bundle"

    def holds_run(self) -> bool:
        """Whether a run was begun here."""
        return self.recipe.is_file()

    def check_new(self) -> None:
        """Make sure that a new run can be written here, creating the folder.

        Raises:
            OutputError: it holds a run or other files, or cannot be written.
        """
        if self.holds_run():
            raise OutputError(
                f"{self.root} already holds a run: give --resume to go on with it, or another "
                "--output for a new one"
            )
        self.check_writable()
        if any(self.root.iterdir()):
            raise OutputError(f"{self.root} is not empty: give a new or an empty folder")

    def check_writable(self) -> None:
        """Write and remove a file.

        Raises:
            OutputError: that failed.
        """
        probe = self.root / f".write-test-{uuid.uuid4().hex}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise OutputError(
                f"{self.root} cannot be written ({error.strerror}): give another --output"
            ) from error

    def write_recipe(self, recipe: Recipe) -> None:
        """Write the resolved recipe."""
        write_whole(self.recipe, yaml.safe_dump(recipe.as_dict(), sort_keys=False))

    def read_recipe(self) -> Recipe:
        """Read the recipe of the run that stands here.

        Raises:
            OutputError: there is none, or it was edited into something else.
        """
        if not self.holds_run():
            raise OutputError(
                f"{self.root} holds no run to resume: leave out --resume to begin one"
            )
        try:
            return load_recipe(self.recipe)
        except RecipeError as error:
            raise OutputError(f"{self.recipe} is damaged: {error}") from error

    def write_report(self, report: Mapping[str, Any]) -> None:
        """Write report.json."""
        write_whole(self.report, json.dumps(report, indent=1, ensure_ascii=False) + "\n")

    def read_report(self) -> Mapping[str, Any] | None:
        """Read report.json; None where there is none that can be read."""
        try:
            report = json.loads(self.report.read_bytes())
        except (OSError, ValueError):
            return None
        return report if isinstance(report, dict) else None


class Journal:
    """The metrics of a run: in memory, as JSON lines, and for TensorBoard."""

    def __init__(self, folder: RunFolder | None, before: Sequence[Metrics] = ()) -> None:
        """Begin with the metrics `before` a resumed checkpoint; later lines are dropped.

        Args:
            folder: None on all ranks but the first, which keep the lines in memory only.
        """
        self.lines: list[Metrics] = list(before)
        self._folder = folder
        if folder is None:
            return
        write_whole(folder.metrics, "".join(map(_line, self.lines)))
        write_whole(folder.histograms, "".join(map(_histograms_line, self.lines)))
        next_epoch = self.lines[-1]["epoch"] + 1 if self.lines else 0
        pictures = read_pictures(folder)
        if pictures is not None and pictures["epoch"] >= next_epoch:
            folder.pictures.unlink()
        self._board = SummaryWriter(str(folder.tensorboard), purge_step=next_epoch)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._folder is not None:
            self._board.close()

    def write(self, metrics: Metrics, pictures: Mapping[str, Any] | None = None) -> None:
        """Add the line of an epoch, and replace pictures.json where there are new pictures."""
        self.lines.append(metrics)
        if self._folder is None:
            return
        _append(self._folder.metrics, _line(metrics))
        _append(self._folder.histograms, _histograms_line(metrics))
        if pictures is not None:
            write_whole(self._folder.pictures, json.dumps(pictures, ensure_ascii=False) + "\n")
        epoch = metrics["epoch"]
        for name, value in metrics.items():
            if name == HISTOGRAMS:
                for of, counts in value.items():
                    _add_histogram(self._board, f"similarity_of/{of}", counts, epoch)
            elif name != "epoch":
                self._board.add_scalar(f"{_group(name)}/{name}", float(value), epoch)
        self._board.flush()


def read_pictures(folder: RunFolder) -> dict[str, Any] | None:
    """What stands in pictures.json; None where there is none that can be read."""
    try:
        pictures = json.loads(folder.pictures.read_bytes())
    except (OSError, ValueError):
        return None
    return pictures if isinstance(pictures, dict) and "epoch" in pictures else None


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is either as it was or as it should be."""
    fresh = path.with_name(f".{path.name}.new")
    try:
        with fresh.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def _line(metrics: Metrics) -> str:
    return json.dumps({name: v for name, v in metrics.items() if name != HISTOGRAMS}) + "\n"


def _histograms_line(metrics: Metrics) -> str:
    if HISTOGRAMS not in metrics:
        return ""
    return json.dumps({"epoch": metrics["epoch"], **metrics[HISTOGRAMS]}) + "\n"


def _group(name: str) -> str:
    for group, members in BOARD_GROUPS.items():
        if any(name == each or (each.endswith("_") and name.startswith(each)) for each in members):
            return group
    return "training"


def _add_histogram(board: SummaryWriter, name: str, counts: Sequence[int], epoch: int) -> None:
    """Counts of similarities in equal bins of [-1, 1]; sums as if each lay in its bin's middle."""
    total, width = sum(counts), 2 / len(counts)
    if not total:
        return
    middles = [-1 + width * (i + 0.5) for i in range(len(counts))]
    board.add_histogram_raw(
        name,
        min=min(middle for middle, count in zip(middles, counts, strict=True) if count),
        max=max(middle for middle, count in zip(middles, counts, strict=True) if count),
        num=total,
        sum=sum(middle * count for middle, count in zip(middles, counts, strict=True)),
        sum_squares=sum(middle**2 * count for middle, count in zip(middles, counts, strict=True)),
        bucket_limits=[-1 + width * (i + 1) for i in range(len(counts))],
        bucket_counts=list(counts),
        global_step=epoch,
    )
