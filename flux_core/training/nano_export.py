"""Writes a trained nano model into the files that the pack carries."""

from pathlib import Path

import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from ..families import NANO_KONTEXT
from ..image.autoencoder import Autoencoder
from ..nano import paths
from ..weights.detect import FAMILY_KEY
from ..weights.load import save_bfl
from .nano_model import NanoText, fresh_transformer

METADATA = {FAMILY_KEY: NANO_KONTEXT.name, "format": "pt"}


def export_flow(checkpoint: Path, folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write transformer and text encoders of a checkpoint, with their averaged weights.

    Args:
        checkpoint: written by `train_flow`.
        folder: takes the files under the names of `nano.paths`.
        dtype: of the transformer's matrices; all else stays float32.
    """
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    network, text = fresh_transformer(), NanoText()
    averages: list[Tensor] = state["averages"]
    weights = [*network.parameters(), *text.parameters()]
    with torch.no_grad():
        for weight, average in zip(weights, averages, strict=True):
            weight.copy_(average)
    network.to(dtype)
    (folder / paths.DIFFUSION_MODELS.name).mkdir(parents=True, exist_ok=True)
    save_bfl(network, _inside(folder, paths.TRANSFORMER), METADATA)
    _save_text(text.clip, _inside(folder, paths.CLIP), "text_model.")
    _save_text(text.t5, _inside(folder, paths.T5), "encoder.")


def export_autoencoder(
    model: Autoencoder, folder: Path, *, dtype: torch.dtype = torch.float16
) -> None:
    """Write the autoencoder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_bfl(model.to(dtype), _inside(folder, paths.AUTOENCODER), METADATA)


def _inside(folder: Path, path: Path) -> Path:
    return folder / path.relative_to(paths.FOLDER)


def _save_text(module: nn.Module, path: Path, prefix: str) -> None:
    """Write a text encoder with the names of its published single file."""
    state = {
        prefix + name.removeprefix(prefix): value.detach().clone().contiguous()
        for name, value in module.state_dict().items()
        if not name.endswith("position_ids")
    }
    if prefix == "encoder.":
        state["shared.weight"] = state.pop("encoder.embed_tokens.weight")
    save_file(state, str(path), METADATA)
