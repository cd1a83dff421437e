"""Probe: a MODEL as GGUF loaders make it, in our samplers and, with our places, in ComfyUI's.

Against ComfyUI's plain network with the same numbers, with a LoRA of its own loader and without.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import probe
from probe_native import Bench

Answer = dict[str, Any]
FILES = {
    "FLUX.1": "glassbox_nano_kontext.safetensors",
    "FLUX.2": "flux-2-klein-base-4b.safetensors",
}
STRENGTH = 0.7


def main(scratch: Path) -> Answer:
    bench = PackedBench(scratch)
    answer: Answer = {name: {} for name in ("packed", "apart", "routes", "lora", "again")}
    for generation in FILES:
        bench.compare(generation, answer)
    return answer


class PackedBench(Bench):
    """Packed weights, and the same numbers in ComfyUI's plain network."""

    def compare(self, generation: str, answer: Answer) -> None:
        import comfy.sd
        import torch

        packed, plain = self.models(generation)
        weight = packed.model.diffusion_model.single_blocks[0].linear1.weight
        answer["packed"][generation] = weight.dtype == torch.uint8
        lora = self.lora(generation)
        without: list[Any] = []
        for name, strength in (("plain", 0.0), ("LoRA", STRENGTH), ("plain again", 0.0)):
            models = packed, plain
            if strength:
                models = tuple(
                    comfy.sd.load_lora_for_models(one, None, lora, strength, 0)[0] for one in models
                )
            for count in (0, 2):
                key = f"{generation} {count} {name}"
                conditioning = self.conditioning(generation, count, "as wired")
                ours, theirs = (self.guided_by(generation, one, conditioning) for one in models)
                answer["apart"][key] = _apart(ours, theirs)
                native = self.in_ksampler(generation, models[0], conditioning)
                answer["routes"][key] = _apart(native, ours)
                without.append(ours)
        answer["lora"][generation] = min(_apart(without[2 + i], without[i]) for i in range(2))
        answer["again"][generation] = all(torch.equal(without[4 + i], without[i]) for i in range(2))

    def models(self, generation: str) -> tuple[Any, Any]:
        import comfy.sd
        import comfy.utils
        import folder_paths

        path = folder_paths.get_full_path_or_raise("diffusion_models", FILES[generation])
        state = {key: one.float() for key, one in comfy.utils.load_torch_file(path).items()}
        from packed_weights import Operations, PackedPatcher, pack

        stored: Answer = {}
        for key, tensor in state.items():
            is_packed = "blocks." in key and tensor.ndim == 2
            stored[key] = pack(tensor) if is_packed else tensor
            state[key] = stored[key].unpacked() if is_packed else tensor
        options = {"custom_operations": Operations}
        load = comfy.sd.load_diffusion_model_state_dict
        return PackedPatcher.clone(load(stored, model_options=options)), load(state)

    def lora(self, generation: str) -> Answer:
        from glassbox.tests.graph.native_files import lora

        network = self.natives[generation].model.diffusion_model
        layers = {
            key.removesuffix(".weight"): one
            for key, one in network.state_dict().items()
            if one.ndim == 2 and key.endswith(".weight")
        }
        return lora("lora_unet_", layers, seed=3)

    def guided_by(self, generation: str, model: Any, conditioning: Any) -> Any:
        noise, sigmas = self.inputs(generation)
        wires = {"conditioning": conditioning, "noise": noise, "sigmas": sigmas}
        tokens = self.run("SampleGuided", model=model, solver="euler", **wires)
        return self.run("UnpackLatent", tokens=tokens)["samples"]

    def in_ksampler(self, generation: str, model: Any, conditioning: Any) -> Any:
        native, *_ = self.run("ToConditioning", conditioning=conditioning)
        placed = self.run("ApplyToModel", model=model, conditioning=conditioning)
        _, sigmas = self.inputs(generation)
        return self.sampled(placed, native, sigmas, generation)


def _apart(one: Any, other: Any) -> float:
    return float((one - other).abs().max() / other.abs().max())


if __name__ == "__main__":
    probe.run(main)
