"""The one way to sample: check what came in, plan, step, and hand back a picture's tokens."""

import logging
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..checks import check_finite, check_latent
from ..errors import NonFiniteError, SettingError, ShapeError
from ..specs import FluxFamily
from ..tokens.references import place_references
from ..types import Sigmas, TokenValues
from ..values import Conditioning, Tokens
from .guidance import Network, TrueCFG, guider
from .sigmas import check_sigmas
from .solver import SOLVERS, SolverName, Step

_log = logging.getLogger(__name__)


@torch.no_grad()
def denoise(
    network: Network,
    conditioning: Conditioning,
    noise: Tokens,
    sigmas: Sigmas,
    *,
    cfg: TrueCFG | None = None,
    solver: SolverName = "euler",
    start: Tokens | None = None,
) -> Iterator[Step]:
    """Make pictures from noise, one step for each `next`.

    Everything is checked, and the model planned, when this is called; `finish` turns the last
    step's x into tokens. References are part of the plan, so no step can change them.

    Args:
        network: the transformer.
        conditioning: text, references, guidance (None: the family's default).
        noise: (B, N, D) standard normal values, placed as the target.
        sigmas: (S + 1,) falling from at most 1 to 0.
        cfg: true CFG, or None for the guided way.
        solver: "euler" or "heun".
        start: a picture to begin from when sigmas[0] is below 1, (1 or B, N, D) unscaled; None
            begins from an empty latent, as ComfyUI does.

    Returns:
        S steps, each done when it is asked for.

    Raises:
        FamilyMismatchError: parts of another family.
        ShapeError: batches or sizes that do not go together.
        NonFiniteError: NaN or infinity in an input.
        SettingError: sigmas, solver or guidance that cannot be followed.

    Source: black-forest-labs/flux@802fb47 src/flux/sampling.py denoise; begin as
        Comfy-Org/ComfyUI@14b05228 comfy/model_sampling.py CONST.noise_scaling.
    """
    sigmas = check_sigmas(sigmas)
    if solver not in SOLVERS:
        raise SettingError(
            f"The solver is {solver!r}.", " or ".join(SOLVERS) + ".", "choose one of them."
        )
    _check_latents(network, noise, start)
    _check_finite(conditioning, noise, cfg, start)
    for note in sampling_notes(network, conditioning, steps=len(sigmas) - 1, cfg=cfg, noise=noise):
        _log.warning(note)
    conditioning = _with_guidance(conditioning, network)
    if cfg is not None:
        cfg = replace(cfg, negative=_with_guidance(cfg.negative, network))
    velocity = guider(network, conditioning, noise, sigmas, cfg).velocity
    x = _begin(noise, float(sigmas[0]), start)
    return torch.no_grad()(SOLVERS[solver])(velocity, x, sigmas)


def finish(x: TokenValues, target: Tokens) -> Tokens:
    """Turn a step's x into tokens the autoencoder's latent can be unpacked from.

    Args:
        x: (B, N, D) in the transformer's scale: the last step's `x`, or any step's `denoised`.
        target: the noise the run began with.

    Returns:
        Tokens of a picture, unscaled, at the target's places, on x's device.

    Raises:
        NonFiniteError: the network computed NaN or infinity.
    """
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError(
            "The model computed NaN or infinity.",
            "finite values.",
            "set dtype to bfloat16 or float32 in 'Load Model (FLUX)': float16 overflows on some "
            "models and devices.",
        )
    values = x / target.latent.scale + target.latent.shift
    return replace(target, values=values, is_noise=False)


def sampling_notes(
    network: Network,
    conditioning: Conditioning,
    *,
    steps: int,
    cfg: TrueCFG | None = None,
    noise: Tokens | None = None,
) -> tuple[str, ...]:
    """Say what a run will do that its settings may not lead one to expect."""
    sides = [conditioning] if cfg is None else [conditioning, cfg.negative]
    family, notes = network.family, list(dict.fromkeys(note for one in sides for note in one.notes))
    if noise is not None and not noise.is_noise:
        notes.append("the noise is not from 'Noise (FLUX)': a picture there is taken for noise.")
    notes += [
        f"reference {number} is noise, not a picture."
        for number, tokens in enumerate(conditioning.references, 1)
        if tokens.is_noise
    ]
    notes += _guidance_notes(network, conditioning.guidance, steps, cfg)
    if family.is_step_distilled and steps != family.default_steps:
        notes.append(
            f"{steps} steps; {family.title} was distilled to {family.default_steps}: set steps on "
            "'Schedule (FLUX)'."
        )
    notes += _reference_notes(family, conditioning.references)
    length, width = conditioning.text.txt.shape[1:]
    if length > family.text.tokens and width == network.spec.context_width:
        notes.append(
            f"the text is {length} tokens long; {family.title} was trained with "
            f"{family.text.tokens}: set t5_tokens on 'Encode Text (FLUX)'."
        )
    return tuple(notes)


