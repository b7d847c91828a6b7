"""What a step asks of the device and of the optimiser; what it computes stands in test_pretrain.py.

Run: pytest tests/trainer/test_step.py
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.reference.tape import WaitsForTheDevice, never_waits
from trainer import search
from trainer import step as module
from trainer.config import Recipe
from trainer.distributed import ALONE
from trainer.session import build
from trainer.step import FIGURES, TrainingStep, fuse, read_figures

CPU = torch.device("cpu")


@pytest.fixture
def make(tiny_recipe: Callable[..., Recipe]) -> Callable[..., TrainingStep]:
    def build_step(*overrides: str) -> TrainingStep:
        recipe = tiny_recipe(*overrides)
        state = build(recipe, 24, CPU)
        return TrainingStep(recipe, state, state.encoder, ALONE, lambda: 0)

    return build_step


def _batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(24, generator=generator)[:8]
    return indices, torch.rand(8, 3, 8, 8, generator=generator)


def test_step__never_waits_for_the_device_and_agrees_with_the_cpus_own_path(
    make: Callable[..., TrainingStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make()
    wanted = [plain.learn(*_batch(seed), 0.6) for seed in range(3)]
    step = make()
    fuse(step._state.optimiser)
    monkeypatch.setattr(search, "_top_m_on_cpu", search._top_m_on_device)
    batches = [_batch(seed) for seed in range(3)]
    with never_waits():
        found = [step.learn(*batch, 0.6) for batch in batches]
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted), atol=1e-4, rtol=1e-4)
    for one, other in zip(step._state.bank.buffers(), plain._state.bank.buffers(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_never_waits__refuses_what_would_wait() -> None:
    values = torch.arange(3.0)
    for wait in (lambda: values.sum().item(), lambda: values[values > 1], lambda: values.nonzero()):
        with pytest.raises(WaitsForTheDevice), never_waits():
            wait()


def test_remember__puts_weights_momenta_and_rows_back(make: Callable[..., TrainingStep]) -> None:
    step = make()
    state = step._state
    step.learn(*_batch(0), 0.6)
    before = copy.deepcopy([state.encoder.state_dict(), state.bank.state_dict()])
    momenta = copy.deepcopy(state.optimiser.state_dict()["state"])
    indices, views = _batch(1)
    restore = step.remember(indices)
    for _ in range(2):
        step.learn(indices, views, 0.6)
    assert not torch.equal(state.bank.embeddings, before[1]["embeddings"])
    restore()
    for now, then in zip(
        [state.encoder.state_dict(), state.bank.state_dict()], before, strict=True
    ):
        assert all(torch.equal(now[name], value) for name, value in then.items())
    for key, value in state.optimiser.state_dict()["state"].items():
        assert torch.equal(value["momentum_buffer"], momenta[key]["momentum_buffer"])
    assert all(each.grad is None for each in state.encoder.parameters())


def test_remember__a_momentum_that_did_not_exist_becomes_zeros(
    make: Callable[..., TrainingStep],
) -> None:
    step = make()
    restore = step.remember(_batch(0)[0])
    step.learn(*_batch(0), 0.6)
    restore()
    held = step._state.optimiser.state.values()
    assert all(not each["momentum_buffer"].any() for each in held)


def test_fuse__is_the_same_descent_whatever_the_strides_of_a_saved_momentum() -> None:
    torch.manual_seed(0)
    one = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    other = copy.deepcopy(one)
    words = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    plain = torch.optim.SGD(one.parameters(), **words)
    fused = torch.optim.SGD(other.parameters(), **words)
    images = torch.rand(2, 3, 5, 5)

    def descend(network: nn.Module, optimiser: torch.optim.SGD) -> None:
        optimiser.zero_grad()
        network(images).square().sum().backward()
        optimiser.step()

    descend(one, plain)
    descend(other, fused)
    for held in fused.state.values():  # as a checkpoint gives it back
        held["momentum_buffer"] = held["momentum_buffer"].contiguous()
    fuse(fused)
    fused.param_groups[0]["lr"].fill_(0.02)
    plain.param_groups[0]["lr"] = 0.02
    for _ in range(2):
        descend(one, plain)
        descend(other, fused)
    for wanted, found in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, wanted)
        assert fused.state[found]["momentum_buffer"].stride() == found.stride()


def test_step__on_a_cpu_takes_back_what_a_gpu_chose(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    recipe = tiny_recipe()
    state = build(recipe, 24, CPU)
    fuse(state.optimiser)
    step = TrainingStep(recipe, state, state.encoder, ALONE, lambda: 0)
    step.set_rate(0.02)
    (group,) = state.optimiser.param_groups
    assert (group["fused"], group["lr"]) == (None, 0.02)


def test_compile__gives_the_step_another_way_to_compute_it(
    make: Callable[..., TrainingStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[nn.Module] = []

    def remember(network: nn.Module) -> nn.Module:
        compiled.append(network)
        return network

    monkeypatch.setattr(module.torch, "compile", remember)
    assert not compiled
    step = make("speed.compile=true")
    assert compiled == [step._state.encoder]
    make("speed.compile=false")
    assert len(compiled) == 1


def test_encoder__compiles_as_one_graph(make: Callable[..., TrainingStep]) -> None:
    step = make()
    encoder = step._state.encoder
    whole = torch.compile(encoder, fullgraph=True, backend="eager")
    views = _batch(0)[1]
    other = copy.deepcopy(encoder)
    assert torch.equal(whole(views).embedding, other(views).embedding)


def test_read_figures__of_several_steps() -> None:
    first, second = read_figures(
        torch.tensor([[*range(len(FIGURES)), 0.0], [*range(1, len(FIGURES) + 1), 15.0]])
    )
    assert (first.means["loss"], first.means["spread"], first.signum) == (0, 5, 0)
    assert (second.means["instance"], second.signum) == (2, 15)
