import json
import pickle
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from glassbox.flux_core.errors import CheckpointError
from glassbox.flux_core.weights.checkpoint import open_checkpoint
from glassbox.tests.core.checkpoints import same, write


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"layer.{i}.weight": torch.randn(4, 3 + i, generator=generator, dtype=torch.bfloat16)
        for i in range(6)
    }


def write_shards(folder: Path, stem: str = "model", *, index: bool = True) -> dict[str, Tensor]:
    tensors = some_tensors()
    shards: dict[str, str] = {}
    for number in range(3):
        name = f"{stem}-{number + 1:05d}-of-00003.safetensors"
        part = dict(list(tensors.items())[2 * number : 2 * number + 2])
        write(folder / name, part)
        shards |= dict.fromkeys(part, name)
    if index:
        text = json.dumps({"metadata": {}, "weight_map": shards})
        (folder / f"{stem}.safetensors.index.json").write_text(text)
    return tensors


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_a_file_tells_its_shapes_and_gives_its_tensors(tmp_path: Path) -> None:
    tensors = some_tensors() | {"empty": torch.zeros(0, 3), "one": torch.tensor(1.0)}
    file = write(tmp_path / "a.safetensors", tensors, {"name": "value"})
    checkpoint = open_checkpoint(file)
    assert checkpoint.shapes == {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    assert checkpoint.dtypes == {key: tensor.dtype for key, tensor in tensors.items()}
    assert checkpoint.metadata == {"name": "value"}
    assert same(checkpoint.read(), tensors)
    assert list(checkpoint.read(["one"])) == ["one"]


def test_reading_maps_the_file_and_copies_nothing(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", some_tensors())
    tensors = open_checkpoint(file).read()
    addresses = [tensor.data_ptr() for tensor in tensors.values()]
    assert max(addresses) - min(addresses) < file.stat().st_size  # windows on one mapping
    tensors["layer.0.weight"].zero_()  # and the file is safe from what is done to them
    assert same(open_checkpoint(file).read(), some_tensors())


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("chosen", ["", "model-00002-of-00003.safetensors"])
def test_a_set_of_shards_opens_by_its_folder_or_by_any_shard(
    tmp_path: Path, index: bool, chosen: str
) -> None:
    tensors = write_shards(tmp_path, index=index)
    checkpoint = open_checkpoint(tmp_path / chosen)
    assert len(checkpoint.files) == 3
    assert same(checkpoint.read(), tensors)


def test_a_set_of_shards_opens_by_its_index(tmp_path: Path) -> None:
    tensors = write_shards(tmp_path)
    assert same(open_checkpoint(tmp_path / "model.safetensors.index.json").read(), tensors)


def test_a_folder_with_one_file_opens(tmp_path: Path) -> None:
    write(tmp_path / "diffusion_pytorch_model.safetensors", some_tensors())
    (tmp_path / "config.json").write_text("{}")
    assert same(open_checkpoint(tmp_path).read(), some_tensors())


def test_a_folder_with_variants_opens_the_plain_one(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", some_tensors())
    write(tmp_path / "model.fp16.safetensors", {"other": torch.zeros(1)})
    assert same(open_checkpoint(tmp_path).read(), some_tensors())


def test_a_folder_with_several_models_is_refused_with_their_names(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write(tmp_path / f"{name}.safetensors", some_tensors())
    with pytest.raises(CheckpointError, match=r"holds 2 models \(first, second\)"):
        open_checkpoint(tmp_path)


def test_a_whole_diffusers_folder_names_the_folders_of_its_parts(tmp_path: Path) -> None:
    write(tmp_path / "transformer" / "model.safetensors", some_tensors())
    write(tmp_path / "vae" / "model.safetensors", some_tensors())
    with pytest.raises(CheckpointError, match="in its folders transformer, vae"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("index", [True, False])
def test_a_missing_shard_is_named(tmp_path: Path, index: bool) -> None:
    write_shards(tmp_path, index=index)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 of 3 shards are not there: model-00002"):
        open_checkpoint(tmp_path / "model-00001-of-00003.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "../a.safetensors",
        "/a.safetensors",
        "..\\a.safetensors",
        "c:a.safetensors",
        "..",
        "a.bin",
        7,
    ],
)
def test_an_index_cannot_name_files_elsewhere(tmp_path: Path, name: object) -> None:
    write(tmp_path / "a.safetensors", some_tensors())
    folder = tmp_path / "folder"
    folder.mkdir()
    text = json.dumps({"weight_map": dict.fromkeys(some_tensors(), name)})
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="same folder"):
        open_checkpoint(folder)


def test_an_index_that_promises_more_than_its_shards_hold_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["layer.9.weight"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"1 tensors .* first 'layer\.9\.weight'"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}', "\xff"]
)
def test_a_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match="is damaged"):
        open_checkpoint(tmp_path)


def test_the_same_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path / f"model-0000{number}-of-00002.safetensors", some_tensors())
    with pytest.raises(CheckpointError, match=r"'layer\.0\.weight' is both in"):
        open_checkpoint(tmp_path)


