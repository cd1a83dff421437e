"""The text encoders' networks: their shapes, and empty modules to load weights into.

The modules are transformers' own. Only their leaf layers are replaced by the host's, and a language
model ends after the last layer whose state is used.

Source: huggingface/transformers models/clip/modeling_clip.py CLIPTextModel, models/t5/
modeling_t5.py T5Stack, models/qwen3/modeling_qwen3.py Qwen3Model, models/mistral/
modeling_mistral.py MistralModel; sizes of openai/clip-vit-large-patch14 and google/t5-v1_1-xxl.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn

from ..errors import SettingError
from ..operations import Operations, torch_operations


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipSpec:
    """Shape of CLIP's text tower."""

    width: int
    layers: int
    ffn: int
    vocabulary: int
    positions: int

    @property
    def heads(self) -> int:
        """Attention heads, which no tensor's shape shows. CLIP-L has 12 of width 64."""
        return max(1, self.width // 64)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor by name, without the `text_model.` prefix."""
        width, ffn = self.width, self.ffn
        shapes: dict[str, tuple[int, ...]] = {
            "embeddings.token_embedding.weight": (self.vocabulary, width),
            "embeddings.position_embedding.weight": (self.positions, width),
        }
        for layer in range(self.layers):
            stem = f"encoder.layers.{layer}."
            for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
                shapes[f"{stem}self_attn.{name}.weight"] = (width, width)
                shapes[f"{stem}self_attn.{name}.bias"] = (width,)
            for name, rows, columns in (("mlp.fc1", ffn, width), ("mlp.fc2", width, ffn)):
                shapes[f"{stem}{name}.weight"] = (rows, columns)
                shapes[f"{stem}{name}.bias"] = (rows,)
            for name in ("layer_norm1", "layer_norm2"):
                shapes[f"{stem}{name}.weight"] = shapes[f"{stem}{name}.bias"] = (width,)
        shapes["final_layer_norm.weight"] = shapes["final_layer_norm.bias"] = (width,)
        return shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class T5Spec:
    """Shape of T5 v1.1's encoder."""

    width: int
    layers: int
    ffn: int
    vocabulary: int
    heads: int
    head_dim: int
    buckets: int = 32  # of the relative position bias

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor by name, without the `encoder.` prefix."""
        width, inner = self.width, self.heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (self.vocabulary, width)}
        for layer in range(self.layers):
            attention = f"block.{layer}.layer.0."
            feed_forward = f"block.{layer}.layer.1."
            for name in ("q", "k", "v"):
                shapes[f"{attention}SelfAttention.{name}.weight"] = (inner, width)
            shapes[f"{attention}SelfAttention.o.weight"] = (width, inner)
            for name in ("wi_0", "wi_1"):
                shapes[f"{feed_forward}DenseReluDense.{name}.weight"] = (self.ffn, width)
            shapes[f"{feed_forward}DenseReluDense.wo.weight"] = (width, self.ffn)
            shapes[f"{attention}layer_norm.weight"] = (width,)
            shapes[f"{feed_forward}layer_norm.weight"] = (width,)
        bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        shapes[bias] = (self.buckets, self.heads)
        shapes["final_layer_norm.weight"] = (width,)
        return shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageModelShape:
    """Shape of a language model's first layers, up to the last one whose state is used."""

    architecture: Literal["qwen3", "mistral3"]
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    theta: float
    norm_eps: float

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor by name, without the `model.` prefix."""
        hidden, ffn = self.hidden, self.ffn
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (self.vocabulary, hidden)}
        for layer in range(self.layers):
            stem = f"layers.{layer}."
            shapes[f"{stem}self_attn.q_proj.weight"] = (queries, hidden)
            shapes[f"{stem}self_attn.k_proj.weight"] = (keys, hidden)
            shapes[f"{stem}self_attn.v_proj.weight"] = (keys, hidden)
            shapes[f"{stem}self_attn.o_proj.weight"] = (hidden, queries)
            if self.architecture == "qwen3":
                shapes[f"{stem}self_attn.q_norm.weight"] = (self.head_dim,)
                shapes[f"{stem}self_attn.k_norm.weight"] = (self.head_dim,)
            shapes[f"{stem}mlp.gate_proj.weight"] = (ffn, hidden)
            shapes[f"{stem}mlp.up_proj.weight"] = (ffn, hidden)
            shapes[f"{stem}mlp.down_proj.weight"] = (hidden, ffn)
            shapes[f"{stem}input_layernorm.weight"] = (hidden,)
            shapes[f"{stem}post_attention_layernorm.weight"] = (hidden,)
        return shapes


CLIP_L = ClipSpec(width=768, layers=12, ffn=3072, vocabulary=49408, positions=77)
T5_XXL = T5Spec(width=4096, layers=24, ffn=10240, vocabulary=32128, heads=64, head_dim=64)


def build_clip(spec: ClipSpec, *, dtype: torch.dtype, operations: Operations) -> nn.Module:
    """Builds CLIP's text tower on the meta device: load its weights with `assign=True`.

    Its keys are those of spec.shapes(), with the prefix `text_model.` in transformers 4.
    """
    from transformers import CLIPTextConfig, CLIPTextModel  # late: takes seconds to import

    config = CLIPTextConfig(
        vocab_size=spec.vocabulary,
        hidden_size=spec.width,
        intermediate_size=spec.ffn,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        max_position_embeddings=spec.positions,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    )
    with torch.device("meta"):
        module = CLIPTextModel(config)
    # This buffer is in no file, so loading would leave it on the meta device.
    for part in module.modules():
        if "position_ids" in dict(part.named_buffers(recurse=False)):
            positions = torch.arange(spec.positions)[None]
            part.register_buffer("position_ids", positions, persistent=False)
    return _finish(module, dtype, operations)


def build_t5(spec: T5Spec, *, dtype: torch.dtype, operations: Operations) -> nn.Module:
    """Builds T5's encoder on the meta device: load its weights with `assign=True`.

    This is the stack inside T5EncoderModel, which would list its one embedding table twice.
    Its keys are those of spec.shapes().
    """
    from transformers import T5Config, T5EncoderModel  # late: takes seconds to import

    config = T5Config(
        vocab_size=spec.vocabulary,
        d_model=spec.width,
        d_kv=spec.head_dim,
        d_ff=spec.ffn,
        num_layers=spec.layers,
        num_heads=spec.heads,
        relative_attention_num_buckets=spec.buckets,
        relative_attention_max_distance=128,
        layer_norm_epsilon=1e-6,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    with torch.device("meta"):
        module = T5EncoderModel(config).encoder
    return _finish(cast(nn.Module, module), dtype, operations)


def build_language_model(
    shape: LanguageModelShape,
    *,
    dtype: torch.dtype,
    device: torch.device | None = None,
    operations: Operations | None = None,
) -> nn.Module:
    """Builds a language model on the meta device: load its weights with `assign=True`.

    Its keys are those of shape.shapes(): it has no final norm and no language model head.

    Args:
        shape: what to build.
        dtype: of the weights.
        device: where to allocate the weights, uninitialised; None leaves them on `meta`.
        operations: the layer classes to build from; None means torch.nn.

    Raises:
        SettingError: the installed transformers does not know the architecture.
    """
    config, build = _language_model_class(shape)
    with torch.device("meta"):
        module = build(config)
    module.norm = nn.Identity()  # it follows the last layer, and no state after it is used
    _finish(module, dtype, operations or torch_operations())
    if device is not None:
        module.to_empty(device=device)
    # Its frequencies are in no file, so loading would leave them uninitialised.
    module.rotary_emb = cast(Callable[..., nn.Module], type(module.rotary_emb))(config=config)
    return module


def hidden_states(module: nn.Module, ids: Tensor, mask: Tensor, layers: Sequence[int]) -> Tensor:
    """Runs a language model and returns the hidden states after some of its layers.

    Args:
        module: from `build_language_model`, with its weights loaded.
        ids: (B, L) int64.
        mask: (B, L) int64, 0 for padding, which no position attends to.
        layers: numbers of layers, counted from 1.

    Returns:
        (B, L, len(layers) * hidden), the states concatenated in the order of layers.

    Source: huggingface/diffusers@0.42.1 pipelines/flux2/pipeline_flux2_klein.py
    Flux2KleinPipeline._get_qwen3_prompt_embeds.
    """
    run = cast(_LanguageModel, module)
    attended = mask if bool(mask.all()) else _causal_mask(mask)
    states = run(
        input_ids=ids, attention_mask=attended, output_hidden_states=True, use_cache=False
    ).hidden_states
    return torch.cat([states[layer] for layer in layers], dim=-1)  # index 0: the embeddings


def _causal_mask(mask: Tensor) -> Tensor:
    """Returns the causal mask without padding, (B, L) to (B, 1, L, L) bool, True to attend.

    transformers makes the same one, except that 4.51 lets padding on the left, which should
    attend to nothing, attend to everything.
    """
    causal = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device).tril()
    return causal & mask.bool()[:, None, None, :]


class _States(Protocol):
    hidden_states: Sequence[Tensor]


class _LanguageModel(Protocol):
    def __call__(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        output_hidden_states: bool,
        use_cache: bool,
    ) -> _States: ...


def _language_model_class(shape: LanguageModelShape) -> tuple[object, Callable[..., nn.Module]]:
    """Returns transformers' configuration of the shape, and the class to build from it."""
    import transformers  # late: takes seconds to import

    names = {"qwen3": "Qwen3", "mistral3": "Mistral"}
    name = names[shape.architecture]
    make_config = getattr(transformers, f"{name}Config", None)
    build = getattr(transformers, f"{name}Model", None)
    if make_config is None or build is None:
        raise SettingError(
            f"transformers {transformers.__version__} is installed, which has no {name}.",
            "transformers 4.51 or newer.",
            'upgrade it in the Python that runs ComfyUI: pip install -U "transformers>=4.51".',
        )
    config = make_config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=shape.norm_eps,
        rope_theta=shape.theta,
        sliding_window=None,
        use_cache=False,
        attn_implementation="sdpa",  # the one that takes a mask of (B, 1, L, L)
    )
    return config, build


