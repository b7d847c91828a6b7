"""What is asked for, checked on all ranks before anything that takes time.

In: the command line's words, the run's folder, the ranks. Out: one recipe for all of them, and the
device of each; or an error that says what to change, and nothing done.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision

from trainer.config import Recipe, differing_keys, load_recipe
from trainer.datasets import DIGITS
from trainer.distributed import Ranks
from trainer.fingerprints import code_digest
from trainer.launch import check_divides, rank_device
from trainer.nvjpeg import Decode, nvjpeg
from trainer.progress import say
from trainer.report import versions
from trainer.representation.bundle import BundleError, open_bundle
from trainer.run_folder import OutputError, RunFolder
from trainer.warm_start import WarmStart, WarmStartError, open_warm_start


class UnavailableError(Exception):
    """Something was asked for that this machine or this version does not have."""


class Request(NamedTuple):
    """What is to be done."""

    recipe: Recipe
    resume: bool
    finished: bool  # the run ended before; nothing is left to do
    warm_start: WarmStart | None  # whose weights a run without a checkpoint begins with


def agree_on_request(
    folder: RunFolder,
    name: str | None,
    overrides: Sequence[str],
    *,
    data: str,
    resume: bool,
    warm_start: Path | None,
    ranks: Ranks,
) -> Request:
    """Find the recipe of this run, the same on all ranks; rank 0 alone looks into the folder.

    A run that torchrun began anew goes on with what stands in the folder, asked to or not.

    Raises:
        RecipeError, OutputError: none that can be used; the folder is not free, or holds
            no run to resume or one of another recipe.
        WarmStartError: weights that do not fit, or are not given.
        RankError: the ranks were started differently, or cannot share a batch equally.
    """
    # Of several hosts only the one where a process failed counts a restart.
    restarts = max(ranks.gathered(ranks.launch.restarts))
    default = "digits" if data == DIGITS else "folder"

    def look() -> Request:
        goes_on = resume or (restarts > 0 and folder.holds_run())
        if goes_on:
            recipe = _resolve_begun(folder, name, overrides)
            start = _warm_start_of(folder, recipe, warm_start)
            return Request(recipe, goes_on, is_finished(folder, recipe), start)
        recipe = load_recipe(name or default, overrides)
        recipe, start = _begin_with(recipe, warm_start)
        folder.check_new()
        return Request(recipe, goes_on, False, start)

    request = ranks.from_first(look)
    if ranks.size > 1:
        own, words = request.recipe, {"--warm-start": str(warm_start)}
        if resume and not name:  # only rank 0 can see which recipe the values are for
            words["the values given"] = " ".join(overrides)
        elif not ranks.is_first:
            own = load_recipe(name or default, overrides)
            own = own.model_copy(update={"warm_start": request.recipe.warm_start})
        ranks.check_same(
            own.by_key() | words | versions() | {"the code of trainer": code_digest()},
            "Start all of them with the same words, and the same code and packages on every host",
        )
        joint = request.recipe.distributed.sync_batchnorm
        batch = request.recipe.batch_size
        ranks.from_first(lambda: check_divides(batch, ranks.size, sync_batchnorm=joint))
    return request


def is_finished(folder: RunFolder, recipe: Recipe) -> bool:
    """Whether the run trained its epochs and its bundle is whole; if only that is damaged: False.

    A run that is being extended has fewer epochs behind it than its recipe asks for now.
    """
    report = folder.read_report()
    if report is None or report.get("status") != "finished":
        return False
    if report["training"]["epochs"] < recipe.epochs:
        return False
    try:
        return open_bundle(folder.bundle).model_id == report.get("model_id")
    except BundleError as error:
        say(f"the bundle will be exported again: {error}")
        return False


def resolve_device(asked: str, ranks: Ranks) -> torch.device:
    """`auto` takes a GPU where there is one; `cuda` never falls back.

    Raises:
        UnavailableError: `cuda` and there is none.
        RankError: fewer GPUs than processes on this host.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise UnavailableError(
            f"device=cuda was asked for, but torch {torch.__version__} finds no usable GPU here: "
            "install its driver, or give device=cpu"
        )
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    return rank_device(asked, ranks.launch)


