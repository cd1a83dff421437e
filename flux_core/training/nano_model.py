"""The trainable parts of the nano Kontext, and the heads that teach it while it trains."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..families import NANO_KONTEXT
from ..nano.paths import CLIP_TOKENIZER, T5_TOKENIZER
from ..nano.world import COLOURS, KINDS
from ..operations import torch_operations
from ..specs import TransformerSpec
from ..text.modules import ClipSpec, T5Spec, build_clip, build_t5
from ..text.tokenizers import load_clip_tokenizer, load_t5_tokenizer
from ..transformer.flux import Flux, build_flux

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


def nano_text_specs() -> tuple[ClipSpec, T5Spec]:
    """Shapes of the text encoders, with a vocabulary that fits the tokenizers."""
    text, shape = NANO_KONTEXT.text, NANO_KONTEXT.transformer
    clip = ClipSpec(
        width=shape.pooled_width,
        layers=2,
        ffn=2 * shape.pooled_width,
        vocabulary=672,
        positions=text.clip_tokens,
    )
    t5 = T5Spec(
        width=shape.context_width,
        layers=2,
        ffn=2 * shape.context_width,
        vocabulary=64,
        heads=4,
        head_dim=32,
    )
    return clip, t5


def fresh_weights(shapes: dict[str, tuple[int, ...]], embedding: float) -> dict[str, Tensor]:
    """Draw weights by name and shape: gains 1, biases 0, matrices 1 / sqrt(columns).

    Args:
        shapes: names and shapes of a text encoder.
        embedding: size of the token embeddings' elements.
    """
    weights: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if name.endswith("bias"):
            weights[name] = torch.zeros(shape)
        elif len(shape) == 1:
            weights[name] = torch.ones(shape)
        elif "token" in name:
            weights[name] = torch.randn(shape) * embedding
        elif "position_embedding" in name or "relative" in name:
            weights[name] = torch.randn(shape) * 0.1
        else:
            weights[name] = torch.randn(shape) / math.sqrt(shape[1])
        if ".SelfAttention.q." in name:  # T5 does not divide by the root of the head's width
            weights[name] /= math.sqrt(32)
    return weights


class NanoText(nn.Module):
    """CLIP and T5 at nano size, trained with the transformer."""

    def __init__(self) -> None:
        super().__init__()
        clip_spec, t5_spec = nano_text_specs()
        ops = torch_operations()
        clip = build_clip(clip_spec, dtype=torch.float32, operations=ops)
        t5 = build_t5(t5_spec, dtype=torch.float32, operations=ops)
        prefix = "text_model." if hasattr(clip, "text_model") else ""  # transformers 4
        drawn = fresh_weights(clip_spec.shapes(), 0.3)
        clip.load_state_dict({prefix + name: value for name, value in drawn.items()}, assign=True)
        t5.load_state_dict(fresh_weights(t5_spec.shapes(), 1.0), assign=True)
        self.clip, self.t5 = clip.requires_grad_(True), t5.requires_grad_(True)
        self._clip_tokenizer = load_clip_tokenizer(CLIP_TOKENIZER)
        self._t5_tokenizer = load_t5_tokenizer(T5_TOKENIZER)
        self._known: dict[str, tuple[Tensor, Tensor]] = {}

    def forward(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode prompts: txt (B, T, E) and pooled (B, P), as `TextEncoders` does."""
        rows = [self._ids(prompt) for prompt in prompts]
        clip_ids, t5_ids = (torch.cat(column) for column in zip(*rows, strict=True))
        hidden = self.clip(input_ids=clip_ids).last_hidden_state
        end = (clip_ids == self._clip_tokenizer.end_id).int().argmax(dim=1)
        pooled = hidden[torch.arange(len(rows)), end]
        return self.t5(input_ids=t5_ids, attention_mask=None).last_hidden_state, pooled

    def _ids(self, prompt: str) -> tuple[Tensor, Tensor]:
        if prompt not in self._known:
            text = NANO_KONTEXT.text
            self._known[prompt] = (
                self._clip_tokenizer.encode(prompt, text.clip_tokens).ids,
                self._t5_tokenizer.encode(prompt, text.t5_tokens).ids,
            )
        return self._known[prompt]


def fresh_transformer(spec: TransformerSpec | None = None) -> Flux:
    """Build the nano transformer, or one of another shape, with weights to train.

    Modulation and the last layer start at zero, so every block starts as the identity.
    """
    network = build_flux(NANO_KONTEXT, spec)
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
    kinds: Tensor | None = None  # (B, N) of the reference's tokens, if there is one
    colours: Tensor | None = None
    changed: Tensor | None = None  # (B, N) bool, which target tokens change


class TeachingHeads(nn.Module):
    """What the network has to know half-way: read off its tokens while training, then dropped.

    After the double blocks each reference token says which kind of shape it belongs to and its
    colour, and each target token its row and column, which it can only know from the text's
    place at the origin; after `MIDDLE` single blocks each target token says whether it will
    change and what it will show. CLIP's pooled vector says what is asked.
    """

    MIDDLE = 2

    def __init__(self, network: Flux, side: int) -> None:
        super().__init__()
        self.side, hidden = side, network.spec.hidden
        self.kind = nn.Linear(hidden, len(KINDS) + 1)
        self.colour = nn.Linear(hidden, len(COLOURS))
        self.row, self.column = nn.Linear(hidden, side), nn.Linear(hidden, side)
        self.changes = nn.Linear(hidden, 1)
        self.goal_kind = nn.Linear(hidden, len(KINDS) + 1)
        self.goal_colour = nn.Linear(hidden, len(COLOURS))
        told = len(ACTIONS) + len(KINDS) + len(COLOURS)
        self.wish = nn.Linear(network.spec.pooled_width, told)
        self.taps: dict[str, Tensor] = {}
        network.blocks.double_blocks[-1].register_forward_hook(self._keep_image)
        network.blocks.single_blocks[self.MIDDLE - 1].register_forward_hook(self._keep_joint)

    def _keep_image(self, _module: nn.Module, _inputs: object, output: tuple[Tensor, ...]) -> None:
        self.taps["image"] = output[0]

    def _keep_joint(self, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        self.taps["joint"] = output

    def loss(self, lesson: Lesson, pooled: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Read the taps of the last forward pass; pooled (B, P) is CLIP's."""
        batch, count = lesson.goal_kinds.shape
        image, joint = (
            F.layer_norm(self.taps[name].float(), (self.kind.in_features,))
            for name in ("image", "joint")
        )
        early, reference = image[:, :count], image[:, count:]
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
            parts["kind"] = _tell(self.kind(reference), lesson.kinds)
            parts["colour"] = _tell(self.colour(reference), lesson.colours)
            parts["change"] = F.binary_cross_entropy_with_logits(
                self.changes(late).squeeze(-1), lesson.changed.float()
            )
        sizes = [len(ACTIONS), len(KINDS), len(COLOURS)]
        told = self.wish(pooled.float()).split(sizes, dim=-1)
        parts["wish"] = torch.stack(
            [_tell(one, lesson.wishes[:, number]) for number, one in enumerate(told)]
        ).nansum()
        unused = sum((weight.sum() for weight in self.parameters()), torch.zeros(()))
        total = sum((WEIGHTS[name] * part for name, part in parts.items()), 0.0 * unused)
        return total, {name: float(part.detach()) for name, part in parts.items()}


def _tell(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy over the last axis, leaving out -100."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())
