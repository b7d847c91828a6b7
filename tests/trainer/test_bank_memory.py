"""What a bank takes, what is free, and what is said when it does not fit.

Run: pytest tests/trainer/test_bank_memory.py
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer import bank_memory as module
from trainer.bank_memory import (
    BankSizes,
    Free,
    bank_memory,
    check_fits,
    free_bytes,
    host_free_bytes,
)
from trainer.request import UnavailableError
from trainer.run import main

GB = 10**9
# ImageNet-22k with the paper's numbers.
LARGE = BankSizes(
    num_images=14_197_122, dim=128, num_neighbours=4, steps=3, num_background=4096, batch_size=256
)


def test_bank_memory__by_hand() -> None:
    found = bank_memory(LARGE, 1, sharded=False)
    assert found.rows == 14_197_122 * 128 * 4  # 7.27 GB
    assert found.graph == 14_197_122 * 4 * 8
    candidates, positives = 256 * 4096 * 64, 256 * 84 * (128 * 4 + 128)
    assert found.step == 32 * 2**20 + candidates + positives
    assert found.saving == found.rows + found.graph


def test_bank_memory__divided_rows_and_whole_graph() -> None:
    one, eight = bank_memory(LARGE, 1, sharded=False), bank_memory(LARGE, 8, sharded=True)
    assert eight.rows == 1_774_641 * 128 * 4  # the largest share
    assert eight.graph == one.graph
    assert eight.step == one.step  # each looks at all 256 embeddings
    assert eight.saving == 2 * one.rows + one.graph
    assert bank_memory(LARGE, 8, sharded=False).step < one.step
    assert bank_memory(LARGE, 1, sharded=True) == one  # nothing to divide


def test_bank_memory__of_a_small_set_counts_what_there_is() -> None:
    small = BankSizes(
        num_images=100, dim=8, num_neighbours=2, steps=2, num_background=4096, batch_size=10
    )
    assert bank_memory(small, 1, sharded=False).step == (
        10 * 100 * 4 + 10 * 100 * 64 + 10 * 6 * (8 * 4 + 128)
    )


@pytest.mark.parametrize(
    ("free", "changes", "told"),
    [
        # 0.12 + 7.27 + 0.45 GB.
        (
            Free(host=100 * GB, gpu=5 * GB),
            {},
            "14,197,122 images x encoder.dim=128 takes 7.84 GB on each GPU (7.27 GB rows, 454 MB "
            "graph, 114 MB for a step in each process, 7.72 GB while it is saved), but the GPU has "
            "5 GB free: give bank.sharded=true and start torchrun with 2 processes on GPUs like "
            "this (4.2 GB in each), or give encoder.dim=64, or train on fewer images",
        ),
        (
            Free(host=100 * GB, gpu=2 * GB),
            {"processes": 4, "per_host": 4, "sharded": True},
            "takes 2.39 GB on each GPU (1.82 GB rows, 454 MB graph, 114 MB for a step in each "
            "process, 15 GB while it is saved), but the GPU has 2 GB free: give bank.sharded=true "
            "and start torchrun with 8 processes on GPUs like this (1.48 GB in each), or give "
            "encoder.dim=16, or train on fewer images",
        ),
        (
            Free(host=20 * GB, gpu=None),
            {"processes": 2, "per_host": 2},
            "takes 23.3 GB on a host of 2 processes (7.27 GB rows, 454 MB graph, 74 MB for a "
            "step in each process, 7.72 GB while it is saved), but this host has 20 GB free: give "
            "bank.sharded=true and start torchrun with 2 processes on hosts like this, one on each "
            "(4.2 GB in each), or give encoder.dim=64, or train on fewer images",
        ),
        # The graph alone is too much: no number of processes helps.
        (
            Free(host=100 * GB, gpu=GB // 3),
            {},
            "but the GPU has 333 MB free: train on fewer images",
        ),
        # The GPU would do, the host has no room to save.
        (Free(host=5 * GB, gpu=9 * GB), {}, "takes 7.72 GB on a host (7.27 GB rows"),
    ],
)
def test_check_fits__says_what_is_needed_and_what_to_set(
    free: Free, changes: dict[str, Any], told: str
) -> None:
    how = {"processes": 1, "per_host": 1, "sharded": False} | changes
    with pytest.raises(UnavailableError, match=re.escape(told)):
        check_fits(LARGE, free, **how)


def test_check_fits__says_nothing_of_what_fits() -> None:
    check_fits(LARGE, Free(16 * GB, None), processes=1, per_host=1, sharded=False)
    check_fits(LARGE, Free(16 * GB, 8 * GB), processes=1, per_host=1, sharded=False)
    check_fits(LARGE, Free(None, None), processes=1, per_host=1, sharded=False)
    # What it says would do, does.
    check_fits(LARGE, Free(100 * GB, 5 * GB), processes=2, per_host=2, sharded=True)


def _machine(root: Path, groups: str, files: dict[str, str]) -> Path:
    written = {
        "proc/meminfo": "MemTotal: 2000 kB\nMemAvailable: 1000 kB\n",
        "proc/self/cgroup": groups,
    } | files
    for name, content in written.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_host_free_bytes__is_the_kernels_word_without_a_limit(tmp_path: Path) -> None:
    assert host_free_bytes(_machine(tmp_path, "0::/\n", {})) == 1000 * 1024
    assert host_free_bytes(tmp_path / "elsewhere") is None


def test_host_free_bytes__is_less_in_a_limited_group(tmp_path: Path) -> None:
    here = "sys/fs/cgroup/jobs"
    root = _machine(
        tmp_path,
        "1:cpu:/jobs/a\n0::/jobs/a\n",
        {
            f"{here}/a/memory.max": "max\n",
            f"{here}/memory.max": "500000\n",  # of the group around it
            f"{here}/memory.current": "300000\n",
            f"{here}/memory.stat": "anon 250000\ninactive_file 50000\n",
        },
    )
    assert host_free_bytes(root) == 250_000


def test_host_free_bytes__of_the_older_groups(tmp_path: Path) -> None:
    here = "sys/fs/cgroup/memory"
    root = _machine(
        tmp_path,
        "9:name=systemd:/\n4:cpu,memory:/not/shown/here\n",
        {
            f"{here}/memory.limit_in_bytes": "400000\n",
            f"{here}/memory.usage_in_bytes": "450000\n",
            f"{here}/memory.stat": "total_inactive_file 10000\n",
        },
    )
    assert host_free_bytes(root) == 0


def test_free_bytes__of_this_machine() -> None:
    found = free_bytes(torch.device("cpu"))
    assert found.gpu is None
    assert found.host is None or found.host > 2**20


def test_run__with_a_bank_that_does_not_fit_is_refused_before_training(
    packed: Any,
    tiny_overrides: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "host_free_bytes", lambda: 20_000)
    output = tmp_path / "run"
    words = ["digits", "--data", str(packed(40)), "--output", str(output), *tiny_overrides]
    assert main([*words, "data.holdout=0"]) == 2
    said = capsys.readouterr().err
    assert "a memory bank of 40 images x encoder.dim=8 takes" in said
    assert "but this host has 0.02 MB free" in said
    assert not list(output.iterdir())
