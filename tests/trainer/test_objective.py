"""The objective against the worked example, the paper read aloud, and the released code."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.reference.official import OfficialStep
from tests.reference.paper import anchor_losses, breadth_first
from trainer.memory_bank import MemoryBank
from trainer.objective import LossConfig, Objective, objective

# The worked example: eight unit vectors in the plane, a batch of anchors 0 and 7.
ANGLES = [0, 20, 32, 48, -36, 100, 140, 210]
GRAPH = [[1, 2], [2, 0], [1, 3], [2, 1], [0, 1], [6, 3], [5, 7], [6, 5]]
INDICES = torch.tensor([0, 7])
FRESH = [4, 215]
SETTINGS: dict[str, Any] = {
    "temperature": 0.5,
    "num_background": 4,
    "steps": 2,
    "num_positives": 2,
}


def on_circle(degrees: list[float]) -> Tensor:
    angle = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def example_bank() -> MemoryBank:
    bank = MemoryBank(8, 2, 2).double()
    bank.embeddings.copy_(on_circle(ANGLES))
    bank.neighbours.copy_(torch.tensor(GRAPH))
    return bank


def example(**changes: Any) -> Objective:
    return objective(example_bank(), INDICES, on_circle(FRESH), LossConfig(**(SETTINGS | changes)))


def gradients(**changes: Any) -> tuple[Tensor, Tensor]:
    """Gradients of both batch means with respect to the network's output before unit length."""
    result = []
    for name in ("instance", "invariance"):
        output = on_circle(FRESH).requires_grad_()
        unit = torch.nn.functional.normalize(output, dim=1)
        found = objective(example_bank(), INDICES, unit, LossConfig(**(SETTINGS | changes)))
        result += torch.autograd.grad(getattr(found, name), output)
    return result[0], result[1]


def test_example__paper_sets() -> None:
    found = example()
    assert [[i for i in line if i >= 0] for line in found.reached.tolist()] == [
        [1, 2, 3],
        [6, 5, 3],
    ]
    assert found.hard_positives.tolist() == [[3, 2], [3, 5]]
    assert found.nearest.tolist() == [[0, 1, 2], [7, 6, 4]]


@pytest.mark.parametrize(
    ("changes", "instance", "invariance"),
    [
        ({}, 0.758343, 0.513212),
        ({"positives": "easy"}, 0.758343, (0.311028 + 0.221082) / 2),
        ({"num_positives": 50}, 0.758343, (0.242032 + 0.208444) / 2),
        ({"mode": "official"}, 0.758342, 1.034027),
        ({"mode": "official", "exclusive": False}, 0.758342, 1.877108),
        ({"mode": "official", "positives": "easy"}, 0.758342, (0.198816 - 1.231865) / 2),
        ({"mode": "official", "num_positives": 50}, 0.758342, (-0.757800 - 1.492187) / 2),
    ],
)
def test_example__losses(changes: dict[str, Any], instance: float, invariance: float) -> None:
    found = example(**changes)
    assert found.instance.item() == pytest.approx(instance, abs=1e-6)
    assert found.invariance.item() == pytest.approx(invariance, abs=1e-6)


def test_example__the_whole_loss_of_both_modes() -> None:
    for mode, whole in (("paper", 1.066270), ("official", 1.378759)):
        found = example(mode=mode)
        assert (found.instance + 0.6 * found.invariance).item() == pytest.approx(whole, abs=2e-6)


def test_example__official_positives_keep_repeats_and_the_anchor() -> None:
    found = example(mode="official")
    assert found.reached.tolist() == [[1, 2, 2, 0, 1, 3], [6, 5, 5, 7, 6, 3]]


def test_example__gradients() -> None:
    instance, invariance = gradients()
    expected = [[-0.008096, 0.115777], [-0.074154, 0.105903]]
    np.testing.assert_allclose(instance, expected, atol=1e-6)
    expected = [[0.026516, -0.379197], [0.460148, -0.657159]]
    np.testing.assert_allclose(invariance, expected, atol=1e-6)
    _, invariance = gradients(mode="official")
    expected = [[0.032661, -0.467069], [0.091508, -0.130686]]
    np.testing.assert_allclose(invariance, expected, atol=1e-6)


