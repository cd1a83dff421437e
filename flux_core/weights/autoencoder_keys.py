"""Key map of the autoencoders: published (BFL) names and diffusers' names.

diffusers numbers the decoder's levels in the order they run, BFL by their resolution; its
attention is linear layers where BFL has 1x1 convolutions; and FLUX.2's convolutions around the
bottleneck stand beside encoder and decoder, as in ComfyUI's saves, where BFL has them inside.
Source: black-forest-labs/flux@802fb47 src/flux/modules/autoencoder.py; black-forest-labs/
flux2@ab7cca6 src/flux2/autoencoder.py; huggingface/diffusers 0.42.1 AutoencoderKL,
AutoencoderKLFlux2.
"""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from .key_map import KeyMap, KeyRule, count_numbers, find_prefix, map_keys

MOST_LEVELS = 8  # of resolution; the published autoencoders have 4
# What an autoencoder with a normalised latent has, by published name: FLUX.2's and not FLUX.1's.
NORMALISED = ("bn.", "encoder.quant_conv.", "decoder.post_quant_conv.")
PREFIXES = ("", "first_stage_model.", "vae.")
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OURS = {theirs: ours for ours, theirs in _ATTENTION.items()}
_KERNELS = re.compile(r".*\.mid\.attn_1\.(q|k|v|proj_out)\.weight")


def autoencoder_key_map(keys: Iterable[str]) -> KeyMap | None:
    """Maps the keys of a file to ours; None when they are not laid out like an autoencoder.

    Raises:
        CheckpointError: a level is missing between others.
    """
    keys = dict.fromkeys(keys)  # in the file's order
    prefix = find_prefix(keys, PREFIXES, ("encoder.down.", "decoder.up."))
    if prefix is not None:
        mine = [key for key in keys if key.startswith(prefix)]
        rules: dict[str, KeyRule] = {}
        for key in mine:
            rules.setdefault(_move_inside(key[len(prefix) :]), KeyRule((key,)))
        return map_keys("BFL", prefix, keys, rules)
    prefix = find_prefix(keys, PREFIXES, ("encoder.down_blocks.", "decoder.up_blocks."))
    if prefix is None:
        return None
    levels = count_numbers(keys, prefix + "decoder.up_blocks.", MOST_LEVELS)
    rules = {}
    for key in keys:
        if key.startswith(prefix):
            ours = to_published_name(key[len(prefix) :], levels)
            kernel = _KERNELS.fullmatch(ours) is not None
            rules.setdefault(ours, KeyRule((key,), "1x1 kernel" if kernel else "none"))
    return map_keys(
        "diffusers", prefix, keys, rules, lambda key: (prefix + to_diffusers_name(key, levels),)
    )


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames our tensors into diffusers' layout; the inverse of the key map."""
    levels = count_numbers(state, "decoder.up.")
    theirs: dict[str, Tensor] = {}
    for name, tensor in state.items():
        kernel = _KERNELS.fullmatch(name) is not None
        theirs[to_diffusers_name(name, levels)] = tensor.flatten(1) if kernel else tensor
    return theirs


def to_published_name(name: str, levels: int) -> str:
    """Renames one diffusers tensor; a name without a counterpart stays."""
    name = re.sub(
        r"^decoder\.up_blocks\.(\d{1,3})", lambda m: f"decoder.up.{levels - 1 - int(m[1])}", name
    )
    name = re.sub(r"^encoder\.down_blocks\.(\d+)", r"encoder.down.\1", name)
    name = re.sub(r"\.mid_block\.resnets\.([01])\.", lambda m: f".mid.block_{int(m[1]) + 1}.", name)
    name = re.sub(
        r"\.mid_block\.attentions\.0\.(group_norm|to_q|to_k|to_v|to_out\.0)\.",
        lambda m: f".mid.attn_1.{_OURS[m[1]]}.",
        name,
    )
    name = re.sub(r"\.resnets\.(\d+)\.", r".block.\1.", name)
    name = re.sub(r"\.(down|up)samplers\.0\.", r".\1sample.", name)
    return (
        _move_inside(name)
        .replace(".conv_shortcut.", ".nin_shortcut.")
        .replace(".conv_norm_out.", ".norm_out.")
    )


def to_diffusers_name(name: str, levels: int) -> str:
    """Renames one of our tensors; the inverse of `to_published_name`."""
    name = re.sub(
        r"^decoder\.up\.(\d{1,3})", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}", name
    )
    name = re.sub(r"^encoder\.down\.(\d+)", r"encoder.down_blocks.\1", name)
    name = re.sub(r"\.mid\.block_([12])\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", name)
    name = re.sub(
        r"\.mid\.attn_1\.(norm|q|k|v|proj_out)\.",
        lambda m: f".mid_block.attentions.0.{_ATTENTION[m[1]]}.",
        name,
    )
    name = re.sub(r"\.block\.(\d+)\.", r".resnets.\1.", name)
    name = re.sub(r"\.(down|up)sample\.", r".\1samplers.0.", name)
    name = re.sub(r"^(encoder|decoder)\.((post_)?quant_conv)\.", r"\2.", name)
    return name.replace(".nin_shortcut.", ".conv_shortcut.").replace(
        ".norm_out.", ".conv_norm_out."
    )


def _move_inside(name: str) -> str:
    """Moves a convolution that stands beside encoder and decoder into the one it belongs to."""
    if name.startswith("quant_conv."):
        return "encoder." + name
    return "decoder." + name if name.startswith("post_quant_conv.") else name
