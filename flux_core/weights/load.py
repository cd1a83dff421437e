"""Load FLUX.1's transformer and autoencoder from any published layout, and save our own.

Everything that can be wrong with a file's keys and shapes is said before a weight is read.
Tensors that need no change stay memory-mapped: a 24 GB file is not held twice.
"""

import math
from collections import Counter
from collections.abc import Mapping
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
from .detect import (
    AUTOENCODER_SIZING,
    FLUX1_SIZING,
    Known,
    choose_family,
    differences,
    spec_of_autoencoder,
    spec_of_flux,
)
from .files import Checkpoint, open_checkpoint
from .kinds import AUTOENCODERS, QUANTISED, TRANSFORMERS
from .layout import Layout
from .report import LoadReport, dtype_name
from .transformer_keys import transformer_layout

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def load_flux(
    path: Path,
    *,
    family: FluxFamily | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    operations: Operations | None = None,
) -> tuple[Flux, LoadReport]:
    """Load a FLUX.1 transformer.

    Args:
        path: a file, a shard or a folder; see `open_checkpoint`.
        family: None finds it out, see `choose_family`.
        dtype: of the weights; None keeps the file's own, with float8 widened to bfloat16.
        device: where the weights go; None leaves them in memory mapped from the file.
        operations: the layer classes; PyTorch's own when None.

    Returns:
        The network in evaluation mode without gradients, and what was found.

    Raises:
        CheckpointError: the file is broken, incomplete or something else.
        FamilyMismatchError: the file cannot be the family that was asked for.
    """
    checkpoint = open_checkpoint(path)
    layout = transformer_layout(checkpoint.shapes)
    layout = expect_layout(checkpoint, layout, "a FLUX.1 transformer", (*QUANTISED, *TRANSFORMERS))
    shapes = complete_tensors(checkpoint, layout, FLUX1_SIZING, "FLUX.1")
    spec = spec_of_flux(shapes)
    chosen, known = choose_family(spec, path, checkpoint.metadata, family)
    twin = build_flux(chosen, spec, device="meta")
    modulation, blocks = shapes_of(twin.modulation), shapes_of(twin.blocks)
    check_tensors(checkpoint, layout, shapes, modulation | blocks, chosen.title)
    target = _target_dtype(checkpoint, layout, dtype)
    network = build_flux(chosen, spec, dtype=target, device="meta", operations=operations)
    state = _read(checkpoint, layout, target, device)
    _assign(network.modulation, {key: state[key] for key in modulation})
    _assign(network.blocks, {key: state[key] for key in blocks})
    notes = (differences(spec, chosen), *_notes(checkpoint, layout, target))
    return network, _report(checkpoint, layout, known, target, state, (chosen.title, *notes))


def load_autoencoder(
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    operations: Operations | None = None,
) -> tuple[Autoencoder, LoadReport]:
    """Load the FLUX.1 autoencoder; arguments, result and errors as in `load_flux`."""
    checkpoint = open_checkpoint(path)
    layout = autoencoder_layout(checkpoint.shapes)
    layout = expect_layout(checkpoint, layout, "a FLUX.1 autoencoder", (*QUANTISED, *AUTOENCODERS))
    shapes = complete_tensors(checkpoint, layout, AUTOENCODER_SIZING, "the FLUX.1 autoencoder")
    spec, known = spec_of_autoencoder(shapes, checkpoint.metadata)
    title = f"The autoencoder of {spec.latent.name}"
    needed = shapes_of(Autoencoder(spec, device="meta"))
    check_tensors(checkpoint, layout, shapes, needed, title)
    target = _target_dtype(checkpoint, layout, dtype)
    module = Autoencoder(spec, dtype=target, device="meta", operations=operations)
    state = _read(checkpoint, layout, target, device)
    _assign(module, state)
    notes = _notes(checkpoint, layout, target)
    return module, _report(checkpoint, layout, known, target, state, (title, *notes))


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


def _target_dtype(checkpoint: Checkpoint, layout: Layout, asked: torch.dtype | None) -> torch.dtype:
    """Choose one dtype for the whole module: what is asked for, or what most of the file has."""
    weights: Counter[torch.dtype] = Counter()
    for recipe in layout.recipes.values():
        for part in recipe.parts:
            weights[checkpoint.dtypes[part]] += math.prod(checkpoint.shapes[part])
    strange = [dtype for dtype in weights if not dtype.is_floating_point]
    if strange:
        raise CheckpointError(
            f"{checkpoint.path.name} stores weights as {dtype_name(strange[0])}.",
            "weights as bfloat16, float16, float32 or plain float8.",
            "choose the bfloat16 file of this model.",
        )
    if asked is not None:
        return asked
    most = weights.most_common(1)[0][0]
    if most in _FLOATS:
        return most
    return torch.float32 if most == torch.float64 else torch.bfloat16  # float8: exactly


def _read(
    checkpoint: Checkpoint,
    layout: Layout,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> dict[str, Tensor]:
    """Make our tensors one by one; what needs no change is the file's own memory."""
    mapped = checkpoint.read(part for one in layout.recipes.values() for part in one.parts)
    state: dict[str, Tensor] = {}
    for key, recipe in layout.recipes.items():
        made = recipe.make([mapped.pop(part) for part in recipe.parts])
        state[key] = made.to(device=device, dtype=dtype)
    return state


def _assign(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False).eval()


def _notes(checkpoint: Checkpoint, layout: Layout, target: torch.dtype) -> list[str]:
    changed = Counter(
        checkpoint.dtypes[part] for one in layout.recipes.values() for part in one.parts
    )
    total = changed.total()
    changed.pop(target, None)
    notes = [
        f"converted from {dtype_name(dtype)} to {dtype_name(target)}: {count} of {total} tensors"
        for dtype, count in changed.most_common()
    ]
    if layout.others:
        notes.append(f"tensors of other parts in the same file, left alone: {layout.others}")
    return notes


def _report(
    checkpoint: Checkpoint,
    layout: Layout,
    known: Known,
    dtype: torch.dtype,
    state: Mapping[str, Tensor],
    lines: tuple[str, ...],
) -> LoadReport:
    title, *notes = lines
    return LoadReport(
        title=title,
        known_by=known.why,
        guessed=known.guessed,
        source=checkpoint.path.name,
        files=len(checkpoint.files),
        layout=layout.name,
        prefix=layout.prefix,
        dtype=dtype,
        tensors=len(state),
        parameters=sum(tensor.numel() for tensor in state.values()),
        notes=tuple(note for note in notes if note),
    )
