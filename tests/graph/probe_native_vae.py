"""Probe: Encode and Pack, and Unpack and Decode, with ComfyUI's own VAE against our autoencoder.

Full-size autoencoders with random weights, because ComfyUI's loader fixes their sizes.
"""

import sys
import types
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import probe
from probe_native import _message, _nodes


def main(folder: Path) -> dict[str, Any]:
    import torch

    answer: dict[str, Any] = {"encoded": {}, "decoded": {}, "spread": {}}
    nodes = _nodes(folder)
    image = torch.rand(2, 32, 64, 3, generator=torch.Generator().manual_seed(3))
    for generation, state in _states():
        ours, native = _both(nodes, folder, generation, state)
        tokens = [_encode(nodes, one, image) for one in (ours, native)]
        values = [one.values for one in tokens]
        scale = float(values[0].abs().max())
        answer["encoded"][generation] = float((values[0] - values[1]).abs().max()) / scale
        pictures = [_decode(nodes, one, tokens[0]) for one in (ours, native)]
        answer["decoded"][generation] = float((pictures[0] - pictures[1]).abs().max())
        answer["spread"][generation] = float(pictures[0].std())
    answer["refused"] = _refused(nodes, native, image, tokens[0])
    return answer


def _states() -> Any:
    """Weights of both generations, one after the other."""
    from glassbox.flux_core.families import FLUX1_AUTOENCODER, FLUX2_AUTOENCODER
    from glassbox.tests.graph import tiny, tiny_flux2

    yield "FLUX.1", tiny.autoencoder_state(FLUX1_AUTOENCODER)
    yield "FLUX.2", tiny_flux2.autoencoder_state(FLUX2_AUTOENCODER)


def _both(nodes: dict[str, Any], folder: Path, name: str, state: dict[str, Any]) -> Any:
    """The same file in our loader and in ComfyUI's."""
    import comfy.sd
    import comfy.utils
    import folder_paths

    from glassbox.tests.graph import tiny

    folder_paths.add_model_folder_path("vae", str(folder))
    path = tiny.save(state, folder / f"{name}-vae.safetensors")
    load = nodes["GlassboxLoadAutoencoder"].execute
    ours = load(file=path.name, dtype="float32").result[0]
    return ours, comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)))


def _encode(nodes: dict[str, Any], autoencoder: Any, image: Any, posterior: str = "mode") -> Any:
    run = nodes["GlassboxEncodeAndPack"].execute
    return run(autoencoder=autoencoder, image=image, posterior=posterior, seed=0).result[0]


def _decode(nodes: dict[str, Any], autoencoder: Any, tokens: Any) -> Any:
    return nodes["GlassboxUnpackAndDecode"].execute(autoencoder, tokens).result[0]


def _refused(nodes: dict[str, Any], flux2: Any, image: Any, tokens: Any) -> dict[str, str]:
    """What each wrong use says."""
    import comfy.sd
    import torch
    from comfy.taesd.taesd import TAESD

    video = types.SimpleNamespace(
        first_stage_model=flux2.first_stage_model,
        latent_dim=3,
        latent_channels=16,
        spacial_compression_encode=lambda: 8,
    )
    small = comfy.sd.VAE(sd=TAESD(latent_channels=16).state_dict())
    empty = types.SimpleNamespace(first_stage_model=None)
    pack = nodes["GlassboxPackLatent"].execute
    other = pack(latent={"samples": torch.zeros(1, 16, 4, 8)}, latent_format="FLUX.1").result[0]
    uses = {
        "taesd": lambda: _encode(nodes, small, image),
        "empty": lambda: _encode(nodes, empty, image),
        "video": lambda: _encode(nodes, video, image),
        "sample": lambda: _encode(nodes, flux2, image, "sample"),
        "size": lambda: _encode(nodes, flux2, image[:, :, :40]),
        "tokens": lambda: _decode(nodes, flux2, other),
    }
    return {name: _message(use) for name, use in uses.items()}


if __name__ == "__main__":
    probe.run(main)
