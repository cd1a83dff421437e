"""Files made to break a loader are refused at once, in words that can be printed."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glassbox.flux_core.errors import CheckpointError, FamilyMismatchError, shorten
from glassbox.flux_core.specs import AutoencoderSpec
from glassbox.flux_core.weights.autoencoder_keys import to_diffusers as autoencoder_to_diffusers
from glassbox.flux_core.weights.checkpoint import open_checkpoint
from glassbox.flux_core.weights.load import load_autoencoder, load_flux
from glassbox.flux_core.weights.load_text import load_text_encoders
from glassbox.flux_core.weights.text_keys import clip_spec, find_encoders, leftover_keys, t5_spec
from glassbox.flux_core.weights.transformer_keys import to_diffusers as transformer_to_diffusers
from glassbox.tests.core.checkpoints import (
    TINY_AUTOENCODER,
    TINY_FLUX2_AUTOENCODER,
    autoencoder_state,
    flux1_state,
    flux2_state,
    write,
)

ENTRY = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
State = dict[str, Tensor]
CLIP = "embeddings.token_embedding.weight"
T5 = "block.0.layer.0.SelfAttention.q.weight"


def raw_file(path: Path, header: str | bytes, data: bytes = bytes(8)) -> Path:
    text = header if isinstance(header, bytes) else header.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@contextmanager
def refused(said: str, seconds: float = 5) -> Iterator[None]:
    start = time.process_time()
    with pytest.raises(CheckpointError, match=said) as caught:
        yield
    assert time.process_time() - start < seconds
    error: BaseException | None = caught.value
    while error is not None:  # a traceback prints the causes too
        assert str(error).encode("utf-8")
        assert "long." * 40 not in str(error)
        error = error.__cause__
    assert caught.value.fix[0].islower()


def test_an_index_with_a_name_that_is_not_text_is_refused(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    write(tmp_path / "b.safetensors", {"a": torch.zeros(1)})
    index.write_text('{"weight_map": {"\\ud800": "b.safetensors"}}')
    with refused("1 tensors that are not in the shards"):
        open_checkpoint(index)
    index.write_text('{"weight_map": {"a": "\\ud800.safetensors"}}')
    with refused(r"names '\\ud800\.safetensors' as a shard"):
        open_checkpoint(index)


def test_what_the_library_says_of_a_changed_file_is_repeated_in_plain_text(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
    checkpoint = open_checkpoint(file)
    raw_file(file, b'{"\\ud800":' + ENTRY.encode() + b"}")
    with refused(r"could not be read after it was opened \(Error while"):
        checkpoint.read()
    file.unlink()
    with pytest.raises(CheckpointError, match="after it was opened") as caught:
        checkpoint.read()
    assert str(tmp_path) not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("place", ["file", "folder"])
def test_a_file_whose_path_is_not_text_is_refused_before_it_is_read(
    tmp_path: Path, place: str
) -> None:
    bad = os.fsencode(tmp_path) + b"/caf\xe9-kontext"
    os.mkdir(bad)
    folder = Path(os.fsdecode(bad))
    good = write(tmp_path / "a.safetensors", {"a": torch.zeros(1)})
    file = folder / "b.safetensors" if place == "folder" else Path(f"{folder}.safetensors")
    file.write_bytes(good.read_bytes())
    with refused("bytes that are not text.*rename"):
        open_checkpoint(file)
    with refused("bytes that are not text.*rename"):
        open_checkpoint(folder)


def test_a_folder_whose_one_file_has_no_text_for_a_name_is_refused(tmp_path: Path) -> None:
    good = write(tmp_path / "a.safetensors", {"a": torch.zeros(1)})
    folder = tmp_path / "folder"
    folder.mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.safetensors")).write_bytes(good.read_bytes())
    with refused(r"caf\\udce9\.safetensors cannot be read: its name holds bytes that are not text"):
        open_checkpoint(folder)


@pytest.mark.parametrize(("key", "spec"), [(CLIP, clip_spec), (T5, t5_spec)])
def test_a_single_number_in_the_place_of_a_matrix_is_refused(
    key: str, spec: Callable[..., object]
) -> None:
    shapes = {key: (), "embed_tokens.weight": (8, 48), "shared.weight": (8, 48)}
    if spec is t5_spec:
        shapes |= {"block.0.layer.1.DenseReluDense.wi_0.weight": (8, 8)}
        shapes |= {"block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 4)}
    (encoder,) = find_encoders(shapes)
    with refused("is a single value, which tells no size"):
        spec(encoder, shapes)


@pytest.mark.parametrize("name", ["a" * 5000, "b" * 300])
def test_a_shard_name_that_no_file_can_have_is_missing(tmp_path: Path, name: str) -> None:
    text = json.dumps({"weight_map": {"a": f"{name}.safetensors"}})
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with refused("1 of 1 shards are not there: (a{79}|b{79})…"):
        open_checkpoint(tmp_path)


def test_names_are_shortened_and_made_visible() -> None:
    assert shorten("layer.0.weight") == "layer.0.weight"
    assert shorten("a" * 80) == "a" * 80
    assert shorten("a" * 200_000) == "a" * 79 + "…"
    assert shorten("a\n\ud800\x1b[2J") == "a\\n\\ud800\\x1b[2J"


LONG = "long." * 40_000


@pytest.mark.parametrize(
    "names",
    [
        [LONG],
        ["double_blocks.0." + LONG],
        ["double_blocks.0." + LONG, "single_stream_modulation." + LONG],
        ["single_transformer_blocks.0." + LONG, "double_stream_modulation_" + LONG],
        ["double_blocks.0." + LONG + "lora_A.weight"],
        ["encoder.down.0." + LONG],
        ["encoder.down.0." + LONG, "bn." + LONG],
        [CLIP, LONG],
        [T5, LONG],
    ],
)
def test_a_long_name_is_shortened_in_every_message(tmp_path: Path, names: list[str]) -> None:
    file = write(tmp_path / "a.safetensors", {name: torch.zeros(2, 2) for name in names})
    for load in (load_flux, load_autoencoder):
        with refused("is of a kind that is not known|missing|is an? "):
            load(file)
    with refused("no text encoder|beside its text encoder|is an? "):
        load_text_encoders([file], clip_tokenizer=tmp_path, t5_tokenizer=tmp_path)
    with refused("holds no tensor 'long.*…'"):
        open_checkpoint(file).read(["long." * 50_000])


@pytest.mark.parametrize("make", [flux1_state, flux2_state])
def test_a_long_name_beside_a_whole_model_is_shortened(
    tmp_path: Path, make: Callable[[], State]
) -> None:
    file = write(tmp_path / "a.safetensors", make() | {LONG: torch.zeros(1)})
    with refused(r"1 is not known \(long\..*…\)"):
        load_flux(file)


@pytest.mark.parametrize("unit", ["long.", ".", "decoder.", "decoder.\n", "a"])
def test_a_name_of_very_many_parts_costs_no_more_than_its_length(unit: str) -> None:
    name = unit * 200_000
    start = time.process_time()
    leftover_keys([name], [])
    assert time.process_time() - start < 5


def many(stem: str) -> Callable[[State], State]:
    return lambda state: state | {f"{stem}{i}.x": torch.zeros(0) for i in range(3002)}


@pytest.mark.parametrize("stem", ["double_blocks.", "single_blocks."])
@pytest.mark.parametrize("make", [flux1_state, flux2_state])
def test_a_transformer_of_too_many_blocks_is_refused_before_it_is_built(
    tmp_path: Path, stem: str, make: Callable[[], State]
) -> None:
    file = write(tmp_path / "a.safetensors", many(stem)(make()))
    with refused(f"3,002 {stem[:-1]}.*at most 200"):
        load_flux(file)
    state = many("transformer_blocks.")(transformer_to_diffusers(make()))
    with refused("3,002 transformer_blocks.*at most 200"):
        load_flux(write(tmp_path / "b.safetensors", state))


@pytest.mark.parametrize(
    ("stem", "said"),
    [("encoder.down.", "3,002 encoder.*most 8"), ("encoder.down.0.block.", "3,002 .*at most 16")],
)
@pytest.mark.parametrize("spec", [TINY_AUTOENCODER, TINY_FLUX2_AUTOENCODER], ids=["1", "2"])
def test_an_autoencoder_of_too_many_levels_is_refused_before_it_is_built(
    tmp_path: Path, stem: str, said: str, spec: AutoencoderSpec
) -> None:
    state = autoencoder_state(spec)
    with refused(said):
        load_autoencoder(write(tmp_path / "a.safetensors", many(stem)(state)))
    state = many("decoder.up_blocks.")(autoencoder_to_diffusers(state))
    with refused("3,002 decoder.up_blocks.*at most 8"):
        load_autoencoder(write(tmp_path / "b.safetensors", state))


@pytest.mark.parametrize("shape", [(), (0,), (0, 0), (128,), (1, 1), (128, 0), (2**20, 2)])
@pytest.mark.parametrize(
    "key",
    [
        "img_in.weight",
        "txt_in.weight",
        "double_blocks.0.img_mlp.0.weight",
        "final_layer.linear.weight",
        "single_stream_modulation.lin.weight",
    ],
)
def test_a_flux2_file_of_impossible_sizes_is_refused(
    tmp_path: Path, key: str, shape: tuple[int, ...]
) -> None:
    state = flux2_state() | {key: torch.empty(shape, dtype=torch.float16)}
    with pytest.raises((CheckpointError, FamilyMismatchError)) as caught:
        load_flux(write(tmp_path / "a.safetensors", state))
    assert caught.value.fix[0].islower()


@pytest.mark.parametrize("shape", [(), (0,), (128,), (1, 1, 1, 1), (0, 1, 1, 1), (9, 32, 3, 3)])
@pytest.mark.parametrize(
    "key",
    [
        "bn.running_mean",
        "encoder.conv_in.weight",
        "encoder.down.0.block.0.conv1.weight",
        "decoder.conv_in.weight",
        "decoder.up.0.block.0.conv1.weight",
        "encoder.quant_conv.weight",
    ],
)
def test_an_autoencoder_of_impossible_sizes_is_refused(
    tmp_path: Path, key: str, shape: tuple[int, ...]
) -> None:
    state = autoencoder_state(TINY_FLUX2_AUTOENCODER) | {key: torch.zeros(shape)}
    if key == "bn.running_mean" and shape == (128,):
        state[key] = torch.zeros(127)  # 128 is what it has
    with refused("."):
        load_autoencoder(write(tmp_path / "a.safetensors", state))


def test_a_text_encoder_of_too_many_layers_is_refused() -> None:
    clip = {CLIP: (8, 48), "embeddings.position_embedding.weight": (7, 48)}
    clip |= {f"encoder.layers.{number}.mlp.fc1.weight": (8, 8) for number in range(3001)}
    with refused(r"3,001 encoder\.layers.*at most 200"):
        clip_spec(find_encoders(clip)[0], clip)
    t5 = {T5: (8, 48), "shared.weight": (8, 48)} | {f"block.{n}.x": (8, 8) for n in range(3001)}
    with refused("3,001 block.*at most 200"):
        t5_spec(find_encoders(t5)[0], t5)


def test_a_file_of_very_many_text_encoders_is_refused_at_once() -> None:
    shapes = {f"{i}.{CLIP}": (8, 48) for i in range(20_000)}
    with refused("20,000 text encoders"):
        find_encoders(shapes)


def test_a_lone_shard_of_very_many_is_refused_at_once(tmp_path: Path) -> None:
    file = write(tmp_path / "x-00001-of-99999.safetensors", {"a": torch.zeros(1)})
    with refused("99,998 of 99,999 shards are not there: x-00002-of-99999", 1):
        open_checkpoint(file)
    file = write(tmp_path / "x-00001-of-00000.safetensors", {"a": torch.zeros(1)})
    with refused("number 1 of 0"):
        open_checkpoint(file)
