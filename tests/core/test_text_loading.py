"""Every layout text encoders are published in gives the same weights, used as they are set."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glassbox.flux_core.errors import (
    CheckpointError,
    NonFiniteError,
    SettingError,
)
from glassbox.flux_core.specs import ClipT5Spec
from glassbox.flux_core.text.encoders import TextEncoders
from glassbox.flux_core.text.modules import CLIP_L, T5_XXL
from glassbox.flux_core.types import Shapes
from glassbox.flux_core.weights.checkpoint import Checkpoint
from glassbox.tests.core.quantised_files import as_bytes
from glassbox.tests.parity import text_samples as samples
from glassbox.tests.parity.text_samples import Kit, State


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return samples.make_kit(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture
def clip_file(kit: Kit, tmp_path: Path) -> Path:
    return samples.save(kit.clip, tmp_path / "clip_l.safetensors", "text_model.")


@pytest.fixture
def t5_file(kit: Kit, tmp_path: Path) -> Path:
    return samples.save(kit.t5, tmp_path / "t5xxl.safetensors")


def assert_same_weights(encoders: TextEncoders, kit: Kit) -> None:
    """Bit for bit, nothing left on the meta device, nothing that trains."""
    clip, t5 = encoders.modules
    ours = {key.removeprefix("text_model."): value for key, value in clip.state_dict().items()}
    assert ours.keys() == kit.clip.keys()
    assert all(torch.equal(ours[key], value) for key, value in kit.clip.items())
    ours = t5.state_dict()
    named = {key.removeprefix("encoder."): value for key, value in kit.t5.items()}
    named["embed_tokens.weight"] = named.pop("shared.weight")
    assert ours.keys() == named.keys()
    assert all(torch.equal(ours[key], value) for key, value in named.items())
    for module in (clip, t5):
        assert not module.training
        assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
        assert not any(weight.requires_grad for weight in module.parameters())
    features = encoders.encode("make the circle red")
    assert torch.isfinite(features.txt).all()


def with_prefix(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def renamed_table(t5: State, *names: str) -> State:
    state = dict(t5)
    table = state.pop("shared.weight")
    return state | {name: table.clone() for name in names}


def layouts(kit: Kit) -> Iterator[tuple[str, State, State]]:
    text = with_prefix(kit.clip, "text_model.")
    ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    projection = {"text_projection.weight": torch.zeros(4, 4), "logit_scale": torch.zeros(())}
    vision = {"vision_model.embeddings.class_embedding": torch.zeros(4)}
    full = {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(4, 4)}
    full |= {"lm_head.weight": torch.zeros(4, 4)}
    both = renamed_table(kit.t5, "shared.weight", "encoder.embed_tokens.weight")
    yield "transformers 4 and ComfyUI", text, kit.t5
    yield "transformers 5", kit.clip, both
    yield "with position ids and projection", text | ids | projection, both
    yield "the whole of CLIP, the whole of T5", text | projection | vision, both | full
    yield "table in the encoder only", text, renamed_table(kit.t5, "encoder.embed_tokens.weight")
    yield (
        "our own module's keys",
        kit.clip,
        {
            key.removeprefix("encoder."): value
            for key, value in renamed_table(kit.t5, "encoder.embed_tokens.weight").items()
        },
    )
    yield (
        "out of a whole checkpoint",
        *(
            with_prefix(text, "text_encoders.clip_l.transformer."),
            with_prefix(kit.t5, "text_encoders.t5xxl.transformer.")
            | {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)},
        ),
    )
    yield (
        "old prefixes",
        *(
            with_prefix(text, "cond_stage_model.transformer."),
            with_prefix(kit.t5, "transformer."),
        ),
    )


LAYOUTS = (
    "transformers 4 and ComfyUI",
    "transformers 5",
    "with position ids and projection",
    "the whole of CLIP, the whole of T5",
    "table in the encoder only",
    "our own module's keys",
    "out of a whole checkpoint",
    "old prefixes",
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_weights(kit: Kit, layout: str, tmp_path: Path) -> None:
    clip, t5 = {name: (clip, t5) for name, clip, t5 in layouts(kit)}[layout]
    clip_file = samples.save(clip, tmp_path / "a.safetensors")
    t5_file = samples.save(t5, tmp_path / "b.safetensors")
    assert_same_weights(kit.load(clip_file, t5_file), kit)
    assert_same_weights(kit.load(t5_file, clip_file), kit)


def test_the_list_of_layouts_is_complete(kit: Kit) -> None:
    assert tuple(name for name, _, _ in layouts(kit)) == LAYOUTS


def test_one_file_may_hold_both(kit: Kit, tmp_path: Path) -> None:
    both = with_prefix(kit.clip, "text_model.") | kit.t5
    assert_same_weights(kit.load(samples.save(both, tmp_path / "both.safetensors")), kit)
    whole = with_prefix(kit.clip, "text_encoders.clip_l.transformer.text_model.")
    whole |= with_prefix(kit.t5, "text_encoders.t5xxl.transformer.")
    whole |= {"vae.decoder.conv_in.weight": torch.zeros(2), "model.x": torch.zeros(2)}
    assert_same_weights(kit.load(samples.save(whole, tmp_path / "whole.safetensors")), kit)


def test_folders_of_shards_load(kit: Kit, clip_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "text_encoder_2"
    names = sorted(kit.t5)
    halves = {1: names[::2], 2: names[1::2]}
    places: dict[str, str] = {}
    for number, half in halves.items():
        shard = f"model-{number:05d}-of-00002.safetensors"
        samples.save({name: kit.t5[name] for name in half}, folder / shard)
        places |= dict.fromkeys(half, shard)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_weights(kit.load(folder, clip_file), kit)
    assert_same_weights(kit.load(clip_file, folder / "model-00002-of-00002.safetensors"), kit)


def test_weights_stay_mapped_from_the_file(kit: Kit, clip_file: Path, t5_file: Path) -> None:
    """T5-XXL is 9.5 GB: its tensors share the pages of the file instead of being copied."""
    encoders = kit.load(clip_file, t5_file)
    maps = Path("/proc/self/maps")
    if maps.exists():  # Linux
        places = [line for line in maps.read_text().splitlines() if str(t5_file) in line]
        spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in places]
        for weight in encoders.modules[1].parameters():
            assert any(start <= weight.data_ptr() < end for start, end in spans)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_of_the_file_is_kept(kit: Kit, stored: torch.dtype, tmp_path: Path) -> None:
    t5 = {key: value.to(stored) for key, value in kit.t5.items()}
    t5["encoder.final_layer_norm.weight"] = kit.t5["encoder.final_layer_norm.weight"]  # odd one
    encoders = kit.load(
        samples.save(kit.clip, tmp_path / "clip.safetensors"),
        samples.save(t5, tmp_path / "t5.safetensors"),
    )
    features = encoders.encode("a red star")
    assert features.txt.dtype == stored
    assert features.pooled.dtype == torch.float32
    wide = encoders.modules[1].state_dict()["block.0.layer.1.DenseReluDense.wo.weight"]
    assert wide.dtype == (torch.float32 if stored == torch.float16 else stored)


def test_a_dtype_can_be_asked_for(kit: Kit, clip_file: Path, t5_file: Path) -> None:
    encoders = kit.load(clip_file, t5_file, dtype=torch.bfloat16)
    features = encoders.encode("a red star")
    assert features.txt.dtype == features.pooled.dtype == torch.bfloat16


def test_fp8_files_become_bfloat16(kit: Kit, clip_file: Path, tmp_path: Path) -> None:
    t5 = {
        key: value.to(torch.float8_e4m3fn) if value.dim() == 2 else value.bfloat16()
        for key, value in kit.t5.items()
    }
    encoders = kit.load(clip_file, samples.save(t5, tmp_path / "t5.safetensors"))
    state = encoders.modules[1].state_dict()
    assert all(value.dtype == torch.bfloat16 for value in state.values())
    key = "block.1.layer.0.SelfAttention.q.weight"
    assert torch.equal(state[key], t5["encoder." + key].bfloat16())


@pytest.mark.parametrize("ending", ["scale_weight", "weight_scale"])
def test_scaled_fp8_files_are_scaled_back(
    kit: Kit, clip_file: Path, tmp_path: Path, ending: str
) -> None:
    """The files ComfyUI's templates use: 8-bit weights with one scale per layer."""
    t5: State = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for key, value in kit.t5.items():
        if ".SelfAttention." not in key or "bias" in key:
            t5[key] = value.half()
            continue
        scale = value.abs().max() / 448
        t5[key] = (value / scale).to(torch.float8_e4m3fn)
        t5[key.removesuffix("weight") + ending] = scale
        t5[key.removesuffix("weight") + "scale_input"] = torch.ones(())
        t5[key.removesuffix("weight") + "comfy_quant"] = as_bytes({"format": "float8_e4m3fn"})
    encoders = kit.load(clip_file, samples.save(t5, tmp_path / "t5.safetensors"))
    state = encoders.modules[1].state_dict()
    for name, value in state.items():
        published = kit.t5["shared.weight" if name == "embed_tokens.weight" else "encoder." + name]
        error = (value.float() - published).abs().max() / published.abs().max()
        assert error < 0.04, name


