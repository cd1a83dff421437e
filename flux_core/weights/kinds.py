"""What else a file can be, by the names of its tensors, so that a refusal can say it.

Source: ComfyUI 0.30.0 comfy/model_detection.py for the names of other transformers.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_BF16 = "choose the bfloat16 file of this model."
_LORAS = "put it into models/loras, and choose it in 'Apply LoRA (FLUX)'."
_NATIVE = "choose a FLUX.1 or FLUX.2 file here, or load this one with ComfyUI's own loader."
_PUBLISHED = "choose FLUX.1's ae.safetensors, or FLUX.2's flux2-vae.safetensors."


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of file that is not the plain part that is wanted."""

    title: str
    marks: tuple[str, ...]  # in some key, any one of them
    fix: str
    unless: tuple[str, ...] = ()  # in no key


LIBRARIES = (
    Kind("quantised by bitsandbytes (nf4 or int8)", (".absmax", ".quant_state", ".SCB"), _BF16),
    Kind("quantised by SVDQuant, AWQ or GPTQ", (".qweight", ".wscales"), _BF16),
    Kind("float8 with a scale for each block (weight_scale_inv)", (".weight_scale_inv",), _BF16),
    Kind("packed by compressed-tensors (vLLM)", (".weight_packed",), _BF16),
    Kind("quantised by MLX", (".q_proj.scales", ".gate_proj.scales"), _BF16),
)
QUANTISED = (*LIBRARIES, Kind("quantised for ComfyUI", (".comfy_quant",), _BF16))
LORA = Kind("a LoRA", (".lora_A", ".lora_B", ".lora_down", ".lora_up", "_lora1.", ".lokr_"), _LORAS)
TRANSFORMERS = (
    LORA,
    Kind("a FLUX.3 transformer", ("early_stream_modulations.",), _NATIVE),
    Kind("an Ovis-Image transformer", (".img_mlp.gate_proj.",), _NATIVE),
    Kind("a Chroma transformer", ("distilled_guidance_layer.",), _NATIVE),
    Kind("a HunyuanVideo transformer", ("txt_in.individual_token_refiner.",), _NATIVE),
    Kind("a FLUX.1 ControlNet", ("controlnet_blocks.", "controlnet_x_embedder."), _NATIVE),
    Kind("a FLUX.1 Redux adapter", ("redux_up.",), _NATIVE),
    Kind("a Stable Diffusion 3 transformer", ("joint_blocks.0.",), _NATIVE),
    Kind("a Qwen-Image transformer", ("transformer_blocks.0.img_mlp.",), _NATIVE),
    Kind("a Stable Diffusion UNet", ("input_blocks.0.0.", "time_embedding.linear_1."), _NATIVE),
)
AUTOENCODERS = (
    Kind(
        "an autoencoder with quantisation layers, as Stable Diffusion 1 to XL have",
        ("quant_conv.",),
        _PUBLISHED,
        unless=("bn.running_", "encoder.quant_conv."),
    ),
)
PARTS = (
    Kind("a FLUX.2 autoencoder", ("bn.running_mean",), "load it with 'Load Autoencoder (FLUX)'."),
    Kind(
        "an autoencoder",
        ("encoder.down.0.", "encoder.down_blocks.0.", "decoder.up.0.", "decoder.mid_block."),
        "load it with 'Load Autoencoder (FLUX)'.",
    ),
    Kind(
        "a T5 text encoder",
        ("layer.0.SelfAttention.",),
        "load it with 'Load Text Encoders (FLUX)'.",
    ),
    Kind(
        "a CLIP text encoder",
        ("encoder.layers.0.self_attn.", "transformer.resblocks.0."),
        "load it with 'Load Text Encoders (FLUX)'.",
    ),
    Kind(
        "a language model",
        ("layers.0.self_attn.", "layers.0.mlp.gate_proj."),
        "load it with 'Load Text Encoders (FLUX)' if it is a FLUX.2 text encoder.",
    ),
    Kind(
        "a text encoder or language model as llama.cpp names it",
        ("token_embd.",),
        "load it with 'Load Text Encoders (FLUX)' if it is T5, Qwen3 or Mistral.",
    ),
    Kind(
        "a FLUX.2 transformer",
        ("double_stream_modulation_", "single_stream_modulation."),
        "load it with 'Load Model (FLUX)'.",
    ),
    Kind(
        "a transformer",
        ("double_blocks.0.", "single_transformer_blocks.0."),
        "load it with 'Load Model (FLUX)'.",
    ),
)


def identify(
    keys: Iterable[str], metadata: Mapping[str, str], kinds: Iterable[Kind]
) -> Kind | None:
    """Find the first kind that some key, or the metadata of a quantised file, gives away."""
    keys = tuple(keys)
    for kind in kinds:
        if _any_of(kind.marks, keys) and not _any_of(kind.unless, keys):
            return kind
    if "_quantization_metadata" in metadata:
        return QUANTISED[-1]
    return None


def _any_of(marks: Iterable[str], keys: tuple[str, ...]) -> bool:
    return any(mark in key for mark in marks for key in keys)
