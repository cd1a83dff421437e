"""The transformer of a nano model to be trained, and the heads that teach it while it trains."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...flux_core.specs import FluxFamily, TransformerSpec
from ...flux_core.transformer.flux import Flux, build_flux
from .world import COLOURS, KINDS

ACTIONS = ("recolour", "background", "remove", "add", "caption")
WEIGHTS = {
    "kind": 1.0,
    "colour": 0.5,
    "row": 0.3,
    "column": 0.3,
    "goal": 1.0,
    "paint": 0.5,
    "change": 1.0,
    "wish": 0.2,
}


def fresh_transformer(family: FluxFamily, spec: TransformerSpec | None = None) -> Flux:
    """Build a nano transformer, or one of another shape, with weights to train.

    Modulation and the last layer start at zero, so every block starts as the identity.
    """
    network = build_flux(family, spec)
    for name, weight in network.named_parameters():
        if name.endswith("scale"):
            nn.init.ones_(weight)
        elif weight.ndim == 1 or ".lin." in name or "adaLN" in name or "final_layer.linear" in name:
            nn.init.zeros_(weight)
        else:
            nn.init.normal_(weight, std=1.0 / math.sqrt(weight.shape[1]))
    return network


@dataclass(frozen=True, slots=True)
class Lesson:
    """What the heads should say about a batch; -100 where it is not known or not said."""

    goal_kinds: Tensor  # (B, N) of the target's tokens: 0 background, 1.. KINDS
    goal_colours: Tensor  # (B, N)
    wishes: Tensor  # (B, 3) action, kind meant, colour asked for
    kinds: Tensor | None = None  # (B, R) of the references' tokens, if there are any
    colours: Tensor | None = None
    changed: Tensor | None = None  # (B, N) bool, which target tokens change


class TeachingHeads(nn.Module):
    """What the network has to know half-way: read off its tokens while training, then dropped.

    After the double blocks each reference token says which kind of shape it belongs to and its
    colour, and each target token its row and column, which it can only know from the text's
    place at the origin; after `MIDDLE` single blocks each target token says whether it will
    change and what it will show. The text's summary says what is asked.
    """

    MIDDLE = 2

    def __init__(self, network: Flux, side: int, summary_width: int) -> None:
        super().__init__()
        self.side, hidden = side, network.spec.hidden
        self.kind = nn.Linear(hidden, len(KINDS) + 1)
        self.colour = nn.Linear(hidden, len(COLOURS))
        self.row, self.column = nn.Linear(hidden, side), nn.Linear(hidden, side)
        self.changes = nn.Linear(hidden, 1)
        self.goal_kind = nn.Linear(hidden, len(KINDS) + 1)
        self.goal_colour = nn.Linear(hidden, len(COLOURS))
        told = len(ACTIONS) + len(KINDS) + len(COLOURS)
        self.wish = nn.Linear(summary_width, told)
        self.taps: dict[str, Tensor] = {}
        network.blocks.double_blocks[-1].register_forward_hook(self._keep_image)
        network.blocks.single_blocks[self.MIDDLE - 1].register_forward_hook(self._keep_joint)

    def _keep_image(self, _module: nn.Module, _inputs: object, output: tuple[Tensor, ...]) -> None:
        self.taps["image"] = output[0]

    def _keep_joint(self, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        self.taps["joint"] = output

    def loss(self, lesson: Lesson, summary: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Read the taps of the last forward pass; summary (B, W) is the text's."""
        batch, count = lesson.goal_kinds.shape
        image, joint = (
            F.layer_norm(self.taps[name].float(), (self.kind.in_features,))
            for name in ("image", "joint")
        )
        early, references = image[:, :count], image[:, count:]
        start = joint.shape[1] - image.shape[1]
        late = joint[:, start : start + count]
        place = torch.arange(count).expand(batch, -1)
        parts = {
            "row": _tell(self.row(early), place // self.side),
            "column": _tell(self.column(early), place % self.side),
            "goal": _tell(self.goal_kind(late), lesson.goal_kinds),
            "paint": _tell(self.goal_colour(late), lesson.goal_colours),
        }
        if lesson.kinds is not None and lesson.colours is not None and lesson.changed is not None:
            parts["kind"] = _tell(self.kind(references), lesson.kinds)
            parts["colour"] = _tell(self.colour(references), lesson.colours)
            parts["change"] = F.binary_cross_entropy_with_logits(
                self.changes(late).squeeze(-1), lesson.changed.float()
            )
        sizes = [len(ACTIONS), len(KINDS), len(COLOURS)]
        told = self.wish(summary.float()).split(sizes, dim=-1)
        parts["wish"] = torch.stack(
            [_tell(one, lesson.wishes[:, number]) for number, one in enumerate(told)]
        ).nansum()
        unused = sum((weight.sum() for weight in self.parameters()), torch.zeros(()))
        total = sum((WEIGHTS[name] * part for name, part in parts.items()), 0.0 * unused)
        return total, {name: float(part.detach()) for name, part in parts.items()}


def _tell(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy over the last axis, leaving out -100."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())
