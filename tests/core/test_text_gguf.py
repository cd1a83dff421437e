"""Text encoders in GGUF files: T5, Qwen3 and Mistral under llama.cpp's names, and what is refused.

The names come from the gguf library's own table; the order of Mistral's rows from what llama.cpp
turns together.
"""

import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from gguf import MODEL_ARCH
from torch import Tensor

from glassbox.flux_core.errors import CheckpointError, FamilyMismatchError, GlassboxError
from glassbox.flux_core.families import MISTRAL_SMALL_3
from glassbox.flux_core.text.modules import T5Spec
from glassbox.flux_core.text.tekken import read_tekken
from glassbox.flux_core.text.tokenizers import ChatTokenizer
from glassbox.flux_core.weights.gguf_text import in_halves
from glassbox.flux_core.weights.load import load_flux
from glassbox.flux_core.weights.text_encoders import load_text_encoders
from glassbox.flux_core.weights.text_files import open_text
from glassbox.tests.core.checkpoints import write
from glassbox.tests.core.quantised_files import State, gguf_bytes, text, write_bytes
from glassbox.tests.core.test_weights_gguf import Entries, Kind, by_hand
from glassbox.tests.parity import text_language_samples as samples
from glassbox.tests.parity import text_samples
from glassbox.tests.parity.text_language_samples import LanguageKit
from glassbox.tests.parity.text_samples import Kit

T5 = T5Spec(width=64, layers=2, ffn=96, vocabulary=320, heads=4, head_dim=16)
PROMPT = "make the circle red"
ARCHITECTURES = {
    "t5": MODEL_ARCH.T5,
    "t5encoder": MODEL_ARCH.T5ENCODER,
    "qwen3": MODEL_ARCH.QWEN3,
    "llama": MODEL_ARCH.LLAMA,
    "mistral3": MODEL_ARCH.MISTRAL3,
}
HEAD = 8  # rows of one head of the tiny models
CONTROL, WORD, UNUSED = 3, 1, 5


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> LanguageKit:
    return samples.qwen_kit(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> LanguageKit:
    return samples.mistral_kit(tmp_path_factory.mktemp("mistral"))


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    generator = torch.Generator().manual_seed(7)
    t5 = {
        "encoder." + name: ("norm" in name) + 0.2 * torch.randn(shape, generator=generator)
        for name, shape in T5.shapes().items()
    }
    t5["shared.weight"] = t5.pop("encoder.embed_tokens.weight")
    return replace(text_samples.make_kit(tmp_path_factory.mktemp("tokenizers")), t5=t5)


# ---- writing


def entries_of(state: State, architecture: str, kind: str) -> tuple[Entries, State]:
    """A file's tensors under llama.cpp's names, and what they stand for under transformers'."""
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], 8)
    entries: Entries = {}
    plain: State = {}
    for key, tensor in state.items():
        name = names.get_name(key, try_suffixes=(".weight",))
        assert name is not None, key
        shape = tuple(tensor.shape)
        turned = interleaved(key, tensor) if architecture in ("llama", "mistral3") else tensor
        if (
            kind in Kind.__members__
            and kind not in ("F16", "BF16", "F32")
            and shape[-1] % 32 == 0
            and tensor.ndim == 2
        ):
            data, made = by_hand(kind, turned)
            entries[name] = (Kind[kind].value, shape, data)
        else:
            form = kind if kind in ("F16", "BF16") and tensor.ndim == 2 else "F32"
            dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[form]
            stored = turned.to(dtype)
            made = stored.float()
            entries[name] = (Kind[form].value, shape, stored.view(torch.uint8).numpy().tobytes())
        plain[key] = straight(key, made) if architecture in ("llama", "mistral3") else made
    return entries, plain


def turns(key: str) -> bool:
    return ".q_proj." in key or ".k_proj." in key


