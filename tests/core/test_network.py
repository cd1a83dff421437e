"""The network against golden numbers, and the promises of the plan."""

import dataclasses

import pytest
import torch

from glassbox.flux_core.errors import FamilyMismatchError, ShapeError
from glassbox.flux_core.families import (
    FLUX1_KONTEXT,
    FLUX1_LATENT,
    FLUX2_DEV,
    FLUX2_KLEIN_4B,
    FLUX2_LATENT,
)
from glassbox.flux_core.sampling.denoise import denoise
from glassbox.flux_core.specs import TransformerSpec
from glassbox.flux_core.tokens.ids import place
from glassbox.flux_core.tokens.pack import latent_tokens
from glassbox.flux_core.transformer.flux import build_flux
from glassbox.flux_core.transformer.modulation import timestep_embedding
from glassbox.flux_core.transformer.rope import rope_table, rotate
from glassbox.flux_core.values import Conditioning, TextFeatures

SPEC = TransformerSpec(
    hidden=32,
    double_blocks=2,
    single_blocks=2,
    mlp_ratio=4.0,
    in_channels=64,
    out_channels=64,
    context_width=24,
    pooled_width=12,
    has_guidance=True,
    axes_dim=(4, 6, 6),
    theta=10_000.0,
)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    net = build_flux(FLUX1_KONTEXT, SPEC).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net


def _target(batch=1, rows=3, columns=2):
    return latent_tokens(torch.randn(batch, 16, 2 * rows, 2 * columns), FLUX1_LATENT)


def _conditioning(batch=1, references=1, guidance=2.5):
    text = TextFeatures(txt=torch.randn(batch, 5, 24), pooled=torch.randn(batch, 12))
    placed = tuple(place(_target(rows=2), index=1, column=3 * k) for k in range(references))
    return Conditioning(text=text, references=placed, guidance=guidance)


def _published(network, x, target, conditioning, sigma):
    """Run one step through the published signature, references appended by hand."""
    spec = target.latent
    references = [(one.values - spec.shift) * spec.scale for one in conditioning.references]
    batch = x.shape[0]
    return network(
        torch.cat([x, *(one.expand(batch, -1, -1) for one in references)], dim=1),
        torch.cat([target.ids, *(one.ids for one in conditioning.references)]),
        conditioning.text.txt.expand(batch, -1, -1),
        torch.zeros(conditioning.text.txt.shape[1], 3),
        torch.full((batch,), sigma),
        conditioning.text.pooled.expand(batch, -1),
        torch.full((batch,), conditioning.guidance),
    )[:, : x.shape[1]]


def test_timestep_embedding_has_the_published_values():
    # reference.md H: cosines first, 1000 t, max period 10000.
    half, guidance = timestep_embedding(torch.tensor([0.5, 3.5]))
    torch.testing.assert_close(
        half[:4], torch.tensor([-0.883849, 0.945946, 0.848507, 0.698697]), atol=2e-6, rtol=0
    )
    torch.testing.assert_close(
        half[128:132], torch.tensor([-0.467772, 0.324325, -0.529184, 0.715418]), atol=2e-6, rtol=0
    )
    torch.testing.assert_close(
        guidance[:3], torch.tensor([0.964887, -0.675330, -0.723518]), atol=2e-6, rtol=0
    )


def test_rotation_has_the_published_angles():
    # reference.md H: position 3, 56 channels, theta 10000; axes 16 + 56 + 56.
    rope = rope_table(torch.tensor([[0.0, 3.0, 0.0]]), (16, 56, 56), 10_000.0)
    cos, sin = rope.real[0, 0], rope.imag[0, 0]
    assert cos.shape == (64,)
    assert torch.equal(cos[:8], torch.ones(8)), "position 0 turns nothing"
    expected = {8: (-0.989992, 0.141120), 9: (-0.554915, 0.831907), 35: (1.0, 0.000417)}
    for pair, (c, s) in expected.items():
        assert abs(cos[pair].item() - c) < 1e-6
        assert abs(sin[pair].item() - s) < 1e-6


def test_rotation_turns_adjacent_pairs():
    rope = rope_table(torch.tensor([[1.0]]), (4,), 10_000.0)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    c, s = rope.real[0, 0], rope.imag[0, 0]
    expected = [c[0] - 2 * s[0], s[0] + 2 * c[0], 3 * c[1] - 4 * s[1], 3 * s[1] + 4 * c[1]]
    torch.testing.assert_close(rotate(x, rope).flatten(), torch.stack(expected))


@pytest.mark.parametrize("references", [0, 1, 2])
def test_a_plan_of_many_steps_equals_the_published_call_of_one(network, references):
    target, conditioning = _target(), _conditioning(references=references)
    sigmas = torch.tensor([1.0, 0.6, 0.3, 0.0])
    with torch.no_grad():
        plan = network.plan(conditioning, target, sigmas)
        for step in range(3):
            x = torch.randn_like(target.values)
            expected = _published(network, x, target, conditioning, float(sigmas[step]))
            torch.testing.assert_close(plan.velocity(x, step), expected, atol=1e-6, rtol=0)


def test_steps_of_a_plan_do_not_depend_on_the_other_steps(network):
    """All modulation is computed up front, yet row by row: the same bits as a plan of one step."""
    target, conditioning, x = _target(), _conditioning(), torch.randn(1, 6, 64)
    with torch.no_grad():
        many = network.plan(conditioning, target, torch.tensor([1.0, 0.7, 0.2, 0.0]))
        one = network.plan(conditioning, target, torch.tensor([0.7, 0.0]))
        assert torch.equal(many.velocity(x, 1), one.velocity(x, 0))