def _finish(module: nn.Module, dtype: torch.dtype, operations: Operations) -> nn.Module:
    exchange_leaves(module, dtype, operations)
    return module.eval().requires_grad_(False)


def exchange_leaves(module: nn.Module, dtype: torch.dtype, operations: Operations) -> None:
    """Replaces every linear layer, embedding and layer norm by the host's, empty on `meta`."""
    for name, child in list(module.named_children()):
        new = _host_leaf(child, dtype, operations)
        if new is None:
            exchange_leaves(child, dtype, operations)
        else:
            setattr(module, name, new)


def _host_leaf(leaf: nn.Module, dtype: torch.dtype, operations: Operations) -> nn.Module | None:
    """Returns the host's layer of the same shape; None if the layer is not a known leaf."""
    make: Callable[..., nn.Module]
    if isinstance(leaf, nn.Linear):
        make, shape = operations.Linear, (leaf.in_features, leaf.out_features)
        has_bias = getattr(leaf, "bias", None) is not None
        return make(*shape, bias=has_bias, dtype=dtype, device="meta")
    if isinstance(leaf, nn.Embedding):
        make, shape = operations.Embedding, (leaf.num_embeddings, leaf.embedding_dim)
        return make(*shape, dtype=dtype, device="meta")
    if isinstance(leaf, nn.LayerNorm):
        return operations.LayerNorm(leaf.normalized_shape, eps=leaf.eps, dtype=dtype, device="meta")
    return None
