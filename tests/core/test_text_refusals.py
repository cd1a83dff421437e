"""A text encoder file that is wrong is refused by its header, with words that help."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glassbox.flux_core.errors import CheckpointError, FamilyMismatchError, GlassboxError
from glassbox.flux_core.text.modules import CLIP_L, T5_XXL, ClipSpec, T5Spec
from glassbox.flux_core.weights.checkpoint import Checkpoint
from glassbox.tests.parity import text_samples as samples
from glassbox.tests.parity.text_samples import Kit


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return samples.make_kit(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture
def clip_file(kit: Kit, tmp_path: Path) -> Path:
    return samples.save(kit.clip, tmp_path / "clip_l.safetensors", "text_model.")


@pytest.fixture
def t5_file(kit: Kit, tmp_path: Path) -> Path:
    return samples.save(kit.t5, tmp_path / "t5xxl.safetensors")


@pytest.fixture(autouse=True)
def headers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    read_through = Checkpoint.stream

    def read(file: Checkpoint, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        keys = list(keys)
        # What a layer says of its format is text, and is read with the header.
        assert all(key.endswith(".comfy_quant") for key in keys), "weights were read"
        return read_through(file, keys)

    monkeypatch.setattr(Checkpoint, "stream", read)


LOADER = "text encoder loader"


def refuse(
    kit: Kit, error: type[GlassboxError], match: str, *files: Path, by: str | None = LOADER
) -> None:
    """Load as a file says and in the dtype that ComfyUI chooses: the same is refused."""
    for dtype in (None, torch.float32):
        with pytest.raises(error, match=match) as caught:
            kit.load(*files, dtype=dtype)
        assert caught.value.settings[:1] == (() if by is None else (by,))


OTHERS = (
    ("double_blocks.0.img_attn.qkv.weight", "a transformer", "model loader"),
    ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "a transformer", "model loader"),
    ("transformer_blocks.0.attn.to_q.weight", "a diffusion transformer", LOADER),
    ("decoder.mid.block_1.conv1.weight", "an autoencoder", "autoencoder loader"),
    ("decoder.mid_block.resnets.0.conv1.weight", "an autoencoder", "autoencoder loader"),
    ("transformer.resblocks.0.attn.in_proj_weight", "a CLIP text encoder", LOADER),
    ("model.layers.0.self_attn.q_proj.weight", "a language model", LOADER),
    ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "a LoRA", "LoRA loader"),
    ("vision_model.embeddings.patch_embedding.weight", "an image encoder", LOADER),
    ("something.else", "a file of 1 tensors that are no text encoder", LOADER),
)


@pytest.mark.parametrize(("key", "name", "setting"), OTHERS)
def test_a_file_without_text_encoder_says_what_it_is(
    kit: Kit, clip_file: Path, tmp_path: Path, key: str, name: str, setting: str
) -> None:
    file = samples.save({key: torch.zeros(2, 2)}, tmp_path / "wrong.safetensors")
    refuse(kit, CheckpointError, rf"wrong\.safetensors is {name}", clip_file, file, by=setting)


def test_text_encoders_of_other_models_are_named(
    kit: Kit, clip_file: Path, t5_file: Path, tmp_path: Path
) -> None:
    clip_g = ClipSpec(width=1280, layers=32, ffn=5120, vocabulary=49408, positions=77)
    file = samples.meta_file(clip_g.shapes(), tmp_path / "clip_g.safetensors", "text_model.")
    refuse(kit, FamilyMismatchError, r"clip_g\.safetensors is CLIP-G", file, t5_file)
    xl = T5Spec(width=2048, layers=24, ffn=5120, vocabulary=32128, heads=32, head_dim=64)
    file = samples.meta_file(xl.shapes(), tmp_path / "t5_xl.safetensors", "encoder.")
    refuse(kit, FamilyMismatchError, r"t5_xl\.safetensors is T5 XL", file, clip_file)
    umt5 = xl.shapes() | {
        f"block.{n}.layer.0.SelfAttention.relative_attention_bias.weight": (32, 32)
        for n in range(24)
    }
    file = samples.meta_file(umt5, tmp_path / "umt5.safetensors", "encoder.")
    refuse(kit, FamilyMismatchError, "is UMT5", file, clip_file)
    old = {name.replace("wi_0", "wi"): shape for name, shape in xl.shapes().items()}
    file = samples.meta_file(old, tmp_path / "t5_v1.safetensors", "encoder.")
    refuse(kit, FamilyMismatchError, "first version", file, clip_file)


def test_encoders_of_two_models_are_refused(kit: Kit, t5_file: Path, tmp_path: Path) -> None:
    file = samples.meta_file(CLIP_L.shapes(), tmp_path / "clip_l_real.safetensors")
    refuse(kit, FamilyMismatchError, "CLIP is 768 wide and T5 is 48 wide", file, t5_file)


def test_a_wrong_number_of_encoders_is_refused(
    kit: Kit, clip_file: Path, t5_file: Path, tmp_path: Path
) -> None:
    refuse(kit, CheckpointError, r"T5 is missing; given was clip_l\.safetensors", clip_file)
    refuse(kit, CheckpointError, "CLIP-L is missing", t5_file)
    other = samples.save(kit.clip, tmp_path / "other.safetensors")
    refuse(kit, CheckpointError, r"2 CLIP-L encoders", clip_file, other)
    refuse(kit, CheckpointError, r"2 T5 encoders", clip_file, t5_file, t5_file)
    refuse(kit, CheckpointError, "given was nothing")


def test_missing_extra_and_misshapen_tensors_are_named(
    kit: Kit, clip_file: Path, t5_file: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.safetensors"
    less = dict(kit.clip)
    del less["encoder.layers.1.mlp.fc2.bias"]
    samples.save(less, bad)
    refuse(kit, CheckpointError, r"1 is missing \(encoder.*\.1\.mlp\.fc2", bad, t5_file, by=None)
    more = kit.clip | {"encoder.layers.1.mlp.fc3.bias": torch.zeros(3)}
    samples.save(more, bad)
    refuse(kit, CheckpointError, r"1 is not known .*fc3", bad, t5_file, by=None)
    stray = kit.t5 | {"adapter.weight": torch.zeros(3)}
    samples.save(stray, bad)
    refuse(kit, CheckpointError, r"beside its text encoder.*adapter", bad, clip_file)
    wrong = kit.t5 | {"encoder.block.1.layer.0.SelfAttention.k.weight": torch.zeros(5, 48)}
    samples.save(wrong, bad)
    refuse(kit, CheckpointError, "is 5x48 and not 32x48", bad, clip_file, by=None)
    del wrong["shared.weight"]
    samples.save(wrong, bad)
    refuse(kit, CheckpointError, r"'embed_tokens\.weight' is missing", bad, clip_file, by=None)


def test_full_size_files_that_lost_their_last_layer_are_refused(
    kit: Kit, clip_file: Path, tmp_path: Path
) -> None:
    """The depth is not read from a file of the published width: it is known."""
    short = {k: s for k, s in CLIP_L.shapes().items() if not k.startswith("encoder.layers.11")}
    clip = samples.meta_file(short, tmp_path / "clip_l.safetensors", "text_model.")
    t5 = samples.meta_file(T5_XXL.shapes(), tmp_path / "t5xxl.safetensors", "encoder.")
    refuse(kit, CheckpointError, "does not fit CLIP-L.*16 are missing", clip, t5, by=None)


def test_packed_weights_are_refused(kit: Kit, clip_file: Path, tmp_path: Path) -> None:
    key = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    packed = kit.t5 | {key: kit.t5[key].to(torch.int8)}
    file = samples.save(packed, tmp_path / "int8.safetensors")
    refuse(kit, CheckpointError, r"int8\.safetensors stores weights as int8", clip_file, file)


def test_a_file_cut_short_is_refused(kit: Kit, clip_file: Path, t5_file: Path) -> None:
    t5_file.write_bytes(t5_file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError):
        kit.load(clip_file, t5_file)
    t5_file.unlink()
    with pytest.raises(CheckpointError):
        kit.load(clip_file, t5_file)
