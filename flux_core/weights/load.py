"""Load transformers and autoencoders of FLUX from any published layout, and save our own.

Everything that can be wrong with a file's keys and shapes is said before a weight is read.
Tensors that need no change stay memory-mapped: a 24 GB file is not held twice.
"""

import math
from collections.abc import Container, Mapping
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
from .autoencoder_keys import autoencoder_layout
from .check import check_tensors, complete_tensors, expect_layout, shapes_of
from .choose import choose_family, differences
from .convert import Conversion, check_statistics, plan_conversion
from .detect import (
    AUTOENCODER_SIZING,
    Known,
    flux_sizing,
    generation_of,
    narrow_decoder,
    spec_of_autoencoder,
    spec_of_flux,
)
from .kinds import AUTOENCODERS, QUANTISED, TRANSFORMERS
from .quantised_layers import open_plain
from .report import LoadReport
from .transformer_keys import transformer_layout


def load_flux(
    path: Path,
    *,
    family: FluxFamily | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    operations: Operations | None = None,
    stored_operations: Operations | None = None,
) -> tuple[Flux, LoadReport]:
    """Load a FLUX.1 or FLUX.2 transformer.

    Args:
        path: a file, a shard or a folder; see `open_checkpoint`.
        family: None finds it out, see `choose_family`.
        dtype: of the weights; None keeps the file's own, with fewer bits widened to bfloat16.
        device: where the weights go; None leaves them in memory mapped from the file.
        operations: the layer classes; PyTorch's own when None.
        stored_operations: the layer classes for a file with quantised weights that can stay in
            memory as they are stored, see `operations.py`; None makes them plain.

    Returns:
        The network in evaluation mode without gradients, and what was found.

    Raises:
        CheckpointError: the file is broken, incomplete or something else.
        FamilyMismatchError: the file cannot be the family that was asked for.
    """
    checkpoint = open_plain(path)
    layout = transformer_layout(checkpoint.shapes)
    needed = "a FLUX.1 or FLUX.2 transformer"
    layout = expect_layout(checkpoint, layout, needed, (*QUANTISED, *TRANSFORMERS))
    generation = generation_of(layout.recipes)
    shapes = complete_tensors(checkpoint, layout, flux_sizing(generation), generation.latent.name)
    spec = spec_of_flux(shapes)
    chosen, known = choose_family(spec, path, checkpoint.metadata, family)
    twin = build_flux(chosen, spec, device="meta")
    modulation, blocks = shapes_of(twin.modulation), shapes_of(twin.blocks)
    check_tensors(checkpoint, layout, shapes, modulation | blocks, chosen.title)
    as_stored = stored_operations is not None
    conversion = plan_conversion(checkpoint, layout, dtype, {}, as_stored=as_stored)
    where: str | torch.device = "meta"
    if conversion.kept:  # such layers make no weight, and put it on the device they are made for
        operations, where = stored_operations, device or "cpu"
    network = build_flux(chosen, spec, dtype=conversion.target, device=where, operations=operations)
    state = conversion.read(device)
    _assign(network.modulation, _part(state, modulation))
    _assign(network.blocks, _part(state, blocks))
    lines = (chosen.title, differences(spec, chosen), *conversion.notes())
    return network, _report(conversion, known, state, lines)


def load_autoencoder(
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    operations: Operations | None = None,
) -> tuple[Autoencoder, LoadReport]:
    """Load the autoencoder of FLUX.1 or FLUX.2; arguments, result and errors as in `load_flux`.

    FLUX.2's batch statistics stay float32 whatever the dtype.
    """
    checkpoint = open_plain(path)
    layout = autoencoder_layout(checkpoint.shapes)
    wanted = "an autoencoder of FLUX.1 or FLUX.2"
    layout = expect_layout(checkpoint, layout, wanted, (*QUANTISED, *AUTOENCODERS))
    shapes = complete_tensors(checkpoint, layout, AUTOENCODER_SIZING, wanted)
    spec, known = spec_of_autoencoder(shapes, checkpoint.metadata)
    title = f"The autoencoder of {spec.latent.name}"
    twin = Autoencoder(spec, device="meta")
    check_tensors(checkpoint, layout, shapes, shapes_of(twin), title)
    fixed = {key: buffer.dtype for key, buffer in twin.named_buffers()}
    conversion = plan_conversion(checkpoint, layout, dtype, fixed)
    module = Autoencoder(spec, dtype=conversion.target, device="meta", operations=operations)
    state = conversion.read(device)
    if module.bn is not None:
        check_statistics(checkpoint, state["bn.running_mean"], state["bn.running_var"])
    _assign(module, state)
    lines = (title, narrow_decoder(spec), *conversion.notes())
    return module, _report(conversion, known, state, lines)


def save_bfl(module: nn.Module, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a module under its published names; the file appears whole or not at all.

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


def _part(state: Mapping[str, Tensor], keys: Container[str]) -> dict[str, Tensor]:
    """Take the tensors of one part, and what lies beside its weights."""
    return {
        key: tensor
        for key, tensor in state.items()
        if key in keys or key.rpartition(".")[0] + ".weight" in keys
    }


def _report(
    conversion: Conversion, known: Known, state: Mapping[str, Tensor], lines: tuple[str, ...]
) -> LoadReport:
    title, *notes = lines
    checkpoint, layout = conversion.checkpoint, conversion.layout
    return LoadReport(
        title=title,
        known_by=known.why,
        guessed=known.guessed,
        source=checkpoint.path.name,
        files=len(checkpoint.files),
        layout=layout.name,
        prefix=layout.prefix,
        dtype=conversion.target,
        tensors=len(layout.recipes),
        parameters=sum(math.prod(shape) for shape in layout.shapes(checkpoint.shapes).values()),
        size=sum(tensor.nbytes for tensor in state.values()),
        notes=tuple(note for note in notes if note),
    )