def test_one_prompt_serves_a_batch_of_noise(network):
    target, conditioning = _target(batch=3), _conditioning()
    x = torch.randn(3, 6, 64)
    with torch.no_grad():
        plan = network.plan(conditioning, target, torch.tensor([0.8, 0.0]))
        expected = _published(network, x, target, conditioning, 0.8)
        torch.testing.assert_close(plan.velocity(x, 0), expected, atol=1e-6, rtol=0)


def test_modulation_and_blocks_are_asked_for_once_each_and_never_together(network):
    asked = []

    def ready(module):
        asked.append(module)
        return torch.device("cpu")

    watched = type(network)(FLUX1_KONTEXT, SPEC, network.modulation, network.blocks, ready=ready)
    with torch.no_grad():
        plans = watched.plans(
            [_conditioning(), _conditioning()], _target(), torch.tensor([1.0, 0.5, 0.0])
        )
        asked_before_the_steps = list(asked)
        for plan in plans:
            plan.velocity(torch.randn(1, 6, 64), 0)
    assert asked_before_the_steps == [network.modulation, network.blocks]
    assert asked == asked_before_the_steps, "no step needs the modulation's weights again"


def test_steps_read_no_modulation_weight(network):
    """Exactly the weights of `blocks` are read while sampling: the rest may be freed."""
    import copy

    net = copy.deepcopy(network)
    target, x = _target(), torch.randn(1, 6, 64)
    with torch.no_grad():
        plan = net.plan(_conditioning(), target, torch.tensor([0.8, 0.0]))
        before = plan.velocity(x, 0)
        for parameter in net.modulation.parameters():
            parameter.fill_(float("nan"))
        assert torch.equal(plan.velocity(x, 0), before)


def test_text_of_another_model_is_refused_by_its_widths(network):
    text = TextFeatures(txt=torch.randn(1, 5, 16), pooled=torch.randn(1, 12))
    with pytest.raises(FamilyMismatchError, match=r"16 wide.*24 and 12"):
        network.plan(Conditioning(text=text), _target(), torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize(
    ("family", "widths", "source", "words"),
    [
        (FLUX2_KLEIN_4B, (4096, 768), "", r"pooled 768 \(FLUX\.1\).*\[klein\] 4B, from Qwen3 4B"),
        (
            FLUX2_KLEIN_4B,
            (4096, 768),
            "CLIP-L and T5",
            r"\(FLUX\.1, from CLIP-L and T5\).*Qwen3 4B",
        ),
        (
            FLUX2_KLEIN_4B,
            (12288, 0),
            "Qwen3 8B",
            r"\(FLUX\.2, from Qwen3 8B\).*FLUX\.2 \[klein\] 4B",
        ),
        (FLUX2_DEV, (7680, 0), "", r"\(FLUX\.2\).*FLUX\.2 \[dev\], from Mistral Small 3"),
        (FLUX1_KONTEXT, (15360, 0), "", r"\(FLUX\.2\).*4096 and 768 for FLUX\.1 Kontext \[dev\]"),
    ],
)
def test_text_of_another_model_is_named_with_both_families(family, widths, source, words):
    with torch.device("meta"):
        network = build_flux(family, dataclasses.replace(family.transformer, single_blocks=1))
    pooled = torch.randn(1, widths[1]) if widths[1] else None
    text = TextFeatures(txt=torch.randn(1, 5, widths[0]), pooled=pooled, source=source)
    target = latent_tokens(torch.randn(1, family.latent.channels, 2, 2), family.latent)
    with pytest.raises(FamilyMismatchError, match=words) as caught:
        network.plan(Conditioning(text=text), target, torch.tensor([1.0, 0.0]))
    assert "'Load Text Encoders (FLUX)'" in str(caught.value)


def test_a_reference_of_another_latent_is_refused_by_its_number(network):
    other = dataclasses.replace(FLUX1_LATENT, name="another")
    references = (_target(), dataclasses.replace(_target(), latent=other))
    conditioning = dataclasses.replace(_conditioning(references=0), references=references)
    with pytest.raises(FamilyMismatchError, match="Reference 2 holds another tokens"):
        network.plan(conditioning, _target(), torch.tensor([1.0, 0.0]))


def test_references_and_noise_of_the_other_generation_are_named_with_both(network):
    other = latent_tokens(torch.randn(1, 128, 2, 2), FLUX2_LATENT)
    conditioning = dataclasses.replace(_conditioning(references=0), references=(other,))
    words = r"Reference 1 holds FLUX\.2 tokens.*FLUX\.1 tokens for FLUX\.1 Kontext"
    with pytest.raises(FamilyMismatchError, match=words):
        network.plan(conditioning, _target(), torch.tensor([1.0, 0.0]))
    words = r"noise input holds FLUX\.2 tokens.*FLUX\.1 tokens"
    with pytest.raises(FamilyMismatchError, match=words):
        denoise(network, _conditioning(), other, torch.tensor([1.0, 0.0]))


def test_batches_that_do_not_match_are_refused(network):
    with pytest.raises(ShapeError, match="batch of 2, the noise 3"):
        network.plan(_conditioning(batch=2), _target(batch=3), torch.tensor([1.0, 0.0]))
