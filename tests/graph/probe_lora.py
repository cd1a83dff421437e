"""Probe: LoRAs through the pack's own handles, inside ComfyUI's modules.

Pictures of a patched handle are compared with those of a network whose weights were changed for
good, and handles on the same weights are used in turn.
"""

import gc
import weakref
from pathlib import Path
from typing import Any

import probe
from probe_kept import Answer, Bench, _module, _same


class LoraBench(Bench):
    """A model that keeps references, and LoRAs of two formats for it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.lora, self.parts = _module("flux_core.weights.lora"), _module("nodes.runtime.loading")
        self.strengths = _module("flux_core.weights.lora_strengths")

    def file(self, name: str, seed: int) -> Path:
        """Write a LoRA of every layer: split layers as diffusers, or fused ones as kohya."""
        import torch
        from safetensors.torch import save_file

        names = _module("flux_core.weights.transformer_keys")
        handle = self.handle()
        state = {
            **handle.network.modulation.state_dict(),
            **handle.network.blocks.state_dict(),
        }
        is_split = name == "diffusers"
        if is_split:
            state = names.to_diffusers(state)
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for key, weight in state.items():
            if weight.ndim != 2:
                continue
            layer = key.removesuffix(".weight")
            stem = f"transformer.{layer}" if is_split else f"lora_unet_{layer.replace('.', '_')}"
            ends = ("lora_A", "lora_B") if is_split else ("lora_down", "lora_up")
            sizes = ((4, weight.shape[1]), (weight.shape[0], 4))
            for end, size in zip(ends, sizes, strict=True):
                drawn = 0.1 * torch.randn(size, generator=generator)
                tensors[f"{stem}.{end}.weight"] = drawn
            if not is_split:
                tensors[f"{stem}.alpha"] = torch.tensor(2.0)
        path = self.folder / f"{name}.safetensors"
        save_file(tensors, str(path))
        return path

    def apply(self, handle: Any, path: Path, strength: float = 1.0, blocks: str = "") -> Any:
        return self.parts.apply_lora(handle, path, strength, blocks)[0]

    def merged(self, *paths: Path, strength: float = 1.0) -> Any:
        """A handle on weights that were changed for good."""
        handle = self.handle()
        spec = handle.network.spec
        blocks = self.strengths.parse_strengths("", spec)
        loaded = [self.lora.load_lora(path, self.family, spec) for path in paths]
        _module("flux_core.weights.lora").merge_lora(
            handle.network, [part for one in loaded for part in one.scaled(strength, blocks)]
        )
        return handle


def main(folder: Path) -> Answer:
    probe.load_pack()
    gc.disable()
    answer: Answer = {}
    bench = LoraBench(folder)
    files = bench.file("kohya", 1), bench.file("diffusers", 2)
    answer |= _in_turn(bench, *files)
    answer |= _partly(bench, files[1])
    answer |= _kept(bench, files[0])
    answer |= _life(bench, files[0])
    return answer


def _in_turn(bench: LoraBench, kohya: Path, diffusers: Path) -> Answer:
    """The model, with one LoRA, with two, the model again, and the one LoRA again."""
    import comfy.model_management as mm

    plain = bench.handle()
    before = _weights(plain)
    one = bench.apply(plain, kohya)
    two = bench.apply(one, diffusers, 0.5)
    none = bench.apply(plain, kohya, 0.0)
    weak = bench.apply(plain, kohya, 1.0, "double: 0; single: 0; other: 0")
    handles = (plain, one, two, plain, one, none, weak, two, plain)
    pictures = [bench.run(handle) for handle in handles]
    mm.unload_all_models()
    after = _weights(plain)
    expected = bench.run(bench.merged(kohya))
    first, single, double = pictures[:3]
    return {
        "again_equal": _same(first, *(pictures[i] for i in (3, 5, 6, 8))),
        "lora_equal": _same(single, pictures[4]) and _same(double, pictures[7]),
        "lora_differ": not (_same(first, single) or _same(single, double)),
        "merged": float((single - expected).abs().max() / expected.abs().max()),
        "far": float((single - first).abs().max() / expected.abs().max()),
        "weights_equal": all(_same(before[key], after[key]) for key in before),
        "two_merged": _two_merged(bench, double, kohya, diffusers),
    }


def _two_merged(bench: LoraBench, picture: Any, kohya: Path, diffusers: Path) -> float:
    handle = bench.merged(kohya)
    spec = handle.network.spec
    lora = bench.lora.load_lora(diffusers, bench.family, spec)
    parts = lora.scaled(0.5, bench.strengths.parse_strengths("", spec))
    _module("flux_core.weights.lora").merge_lora(handle.network, parts)
    expected = bench.run(handle)
    return float((picture - expected).abs().max() / expected.abs().max())


def _partly(bench: LoraBench, path: Path) -> Answer:
    """A device too small for the blocks: ComfyUI adds the changes of what waits as it computes."""
    import torch

    handle = bench.apply(bench.handle(), path)
    expected = bench.run(handle)
    bring, calls = bench.host.load, list[int]()

    def short(patchers: Any, activations: int) -> Any:
        device = bring(patchers, activations)
        if patchers[0] is handle.patcher:
            handle.patcher.partially_unload(torch.device("cpu"), handle.patcher.model_size() // 2)
            calls.append(handle.patcher.model.lowvram_patch_counter)
        return device

    bench.host.load = short
    try:
        picture = bench.run(handle)
    finally:
        bench.host.load = bring
    return {
        "partly_waiting": calls[-1],
        "partly": float((picture - expected).abs().max() / expected.abs().max()),
    }


def _weights(handle: Any) -> dict[str, Any]:
    return {
        f"{part}.{key}": tensor.clone()
        for part in ("modulation", "blocks")
        for key, tensor in getattr(handle.network, part).state_dict().items()
    }


def _kept(bench: LoraBench, path: Path) -> Answer:
    """What is kept of references under one set of LoRAs is not used under another."""
    plain, picture = bench.handle(), bench.reference(1)
    one, weaker = bench.apply(plain, path), bench.apply(plain, path, 0.5)
    none = bench.apply(plain, path, 0.0)
    runs = [bench.counted(handle, picture) for handle in (plain, one, plain, one, weaker, none)]
    cold = bench.run(bench.apply(bench.handle(), path), picture)
    return {
        "kept_passes": [count for _, count in runs],
        "kept_equal": _same(runs[1][0], runs[3][0], cold),
        "kept_differ": not _same(runs[0][0], runs[1][0]),
    }


def _life(bench: LoraBench, path: Path) -> Answer:
    """A patched handle keeps its model; with it goes everything."""
    plain = bench.handle()
    one = bench.apply(plain, path)
    bench.run(one)
    seen = [weakref.ref(plain), weakref.ref(plain.network.blocks)]
    del plain
    held = [ref() is not None for ref in seen]
    seen += [weakref.ref(one), weakref.ref(one.network), weakref.ref(one.patcher)]
    del one
    return {"life_held": held, "life_freed": [ref() is None for ref in seen]}


if __name__ == "__main__":
    probe.run(main)
