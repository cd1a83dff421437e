"""Flow training of a nano model: transformer and text encoders together."""

import logging
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...flux_core.image.autoencoder import Autoencoder
from ...flux_core.training.flow import FlowBatch, flow_loss, logit_normal, predictor
from ...flux_core.training.optim import Clock, MatrixMuon, MovingAverage, learning_rate, set_rates
from .model import ACTIONS, Lesson, TeachingHeads, fresh_transformer
from .pool import (
    TOKEN_PX,
    Pair,
    Picture,
    ScenePool,
    changed_tokens,
    draw_pairs,
    draw_sampled_pairs,
    spoken,
)
from .ranks import Rank, average_gradients, gather_updates, share_from_lead
from .text import Said
from .variants import VARIANTS
from .world import COLOURS, KINDS, SIDE_PX

logger = logging.getLogger(__name__)
CHANGED_WEIGHT = 3.0  # beside the 1 of every token
GROW_EVERY = 3  # steps
_NONE = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowSettings:
    """How the flow is trained."""

    variant: str
    seed: int
    budget_s: float
    pairs: int = 32  # a step, in each process
    muon_rate: float = 0.005
    adam_rate: float = 2e-3
    average: float = 0.997
    first_clusters: int = 250
    capacity: int = 6000
    captions: int = 1500
    caption_every: int = 10  # steps
    samples: int = 1200  # second pictures
    sampled_every: int = 3  # steps, of a model that takes a second picture
    teach_until: float = 0.85  # of the run
    keep_every_s: float = 180.0
    compiled: bool = False


