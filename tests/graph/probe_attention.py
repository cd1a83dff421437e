"""Probe: ComfyUI started with an attention flag; which attention our network calls, and how often.

probe_attention.py [flag of ComfyUI, such as --use-split-cross-attention]
"""

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import probe

STEPS = 2
Answer = dict[str, Any]


def main(scratch: Path) -> Answer:
    import comfy.ldm.modules.attention as attention
    import comfy.ldm.modules.diffusionmodules.model as vae
    import torch

    del scratch
    calls = {"transformer": 0, "autoencoder": 0}

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    chosen = attention.optimized_attention
    attention.optimized_attention = counted("transformer", chosen)
    choose = vae.vae_attention
    vae.vae_attention = lambda: counted("autoencoder", choose())

    nodes = {name.removeprefix("Glassbox"): one for name, one in probe.load_nodes().items()}

    def run(name: str, **inputs: Any) -> Any:
        return nodes[name].execute(**inputs).result[0]

    model, encoders, autoencoder = nodes["LoadNano"].execute(name="kontext").result
    text = run("EncodeText", text_encoders=encoders, prompt="red", prompt_2="", t5_tokens=0)
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    seen = {"autoencoder": autoencoder, "image": image, "posterior": "mode", "seed": 0}
    reference = run("EncodeAndPack", **seen)
    conditioning = run(
        "ReferenceConditioner",
        text=text,
        guidance=1.0,
        placement="auto",
        references={"reference_1": reference},
    )
    noise = run("Noise", model=model, width=64, height=64, seed=1, batch_size=1)
    sigmas = run("Schedule", model=model, noise=noise, steps=STEPS, kind="flux", sigmas="")
    wires = {"model": model, "conditioning": conditioning, "noise": noise, "sigmas": sigmas}
    tokens = run("SampleGuided", **wires, solver="euler")
    made = run("UnpackAndDecode", autoencoder=autoencoder, tokens=tokens)
    network = model.network
    blocks = len(network.blocks.double_blocks) + len(network.blocks.single_blocks)
    backend = network.attention.name
    network.attention = sys.modules[
        f"{probe.PACK}.flux_core.transformer.attention"
    ].PyTorchAttention()
    plain = run("SampleGuided", **wires, solver="euler")
    return {
        "chosen": chosen.__name__,
        "backend": backend,
        "calls_per_step": calls["transformer"] / STEPS,
        "blocks": blocks,
        "autoencoder_calls": calls["autoencoder"],
        "apart": float((tokens.values - plain.values).abs().max()),
        "shape": list(made.shape),
    }


def _stand_in() -> None:
    """SageAttention's one function by PyTorch: the package itself computes on CUDA alone."""
    import torch.nn.functional as F

    def sageattn(q: Any, k: Any, v: Any, tensor_layout: str, **_: Any) -> Any:
        turned = tensor_layout == "NHD"
        q, k, v = (one.transpose(1, 2) if turned else one for one in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v)
        return attended.transpose(1, 2) if turned else attended

    module = types.ModuleType("sageattention")
    module.sageattn = sageattn  # type: ignore[attr-defined]
    sys.modules["sageattention"] = module


if __name__ == "__main__":
    sys.path.insert(0, str((probe.ROOT / ".cache" / "comfyui-in-use").resolve()))
    if "--use-sage-attention" in sys.argv:
        _stand_in()
    import comfy.options

    comfy.options.enable_args_parsing()
    probe.run(main)
