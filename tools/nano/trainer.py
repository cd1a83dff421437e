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
from .model import ACTIONS, AuxiliaryHeads, HeadLabels, fresh_transformer
from .pool import (
    TOKEN_PX,
    EncodedScene,
    Pair,
    ScenePool,
    changed_tokens,
    draw_pairs,
    draw_sampled_pairs,
    instruction,
)
from .ranks import Rank, average_gradients, gather_updates, share_from_lead
from .text import EncodedPrompts
from .variants import VARIANTS
from .world import COLOURS, KINDS, SIDE_PX

logger = logging.getLogger(__name__)
CHANGED_WEIGHT = 3.0  # added to the 1 of every token
GROW_EVERY = 3  # steps
_NONE = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowSettings:
    """All numbers of the flow training."""

    variant: str
    seed: int
    budget_s: float
    pairs: int = 32  # per step and process
    muon_rate: float = 0.005
    adam_rate: float = 2e-3
    average: float = 0.997
    first_clusters: int = 250
    capacity: int = 6000
    captions: int = 1500
    caption_every: int = 10  # steps
    samples: int = 1200  # second images
    sampled_every: int = 3  # steps, of a model that takes a second image
    heads_until: float = 0.85  # of the run; then the auxiliary heads hardly count
    save_every_s: float = 180.0
    compiled: bool = False


class NanoTrainer:
    """The training in one process."""

    def __init__(self, rank: Rank, autoencoder: Autoencoder, settings: FlowSettings) -> None:
        torch.manual_seed(settings.seed)
        self.rank, self.settings = rank, settings
        self.variant = VARIANTS[settings.variant]
        self.network, self.text = fresh_transformer(self.variant.family), self.variant.text()
        self.heads = AuxiliaryHeads(self.network, SIDE_PX // TOKEN_PX, self.text.summary_width)
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
        in_muon = set(map(id, matrices))
        others = [weight for weight in self.weights if id(weight) not in in_muon]
        muon = MatrixMuon(
            matrices, self.settings.muon_rate, owner=self.rank.index, owners=self.rank.count
        )
        adam = torch.optim.AdamW(
            others, lr=self.settings.adam_rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        return muon, adam

    def run_step(self, progress: float) -> dict[str, float]:
        """Trains on a batch of captions, edits or edits with a second image; returns the losses."""
        self.progress = progress
        if self.step % GROW_EVERY == 0:
            self.pool.grow()
        pairs = self._draw()
        for module in self.modules:
            module.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, losses = self._loss(pairs)
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
        return losses

    def _draw(self) -> list[Pair]:
        count, settings = self.settings.pairs, self.settings
        if self.step % settings.caption_every == 0:
            return self.rng.choices(self.pool.captions, k=count)
        if self.variant.two_images and self.step % settings.sampled_every == 1:
            return draw_sampled_pairs(self.pool, count, self.rng)
        return draw_pairs(self.pool, count, self.rng)

    def _loss(self, pairs: list[Pair]) -> tuple[Tensor, dict[str, float]]:
        prompts = [instruction(pair, self.rng) for pair in pairs]
        text: EncodedPrompts = self.text(prompts)
        target = torch.stack([pair.after.tokens for pair in pairs])
        before = [pair.before for pair in pairs if pair.before is not None]
        samples = [pair.sample for pair in pairs if pair.sample is not None]
        references = [scenes for scenes in (before, samples) if scenes]
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
            references=tuple(torch.stack([one.tokens for one in scenes]) for scenes in references),
            txt=text.txt,
            pooled=text.pooled,
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
        labels = HeadLabels(
            goal_kinds=torch.stack([scene.kinds for scene in after]),
            goal_colours=torch.stack([scene.colours for scene in after]),
            wishes=torch.tensor(
                [_wish(pair, prompt) for pair, prompt in zip(pairs, prompts, strict=True)]
            ),
            kinds=_labels(references, "kinds"),
            colours=_labels(references, "colours"),
            changed=changed if before else None,
        )
        auxiliary, parts = self.heads.loss(labels, text.summary)
        strength = 0.3 * max(0.0, 1.0 - self.progress / self.settings.heads_until) + 0.02
        losses = {"flow": float(loss.detach())} | parts
        if len(references) != 1:
            kind = "sampled" if references else "caption"
            losses = {f"{kind} {name}": losses[name] for name in ("flow", "goal", "paint")}
        return loss + strength * auxiliary, losses


def _labels(references: list[list[EncodedScene]], name: str) -> Tensor | None:
    """Returns the labels called `name` of the references' tokens, (B, R)."""
    if not references:
        return None
    return torch.cat(
        [torch.stack([getattr(one, name) for one in scenes]) for scenes in references], dim=1
    )


def _wish(pair: Pair, text: str) -> list[int]:
    """Returns an instruction's action, kind and colour as labels; -100 where it names none."""
    edit_colour = pair.after.scene.background
    if pair.action in ("recolour", "add"):
        edit_colour = pair.after.scene.shapes[pair.index].colour
    named = [index for index, kind in enumerate(KINDS) if kind in text.split()]
    return [
        ACTIONS.index(pair.action),
        named[0] if len(named) == 1 else _NONE,
        _NONE if pair.action == "remove" or pair.is_sampled else list(COLOURS).index(edit_colour),
    ]


def train_flow(
    rank: Rank, autoencoder: Autoencoder, out: Path, settings: FlowSettings, resume: bool = False
) -> None:
    """Trains for a time; `out` has the latest weights, averages and clock.

    Args:
        rank: this process.
        autoencoder: already trained.
        out: checkpoint file, written every `save_every_s` seconds and at the end.
        settings: all numbers of the training.
        resume: whether to continue from `out`.
    """
    trainer = NanoTrainer(rank, autoencoder, settings)
    spent = load_checkpoint(trainer, out) if resume else 0.0
    for _ in range(settings.first_clusters):
        trainer.pool.grow()
    trainer.pool.grow_captions(settings.captions)
    if trainer.variant.two_images:
        trainer.pool.grow_samples(settings.samples)
    clock, saved_s, progress = Clock(settings.budget_s, spent), spent, 0.0
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
        if clock.elapsed_s - saved_s > settings.save_every_s:
            saved_s = clock.elapsed_s
            save_checkpoint(trainer, out, clock)
    if rank.leads:
        save_checkpoint(trainer, out, clock)


def save_checkpoint(trainer: NanoTrainer, out: Path, clock: Clock) -> None:
    """Writes everything needed to continue, or to export."""
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
    """Loads the state of a run and returns the seconds it has used."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    for module, weights in zip(trainer.modules, state["modules"], strict=True):
        module.load_state_dict(weights, strict=module is not trainer.heads)
    for average, saved in zip(trainer.average.averages, state["averages"], strict=True):
        average.copy_(saved)
    trainer.step = int(state["step"])
    return float(state["elapsed_s"])
