"""A tiny FLUX.1 network with random weights, what it is fed, and networks that only watch."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from glassbox.flux_core.families import FLUX1_KONTEXT, FLUX1_LATENT
from glassbox.flux_core.sampling.job import Job
from glassbox.flux_core.sampling.noise import make_noise
from glassbox.flux_core.sampling.run import run
from glassbox.flux_core.sampling.solvers import Step
from glassbox.flux_core.specs import FluxFamily, TransformerSpec
from glassbox.flux_core.tokens.ids import place
from glassbox.flux_core.transformer.flux import Flux, build_flux
from glassbox.flux_core.values import Conditioning, Reference, TextFeatures, Tokens

TEXT, POOLED = 48, 24
SPEC = TransformerSpec(
    hidden=32,
    double_blocks=2,
    single_blocks=2,
    mlp_ratio=4.0,
    in_channels=64,
    out_channels=64,
    context_width=TEXT,
    pooled_width=POOLED,
    has_guidance=True,
    axes_dim=(4, 6, 6),
    theta=10_000.0,
)


def network(family: FluxFamily = FLUX1_KONTEXT, spec: TransformerSpec = SPEC) -> Flux:
    torch.manual_seed(0)
    net = build_flux(family, spec, dtype=torch.float32)
    for name, parameter in net.named_parameters():  # scales near 1: else all tokens look alike
        torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("norm.scale") else 0.0, std=0.1)
    return net.eval()


def noise(seed: int = 0, *, width: int = 48, height: int = 32, batch: int = 1) -> Tokens:
    return make_noise(FLUX1_LATENT, height, width, seed, batch)


def picture(seed: int, *, batch: int = 1, size: int = 32, index: float = 1.0) -> Tokens:
    drawn = noise(seed, width=size, height=size, batch=batch)
    return place(replace(drawn, is_noise=False), index=index)


def conditioning(
    seed: int, *references: Tokens, batch: int = 1, length: int = 5, guidance: float | None = 2.5
) -> Conditioning:
    draw = torch.Generator().manual_seed(seed)
    text = TextFeatures(
        txt=torch.randn(batch, length, TEXT, generator=draw),
        pooled=torch.randn(batch, POOLED, generator=draw),
    )
    seen = tuple(Reference(tokens=tokens) for tokens in references)
    return Conditioning(text=text, references=seen, guidance=guidance)


def steps(net, one: Conditioning, target: Tokens, sigmas: Tensor, **settings) -> list[Step]:
    """Runs a job to its end."""
    return list(run(net, Job(conditioning=one, noise=target, sigmas=sigmas, **settings)))


def last(net, one: Conditioning, target: Tokens, sigmas: Tensor, **settings) -> Tensor:
    """The x that a run ends with."""
    return steps(net, one, target, sigmas, **settings)[-1].x


class Constant:
    """A network of one velocity, whatever it is asked."""

    family, spec, supports = FLUX1_KONTEXT, SPEC, frozenset[str]()
    device = torch.device("cpu")

    def __init__(self, constant: Tensor) -> None:
        self.constant = constant

    def plans(self, conditionings: Sequence[Conditioning], target, sigmas, asked=None):
        return [self for _ in conditionings]

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        return self.constant


class Recording:
    """A real network; it remembers its plans, what they held at first, and each call."""

    supports = Flux.supports

    def __init__(self, net: Flux) -> None:
        self.network, self.family, self.spec = net, net.family, net.spec
        self.conditionings: list[Conditioning] = []
        self.planned: list[float] = []  # the noise levels that were announced
        self.plans_made: list = []
        self.held_at_first: list[list[Tensor]] = []
        self.seen: list[tuple[float, Tensor]] = []

    def plans(self, conditionings: Sequence[Conditioning], target, sigmas, asked=None):
        self.conditionings += conditionings
        self.planned += sigmas[:-1] if asked is None else asked
        made = self.network.plans(conditionings, target, sigmas, asked)
        self.plans_made += made
        self.held_at_first += [everything(plan) for plan in made]
        return [_Recorded(self, plan) for plan in made]


class _Recorded:
    def __init__(self, recording: Recording, plan) -> None:
        self.recording, self.plan, self.device = recording, plan, plan.device

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        self.recording.seen.append((sigma, x.clone()))
        return self.plan.velocity(x, sigma)


def everything(plan) -> list[Tensor]:
    """Copies every tensor a plan holds: text, references, rotations, modulation; no weights."""
    held = [tensor.clone() for tensor in _tensors(plan)]
    assert len(held) > 4
    return held


def _tensors(value) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)
    else:
        for name in getattr(value, "__dataclass_fields__", None) or ():
            yield from _tensors(getattr(value, name))