def order(rows: int) -> list[int]:
    """Where each row of llama.cpp's stands in transformers': neighbours are turned together."""
    half = HEAD // 2
    return [
        head * HEAD + pair + side * half
        for head in range(rows // HEAD)
        for pair in range(half)
        for side in range(2)
    ]


def interleaved(key: str, tensor: Tensor) -> Tensor:
    return tensor[order(len(tensor))] if turns(key) else tensor


def straight(key: str, tensor: Tensor) -> Tensor:
    if not turns(key):
        return tensor
    back = torch.empty_like(tensor)
    back[order(len(tensor))] = tensor
    return back


def said(key: str, words: str) -> bytes:
    return text(key) + struct.pack("<I", 8) + text(words)


def listed(key: str, words: Sequence[str]) -> bytes:
    return text(key) + struct.pack("<IIQ", 9, 8, len(words)) + b"".join(map(text, words))


def numbered(key: str, numbers: Sequence[int]) -> bytes:
    return text(key) + struct.pack(f"<IIQ{len(numbers)}i", 9, 5, len(numbers), *numbers)


def gguf_file(
    path: Path, entries: Mapping[str, tuple[int, tuple[int, ...], bytes]], *metadata: bytes
) -> Path:
    return write_bytes(path, gguf_bytes(entries, b"".join(metadata), len(metadata)))


def vocabulary() -> tuple[list[str], list[int]]:
    """The words of the tiny tekken as a GGUF file has them, and an unused one at the end."""
    by_word = read_tekken(samples.tekken()).get_vocab()
    words = sorted(by_word, key=lambda word: by_word[word])
    kinds = [CONTROL] * samples.RESERVED + [WORD] * (len(words) - samples.RESERVED)
    return [*words, "[PAD]"], [*kinds, UNUSED]


def tokenizer(words: Sequence[str], kinds: Sequence[int]) -> list[bytes]:
    return [
        said("tokenizer.ggml.model", "gpt2"),
        said("tokenizer.ggml.pre", "tekken"),
        listed("tokenizer.ggml.tokens", words),
        numbered("tokenizer.ggml.token_type", kinds),
    ]


def language_file(
    kit: LanguageKit, architecture: str, kind: str, path: Path, *metadata: bytes
) -> tuple[Path, State]:
    state = {"model." + key: one for key, one in kit.state.items()}
    entries, plain = entries_of(state, architecture, kind)
    file = gguf_file(path, entries, said("general.architecture", architecture), *metadata)
    return file, {key.removeprefix("model."): one for key, one in plain.items()}


# ---- reading


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16", "BF16", "F32"])
def test_qwen3_computes_what_its_dequantised_self_does(
    qwen: LanguageKit, kind: str, tmp_path: Path
) -> None:
    file, plain = language_file(qwen, "qwen3", kind, tmp_path / "Qwen3-4B.gguf")
    same_features(qwen, file, plain, tmp_path)


@pytest.mark.parametrize("architecture", ["llama", "mistral3"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16", "BF16", "F32"])
def test_mistral_computes_what_its_dequantised_self_does_with_the_tokenizer_of_its_file(
    mistral: LanguageKit, architecture: str, kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "Mistral-Small-3.2.gguf"
    file, plain = language_file(mistral, architecture, kind, path, *tokenizer(*vocabulary()))
    same_features(mistral, file, plain, tmp_path)


def same_features(kit: LanguageKit, file: Path, plain: State, folder: Path) -> None:
    spread = replace(kit, state=plain).write(folder / "plain.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = kit.load(file, dtype=dtype), kit.load(spread, dtype=dtype)
        state, same = ours.modules[0].state_dict(), theirs.modules[0].state_dict()
        assert state.keys() == same.keys()
        assert [key for key in state if not torch.equal(state[key], same[key])] == []
        assert torch.equal(ours.encode(PROMPT).txt, theirs.encode(PROMPT).txt)


@pytest.mark.parametrize("architecture", ["t5", "t5encoder"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16"])
def test_t5_computes_what_its_dequantised_self_does(
    kit: Kit, architecture: str, kind: str, tmp_path: Path
) -> None:
    state = dict(kit.t5)
    if architecture == "t5":  # with its other half, which is not read
        state["decoder.block.0.layer.0.SelfAttention.q.weight"] = torch.zeros(64, 64)
        state["decoder.final_layer_norm.weight"] = torch.zeros(64)
        state["lm_head.weight"] = torch.zeros(320, 64)
    entries, plain = entries_of(state, architecture, kind)
    form = said("general.architecture", architecture)
    packed = gguf_file(tmp_path / "t5-v1_1-xxl-encoder.gguf", entries, form)
    spread = write(tmp_path / "t5.safetensors", {key: plain[key] for key in kit.t5})
    clip = text_samples.save(kit.clip, tmp_path / "clip.safetensors", "text_model.")
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = kit.load(packed, clip, dtype=dtype), kit.load(clip, spread, dtype=dtype)
        assert torch.equal(ours.encode(PROMPT).txt, theirs.encode(PROMPT).txt)
        assert torch.equal(ours.encode(PROMPT).pooled, theirs.encode(PROMPT).pooled)
    made = f"dequantised from {kind} to bfloat16: 15 tensors"
    assert (made in ours.report) == (kind != "F16")
    assert "T5: t5-v1_1-xxl-encoder.gguf, 2 layers, width 64" in ours.report


def test_attention_is_the_same_in_llama_cpps_order_and_in_ours() -> None:
    """Scores as llama.cpp turns its rows, against scores as transformers turns what we make."""
    generator = torch.Generator().manual_seed(3)
    queries, keys = (torch.randn(HEAD, 16, generator=generator).double() for _ in range(2))
    streams = torch.randn(5, 16, generator=generator).double()
    places = torch.arange(5).double()[:, None]
    angles = places * 1e4 ** -(torch.arange(0, HEAD, 2).double() / HEAD)  # (5, HEAD / 2)
    cos, sin = angles.cos(), angles.sin()

    def by_neighbours(rows: Tensor) -> Tensor:
        one, other = rows[:, 0::2], rows[:, 1::2]
        return torch.stack((one * cos - other * sin, one * sin + other * cos), -1).flatten(1)

    def by_halves(rows: Tensor) -> Tensor:
        one, other = rows.chunk(2, 1)
        return torch.cat((one * cos - other * sin, other * cos + one * sin), 1)

    theirs = by_neighbours(streams @ queries.T) @ by_neighbours(streams @ keys.T).T
    ours = [in_halves("a.self_attn.q_proj.weight", one, HEAD) for one in (queries, keys)]
    scores = by_halves(streams @ ours[0].T) @ by_halves(streams @ ours[1].T).T
    assert float((scores - theirs).abs().max()) <= 1e-12
    unturned = by_halves(streams @ queries.T) @ by_halves(streams @ keys.T).T
    assert float((unturned - theirs).abs().max()) > 0.1


@pytest.mark.parametrize("prompt", samples.PROMPTS)
def test_the_tokenizer_of_a_gguf_file_gives_the_ids_of_tekken(
    mistral: LanguageKit, prompt: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.gguf"
    file, _ = language_file(mistral, "llama", "F32", path, *tokenizer(*vocabulary()))
    ours = mistral.load(file).tokenizer
    theirs = ChatTokenizer("tekken", read_tekken(samples.tekken()))
    one, other = (each.encode(prompt, MISTRAL_SMALL_3) for each in (ours, theirs))
    assert torch.equal(one.ids, other.ids)
    assert one.count == other.count


def test_a_tokenizer_beside_a_mistral_that_carries_none_is_used(
    mistral: LanguageKit, tmp_path: Path
) -> None:
    file, _ = language_file(mistral, "llama", "F32", tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match="tokenizer folder of Mistral") as caught:
        mistral.load(file)
    assert "mistral_3_small_flux2" in caught.value.fix
    (tmp_path / "tekken.json").write_bytes(samples.tekken())
    carried = replace(mistral).write(tmp_path / "carried.safetensors")
    features = [
        mistral.load(one, dtype=torch.float32).encode(PROMPT).txt for one in (file, carried)
    ]
    assert torch.equal(*features)


def test_every_tensor_has_its_name(qwen: LanguageKit, tmp_path: Path) -> None:
    file, plain = language_file(qwen, "qwen3", "Q8_0", tmp_path / "a.gguf")
    found = open_text(file)
    assert found.shapes == {"model." + key: tuple(one.shape) for key, one in plain.items()}
    assert found.quantised.keys() <= found.shapes.keys()


def test_files_in_transformers_names_are_read_as_they_are(kit: Kit, tmp_path: Path) -> None:
    """As converters for ComfyUI write them, CLIP-L among them."""
    files: list[Path] = []
    for name, state in (("clip", kit.clip), ("t5", kit.t5)):
        entries = {key: (0, tuple(one.shape), one.numpy().tobytes()) for key, one in state.items()}
        files.append(
            gguf_file(tmp_path / f"{name}.gguf", entries, said("general.architecture", "pig"))
        )
    clip = text_samples.save(kit.clip, tmp_path / "clip.safetensors")
    t5 = text_samples.save(kit.t5, tmp_path / "t5.safetensors")
    ours, theirs = kit.load(*files).encode(PROMPT), kit.load(clip, t5).encode(PROMPT)
    assert torch.equal(ours.txt, theirs.txt)
    assert torch.equal(ours.pooled, theirs.pooled)


# ---- refusing


@pytest.mark.parametrize(
    ("architecture", "title"),
    [
        ("gemma3", "Gemma 3"),
        ("qwen2vl", "Qwen2.5-VL"),
        ("qwen3vl", "Qwen3-VL"),
        ("qwen3moe", "a mixture of experts"),
        ("clip", r"the picture half \(mmproj\)"),
        ("falcon", "'falcon' by its own words"),
        ("", "'' by its own words"),
    ],
)
def test_another_architecture_is_named(
    qwen: LanguageKit, architecture: str, title: str, tmp_path: Path
) -> None:
    state = {"model." + key: one for key, one in qwen.state.items()}
    entries, _ = entries_of(state, "qwen3", "Q8_0")
    file = gguf_file(tmp_path / "a.gguf", entries, said("general.architecture", architecture))
    with pytest.raises(FamilyMismatchError, match=title) as caught:
        qwen.load(file)
    assert "T5 for FLUX.1; Qwen3 or Mistral Small 3.2 for FLUX.2" in caught.value.needed
    with pytest.raises(
        CheckpointError, match=r"a\.gguf is a text encoder or language model"
    ) as wrong:
        load_flux(file)
    assert "'Load Text Encoders (FLUX)'" in wrong.value.fix


def test_a_mistral_with_stretched_places_is_another_model(
    mistral: LanguageKit, tmp_path: Path
) -> None:
    stretched = said("mistral3.rope.scaling.type", "yarn")
    file, _ = language_file(mistral, "mistral3", "F32", tmp_path / "a.gguf", stretched)
    with pytest.raises(FamilyMismatchError, match="Ministral 3, Devstral 2"):
        mistral.load(file)


EMPTY = (0, (2,), bytes(8))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"blk.1.ssm_a.weight": EMPTY}, r"do not belong to it, first 'model\.layers\.1\.ssm_a"),
        ({"blk.1.attn_k.weight": None}, r"missing, first 'layers\.1\.self_attn\.k_proj"),
        ({"blk.1.attn_k.weight": (0, (4, 32), bytes(512))}, "is 4 by 32, not 16 by 32"),
        ({"model.embed_tokens.weight": EMPTY}, "has two names for one tensor"),
        ({"token_embd.weight": None}, "'qwen3', and holds no 'token_embd"),
        ({"blk.0.attn_q.bias": EMPTY}, r"Qwen2\.5"),
        ({"blk.0.ffn_gate_inp.weight": EMPTY}, "a mixture of experts"),
    ],
)
def test_names_and_shapes_that_do_not_fit_are_named_before_a_weight_is_read(
    qwen: LanguageKit, change: Mapping[str, object], match: str, tmp_path: Path
) -> None:
    state = {"model." + key: one for key, one in qwen.state.items()}
    entries: dict[str, object] = {**entries_of(state, "qwen3", "Q8_0")[0], **change}
    kept = {key: one for key, one in entries.items() if isinstance(one, tuple)}
    file = gguf_file(tmp_path / "a.gguf", kept, said("general.architecture", "qwen3"))
    with pytest.raises(GlassboxError, match=match) as caught:
        qwen.load(file)
    assert "'Load Text Encoders (FLUX)'" in str(caught.value) or "loader" in caught.value.fix


def test_the_first_t5_is_named(kit: Kit, tmp_path: Path) -> None:
    entries, _ = entries_of(dict(kit.t5), "t5", "Q8_0")
    kept = {key: one for key, one in entries.items() if "ffn_gate" not in key}
    file = gguf_file(tmp_path / "flan.gguf", kept, said("general.architecture", "t5"))
    clip = text_samples.save(kit.clip, tmp_path / "clip.safetensors")
    with pytest.raises(FamilyMismatchError, match=r"flan\.gguf is T5 of the first version"):
        kit.load(file, clip)


def test_a_mistral_in_other_names_is_not_guessed_at(mistral: LanguageKit, tmp_path: Path) -> None:
    entries = {
        "model." + key: (0, tuple(one.shape), one.numpy().tobytes())
        for key, one in mistral.state.items()
    }
    file = gguf_file(tmp_path / "a.gguf", entries, said("general.architecture", "llama"))
    with pytest.raises(CheckpointError, match="says that it is 'llama', and holds no 'token_embd"):
        mistral.load(file)


Words = tuple[list[str], list[int]]
BROKEN = (
    (lambda words, kinds: (words, kinds[:-1]), r"tokens and \d+ kinds"),
    (lambda words, kinds: ([], []), "no token for some byte"),
    (lambda words, kinds: (["<unk>", *words[1:19], "<unk>", *words[20:]], kinds), "are the same"),
    (lambda words, kinds: ([*words[:-1], words[-2]], [*kinds[:-1], WORD]), "are the same"),
    (lambda words, kinds: ([*words[:-1], "\u4f60"], [*kinds[:-1], WORD]), "could not be read"),
    (lambda words, kinds: (words, [*kinds[:-1], CONTROL]), "do not come first"),
    (lambda words, kinds: ([*words[:-1], "a" * 20_000], [*kinds[:-1], WORD]), "longer than any"),
    (lambda words, kinds: ([*words, *map(str, range(300_000))], kinds), "it lists 300,"),
)


@pytest.mark.parametrize(("change", "match"), BROKEN, ids=[match for _, match in BROKEN])
def test_a_broken_vocabulary_is_refused_quickly(
    mistral: LanguageKit, change: object, match: str, tmp_path: Path
) -> None:
    assert callable(change)
    words, kinds = change(*vocabulary())
    file, _ = language_file(mistral, "llama", "F32", tmp_path / "a.gguf", *tokenizer(words, kinds))
    start = time.process_time()
    with pytest.raises(CheckpointError, match=f"tokenizer of Mistral could not.*{match}|{match}"):
        mistral.load(file)
    assert time.process_time() - start < 2


def test_a_download_that_stopped_anywhere_is_refused(mistral: LanguageKit, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    file, _ = language_file(mistral, "llama", "Q8_0", path, *tokenizer(*vocabulary()))
    whole = file.read_bytes()
    for share in range(1, 20):
        file.write_bytes(whole[: len(whole) * share // 20])
        with pytest.raises(CheckpointError, match="cut short"):
            load_text_encoders([file])


def test_a_vocabulary_as_large_as_a_file_may_state_is_not_held_in_memory(
    mistral: LanguageKit, tmp_path: Path
) -> None:
    words = ["x" * 900_000] * 80
    file, _ = language_file(
        mistral, "llama", "F32", tmp_path / "a.gguf", *tokenizer(words, [1] * 80)
    )
    with pytest.raises(CheckpointError, match=r"'tokenizer\.ggml\.tokens' is 72,000,640 bytes"):
        mistral.load(file)
