"""FLUX.1 and FLUX.2: two modules with weights, and the plan that runs them.

Source: black-forest-labs/flux@802fb47 src/flux/model.py Flux; black-forest-labs/flux2@ab7cca6
src/flux2/model.py Flux2.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..operations import Operations
from ..specs import FluxFamily, TransformerSpec
from ..tokens.ids import text_ids
from ..tokens.sequence import TokenSequence, arrange
from ..types import Ids, Sigmas, TokenValues
from ..values import Conditioning, Reference, Tokens
from .attention import Attention, PyTorchAttention
from .flux_blocks import FluxBlocks
from .modulation import FluxModulation, StepModulation
from .plan import Plan
from .references import KeyValue, ReferencePass
from .rope import Rope, rope_table

ReferenceCache: TypeAlias = Callable[[tuple[Tokens, ...], ReferencePass], Iterable[KeyValue]]


def _device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def cache_for_the_run(
    references: tuple[Tokens, ...], computed: ReferencePass
) -> Iterable[KeyValue]:
    """Computes keys and values of isolated references once, and holds them as long as the plan."""
    del references
    return tuple(computed)


class Flux(nn.Module):
    """The transformer.

    Args:
        family: which published model it is.
        spec: its actual shape.
        modulation, blocks: the two parts; used one after the other, never together.
        ready: called with a part just before it computes; loads it and returns its device.
        attention: computes attention in every block.
        reference_cache: for a family with isolated references: called with them and their pass, it
            returns their keys and values block by block, computed or cached.
        compute_dtype: dtype of activations; None: that of the weights.
    """

    supports = frozenset({"dropped tokens"})  # of `Reference.controls`

    def __init__(
        self,
        family: FluxFamily,
        spec: TransformerSpec,
        modulation: FluxModulation,
        blocks: FluxBlocks,
        *,
        ready: Callable[[nn.Module], torch.device] = _device_of,
        attention: Attention | None = None,
        reference_cache: ReferenceCache = cache_for_the_run,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.family, self.spec = family, spec
        self.modulation, self.blocks = modulation, blocks
        self.ready, self.attention = ready, attention or PyTorchAttention()
        self.reference_cache, self.compute_dtype = reference_cache, compute_dtype

    def plan(
        self,
        conditioning: Conditioning,
        target: Tokens,
        sigmas: Sequence[float] | Sigmas,
        asked: Sequence[float] | None = None,
    ) -> Plan:
        """Makes the plan of one conditioning; see `plans`."""
        return self.plans([conditioning], target, sigmas, asked)[0]

    def plans(
        self,
        conditionings: Sequence[Conditioning],
        target: Tokens,
        sigmas: Sequence[float] | Sigmas,
        asked: Sequence[float] | None = None,
    ) -> list[Plan]:
        """Computes all that does not depend on the noisy tokens.

        Args:
            conditionings: one plan is made for each; text and reference batches are 1 or the
                target's, text and tokens are this model's (`sampling.check.check_conditioning`).
            target: only its position ids and batch are used.
            sigmas: (S + 1,), the level at which each step begins, and the last one.
            asked: the noise levels whose modulation is computed up front; None: those at which
                steps begin. Others are computed on demand.

        Raises:
            SettingError: no guidance for a network that has a guidance input.
        """
        levels = [float(sigma) for sigma in sigmas[:-1]]
        isolated = [0.0] if self.family.references.isolated else []  # the sigma of their own pass
        planned = dict.fromkeys([*(levels if asked is None else asked), *isolated])
        device = self.ready(self.modulation)
        modulations = [
            {
                sigma: self._modulation_of(one.text.pooled, one.guidance, sigma, device)
                for sigma in planned
            }
            for one in conditionings
        ]
        device = self.ready(self.blocks)
        shared: dict[tuple[object, ...], Iterable[KeyValue]] = {}
        return [
            self._plan(one, target, levels, mods, device, shared)
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
        """Runs one step with the published signature: a plan of one step.

        Args:
            img: (B, N, D) tokens in the transformer's scale; references may follow the target.
            img_ids, txt_ids: (N, A), (T, A), or the same with a batch axis.
            txt: (B, T, E). y: (B, P), FLUX.1's pooled text. timesteps: (B,) sigma in 0..1.
            guidance: (B,), for a model with a guidance input.

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
        device, sigma = self.ready(self.blocks), float(timesteps.flatten()[0])
        text, image = (ids[0] if ids.ndim == 3 else ids for ids in (txt_ids, img_ids))
        sequence = arrange(
            text=text,
            target=Tokens(
                values=img, ids=image, grid=(1, image.shape[0]), latent=self.family.latent
            ),
        )
        plan = Plan(
            blocks=self.blocks,
            attention=self.attention,
            txt=self.blocks.txt_in(txt.to(device, dtype)),
            references=None,
            own=sequence,
            sequence=sequence,
            rope=self._rope(sequence, device),
            sigmas=[sigma],
            modulations={sigma: mod},  # each row has its own timestep
            modulate=lambda _: mod,
        )
        return plan.velocity(img.to(device), sigma)

    def _dtype(self) -> torch.dtype:
        return self.compute_dtype or next(self.blocks.parameters()).dtype

    def _modulation_of(
        self, pooled: Tensor | None, guidance: float | None, sigma: float, device: torch.device
    ) -> StepModulation:
        """Modulation of one sigma: a GEMM over several would round differently in bfloat16."""
        pooled = pooled.to(device) if self.spec.pooled_width and pooled is not None else None
        batch = 1 if pooled is None else pooled.shape[0]
        scale = None if guidance is None else torch.full((batch,), guidance, device=device)
        level = torch.full((batch,), sigma, device=device)
        return self.modulation(level, pooled, scale, self._dtype())

    def _modulation_later(
        self, pooled: Tensor | None, guidance: float | None, sigma: float
    ) -> StepModulation:
        """Modulation of a sigma that was not planned: its weights are loaded once more."""
        modulation = self._modulation_of(pooled, guidance, sigma, self.ready(self.modulation))
        self.ready(self.blocks)
        return modulation

    def _plan(
        self,
        conditioning: Conditioning,
        target: Tokens,
        levels: Sequence[float],
        modulations: dict[float, StepModulation],
        device: torch.device,
        shared: dict[tuple[object, ...], Iterable[KeyValue]],
    ) -> Plan:
        txt = self.blocks.txt_in(conditioning.text.txt.to(device, self._dtype()))
        rule, given = self.family.references, conditioning.references
        text = text_ids(txt.shape[1], target.latent)
        if given and rule.isolated:
            own = arrange(text=text, target=target)
            sequence = arrange(text=text, target=target, references=given, order=rule.sequence)
            references, key = None, _reference_key(conditioning)
            if key not in shared:
                shared[key] = self._cached(conditioning, sequence, modulations[0.0], device)
            cached = shared[key]
        else:
            own = sequence = arrange(text=text, target=target, references=given)
            references, cached = self._project(given, device) if given else None, None
        return Plan(
            blocks=self.blocks,
            attention=self.attention,
            txt=txt,
            references=references,
            own=own,
            sequence=sequence,
            rope=self._rope(own, device),
            sigmas=levels,
            modulations=modulations,
            modulate=partial(
                self._modulation_later, conditioning.text.pooled, conditioning.guidance
            ),
            cached=cached,
        )

    def _cached(
        self,
        conditioning: Conditioning,
        sequence: TokenSequence,
        modulation: StepModulation,
        device: torch.device,
    ) -> Iterable[KeyValue]:
        """Asks the reference cache for the keys and values of isolated references."""
        alone = sequence.only("reference")
        computed = ReferencePass(
            blocks=self.blocks,
            attention=self.attention,
            references=self._project(conditioning.references, device),
            sequence=alone,
            rope=self._rope(alone, device),
            modulation=modulation,
        )
        return self.reference_cache(tuple(one.tokens for one in conditioning.references), computed)

    def _project(self, references: Sequence[Reference], device: torch.device) -> Tensor:
        """Scales and projects references to (B, R, hidden)."""
        several = [one.tokens.latent.to_network(one.tokens.values) for one in references]
        batch = max(values.shape[0] for values in several)
        joined = torch.cat([values.expand(batch, -1, -1) for values in several], dim=1)
        return self.blocks.img_in(joined.to(device, self._dtype()))

    def _rope(self, sequence: TokenSequence, device: torch.device) -> Rope:
        return rope_table(sequence.ids, self.spec.axes_dim, self.spec.theta, device)


def _reference_key(conditioning: Conditioning) -> tuple[object, ...]:
    """A key that is equal for conditionings of one run with the same references."""
    positions = (
        (id(one.tokens.values), one.tokens.ids.cpu().numpy().tobytes())
        for one in conditioning.references
    )
    return (conditioning.guidance, *positions)


def build_flux(
    family: FluxFamily,
    spec: TransformerSpec | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    operations: Operations | None = None,
) -> Flux:
    """Builds the network with uninitialised weights; `spec` None: the family's own."""
    spec = spec or family.transformer
    return Flux(
        family,
        spec,
        FluxModulation(spec, dtype=dtype, device=device, operations=operations),
        FluxBlocks(spec, dtype=dtype, device=device, operations=operations),
    )
