"""Which family a transformer is: said by the user or the file, seen in its sizes, or guessed.

FLUX.1 dev, Kontext and Krea share every key and every shape, and so do FLUX.2 klein's distilled,
base and KV variants of one size: which of them a file is comes from the user or, as a guess that
the report names, from the file's name.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from ..errors import FamilyMismatchError
from ..families import FAMILIES
from ..specs import FluxFamily, TransformerSpec
from .detect import FAMILY_KEY, OWN_SHAPE, Known


def choose_family(
    spec: TransformerSpec, path: Path, metadata: Mapping[str, str], asked: FluxFamily | None
) -> tuple[FluxFamily, Known]:
    """Decide which family a transformer is.

    What the file says of itself and what the user says count first, then sizes that only one
    family has, then a guess from the file's name, then the plainest family.

    Raises:
        FamilyMismatchError: the family that was asked for, or that the file names, cannot be
            this model.
    """
    said = FAMILIES.get(metadata.get(FAMILY_KEY, ""))
    chosen = asked or said
    if asked is not None and said is not None and asked != said:
        raise _mismatch(f"{path.name} says that it is {said.title}.", asked)
    fitting = [one for one in FAMILIES.values() if _fits(spec, one)]
    same = [one for one in fitting if one.transformer == spec]
    if chosen is not None:
        _check_family(spec, path, chosen)
        return chosen, Known(False, "chosen by hand" if asked else "named in the file")
    if len(same) == 1:
        return same[0], OWN_SHAPE
    name = _plain(_telling_name(path))
    for family in same or fitting:
        if any(_plain(hint) in name for hint in family.file_hints):
            return family, Known(True, "guessed from the file name")
    plainest = (same or fitting or _kin(spec))[-1]
    _check_family(spec, path, plainest)
    return plainest, Known(True, "guessed: nothing in the file or its name says more")


def differences(spec: TransformerSpec, family: FluxFamily) -> str:
    """Tell the size of a model that is not as large as its family; "" when it is."""
    if spec == family.transformer:
        return ""
    return (
        f"a custom size: width {spec.hidden}, {spec.double_blocks} + {spec.single_blocks} blocks, "
        f"text {spec.context_width} wide"
    )


def _fits(spec: TransformerSpec, family: FluxFamily) -> bool:
    """Tell whether a transformer differs from a family's in its size only."""
    return spec == replace(
        family.transformer,
        hidden=spec.hidden,
        double_blocks=spec.double_blocks,
        single_blocks=spec.single_blocks,
        mlp_ratio=spec.mlp_ratio,
        context_width=spec.context_width,
        pooled_width=spec.pooled_width,
    )


def _kin(spec: TransformerSpec) -> list[FluxFamily]:
    """Give the families of one generation with the same guidance, the plainest last."""
    return [
        one
        for one in FAMILIES.values()
        if one.transformer.shares_modulation == spec.shares_modulation
        and one.is_guidance_distilled == spec.has_guidance
    ]


def _check_family(spec: TransformerSpec, path: Path, family: FluxFamily) -> None:
    """Refuse what another family is, or what the family's keys contradict.

    A size that no family has may be anybody's experiment with any family that is built so.
    """
    twins = [one for one in FAMILIES.values() if one.transformer == spec]
    if not _fits(spec, family):
        kin = [one for one in _kin(spec) if _fits(spec, one)]
        like = f", as {join_titles(twins or kin[-1:])} has" if kin else ""
        raise _mismatch(f"{path.name} has {_inputs(spec)}{like}.", family)
    if twins and family not in twins:
        raise _mismatch(f"{path.name} is {_size(spec)}, as {join_titles(twins)} is.", family)


def _mismatch(found: str, family: FluxFamily) -> FamilyMismatchError:
    spec = family.transformer
    return FamilyMismatchError(
        found,
        f"{family.title}, which has {_inputs(spec)} and is {_size(spec)}.",
        "choose another family in 'Load Model (FLUX)', or leave it at auto.",
    )


def _inputs(spec: TransformerSpec) -> str:
    guidance = "a" if spec.has_guidance else "no"
    return f"{guidance} guidance input, {spec.in_channels} channels in and {spec.out_channels} out"


def _size(spec: TransformerSpec) -> str:
    return f"{spec.hidden} wide with {spec.double_blocks} + {spec.single_blocks} blocks"


def join_titles(families: Iterable[FluxFamily]) -> str:
    """Name families as alternatives."""
    *others, last = (one.title for one in families)
    return f"{', '.join(others)} or {last}" if others else last


def _telling_name(path: Path) -> str:
    """Take the file's own name, or the folders' where the name is what diffusers always writes."""
    usual = path.name.startswith(("diffusion_pytorch_model", "model"))
    if path.suffix in (".safetensors", ".gguf") and not usual:
        return path.stem
    return "/".join(path.parts[-3:])


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9/]", "", name.lower())