def test_full_size_inventories_equal_the_published_files() -> None:
    assert len(CLIP_L.shapes()) == 196
    assert len(T5_XXL.shapes()) == 219
    assert count(CLIP_L.shapes()) == 123_060_480
    assert count(T5_XXL.shapes()) == 4_762_310_656


def count(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def test_full_size_files_are_accepted_up_to_their_weights(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def empty(file: Checkpoint, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for key in keys:
            yield key, torch.empty(file.shapes[key], dtype=file.dtypes[key], device="meta")

    monkeypatch.setattr(Checkpoint, "stream", empty)
    clip = samples.meta_file(CLIP_L.shapes(), tmp_path / "clip_l.safetensors", "text_model.")
    t5 = samples.meta_file(T5_XXL.shapes(), tmp_path / "t5xxl.safetensors", "encoder.")
    encoders = kit.load(t5, clip)
    t5_state = encoders.modules[1].state_dict()
    assert {name: tuple(value.shape) for name, value in t5_state.items()} == T5_XXL.shapes()
    assert encoders.clip_tokens == 77
    assert "T5: t5xxl.safetensors, 24 layers, width 4096" in encoders.report
    assert "4,762.3 M parameters, bfloat16" in encoders.report


@pytest.mark.parametrize("length", [0, -3, 513])
def test_a_length_outside_the_bounds_is_refused(
    kit: Kit, clip_file: Path, t5_file: Path, length: int
) -> None:
    with pytest.raises(SettingError, match="1 to 512"):
        kit.load(clip_file, t5_file).encode("red", tokens=length)


def test_lengths_come_from_the_model(kit: Kit, clip_file: Path, t5_file: Path) -> None:
    encoders = kit.load(clip_file, t5_file, text=ClipT5Spec(clip_tokens=32, t5_tokens=24))
    features = encoders.encode("star " * 50)
    assert features.txt.shape[1] == 24
    assert [count.limit for count in features.counts] == [32, 24]
    assert all(count.cut for count in features.counts)
    long = kit.load(clip_file, t5_file, text=ClipT5Spec(clip_tokens=500, t5_tokens=24))
    assert long.clip_tokens == 77  # no more than there are positions


def test_the_host_is_asked_before_the_modules_run(kit: Kit, clip_file: Path, t5_file: Path) -> None:
    encoders = kit.load(clip_file, t5_file)
    calls: list[str] = []
    encoders.ready = lambda: calls.append("ready")
    for module in encoders.modules:
        module.register_forward_pre_hook(lambda *_: calls.append("run"))
    encoders.encode("red")
    assert calls == ["ready", "run", "run"]


def test_a_tokenizer_of_another_model_is_refused(kit: Kit, t5_file: Path, tmp_path: Path) -> None:
    small = dict(kit.clip)
    key = "embeddings.token_embedding.weight"
    small[key] = small[key][:100].clone()
    encoders = kit.load(samples.save(small, tmp_path / "small.safetensors"), t5_file)
    with pytest.raises(CheckpointError, match="its encoder has 100 rows"):
        encoders.encode("red")


def test_weights_that_are_not_numbers_are_reported(
    kit: Kit, clip_file: Path, tmp_path: Path
) -> None:
    broken = dict(kit.t5)
    broken["shared.weight"] = torch.full_like(broken["shared.weight"], torch.nan)
    encoders = kit.load(clip_file, samples.save(broken, tmp_path / "nan.safetensors"))
    with pytest.raises(NonFiniteError, match="T5 gave NaN"):
        encoders.encode("red")
