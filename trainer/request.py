"""What is asked for, checked on all ranks before anything that takes time.

In: the command line's words, the run's folder, the ranks. Out: one recipe for all of them, and the
device of each; or an error that says what to change, and nothing done.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from trainer.config import Recipe, differing_keys, load_recipe
from trainer.datasets import DIGITS
from trainer.distributed import Ranks
from trainer.fingerprints import code_digest
from trainer.launch import check_divides, rank_device
from trainer.progress import say
from trainer.report import versions
from trainer.representation.bundle import BundleError, open_bundle
from trainer.run_folder import OutputError, RunFolder


class UnavailableError(Exception):
    """Something was asked for that this machine or this version does not have."""


class Request(NamedTuple):
    """What is to be done."""

    recipe: Recipe
    resume: bool
    finished: bool  # the run ended before; nothing is left to do


def agree_on_request(
    folder: RunFolder,
    name: str | None,
    overrides: Sequence[str],
    *,
    data: str,
    resume: bool,
    ranks: Ranks,
) -> Request:
    """Find the recipe of this run, the same on all ranks; rank 0 alone looks into the folder.

    A run that torchrun began anew goes on with what stands in the folder, asked to or not.

    Raises:
        RecipeError, OutputError: none that can be used; the folder is not free, or holds
            no run to resume or one of another recipe.
        RankError: the ranks were started differently, or cannot share a batch equally.
    """
    # Of several hosts only the one where a process failed counts a restart.
    restarts = max(ranks.gathered(ranks.launch.restarts))
    default = "digits" if data == DIGITS else "folder"

    def look() -> Request:
        goes_on = resume or (restarts > 0 and folder.holds_run())
        if goes_on:
            recipe = _resolve_begun(folder, name, overrides)
        else:
            recipe = load_recipe(name or default, overrides)
            folder.check_new()
        return Request(recipe, goes_on, finished=goes_on and is_finished(folder))

    request = ranks.from_first(look)
    if ranks.size > 1:
        own = request.recipe
        if not ranks.is_first and (name or not resume):
            own = load_recipe(name or default, overrides)
        ranks.check_same(
            own.by_key() | versions() | {"the code of trainer": code_digest()},
            "Start all of them with the same words, and the same code and packages on every host",
        )
        joint = request.recipe.distributed.sync_batchnorm
        batch = request.recipe.batch_size
        ranks.from_first(lambda: check_divides(batch, ranks.size, sync_batchnorm=joint))
    return request


def is_finished(folder: RunFolder) -> bool:
    """Whether the run ended and its bundle is whole; a damaged bundle is exported again."""
    report = folder.read_report()
    if report is None or report.get("status") != "finished":
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


def _resolve_begun(folder: RunFolder, name: str | None, overrides: Sequence[str]) -> Recipe:
    """The recipe of the run in the folder; what is given beside must be what began the run."""
    begun = folder.read_recipe()
    folder.check_writable()
    recipe = load_recipe(name or folder.recipe, overrides)
    differing = differing_keys(begun, recipe)
    if differing:
        raise OutputError(
            f"{folder.root} was begun with another recipe; these keys differ: "
            f"{', '.join(differing)}. Leave them out to go on with it, or give another --output"
        )
    return recipe
