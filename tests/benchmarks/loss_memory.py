"""Peak extra memory of one loss step, in units of the (B, N) float32 similarities.

    python tests/benchmarks/loss_memory.py                                  # N = 1,281,167, B = 128
    python tests/benchmarks/loss_memory.py --images 50000 --batch 128

Each variant runs in a process of its own, whose peak resident memory is compared with what it held
before the step (Linux). `in use`: every block over 64 KB is given back when it is freed, so the
peak is what is needed at a time. `held`: trainer.run's setting, which keeps freed memory for the
next step; what the C library leaves unused between blocks counts too. The official computation at
N = 1,281,167 needs 3 GB beside the bank.
"""

import argparse
import ctypes
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

VARIANTS = ("official", "paper")
ALLOCATORS = {  # glibc's settings, read when a process starts
    "in use": {"MALLOC_MMAP_THRESHOLD_": "65536"},
    "held": {"MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_MMAP_THRESHOLD_": "1073741824"},
}


def resident_bytes(field: str) -> int:
    """VmRSS, what this process holds, or VmHWM, its peak since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def forget_peak() -> None:
    """Start counting anew; memory that was freed goes back first, so that using it again counts."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def measure(variant: str, num_images: int, batch: int) -> int:
    """Bytes that one forward, backward and update add to the process at its peak."""
    import torch

    from tests.reference.official import OfficialStep
    from trainer.memory_bank import MemoryBank
    from trainer.objective import LossConfig, objective

    torch.set_num_threads(1)
    dim, k, settings = 128, 4, {"temperature": 0.07, "num_background": 4096, "steps": 3}

    def step(size: int) -> int:
        generator = torch.Generator().manual_seed(0)
        bank = MemoryBank(size, dim, k, generator=generator)
        bank.neighbours.copy_(torch.randint(0, size, (size, k), generator=generator))
        indices = torch.randperm(size, generator=generator)[:batch]
        fresh = bank.embeddings[indices].requires_grad_()
        forget_peak()
        before = resident_bytes("VmRSS")
        if variant == "official":
            official = OfficialStep(bank.embeddings, bank.neighbours, num_positives=50, **settings)
            instance, invariance, rows = official.losses(indices, fresh)
            (instance + 0.6 * invariance).backward()
            official.update(indices, fresh, rows)
        else:
            found = objective(
                bank, indices, fresh, LossConfig(num_positives=50, mode="paper", **settings)
            )
            (found.instance + 0.6 * found.invariance).backward()
            bank.update(indices, fresh)
            bank.refresh_neighbours(indices, found.nearest)
        return resident_bytes("VmHWM") - before

    step(5000)  # libraries and thread pools take their own memory at the first use
    return step(num_images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--variant", choices=VARIANTS, help="measure one here (used by the script)")
    options = parser.parse_args()
    if options.variant:
        print(measure(options.variant, options.images, options.batch))
        return
    unit = options.images * options.batch * 4
    print(f"N = {options.images:,}, B = {options.batch}, unit {unit / 1e6:.0f} MB")
    for variant in VARIANTS:
        command = [sys.executable, __file__, "--variant", variant]
        command += ["--images", str(options.images), "--batch", str(options.batch)]
        for name, settings in ALLOCATORS.items():
            done = subprocess.run(
                command, check=True, capture_output=True, text=True, env={**os.environ, **settings}
            )
            extra = int(done.stdout)
            print(f"{variant:<10} {name:<7} {extra / 1e6:8.0f} MB   {extra / unit:5.2f} units")


if __name__ == "__main__":
    main()