@pytest.mark.parametrize("mode", ["paper", "official"])
def test_example__bank_and_graph_after_the_update(mode: str) -> None:
    bank = example_bank()
    found = objective(bank, INDICES, on_circle(FRESH), LossConfig(**SETTINGS, mode=mode))  # type: ignore[arg-type]
    bank.update(INDICES, on_circle(FRESH))
    bank.refresh_neighbours(INDICES, found.nearest)
    torch.testing.assert_close(bank.embeddings[INDICES], on_circle([2.0, 212.5]))
    assert bank.neighbours[INDICES].tolist() == [[2, 1], [4, 6]]
    untouched = [1, 2, 3, 4, 5, 6]
    assert bank.neighbours[untouched].tolist() == [GRAPH[i] for i in untouched]
    torch.testing.assert_close(
        bank.embeddings[untouched], on_circle([ANGLES[i] for i in untouched])
    )


def test_example__no_negatives_left_makes_the_invariance_zero() -> None:
    output = on_circle([44]).requires_grad_()
    found = objective(example_bank(), torch.tensor([3]), output, LossConfig(**SETTINGS))
    assert [i for i in found.reached[0].tolist() if i >= 0] == [2, 1, 0]
    assert found.instance.item() == pytest.approx(1.218016, abs=1e-6)
    assert found.invariance.item() == 0
    (gradient,) = torch.autograd.grad(found.invariance, output)
    assert torch.equal(gradient, torch.zeros(1, 2, dtype=torch.float64))


@pytest.mark.parametrize("mode", ["paper", "official"])
@pytest.mark.parametrize("name", ["instance", "invariance"])
def test_objective__gradient_equals_finite_differences(mode: str, name: str) -> None:
    def loss(output: Tensor) -> Tensor:
        unit = torch.nn.functional.normalize(output, dim=1)
        config = LossConfig(**SETTINGS, mode=mode)  # type: ignore[arg-type]
        value: Tensor = getattr(objective(example_bank(), INDICES, unit, config), name)
        return value

    assert torch.autograd.gradcheck(loss, (on_circle([4.3, 214.6]).requires_grad_(),))


def random_case(
    seed: int, *, num_images: int, k: int, gaps: float = 0.0
) -> tuple[MemoryBank, Tensor, Tensor]:
    """A bank with an arbitrary graph (self-loops, repeats and -1 included) and a batch of 6."""
    generator = torch.Generator().manual_seed(seed)
    bank = MemoryBank(num_images, 5, k, generator=generator).double()
    graph = torch.randint(0, num_images, (num_images, k), generator=generator)
    graph[torch.rand(num_images, k, generator=generator) < gaps] = -1
    bank.neighbours.copy_(graph)
    indices = torch.randint(0, num_images, (6,), generator=generator)
    fresh = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    return bank, indices, torch.nn.functional.normalize(fresh, dim=1)


@pytest.mark.parametrize("positives", ["hard", "easy"])
@pytest.mark.parametrize(
    ("num_images", "k", "steps", "num_positives", "num_background", "gaps"),
    [
        (40, 4, 3, 5, 12, 0.0),
        (40, 1, 1, 1, 1, 0.0),  # the smallest of everything
        (40, 3, 2, 60, 10, 0.2),  # more positives asked for than can be reached
        (9, 4, 3, 5, 64, 0.0),  # more background asked for than images
        (30, 2, 4, 4, 8, 0.6),  # most walks break off
        (20, 3, 1, 3, 20, 1.0),  # nothing is known yet
    ],
)
def test_paper_mode__equals_the_paper_read_aloud(
    num_images: int,
    k: int,
    steps: int,
    num_positives: int,
    num_background: int,
    gaps: float,
    positives: str,
) -> None:
    for seed in range(5):
        bank, indices, fresh = random_case(seed, num_images=num_images, k=k, gaps=gaps)
        config = LossConfig(
            temperature=0.2,
            num_background=num_background,
            steps=steps,
            num_positives=num_positives,
            positives=positives,  # type: ignore[arg-type]
        )
        found = objective(bank, indices, fresh, config)
        each = [
            anchor_losses(
                bank.embeddings.numpy(),
                bank.neighbours.tolist(),
                int(index),
                embedding.numpy(),
                temperature=0.2,
                num_background=num_background,
                steps=steps,
                num_positives=num_positives,
                hard=positives == "hard",
            )
            for index, embedding in zip(indices, fresh, strict=True)
        ]
        instance, invariance = np.mean(each, axis=0)
        assert found.instance.item() == pytest.approx(instance, rel=1e-9)
        assert found.invariance.item() == pytest.approx(invariance, rel=1e-9, abs=1e-12)
        for index, line in zip(indices.tolist(), found.reached.tolist(), strict=True):
            expected = breadth_first(bank.neighbours.tolist(), index, steps)
            assert [i for i in line if i >= 0] == expected


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize(
    ("k", "steps", "num_positives"), [(4, 3, 20), (4, 3, 200), (1, 1, 1), (2, 4, 7)]
)
def test_official_mode__equals_the_released_computation(
    k: int, steps: int, num_positives: int, exclusive: bool, hard: bool
) -> None:
    for seed in range(4):
        bank, indices, fresh = random_case(seed, num_images=60, k=k)
        indices = indices.unique()  # what repeats do is not defined there
        fresh = fresh[: len(indices)]
        official = OfficialStep(
            bank.embeddings.clone(),
            bank.neighbours.clone(),
            temperature=0.1,
            num_background=25,
            steps=steps,
            num_positives=num_positives,
            hard=hard,
            exclusive=exclusive,
        )
        config = LossConfig(
            temperature=0.1,
            num_background=25,
            steps=steps,
            num_positives=num_positives,
            mode="official",
            positives="hard" if hard else "easy",
            exclusive=exclusive,
        )
        theirs, ours = (fresh.clone().requires_grad_() for _ in range(2))
        instance, invariance, rows = official.losses(indices, theirs)
        found = objective(bank, indices, ours, config)
        torch.testing.assert_close(found.instance, instance, rtol=1e-9, atol=0)
        torch.testing.assert_close(found.invariance, invariance, rtol=1e-9, atol=1e-12)
        (instance + 0.6 * invariance).backward()
        (found.instance + 0.6 * found.invariance).backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-12)
        official.update(indices, theirs, rows)
        bank.update(indices, ours)
        bank.refresh_neighbours(indices, found.nearest)
        assert torch.equal(bank.neighbours, official.neighbours)
        torch.testing.assert_close(bank.embeddings, official.bank)