class NanoTrainer:
    """One process's share of the training."""

    def __init__(self, rank: Rank, autoencoder: Autoencoder, settings: FlowSettings) -> None:
        torch.manual_seed(settings.seed)
        self.rank, self.settings = rank, settings
        self.variant = VARIANTS[settings.variant]
        self.network, self.text = fresh_transformer(self.variant.family), self.variant.text()
        self.heads = TeachingHeads(self.network, SIDE_PX // TOKEN_PX, self.text.summary_width)
        self.modules: list[nn.Module] = [self.network, self.text, self.heads]
        self.weights = [weight for module in self.modules for weight in module.parameters()]
        self.muon, self.adam = self._optimizers()
        self.average = MovingAverage([self.network, self.text], settings.average)
        own = settings.seed * 1000 + rank.index
        self.rng, self.generator = random.Random(own), torch.Generator().manual_seed(own)
        self.pool = ScenePool(autoencoder, seed=own + 500, capacity=settings.capacity)
        self.density = logit_normal(1.2, 1.3)
        self.step, self.progress = 0, 0.0
        if settings.compiled:
            for block in (*self.network.blocks.double_blocks, *self.network.blocks.single_blocks):
                block.forward = torch.compile(block.forward, dynamic=False)

    def _optimizers(self) -> tuple[MatrixMuon, torch.optim.Optimizer]:
        blocks = self.network.blocks
        inside = [*blocks.double_blocks.parameters(), *blocks.single_blocks.parameters()]
        matrices = [weight for weight in inside if weight.ndim == 2]
        taken = set(map(id, matrices))
        others = [weight for weight in self.weights if id(weight) not in taken]
        muon = MatrixMuon(
            matrices, self.settings.muon_rate, owner=self.rank.index, owners=self.rank.count
        )
        adam = torch.optim.AdamW(
            others, lr=self.settings.adam_rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        return muon, adam

    def run_step(self, progress: float) -> dict[str, float]:
        """Train on one batch: captions, edits with a second picture, or edits without."""
        self.progress = progress
        if self.step % GROW_EVERY == 0:
            self.pool.grow()
        pairs = self._draw()
        for module in self.modules:
            module.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, told = self._loss(pairs)
        loss.backward()
        average_gradients(self.weights, self.rank)
        rate = learning_rate(progress, warmup=0.01, flat=0.2)
        set_rates([self.muon.optimizer, self.adam], rate)
        torch.nn.utils.clip_grad_norm_(
            [weight for group in self.adam.param_groups for weight in group["params"]], 1.0
        )
        self.muon.step()
        self.adam.step()
        gather_updates(self.muon.shares, self.rank)
        self.average.update()
        self.step += 1
        return told

    def _draw(self) -> list[Pair]:
        count, settings = self.settings.pairs, self.settings
        if self.step % settings.caption_every == 0:
            return self.rng.choices(self.pool.captions, k=count)
        if self.variant.two_pictures and self.step % settings.sampled_every == 1:
            return draw_sampled_pairs(self.pool, count, self.rng)
        return draw_pairs(self.pool, count, self.rng)

    def _loss(self, pairs: list[Pair]) -> tuple[Tensor, dict[str, float]]:
        prompts = [spoken(pair, self.rng) for pair in pairs]
        said: Said = self.text(prompts)
        target = torch.stack([pair.after.tokens for pair in pairs])
        before = [pair.before for pair in pairs if pair.before is not None]
        samples = [pair.sample for pair in pairs if pair.sample is not None]
        seen = [pictures for pictures in (before, samples) if pictures]
        weight = torch.ones(target.shape[:2])
        changed = torch.zeros(target.shape[:2], dtype=torch.bool)
        if before:
            changed = torch.stack(
                [changed_tokens(a, p.after) for a, p in zip(before, pairs, strict=True)]
            )
            weight += CHANGED_WEIGHT * changed
        side = SIDE_PX // TOKEN_PX
        batch = FlowBatch(
            target=target,
            references=tuple(torch.stack([one.tokens for one in pictures]) for pictures in seen),
            txt=said.txt,
            pooled=said.pooled,
            weight=weight,
        )
        family = self.variant.family
        predict = predictor(
            self.network,
            batch,
            grid=(side, side),
            latent=family.latent,
            guidance=family.default_guidance,
        )
        loss = flow_loss(predict, batch, self.density, self.generator)
        after = [pair.after for pair in pairs]
        lesson = Lesson(
            goal_kinds=torch.stack([picture.kinds for picture in after]),
            goal_colours=torch.stack([picture.colours for picture in after]),
            wishes=torch.tensor([_wish(p, text) for p, text in zip(pairs, prompts, strict=True)]),
            kinds=_labels(seen, "kinds"),
            colours=_labels(seen, "colours"),
            changed=changed if before else None,
        )
        taught, parts = self.heads.loss(lesson, said.summary)
        strength = 0.3 * max(0.0, 1.0 - self.progress / self.settings.teach_until) + 0.02
        told = {"flow": float(loss.detach())} | parts
        if len(seen) != 1:
            kind = "sampled" if seen else "caption"
            told = {f"{kind} {name}": told[name] for name in ("flow", "goal", "paint")}
        return loss + strength * taught, told


def _labels(seen: list[list[Picture]], name: str) -> Tensor | None:
    """Give what the references' tokens show, (B, R)."""
    if not seen:
        return None
    return torch.cat([torch.stack([getattr(one, name) for one in part]) for part in seen], dim=1)


def _wish(pair: Pair, text: str) -> list[int]:
    """What an instruction says: action, kind, colour asked for; -100 where it does not."""
    edit_colour = pair.after.scene.background
    if pair.action in ("recolour", "add"):
        edit_colour = pair.after.scene.shapes[pair.index].colour
    named = [place for place, kind in enumerate(KINDS) if kind in text.split()]
    return [
        ACTIONS.index(pair.action),
        named[0] if len(named) == 1 else _NONE,
        _NONE if pair.action == "remove" or pair.is_sampled else list(COLOURS).index(edit_colour),
    ]


def train_flow(
    rank: Rank, autoencoder: Autoencoder, out: Path, settings: FlowSettings, resume: bool = False
) -> None:
    """Train for a time; `out` holds the latest weights, averages and clock.

    Args:
        rank: this process.
        autoencoder: trained.
        out: checkpoint file, written every `keep_every_s` seconds and at the end.
        settings: all numbers.
        resume: go on from `out`.
    """
    trainer = NanoTrainer(rank, autoencoder, settings)
    spent = load_checkpoint(trainer, out) if resume else 0.0
    for _ in range(settings.first_clusters):
        trainer.pool.grow()
    trainer.pool.grow_captions(settings.captions)
    if trainer.variant.two_pictures:
        trainer.pool.grow_samples(settings.samples)
    clock, kept, progress = Clock(settings.budget_s, spent), spent, 0.0
    sums: dict[str, list[float]] = {}
    while progress < 1.0:
        (progress,) = share_from_lead([clock.progress], rank)
        for name, value in trainer.run_step(progress).items():
            sums.setdefault(name, []).append(value)
        if not rank.leads:
            continue
        if trainer.step % 50 == 0:
            means = " ".join(f"{name} {sum(v) / len(v):.4f}" for name, v in sums.items())
            logger.info("flow step %d, %.0f s: %s", trainer.step, clock.elapsed_s, means)
            sums.clear()
        if clock.elapsed_s - kept > settings.keep_every_s:
            kept = clock.elapsed_s
            save_checkpoint(trainer, out, clock)
    if rank.leads:
        save_checkpoint(trainer, out, clock)


def save_checkpoint(trainer: NanoTrainer, out: Path, clock: Clock) -> None:
    """Write everything needed to go on, or to export."""
    state = {
        "modules": [module.state_dict() for module in trainer.modules],
        "averages": trainer.average.averages,
        "step": trainer.step,
        "elapsed_s": clock.elapsed_s,
    }
    part = out.with_suffix(".part")
    torch.save(state, part)
    part.replace(out)


def load_checkpoint(trainer: NanoTrainer, path: Path) -> float:
    """Take a run up again; give the seconds it has used."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    for module, weights in zip(trainer.modules, state["modules"], strict=True):
        module.load_state_dict(weights, strict=module is not trainer.heads)
    for average, kept in zip(trainer.average.averages, state["averages"], strict=True):
        average.copy_(kept)
    trainer.step = int(state["step"])
    return float(state["elapsed_s"])
