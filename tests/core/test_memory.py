"""What a job is said to take is what it takes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from glassbox.flux_core.families import FLUX1_DEV, FLUX2_AUTOENCODER, FLUX2_DEV, FLUX2_SMALL_DECODER
from glassbox.flux_core.memory import decode_bytes, encode_bytes, plan_bytes, transformer_bytes
from glassbox.flux_core.specs import FluxFamily, TransformerSpec
from glassbox.flux_core.transformer.flux import build_flux
from glassbox.flux_core.transformer.modulation import Modulation, StepModulation
from glassbox.tests.core.checkpoints import TINY_FLUX1, TINY_FLUX2


def vectors_of(modulation: StepModulation) -> list[Tensor]:
    shifts: list[Modulation] = [*modulation.single, modulation.final]
    shifts += [shift for block in (*modulation.img, *modulation.txt) for shift in block]
    return [
        vector
        for shift in shifts
        for vector in (shift.shift, shift.one_plus_scale, shift.gate)
        if vector is not None
    ]


@pytest.mark.parametrize(
    ("family", "spec"), [(FLUX1_DEV, TINY_FLUX1), (FLUX2_DEV, TINY_FLUX2)], ids=["1", "2"]
)
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_modulation_takes_what_is_counted(
    family: FluxFamily, spec: TransformerSpec, batch: int
) -> None:
    network = build_flux(family, spec)
    pooled = torch.zeros(batch, spec.pooled_width) if spec.pooled_width else None
    ones = torch.ones(batch)
    steps = [network.modulation(ones * t, pooled, ones, torch.float32) for t in (1.0, 0.6, 0.3)]
    held = {
        storage.data_ptr(): storage.nbytes()
        for step in steps
        for storage in (vector.untyped_storage() for vector in vectors_of(step))
    }
    assert plan_bytes(spec, len(steps), batch, 4) == sum(held.values())


def test_blocks_that_share_their_modulation_plan_in_little_memory() -> None:
    each, shared = (
        plan_bytes(replace(spec, double_blocks=8, single_blocks=48), 50, 1, 2) / spec.hidden
        for spec in (FLUX1_DEV.transformer, FLUX2_DEV.transformer)
    )
    assert each > 10 * shared
    more = replace(FLUX2_DEV.transformer, single_blocks=100)
    assert plan_bytes(more, 4, 1, 2) == plan_bytes(FLUX2_DEV.transformer, 4, 1, 2)


def test_a_step_takes_memory_by_its_tokens_and_width() -> None:
    spec = FLUX2_DEV.transformer
    one = transformer_bytes(spec, 4608, 1, 2)
    assert 35 * 4608 * spec.hidden * 2 <= one  # 34.6 widths were measured in bfloat16
    assert transformer_bytes(spec, 4608, 2, 2) == 2 * one


def test_a_narrow_decoder_decodes_in_less() -> None:
    pixels = 1024 * 1024
    small, full = (
        decode_bytes(spec, pixels, 4) for spec in (FLUX2_SMALL_DECODER, FLUX2_AUTOENCODER)
    )
    assert small == full * 96 // 128
    assert encode_bytes(FLUX2_SMALL_DECODER, pixels, 4) == encode_bytes(
        FLUX2_AUTOENCODER, pixels, 4
    )
