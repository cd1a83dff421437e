"""Is a file what a loader needs? Said from the header, before any weight is read."""

from collections.abc import Iterable, Mapping

from torch import nn

from ..errors import CheckpointError
from .files import Checkpoint
from .header import ANOTHER_FILE
from .kinds import LORA, PARTS, QUANTISED, Kind, identify
from .layout import Layout
from .lora_kind import lora_title
from .names import shorten


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """List the tensors a module needs, by name; build it on the meta device to list them only."""
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def expect_layout(
    checkpoint: Checkpoint, layout: Layout | None, needed: str, kinds: Iterable[Kind]
) -> Layout:
    """Refuse, by name, what is laid out otherwise or is a relative that we cannot run.

    Args:
        checkpoint: its keys under the layout's prefix count, or all without a layout.
        layout: None when the keys are like no layout.
        needed: what the loader is for.
        kinds: relatives with the same layout.

    Raises:
        CheckpointError: it is not what is needed.
    """
    prefix = layout.prefix if layout is not None else ""
    keys = [key for key in checkpoint.shapes if key.startswith(prefix)]
    kind = identify(keys, checkpoint.metadata, kinds)
    if kind is None and layout is None:
        kind = identify(keys, checkpoint.metadata, PARTS)
    if kind is not None:
        needed += ", not quantised" if kind in QUANTISED else ""
        title = lora_title(checkpoint.shapes) if kind == LORA else kind.title
        raise CheckpointError(f"{checkpoint.path.name} is {title}.", f"{needed}.", kind.fix)
    if layout is None:
        first = ", ".join(map(shorten, sorted(keys)[:3]))
        raise CheckpointError(
            f"{checkpoint.path.name} is of a kind that is not known here; it holds "
            f"{len(keys)} tensors, first {first}.",
            f"{needed}.",
            ANOTHER_FILE,
        )
    return layout


def complete_tensors(
    checkpoint: Checkpoint, layout: Layout, sizing: Iterable[str], title: str
) -> dict[str, tuple[int, ...]]:
    """Give the shapes under our names.

    Raises:
        CheckpointError: one of the tensors that tell the model's sizes is missing.
    """
    shapes = layout.shapes(checkpoint.shapes)
    lost = [part for key in sizing for part in layout.missing(key, checkpoint.shapes)]
    if lost:
        raise _misfit(checkpoint, title, [_some(lost, "missing")], "every tensor of it")
    return shapes


def check_tensors(
    checkpoint: Checkpoint,
    layout: Layout,
    shapes: Mapping[str, tuple[int, ...]],
    needed: Mapping[str, tuple[int, ...]],
    title: str,
) -> None:
    """Compare a file's tensors with a module's, name by name and shape by shape.

    Args:
        checkpoint, layout: the file.
        shapes: of the file's tensors, under our names.
        needed: of the module's tensors.
        title: of the model, for the message.

    Raises:
        CheckpointError: tensors are missing, not known or of another shape; all of it is said.
    """
    lost = [
        part
        for key in needed
        if key not in shapes
        for part in layout.missing(key, checkpoint.shapes)
    ]
    surplus = {key for key in shapes if key not in needed}
    unknown = [*layout.left, *(part for key in surplus for part in layout.recipes[key].parts)]
    wrong = [
        f"{shorten(key)} is {_by(shapes[key])} and not {_by(shape)}"
        for key, shape in needed.items()
        if shapes.get(key, shape) != shape
    ]
    found = [
        _some(names, what)
        for names, what in (
            (lost, "missing"),
            (sorted(unknown), "not known"),
            (wrong, "of another shape"),
        )
        if names
    ]
    if found:
        raise _misfit(checkpoint, title, found, f"its {len(needed)} tensors and no others")


_LONGEST = 150  # characters of one fault: a name, or a name with two shapes


def _some(names: list[str], what: str) -> str:
    rest = ", …" if len(names) > 3 else ""
    verb = "is" if len(names) == 1 else "are"
    first = ", ".join(shorten(name, _LONGEST) for name in names[:3])
    return f"{len(names)} {verb} {what} ({first}{rest})"


def _by(shape: tuple[int, ...]) -> str:
    return shorten("x".join(map(str, shape))) or "a single value"


def _misfit(checkpoint: Checkpoint, title: str, found: list[str], needed: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path.name} does not fit {title}: of its tensors {'; '.join(found)}.",
        f"{needed}.",
        ANOTHER_FILE,
    )
