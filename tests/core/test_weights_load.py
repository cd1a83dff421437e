import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from glassbox.flux_core.errors import CheckpointError, FamilyMismatchError
from glassbox.flux_core.families import (
    FLUX1_DEV,
    FLUX1_KONTEXT,
    FLUX1_SCHNELL,
    NANO_AUTOENCODER,
    NANO_KONTEXT,
)
from glassbox.flux_core.image.autoencoder import Autoencoder
from glassbox.flux_core.transformer.flux import Flux, build_flux
from glassbox.flux_core.weights import autoencoder_keys, transformer_keys
from glassbox.flux_core.weights.checkpoint import Checkpoint, open_checkpoint
from glassbox.flux_core.weights.load import load_autoencoder, load_flux, save_bfl
from glassbox.tests.core.checkpoints import (
    autoencoder_state,
    flux1_state,
    prefixed,
    randomise,
    same,
    write,
)


def state_of(network: Flux) -> dict[str, Tensor]:
    return network.modulation.state_dict() | network.blocks.state_dict()


def shards_of(folder: Path, state: dict[str, Tensor]) -> Path:
    keys = sorted(state)
    places: dict[str, str] = {}
    for number in range(3):
        name = f"diffusion_pytorch_model-{number + 1:05d}-of-00003.safetensors"
        write(folder / name, {key: state[key] for key in keys[number::3]})
        places |= dict.fromkeys(keys[number::3], name)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    return folder


def test_both_layouts_load_as_one_file_or_in_shards(tmp_path: Path) -> None:
    state = flux1_state()
    theirs = transformer_keys.to_diffusers(state)
    for path, layout, prefix, files in (
        (write(tmp_path / "a.safetensors", state), "BFL", "", 1),
        (write(tmp_path / "b.safetensors", theirs), "diffusers", "", 1),
        (
            write(tmp_path / "c.safetensors", prefixed(state, "model.diffusion_model.")),
            "BFL",
            "model.diffusion_model.",
            1,
        ),
        (shards_of(tmp_path / "transformer", theirs), "diffusers", "", 3),
    ):
        network, report = load_flux(path)
        assert same(state_of(network), state)
        assert (report.layout, report.prefix, report.files) == (layout, prefix, files)
        assert report.tensors == len(state)
        assert report.parameters == sum(tensor.numel() for tensor in state.values())


def test_an_autoencoder_loads_from_both_layouts(tmp_path: Path) -> None:
    state = autoencoder_state()
    theirs = autoencoder_keys.to_diffusers(state)
    for number, given in enumerate((state, theirs, prefixed(state, "first_stage_model."))):
        path = write(tmp_path / f"{number}.safetensors", given)
        module, report = load_autoencoder(path)
        assert same(module.state_dict(), state)
        assert report.title == "The autoencoder of FLUX.1"


def test_a_report_reads_well(tmp_path: Path) -> None:
    state = prefixed(flux1_state(), "model.diffusion_model.") | {"vae.a": torch.zeros(1)}
    _, report = load_flux(write(tmp_path / "my-kontext.safetensors", state))
    assert str(report).splitlines() == [
        "FLUX.1 Kontext [dev] (guessed from the file name)",
        "my-kontext.safetensors, BFL layout, keys begin with 'model.diffusion_model.'",
        f"{report.tensors} tensors, {report.parameters:,} parameters, float32, 0.01 GB",
        "a custom size: width 128, 2 + 3 blocks, text 48 wide",
        "tensors of other parts in the same file, ignored: 1",
    ]


