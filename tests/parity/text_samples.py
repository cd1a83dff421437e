"""Tiny text encoders for tests: tokenizers over a small vocabulary, random perturbed weights."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import sentencepiece
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from glassbox.flux_core.text.encoders import TextEncoders
from glassbox.flux_core.types import Shapes
from glassbox.flux_core.weights.load_text import load_text_encoders

WORDS = "make the circle red and remove blue square from a plain yellow background with star photo"
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,'!?éñ-"
CLIP_ENDING = "</w>"
CLIP_WIDTH, T5_WIDTH = 128, 48
POSITIONS = 77
State: TypeAlias = dict[str, Tensor]
M = TypeVar("M", bound=nn.Module)

PROMPTS = (
    "make the circle red",
    "",
    "  Two   spaces,\n\nlines and\ttabs  ",
    "emoji 👩‍👩‍👧 🎨 naïve Ａ１ ﬁ ½ 你好 мир x\u0301 e\u0301",  # noqa: RUF001
    "it's <|endoftext|> not over, don't stop",
    "</s> <extra_id_0> <pad>",
    "star " * 300,
)


def write_clip_tokenizer(folder: Path, *, marks_first: bool = False) -> Path:
    """Write vocab.json and merges.txt: every byte, and merges that make the words of WORDS.

    The end mark has the largest id, as in the published vocabulary, or else id 2.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    pieces = [*letters, *(letter + CLIP_ENDING for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS.split():
        symbols = [*word[:-1], word[-1] + CLIP_ENDING]
        while len(symbols) > 1:
            pair = (symbols[0], symbols[1])
            if pair not in merges:
                merges.append(pair)
                pieces.append("".join(pair))
            symbols[:2] = ["".join(pair)]
    pieces = list(dict.fromkeys(pieces))
    marks = ["<|startoftext|>", "<|endoftext|>"]
    pieces = [pieces[0], *marks, *pieces[1:]] if marks_first else [*pieces, *marks]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_t5_tokenizer(folder: Path) -> Path:
    """Train a small sentencepiece model and write it as spiece.model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS, *WORDS.split(), " ".join(ALPHABET)] * 4),
        model_writer=model,
        vocab_size=150,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    return folder / "spiece.model"


def tiny_clip(tokenizer: Path) -> transformers.CLIPTextModel:
    """Make transformers' own CLIP text model with random weights."""
    vocabulary = json.loads((tokenizer / "vocab.json").read_text())
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=CLIP_WIDTH,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=CLIP_WIDTH // 64,
        max_position_embeddings=POSITIONS,
        hidden_act="quick_gelu",
        eos_token_id=2,  # as in the published config
    )
    return perturb(lambda: transformers.CLIPTextModel(config), seed=1)


def tiny_t5() -> transformers.T5EncoderModel:
    """Make transformers' own T5 encoder with random weights."""
    config = transformers.T5Config(
        vocab_size=320,
        d_model=T5_WIDTH,
        d_kv=8,
        d_ff=80,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.1,
    )
    return perturb(lambda: transformers.T5EncoderModel(config), seed=2)


def perturb(make: Callable[[], M], seed: int) -> M:
    """Make a module with its weights moved off zeros and ones, which would hide wrong wiring."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        module = make()
        for weight in module.parameters():
            weight += 0.05 * torch.randn(weight.shape)
    return module.eval()


def clip_state(model: nn.Module) -> State:
    """Give CLIP's weights without `text_model.`, whatever transformers calls them."""
    state = model.state_dict()
    return {key.removeprefix("text_model."): value.clone() for key, value in state.items()}


def t5_state(model: nn.Module) -> State:
    """Give T5's weights under ComfyUI's names: the table once, as `shared.weight`."""
    state = model.state_dict()
    return {k: v.clone() for k, v in state.items() if k != "encoder.embed_tokens.weight"}


def save(state: State, file: Path, prefix: str = "") -> Path:
    """Write a safetensors file with a prefix before every key."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {prefix + key: value.contiguous() for key, value in state.items()}
    save_file(tensors, str(file), metadata={"format": "pt"})
    return file


def meta_file(shapes: Shapes, file: Path, prefix: str = "") -> Path:
    """Write a file that is of full size on paper: a header, and a hole instead of weights."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[prefix + name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)
    return file


@dataclass(frozen=True)
class Kit:
    """Tokenizers on disk and weights in memory, to write files from."""

    clip_tokenizer: Path
    t5_tokenizer: Path
    clip: State  # without `text_model.`
    t5: State  # ComfyUI's names

    def load(self, *files: Path, **options: Any) -> TextEncoders:
        return load_text_encoders(
            files, clip_tokenizer=self.clip_tokenizer, t5_tokenizer=self.t5_tokenizer, **options
        )


def make_kit(folder: Path) -> Kit:
    """Write the tokenizers and make the weights."""
    clip_tokenizer = write_clip_tokenizer(folder / "clip")
    return Kit(
        clip_tokenizer,
        write_t5_tokenizer(folder / "t5"),
        clip_state(tiny_clip(clip_tokenizer)),
        t5_state(tiny_t5()),
    )
