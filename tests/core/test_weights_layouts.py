from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from glassbox.flux_core.errors import CheckpointError
from glassbox.flux_core.specs import AutoencoderSpec
from glassbox.flux_core.weights import autoencoder_keys, transformer_keys
from glassbox.flux_core.weights.key_map import KeyMap, KeyRule, count_numbers
from glassbox.tests.core.checkpoints import (
    TINY_AUTOENCODER,
    TINY_FLUX2_AUTOENCODER,
    TINY_SMALL_DECODER,
    autoencoder_state,
    flux1_state,
    flux2_state,
    prefixed,
    same,
)

Sort = Callable[[Mapping[str, Tensor]], KeyMap | None]


def ours(key_map: KeyMap, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        key: rule.apply([state[part] for part in rule.sources])
        for key, rule in key_map.rules.items()
    }


def sorted_out(sort: Sort, state: Mapping[str, Tensor]) -> tuple[KeyMap, dict[str, Tensor]]:
    key_map = sort(state)
    assert key_map is not None
    assert key_map.unused == ()
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    made = ours(key_map, state)
    assert key_map.shapes(shapes) == {key: tuple(tensor.shape) for key, tensor in made.items()}
    return key_map, made


@pytest.mark.parametrize(
    ("prefix", "guidance"), list(zip(transformer_keys.PREFIXES, (True, False) * 2, strict=True))
)
@pytest.mark.parametrize("make", [flux1_state, flux2_state])
def test_a_transformer_survives_both_layouts_bit_for_bit(
    prefix: str, guidance: bool, make: Callable[..., dict[str, Tensor]]
) -> None:
    state = make(guidance=guidance)
    theirs = transformer_keys.to_diffusers(state)
    assert not state.keys() & theirs.keys()
    for given, name in ((state, "BFL"), (theirs, "diffusers")):
        key_map, made = sorted_out(transformer_keys.transformer_key_map, prefixed(given, prefix))
        assert (key_map.layout, key_map.prefix, key_map.others) == (name, prefix, 0)
        assert same(made, state)


@pytest.mark.parametrize(
    ("prefix", "spec"),
    list(
        zip(
            autoencoder_keys.PREFIXES,
            (TINY_AUTOENCODER, TINY_FLUX2_AUTOENCODER, TINY_SMALL_DECODER),
            strict=True,
        )
    ),
    ids=["1", "2", "small decoder"],
)
def test_an_autoencoder_survives_both_layouts_bit_for_bit(
    prefix: str, spec: AutoencoderSpec
) -> None:
    state = autoencoder_state(spec)
    theirs = autoencoder_keys.to_diffusers(state)
    assert {key for key in theirs.keys() & state.keys() if not key.startswith("bn.")} == {
        f"{part}.{name}.{kind}"
        for part in ("encoder", "decoder")
        for name in ("conv_in", "conv_out")
        for kind in ("weight", "bias")
    }
    for given, name in ((state, "BFL"), (theirs, "diffusers")):
        key_map, made = sorted_out(autoencoder_keys.autoencoder_key_map, prefixed(given, prefix))
        assert (key_map.layout, key_map.prefix, key_map.others) == (name, prefix, 0)
        assert same(made, state)


def test_the_last_modulations_halves_are_swapped() -> None:
    state = flux1_state()
    theirs = transformer_keys.to_diffusers(state)
    shift, scale = state["final_layer.adaLN_modulation.1.weight"].chunk(2)
    assert torch.equal(theirs["norm_out.linear.weight"], torch.cat((scale, shift)))


def test_flux2s_last_modulation_is_swapped_and_its_single_blocks_stay_fused() -> None:
    state = flux2_state()
    theirs = transformer_keys.to_diffusers(state)
    shift, scale = state["final_layer.adaLN_modulation.1.weight"].chunk(2)
    assert torch.equal(theirs["norm_out.linear.weight"], torch.cat((scale, shift)))
    assert torch.equal(
        theirs["single_transformer_blocks.2.attn.to_qkv_mlp_proj.weight"],
        state["single_blocks.2.linear1.weight"],
    )
    assert torch.equal(
        theirs["transformer_blocks.1.attn.to_k.weight"],
        state["double_blocks.1.img_attn.qkv.weight"].chunk(3)[1],
    )
    assert not [key for key in theirs if key.endswith("bias")]


def test_convolutions_beside_encoder_and_decoder_are_brought_inside() -> None:
    state = autoencoder_state(TINY_FLUX2_AUTOENCODER)
    outside = {  # as ComfyUI saves it
        key.replace("encoder.quant", "quant").replace("decoder.post_quant", "post_quant"): one
        for key, one in state.items()
    }
    assert {key for key in outside if "quant" in key} == {
        f"{name}.{kind}"
        for name in ("quant_conv", "post_quant_conv")
        for kind in ("weight", "bias")
    }
    key_map, made = sorted_out(autoencoder_keys.autoencoder_key_map, outside)
    assert key_map.layout == "BFL"
    assert same(made, state)
    both = state | {"quant_conv.weight": torch.zeros(64, 64, 1, 1)}
    key_map = autoencoder_keys.autoencoder_key_map(both)
    assert key_map is not None
    assert key_map.unused == ("quant_conv.weight",)


