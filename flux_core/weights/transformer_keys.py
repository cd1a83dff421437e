"""Key map of the transformers: published (BFL) and diffusers' names, both generations of FLUX.

diffusers splits what BFL fuses (qkv, and in FLUX.1 qkv with the mlp in single blocks) and holds
the halves of the last modulation the other way round.
Source: black-forest-labs/flux@802fb47 src/flux/model.py; black-forest-labs/flux2@ab7cca6
src/flux2/model.py; huggingface/diffusers 0.42.1 scripts/convert_flux_to_diffusers.py and
convert_flux2_to_diffusers.py, whose fixed sizes are read from shapes here.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import Shapes
from .key_map import KeyMap, KeyRule, count_numbers, find_prefix, map_keys, swap_halves

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.")
# What FLUX.2 has in every layout and FLUX.1 in none: one modulation for all blocks of a kind.
SHARED_MODULATION = ("double_stream_modulation_", "single_stream_modulation.")
FINAL_MODULATION = "final_layer.adaLN_modulation.1"

_Names = Mapping[str, tuple[str, ...]]  # our module, diffusers' modules


@dataclass(frozen=True, slots=True)
class _Generation:
    """The modules of one generation, all with tensors of the same kinds."""

    outer: _Names
    double: _Names
    single: _Names
    kinds: tuple[str, ...]


_COMMON_OUTER = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "final_layer.linear": ("proj_out",),
    FINAL_MODULATION: ("norm_out.linear",),
}
_COMMON_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
}
_FLUX1 = _Generation(
    outer={
        **_COMMON_OUTER,
        "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
        "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
        "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
        "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
        "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
        "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    },
    double={
        **_COMMON_DOUBLE,
        "img_mod.lin": ("norm1.linear",),
        "txt_mod.lin": ("norm1_context.linear",),
        "img_mlp.0": ("ff.net.0.proj",),
        "img_mlp.2": ("ff.net.2",),
        "txt_mlp.0": ("ff_context.net.0.proj",),
        "txt_mlp.2": ("ff_context.net.2",),
    },
    single={
        "modulation.lin": ("norm.linear",),
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "linear2": ("proj_out",),
    },
    kinds=("weight", "bias"),
)
_FLUX2 = _Generation(
    outer={
        **_COMMON_OUTER,
        "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
        "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
        "guidance_in.in_layer": ("time_guidance_embed.guidance_embedder.linear_1",),
        "guidance_in.out_layer": ("time_guidance_embed.guidance_embedder.linear_2",),
        "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
        "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
        "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    },
    double={
        **_COMMON_DOUBLE,
        "img_mlp.0": ("ff.linear_in",),
        "img_mlp.2": ("ff.linear_out",),
        "txt_mlp.0": ("ff_context.linear_in",),
        "txt_mlp.2": ("ff_context.linear_out",),
    },
    single={"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
    kinds=("weight",),
)
# Norms have one tensor: ours is called scale, theirs weight.
_DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}


def transformer_key_map(keys: Iterable[str]) -> KeyMap | None:
    """Maps the keys of a file to ours; None when they are not laid out like FLUX.

    Raises:
        CheckpointError: a block is missing between others.
    """
    keys = dict.fromkeys(keys)  # in the file's order
    prefix = find_prefix(keys, PREFIXES, ("double_blocks.", "single_blocks."))
    if prefix is not None:
        return map_keys("BFL", prefix, keys, _published_rules(keys, prefix))
    prefix = find_prefix(keys, PREFIXES, ("single_transformer_blocks.",))
    if prefix is None:
        return None
    double = count_numbers(keys, prefix + "transformer_blocks.")
    single = count_numbers(keys, prefix + "single_transformer_blocks.")
    rules = {
        ours: KeyRule(
            tuple(prefix + part for part in theirs),
            "swap halves" if ours.startswith(FINAL_MODULATION) else "none",
        )
        for ours, theirs in _tensor_names(_generation(keys, prefix), double, single)
    }
    return map_keys("diffusers", prefix, keys, rules, lambda key: _sources(rules, key))


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames, splits and swaps our tensors into diffusers' layout; the inverse of the key map.

    Args:
        state: published names without a prefix, all tensors of one transformer.
    """
    theirs: dict[str, Tensor] = {}
    for name, rows in diffusers_rows({key: tuple(tensor.shape) for key, tensor in state.items()}):
        tensor = state[name]
        if name.startswith(FINAL_MODULATION):
            tensor = swap_halves(tensor)
        theirs.update(zip(rows, torch.split(tensor, list(rows.values())), strict=True))
    return theirs


def diffusers_rows(shapes: Shapes) -> Iterator[tuple[str, dict[str, int]]]:
    """Yields each of our tensors with the rows that diffusers' tensors have of it."""
    hidden = shapes["img_in.weight"][0]
    double = count_numbers(shapes, "double_blocks.")
    single = count_numbers(shapes, "single_blocks.")
    for name, parts in _tensor_names(_generation(shapes, ""), double, single):
        if name in shapes:  # guidance_in is not in every model
            rows = [hidden] * (len(parts) - 1)  # q, k and v are as wide as the model
            yield name, dict(zip(parts, [*rows, shapes[name][0] - sum(rows)], strict=True))


def _generation(keys: Iterable[str], prefix: str) -> _Generation:
    marks = tuple(prefix + mark for mark in SHARED_MODULATION)
    return _FLUX2 if any(key.startswith(marks) for key in keys) else _FLUX1


def _sources(rules: Mapping[str, KeyRule], key: str) -> tuple[str, ...]:
    return rules[key].sources if key in rules else (key,)


def _published_rules(keys: Iterable[str], prefix: str) -> dict[str, KeyRule]:
    """Strips the prefix; ComfyUI's newer saves call the norms' `scale` `weight`."""
    rules: dict[str, KeyRule] = {}
    for key in keys:
        if key.startswith(prefix):
            ours = key[len(prefix) :]
            if ours.endswith(("query_norm.weight", "key_norm.weight")):
                ours = ours.removesuffix("weight") + "scale"
            rules.setdefault(ours, KeyRule((key,)))
    return rules


def _tensor_names(
    names: _Generation, double: int, single: int
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields (our tensor, diffusers' tensors it is made of) for all of a model."""
    for ours, theirs in _module_names(names, double, single):
        for kind in names.kinds:
            yield f"{ours}.{kind}", tuple(f"{part}.{kind}" for part in theirs)
    for count, ours, theirs, norms in (
        (double, "double_blocks", "transformer_blocks", _DOUBLE_NORMS),
        (single, "single_blocks", "single_transformer_blocks", _SINGLE_NORMS),
    ):
        for i in range(count):
            for name, norm in norms.items():
                yield f"{ours}.{i}.{name}.scale", (f"{theirs}.{i}.{norm}.weight",)


def _module_names(
    names: _Generation, double: int, single: int
) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield from names.outer.items()
    for count, ours, theirs, modules in (
        (double, "double_blocks", "transformer_blocks", names.double),
        (single, "single_blocks", "single_transformer_blocks", names.single),
    ):
        for i in range(count):
            for name, parts in modules.items():
                yield f"{ours}.{i}.{name}", tuple(f"{theirs}.{i}.{part}" for part in parts)
