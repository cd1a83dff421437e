"""The flow-matching loss and what drives it."""

import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from glassbox.flux_core.families import NANO_KONTEXT
from glassbox.flux_core.training.flow import FlowBatch, flow_loss, logit_normal, predictor
from glassbox.flux_core.training.optim import (
    Clock,
    MatrixMuon,
    MovingAverage,
    learning_rate,
    set_rates,
)
from glassbox.tools.nano.model import fresh_transformer


def _batch(target: torch.Tensor, **changes: torch.Tensor) -> FlowBatch:
    count, length, _ = target.shape
    shape = NANO_KONTEXT.transformer
    parts = {
        "target": target,
        "references": (torch.randn(count, length, shape.in_channels),),
        "txt": torch.randn(count, 5, shape.context_width),
        "pooled": torch.randn(count, shape.pooled_width),
        "weight": torch.ones(count, length),
    }
    return FlowBatch(**(parts | changes))


def test_the_true_velocity_has_no_loss() -> None:
    """With one known picture the velocity at x is (x - picture) / sigma."""
    target = torch.randn(4, 6, 8)

    def know(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return (x - target) / sigma[:, None, None]

    generator = torch.Generator().manual_seed(0)
    loss = flow_loss(know, _batch(target), logit_normal(0.0, 1.0), generator)
    assert float(loss) < 1e-6


def test_only_weighted_tokens_count() -> None:
    target = torch.randn(2, 4, 8)
    weight = torch.zeros(2, 4)
    weight[:, 0] = 1.0

    def wrong_elsewhere(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        velocity = (x - target) / sigma[:, None, None]
        velocity[:, 1:] += 100.0
        return velocity

    generator = torch.Generator().manual_seed(0)
    batch = _batch(target, weight=weight)
    assert float(flow_loss(wrong_elsewhere, batch, logit_normal(0.0, 1.0), generator)) < 1e-6


def test_the_density_favours_noise_as_asked() -> None:
    generator = torch.Generator().manual_seed(0)
    sigma = logit_normal(1.2, 1.3)(20_000, generator)
    assert 0.0 < float(sigma.min()) < float(sigma.max()) < 1.0
    assert float(sigma.median()) == pytest.approx(0.7685, abs=0.01)  # sigmoid(1.2)


def test_the_trained_velocity_is_the_one_that_is_sampled() -> None:
    """The loss runs the plan itself; the published signature computes the same."""
    torch.manual_seed(0)
    network = fresh_transformer(NANO_KONTEXT)
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.05)
    batch = _batch(torch.randn(2, 4, 64))
    predict = predictor(network, batch, grid=(2, 2), latent=NANO_KONTEXT.latent, guidance=1.0)
    x, sigma = torch.randn(2, 4, 64), torch.tensor([0.9, 0.3])
    ids = torch.tensor([[0.0, row, column] for row in (0, 1) for column in (0, 1)])
    places = torch.cat((ids, ids + torch.tensor([1.0, 0.0, 0.0])))
    whole = network(
        torch.cat((x, *batch.references), dim=1),
        places,
        batch.txt,
        torch.zeros(5, 3),
        sigma,
        batch.pooled,
        torch.ones(2),
    )
    assert torch.allclose(predict(x, sigma), whole[:, :4], atol=1e-5)


def test_training_on_one_edit_learns_it() -> None:
    torch.manual_seed(0)
    small = replace(NANO_KONTEXT.transformer, hidden=128, double_blocks=1, single_blocks=1)
    network, generator = fresh_transformer(NANO_KONTEXT, small), torch.Generator().manual_seed(0)
    batch = _batch(torch.randn(2, 4, 64))
    predict = predictor(network, batch, grid=(2, 2), latent=NANO_KONTEXT.latent, guidance=1.0)
    matrices = [weight for weight in network.blocks.double_blocks.parameters() if weight.ndim == 2]
    muon = MatrixMuon(matrices, 0.005)
    taken = set(map(id, matrices))
    rest = [weight for weight in network.parameters() if id(weight) not in taken]
    adam = torch.optim.AdamW(rest, lr=2e-3)
    losses: list[float] = []
    for _ in range(60):
        network.zero_grad()
        loss = flow_loss(predict, batch, logit_normal(1.0, 1.0), generator)
        loss.backward()
        muon.step()
        adam.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_muon_updates_weights_of_any_number_of_axes_in_place() -> None:
    weight = nn.Parameter(torch.randn(4, 3, 3, 3))
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    muon = MatrixMuon([weight], 0.01)
    muon.step()
    assert not torch.equal(weight, before)
    assert weight.shape == before.shape


def test_the_rate_rises_holds_and_falls_to_nothing() -> None:
    rates = [learning_rate(step / 100, warmup=0.05, flat=0.3) for step in range(101)]
    assert rates[0] == 0.0
    assert rates[5] == rates[30] == 1.0
    assert rates[100] == pytest.approx(0.0, abs=1e-9)
    assert rates[30:] == sorted(rates[30:], reverse=True)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    set_rates([optimizer], 0.5)
    set_rates([optimizer], 0.5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)


def test_a_clock_goes_on_where_it_was() -> None:
    clock = Clock(10.0, spent_s=4.0, started=time.monotonic() - 1.0)
    assert clock.progress == pytest.approx(0.5, abs=0.01)


def test_the_average_follows_and_swaps_back() -> None:
    layer = nn.Linear(2, 2)
    average = MovingAverage([layer], 0.5)
    old = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight += 1.0
    average.update()
    new = layer.weight.detach().clone()
    average.swap()
    assert (layer.weight > old).all()
    assert (layer.weight < new).all()
    average.swap()
    assert torch.equal(layer.weight, new)
