"""Bad files: words that help on the right loader, and a ComfyUI that goes on working."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from PIL import Image
from torch import Tensor

from glassbox.tests.graph import tiny
from glassbox.tests.graph.graphs import Pipeline, edit
from glassbox.tests.graph.server import ComfyError

if TYPE_CHECKING:
    from glassbox.tests.graph.server import Comfy

pytestmark = pytest.mark.graph

State = dict[str, Tensor]
MODEL, TEXT, AUTOENCODER = (
    "GlassboxLoadModel",
    "GlassboxLoadTextEncoders",
    "GlassboxLoadAutoencoder",
)
FOLDERS = {MODEL: "diffusion_models", TEXT: "text_encoders", AUTOENCODER: "vae"}


def load(comfy: "Comfy", loader: str, name: str, family: str = "auto") -> str:
    """Run one loader; its report."""
    graph = Pipeline()
    if loader == MODEL:
        graph.model(name, family)
    elif loader == TEXT:
        graph.encoders(name)
    else:
        graph.autoencoder(name)
    text = graph.show(graph.out("1", 1))
    return comfy.run(graph.nodes)["outputs"][text]["text"][0]


def refused(comfy: "Comfy", loader: str, name: str, family: str = "auto") -> str:
    """Run one loader on a bad file: the words on that node. A good file loads after it."""
    with pytest.raises(ComfyError) as error:
        load(comfy, loader, name, family)
    details = error.value.details
    assert details["node_type"] == loader
    message = details["exception_message"]
    assert "Needed:" in message
    assert "Fix:" in message
    assert "float32" in load(comfy, AUTOENCODER, tiny.AUTOENCODER_FILE)
    return message


def without_a_key(state: State) -> State:
    return {key: value for key, value in state.items() if key != sorted(state)[3]}


def with_another_key(state: State) -> State:
    return {**state, "stray.weight": torch.zeros(3)}


def with_a_wrong_shape(state: State) -> State:
    key = next(key for key in sorted(state, reverse=True) if state[key].ndim > 1)
    return {**state, key: state[key][:-1].contiguous()}


STATES: dict[str, Callable[[], State]] = {
    MODEL: tiny.transformer_state,
    TEXT: tiny.clip_state,
    AUTOENCODER: tiny.autoencoder_state,
}


@pytest.mark.parametrize("loader", STATES)
@pytest.mark.parametrize("change", [without_a_key, with_another_key, with_a_wrong_shape])
def test_a_file_with_wrong_tensors_says_which(
    tiny_comfy: "Comfy", loader: str, change: Callable[[State], State]
) -> None:
    state = STATES[loader]()
    changed = change(state)
    name = f"{change.__name__}.safetensors"
    tiny.save(changed, tiny_comfy.models_dir / FOLDERS[loader] / name)
    odd = {key for key in {**state, **changed} if not _same(state.get(key), changed.get(key))}
    message = refused(tiny_comfy, loader, name)
    (key,) = odd
    assert key.removeprefix("text_model.") in message


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.shape == other.shape


@pytest.mark.parametrize("loader", STATES)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.safetensors", None),
        ("text.safetensors", b"this is no model"),
        ("page.safetensors", b"<html>please log in</html>"),
        ("empty.safetensors", b""),
        ("pickle.safetensors", b"PK\x03\x04" + bytes(64)),
    ],
)
def test_a_broken_file_says_what_it_is(
    tiny_comfy: "Comfy", loader: str, name: str, content: bytes | None
) -> None:
    path = tiny_comfy.models_dir / FOLDERS[loader] / name
    if content is None:
        whole = tiny.save(STATES[loader](), path).read_bytes()
        content = whole[: len(whole) // 2]
    path.write_bytes(content)
    assert name in refused(tiny_comfy, loader, name)


@pytest.mark.parametrize("loader", STATES)
@pytest.mark.parametrize("other", STATES)
def test_a_model_of_another_kind_is_named(tiny_comfy: "Comfy", loader: str, other: str) -> None:
    if loader == other:
        return
    name = f"from_{other}.safetensors"
    tiny.save(STATES[other](), tiny_comfy.models_dir / FOLDERS[loader] / name)
    message = refused(tiny_comfy, loader, name)
    words = {MODEL: "model", TEXT: "text encoder", AUTOENCODER: "autoencoder"}
    found = message.split("Needed:")[0]
    assert words[other] in found or "transformer" in found, message


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("early_stream_modulations.image.lin.weight", "FLUX.3"),
        ("joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "LoRA"),
    ],
)
def test_a_model_of_another_family_is_named(tiny_comfy: "Comfy", key: str, words: str) -> None:
    name = f"{words.replace(' ', '_')}.safetensors"
    tiny.save({key: torch.zeros(4, 4)}, tiny_comfy.models_dir / "diffusion_models" / name)
    assert words in refused(tiny_comfy, MODEL, name)


def test_a_family_the_file_cannot_be_is_refused(tiny_comfy: "Comfy") -> None:
    message = refused(tiny_comfy, MODEL, tiny.SCHNELL_FILE, "flux1-kontext")
    assert "guidance input" in message


def test_an_autoencoder_of_another_latent_is_refused(tiny_comfy: "Comfy") -> None:
    state = tiny.autoencoder_state()
    state["decoder.conv_in.weight"] = state["decoder.conv_in.weight"][:, :4].contiguous()
    name = "four_channels.safetensors"
    tiny.save(state, tiny_comfy.models_dir / "vae" / name)
    assert "4" in refused(tiny_comfy, AUTOENCODER, name)


def test_two_files_of_one_encoder_or_one_file_alone_are_refused(tiny_comfy: "Comfy") -> None:
    for file_2, words in ((tiny.CLIP_FILE, "2 CLIP-L"), ("none", "T5 is missing")):
        graph = Pipeline()
        graph.encoders(tiny.CLIP_FILE, file_2)
        graph.show(graph.out("1", 1))
        with pytest.raises(ComfyError, match=words) as error:
            tiny_comfy.run(graph.nodes)
        assert error.value.details["node_type"] == TEXT


def test_a_file_that_was_never_there_is_refused_before_anything_runs(tiny_comfy: "Comfy") -> None:
    for name in ("absent.safetensors", "../vae/" + tiny.AUTOENCODER_FILE, "/etc/hostname"):
        with pytest.raises(ComfyError) as error:
            load(tiny_comfy, MODEL, name)
        (node,) = error.value.details["node_errors"].values()
        assert node["class_type"] == MODEL
        assert node["errors"][0]["type"] == "value_not_in_list"


def test_a_file_that_vanished_is_refused_and_runs_again_when_it_is_back(
    tiny_comfy: "Comfy",
) -> None:
    path = tiny_comfy.models_dir / "vae" / "fleeting.safetensors"
    tiny.save(tiny.autoencoder_state(), path)
    assert load(tiny_comfy, AUTOENCODER, path.name)
    path.unlink()
    with pytest.raises(ComfyError) as error:
        load(tiny_comfy, AUTOENCODER, path.name)
    assert path.name in str(error.value)
    tiny.save(tiny.autoencoder_state(), path)
    assert load(tiny_comfy, AUTOENCODER, path.name)


def test_a_replaced_file_is_loaded_anew(tiny_comfy: "Comfy") -> None:
    path = tiny_comfy.models_dir / "diffusion_models" / "replaced-kontext.safetensors"
    graph = edit(model=path.name).nodes
    pictures: list[bytes] = []
    for seed in (1, 1, 2):
        _replace(path, tiny.transformer_state(seed=seed))
        (file,) = tiny_comfy.images(tiny_comfy.run(graph))
        with Image.open(io.BytesIO(file)) as picture:
            pictures.append(picture.tobytes())
            assert str(tiny_comfy.models_dir) not in str(picture.info)
    assert pictures[0] == pictures[1] != pictures[2]


def _replace(path: Path, state: State) -> None:
    """Put a new file in the old one's place, as a download does."""
    os.replace(tiny.save(state, path.with_suffix(".partial")), path)


def test_any_shard_opens_its_set_and_a_missing_one_is_named(tiny_comfy: "Comfy") -> None:
    folder = tiny_comfy.models_dir / "diffusion_models" / "sharded-kontext"
    folder.mkdir()
    state = tiny.transformer_state()
    keys = sorted(state)
    stem, weight_map = "diffusion_pytorch_model", {}
    for number, part in enumerate((keys[:20], keys[20:]), 1):
        file = f"{stem}-{number:05}-of-00002.safetensors"
        tiny.save({key: state[key] for key in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / f"{stem}.safetensors.index.json").write_text(index)
    second = f"sharded-kontext/{stem}-00002-of-00002.safetensors"
    assert "2 files" in load(tiny_comfy, MODEL, second)
    (folder / f"{stem}-00001-of-00002.safetensors").unlink()
    assert f"{stem}-00001-of-00002" in refused(tiny_comfy, MODEL, second)