def test_a_file_that_vanished_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not there any more"):
        open_checkpoint(tmp_path / "gone.safetensors")


def test_a_file_that_vanishes_between_opening_and_reading_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", some_tensors())
    checkpoint = open_checkpoint(file)
    file.unlink()
    with pytest.raises(CheckpointError, match="after it was opened"):
        checkpoint.read()


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds 0 models"):
        open_checkpoint(tmp_path)


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    save_file({}, str(tmp_path / "a.safetensors"))
    with pytest.raises(CheckpointError, match="holds no tensors"):
        open_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("end", [5, 8, 40, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, end: int) -> None:
    file = write(tmp_path / "a.safetensors", some_tensors())
    file.write_bytes(file.read_bytes()[:end])
    with pytest.raises(CheckpointError, match=r"^a\.safetensors is no whole safetensors file"):
        open_checkpoint(file)


def test_a_pickled_file_is_never_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    for name in ("a.ckpt", "a.pt", "a.bin", "a.safetensors"):
        torch.save({"weight": torch.zeros(2)}, tmp_path / name)
        with pytest.raises(CheckpointError, match="can run code"):
            open_checkpoint(tmp_path / name)
        (tmp_path / name).write_bytes(pickle.dumps(Trap()))
        with pytest.raises(CheckpointError, match="can run code"):
            open_checkpoint(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"GGUF\x03\0\0\0" + bytes(64), "holds no tensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        (b'{"error": "not found"}', "no whole safetensors file"),
        (bytes(range(200, 256)) * 40, "no whole safetensors file"),
        (bytes(4096), "no whole safetensors file"),
        (b"", "is empty"),
    ],
)
def test_what_is_often_found_under_a_models_name_is_named(
    tmp_path: Path, content: bytes, said: str
) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(file)


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"{not json", b""),
        (b'{"a": ' + b"[" * 200_000, b""),
        (b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)),
        ({"a": entry(shape=[-2])}, bytes(8)),
        ({"a": entry(shape=[3])}, bytes(8)),
        ({"a": entry(), "b": entry()}, bytes(8)),
        ({"a": entry(data_offsets=[4, 12])}, bytes(12)),
        ({"a": entry()}, bytes(9)),
        ({"__metadata__": {"a": 3}, "a": entry()}, bytes(8)),
    ],
)
def test_a_malformed_header_is_refused(tmp_path: Path, header: object, data: bytes) -> None:
    file = raw_file(tmp_path / "a.safetensors", header, data)
    with pytest.raises(CheckpointError, match="no whole safetensors file") as caught:
        open_checkpoint(file)
    assert caught.value.__cause__ is None  # it repeats names of the file as they are
    assert str(tmp_path) not in str(caught.value)


def test_a_type_of_less_than_a_byte_is_refused(tmp_path: Path) -> None:
    file = raw_file(tmp_path / "a.safetensors", {"a": entry(dtype="F4", shape=[16])}, bytes(8))
    with pytest.raises(CheckpointError, match="F4, which this pack cannot read"):
        open_checkpoint(file)


def test_a_header_that_claims_to_be_huge_is_refused_at_once(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes((2**60).to_bytes(8, "little") + b"{" + bytes(100))
    start = time.process_time()
    with pytest.raises(CheckpointError, match="no whole safetensors file"):
        open_checkpoint(file)
    assert time.process_time() - start < 1


def test_a_key_that_is_not_there_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "a.safetensors", some_tensors()))
    with pytest.raises(CheckpointError, match="holds no tensor 'nothing'"):
        checkpoint.read(["nothing"])
