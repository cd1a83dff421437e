"""The network against golden numbers, and the promises of the plan."""

import copy

import pytest
import torch

from glassbox.flux_core.families import FLUX1_KONTEXT, FLUX1_LATENT
from glassbox.flux_core.specs import TransformerSpec
from glassbox.flux_core.steps import step_of
from glassbox.flux_core.tokens.ids import place
from glassbox.flux_core.tokens.pack import latent_tokens
from glassbox.flux_core.transformer.flux import build_flux
from glassbox.flux_core.transformer.modulation import timestep_embedding
from glassbox.flux_core.transformer.rope import rope_table, rotate, unrotate
from glassbox.flux_core.values import Conditioning, Reference, TextFeatures

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
    placed = [place(_target(rows=2), index=1, column=3 * k) for k in range(references)]
    seen = tuple(Reference(tokens=tokens) for tokens in placed)
    return Conditioning(text=text, references=seen, guidance=guidance)


def _published(network, x, target, conditioning, sigma):
    """Runs one step through the published signature, references appended by hand."""
    spec = target.latent
    seen = [one.tokens for one in conditioning.references]
    references = [(one.values - spec.shift) * spec.scale for one in seen]
    batch = x.shape[0]
    return network(
        torch.cat([x, *(one.expand(batch, -1, -1) for one in references)], dim=1),
        torch.cat([target.ids, *(one.ids for one in seen)]),
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


def test_unrotating_is_the_inverse():
    ids = torch.rand(7, 3) * 100
    x, rope = torch.randn(2, 7, 3, 16), rope_table(ids, (4, 6, 6), 10_000.0)
    torch.testing.assert_close(unrotate(rotate(x, rope), rope), x, atol=1e-6, rtol=0)
    assert float((rotate(x, rope) - x).abs().max()) > 0.1


@pytest.mark.parametrize("references", [0, 1, 2])
def test_a_plan_of_many_steps_equals_the_published_call_of_one(network, references):
    target, conditioning = _target(), _conditioning(references=references)
    sigmas = torch.tensor([1.0, 0.63, 0.27, 0.0])
    with torch.no_grad():
        plan = network.plan(conditioning, target, sigmas)
        for sigma in map(float, sigmas[:-1]):
            x = torch.randn_like(target.values)
            expected = _published(network, x, target, conditioning, sigma)
            torch.testing.assert_close(plan.velocity(x, sigma), expected, atol=1e-6, rtol=0)


def test_steps_of_a_plan_do_not_depend_on_the_other_steps(network):
    """All modulation is computed up front, yet row by row: the same bits as a plan of one step."""
    target, conditioning, x = _target(), _conditioning(), torch.randn(1, 6, 64)
    with torch.no_grad():
        many = network.plan(conditioning, target, [1.0, 0.7, 0.2, 0.0])
        one = network.plan(conditioning, target, [0.7, 0.0])
        assert torch.equal(many.velocity(x, 0.7), one.velocity(x, 0.7))


@pytest.mark.parametrize("sigma", [0.31, 0.999, 0.004])
def test_a_sigma_that_was_not_planned_equals_one_that_was(network, sigma):
    target, conditioning, x = _target(), _conditioning(), torch.randn(1, 6, 64)
    with torch.no_grad():
        plan = network.plan(conditioning, target, [1.0, 0.7, 0.2, 0.0])
        assert sigma not in plan.modulations
        planned = network.plan(conditioning, target, [1.0, 0.7, 0.2, 0.0], asked=[sigma])
        assert set(planned.modulations) == {sigma}
        found = plan.velocity(x, sigma)
        assert torch.equal(found, planned.velocity(x, sigma))
        expected = _published(network, x, target, conditioning, sigma)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        of_one_step = network.plan(conditioning, target, [sigma, 0.0])
        assert torch.equal(found, of_one_step.velocity(x, sigma))
        assert not torch.equal(found, plan.velocity(x, 0.7))


def test_a_sigma_belongs_to_the_step_it_is_inside_of():
    begins = [1.0, 0.7, 0.2]
    steps = {1.0: 0, 0.9: 0, 0.7: 1, 0.6999: 1, 0.3: 1, 0.2: 2, 0.001: 2, 0.0: 2}
    assert {sigma: step_of(sigma, begins) for sigma in steps} == steps
    assert step_of(0.9, [0.8, 0.4]) == 0, "above the first is the first"


def test_one_prompt_serves_a_batch_of_noise(network):
    target, conditioning = _target(batch=3), _conditioning()
    x = torch.randn(3, 6, 64)
    with torch.no_grad():
        plan = network.plan(conditioning, target, [0.8, 0.0])
        expected = _published(network, x, target, conditioning, 0.8)
        torch.testing.assert_close(plan.velocity(x, 0.8), expected, atol=1e-6, rtol=0)


def test_modulation_and_blocks_are_asked_for_once_each_and_never_together(network):
    asked = []

    def ready(module):
        asked.append(module)
        return torch.device("cpu")

    watched = type(network)(FLUX1_KONTEXT, SPEC, network.modulation, network.blocks, ready=ready)
    with torch.no_grad():
        plans = watched.plans([_conditioning(), _conditioning()], _target(), [1.0, 0.5, 0.0])
        asked_before_the_steps = list(asked)
        for plan in plans:
            plan.velocity(torch.randn(1, 6, 64), 0.5)
        assert asked_before_the_steps == [network.modulation, network.blocks]
        assert asked == asked_before_the_steps, "no step needs the modulation's weights again"
        for _ in range(2):
            plans[0].velocity(torch.randn(1, 6, 64), 0.3)
    assert asked[2:] == [network.modulation, network.blocks], "once for a sigma that is not planned"


def test_steps_read_no_modulation_weight(network):
    """Exactly the weights of `blocks` are read while sampling: the rest may be freed."""
    net = copy.deepcopy(network)
    target, x = _target(), torch.randn(1, 6, 64)
    with torch.no_grad():
        plan = net.plan(_conditioning(), target, [0.8, 0.0])
        before = plan.velocity(x, 0.8)
        for parameter in net.modulation.parameters():
            parameter.fill_(float("nan"))
        assert torch.equal(plan.velocity(x, 0.8), before)