def test_published_names_load_without_a_copy(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", flux1_state())
    network, _ = load_flux(path)
    addresses = [parameter.data_ptr() for parameter in network.parameters()]
    assert max(addresses) - min(addresses) < path.stat().st_size  # one mapping of the file


def test_a_loaded_model_is_for_use_and_not_for_training(tmp_path: Path) -> None:
    network, _ = load_flux(write(tmp_path / "a.safetensors", flux1_state()))
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not network.modulation.training
    assert not network.blocks.training
    assert not any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_keep_their_type_or_take_the_one_asked_for(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    state = flux1_state()
    path = write(tmp_path / "a.safetensors", {key: one.to(dtype) for key, one in state.items()})
    assert load_flux(path)[1].dtype == dtype
    network, report = load_flux(path, dtype=torch.float32)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    converted = [note for note in report.notes if "converted" in note]
    assert len(converted) == (dtype != torch.float32)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_float8_is_widened_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    assert every.float().nan_to_num().equal(every.to(torch.bfloat16).float().nan_to_num())
    state = {key: one.to(dtype) for key, one in flux1_state().items()}
    network, report = load_flux(write(tmp_path / "a.safetensors", state))
    assert report.dtype == torch.bfloat16
    assert same(state_of(network), {key: one.to(torch.bfloat16) for key, one in state.items()})


def test_a_few_tensors_of_another_type_take_the_type_of_the_rest(tmp_path: Path) -> None:
    state = {key: one.bfloat16() for key, one in flux1_state().items()}
    state["img_in.bias"] = state["img_in.bias"].float()
    _, report = load_flux(write(tmp_path / "a.safetensors", state))
    assert report.dtype == torch.bfloat16
    assert "converted from float32 to bfloat16: 1 of 92 tensors" in report.notes


def test_the_hosts_layers_are_used(tmp_path: Path) -> None:
    class Linear(nn.Linear):
        pass

    operations = SimpleNamespace(**{**vars(nn), "Linear": Linear})
    path = write(tmp_path / "a.safetensors", flux1_state())
    network, _ = load_flux(path, operations=operations)
    assert isinstance(network.blocks.img_in, Linear)
    assert same(state_of(network), flux1_state())


def test_the_family_is_the_users_choice(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", flux1_state())
    network, report = load_flux(path, family=FLUX1_KONTEXT)
    assert network.family == FLUX1_KONTEXT
    assert (report.guessed, report.known_by) == (False, "chosen by hand")
    with pytest.raises(FamilyMismatchError, match="schnell"):
        load_flux(path, family=FLUX1_SCHNELL)
    unguided = write(tmp_path / "b.safetensors", flux1_state(guidance=False))
    assert load_flux(unguided)[0].family == FLUX1_SCHNELL
    with pytest.raises(FamilyMismatchError, match="guidance"):
        load_flux(unguided, family=FLUX1_DEV)


def test_what_we_save_loads_again_and_knows_its_family(tmp_path: Path) -> None:
    network = build_flux(NANO_KONTEXT)
    state = randomise(network.modulation, network.blocks)
    path = tmp_path / "a.safetensors"
    save_bfl(network, path, {"glassbox_family": NANO_KONTEXT.name})
    loaded, report = load_flux(path)
    assert (loaded.family, report.known_by) == (NANO_KONTEXT, "named in the file")
    assert same(state_of(loaded), state)
    save_bfl(loaded, path, {})  # over the file its own weights are mapped from
    again, report = load_flux(path)
    assert (again.family, report.known_by) == (NANO_KONTEXT, "known by its shape")
    assert same(state_of(again), state)
    assert same(state_of(loaded), state)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_saved_nano_autoencoder_keeps_its_groups(tmp_path: Path) -> None:
    module = Autoencoder(replace(NANO_AUTOENCODER, channels=16))
    state = randomise(module)
    save_bfl(module, tmp_path / "a.safetensors", {"glassbox_family": NANO_KONTEXT.name})
    loaded, report = load_autoencoder(tmp_path / "a.safetensors")
    assert loaded.spec == module.spec
    assert report.title == "The autoencoder of FLUX.1 nano"
    assert same(loaded.state_dict(), state)
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        assert torch.equal(loaded.encode(pixels), module.encode(pixels))


def test_a_folder_that_cannot_be_written_to_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="could not be written"):
        save_bfl(nn.Linear(2, 2), tmp_path / "none" / "a.safetensors", {})
    assert list(tmp_path.iterdir()) == []


Change = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("img_in.bias"), r"1 is missing \(img_in\.bias\)"),
        (lambda state: state.pop("img_in.weight"), r"1 is missing \(img_in\.weight\)"),
        (lambda state: state.pop("guidance_in.in_layer.weight"), r"1 is missing \(guidance_in"),
        (
            lambda state: [state.pop(key) for key in list(state) if "blocks.1" in key],
            "blocks.1 is missing",
        ),
        (
            lambda state: [state.pop(key) for key in list(state) if "txt_attn" in key],
            r"12 are missing \(double_blocks\.0\.txt_attn.*, …\)",
        ),
        (
            lambda state: state.update({"img_in.bias": torch.zeros(7)}),
            r"1 is of another shape \(img_in\.bias is 7 and not 128\)",
        ),
        (
            lambda state: state.update(extra=torch.zeros(1), more=torch.zeros(1)),
            r"2 are not known \(extra, more\)",
        ),
        (
            lambda state: state.update({"img_in.bias": torch.zeros(128, dtype=torch.int8)}),
            "weights as int8",
        ),
        (
            lambda state: state.update({"img_in.weight": torch.zeros(128, 384)}),
            "FLUX.1 Fill",
        ),
        (
            lambda state: state.update({"img_in.weight.quant_state.nf4": torch.zeros(1)}),
            "quantised by bitsandbytes.*bfloat16 file",
        ),
        (
            lambda state: state.update({"early_stream_modulations.a.weight": torch.ones(1)}),
            "FLUX.3 transformer",
        ),
    ],
)
def test_a_transformer_file_that_does_not_fit_is_refused(
    tmp_path: Path, change: Change, said: str
) -> None:
    state = flux1_state()
    change(state)
    with pytest.raises(CheckpointError, match=said):
        load_flux(write(tmp_path / "a.safetensors", state))