@pytest.mark.parametrize("mode", ["paper", "official"])
def test_objective__autocast_at_small_temperature_is_finite_and_computed_in_float32(
    mode: str,
) -> None:
    bank, indices, fresh = random_case(3, num_images=60, k=4)
    bank = bank.float()
    config = LossConfig(
        temperature=0.07,
        num_background=30,
        steps=3,
        num_positives=9,
        mode=mode,  # type: ignore[arg-type]
    )
    half = fresh.to(torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = objective(bank, indices, half, config)
    exact = objective(bank, indices, half.detach().float(), config)
    assert found.instance.dtype == torch.float32
    assert torch.equal(found.instance, exact.instance)
    assert torch.equal(found.invariance, exact.invariance)
    (found.instance + found.invariance).backward()
    assert half.grad is not None
    assert half.grad.isfinite().all()


def test_objective__reads_and_changes_nothing() -> None:
    bank, indices, fresh = random_case(0, num_images=40, k=4)
    before = {name: value.clone() for name, value in bank.state_dict().items()}
    random_state = torch.get_rng_state()
    config = LossConfig(temperature=0.2, num_background=12, steps=3, num_positives=5)
    first = objective(bank, indices, fresh.requires_grad_(), config)
    second = objective(bank, indices, fresh, config)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(before[name], value) for name, value in bank.state_dict().items())
    assert torch.equal(first.instance, second.instance)
    assert not first.nearest.requires_grad


def test_objective__never_makes_a_gradient_of_the_whole_bank() -> None:
    """The largest tensor that autograd keeps has 1 + P + M + 1 columns, not N."""
    bank, indices, fresh = random_case(0, num_images=4000, k=4)
    config = LossConfig(temperature=0.2, num_background=50, steps=2, num_positives=5)
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.shape != bank.embeddings.shape:  # the bank itself, not a copy
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
        found = objective(bank, indices, fresh.requires_grad_(), config)
        (found.instance + found.invariance).backward()
    assert sizes
    assert max(sizes) <= len(indices) * (50 + 5 + 2)


def test_objective__of_embeddings_that_are_no_numbers_is_none() -> None:
    """And its backward pass reads rows that exist: the loop looks at the loss after the step."""
    bank, indices, fresh = random_case(0, num_images=4000, k=4)
    config = LossConfig(temperature=0.2, num_background=50, steps=2, num_positives=5)
    junk = torch.full((len(indices), 50), -(2**40))
    del junk  # what a list of ids that is not written to would hold
    spoilt = torch.full_like(fresh, torch.nan).requires_grad_()
    found = objective(bank, indices, spoilt, config)
    (found.instance + found.invariance).backward()
    assert found.instance.isnan()
    assert ((found.nearest >= 0) & (found.nearest < 4000)).all()
    assert spoilt.grad is not None
    assert spoilt.grad.isnan().all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("num_background", 0),
        ("steps", 0),
        ("num_positives", 0),
        ("mode", "papr"),
        ("positives", "soft"),
    ],
)
def test_loss_config__value_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        LossConfig(**(SETTINGS | {name: value}))
