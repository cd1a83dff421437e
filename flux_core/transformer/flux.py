"""FLUX.1 and FLUX.2: two modules with weights, and the plan that runs them.

Source: black-forest-labs/flux@802fb47 src/flux/model.py Flux; black-forest-labs/flux2@ab7cca6
src/flux2/model.py Flux2.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..errors import FamilyMismatchError, ShapeError
from ..families import FAMILIES
from ..operations import Operations
from ..specs import FluxFamily, LatentSpec, TransformerSpec
from ..tokens.ids import text_ids
from ..types import Ids, Sigmas, TokenValues
from ..values import Conditioning, Tokens
from .blocks import KeyValue
from .flux_blocks import FluxBlocks
from .modulation import FluxModulation, StepModulation
from .plan import Plan, ReferencePass
from .rope import Rope, rope_table

Keep: TypeAlias = Callable[[tuple[Tokens, ...], ReferencePass], Iterable[KeyValue]]
_Shared: TypeAlias = dict[tuple[object, ...], Iterable[KeyValue]]


def _where_it_is(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def keep_for_the_run(references: tuple[Tokens, ...], computed: ReferencePass) -> Iterable[KeyValue]:
    """Compute what references are seen as once, and hold it as long as the plan lives."""
    del references
    return tuple(computed)


class Flux(nn.Module):
    """The transformer.

    Args:
        family: the published model it is.
        spec: its real shape.
        modulation, blocks: the two parts; needed one after the other, never together.
        ready: called with a part just before it computes; brings it to the device it returns.
        keep: where the family's references see themselves alone: given them and their pass, it
            gives their keys and values block by block, computed or kept from an earlier run.
        compute_dtype: dtype of activations; the weights' own when None.
    """

    def __init__(
        self,
        family: FluxFamily,
        spec: TransformerSpec,
        modulation: FluxModulation,
        blocks: FluxBlocks,
        *,
        ready: Callable[[nn.Module], torch.device] = _where_it_is,
        keep: Keep = keep_for_the_run,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.family, self.spec = family, spec
        self.modulation, self.blocks = modulation, blocks
        self.ready, self.keep, self.compute_dtype = ready, keep, compute_dtype

    def plan(self, conditioning: Conditioning, target: Tokens, sigmas: Sigmas) -> Plan:
        """Make the plan of one conditioning; see `plans`."""
        return self.plans([conditioning], target, sigmas)[0]

    def plans(
        self, conditionings: Sequence[Conditioning], target: Tokens, sigmas: Sigmas
    ) -> list[Plan]:
        """Compute all that does not depend on the noisy tokens.

        Args:
            conditionings: each gives one plan; text and reference batches are 1 or the target's.
            target: its ids and batch are used, its values are not.
            sigmas: (S+1,); modulation is made for every one but a last 0.

        Raises:
            FamilyMismatchError, ShapeError: text or tokens of another model.
            SettingError: no guidance for a network that has the input.
        """
        for conditioning in conditionings:
            check_conditioning(conditioning, target, self.family, self.spec)
        steps = [float(sigma) for sigma in sigmas]
        if steps and steps[-1] == 0.0:
            steps.pop()
        device = self.ready(self.modulation)
        if self.family.references.see_only_themselves:
            steps.append(0.0)  # what the references are modulated with
        modulations = [self._modulations(one, steps, device) for one in conditionings]
        device = self.ready(self.blocks)
        shared: _Shared = {}
        return [
            self._plan(one, target, mods, device, shared)
            for one, mods in zip(conditionings, modulations, strict=True)
        ]

    def forward(
        self,
        img: TokenValues,
        img_ids: Ids,
        txt: Tensor,
        txt_ids: Ids,
        timesteps: Tensor,
        y: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> TokenValues:
        """Run one step with the published signature: a plan of one step.

        Args:
            img: (B, N, D) tokens in the transformer's scale; references may follow the target.
            img_ids, txt_ids: (N, A), (T, A), or the same with a batch axis.
            txt: (B, T, E). y: (B, P), FLUX.1's pooled text. timesteps: (B,) sigma in 0..1.
            guidance: (B,), for a model with the input.

        Returns:
            (B, N, D), the velocity of every image token.
        """
        dtype, device = self._dtype(), self.ready(self.modulation)
        mod = self.modulation(
            timesteps.to(device),
            None if y is None else y.to(device),
            None if guidance is None else guidance.to(device),
            dtype,
        )
        device = self.ready(self.blocks)
        ids = torch.cat([one[0] if one.ndim == 3 else one for one in (txt_ids, img_ids)])
        plan = Plan(
            blocks=self.blocks,
            txt=self.blocks.txt_in(txt.to(device, dtype)),
            references=None,
            rope=self._rope([ids], device),
            modulations=[mod],
        )
        return plan.velocity(img.to(device), 0)

    def _dtype(self) -> torch.dtype:
        return self.compute_dtype or next(self.blocks.parameters()).dtype

    def _modulations(
        self, conditioning: Conditioning, steps: Sequence[float], device: torch.device
    ) -> list[StepModulation]:
        pooled, batch = None, 1
        if self.spec.pooled_width and conditioning.text.pooled is not None:
            pooled = conditioning.text.pooled.to(device)
            batch = pooled.shape[0]
        guidance = None
        if conditioning.guidance is not None:
            guidance = torch.full((batch,), conditioning.guidance, device=device)
        # One row at a time: a GEMM over all steps rounds differently in bfloat16.
        return [
            self.modulation(
                torch.full((batch,), sigma, device=device), pooled, guidance, self._dtype()
            )
            for sigma in steps
        ]

    def _plan(
        self,
        conditioning: Conditioning,
        target: Tokens,
        modulations: Sequence[StepModulation],
        device: torch.device,
        shared: _Shared,
    ) -> Plan:
        txt = self.blocks.txt_in(conditioning.text.txt.to(device, self._dtype()))
        places = [text_ids(txt.shape[1], target.latent), target.ids.cpu()]
        references, kept = None, None
        if conditioning.references and self.family.references.see_only_themselves:
            key = _same_references(conditioning)
            if key not in shared:
                shared[key] = self._keep(conditioning, modulations[-1], device)
            kept = shared[key]
        elif conditioning.references:
            references = self._project(conditioning.references, device)
            places += [tokens.ids.cpu() for tokens in conditioning.references]
        return Plan(
            blocks=self.blocks,
            txt=txt,
            references=references,
            rope=self._rope(places, device),
            modulations=modulations,
            kept=kept,
        )

    def _keep(
        self, conditioning: Conditioning, modulation: StepModulation, device: torch.device
    ) -> Iterable[KeyValue]:
        """Ask for what references that see themselves alone are seen as."""
        ids = [tokens.ids.cpu() for tokens in conditioning.references]
        computed = ReferencePass(
            blocks=self.blocks,
            references=self._project(conditioning.references, device),
            rope=self._rope(ids, device),
            modulation=modulation,
        )
        return self.keep(conditioning.references, computed)

    def _project(self, references: Sequence[Tokens], device: torch.device) -> Tensor:
        """Bring references into the transformer's scale and width: (B, R, hidden)."""
        batch = max(tokens.values.shape[0] for tokens in references)
        values = [
            ((tokens.values.float() - tokens.latent.shift) * tokens.latent.scale).expand(
                batch, -1, -1
            )
            for tokens in references
        ]
        return self.blocks.img_in(torch.cat(values, dim=1).to(device, self._dtype()))

    def _rope(self, ids: Sequence[Ids], device: torch.device) -> Rope:
        return rope_table(torch.cat(list(ids)), self.spec.axes_dim, self.spec.theta, device)