def _guidance_notes(
    network: Network, guidance: float | None, steps: int, cfg: TrueCFG | None
) -> list[str]:
    """Say what becomes of guidance and CFG on this kind of model."""
    family, notes = network.family, list[str]()
    wants_cfg = family.guidance == "true cfg"
    if network.spec.has_guidance:
        if guidance is None:
            notes.append(f"guidance is {family.default_guidance:g}, the default of {family.title}.")
    elif guidance not in (None, family.default_guidance):
        instead = " Its strength is cfg on 'Sample True CFG (FLUX)'." if wants_cfg else ""
        notes.append(
            f"guidance {guidance:g} is ignored: {family.title} has no guidance input.{instead}"
        )
    if cfg is None:
        if wants_cfg:
            notes.append(
                f"without CFG {family.title} follows the text weakly: it was made for 'Sample "
                f"True CFG (FLUX)', cfg {family.default_guidance:g}, with an empty negative prompt."
            )
        return notes
    twice = len(cfg.window(steps))
    if twice == 0:
        why = "cfg is 1 or less" if cfg.scale <= 1.0 else "the window holds no step"
        notes.append(f"the negative conditioning is not used: {why}.")
    elif not wants_cfg:
        notes.append(f"{twice} of {steps} steps run twice; this model needs no negative.")
    return notes


def _reference_notes(family: FluxFamily, references: tuple[Tokens, ...]) -> list[str]:
    """Say where references are more, or lie elsewhere, than the model was trained with."""
    rule, notes = family.references, list[str]()
    if len(references) > rule.trained:
        most = f"at most {rule.trained}" if rule.trained else "none"
        notes.append(f"{len(references)} references; {family.title} was made for {most}.")
    sizes = [one.ids.shape[0] * one.latent.token_px**2 for one in references]
    if rule.several_px and len(sizes) > 1 and max(sizes) > rule.several_px:
        notes.append(
            f"reference {sizes.index(max(sizes)) + 1} has {max(sizes) / 1e6:.1f} megapixels; of "
            f"several, {family.title} knows at most {rule.several_px / 1e6:.1f}: set size on 'Fit "
            "Image (FLUX)' to 'FLUX.2 several references'."
        )
    if rule.placement == "index":
        for number, (one, trained) in enumerate(
            zip(references, place_references(references, "index"), strict=True), 1
        ):
            if not torch.equal(one.ids.cpu(), trained.ids.cpu()):
                notes.append(
                    f"reference {number} lies elsewhere than {family.title} was trained with: set "
                    "placement to 'index' on 'Reference Conditioner (FLUX)'."
                )
                break
    return notes


def _begin(noise: Tokens, sigma: float, start: Tokens | None) -> TokenValues:
    """Mix noise and picture as the flow has them at `sigma`, in the transformer's scale."""
    x = sigma * noise.values.float()
    if start is None or sigma == 1.0:
        return x
    picture = (start.values.float() - start.latent.shift) * start.latent.scale
    return x + (1.0 - sigma) * picture.to(x.device)


def _with_guidance(conditioning: Conditioning, network: Network) -> Conditioning:
    """Fill in the family's default; a network without the input gets none."""
    guidance = conditioning.guidance
    if not network.spec.has_guidance:
        guidance = None
    elif guidance is None:
        guidance = network.family.default_guidance
    return replace(conditioning, guidance=guidance)


def _check_latents(network: Network, noise: Tokens, start: Tokens | None) -> None:
    """Refuse tokens of another latent, or a start that does not lie on the noise."""
    check_latent(noise.latent, network.family.latent, "noise")
    if start is None:
        return
    check_latent(start.latent, network.family.latent, "start picture")
    if start.grid != noise.grid:
        raise ShapeError(
            f"The start picture is {_px(start)}, the noise {_px(noise)}.",
            "the same size.",
            "set width and height in 'Noise (FLUX)' to those of 'Fit Image (FLUX)'.",
        )
    if start.values.shape[0] not in (1, noise.values.shape[0]):
        raise ShapeError(
            f"The start picture has a batch of {start.values.shape[0]}, the noise "
            f"{noise.values.shape[0]}.",
            "a batch of 1, or the same batch as the noise.",
            "set batch_size in 'Noise (FLUX)'.",
        )


def _check_finite(
    conditioning: Conditioning, noise: Tokens, cfg: TrueCFG | None, start: Tokens | None
) -> None:
    """Refuse NaN and infinity, and say which input holds them."""
    inputs: list[tuple[str, Tensor | None]] = [("noise", noise.values)]
    inputs.append(("start picture", None if start is None else start.values))
    for side, one in (("positive", conditioning), ("negative", cfg.negative if cfg else None)):
        if one is None:
            continue
        where = "" if cfg is None else f" of the {side} conditioning"
        inputs += [(f"text{where}", one.text.txt), (f"pooled text{where}", one.text.pooled)]
        inputs += [
            (f"reference {number}{where}", tokens.values)
            for number, tokens in enumerate(one.references, 1)
        ]
    for name, tensor in inputs:
        if tensor is not None:
            check_finite(tensor, f"{name} input")


def _px(tokens: Tokens) -> str:
    rows, columns = tokens.grid
    return f"{columns * tokens.latent.token_px}x{rows * tokens.latent.token_px}"