def test_a_missing_tensor_of_a_diffusers_file_has_its_diffusers_name(tmp_path: Path) -> None:
    state = transformer_keys.to_diffusers(flux1_state())
    del state["transformer_blocks.0.attn.to_k.bias"]
    with pytest.raises(CheckpointError, match=r"1 is missing \(transformer_blocks\.0\.attn\.to_k"):
        load_flux(write(tmp_path / "a.safetensors", state))


def test_files_of_other_parts_are_refused_with_the_right_loader(tmp_path: Path) -> None:
    autoencoder = write(tmp_path / "ae.safetensors", autoencoder_state())
    transformer = write(tmp_path / "model.safetensors", flux1_state())
    t5 = {"encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(2, 2)}
    for load, file, title, setting in (
        (load_flux, autoencoder, "an autoencoder", "autoencoder loader"),
        (load_autoencoder, transformer, "a transformer", "model loader"),
        (load_flux, write(tmp_path / "t5.safetensors", t5), "a T5", "text encoder loader"),
    ):
        with pytest.raises(CheckpointError, match=title) as caught:
            load(file)
        assert caught.value.settings == (setting,)
    with pytest.raises(CheckpointError, match="not known here; it holds 1 tensors, first a"):
        load_flux(write(tmp_path / "other.safetensors", {"a": torch.zeros(1)}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("encoder.conv_in.weight"), r"1 is missing \(encoder\.conv_in"),
        (lambda state: state.pop("encoder.mid.attn_1.q.bias"), r"1 is missing \(encoder\.mid"),
        (
            lambda state: state.update({"bn.running_mean": torch.zeros(2)}),
            "16 channels at 1/8.*32 channels at 1/8, as FLUX.2",
        ),
        (
            lambda state: state.update({"quant_conv.weight": torch.zeros(2, 2, 1, 1)}),
            "Stable Diffusion 1 to XL",
        ),
        (
            lambda state: state.update({"decoder.conv_in.weight": torch.zeros(128, 4, 3, 3)}),
            "4 channels at 1/8",
        ),
        (
            lambda state: state.update({"decoder.conv_in.bias": torch.zeros(5)}),
            "5 and not 128",
        ),
    ],
)
def test_an_autoencoder_file_that_does_not_fit_is_refused(
    tmp_path: Path, change: Change, said: str
) -> None:
    state = autoencoder_state()
    change(state)
    with pytest.raises(CheckpointError, match=said):
        load_autoencoder(write(tmp_path / "a.safetensors", state))


def test_a_full_size_file_is_refused_within_a_second_and_without_reading_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = build_flux(FLUX1_DEV, dtype=torch.bfloat16, device="meta")
    shapes = {key: tuple(one.shape) for key, one in state_of(network).items()}
    del shapes["double_blocks.7.img_mlp.2.weight"]
    header: dict[str, object] = {}
    end = 0
    for key, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path = tmp_path / "flux1-dev.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)  # 24 GB of nothing: a sparse file

    def never(self: Checkpoint, keys: object = None) -> dict[str, Tensor]:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "stream", never)
    monkeypatch.setattr(Checkpoint, "read", never)
    assert len(open_checkpoint(path).shapes) == 779
    start = time.process_time()
    with pytest.raises(CheckpointError, match=r"1 is missing \(double_blocks\.7\.img_mlp\.2"):
        load_flux(path)
    assert time.process_time() - start < 1
