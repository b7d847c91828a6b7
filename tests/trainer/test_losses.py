"""The losses against numbers computed by hand."""

import math

import pytest
import torch

from trainer.losses import (
    instance_loss,
    invariance_loss,
    official_instance_loss,
    official_invariance_loss,
)

NONE = -torch.inf


def tensor(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_instance_loss__two_anchors_by_hand() -> None:
    # exp(1 / 0.5) = e^2 against e^0 + e^1, and e^0 against e^2 + nothing
    own = torch.tensor([1.0, 0.0], dtype=torch.float64)
    background = tensor([0.0, 0.5], [1.0, NONE])
    first = -math.log(math.e**2 / (math.e**2 + 1 + math.e))
    second = -math.log(1 / (1 + math.e**2))
    assert instance_loss(own, background, 0.5).item() == pytest.approx((first + second) / 2)


def test_instance_loss__all_equal_is_the_logarithm_of_the_number_of_candidates() -> None:
    loss = instance_loss(torch.full((3,), 0.7), torch.full((3, 511), 0.7), 0.07)
    assert loss.item() == pytest.approx(math.log(512), rel=1e-6)


def test_invariance_loss__by_hand() -> None:
    positives, mask = tensor([0.5, 0.0, 9.0]), torch.tensor([[True, True, False]])
    background = tensor([1.0, NONE])
    wanted = math.exp(1.0) + 1
    expected = -math.log(wanted / (wanted + math.exp(2.0)))
    assert invariance_loss(positives, mask, background, 0.5).item() == pytest.approx(expected)


def test_invariance_loss__without_negatives_is_zero_and_pulls_nowhere() -> None:
    positives = tensor([0.5, 0.1]).requires_grad_()
    mask = torch.tensor([[True, True]])
    loss = invariance_loss(positives, mask, tensor([NONE, NONE]), 0.1)
    loss.backward()
    assert loss.item() == 0
    torch.testing.assert_close(positives.grad, tensor([0.0, 0.0]))


@pytest.mark.parametrize("negatives", [[0.3, 0.2], [NONE, NONE]])
def test_invariance_loss__anchor_without_positives_adds_nothing(negatives: list[float]) -> None:
    positives = tensor([0.5, 0.1], [0.5, 0.1]).requires_grad_()
    background = tensor([0.3, 0.2], negatives).requires_grad_()
    mask = torch.tensor([[True, True], [False, False]])
    loss = invariance_loss(positives, mask, background, 0.1)
    alone = invariance_loss(positives[:1], mask[:1], background[:1], 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(alone.item() / 2)
    assert positives.grad is not None
    assert background.grad is not None
    assert torch.equal(positives.grad[1], tensor([0.0, 0.0])[0])
    assert torch.equal(background.grad[1], tensor([0.0, 0.0])[0])
    assert positives.grad[0].abs().sum() > 0


def test_losses__small_temperature_stays_finite_in_float32() -> None:
    own, background = torch.tensor([-1.0]), torch.tensor([[1.0, 1.0]])
    loss = instance_loss(own, background, 0.001)  # exp(1 / 0.001) is far beyond float32
    assert loss.item() == pytest.approx(2000 + math.log(2), rel=1e-6)


def test_official_losses__by_hand_with_epsilon_and_without_membership() -> None:
    own, top = torch.tensor([0.5], dtype=torch.float64), tensor([1.0, 0.0])
    positives, mask = tensor([-0.5, 0.0]), torch.tensor([[True, True]])
    total = math.e**2 + 1
    assert official_instance_loss(own, top, 0.5).item() == pytest.approx(
        -math.log(math.e / total + 1e-7)
    )
    wanted = math.exp(-1) + 1
    exclusive = official_invariance_loss(own, positives, mask, top, 0.5, exclusive=True)
    assert exclusive.item() == pytest.approx(-math.log(wanted / (total - math.e) + 1e-7))
    inclusive = official_invariance_loss(own, positives, mask, top, 0.5, exclusive=False)
    assert inclusive.item() == pytest.approx(-math.log(wanted / total + 1e-7))
