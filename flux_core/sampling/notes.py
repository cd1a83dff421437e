"""Notes on what a run does that its settings may not suggest."""

from collections.abc import Sequence

import torch

from ..specs import FluxFamily
from ..tokens.references import place_references
from ..values import Tokens
from .guidance import Network, TrueCFG
from .job import Job


def run_notes(network: Network, job: Job) -> tuple[str, ...]:
    """Returns the notes on a run, with settings in brackets as in errors."""
    family, cfg, steps = network.family, job.cfg, len(job.sigmas) - 1
    sides = [job.conditioning] if cfg is None else [job.conditioning, cfg.negative]
    references = [one.tokens for one in job.conditioning.references]
    notes = list(dict.fromkeys(note for one in sides for note in one.notes))
    if not job.noise.is_noise:
        notes.append("the noise is not from [noise]: an image there is taken for noise.")
    if job.start is not None and float(job.sigmas[0]) == 1.0:
        notes.append(
            "the start image is not seen: the sigmas begin at 1, which is noise alone. Set "
            "[denoise] below 1."
        )
    notes += [
        f"reference {number} is noise, not an image."
        for number, tokens in enumerate(references, 1)
        if tokens.is_noise
    ]
    notes += _guidance_notes(network, job.conditioning.guidance, steps, cfg)
    if family.is_step_distilled and steps != family.default_steps:
        notes.append(
            f"{steps} steps; {family.title} was distilled to {family.default_steps}: set [steps]."
        )
    notes += _reference_notes(family, references)
    length, width = job.conditioning.text.txt.shape[1:]
    if length > family.text.tokens and width == network.spec.context_width:
        notes.append(
            f"the text is {length} tokens long; {family.title} was trained with "
            f"{family.text.tokens}: set [text tokens]."
        )
    return tuple(notes)


def _guidance_notes(
    network: Network, guidance: float | None, steps: int, cfg: TrueCFG | None
) -> list[str]:
    """Notes on how this kind of model uses guidance and CFG."""
    family, notes = network.family, list[str]()
    wants_cfg = family.guidance == "true cfg"
    if network.spec.has_guidance:
        if guidance is None:
            notes.append(f"guidance is {family.default_guidance:g}, the default of {family.title}.")
    elif guidance not in (None, family.default_guidance):
        instead = " Its strength is [cfg]." if wants_cfg else ""
        notes.append(
            f"guidance {guidance:g} is ignored: {family.title} has no guidance input.{instead}"
        )
    if cfg is None:
        if wants_cfg:
            notes.append(
                f"without CFG {family.title} follows the text weakly: it was made for [true CFG], "
                f"cfg {family.default_guidance:g}, with an empty negative prompt."
            )
        return notes
    twice = len(cfg.window(steps))
    if twice == 0:
        why = "cfg is 1 or less" if cfg.scale <= 1.0 else "the window holds no step"
        notes.append(f"the negative conditioning is not used: {why}.")
    elif not wants_cfg:
        notes.append(f"{twice} of {steps} steps run twice; this model needs no negative.")
    return notes


def _reference_notes(family: FluxFamily, references: Sequence[Tokens]) -> list[str]:
    """Notes on references of other number, size or position ids than the model was trained with."""
    rule, notes = family.references, list[str]()
    if len(references) > rule.trained:
        most = f"at most {rule.trained}" if rule.trained else "none"
        notes.append(f"{len(references)} references; {family.title} was made for {most}.")
    sizes = [one.count * one.latent.token_px**2 for one in references]
    if rule.several_px and len(sizes) > 1 and max(sizes) > rule.several_px:
        notes.append(
            f"reference {sizes.index(max(sizes)) + 1} has {max(sizes) / 1e6:.1f} megapixels; of "
            f"several, {family.title} knows at most {rule.several_px / 1e6:.1f}: set [fit size] to "
            "'FLUX.2 several references'."
        )
    if family.latent.placement == "index":
        for number, (one, trained) in enumerate(
            zip(references, place_references(references, "index"), strict=True), 1
        ):
            if not torch.equal(one.ids.cpu(), trained.ids.cpu()):
                notes.append(
                    f"reference {number} lies elsewhere than {family.title} was trained with: set "
                    "[placement] to 'auto' or 'index'."
                )
                break
    return notes
