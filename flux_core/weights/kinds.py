"""What a file is when it is not what a loader needs, in words for a refusal.

Source: ComfyUI 0.30.0 comfy/model_detection.py for the names of other transformers.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache

from ..errors import CheckpointError, shorten
from ..families import FAMILIES
from ..specs import FluxFamily
from ..transformer.flux import build_flux
from ..types import Shapes
from .checkpoint import Checkpoint
from .detect import PUBLISHED_AUTOENCODER, join_titles
from .files import ANOTHER_FILE
from .key_map import KeyMap, shapes_of
from .lora_keys import LoraKeys, LoraTarget, sort_keys, targets_of
from .quantised import PLAIN_FILE

_MODEL = "load it with [model loader]."
_TEXT = "load it with [text encoder loader]."
_AUTOENCODER = "load it with [autoencoder loader]."
_LORA = "put it into models/loras, and choose it in [LoRA loader]."
_NATIVE = "choose a FLUX.1 or FLUX.2 file here, or load this one with ComfyUI's own loader."


@dataclass(frozen=True, slots=True)
class FileKind:
    """A kind of file that is not the plain one that is wanted."""

    title: str
    marks: tuple[str, ...]  # in some key, any one of them
    fix: str
    unless: tuple[str, ...] = ()  # in no key


LIBRARIES = (
    FileKind(
        "quantised by bitsandbytes (nf4 or int8)", (".absmax", ".quant_state", ".SCB"), PLAIN_FILE
    ),
    FileKind("quantised by SVDQuant, AWQ or GPTQ", (".qweight", ".wscales"), PLAIN_FILE),
    FileKind(
        "float8 with a scale for each block (weight_scale_inv)", (".weight_scale_inv",), PLAIN_FILE
    ),
    FileKind("packed by compressed-tensors (vLLM)", (".weight_packed",), PLAIN_FILE),
    FileKind("quantised by MLX", (".q_proj.scales", ".gate_proj.scales"), PLAIN_FILE),
)
QUANTISED = (*LIBRARIES, FileKind("quantised for ComfyUI", (".comfy_quant",), PLAIN_FILE))
LORA = FileKind(
    "a LoRA", (".lora_A", ".lora_B", ".lora_down", ".lora_up", "_lora1.", ".lokr_"), _LORA
)
TRANSFORMERS = (
    LORA,
    FileKind("a FLUX.3 transformer", ("early_stream_modulations.",), _NATIVE),
    FileKind("an Ovis-Image transformer", (".img_mlp.gate_proj.",), _NATIVE),
    FileKind("a Chroma transformer", ("distilled_guidance_layer.",), _NATIVE),
    FileKind("a HunyuanVideo transformer", ("txt_in.individual_token_refiner.",), _NATIVE),
    FileKind("a FLUX.1 ControlNet", ("controlnet_blocks.", "controlnet_x_embedder."), _NATIVE),
    FileKind("a FLUX.1 Redux adapter", ("redux_up.",), _NATIVE),
    FileKind("a Stable Diffusion 3 transformer", ("joint_blocks.0.",), _NATIVE),
    FileKind("a Qwen-Image transformer", ("transformer_blocks.0.img_mlp.",), _NATIVE),
    FileKind(
        "a Stable Diffusion UNet",
        ("input_blocks.0.0.", "time_embedding.linear_1.", "down_blocks.0.attentions."),
        _NATIVE,
    ),
)
AUTOENCODERS = (
    FileKind(
        "an autoencoder with quantisation layers, as Stable Diffusion 1 to XL have",
        ("quant_conv.",),
        PUBLISHED_AUTOENCODER,
        unless=("bn.running_", "encoder.quant_conv."),
    ),
)
PARTS = (
    FileKind("a FLUX.2 autoencoder", ("bn.running_mean",), _AUTOENCODER),
    FileKind(
        "an autoencoder",
        ("encoder.down.0.", "encoder.down_blocks.0.", "decoder.up.0.", "decoder.mid"),
        _AUTOENCODER,
    ),
    FileKind("a T5 text encoder", ("layer.0.SelfAttention.",), _TEXT),
    FileKind("a CLIP text encoder", ("encoder.layers.0.self_attn.", "resblocks.0."), _TEXT),
    FileKind(
        "a language model",
        (
            "layers.0.self_attn.",
            "layers.0.mlp.gate_proj.",
            "layers.0.mixer.",
            "layers.0.linear_attn.",
        ),
        "load it with [text encoder loader] if it is a FLUX.2 text encoder.",
    ),
    FileKind(
        "a text encoder or language model as llama.cpp names it",
        ("token_embd.",),
        "load it with [text encoder loader] if it is T5, Qwen3 or Mistral.",
    ),
    FileKind(
        "a FLUX.2 transformer", ("double_stream_modulation_", "single_stream_modulation."), _MODEL
    ),
    FileKind("a transformer", ("double_blocks.0.", "single_transformer_blocks.0."), _MODEL),
    FileKind("a diffusion transformer", ("transformer_blocks.0.",), _NATIVE),
    FileKind("an image encoder", ("vision_model.", "visual."), ANOTHER_FILE),
)
_BLOCK = re.compile(r"(?P<stem>(?P<single>single_)?\w*blocks_)(?P<number>\d{1,5})(?P<rest>_.+)")
# Names of layers that only another model has.
_OTHER_LAYERS = (
    ("distilled_guidance_layer_", "Chroma"),
    ("joint_blocks_", "Stable Diffusion 3"),
    ("input_blocks_", "Stable Diffusion 1.5 or XL"),
    ("down_blocks_", "Stable Diffusion 1.5 or XL"),
    ("transformer_blocks_0_img_mlp_", "Qwen-Image"),
    ("transformer_blocks_0_attn1_", "LTX-Video"),
    ("blocks_0_self_attn_", "Wan"),
    ("blocks_0_cross_attn_", "Wan"),
)


def identify(
    keys: Iterable[str], metadata: Mapping[str, str], kinds: Iterable[FileKind]
) -> FileKind | None:
    """Returns the first kind that some key, or the metadata of a quantised file, gives away."""
    keys = tuple(keys)
    for kind in kinds:
        if _any_of(kind.marks, keys) and not _any_of(kind.unless, keys):
            return kind
    if "_quantization_metadata" in metadata:
        return QUANTISED[-1]
    return None


def expect_key_map(
    checkpoint: Checkpoint, key_map: KeyMap | None, needed: str, kinds: Iterable[FileKind]
) -> KeyMap:
    """Refuses, by name, what is laid out otherwise or is a relative that we cannot run.

    Args:
        checkpoint: its keys with the key map's prefix count, or all without a key map.
        key_map: None when the keys are like no layout.
        needed: what the loader is for.
        kinds: relatives with the same layout.

    Raises:
        CheckpointError: it is not what is needed.
    """
    prefix = key_map.prefix if key_map is not None else ""
    keys = [key for key in checkpoint.shapes if key.startswith(prefix)]
    kind = identify(keys, checkpoint.metadata, kinds)
    if kind is None and key_map is None:
        kind = identify(keys, checkpoint.metadata, PARTS)
    if kind is not None:
        needed += ", not quantised" if kind in QUANTISED else ""
        title = lora_title(checkpoint.shapes) if kind == LORA else kind.title
        raise CheckpointError(f"{checkpoint.path.name} is {title}.", f"{needed}.", kind.fix)
    if key_map is None:
        first = ", ".join(map(shorten, sorted(keys)[:3]))
        raise CheckpointError(
            f"{checkpoint.path.name} is of a kind that is not known here; it holds "
            f"{len(keys)} tensors, first {first}.",
            f"{needed}.",
            ANOTHER_FILE,
        )
    return key_map


def lora_title(shapes: Shapes) -> str:
    """Says for which models a LoRA is, as far as its layers tell."""
    layers = _LayerSizes(sort_keys(shapes), shapes)
    if not layers.sizes:
        return "a LoRA"
    known = {name: _layers_of(family) for name, family in FAMILIES.items()}
    named = [
        family for name, family in FAMILIES.items() if layers.sizes.keys() <= known[name].keys()
    ]
    fitting = [family for family in named if layers.fit(known[family.name], family)]
    if fitting:
        return f"a LoRA for {join_titles(fitting)}"
    if len({family.transformer.shares_modulation for family in named}) == 1:
        return f"a LoRA for a {named[-1].latent.name} transformer of another size"
    for mark, title in _OTHER_LAYERS:
        if any(name.startswith(mark) for name in layers.sizes):
            return f"a LoRA for {title}"
    return "a LoRA"


class _LayerSizes:
    """The layers a LoRA changes: outputs and inputs (0: unknown), and how many blocks it needs."""

    def __init__(self, keys: LoraKeys, shapes: Shapes) -> None:
        self.sizes: dict[str, tuple[int, int]] = {}  # every block's as block 0's
        self.doubles = self.singles = 0
        self.agree = True
        for name, layer in keys.layers.items():
            size = layer.size(shapes)
            if any(size):
                self._add(self._as_first(name), size)

    def fit(self, known: Mapping[str, LoraTarget], family: FluxFamily) -> bool:
        """Returns whether a family has all of these layers, in these sizes."""
        spec = family.transformer
        return (
            self.agree
            and self.doubles <= spec.double_blocks
            and self.singles <= spec.single_blocks
            and all(known[name].agrees(size) for name, size in self.sizes.items())
        )

    def _as_first(self, name: str) -> str:
        block = _BLOCK.fullmatch(name)
        if block is None:
            return name
        count = int(block["number"]) + 1
        if block["single"]:
            self.singles = max(self.singles, count)
        else:
            self.doubles = max(self.doubles, count)
        return f"{block['stem']}0{block['rest']}"

    def _add(self, name: str, size: tuple[int, int]) -> None:
        before = self.sizes.get(name, (0, 0))
        pairs = list(zip(before, size, strict=True))
        self.agree = self.agree and all(0 in pair or pair[0] == pair[1] for pair in pairs)
        self.sizes[name] = (max(pairs[0]), max(pairs[1]))


@cache
def _layers_of(family: FluxFamily) -> dict[str, LoraTarget]:
    """Lists the layers of a family in every way of naming, with one block of each kind."""
    spec = replace(family.transformer, double_blocks=1, single_blocks=1)
    network = build_flux(family, spec, device="meta")
    return targets_of(shapes_of(network.modulation) | shapes_of(network.blocks))


def _any_of(marks: Iterable[str], keys: tuple[str, ...]) -> bool:
    return any(mark in key for mark in marks for key in keys)
