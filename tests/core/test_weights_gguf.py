import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from glassbox.flux_core.errors import CheckpointError
from glassbox.flux_core.weights.checkpoint import open_checkpoint
from glassbox.flux_core.weights.load import load_autoencoder, load_flux
from glassbox.flux_core.weights.load_text import load_text_encoders
from glassbox.flux_core.weights.transformer_keys import to_diffusers
from glassbox.tests.core.checkpoints import (
    autoencoder_state,
    flux1_state,
    flux2_state,
    prefixed,
    write,
)
from glassbox.tests.core.quantised_files import gguf_bytes, is_quantised, text, write_bytes
from glassbox.tests.core.test_weights_quantised import largest_error, state_of

State = dict[str, Tensor]
Entries = dict[str, tuple[int, tuple[int, ...], bytes]]
Kind = gguf.GGMLQuantizationType
MADE = {"Q4_0": (32, 18), "Q8_0": (32, 34)}  # quantised by hand here, numbers and bytes a block
DRAWN = ("Q4_K", "Q5_K", "Q6_K")  # of random bits, which the library reads


def by_hand(kind: str, tensor: Tensor) -> tuple[bytes, Tensor]:
    """Quantise rows in blocks of 32 as the format says: half-precision step, then the numbers."""
    blocks = tensor.reshape(-1, 32)
    most = 127 if kind == "Q8_0" else 7
    steps = (blocks.abs().amax(1, keepdim=True) / most).half()
    codes = (blocks / steps.float()).round().clamp(-most - (kind == "Q4_0"), most)
    if kind == "Q8_0":
        body = codes.to(torch.int8).numpy().view(np.uint8)
    else:
        nibbles = (codes + 8).to(torch.uint8)  # the first half of a block lies in the low bits
        body = (nibbles[:, :16] | (nibbles[:, 16:] << 4)).numpy()
    data = np.concatenate([steps.numpy().view(np.uint8), body], axis=1)
    return data.tobytes(), (codes * steps.float()).view_as(tensor)


