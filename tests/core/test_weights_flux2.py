"""FLUX.2's files through the loaders that FLUX.1's go through."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glassbox.flux_core.errors import CheckpointError, FamilyMismatchError
from glassbox.flux_core.families import (
    FLUX1_KONTEXT,
    FLUX2_KLEIN_4B,
    FLUX2_KLEIN_9B,
    FLUX2_KLEIN_9B_KV,
    FLUX2_KLEIN_BASE_4B,
    NANO_FLUX2_AUTOENCODER,
    NANO_KLEIN,
)
from glassbox.flux_core.image.autoencoder import Autoencoder
from glassbox.flux_core.specs import AutoencoderSpec
from glassbox.flux_core.transformer.flux import Flux, build_flux
from glassbox.flux_core.weights import autoencoder_keys, transformer_keys
from glassbox.flux_core.weights.checkpoint import Checkpoint
from glassbox.flux_core.weights.load import load_autoencoder, load_flux, save_bfl
from glassbox.tests.core.checkpoints import (
    TINY_FLUX2_AUTOENCODER,
    TINY_SMALL_DECODER,
    autoencoder_state,
    flux1_state,
    flux2_state,
    prefixed,
    randomise,
    same,
    write,
)

STATISTICS = {
    "bn.running_mean": torch.float32,
    "bn.running_var": torch.float32,
    "bn.num_batches_tracked": torch.int64,
}
State = dict[str, Tensor]
Change = Callable[[State], object]


def state_of(network: Flux) -> State:
    return network.modulation.state_dict() | network.blocks.state_dict()


@pytest.mark.parametrize("guidance", [True, False])
def test_a_transformer_loads_from_both_layouts(tmp_path: Path, guidance: bool) -> None:
    state = flux2_state(guidance=guidance)
    theirs = transformer_keys.to_diffusers(state)
    for number, (given, layout) in enumerate(
        (
            (state, "BFL"),
            (prefixed(state, "model.diffusion_model."), "BFL"),
            (theirs, "diffusers"),
            (prefixed(theirs, "model."), "diffusers"),
        )
    ):
        network, report = load_flux(write(tmp_path / f"{number}.safetensors", given))
        assert same(state_of(network), state)
        assert (report.layout, report.tensors) == (layout, len(state))
        assert network.spec.has_guidance == guidance


def test_shards_of_a_folder_are_one_transformer(tmp_path: Path) -> None:
    state = flux2_state(guidance=False)
    theirs = transformer_keys.to_diffusers(state)
    folder, keys = tmp_path / "FLUX.2-klein-base-4B" / "transformer", sorted(theirs)
    places: dict[str, str] = {}
    for number in range(2):
        name = f"diffusion_pytorch_model-{number + 1:05d}-of-00002.safetensors"
        write(folder / name, {key: theirs[key] for key in keys[number::2]})
        places |= dict.fromkeys(keys[number::2], name)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    for path in (folder, index, folder / next(iter(places.values()))):
        network, report = load_flux(path)
        assert same(state_of(network), state)
        assert (report.files, network.family, report.guessed) == (2, FLUX2_KLEIN_BASE_4B, True)


def test_a_report_reads_well(tmp_path: Path) -> None:
    path = write(tmp_path / "flux-2-klein-9b-kv.safetensors", flux2_state(guidance=False))
    network, report = load_flux(path)
    assert network.family == FLUX2_KLEIN_9B_KV
    assert str(report).splitlines() == [
        "FLUX.2 [klein] 9B KV (guessed from the file name)",
        "flux-2-klein-9b-kv.safetensors, BFL layout",
        f"{report.tensors} tensors, {report.parameters:,} parameters, float32, 0.01 GB",
        "a custom size: width 128, 2 + 3 blocks, text 48 wide",
    ]


def test_the_variant_is_the_users_choice(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", flux2_state(guidance=False))
    assert load_flux(path)[0].family == FLUX2_KLEIN_4B
    for family in (FLUX2_KLEIN_9B, FLUX2_KLEIN_9B_KV, FLUX2_KLEIN_BASE_4B):
        network, report = load_flux(path, family=family)
        assert (network.family, report.known_by) == (family, "chosen by hand")
    with pytest.raises(FamilyMismatchError, match=r"FLUX\.2 \[klein\] 4B has.*FLUX\.1 Kontext"):
        load_flux(path, family=FLUX1_KONTEXT)
    flux1 = write(tmp_path / "b.safetensors", flux1_state())
    with pytest.raises(FamilyMismatchError, match=r"FLUX\.1 \[dev\] has.*FLUX\.2 \[klein\] 9B,"):
        load_flux(flux1, family=FLUX2_KLEIN_9B)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_weights_keep_their_type_or_are_widened(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {key: one.to(dtype) for key, one in flux2_state().items()}
    network, report = load_flux(write(tmp_path / "a.safetensors", state))
    assert report.dtype == torch.bfloat16
    assert same(state_of(network), {key: one.to(torch.bfloat16) for key, one in state.items()})


def test_what_we_save_loads_again_and_knows_its_family(tmp_path: Path) -> None:
    network = build_flux(NANO_KLEIN)
    state = randomise(network.modulation, network.blocks)
    path = tmp_path / "a.safetensors"
    save_bfl(network, path, {"glassbox_family": NANO_KLEIN.name})
    loaded, report = load_flux(path)
    assert (loaded.family, report.known_by) == (NANO_KLEIN, "named in the file")
    assert same(state_of(loaded), state)
    module = Autoencoder(NANO_FLUX2_AUTOENCODER)
    state = randomise(module)
    save_bfl(module, path, {"glassbox_family": NANO_KLEIN.name})
    again, report = load_autoencoder(path)
    assert (again.spec, report.title) == (module.spec, "The autoencoder of FLUX.2 nano")
    assert same(again.state_dict(), state)
    assert {key: state[key].dtype for key in STATISTICS} == STATISTICS


@pytest.mark.parametrize(
    "spec", [TINY_FLUX2_AUTOENCODER, TINY_SMALL_DECODER], ids=["full", "small decoder"]
)
def test_an_autoencoder_loads_from_both_layouts(tmp_path: Path, spec: AutoencoderSpec) -> None:
    state = autoencoder_state(spec)
    theirs = autoencoder_keys.to_diffusers(state)
    for number, given in enumerate((state, theirs, prefixed(state, "vae."))):
        module, report = load_autoencoder(write(tmp_path / f"{number}.safetensors", given))
        assert same(module.state_dict(), state)
        assert (module.spec, report.tensors) == (spec, len(state))
        assert report.title == "The autoencoder of FLUX.2"
    narrow = "a decoder 32 channels wide beside an encoder 64 wide"
    assert (narrow in report.notes) == (spec == TINY_SMALL_DECODER)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [None, torch.float32, torch.bfloat16])
def test_statistics_are_float32_and_their_count_a_whole_number(
    tmp_path: Path, stored: torch.dtype, asked: torch.dtype | None
) -> None:
    state = autoencoder_state(TINY_FLUX2_AUTOENCODER)
    weights = {key: one.to(stored) for key, one in state.items() if key not in STATISTICS}
    exact = {key: state[key] for key in STATISTICS}
    module, report = load_autoencoder(
        write(tmp_path / "a.safetensors", weights | exact), dtype=asked
    )
    found = module.state_dict()
    assert same({key: found[key] for key in STATISTICS}, exact)
    target = asked or stored
    assert report.dtype == target
    assert {found[key].dtype for key in weights} == {target}
    count = f"{len(weights)} of {len(state)} tensors"
    assert [note.endswith(count) for note in report.notes] == [True] * (target != stored)
    # A tool that converts everything converts the statistics too.
    every = {key: one.to(stored) for key, one in state.items()}
    module, _ = load_autoencoder(write(tmp_path / "b.safetensors", every), dtype=asked)
    found = module.state_dict()
    assert {key: found[key].dtype for key in STATISTICS} == STATISTICS
    assert torch.equal(found["bn.running_var"], every["bn.running_var"].float())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bn.running_var", float("nan")),
        ("bn.running_var", float("inf")),
        ("bn.running_var", 0.0),
        ("bn.running_var", -1.0),
        ("bn.running_mean", float("nan")),
        ("bn.running_mean", float("inf")),
    ],
)
def test_statistics_that_cannot_be_are_refused(tmp_path: Path, key: str, value: float) -> None:
    state = autoencoder_state(TINY_FLUX2_AUTOENCODER)
    state[key][5] = value
    said = f"{int('mean' in key)} means.*and {int('var' in key)} variances.*of 128 that cannot be"
    with pytest.raises(CheckpointError, match=said):
        load_autoencoder(write(tmp_path / "a.safetensors", state))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("bn.running_mean"), r"1 is missing \(bn\.running_mean\)"),
        (lambda state: state.pop("bn.num_batches_tracked"), r"1 is missing \(bn\.num_batches"),
        (
            lambda state: [state.pop(key) for key in list(state) if key.startswith("bn.")],
            r"3 are missing \(bn\.running_mean, bn",
        ),
        (
            lambda state: state.pop("encoder.quant_conv.bias"),
            r"1 is missing \(encoder\.quant_conv\.bias\)",
        ),
        (
            lambda state: state.update({"bn.running_var": torch.ones(64)}),
            "bn.running_var is 64 and not 128",
        ),
        (
            lambda state: state.update({"bn.num_batches_tracked": torch.ones(3)}),
            "bn.num_batches_tracked is 3 and not a single value",
        ),
        (
            lambda state: state.update({"bn.running_var": torch.ones(128, dtype=torch.int32)}),
            "stores weights as int32",
        ),
        (
            lambda state: state.update({"decoder.conv_in.bias": torch.ones(128).char()}),
            "stores weights as int8",
        ),
        (
            lambda state: state.update({"decoder.conv_in.weight": torch.zeros(128, 16, 3, 3)}),
            r"16 channels at 1/8.*as FLUX\.2 has.*flux2-vae",
        ),
    ],
)
def test_an_autoencoder_file_that_does_not_fit_is_refused(
    tmp_path: Path, change: Change, said: str
) -> None:
    state = autoencoder_state(TINY_FLUX2_AUTOENCODER)
    change(state)
    with pytest.raises(CheckpointError, match=said) as caught:
        load_autoencoder(write(tmp_path / "a.safetensors", state))
    assert caught.value.fix[0].islower()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("txt_in.weight"), r"does not fit FLUX\.2.*1 is missing \(txt_in"),
        (
            lambda state: state.pop("single_stream_modulation.lin.weight"),
            r"1 is missing \(single_stream_modulation\.lin\.weight\)",
        ),
        (
            lambda state: state.pop("double_stream_modulation_txt.lin.weight"),
            r"1 is missing \(double_stream_modulation_txt",
        ),
        (
            lambda state: state.update({"img_in.bias": torch.zeros(128)}),
            r"1 is not known \(img_in\.bias\)",
        ),
        (
            lambda state: state.update({"vector_in.in_layer.weight": torch.zeros(128, 32)}),
            r"1 is not known \(vector_in",
        ),
        (
            lambda state: state.update({"single_blocks.0.linear1.weight": torch.zeros(896, 128)}),
            "single_blocks.0.linear1.weight is 896x128 and not 1152x128",
        ),
        (
            lambda state: [state.pop(key) for key in list(state) if "single_blocks.1" in key],
            "blocks.1 is missing",
        ),
        (
            lambda state: state.update({"early_stream_modulations.a.weight": torch.ones(1)}),
            "FLUX.3 transformer",
        ),
        (
            lambda state: state.update({"img_in.weight_scale": torch.ones(1)}),
            "stores 'img_in.weight' as float32 and calls it scaled float8.*bfloat16 file",
        ),
    ],
)
def test_a_transformer_file_that_does_not_fit_is_refused(
    tmp_path: Path, change: Change, said: str
) -> None:
    state = flux2_state()
    change(state)
    with pytest.raises(CheckpointError, match=said) as caught:
        load_flux(write(tmp_path / "a.safetensors", state))
    assert caught.value.fix[0].islower()


def test_a_mixture_of_both_generations_is_refused(tmp_path: Path) -> None:
    state = flux1_state() | {"single_stream_modulation.lin.weight": torch.zeros(384, 128)}
    with pytest.raises(FamilyMismatchError, match=r"64 channels in.*FLUX\.2 \[dev\].*128 chan"):
        load_flux(write(tmp_path / "a.safetensors", state))
    state = flux2_state() | {"double_blocks.0.img_mod.lin.weight": torch.zeros(768, 128)}
    with pytest.raises(CheckpointError, match=r"1 is not known \(double_blocks\.0\.img_mod"):
        load_flux(write(tmp_path / "a.safetensors", state))


def test_a_missing_tensor_of_a_diffusers_file_has_its_diffusers_name(tmp_path: Path) -> None:
    state = transformer_keys.to_diffusers(flux2_state())
    del state["single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight"]
    with pytest.raises(
        CheckpointError, match=r"missing \(single_transformer_blocks\.0\.attn\.to_qkv"
    ):
        load_flux(write(tmp_path / "a.safetensors", state))
    state = autoencoder_keys.to_diffusers(autoencoder_state(TINY_FLUX2_AUTOENCODER))
    del state["post_quant_conv.bias"]
    with pytest.raises(CheckpointError, match=r"1 is missing \(post_quant_conv\.bias\)"):
        load_autoencoder(write(tmp_path / "b.safetensors", state))


def test_parts_in_the_wrong_loader_are_refused_with_the_right_one(tmp_path: Path) -> None:
    autoencoder, transformer = autoencoder_state(TINY_FLUX2_AUTOENCODER), flux2_state()
    in_autoencoder, in_model = ("autoencoder loader",), ("model loader",)
    for given, load, said, settings in (
        (autoencoder, load_flux, "autoencoder", in_autoencoder),
        (autoencoder_keys.to_diffusers(autoencoder), load_flux, "autoencoder", in_autoencoder),
        (transformer, load_autoencoder, "transformer", in_model),
        (transformer_keys.to_diffusers(transformer), load_autoencoder, "transformer", in_model),
    ):
        with pytest.raises(CheckpointError, match=rf"is a FLUX\.2 {said}\.") as caught:
            load(write(tmp_path / "a.safetensors", given))
        assert caught.value.settings == settings


def test_a_full_size_file_is_refused_within_seconds_and_without_reading_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = build_flux(FLUX2_KLEIN_9B, dtype=torch.bfloat16, device="meta")
    header: dict[str, object] = {}
    end = 0
    for key, tensor in state_of(network).items():
        size = 2 * tensor.numel()
        if key != "single_blocks.7.linear2.weight":
            span = [end, end + size]
            header[key] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": span}
            end += size
    text = json.dumps(header).encode()
    path = tmp_path / "flux-2-klein-9b.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)  # 18 GB of nothing: a sparse file

    def never(self: Checkpoint, keys: object = None) -> State:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "stream", never)
    monkeypatch.setattr(Checkpoint, "read", never)
    start = time.process_time()
    with pytest.raises(CheckpointError, match=r"1 is missing \(single_blocks\.7\.linear2"):
        load_flux(path)
    with pytest.raises(FamilyMismatchError, match=r"4096 wide with 8 \+ 24.*klein\] 4B, which"):
        load_flux(path, family=FLUX2_KLEIN_4B)
    assert time.process_time() - start < 2


def test_a_saved_autoencoder_of_odd_groups_keeps_them(tmp_path: Path) -> None:
    module = Autoencoder(replace(NANO_FLUX2_AUTOENCODER, decoder_channels=32))
    state = randomise(module)
    save_bfl(module, tmp_path / "a.safetensors", {"glassbox_family": NANO_KLEIN.name})
    loaded, _ = load_autoencoder(tmp_path / "a.safetensors")
    assert loaded.spec == module.spec
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latent = module.encode(pixels)
        assert torch.equal(loaded.encode(pixels), latent)
        assert torch.equal(loaded.decode(latent), module.decode(latent))
    assert same(loaded.state_dict(), state)
