"""What a LoRA's header says of its alpha, for files that hold no alpha as tensors.

Source: huggingface/diffusers 0.42.1 loaders/lora_base.py and huggingface/peft LoraConfig.
"""

import json
import math
from dataclasses import dataclass
from typing import cast

from ..errors import CheckpointError
from .files import Checkpoint
from .lora_names import plain_name

_KEY = "lora_adapter_metadata"
_OTHER_FILE = "choose another file in 'Apply LoRA (FLUX)'."


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The part of a PEFT configuration that changes the arithmetic."""

    alpha: float | None = None
    alphas: tuple[tuple[str, float], ...] = ()  # the end of a layer's plain name, its alpha
    is_rank_stabilised: bool = False  # alpha is divided by the root of the rank

    def scale(self, name: str, rank: int) -> float:
        """Give alpha / rank of a layer by its plain name; 1 where nothing is said."""
        alpha = self.alpha
        for end, said in self.alphas:
            if name == end or name.endswith("_" + end):
                alpha = said
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)


def read_config(checkpoint: Checkpoint) -> AdapterConfig:
    """Read the configuration in a file's header, of the transformer's part.

    Raises:
        CheckpointError: it cannot be read, or asks for another kind of adapter.
    """
    text = checkpoint.metadata.get(_KEY)
    if text is None:
        return AdapterConfig()
    try:
        table: object = json.loads(text)
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        raise _unreadable(checkpoint, "is not a JSON object")
    said = {
        key.removeprefix("transformer."): value
        for key, value in cast("dict[str, object]", table).items()
    }
    if said.get("use_dora"):
        raise CheckpointError(
            f"{checkpoint.path.name} is a DoRA, as its header says.",
            "a LoRA or a LoKr.",
            _OTHER_FILE,
        )
    alpha = said.get("lora_alpha")
    patterns: object = said.get("alpha_pattern", {})
    if not isinstance(patterns, dict):
        raise _unreadable(checkpoint, "has an alpha_pattern that is no table")
    return AdapterConfig(
        None if alpha is None else _number(checkpoint, alpha),
        tuple(
            (plain_name(key.lstrip("^")), _number(checkpoint, value))
            for key, value in cast("dict[str, object]", patterns).items()
        ),
        bool(said.get("use_rslora")),
    )


def _number(checkpoint: Checkpoint, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise _unreadable(checkpoint, "has an alpha that is no number")
    return float(value)


def _unreadable(checkpoint: Checkpoint, what: str) -> CheckpointError:
    return CheckpointError(
        f"The {_KEY} in the header of {checkpoint.path.name} {what}.",
        "a header as diffusers writes it.",
        _OTHER_FILE,
    )
