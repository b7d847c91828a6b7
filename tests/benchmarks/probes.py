"""Probes on frozen features: their time, and kNN against the bare matrix product (C15).

    python tests/benchmarks/probes.py knn        # 10,000 x 50,000, D = 128, K = 200: <= 1.45x
    python tests/benchmarks/probes.py sgd        # 50,000 x 512, 10 classes, 100 epochs: <= 60 s
    python tests/benchmarks/probes.py lbfgs      # the same rows, C of six, 100 iterations: <= 60 s

`knn` interleaves the vote with the product alone, in the same blocks (torch) and by numpy at once,
and prints medians and the ratio to the product. --threads sets both libraries' threads.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


def clustered(count: int, dim: int, classes: int, seed: int) -> "tuple[np.ndarray, np.ndarray]":
    """Rows around a few hundred centres of each class, as features of a trained encoder are."""
    centres = np.random.default_rng(0).normal(size=(classes, 40, dim))
    draw = np.random.default_rng([1, seed])
    labels = draw.integers(0, classes, count)
    rows = centres[labels, draw.integers(0, 40, count)] + 1.5 * draw.normal(size=(count, dim))
    return rows.astype(np.float32), labels


def timed(work: Callable[[], object]) -> float:
    """CPU seconds of this process: other work on the machine does not count, waiting neither."""
    began = time.process_time()
    work()
    return time.process_time() - began


def compare_knn(repeats: int, count: int) -> None:
    """The vote of `count` queries over 50,000 rows beside the product alone."""
    (gallery, labels), (queries, _) = clustered(50_000, 128, 10, 1), clustered(count, 128, 10, 2)
    gallery, queries = unit_rows(gallery), unit_rows(queries)
    bank, asked = torch.from_numpy(gallery), torch.from_numpy(queries)
    room = torch.empty(QUERIES_TOGETHER, len(bank))

    def product() -> None:
        for first in range(0, len(asked), QUERIES_TOGETHER):
            block = asked[first : first + QUERIES_TOGETHER]
            torch.mm(block, bank.T, out=room[: len(block)])

    def vote() -> None:
        knn_votes(queries, gallery, labels, num_classes=10, ks=(200, 20, 1), temperature=0.07)

    product(), vote()
    times: dict[str, list[float]] = {"product": [], "vote": []}
    for _ in range(repeats):
        times["product"].append(timed(product))
        times["vote"].append(timed(vote))
    bare, ours = (statistics.median(times[name]) for name in ("product", "vote"))
    ratios = [a / b for a, b in zip(times["vote"], times["product"], strict=True)]
    print(f"product alone {bare:.3f} s {[round(t, 3) for t in times['product']]}")
    print(f"vote of three k {ours:.3f} s {[round(t, 3) for t in times['vote']]}")
    print(f"ratio of medians {ours / bare:.3f}, median of ratios {statistics.median(ratios):.3f}")


def time_sgd() -> None:
    """A linear layer with batch normalisation, batch 256, 100 epochs."""
    rows, labels = clustered(50_000, 512, 10, 1)
    settings = LinearProbeSettings(epochs=100)
    values, wanted = torch.from_numpy(rows), torch.from_numpy(labels)
    heads = Heads({"x": 512}, 10, batch_norm=True, seed=0, device=torch.device("cpu"))

    def epoch(number: int) -> "Iterator[HeadBatch]":
        order = torch.from_numpy(np.random.default_rng([0, number]).permutation(len(wanted)))
        for i in range(len(order) // settings.batch_size):
            batch = order[i * settings.batch_size : (i + 1) * settings.batch_size]
            yield HeadBatch({"x": values[batch]}, wanted[batch])

    began = time.perf_counter()
    seconds = timed(lambda: train_heads(heads, epoch, settings, lambda done: None))
    wall = time.perf_counter() - began
    print(f"sgd: 100 epochs of 50,000 x 512, 10 classes: {seconds:.1f} CPU s, {wall:.1f} s")


def time_lbfgs() -> None:
    """C of six on four fifths of the rows, then the fit on all of them."""
    rows, labels = clustered(50_000, 512, 10, 1)
    cs = LinearProbeSettings().c
    limit = LinearProbeSettings().max_iter

    def whole() -> None:
        choice = choose_c(
            rows[:40_000],
            labels[:40_000],
            rows[40_000:],
            labels[40_000:],
            cs=cs,
            max_iter=limit,
            seed=0,
        )
        fitted = fit_logistic(rows, labels, c=choice.c, max_iter=limit, seed=0)
        print(f"chosen {choice}, {fitted.iterations} iterations")

    began = time.perf_counter()
    seconds = timed(whole)
    wall = time.perf_counter() - began
    print(f"lbfgs: {len(cs) + 1} fits of 50,000 x 512: {seconds:.1f} CPU s, {wall:.1f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("knn", "sgd", "lbfgs"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(options.threads)  # read when the libraries are loaded
    from collections.abc import Iterator

    import numpy as np
    import torch

    from trainer.evaluation.logistic import choose_c, fit_logistic
    from trainer.evaluation.protocol_settings import LinearProbeSettings
    from trainer.evaluation.sgd_heads import HeadBatch, Heads, train_heads
    from trainer.evaluation.votes import QUERIES_TOGETHER, knn_votes, unit_rows
    from trainer.host_memory import keep_freed_memory

    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as trainer.evaluate does
    print(f"threads {options.threads}, load {os.getloadavg()[0]:.1f}")
    if options.what == "knn":
        compare_knn(options.repeats, options.queries)
    else:
        {"sgd": time_sgd, "lbfgs": time_lbfgs}[options.what]()