def resolve_decoder(asked: str, device: torch.device) -> Decode | None:
    """nvJPEG on the GPU where it was asked for; None: Pillow. It never falls back.

    Raises:
        UnavailableError: `nvjpeg` and no GPU, or a torchvision without it.
    """
    if asked != "nvjpeg":
        return None
    if device.type != "cuda":
        raise UnavailableError(
            f"data.decoder=nvjpeg decodes on a GPU, but this run is on {device}: give "
            "data.decoder=pillow, or device=cuda where there is one"
        )
    try:
        return nvjpeg(device)
    except RuntimeError as error:
        raise UnavailableError(
            f"data.decoder=nvjpeg was asked for, but torchvision {torchvision.__version__} cannot "
            f"decode on {device} ({str(error).splitlines()[0]}): give data.decoder=pillow"
        ) from error


def _resolve_begun(folder: RunFolder, name: str | None, overrides: Sequence[str]) -> Recipe:
    """The recipe of the run in the folder; what is given beside must be what began the run.

    But for `epochs`, when it is given by itself: more of them extend the run.
    """
    begun = folder.read_recipe()
    folder.check_writable()
    recipe = load_recipe(name or folder.recipe, overrides)
    given = {override.partition("=")[0] for override in overrides}
    if "warm_start" not in given:
        recipe = recipe.model_copy(update={"warm_start": begun.warm_start})
    differing = differing_keys(begun, recipe)
    if "epochs" in differing and "epochs" in given:
        if recipe.epochs < begun.epochs:
            raise OutputError(
                f"epochs={recipe.epochs} is less than the {begun.epochs} that {folder.root} was "
                "begun with or extended to: a run can be extended, not shortened. Leave epochs out "
                "to go on with it, or give another --output"
            )
        differing.remove("epochs")
    if differing:
        raise OutputError(
            f"{folder.root} was begun with another recipe; these keys differ: "
            f"{', '.join(differing)}. Leave them out to go on with it, or give another --output"
        )
    return recipe


def _begin_with(recipe: Recipe, directory: Path | None) -> tuple[Recipe, WarmStart | None]:
    """The recipe of a new run, with the id of the bundle whose weights it begins with."""
    if directory is None:
        if recipe.warm_start is not None:
            raise WarmStartError(
                f"the recipe asks for the weights of the bundle {recipe.warm_start}: give "
                "--warm-start and where it lies, or warm_start=null for random weights"
            )
        return recipe, None
    start = open_warm_start(directory, recipe.encoder)
    if recipe.warm_start not in (None, start.model_id):
        raise WarmStartError(
            f"the recipe asks for the weights of the bundle {recipe.warm_start}, {directory} is "
            f"{start.model_id}: give that one's place, or warm_start=null for whichever is given"
        )
    return recipe.model_copy(update={"warm_start": start.model_id}), start


def _warm_start_of(folder: RunFolder, recipe: Recipe, directory: Path | None) -> WarmStart | None:
    """The bundle that a run in the folder began with; needed once more if nothing was saved yet."""
    if directory is None:
        if recipe.warm_start is None:
            return None
        place = (folder.read_report() or {}).get("warm_start", {}).get("bundle", "")
        return WarmStart(Path(place), recipe.warm_start)
    start = open_warm_start(directory, recipe.encoder)
    if start.model_id != recipe.warm_start:
        began = f"the bundle {recipe.warm_start}" if recipe.warm_start else "random weights"
        raise OutputError(
            f"{folder.root} was begun with {began}, and {directory} is the bundle "
            f"{start.model_id}: leave out --warm-start to go on with the run, or give another "
            "--output to begin one"
        )
    return start
