"""Fingerprints: any bit counts, in any order of summation, and parts sum up to the whole."""

import pytest
import torch

from trainer import fingerprints
from trainer.fingerprints import code_digest, digest, digest_of_part


def test_digest__by_hand() -> None:
    # Places count 32-bit words and weigh 1, 3, 5, 7; an int64 is two of them, the low one first.
    assert int(digest([torch.tensor([3, 4])])) == 3 * 1 + 4 * 5
    assert int(digest([torch.tensor([3]), torch.tensor([4])])) == 3 * 31 + 4


def test_digest__every_bit_counts() -> None:
    rows = torch.randn(7, 5)
    whole = int(digest([rows]))
    for place, bit in ((0, 0), (17, 31), (34, 12)):
        other = rows.clone()
        other.view(-1).view(torch.int32)[place] ^= torch.tensor(1 << bit).to(torch.int32)
        assert int(digest([other])) != whole
    assert int(digest([rows.flip(0)])) != whole


@pytest.mark.parametrize("block", [1, 8, 2**22])
def test_digest__parts_sum_up_to_the_whole(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(fingerprints, "DIGEST_BLOCK", block)
    for rows in (torch.randn(11, 3), torch.randint(-(2**62), 2**62, (11, 3))):
        parts = [digest_of_part(rows[a:b], first_row=a) for a, b in ((0, 4), (4, 4), (4, 11))]
        assert int(torch.stack(parts).sum()) == int(digest([rows]))


def test_code_digest__is_of_this_code() -> None:
    assert code_digest() == code_digest()
    assert len(code_digest()) == 64
