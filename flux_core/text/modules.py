"""CLIP-L's text tower and T5's encoder: their shapes, and empty modules to load weights into.

The networks are transformers' own; only their leaf layers are exchanged for the host's.

Source: huggingface/transformers models/clip/modeling_clip.py CLIPTextModel, models/t5/
modeling_t5.py T5Stack; sizes of openai/clip-vit-large-patch14 and google/t5-v1_1-xxl.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from ..operations import Operations

Shapes = dict[str, tuple[int, ...]]


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
        """Attention heads; a checkpoint does not show them. CLIP-L has 12 of 64."""
        return max(1, self.width // 64)

    def shapes(self) -> Shapes:
        """Name every tensor, without the `text_model.` prefix, with its shape."""
        width, ffn = self.width, self.ffn
        shapes: Shapes = {
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

    def shapes(self) -> Shapes:
        """Name every tensor, without the `encoder.` prefix, with its shape."""
        width, inner = self.width, self.heads * self.head_dim
        shapes: Shapes = {"embed_tokens.weight": (self.vocabulary, width)}
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


CLIP_L = ClipSpec(width=768, layers=12, ffn=3072, vocabulary=49408, positions=77)
T5_XXL = T5Spec(width=4096, layers=24, ffn=10240, vocabulary=32128, heads=64, head_dim=64)


def build_clip(spec: ClipSpec, *, dtype: torch.dtype, operations: Operations) -> nn.Module:
    """Build CLIP's text tower without memory: load weights with `assign=True`.

    Its keys are those of spec.shapes(), behind `text_model.` with transformers 4.
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
    # Not in any file, so no loading makes it real.
    for part in module.modules():
        if "position_ids" in dict(part.named_buffers(recurse=False)):
            positions = torch.arange(spec.positions)[None]
            part.register_buffer("position_ids", positions, persistent=False)
    return _finish(module, dtype, operations)


def build_t5(spec: T5Spec, *, dtype: torch.dtype, operations: Operations) -> nn.Module:
    """Build T5's encoder without memory: load weights with `assign=True`.

    This is the stack inside T5EncoderModel, whose one embedding table is not listed twice.
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


def _finish(module: nn.Module, dtype: torch.dtype, operations: Operations) -> nn.Module:
    exchange_leaves(module, dtype, operations)
    return module.eval().requires_grad_(False)


def exchange_leaves(module: nn.Module, dtype: torch.dtype, operations: Operations) -> None:
    """Replace every linear layer, embedding and layer norm by the host's, empty on `meta`."""
    for name, child in list(module.named_children()):
        new = _host_leaf(child, dtype, operations)
        if new is None:
            exchange_leaves(child, dtype, operations)
        else:
            setattr(module, name, new)


def _host_leaf(leaf: nn.Module, dtype: torch.dtype, operations: Operations) -> nn.Module | None:
    """Make the host's layer of the same shape; None where the layer is no known leaf."""
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
