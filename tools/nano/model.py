"""A nano transformer to be trained, and the auxiliary heads that help its training."""

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
    """Returns a nano transformer, or one of another shape, with initial weights.

    Modulation and the last layer are zero at first, so every block starts as the identity.
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
class HeadLabels:
    """What the auxiliary heads should predict of a batch; -100 where that is unknown."""

    goal_kinds: Tensor  # (B, N) of the target's tokens: 0 background, 1.. KINDS
    goal_colours: Tensor  # (B, N)
    wishes: Tensor  # (B, 3) action, kind meant, colour asked for
    kinds: Tensor | None = None  # (B, R) of the references' tokens, if there are any
    colours: Tensor | None = None
    changed: Tensor | None = None  # (B, N) bool, which target tokens change


class AuxiliaryHeads(nn.Module):
    """Linear heads on the network's inner tokens, used while training and dropped afterwards.

    After the double blocks they predict the kind and colour of the shape from each reference
    token, and row and column from each target token, which only attention to the text, at the
    origin, can give it. After `MIDDLE` single blocks they predict from each target token whether it
    changes and what it will show, and from the text's summary what is asked for.
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
        wishes = len(ACTIONS) + len(KINDS) + len(COLOURS)
        self.wish = nn.Linear(summary_width, wishes)
        self.taps: dict[str, Tensor] = {}
        network.blocks.double_blocks[-1].register_forward_hook(self._record_image)
        network.blocks.single_blocks[self.MIDDLE - 1].register_forward_hook(self._record_joint)

    def _record_image(
        self, _module: nn.Module, _inputs: object, output: tuple[Tensor, ...]
    ) -> None:
        self.taps["image"] = output[0]

    def _record_joint(self, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        self.taps["joint"] = output

    def loss(self, labels: HeadLabels, summary: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Returns the heads' loss on the last forward pass; summary (B, W) is the text's."""
        batch, count = labels.goal_kinds.shape
        image, joint = (
            F.layer_norm(self.taps[name].float(), (self.kind.in_features,))
            for name in ("image", "joint")
        )
        early, references = image[:, :count], image[:, count:]
        start = joint.shape[1] - image.shape[1]
        late = joint[:, start : start + count]
        index = torch.arange(count).expand(batch, -1)
        parts = {
            "row": _cross_entropy(self.row(early), index // self.side),
            "column": _cross_entropy(self.column(early), index % self.side),
            "goal": _cross_entropy(self.goal_kind(late), labels.goal_kinds),
            "paint": _cross_entropy(self.goal_colour(late), labels.goal_colours),
        }
        if labels.kinds is not None and labels.colours is not None and labels.changed is not None:
            parts["kind"] = _cross_entropy(self.kind(references), labels.kinds)
            parts["colour"] = _cross_entropy(self.colour(references), labels.colours)
            parts["change"] = F.binary_cross_entropy_with_logits(
                self.changes(late).squeeze(-1), labels.changed.float()
            )
        sizes = [len(ACTIONS), len(KINDS), len(COLOURS)]
        asked = self.wish(summary.float()).split(sizes, dim=-1)
        parts["wish"] = torch.stack(
            [_cross_entropy(one, labels.wishes[:, number]) for number, one in enumerate(asked)]
        ).nansum()
        unused = sum((weight.sum() for weight in self.parameters()), torch.zeros(()))
        total = sum((WEIGHTS[name] * part for name, part in parts.items()), 0.0 * unused)
        return total, {name: float(part.detach()) for name, part in parts.items()}


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross entropy over the last axis; labels of -100 are ignored."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())
