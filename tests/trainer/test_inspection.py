"""What an inspection says of a bank of seven rows placed by hand, and that it changes nothing.

Run: pytest tests/trainer/test_inspection.py
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.reference.threads import Threads, together
from trainer.config import MonitorConfig
from trainer.datasets import open_source
from trainer.decode_pool import DecodePool
from trainer.distributed import Ranks
from trainer.encoder import build_encoder
from trainer.inspection import (
    BINS,
    FEW_ANCHORS,
    Inspection,
    bins,
    build_inspector,
    look,
    rank_anchors,
)
from trainer.launch import Launch
from trainer.memory_bank import MemoryBank
from trainer.objective import LossConfig, objective
from trainer.representation.preprocess import InputContract
from trainer.sharded_bank import BankShard

CPU = torch.device("cpu")
LABELS = np.array([0, 0, 1, 0, 1, 1, 1])


def _at(*degrees: float) -> torch.Tensor:
    angles = torch.tensor(degrees) * math.pi / 180
    return torch.stack([angles.cos(), angles.sin()], dim=1)


@pytest.fixture
def bank() -> MemoryBank:
    """Seven rows on the circle; 0 -> 1, 2 -> 3 and back to 0; the graph of 4 is not yet known."""
    made = MemoryBank(7, 2, 2)
    made.embeddings.copy_(_at(0, 20, 41, 60, 92, 120, 180))
    made.neighbours.copy_(torch.tensor([[1, 2], [3, 0], [3, -1], [2, 1], [-1, -1], [4, 6], [5, 4]]))
    return made


def _config(**changes: object) -> LossConfig:
    values = {"temperature": 0.2, "num_background": 5, "steps": 2, "num_positives": 2}
    return LossConfig(**(values | changes))  # type: ignore[arg-type]


def _cos(degrees: float) -> float:
    return math.cos(degrees * math.pi / 180)


def test_look__at_two_anchors_by_hand(bank: MemoryBank) -> None:
    # Anchor 0 seen at 0 degrees: 1, 2 in one hop, 3 in two. Anchor 5 at 130: 4, 6, then 4's none.
    seen = look(bank, torch.tensor([0, 5]), _at(0, 130), _config())
    assert seen.reached[:, :3].tolist() == [[1, 2, 3], [4, 6, -1]]
    assert (seen.reached[:, 3:] == -1).all()
    assert seen.hops[:, :3].tolist() == [[1, 1, 2], [1, 1, -1]]
    wanted = [[_cos(20), _cos(41), _cos(60)], [_cos(38), _cos(50), 0]]
    assert np.allclose(seen.similarities[:, :3], wanted, atol=1e-6)
    assert seen.chosen[:, :3].tolist() == [[False, True, True], [True, True, False]]
    same = seen.same_label(LABELS)[:, :3]  # the last image, which -1 would read, is of 5's class
    assert same.tolist() == [[True, False, True], [True, True, False]]
    # The 5 nearest of 0 are 0..4: 4 alone is background. Of 5 at 130: 5, 4, 6, 3, 2.
    assert seen.in_top[:, :3].tolist() == [[True] * 3, [True, True, False]]
    wanted_background = [[_cos(92)], [_cos(70), _cos(89)]]
    for line, total, values in zip(
        seen.background, seen.background_sum, wanted_background, strict=True
    ):
        assert line.tolist() == np.bincount(bins(np.array(values)), minlength=BINS).tolist()
        assert total == pytest.approx(sum(values), abs=1e-6)


def test_figures__by_hand(bank: MemoryBank) -> None:
    seen = look(bank, torch.tensor([0, 5]), _at(0, 130), _config())
    assert seen.figures(LABELS) == pytest.approx(
        {
            "inspected": 2,
            "positives_in_top": 1.0,
            "no_background": 0.0,
            "similarity_easy": _cos(20),
            "similarity_hard": (_cos(41) + _cos(60) + _cos(38) + _cos(50)) / 4,
            "similarity_background": (_cos(92) + _cos(89) + _cos(70)) / 3,
            "purity_reached": 4 / 5,  # 1 and 3 like 0, 2 unlike it; 4 and 6 like 5
            "purity_chosen": 3 / 4,
            "purity_hop_1": 3 / 4,
            "purity_hop_2": 1.0,
            "purity_chance": (2 / 6 + 3 / 6) / 2,  # others of the class among all others
        },
        abs=1e-6,
    )
    assert not any(name.startswith("purity") for name in seen.figures(None))


def test_figures__with_the_easy_positives_chosen(bank: MemoryBank) -> None:
    seen = look(bank, torch.tensor([0]), _at(0), _config(positives="easy", num_positives=1))
    figures = seen.figures(None, hardest_chosen=False)
    assert figures["similarity_easy"] == pytest.approx(_cos(20))
    assert figures["similarity_hard"] == pytest.approx((_cos(41) + _cos(60)) / 2)
    counts = seen.histograms(hardest_chosen=False)
    assert (sum(counts["easy"]), sum(counts["hard"]), sum(counts["background"])) == (1, 2, 1)


def test_figures__of_an_anchor_that_leaves_no_background(bank: MemoryBank) -> None:
    # Anchor 0: its 3 nearest are 0, 1, 2, itself and two positives; 3, chosen, is not among them.
    seen = look(bank, torch.tensor([0, 4]), _at(0, 92), _config(num_background=3))
    figures = seen.figures(None)
    assert figures["no_background"] == 0.5
    assert figures["positives_in_top"] == 0.5
    assert seen.background.sum(axis=1).tolist() == [0, 2]


def test_figures__leave_out_what_there_is_nothing_of(bank: MemoryBank) -> None:
    nobody = look(bank, torch.tensor([4]), _at(92), _config())
    figures = nobody.figures(LABELS)
    assert set(figures) == {"inspected", "no_background", "similarity_background", "purity_chance"}
    assert sum(nobody.histograms()["hard"]) == 0


@pytest.mark.parametrize("mode", ["paper", "official"])
def test_look__leaves_out_repeats_and_the_anchor_in_both_modes(bank: MemoryBank, mode: str) -> None:
    seen = look(bank, torch.tensor([0]), _at(0), _config(mode=mode, num_positives=6))
    assert seen.reached[0].tolist() == [1, 2, 3, -1, -1, -1]
    assert seen.chosen[0].tolist() == [True, True, True, False, False, False]


@pytest.mark.parametrize("mode", ["paper", "official"])
@pytest.mark.parametrize("positives", ["hard", "easy"])
def test_look__chooses_what_the_objective_chooses(mode: str, positives: str) -> None:
    draw = torch.Generator().manual_seed(1)
    bank = MemoryBank(30, 8, 2, generator=draw)
    bank.refresh_neighbours(torch.arange(30), torch.randint(0, 30, (30, 2), generator=draw))
    indices = torch.randperm(30, generator=draw)[:6]
    embeddings = bank.embeddings[(indices + 1) % 30]
    config = _config(mode=mode, positives=positives, num_positives=5, num_background=12)
    seen = look(bank, indices, embeddings, config)
    wanted = objective(bank, indices, embeddings, config).hard_positives
    for row in range(len(indices)):
        chosen = set(seen.reached[row][seen.chosen[row]].tolist())
        assert chosen == set(wanted[row].tolist()) - {-1, int(indices[row])}


def test_bins__at_the_ends() -> None:
    edges = np.array([-1.0000001, -1.0, -0.9601, -0.9599, 0.0, 0.9999, 1.0, 1.0000001])
    assert bins(edges).tolist() == [0, 0, 0, 1, 25, 49, 49, 49]


def test_inspection__changes_nothing(packed: Callable[..., Path], tiny_recipe: Callable) -> None:
    recipe, source = tiny_recipe(), open_source(str(packed(40)))
    torch.manual_seed(0)
    encoder, bank = build_encoder(recipe.encoder), MemoryBank(40, 8, 2)
    bank.refresh_neighbours(torch.arange(40), torch.arange(80).view(40, 2) % 40)
    encoder.train()
    before = [each.clone() for each in (*encoder.state_dict().values(), *bank.buffers())]
    generators = torch.get_rng_state(), np.random.get_state()[1].copy()
    with DecodePool(0) as pool:
        inspector = _inspector(source, pool, max_anchors=10)
        one = inspector.inspect(encoder, bank, CPU)
        other = inspector.inspect(encoder, bank, CPU)
    after = [*encoder.state_dict().values(), *bank.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(generators[0], torch.get_rng_state())
    assert (generators[1] == np.random.get_state()[1]).all()
    assert all(module.training for module in encoder.modules())
    assert one.figures(source.labels) == other.figures(source.labels)
    # Seen as the service would see them: what evaluation mode gives for the prepared images.
    encoder.eval()
    prepared = torch.from_numpy(source.prepared(one.anchors, InputContract(size_px=8)))
    with torch.no_grad():
        embedded = encoder(prepared.permute(0, 3, 1, 2) / 255).embedding
    near = (embedded[:, None] * bank.embeddings[one.reached]).sum(dim=2).numpy()
    assert np.allclose(one.similarities[one.reached >= 0], near[one.reached >= 0], atol=1e-6)


def _inspector(source, pool, *, seed: int = 0, ranks: Ranks | None = None, **changes):  # type: ignore[no-untyped-def]
    values = {
        "every_epochs": 1,
        "knn_k": 3,
        "knn_temperature": 0.07,
        "knn_on": "embedding",
        "max_images": 9,
        "collapse_patience": 2,
    }
    config = MonitorConfig.model_validate(values | changes)
    more = {} if ranks is None else {"ranks": ranks}
    contract = InputContract(size_px=8)
    return build_inspector(source, config, _config(), contract, pool, seed=seed, **more)


def test_anchors__are_few_and_the_seed_s(packed: Callable[..., Path]) -> None:
    source = open_source(str(packed(600)))
    with DecodePool(0) as pool:
        made = _inspector(source, pool, max_anchors=512)
        assert len(made.anchors) == 75  # 1 in 8
        assert (made.images == source.prepared(made.anchors, InputContract(size_px=8))).all()
        assert len(_inspector(source.subset(range(100)), pool, max_anchors=512).anchors) == (
            FEW_ANCHORS
        )
        few = _inspector(source, pool, max_anchors=10)
        assert (few.anchors == made.anchors[:10]).all()
        assert (_inspector(source, pool, seed=1, max_anchors=10).anchors != few.anchors).any()
        assert _inspector(source, pool, max_anchors=0) is None


def test_shares__of_the_ranks_are_equal_and_in_order() -> None:
    anchors = np.array([7, 3, 9, 1, 5])
    shares = [rank_anchors(anchors, Ranks(Launch(rank, 3, rank, 3, 0))) for rank in range(3)]
    assert [share.tolist() for share in shares] == [[7, 3], [9, 1], [5, 5]]


def test_embeddings__that_are_no_numbers(
    packed: Callable[..., Path], tiny_recipe: Callable
) -> None:
    encoder = build_encoder(tiny_recipe().encoder)
    next(encoder.parameters()).data.fill_(math.nan)
    with DecodePool(0) as pool:
        inspector = _inspector(open_source(str(packed(40))), pool, max_anchors=10)
    with pytest.raises(ValueError, match="no numbers"):
        inspector.inspect(encoder, MemoryBank(40, 8, 2), CPU)


def test_inspection__of_several_parts_is_one(bank: MemoryBank) -> None:
    both = look(bank, torch.tensor([0, 5]), _at(0, 130), _config())
    parts = [
        look(bank, torch.tensor([0]), _at(0), _config()),
        look(bank, torch.tensor([5]), _at(130), _config()),
    ]
    joined = Inspection(
        *(np.concatenate(each) for each in zip(*(vars(p).values() for p in parts), strict=True))
    )
    assert joined.figures(LABELS) == pytest.approx(both.figures(LABELS))


@pytest.mark.parametrize("mode", ["paper", "official"])
@pytest.mark.parametrize("size", [2, 3])
def test_look__at_a_divided_bank_sees_what_the_whole_one_shows(size: int, mode: str) -> None:
    generator = torch.Generator().manual_seed(size)
    whole = MemoryBank(31, 4, 3, generator=generator)
    whole.neighbours.copy_(torch.randint(-1, 31, (31, 3), generator=generator))
    anchors = torch.randperm(31, generator=generator)[:6]
    embeddings = torch.nn.functional.normalize(torch.randn(6, 4, generator=generator), dim=1)
    config = _config(mode=mode, num_background=11, num_positives=3)

    def one(ranks: Threads) -> Inspection:
        held = range(31 * ranks.rank // size, 31 * (ranks.rank + 1) // size)
        shard = BankShard(31, 4, 3, held=held)
        shard.embeddings.copy_(whole.embeddings[held.start : held.stop])
        shard.neighbours.copy_(whole.neighbours)
        own = slice(6 * ranks.rank // size, 6 * (ranks.rank + 1) // size)
        return look(shard, anchors[own], embeddings[own], config, ranks)

    parts = together(size, one)
    wanted = look(whole, anchors, embeddings, config)
    for name in Inspection.__dataclass_fields__:
        joined = np.concatenate([getattr(part, name) for part in parts])
        if joined.dtype.kind == "f":
            assert np.allclose(joined, getattr(wanted, name), atol=1e-5), name
        else:
            assert np.array_equal(joined, getattr(wanted, name)), name
