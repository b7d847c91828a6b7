"""A program for test_equality.py: runs of a few steps of training, each by any number of ranks.

    python -m tests.distributed.some_steps IMAGES.npz FOLDER JOBS.json

JOBS: a list of `Job` as objects. The ranks of a job are forked from this process, which has
imported everything once. Writes FOLDER/NAME-RANK.pt: the losses of each step, bank and graph,
weights, gradients (as momenta).
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from tests.trainer.tiny_run import without_timings
from trainer import distributed
from trainer import pretrain as training
from trainer import step as module
from trainer.checkpoint import newest_checkpoint
from trainer.config import load_recipe
from trainer.datasets import open_source
from trainer.decode_pool import DecodePool
from trainer.decoding import survey
from trainer.distributed import open_ranks
from trainer.fingerprints import digest_of_part
from trainer.interruption import Interrupted
from trainer.launch import Launch
from trainer.objective import Objective
from trainer.pretrain import Pretraining, pretrain
from trainer.run_folder import Journal
from trainer.schedule import Position
from trainer.session import begin_from, build
from trainer.sharded_bank import whole_state
from trainer.stock import CropStock


class Job(NamedTuple):
    """One run."""

    name: str
    size: int  # ranks
    overrides: list[str]
    stops_after: int = 0  # steps after which the last rank is asked to stop; 0: never
    goes_on_from: str = ""  # the name of the job whose checkpoint it resumes


def main(images: str, folder: str, jobs: str) -> None:
    """Do one job after the other; stop at the first that fails."""
    for job in json.loads(Path(jobs).read_text()):
        _fork(images, Path(folder), Job(**job))


def _fork(images: str, folder: Path, job: Job) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    fork = multiprocessing.get_context("fork")
    launches = [Launch(rank, job.size, rank, job.size, restarts=0) for rank in range(job.size)]
    ranks = [fork.Process(target=_train, args=(images, folder, job, each)) for each in launches]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join()
    if any(each.exitcode for each in ranks):
        sys.exit(f"{job} failed: {[each.exitcode for each in ranks]}")


def _train(images: str, folder: Path, job: Job, launch: Launch) -> None:
    """Train on pairs of equal bank rows, so that every similarity comes twice."""
    distributed.PIECE_BYTES = 100  # 3 rows: a divided bank is saved and restored in pieces
    recipe = load_recipe("digits", job.overrides)
    source, pool = open_source(images), DecodePool(0)
    found = survey(source, pool, recipe.data, size_px=8)
    device = torch.device("cpu")
    ranks = open_ranks(launch).open_training(device, 60)
    rows = build(recipe, len(source), device).bank.embeddings
    half = len(source) // 2
    rows[half : 2 * half] = rows[:half]
    state = build(recipe, len(source), device, ranks)
    state.bank.embeddings.copy_(rows[state.bank.held.start : state.bank.held.stop])

    losses: list[list[float]] = []
    nearest: list[torch.Tensor] = []
    digests: list[torch.Tensor] = []
    real, divided, write = module.objective, module.sharded_objective, module.TrainingStep._write

    def listening(*arguments: object) -> Objective:
        found = real(*arguments)  # type: ignore[arg-type]
        nearest.append(found.nearest)
        return found

    def listening_together(*arguments: object) -> object:
        found = divided(*arguments)  # type: ignore[arg-type]
        nearest.append(found.found.nearest[ranks.share(recipe.batch_size)])
        return found

    def writing(self: module.TrainingStep, *arguments: torch.Tensor) -> None:
        write(self, *arguments)
        bank = state.bank
        digests.append(digest_of_part(bank.embeddings, first_row=bank.held.start))

    module.objective = listening
    module.sharded_objective = listening_together  # type: ignore[assignment]
    module.TrainingStep._write = writing  # type: ignore[method-assign]
    checkpoint = newest_checkpoint(folder / f"{job.goes_on_from}-checkpoints", warn=print)
    run = Pretraining(
        recipe=recipe,
        device=device,
        stock=CropStock(source, found.stored, pool, size_px=8, sizes=found.sizes),
        state=state,
        monitor=None,
        journal=Journal(None, checkpoint.progress.metrics if checkpoint else ()),
        checkpoints=folder / f"{job.name}-checkpoints",
        data_fingerprint="f00d",
        ranks=ranks,
    )
    check = training._check_finite

    def recording(figures: module.StepFigures, position: Position) -> None:
        losses.append([figures.means["instance"], figures.means["invariance"]])
        check(figures, position)
        if len(losses) == job.stops_after and ranks.rank == ranks.size - 1:
            signal.raise_signal(signal.SIGINT)

    training._check_finite = recording
    begin_from(checkpoint, state, ranks)
    try:
        pretrain(run, checkpoint.progress if checkpoint else None)
    except Interrupted:
        assert job.stops_after
    else:
        assert not job.stops_after
    torch.save(
        {
            "lines": [without_timings(line) for line in run.journal.lines],
            "losses": torch.tensor(losses),
            "nearest": torch.stack(nearest),
            "digests": torch.stack(digests),
            "held": state.bank.held,
            "neighbours": state.bank.neighbours,
            "bank": whole_state(state.bank, ranks),
            "encoder": state.encoder.state_dict(),
            "momenta": {
                name: state.optimiser.state[parameter]["momentum_buffer"]
                for name, parameter in state.encoder.named_parameters()
            },
            "layers": [type(each).__name__ for each in state.encoder.modules()],
        },
        folder / f"{job.name}-{ranks.rank}.pt",
    )
    ranks.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
