"""Writes a trained nano model into the files that the pack ships."""

from pathlib import Path

import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from ...flux_core.image.autoencoder import Autoencoder
from ...flux_core.nano import paths
from ...flux_core.weights.detect import FAMILY_KEY
from ...flux_core.weights.load import save_bfl
from .model import fresh_transformer
from .variants import NanoVariant


def export_flow(
    variant: NanoVariant, checkpoint: Path, folder: Path, *, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Writes transformer and text encoders of a checkpoint, with their averaged weights.

    Args:
        checkpoint: written by `train_flow`.
        folder: for the files, under the names in `nano.paths`.
        dtype: of the transformer's matrices; all else stays float32.
    """
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    network, text = fresh_transformer(variant.family), variant.text()
    averages: list[Tensor] = state["averages"]
    weights = [*network.parameters(), *text.parameters()]
    with torch.no_grad():
        for weight, average in zip(weights, averages, strict=True):
            weight.copy_(average)
    network.to(dtype)
    (folder / paths.DIFFUSION_MODELS.name).mkdir(parents=True, exist_ok=True)
    save_bfl(network, _inside(folder, variant.files.transformer), _metadata(variant))
    for (name, prefix), file in zip(variant.text_parts, variant.files.text_encoders, strict=True):
        _save_text(getattr(text, name), _inside(folder, file), prefix, _metadata(variant))


def export_autoencoder(
    variant: NanoVariant, model: Autoencoder, folder: Path, *, dtype: torch.dtype = torch.float16
) -> None:
    """Writes the autoencoder."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in (model.encoder, model.decoder):  # the latent's statistics stay float32
        part.to(dtype)
    save_bfl(model, _inside(folder, variant.files.autoencoder), _metadata(variant))


def _metadata(variant: NanoVariant) -> dict[str, str]:
    return {FAMILY_KEY: variant.family.name, "format": "pt"}


def _inside(folder: Path, path: Path) -> Path:
    return folder / path.relative_to(paths.FOLDER)


def _save_text(module: nn.Module, path: Path, prefix: str, metadata: dict[str, str]) -> None:
    """Writes a text encoder under the names of its published single file."""
    state = {
        prefix + name.removeprefix(prefix): value.detach().clone().contiguous()
        for name, value in module.state_dict().items()
        if not name.endswith("position_ids")
    }
    if prefix == "encoder.":
        state["shared.weight"] = state.pop("encoder.embed_tokens.weight")
    save_file(state, str(path), metadata)
