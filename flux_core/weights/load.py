"""Loads transformers and autoencoders of FLUX from any published layout, and saves our own.

Everything that can be wrong with a file's keys and shapes is said before a weight is read.
Tensors that need no change stay memory-mapped: a 24 GB file is not held twice.
"""

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from ..errors import CheckpointError
from ..image.autoencoder import Autoencoder
from ..operations import Operations
from ..specs import FluxFamily
from ..transformer.flux import Flux, build_flux
from .autoencoder_keys import autoencoder_key_map
from .checkpoint import dtype_name
from .convert import Conversion, check_statistics, plan_conversion
from .detect import (
    AUTOENCODER_SIZING,
    DetectedAutoencoder,
    DetectedFamily,
    describe_decoder,
    describe_size,
    detect_autoencoder,
    detect_family,
    detect_transformer,
    generation_of,
    transformer_sizing,
)
from .key_map import check_shapes, complete_shapes, shapes_of
from .kinds import AUTOENCODERS, QUANTISED, TRANSFORMERS, expect_key_map
from .quantised import open_dequantised
from .transformer_keys import transformer_key_map


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What a loader found in a file and did with it, for people to read."""

    title: str  # the published model, or the kind of part
    known_by: str  # how that is known: "named in the file", "guessed from the file name", …
    guessed: bool
    source: str  # the file or folder, by name
    files: int
    layout: str  # "BFL" or "diffusers"
    prefix: str
    dtype: torch.dtype  # of the module
    tensors: int
    parameters: int
    size: int  # bytes in memory
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One fact per line."""
        shards = f" in {self.files} files" if self.files > 1 else ""
        prefix = f", keys begin with '{self.prefix}'" if self.prefix else ""
        lines = [
            f"{self.title} ({self.known_by})",
            f"{self.source}{shards}, {self.layout} layout{prefix}",
            f"{self.tensors} tensors, {self.parameters:,} parameters, {dtype_name(self.dtype)}, "
            f"{self.size / 1e9:.2f} GB",
            *self.notes,
        ]
        return "\n".join(lines)


def load_flux(
    path: Path,
    *,
    family: FluxFamily | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    operations: Operations | None = None,
    quantised_operations: Operations | None = None,
) -> tuple[Flux, LoadReport]:
    """Loads a FLUX.1 or FLUX.2 transformer.

    Args:
        path: a file, a shard or a folder; see `open_checkpoint`.
        family: None finds it out, see `detect_family`.
        dtype: of the weights; None keeps the file's own, with fewer bits widened to bfloat16.
        device: where the weights go; None leaves them in memory mapped from the file.
        operations: the layer classes; PyTorch's own when None.
        quantised_operations: the layer classes for a file with weights that can stay quantised
            in memory, see `operations.py`; None dequantises them.

    Returns:
        The network in evaluation mode without gradients, and what was found.

    Raises:
        CheckpointError: the file is broken, incomplete or something else.
        FamilyMismatchError: the file cannot be the family that was asked for.
    """
    checkpoint = open_dequantised(path)
    key_map = transformer_key_map(checkpoint.shapes)
    needed = "a FLUX.1 or FLUX.2 transformer"
    key_map = expect_key_map(checkpoint, key_map, needed, (*QUANTISED, *TRANSFORMERS))
    generation = generation_of(key_map.rules)
    source, sizing = path.name, transformer_sizing(generation)
    shapes = complete_shapes(source, key_map, checkpoint.shapes, sizing, generation.latent.name)
    spec = detect_transformer(shapes)
    detected = detect_family(spec, path, checkpoint.metadata, family)
    chosen = detected.family
    twin = build_flux(chosen, spec, device="meta")
    modulation, blocks = shapes_of(twin.modulation), shapes_of(twin.blocks)
    check_shapes(source, key_map, checkpoint.shapes, modulation | blocks, chosen.title)
    keep_quantised = quantised_operations is not None
    conversion = plan_conversion(checkpoint, key_map, dtype, keep_quantised=keep_quantised)
    where: str | torch.device = "meta"
    if conversion.quantised:  # such layers make no weight, and put it on the device they have
        operations, where = quantised_operations, device or "cpu"
    network = build_flux(chosen, spec, dtype=conversion.target, device=where, operations=operations)
    state = conversion.read(device)
    _assign(network.modulation, _half(state, modulation))
    _assign(network.blocks, _half(state, blocks))
    return network, _report(conversion, detected, state, chosen.title, describe_size(spec, chosen))


