"""The state as it was at one step, and its bytes as the safetensors library reads them.

Run: pytest tests/trainer/test_snapshot.py
"""

import json

import pytest
import safetensors.torch
import torch
from torch import Tensor

from trainer import snapshot as module
from trainer.snapshot import HostCopies, not_finite, safetensors_pieces


def _tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "flags": torch.tensor([True, False, True]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "half": torch.randn(7).bfloat16(),
        "counter": torch.tensor(3),
        "images": torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last),
        "turned": torch.randn(4, 6).T,
        "none": torch.empty(0, 3),
        "wide": torch.randn(2, 3, dtype=torch.float64),
    }


@pytest.mark.parametrize("piece_bytes", [8, 64, module.PIECE_BYTES])
def test_pieces__are_a_file_that_the_library_reads(
    piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", piece_bytes)
    wanted = _tensors()
    pieces = [bytes(piece) for piece in safetensors_pieces(wanted)]
    assert max(map(len, pieces[1:])) <= piece_bytes
    content = b"".join(pieces)
    read = safetensors.torch.load(content)
    assert read.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name
    # Each begins at a multiple of its element's size, as the format asks for.
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(content[8 : 8 + length]).items():
        assert entry["data_offsets"][0] % wanted[name].element_size() == 0, name


def test_copies__are_not_changed_with_the_state_but_by_the_next_snapshot() -> None:
    live, copies = {"file": _tensors()}, HostCopies()
    first = copies.take(live)
    places = {name: copy.data_ptr() for name, copy in first.files["file"].items()}
    for tensor in live["file"].values():
        tensor.zero_()
    for name, tensor in _tensors().items():
        copy = first.files["file"][name]
        assert torch.equal(copy, tensor), name
        assert copy.stride() == tensor.stride()
    second = copies.take(live)
    assert not any(copy.any() for copy in second.files["file"].values())
    assert {name: copy.data_ptr() for name, copy in second.files["file"].items()} == places
    live["file"]["half"] = torch.ones(9)  # another form: another buffer, and none is left over
    del live["file"]["bytes"]
    third = copies.take(live)
    assert torch.equal(third.files["file"]["half"], torch.ones(9))
    assert set(copies._buffers) == {("file", name) for name in live["file"]}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_not_finite__is_found_wherever_it_lies(
    dtype: torch.dtype, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 16)
    limits = torch.finfo(dtype)
    wrong = torch.tensor([limits.max, limits.min, limits.tiny, 0.0] * 6, dtype=dtype)
    tensors = {"whole": torch.arange(4), "wrong": wrong.view(2, 3, 2, 2)}
    tensors["wrong"] = tensors["wrong"].to(memory_format=torch.channels_last)
    assert not_finite(tensors) is None
    for place in range(24):
        spoilt = wrong.clone()
        spoilt[place] = value
        tensors["wrong"] = spoilt.view(2, 3, 2, 2).to(memory_format=torch.channels_last)
        assert not_finite(tensors) == "wrong"