def test_fused_rows_are_query_key_value_and_mlp() -> None:
    state = flux1_state()
    theirs = transformer_keys.to_diffusers(state)
    rows = [f"single_transformer_blocks.1.{name}.bias" for name in ("attn.to_q", "attn.to_k")]
    rows += [f"single_transformer_blocks.1.{name}.bias" for name in ("attn.to_v", "proj_mlp")]
    stacked = torch.cat([theirs[name] for name in rows])
    assert torch.equal(stacked, state["single_blocks.1.linear1.bias"])
    added = [f"transformer_blocks.0.attn.add_{name}_proj.weight" for name in "qkv"]
    stacked = torch.cat([theirs[name] for name in added])
    assert torch.equal(stacked, state["double_blocks.0.txt_attn.qkv.weight"])


def test_the_decoders_levels_run_the_other_way_in_diffusers() -> None:
    state = autoencoder_state()
    theirs = autoencoder_keys.to_diffusers(state)
    name = "decoder.up_blocks.0.resnets.2.conv1.bias"
    assert torch.equal(theirs[name], state["decoder.up.3.block.2.conv1.bias"])
    assert theirs["decoder.mid_block.attentions.0.to_q.weight"].ndim == 2
    assert "decoder.up_blocks.3.upsamplers.0.conv.weight" not in theirs


@pytest.mark.parametrize("make", [flux1_state, flux2_state])
def test_norms_that_comfyui_saved_as_weight_are_read(
    make: Callable[..., dict[str, Tensor]],
) -> None:
    state = make()
    renamed = {key.replace("_norm.scale", "_norm.weight"): one for key, one in state.items()}
    assert renamed.keys() != state.keys()
    assert same(sorted_out(transformer_keys.transformer_key_map, renamed)[1], state)


def test_other_parts_of_a_whole_checkpoint_are_left_alone() -> None:
    whole = prefixed(flux1_state(), "model.diffusion_model.")
    whole |= prefixed(autoencoder_state(), "vae.") | {"text_encoders.t5.shared": torch.zeros(1)}
    transformer = transformer_keys.transformer_key_map(whole)
    autoencoder = autoencoder_keys.autoencoder_key_map(whole)
    assert transformer is not None
    assert autoencoder is not None
    assert transformer.others == len(whole) - len(transformer.rules)
    assert same(ours(transformer, whole), flux1_state())
    assert same(ours(autoencoder, whole), autoencoder_state())


def test_a_part_that_is_missing_is_named_as_the_file_would() -> None:
    state = prefixed(transformer_keys.to_diffusers(flux1_state()), "model.")
    del state["model.transformer_blocks.1.attn.to_k.weight"]
    del state["model.x_embedder.bias"]
    key_map = transformer_keys.transformer_key_map(state)
    assert key_map is not None
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    lost = key_map.missing("double_blocks.1.img_attn.qkv.weight", shapes)
    assert lost == ["model.transformer_blocks.1.attn.to_k.weight"]
    assert key_map.missing("img_in.bias", shapes) == ["model.x_embedder.bias"]


def test_keys_of_nothing_we_know_have_no_layout() -> None:
    assert transformer_keys.transformer_key_map(["decoder.up.0.block.0.conv1.weight", "a"]) is None
    assert autoencoder_keys.autoencoder_key_map(["double_blocks.0.img_attn.qkv.weight"]) is None


def test_a_block_missing_between_others_is_named() -> None:
    keys = [f"double_blocks.{i}.img_mod.lin.bias" for i in (0, 1, 3)]
    with pytest.raises(CheckpointError, match=r"blocks\.2 is missing, while double_blocks\.3"):
        count_numbers(keys, "double_blocks.")


def test_an_absurd_block_number_costs_nothing() -> None:
    with pytest.raises(CheckpointError, match="is missing"):
        count_numbers(["double_blocks.0.a", "double_blocks.99999.a"], "double_blocks.")
    assert (
        count_numbers(["double_blocks.0.a", f"double_blocks.{'9' * 5000}.a"], "double_blocks.") == 1
    )


def test_parts_that_do_not_fit_one_another_are_refused() -> None:
    rule = KeyRule(("q", "k", "v"))
    with pytest.raises(CheckpointError, match=r"\(4, 3\) and \(4, 2\)"):
        rule.shape({"q": (4, 3), "k": (4, 2), "v": (4, 3)})
    assert rule.shape({"q": (4, 3), "k": (1, 3), "v": (4, 3)}) == (9, 3)