def drawn(kind: str, shape: tuple[int, ...]) -> tuple[bytes, Tensor]:
    """Random bits with scales that are not too large, and what the library makes of them."""
    number = Kind[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    rows = np.random.default_rng(0).integers(0, 256, (*shape[:-1], shape[-1] // block, size))
    data = rows.astype(np.uint8)
    step = np.frombuffer(np.float16(0.001).tobytes(), dtype=np.uint8)
    if kind == "Q6_K":
        data[..., -2:] = step
    else:
        data[..., :2] = data[..., 2:4] = step
    data = data.reshape(*shape[:-1], -1)
    return data.tobytes(), torch.from_numpy(gguf.dequantize(data, number))


def entries_of(state: State, kind: str) -> tuple[Entries, State]:
    """A file's tensors with the blocks' matrices quantised, the rest float32, float16, bfloat16."""
    entries: Entries = {}
    plain: State = {}
    for place, (key, tensor) in enumerate(state.items()):
        shape = tuple(tensor.shape)
        if is_quantised(key, tensor) and (kind in MADE or shape[1] % 256 == 0):
            data, plain[key] = by_hand(kind, tensor) if kind in MADE else drawn(kind, shape)
            entries[key] = (Kind[kind].value, shape, data)
            continue
        name = ("F32", "F16", "BF16")[place % 3]
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]
        stored = tensor.to(dtype)
        plain[key] = stored.float()
        entries[key] = (Kind[name].value, shape, stored.view(torch.uint8).numpy().tobytes())
    return entries, plain


@pytest.mark.parametrize("kind", [*MADE, *DRAWN])
@pytest.mark.parametrize("make", [flux1_state, flux2_state])
def test_a_gguf_file_equals_what_it_stands_for(
    tmp_path: Path, make: Callable[[], State], kind: str
) -> None:
    entries, plain = entries_of(make(), kind)
    file = write_bytes(tmp_path / "flux1-kontext-dev.gguf", gguf_bytes(entries))
    network, report = load_flux(file, dtype=torch.float32)
    assert largest_error(state_of(network), plain) <= 1e-6
    count = sum(entry[0] == Kind[kind].value for entry in entries.values())
    assert count > 2
    assert f"dequantised from {kind} to float32: {count} tensors" in str(report)
    assert f"{sum(one.numel() for one in plain.values()):,} parameters" in str(report)
    assert load_flux(file)[1].dtype == torch.bfloat16 or kind in DRAWN
    if make is flux1_state:
        assert "Kontext" in report.title


def test_the_librarys_own_writer_is_read(tmp_path: Path) -> None:
    state = flux1_state()
    file = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(str(file), "flux")
    writer.add_array("some.words", ["one", "two"])
    writer.add_bool("some.flag", True)
    plain: State = {}
    for key, tensor in state.items():
        kind = Kind.Q5_1 if is_quantised(key, tensor) else Kind.F32
        data = gguf.quantize(tensor.numpy(), kind)
        plain[key] = torch.from_numpy(gguf.dequantize(data, kind)).reshape(tensor.shape)
        writer.add_tensor(key, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = open_checkpoint(file)
    assert found.metadata["general.architecture"] == "flux"
    assert found.shapes == {key: tuple(tensor.shape) for key, tensor in state.items()}
    network, _ = load_flux(file, dtype=torch.float32)
    assert largest_error(state_of(network), plain) <= 1e-6


def test_prefixes_diffusers_names_and_folded_axes_are_read(tmp_path: Path) -> None:
    entries, plain = entries_of(prefixed(flux1_state(), "model.diffusion_model."), "Q8_0")
    network, report = load_flux(write_bytes(tmp_path / "a.gguf", gguf_bytes(entries)))
    assert report.prefix == "model.diffusion_model."
    entries, plain = entries_of(to_diffusers(flux1_state()), "Q8_0")
    file = write_bytes(tmp_path / "b.gguf", gguf_bytes(entries))
    network, report = load_flux(file, dtype=torch.float32)
    assert report.layout == "diffusers"
    assert largest_error(to_diffusers(state_of(network)), plain) <= 1e-6
    entries, plain = entries_of(autoencoder_state(), "Q8_0")
    key = "decoder.conv_in.weight"
    kind, shape, data = entries[key]
    entries[key] = (kind, (shape[0], 16 * 9), data)
    note = text("comfy.gguf.orig_shape." + key) + struct.pack("<IIQ4i", 9, 5, 4, *shape)
    file = write_bytes(tmp_path / "c.gguf", gguf_bytes(entries, note))
    module, _ = load_autoencoder(file, dtype=torch.float32)
    assert largest_error(module.state_dict(), plain) <= 1e-6


def test_what_is_not_quantised_is_not_copied(tmp_path: Path) -> None:
    state = {key: tensor.bfloat16() for key, tensor in flux1_state().items()}
    entries: Entries = {
        key: (30, tuple(one.shape), one.view(torch.uint8).numpy().tobytes())
        for key, one in state.items()
    }
    file = write_bytes(tmp_path / "a.gguf", gguf_bytes(entries))
    network, report = load_flux(file)
    assert report.dtype == torch.bfloat16
    assert largest_error(state_of(network), state) == 0
    addresses = [parameter.data_ptr() for parameter in network.parameters()]
    assert max(addresses) - min(addresses) < file.stat().st_size  # one mapping of the file


def test_noted_axes_that_do_not_fit_are_not_believed(tmp_path: Path) -> None:
    for noted in ((4, 4, 4), (-8, -8), (2, 2**31 - 1)):
        sides = struct.pack(f"<IIQ{len(noted)}i", 9, 5, len(noted), *noted)
        note = text("comfy.gguf.orig_shape.one") + sides
        file = write_bytes(tmp_path / "a.gguf", gguf_bytes(tiny(shape=(8, 8)), note))
        fits = noted == (4, 4, 4)
        assert open_checkpoint(file).shapes["one"] == (noted if fits else (8, 8))


def tiny(kind: int = 0, shape: tuple[int, ...] = (2, 32), data: bytes = bytes(256)) -> Entries:
    return {"one": (kind, shape, data), "two": (0, (8,), bytes(32))}


def number(value: int) -> bytes:
    return struct.pack("<Q", value)


def words(count: int, content: bytes = b"") -> bytes:
    """Metadata: an array of text that says it has so many."""
    return text("words") + struct.pack("<IIQ", 9, 8, count) + content


@pytest.mark.parametrize(
    "data",
    [
        b"GGUF",
        b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + number(2**62),
        gguf_bytes(tiny(), words(2**61)),
        gguf_bytes(tiny(), words(1, number(2**63))),
        gguf_bytes(tiny(), text("a") + struct.pack("<IIQ", 9, 4, 2**62)),
        gguf_bytes(tiny(shape=(2**60,))),
        gguf_bytes(tiny(shape=(2**40, 2**40, 2**40))),
        gguf_bytes(tiny())[:-1],
    ],
)
def test_a_gguf_file_that_promises_more_than_it_has_is_refused_at_once(
    tmp_path: Path, data: bytes
) -> None:
    file = write_bytes(tmp_path / "a.gguf", data)
    start = time.process_time()
    with pytest.raises(CheckpointError, match="cut short"):
        open_checkpoint(file)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (gguf_bytes(tiny(), version=1), "of version 1"),
        (gguf_bytes(tiny(), text("a") + struct.pack("<I", 77)), "unknown type 77"),
        (gguf_bytes(tiny(), text(b"\xff\xfe") + struct.pack("<IB", 0, 1)), "is not text"),
        (gguf_bytes(tiny(), text("general.alignment") + struct.pack("<II", 4, 0)), "0 bytes apart"),
        (gguf_bytes(tiny(kind=8, shape=(2, 33))), "rows of 'one' are 33 long"),
        (gguf_bytes(tiny(kind=9)), "as Q8_1, which the gguf library cannot read"),
        (gguf_bytes(tiny(kind=26)), "as I32, which the gguf library cannot read"),
        (gguf_bytes(tiny(kind=4)), "as type 4, which the gguf library cannot read"),
        (gguf_bytes(tiny()).replace(text("two"), text("one")), "'one' stands twice"),
        (gguf_bytes({}), "holds no tensors"),
    ],
)
def test_a_broken_gguf_file_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(write_bytes(tmp_path / "a.gguf", data))


def test_a_download_that_stopped_anywhere_is_refused(tmp_path: Path) -> None:
    entries, _ = entries_of(flux1_state(), "Q8_0")
    whole = gguf_bytes(entries)
    for share in range(1, 20):
        file = write_bytes(tmp_path / "a.gguf", whole[: len(whole) * share // 20])
        with pytest.raises(CheckpointError, match="cut short"):
            load_flux(file)


def test_a_file_that_shrinks_between_opening_and_reading_is_refused(tmp_path: Path) -> None:
    entries, _ = entries_of(flux1_state(), "Q8_0")
    whole = gguf_bytes(entries)
    file = write_bytes(tmp_path / "a.gguf", whole)
    found = open_checkpoint(file)
    file.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="could not be read after it was opened"):
        found.read()


def test_a_block_whose_scale_is_not_finite_is_refused_with_its_weight(tmp_path: Path) -> None:
    for scale in (float("nan"), float("inf")):
        data = np.float16(scale).tobytes() + bytes([1] * 32) + bytes(34)
        entries = tiny(kind=8, data=data)
        found = open_checkpoint(write_bytes(tmp_path / "a.gguf", gguf_bytes(entries)))
        with pytest.raises(
            CheckpointError, match="'one' holds numbers as Q8_0 that are not finite"
        ):
            found.read()


def test_an_empty_tensor_stays_empty(tmp_path: Path) -> None:
    found = open_checkpoint(
        write_bytes(tmp_path / "a.gguf", gguf_bytes(tiny(kind=12, shape=(0, 256), data=b"")))
    )
    assert found.read()["one"].shape == (0, 256)


def test_a_gguf_under_another_name_is_known_by_its_content(tmp_path: Path) -> None:
    entries, plain = entries_of(flux1_state(), "Q8_0")
    network, _ = load_flux(
        write_bytes(tmp_path / "a.safetensors", gguf_bytes(entries)), dtype=torch.float32
    )
    assert largest_error(state_of(network), plain) <= 1e-6
    with pytest.raises(CheckpointError, match="no whole safetensors file"):
        load_flux(write_bytes(tmp_path / "b.gguf", b"GGML" + bytes(100)))


def test_loaders_of_transformers_and_text_encoders_name_each_other(tmp_path: Path) -> None:
    entries: Entries = {
        "token_embd.weight": (0, (4, 8), bytes(128)),
        "blk.0.attn_q.weight": (0, (8,), bytes(32)),
    }
    file = write_bytes(tmp_path / "t5.gguf", gguf_bytes(entries))
    with pytest.raises(CheckpointError, match=r"as llama\.cpp names it") as caught:
        load_flux(file)
    assert caught.value.settings == ("text encoder loader",)
    file = write_bytes(tmp_path / "a.gguf", gguf_bytes(entries_of(flux1_state(), "Q8_0")[0]))
    with pytest.raises(CheckpointError, match=r"a\.gguf is a transformer") as caught:
        load_text_encoders([file])
    assert caught.value.settings == ("model loader",)


def test_a_missing_library_is_named_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_bytes(tmp_path / "a.gguf", gguf_bytes(tiny()))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"library gguf.*not installed") as caught:
        open_checkpoint(file)
    assert "pip install gguf" in caught.value.fix


def test_safetensors_need_no_gguf_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    load_flux(write(tmp_path / "a.safetensors", flux1_state()))
