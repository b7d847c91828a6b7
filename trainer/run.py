"""Pretrain an encoder on images and export it.

    python -m trainer.run [RECIPE] --data SOURCE --output DIR [--resume] [--warm-start BUNDLE] \
        [key=value ...]
    torchrun --nproc-per-node=GPUS -m trainer.run ...        the same words, several processes

In: a recipe, a folder of images, an .npz or `digits`. Out: a run folder with a bundle, see
trainer/README.md. Exit code 0; 2 for what the caller can put right; 1 for a run that failed; 130 or
143 after Ctrl-C or SIGTERM. This file is the door, the run itself reads in trainer/session.py.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from trainer.config import RecipeError, recipe_names
from trainer.datasets import SOURCES, DataError
from trainer.host_memory import keep_freed_memory
from trainer.representation.artifact import ArtifactError

SUCCEEDED, FAILED, WRONG_USE = 0, 1, 2
SIGNALLED = 128  # plus the number of the signal, as shells count
INTERRUPTED, TERMINATED = 130, 143
FIRST_ENDS_WITHIN_S = 3.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and turn every error that a person can act on into one paragraph on standard error."""
    arguments = _parse(argv)
    # Read when torch loads its OpenMP: threads that wait for each other sleep instead of spinning,
    # which a machine with other work to do needs (measured there: 2 to 5 times the images/s).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_freed_memory()
    # Imported here: the decoding processes are spawned, import this file anew, and would each pay
    # seconds and hundreds of megabytes for torch.
    from trainer.checkpoint import CheckpointError
    from trainer.distributed import FirstRankFailed, lost_rank, open_ranks
    from trainer.export import ExportError
    from trainer.interruption import Interrupted, Terminated, terminable
    from trainer.launch import RankError, read_launch
    from trainer.pretrain import TrainingFailed
    from trainer.progress import mute
    from trainer.request import UnavailableError
    from trainer.run_folder import OutputError, RunFolder
    from trainer.session import train_and_export
    from trainer.warm_start import WarmStartError

    prefix = ""
    try:
        launch = read_launch(os.environ)
        if launch.rank > 0:
            mute()
            prefix = f"rank {launch.rank}: "
        with terminable(alone=launch.size == 1):
            train_and_export(
                RunFolder(arguments.output),
                recipe=arguments.recipe,
                overrides=arguments.overrides,
                data=arguments.data,
                resume=arguments.resume,
                warm_start=arguments.warm_start,
                ranks=open_ranks(launch),
            )
    except (
        RecipeError,
        DataError,
        OutputError,
        CheckpointError,
        UnavailableError,
        RankError,
        WarmStartError,
    ) as error:
        return _fail(str(error), WRONG_USE, prefix)
    except FirstRankFailed:
        # Who ends first gives torchrun the exit code: that is to be the one who says why.
        time.sleep(FIRST_ENDS_WITHIN_S)
        return FAILED
    except TrainingFailed as error:  # all ranks together
        return FAILED if prefix else _fail(str(error), FAILED)
    except (ExportError, ArtifactError) as error:
        return _fail(str(error), FAILED, prefix)
    except OSError as error:
        return _fail(
            f"{error}. Put this right and go on with --resume: what was saved in "
            f"{arguments.output} stays",
            FAILED,
            prefix,
        )
    except Interrupted as stop:
        if not prefix:
            sys.stderr.write(f"{stop}\n")
        return SIGNALLED + stop.signum
    except KeyboardInterrupt as error:
        code = TERMINATED if isinstance(error, Terminated) else INTERRUPTED
        return _fail("interrupted while not training; nothing saved is lost", code, prefix)
    except RuntimeError as error:
        lost = lost_rank(error)
        if lost is None:
            raise
        return _fail(lost, FAILED, prefix)
    return SUCCEEDED


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.run",
        description="Pretrain an image encoder by Invariance Propagation and export its bundle.",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RECIPE | key=value",
        help=f"a recipe ({', '.join(recipe_names())}, or the path of a YAML file; by default "
        f"`digits` for that source, else `folder`), and values that replace its own, such as "
        "epochs=5 loss.temperature=0.1",
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="SOURCE",
        help=SOURCES,
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="the folder of this run"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run that stands in DIR; with epochs=MORE also with a finished one",
    )
    parser.add_argument(
        "--warm-start",
        type=Path,
        metavar="BUNDLE",
        help="begin a new run with the encoder's weights of this bundle, all else fresh",
    )
    arguments = parser.parse_intermixed_args(argv)
    arguments.overrides = [word for word in arguments.words if "=" in word]
    recipes = [word for word in arguments.words if "=" not in word]
    if len(recipes) > 1:
        parser.error(f"one recipe at most, got {', '.join(recipes)}")
    arguments.recipe = recipes[0] if recipes else None
    return arguments


def _fail(message: str, code: int, prefix: str = "") -> int:
    sys.stderr.write(f"{prefix}error: {message}\n")
    return code


def _exit(code: int) -> NoReturn:
    """End this process; after an error under torchrun at once.

    The threads that talk to the other processes would wait for the lost one, or end in an abort.
    """
    if code != SUCCEEDED and "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _exit(main())
