"""What an inspection costs beside the epoch it follows.

    python tests/benchmarks/inspection.py OUTPUT [arguments of trainer.run but for --output]

Trains as asked, by default the built-in sample for ten epochs, every one inspected, and prints the
medians of both and their ratio. Asserts nothing about time.
"""

import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from trainer import pretrain as module
from trainer.run import main

DEFAULT = ("--data", "digits", "epochs=10", "loss.warmup_epochs=3", "device=cpu")


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """`function`, noting how long each call takes."""

    def call(*arguments: Any) -> Any:
        began = time.perf_counter()
        result = function(*arguments)
        seconds.append(time.perf_counter() - began)
        return result

    return call


if __name__ == "__main__":
    output, *words = sys.argv[1:]
    epochs: list[float] = []
    inspections: list[float] = []
    module._train_epoch = timed(module._train_epoch, epochs)
    module._inspect = timed(module._inspect, inspections)
    code = main([*(words or DEFAULT), "--output", output, "monitor.every_epochs=1"])
    if code:
        sys.exit(code)
    an_epoch, an_inspection = median(epochs[1:]), median(inspections[1:])
    print(
        f"{len(epochs)} epochs, median {an_epoch:.3f} s; inspection, median "
        f"{an_inspection:.3f} s: {an_inspection / an_epoch:.1%} of an epoch"
    )
