"""A mid-size Qwen3 with random weights: ours stops after the last layer that is read."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model

from glassbox.flux_core.families import QWEN3_4B
from glassbox.flux_core.operations import torch_operations
from glassbox.flux_core.text.modules import LanguageModelShape, build_language_model, hidden_states

LAYERS = 36  # of the published model
SHAPE = LanguageModelShape(
    architecture="qwen3",
    hidden=512,
    layers=max(QWEN3_4B.layers),
    heads=8,
    kv_heads=2,
    head_dim=64,
    ffn=1536,
    vocabulary=1024,
    theta=QWEN3_4B.theta,
    norm_eps=QWEN3_4B.norm_eps,
)


@dataclass
class Prompt:
    """One prompt of 512 tokens, a third of them padding."""

    short: nn.Module
    whole: nn.Module
    ids: Tensor
    mask: Tensor

    @classmethod
    def make(cls) -> "Prompt":
        torch.manual_seed(0)
        config = Qwen3Config(
            hidden_size=SHAPE.hidden,
            num_hidden_layers=LAYERS,
            num_attention_heads=SHAPE.heads,
            num_key_value_heads=SHAPE.kv_heads,
            head_dim=SHAPE.head_dim,
            intermediate_size=SHAPE.ffn,
            vocab_size=SHAPE.vocabulary,
            rms_norm_eps=SHAPE.norm_eps,
            rope_theta=SHAPE.theta,
        )
        whole = Qwen3Model(config).eval()
        short = build_language_model(SHAPE, dtype=torch.float32, operations=torch_operations())
        state = whole.state_dict()
        short.load_state_dict({name: state[name] for name in SHAPE.shapes()}, assign=True)
        ids = torch.randint(SHAPE.vocabulary, (1, QWEN3_4B.tokens))
        mask = torch.ones_like(ids)
        mask[:, 2 * QWEN3_4B.tokens // 3 :] = 0
        return cls(short, whole, ids, mask)

    def ours(self) -> Tensor:
        return hidden_states(self.short, self.ids, self.mask, QWEN3_4B.layers)

    def transformers(self) -> Tensor:
        whole: Any = self.whole
        states = whole(self.ids, attention_mask=self.mask, output_hidden_states=True).hidden_states
        return torch.cat([states[layer] for layer in QWEN3_4B.layers], dim=-1)
