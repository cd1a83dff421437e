"""Probe: tokens and ids of ComfyUI's own Flux against ours, for each way to place references.

Both generations; one reference of FLUX.2 is asked for with "index" there whatever ours is placed
with, because ours goes where the model was trained with it.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import probe

# Target, then references; height and width in latent cells, as ComfyUI's LATENT has them.
SIZES: list[list[tuple[int, int]]] = [
    [(8, 8)],
    [(16, 24), (16, 24)],
    [(24, 16), (8, 40)],
    [(128, 128), (64, 96)],
    [(16, 16), (16, 16), (16, 16)],
    [(16, 16), (30, 12), (12, 30)],
    [(20, 12), (8, 8), (40, 6), (6, 40)],
    [(12, 20), (16, 16), (16, 16), (16, 16)],
]

# What ComfyUI makes its Flux with, comfy/model_detection.py.
GENERATIONS: dict[str, dict[str, Any]] = {
    "FLUX.1": {
        "in_channels": 16,
        "patch_size": 2,
        "axes_dim": [16, 56, 56],
        "txt_ids_dims": [],
    },
    "FLUX.2": {
        "in_channels": 128,
        "patch_size": 1,
        "axes_dim": [32, 32, 32, 32],
        "txt_ids_dims": [3],
        "default_ref_method": "index",
        "ref_index_scale": 10.0,
    },
}
TEXT_TOKENS = 5


def main(_: Path) -> dict[str, Any]:
    probe.load_pack()
    import torch

    generator = torch.Generator().manual_seed(0)
    wrong: list[str] = []
    cases = 0
    for generation, settings in GENERATIONS.items():
        channels = settings["in_channels"]
        for sizes in SIZES:
            latents = [torch.randn(2, channels, *size, generator=generator) for size in sizes]
            for placement in ("offset", "index", "single"):
                if placement == "single" and len(sizes) > 2:
                    continue
                cases += 1
                theirs = _theirs(latents, placement, settings)
                ours = _ours(latents, placement, generation)
                for name, one, other in zip(("tokens", "ids", "text"), theirs, ours, strict=True):
                    if not torch.equal(one, other):
                        wrong.append(f"{name} of {generation} {sizes} {placement}")
    return {"cases": cases, "wrong": wrong}


def _theirs(latents: list[Any], placement: str, settings: dict[str, Any]) -> tuple[Any, ...]:
    """Run ComfyUI's Flux up to where it has put the sequence together."""
    import comfy.ops
    import torch
    from comfy.ldm.flux.model import Flux

    model = Flux(
        out_channels=settings["in_channels"],
        vec_in_dim=4,
        context_in_dim=4,
        hidden_size=128,
        mlp_ratio=1.0,
        num_heads=1,
        depth=0,
        depth_single_blocks=0,
        theta=10000,
        qkv_bias=True,
        guidance_embed=True,
        operations=comfy.ops.disable_weight_init,
        **settings,
    )
    seen: dict[str, Any] = {}

    def stop_here(img: Any, img_ids: Any, _: Any, txt_ids: Any, *__: Any, **___: Any) -> Any:
        seen.update(img=img, img_ids=img_ids, txt_ids=txt_ids)
        return img

    model.forward_orig = stop_here  # of this one object
    target, references = latents[0], latents[1:]
    context = torch.zeros(2, TEXT_TOKENS, 4)
    # "single" is ComfyUI's offset with one reference, and its index with one of FLUX.2.
    alone = len(references) == 1 and settings["patch_size"] == 1
    method = "index" if placement == "index" or alone else "offset"
    model(
        target,
        torch.zeros(2),
        context,
        ref_latents=references or None,
        ref_latents_method=method,
    )
    return seen["img"], seen["img_ids"][0], seen["txt_ids"][0]


def _ours(latents: list[Any], placement: str, generation: str) -> tuple[Any, ...]:
    """Pack and place the same latents with the pack's own functions."""
    import importlib

    import torch

    families = importlib.import_module(f"{probe.PACK}.flux_core.families")
    pack = importlib.import_module(f"{probe.PACK}.flux_core.tokens.pack")
    references = importlib.import_module(f"{probe.PACK}.flux_core.tokens.references")
    ids = importlib.import_module(f"{probe.PACK}.flux_core.tokens.ids")
    spec = families.LATENTS[generation]
    tokens = [pack.latent_tokens(latent, spec) for latent in latents]
    sequence = [tokens[0], *references.place_references(tokens[1:], placement)]
    values = torch.cat([one.values for one in sequence], dim=1)
    places = torch.cat([one.ids for one in sequence])
    return values, places, ids.text_ids(TEXT_TOKENS, spec)


if __name__ == "__main__":
    probe.run(main)