def check_conditioning(
    conditioning: Conditioning, target: Tokens, family: FluxFamily, spec: TransformerSpec
) -> None:
    """Refuse text, references or batches that a network cannot read.

    Raises:
        FamilyMismatchError: text or tokens of another model.
        ShapeError: a batch that is neither 1 nor the target's.
    """
    text = conditioning.text
    widths = (text.txt.shape[-1], 0 if text.pooled is None else text.pooled.shape[-1])
    if widths != (spec.context_width, spec.pooled_width):
        raise _other_text(widths, text.source, family, spec)
    batch = target.values.shape[0]
    named = [("text", text.txt.shape[0])]
    if text.pooled is not None:
        named.append(("pooled text", text.pooled.shape[0]))
    for number, tokens in enumerate(conditioning.references, 1):
        named.append((f"reference {number}", tokens.values.shape[0]))
        if tokens.latent != family.latent:
            raise FamilyMismatchError(
                f"Reference {number} holds {tokens.latent.name} tokens.",
                f"{family.latent.name} tokens for {family.title}.",
                "encode it with that family's autoencoder, from 'Load Autoencoder (FLUX)', "
                "'Load VAE' or the same 'Load Nano (FLUX)'"
                f"{_told_by_name(tokens.latent, family.latent)}.",
            )
    for name, size in named:
        if size not in (1, batch):
            raise ShapeError(
                f"The {name} has a batch of {size}, the noise {batch}.",
                "a batch of 1, or the same batch as the noise.",
                "set batch_size on 'Noise (FLUX)', or hand over one picture.",
            )


def _told_by_name(found: LatentSpec, needed: LatentSpec) -> str:
    """Say how a LATENT gets its name where its channels fit both."""
    if found.channels != needed.channels:
        return ""
    return (
        "; a LATENT of it goes through 'Pack Latent (FLUX)' with latent_format "
        f"'{needed.name}', because its channels do not tell the two apart"
    )


def _same_references(conditioning: Conditioning) -> tuple[object, ...]:
    """Tell whether conditionings of one run share their references: values, places, guidance."""
    places = (
        (id(tokens.values), tokens.ids.cpu().numpy().tobytes())
        for tokens in conditioning.references
    )
    return (conditioning.guidance, *places)


def _other_text(
    widths: tuple[int, int], source: str, family: FluxFamily, spec: TransformerSpec
) -> FamilyMismatchError:
    """Say whose text was wired, as far as its source or its widths tell, and whose is needed."""
    owners = dict.fromkeys(
        one.latent.name
        for one in FAMILIES.values()
        if (one.transformer.context_width, one.transformer.pooled_width) == widths
    )
    of_whom = [" and ".join(owners)] if owners else []
    of_whom += [f"from {source}"] if source else []
    whose = f" ({', '.join(of_whom)})" if of_whom else ""
    needed = f"{spec.context_width} and {spec.pooled_width}"
    if not spec.pooled_width:
        needed = f"{spec.context_width} wide and none pooled"
    return FamilyMismatchError(
        f"The text features are {widths[0]} wide, pooled {widths[1]}{whose}.",
        f"{needed} for {family.title}, from {family.text.title}.",
        "load this family's text encoders in 'Load Text Encoders (FLUX)' or with ComfyUI's own "
        "loaders, or take all parts from one 'Load Nano (FLUX)'.",
    )


def build_flux(
    family: FluxFamily,
    spec: TransformerSpec | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    operations: Operations | None = None,
) -> Flux:
    """Build the network with unset weights; `spec` is the family's own when None."""
    spec = spec or family.transformer
    return Flux(
        family,
        spec,
        FluxModulation(spec, dtype=dtype, device=device, operations=operations),
        FluxBlocks(spec, dtype=dtype, device=device, operations=operations),
    )
