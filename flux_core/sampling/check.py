"""Checks that a job fits a network, before anything is computed; errors name the input."""

from collections.abc import Iterator

from torch import Tensor

from ..checks import check_finite, check_latent
from ..errors import FamilyMismatchError, SettingError, ShapeError
from ..families import FAMILIES
from ..specs import FluxFamily, LatentSpec, TransformerSpec
from ..values import Conditioning, Tokens
from .guidance import Network
from .job import Job
from .solvers import SOLVERS


def check_job(network: Network, job: Job) -> None:
    """Raises if the parts of a job do not fit the network or each other.

    Raises:
        FamilyMismatchError: a part belongs to another family.
        ShapeError: batches or sizes do not match.
        NonFiniteError: NaN or infinity in an input.
        SettingError: an unknown solver, or a control that the network does not follow.
    """
    if job.solver not in SOLVERS:
        raise SettingError(
            f"The solver is {job.solver!r}.", f"{' or '.join(SOLVERS)}.", "choose a [solver]."
        )
    check_latent(job.noise.latent, network.family.latent, "noise")
    if job.noise.cells is not None:
        raise ShapeError(
            f"The noise has {job.noise.count} tokens of {_px(job.noise)}.",
            "every token of the image to make; references alone may lack some.",
            "take it from [noise].",
        )
    if job.start is not None:
        _check_start(network, job.noise, job.start)
    for name, tensor in _tensors(job):
        check_finite(tensor, f"{name} input")
    for _, conditioning in _sides(job):
        check_conditioning(conditioning, job.noise, network.family, network.spec)
        check_controls(conditioning, network.supports, "this network")


def check_conditioning(
    conditioning: Conditioning, target: Tokens, family: FluxFamily, spec: TransformerSpec
) -> None:
    """Raises for text, references or batches that a network cannot read.

    Raises:
        FamilyMismatchError: text or tokens of another model.
        ShapeError: a batch is neither 1 nor the target's.
    """
    text = conditioning.text
    widths = (text.txt.shape[-1], 0 if text.pooled is None else text.pooled.shape[-1])
    if widths != (spec.context_width, spec.pooled_width):
        raise _other_text(widths, text.source, family, spec)
    batch = target.values.shape[0]
    named = [("text", text.txt.shape[0])]
    if text.pooled is not None:
        named.append(("pooled text", text.pooled.shape[0]))
    for number, one in enumerate(conditioning.references, 1):
        latent = one.tokens.latent
        named.append((f"reference {number}", one.tokens.values.shape[0]))
        if latent != family.latent:
            raise FamilyMismatchError(
                f"Reference {number} holds {latent.name} tokens.",
                f"{family.latent.name} tokens for {family.title}.",
                "encode it with that family's autoencoder, from [autoencoder loader], "
                f"'Load VAE' or the same [nano loader]{_format_hint(latent, family.latent)}.",
            )
    for name, size in named:
        if size not in (1, batch):
            raise ShapeError(
                f"The {name} has a batch of {size}, the noise {batch}.",
                "a batch of 1, or the same batch as the noise.",
                "set [batch_size], or hand over one image.",
            )


def _sides(job: Job) -> Iterator[tuple[str, Conditioning]]:
    """Yields the conditionings of a job that are used, each with a suffix for its name."""
    if job.cfg is None or not job.cfg.window(len(job.sigmas) - 1):
        yield "", job.conditioning
        return
    yield " of the positive conditioning", job.conditioning
    yield " of the negative conditioning", job.cfg.negative


def _tensors(job: Job) -> Iterator[tuple[str, Tensor]]:
    yield "noise", job.noise.values
    if job.start is not None:
        yield "start image", job.start.values
    for side, conditioning in _sides(job):
        yield f"text{side}", conditioning.text.txt
        if conditioning.text.pooled is not None:
            yield f"pooled text{side}", conditioning.text.pooled
        for number, one in enumerate(conditioning.references, 1):
            yield f"reference {number}{side}", one.tokens.values


def check_controls(conditioning: Conditioning, supports: frozenset[str], who: str) -> None:
    """Refuses a way of seeing references that would be ignored.

    Args:
        conditioning: with the references.
        supports: the `Reference.controls` that are followed.
        who: follows them, as the subject of a sentence.

    Raises:
        SettingError: a reference asks for another.
    """
    for number, one in enumerate(conditioning.references, 1):
        ignored = [control for control in one.controls if control not in supports]
        if ignored:
            follows = ", ".join(sorted(supports)) or "none"
            raise SettingError(
                f"Reference {number} has {' and '.join(ignored)} set, which {who} does not follow.",
                f"controls that it follows: {follows}.",
                f"leave {' and '.join(ignored)} at the default for the [references].",
            )


def _check_start(network: Network, noise: Tokens, start: Tokens) -> None:
    """Raises for a start image of another latent format, or not of the noise's size."""
    check_latent(start.latent, network.family.latent, "start image")
    if start.grid != noise.grid or start.cells is not None:
        raise ShapeError(
            f"The start image is {_px(start)}, the noise {_px(noise)}.",
            "the same size.",
            "set [width] and [height] to those of [image fit], or fit the image of [start tokens].",
        )
    if start.values.shape[0] not in (1, noise.values.shape[0]):
        raise ShapeError(
            f"The start image has a batch of {start.values.shape[0]}, the noise "
            f"{noise.values.shape[0]}.",
            "a batch of 1, or the same batch as the noise.",
            "set [batch_size].",
        )


def _px(tokens: Tokens) -> str:
    rows, columns = tokens.grid
    size = f"{columns * tokens.latent.token_px}x{rows * tokens.latent.token_px}"
    return size if tokens.cells is None else f"{size} with dropped tokens"


def _format_hint(found: LatentSpec, needed: LatentSpec) -> str:
    """A hint on [latent_format] for latents of two formats with the same channels."""
    if found.channels != needed.channels:
        return ""
    return (
        f"; a LATENT of it goes through [latent packing] with [latent_format] '{needed.name}', "
        "because its channels do not tell the two apart"
    )


def _other_text(
    widths: tuple[int, int], source: str, family: FluxFamily, spec: TransformerSpec
) -> FamilyMismatchError:
    """The error for another model's text: whose it is, if source or widths tell, and what fits."""
    owners = dict.fromkeys(
        one.latent.name
        for one in FAMILIES.values()
        if (one.transformer.context_width, one.transformer.pooled_width) == widths
    )
    origin = [" and ".join(owners)] if owners else []
    origin += [f"from {source}"] if source else []
    whose = f" ({', '.join(origin)})" if origin else ""
    needed = f"{spec.context_width} and {spec.pooled_width}"
    if not spec.pooled_width:
        needed = f"{spec.context_width} wide and none pooled"
    return FamilyMismatchError(
        f"The text features are {widths[0]} wide, pooled {widths[1]}{whose}.",
        f"{needed} for {family.title}, from {family.text.title}.",
        "load this family's text encoders in [text encoder loader] or with ComfyUI's own "
        "loaders, or take all parts from one [nano loader].",
    )
