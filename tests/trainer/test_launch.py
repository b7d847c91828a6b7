"""What torchrun's environment says, and what a number of processes can share."""

import re

import pytest

from trainer.launch import Launch, RankError, check_divides, rank_device, read_launch


def test_read_launch__without_torchrun_is_one_process() -> None:
    assert read_launch({}) == Launch(0, 1, 0, 1, 0)


def test_read_launch__under_torchrun() -> None:
    said = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert read_launch(said | where) == Launch(5, 8, 1, 4, 2)
    with pytest.raises(RankError, match=r"WORLD_SIZE=8 .* MASTER_ADDR, MASTER_PORT is not set"):
        read_launch(said)


@pytest.mark.parametrize(
    ("batch_size", "size", "sync_batchnorm", "told"),
    [
        (128, 3, True, "by 3 processes: start 1, 2 or 4 of them, or give batch_size=126 or 129"),
        (4, 3, True, "by 3 processes: start 1, 2 or 4 of them, or give batch_size=3 or 6"),
        (4, 4, False, "one image to each of 4 processes.*sync_batchnorm=true, or batch_size=8"),
    ],
)
def test_check_divides__names_what_would_do(
    batch_size: int, size: int, sync_batchnorm: bool, told: str
) -> None:
    with pytest.raises(RankError, match=f"batch_size={batch_size} .*{told}"):
        check_divides(batch_size, size, sync_batchnorm=sync_batchnorm)


def test_check_divides__says_nothing_of_what_fits() -> None:
    check_divides(128, 4, sync_batchnorm=False)
    check_divides(4, 4, sync_batchnorm=True)
    check_divides(2, 1, sync_batchnorm=False)


def test_rank_device__of_processes_that_would_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    launch = Launch(rank=2, size=3, local_rank=2, local_size=3, restarts=0)
    told = re.escape("3 processes on this host, but it has 2 GPUs")
    with pytest.raises(RankError, match=f"{told}.*--nproc-per-node=2"):
        rank_device("cuda", launch)
    assert rank_device("cpu", launch).type == "cpu"
