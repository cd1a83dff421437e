"""Our language models against diffusers' FLUX.2 pipelines and transformers, on the CPU."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from torch import Tensor

from glassbox.flux_core.system_message import SYSTEM_MESSAGE
from glassbox.flux_core.text.encoders import LanguageModelEncoder
from glassbox.flux_core.text.modules import hidden_states
from glassbox.flux_core.weights.load_text import load_text_encoders
from glassbox.tests.parity import text_language_samples as samples
from glassbox.tests.parity.text_language_samples import MISTRAL, PROMPTS, QWEN

TOLERANCE = 1e-6
LENGTHS = {"qwen": (512, 40, 9), "mistral": (512, 256, 200, 20)}


@dataclass(frozen=True)
class Pair:
    ours: LanguageModelEncoder
    model: Any
    reader: Any  # tokenizer or processor
    seen: SimpleNamespace  # ids and mask of the published model's last call

    def published(self, prompt: str, length: int, dtype: torch.dtype | None = None) -> Tensor:
        encode = (
            Flux2KleinPipeline._get_qwen3_prompt_embeds
            if self.ours.text.architecture == "qwen3"
            else Flux2Pipeline._get_mistral_3_small_prompt_embeds
        )
        with torch.no_grad():
            return encode(
                self.model,
                self.reader,
                prompt=prompt,
                dtype=dtype,
                max_sequence_length=length,
                hidden_states_layers=self.ours.text.layers,
            )


def make_pair(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Pair:
    """Save a published model as Hugging Face does, and load the folder into ours."""
    if kind == "qwen":
        tokenizer = samples.write_qwen_tokenizer(folder / "tokenizer")
        model: Any = samples.tiny_qwen()
        reader = samples.published_qwen_tokenizer(tokenizer)
    else:
        tokenizer = folder / "tokenizer"
        model = samples.tiny_mistral()
        reader = samples.Processor(samples.published_mistral_tokenizer(tokenizer))
    model.to(dtype).save_pretrained(folder / "text_encoder")
    if dtype != torch.float32:
        model = type(model).from_pretrained(folder / "text_encoder", dtype=dtype).eval()
    spec = QWEN if kind == "qwen" else MISTRAL
    ours = load_text_encoders(
        [folder / "text_encoder"],
        qwen_tokenizer=tokenizer if kind == "qwen" else None,
        text=spec,
    )
    assert isinstance(ours, LanguageModelEncoder)
    return Pair(ours, model, reader, samples.watch(model))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    return {kind: make_pair(kind, tmp_path_factory.mktemp(kind)) for kind in ("qwen", "mistral")}


@pytest.mark.parametrize(
    ("kind", "length"), [(kind, length) for kind in LENGTHS for length in LENGTHS[kind]]
)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_features_equal_the_published_pipeline(
    pairs: dict[str, Pair], kind: str, prompt: str, length: int
) -> None:
    pair = pairs[kind]
    expected = pair.published(prompt, length)
    features = pair.ours.encode(prompt, tokens=length)
    read = pair.ours.tokenizer.encode(prompt, pair.ours.text, length)
    assert torch.equal(read.ids, pair.seen.ids)
    assert torch.equal(read.mask, pair.seen.mask)
    assert features.txt.shape == (1, length, 3 * 32)
    assert features.pooled is None
    torch.testing.assert_close(features.txt, expected, atol=TOLERANCE, rtol=0)
    assert features.txt.std() > 0.01  # the comparison is not one of zeros


@pytest.mark.parametrize("kind", ["qwen", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stopping_early_equals_the_full_model_bit_for_bit(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    pair = make_pair(kind, tmp_path, dtype)
    expected = pair.published("make the circle red", 512)
    features = pair.ours.encode("make the circle red")
    assert features.txt.dtype == expected.dtype == dtype
    assert torch.equal(features.txt, expected)


@pytest.mark.parametrize("kind", ["qwen", "mistral"])
def test_the_published_depths_equal_the_full_model_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """States 9, 18, 27 of 36 layers and 10, 20, 30 of 40, the last without the final norm."""
    layers, depth = ((9, 18, 27), 36) if kind == "qwen" else ((10, 20, 30), 40)
    make: Any = samples.tiny_qwen if kind == "qwen" else samples.tiny_mistral
    model = make(num_hidden_layers=depth)
    kit = samples.qwen_kit(tmp_path) if kind == "qwen" else samples.mistral_kit(tmp_path)
    spec = replace(kit.spec, layers=layers)
    kit = replace(kit, spec=spec, state=samples.text_state(model))
    ours = kit.load(kit.write(tmp_path / "model.safetensors"))
    ids = torch.randint(20, 300, (2, 24))
    mask = torch.ones_like(ids)
    mask[0, :7] = mask[1, 20:] = 0
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    expected = torch.cat([states[layer] for layer in layers], dim=-1)
    assert torch.equal(hidden_states(ours.modules[0], ids, mask, layers), expected)
    assert len(list(ours.modules[0].layers)) == max(layers)


def test_the_last_layer_is_read_before_the_norm(tmp_path: Path) -> None:
    """transformers gives its last state behind the final norm; ours is the one before it."""
    model = samples.tiny_qwen()
    kit = replace(samples.qwen_kit(tmp_path), spec=replace(QWEN, layers=(4,)))
    ours = kit.load(kit.write(tmp_path / "model.safetensors"))
    read = ours.tokenizer.encode("a red star", QWEN)
    last = hidden_states(ours.modules[0], read.ids, read.mask, (4,))
    with torch.no_grad():
        states = model(
            input_ids=read.ids, attention_mask=read.mask, output_hidden_states=True
        ).hidden_states
        assert torch.equal(model.model.norm(last), states[4])
    assert not torch.allclose(last, states[4])


def test_padding_stands_where_the_model_was_trained_with_it(pairs: dict[str, Pair]) -> None:
    qwen, mistral = pairs["qwen"].ours, pairs["mistral"].ours
    read = qwen.tokenizer.encode("a red star", QWEN)
    used = read.count.used
    assert read.mask[0].tolist() == [1] * used + [0] * (512 - used)
    assert len(set(read.ids[0, used:].tolist())) == 1
    # It looks at the prompt, so its states say something, and the transformer sees them.
    padding = qwen.encode("a red star").txt[0, used:]
    assert padding.norm(dim=-1).min() > 0.1
    assert not torch.allclose(padding, qwen.encode("a blue square").txt[0, used:])
    read = mistral.tokenizer.encode("a red star", MISTRAL)
    used = read.count.used
    assert read.mask[0].tolist() == [0] * (512 - used) + [1] * used
    assert read.ids[0, : 512 - used].unique().tolist() == [11]
    assert read.ids[0, 512 - used] == 1
    assert read.ids[0, -1] == 4


def test_padding_of_a_zero_row_stays_zero(tmp_path: Path) -> None:
    """ComfyUI pads Mistral's features with zeros: the same thing where the pad row is zero."""
    kit = samples.mistral_kit(tmp_path)
    table = kit.state["embed_tokens.weight"].clone()
    table[11] = 0
    ours = kit.load(kit.write(tmp_path / "model.safetensors", embed_tokens__weight=table))
    features = ours.encode("a red star")
    used = features.counts[0].used
    assert not features.txt[0, : 512 - used].any()
    short = ours.encode("a red star", tokens=used)
    torch.testing.assert_close(features.txt[:, -used:], short.txt, atol=2e-6, rtol=0)


def test_the_system_message_is_the_published_one() -> None:
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE as PUBLISHED

    assert SYSTEM_MESSAGE == PUBLISHED
    assert SYSTEM_MESSAGE.count("\n") == 1


def test_a_batch_reads_each_prompt_as_it_does_alone(pairs: dict[str, Pair]) -> None:
    """Training encodes many prompts at once, and learns through every layer."""
    ours = pairs["qwen"].ours
    read = [ours.tokenizer.encode(prompt, QWEN, 32) for prompt in ("a red star", "", "remove it")]
    ids, mask = torch.cat([one.ids for one in read]), torch.cat([one.mask for one in read])
    module = ours.modules[0].requires_grad_(True)
    together = hidden_states(module, ids, mask, QWEN.layers)
    for row, one in zip(together, read, strict=True):
        alone = hidden_states(module, one.ids, one.mask, QWEN.layers)[0]
        torch.testing.assert_close(row, alone, atol=2e-6, rtol=0)
    together.square().sum().backward()
    gradients = [weight.grad for weight in module.parameters()]
    assert all(gradient is not None and gradient.any() for gradient in gradients)
    module.zero_grad(set_to_none=True)
    module.requires_grad_(False)
