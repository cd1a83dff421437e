"""What other nodes have put on a MODEL our samplers follow, or refuse by name; nothing is lost.

Every node of ComfyUI that gives a MODEL is tried, unless it needs a part of another model, and what
packs do.
"""

from typing import Any

import pytest

from glassbox.tests.graph.probe import run_probe

pytestmark = pytest.mark.graph

NODES = {
    "LoraLoaderModelOnly": "honoured",
    "LoraLoaderBypassModelOnly": "honoured",
    "ModelComputeDtype": "honoured",
    "ModelMergeFlux1": "honoured",
    "ModelMergeSimple": "honoured",
    "ModelSamplingFlux": "changes nothing",
    "TorchCompileModel": "changes nothing",
    "FreeU": "its own error",
}
REFUSED_NODES = {
    "CFGZeroStar": "sampler_post_cfg_function of nodes_cfg",
    "ContextWindowsManual": "context_handler",
    "DifferentialDiffusion": "denoise_mask_function",
    "EasyCache": "outer_sample of easycache",
    "FluxKVCache": "'Flux KV Cache'",
    "LazyCache": "predict_noise of lazycache",
    "ModelSamplingDiscrete": "ModelSamplingDiscrete, V_PREDICTION",
    "ModelSamplingSD3": "ModelSamplingDiscreteFlow, CONST",
    "NAGuidance": "'Normalized Attention Guidance'",
    "PerpNeg": "sampler_cfg_function of nodes_perpneg",
    "PerturbedAttentionGuidance": "sampler_post_cfg_function of nodes_pag",
    "RescaleCFG": "sampler_cfg_function of nodes_model_advanced",
    "ScaleROPE": "'ScaleROPE' moves all position ids",
    "SkipLayerGuidanceDiTSimple": "sampler_calc_cond_batch_function of nodes_slg",
}
UNTRIED = ("as ModelMergeBlocks", "loads one", "needs a part of another model")
PACKS = {
    "block_replaced": "honoured",
    "function_wrapper": "honoured",
    "text_added": "honoured",
    "wrapper_without_key": "honoured",
    "option_of_its_own": "changes nothing",
}
REFUSED_PACKS = {
    "before_each_step": "on_prepare_state",
    "forward_during_the_pass": "The code of another node runs in the network's place",
    "forward_of_the_class": "replaced the network's code: forward_orig (from model_changes)",
    "forward_of_the_object": "replaced the network's code: forward_orig (from model_changes)",
    "forward_patched": "replaced the network's code: diffusion_model.forward_orig",
    "latent_changed": "process_latent_in",
    "network_hidden": "Flux around Quant.QuantFlux",
    "network_left_out": "The code of another node runs in the network's place",
    "network_exchanged": "The MODEL is Flux around torch.nn.modules.linear.Linear",
    "noise_scaled": "noise 2 times as strong",
    "pass_without_a_picture": "A wrapper on the MODEL gave back a NoneType",
    "sampler_wrapper_without_key": "outer_sample of model_changes",
}


@pytest.fixture(scope="module")
def probe() -> dict[str, Any]:
    return run_probe("probe_model_nodes")


def test_no_node_of_comfyui_is_left_out_silently(probe: dict[str, Any]) -> None:
    found = probe["nodes"]
    silent = {name: one for name, one in found.items() if one["verdict"] == "SILENT"}
    assert silent == {}
    untried = [name for name, one in found.items() if one["verdict"] in UNTRIED]
    assert len(found) - len(untried) >= 60
    assert {name: found[name]["verdict"] for name in NODES} == NODES


@pytest.mark.parametrize("name", REFUSED_NODES)
def test_what_only_comfyuis_samplers_follow_is_refused_by_name(
    probe: dict[str, Any], name: str
) -> None:
    _refused(probe["nodes"][name], REFUSED_NODES[name])


def test_what_packs_put_on_a_model_is_followed(probe: dict[str, Any]) -> None:
    assert {name: probe["packs"][name]["verdict"] for name in PACKS} == PACKS


@pytest.mark.parametrize("name", REFUSED_PACKS)
def test_what_packs_replace_is_refused_by_name(probe: dict[str, Any], name: str) -> None:
    assert set(probe["packs"]) == {*PACKS, *REFUSED_PACKS}
    _refused(probe["packs"][name], REFUSED_PACKS[name])


def _refused(found: dict[str, str], words: str) -> None:
    assert found["verdict"] == "refused", found
    for word in (words, "Needed:", "Fix:"):
        assert word in found["what"]
    assert "/" not in found["what"]


def test_a_clean_model_stays_usable_beside_a_clone_with_another_forward(
    probe: dict[str, Any],
) -> None:
    """While that clone is loaded, and after ComfyUI has taken its forward off again."""
    assert [one["verdict"] for one in probe["left_over"]] == ["changes nothing"] * 2


def test_a_network_compiled_as_a_whole_is_followed_in_every_run(probe: dict[str, Any]) -> None:
    assert [one["verdict"] for one in probe["compiled"]] == ["changes nothing"] * 2


def test_flux_kv_cache_under_comfyuis_samplers_works_with_our_conditioning(
    probe: dict[str, Any],
) -> None:
    """It sets another method on the MODEL, which a method named in the conditioning would undo."""
    assert probe["kv"]["from plain"] > 1e-3
    assert probe["kv"]["apart"] == 0.0


def test_schedule_says_that_a_shift_of_another_node_is_not_followed(probe: dict[str, Any]) -> None:
    shifted, plain = probe["shift"]
    assert "'ModelSamplingFlux'" in shifted[0]
    assert "'BasicScheduler'" in shifted[0]
    assert plain == []