def load_autoencoder(
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    operations: Operations | None = None,
) -> tuple[Autoencoder, LoadReport]:
    """Loads the autoencoder of FLUX.1 or FLUX.2; arguments, result and errors as in `load_flux`.

    FLUX.2's batch statistics stay float32 whatever the dtype.
    """
    checkpoint = open_dequantised(path)
    key_map = autoencoder_key_map(checkpoint.shapes)
    wanted = "an autoencoder of FLUX.1 or FLUX.2"
    key_map = expect_key_map(checkpoint, key_map, wanted, (*QUANTISED, *AUTOENCODERS))
    source = path.name
    shapes = complete_shapes(source, key_map, checkpoint.shapes, AUTOENCODER_SIZING, wanted)
    detected = detect_autoencoder(shapes, checkpoint.metadata)
    spec = detected.spec
    title = f"The autoencoder of {spec.latent.name}"
    twin = Autoencoder(spec, device="meta")
    check_shapes(source, key_map, checkpoint.shapes, shapes_of(twin), title)
    buffers = {key: buffer.dtype for key, buffer in twin.named_buffers()}
    conversion = plan_conversion(checkpoint, key_map, dtype, buffers)
    module = Autoencoder(spec, dtype=conversion.target, device="meta", operations=operations)
    state = conversion.read(device)
    if module.bn is not None:
        check_statistics(checkpoint, state["bn.running_mean"], state["bn.running_var"])
    _assign(module, state)
    return module, _report(conversion, detected, state, title, describe_decoder(spec))


def save_bfl(module: nn.Module, path: Path, metadata: Mapping[str, str]) -> None:
    """Writes a module under its published names; the file appears whole or not at all.

    Args:
        module: a `Flux`, whose two parts are merged, or any module with published names.
        path: the .safetensors file; one of that name is replaced.
        metadata: goes into the header; `glassbox_family` names the family.

    Raises:
        CheckpointError: the file cannot be written.
    """
    parts = (module.modulation, module.blocks) if isinstance(module, Flux) else (module,)
    state = {
        key: tensor.detach().cpu().contiguous()
        for part in parts
        for key, tensor in part.state_dict().items()
    }
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(state, str(partial), dict(metadata))
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path.name} could not be written ({error}).",
            "a folder that can be written to, with room for the file.",
            "free some space, or choose another folder.",
        ) from error


def _assign(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False).eval()


def _half(state: Mapping[str, Tensor], keys: Container[str]) -> dict[str, Tensor]:
    """Returns the tensors of modulation or blocks, with the scales of their weights."""
    return {
        key: tensor
        for key, tensor in state.items()
        if key in keys or key.rpartition(".")[0] + ".weight" in keys
    }


def _report(
    conversion: Conversion,
    detected: DetectedFamily | DetectedAutoencoder,
    state: Mapping[str, Tensor],
    title: str,
    size: str,
) -> LoadReport:
    checkpoint, key_map = conversion.checkpoint, conversion.key_map
    return LoadReport(
        title=title,
        known_by=detected.known_by,
        guessed=detected.guessed,
        source=checkpoint.path.name,
        files=len(checkpoint.files),
        layout=key_map.layout,
        prefix=key_map.prefix,
        dtype=conversion.target,
        tensors=len(key_map.rules),
        parameters=sum(math.prod(shape) for shape in key_map.shapes(checkpoint.shapes).values()),
        size=sum(tensor.nbytes for tensor in state.values()),
        notes=tuple(note for note in (size, *conversion.notes()) if note),
    )
