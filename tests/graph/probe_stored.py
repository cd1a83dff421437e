"""Probe: models whose float8 and NVFP4 weights stay in memory as stored, against plain ones.

Tiny random networks of both families are quantised, loaded both ways through the pack's own loader
and sampled through its handles, inside ComfyUI's modules.
"""

import gc
import importlib
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import probe
from probe_kept import Answer, Bench, _module, _same

FORMS = {
    "flux1-dev": ("old", "metadata", "raw", "e5m2", "nvfp4", "smoothed"),
    "flux2-klein-9b-kv": ("old", "layers", "nvfp4", "smoothed"),
}


class StoredBench(Bench):
    """Quantised files of a family, and handles on them."""

    def __init__(self, folder: Path, family: str) -> None:
        super().__init__()
        self.folder = folder
        self.family = self.families.FAMILIES[family]
        own = self.family.transformer
        self.spec = replace(
            own,
            hidden=256,
            double_blocks=1,
            single_blocks=2,
            context_width=48,
            pooled_width=32 if own.pooled_width else 0,
        )
        self.loading = _module("nodes.runtime.loading")
        self.stored = _module("nodes.runtime.quantised")

    def file(self, form: str) -> Path:
        """Write random weights, the blocks' matrices quantised, once."""
        import torch
        from safetensors.torch import load_file, save_file

        path = self.folder / f"{self.family.name}-{form}.safetensors"
        if path.is_file():
            return path

        files = importlib.import_module(f"{probe.PACK}.tests.core.quantised_files")
        flux = _module("flux_core.transformer.flux")
        network = flux.build_flux(self.family, self.spec)
        generator = torch.Generator().manual_seed(3)
        plain: dict[str, Any] = {}
        for part in (network.modulation, network.blocks):
            for name, tensor in part.state_dict().items():
                centre = 1.0 if name.endswith("scale") else 0.0
                plain[name] = centre + 0.05 * torch.randn(tensor.shape, generator=generator)
        metadata: dict[str, str] = {}
        if form == "raw":
            float8 = torch.float8_e4m3fn
            state = {k: v.to(float8) if v.ndim == 2 else v for k, v in plain.items()}
        elif form == "nvfp4":
            state, metadata, _ = files.nvfp4(plain)
        elif form == "smoothed":
            state = load_file(str(self.file("nvfp4")))
            layers = [key[: -len(".weight_scale_2")] for key in state if key.endswith("_scale_2")]
            metadata = files.header({layer: {"format": "nvfp4"} for layer in layers})
            for layer in layers:
                columns = 2 * state[f"{layer}.weight"].shape[1]
                state[f"{layer}.pre_quant_scale"] = torch.linspace(0.5, 2, columns)
        else:
            is_wide = form == "e5m2"
            dtype = torch.float8_e5m2 if is_wide else torch.float8_e4m3fn
            state, metadata, _ = files.scaled_float8(plain, "layers" if is_wide else form, dtype)
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, str(path), metadata)
        return path

    def load(self, path: Path, weights: str = "as stored", dtype: str = "float32") -> Any:
        return self.loading.load_model(path, self.family.name, dtype, weights)

    def conditioning(self, prompt: str, references: tuple[Any, ...]) -> Any:
        import torch

        found = super().conditioning(prompt, references)
        if not self.spec.pooled_width:
            return found
        pooled = torch.randn(1, 32, generator=torch.Generator().manual_seed(5))
        return replace(found, text=replace(found.text, pooled=pooled), guidance=3.5)

    def pictures(self, handle: Any) -> Any:
        """References and true CFG, in one run."""
        import torch

        guidance = _module("flux_core.sampling.guidance")
        references = () if self.spec.pooled_width else (self.reference(1),)
        negative = self.conditioning("blue", references)
        cfg = guidance.TrueCFG(negative=negative, scale=3.0)
        alone = self.run(handle, *references)
        return torch.cat([alone, self.run(handle, *references, cfg=cfg)])

    def parts(self, seed: int) -> list[Any]:
        """Changes of fused rows, of whole weights in three forms, and of a bias."""
        import torch

        words = _module("flux_core.weights.lora")
        generator = torch.Generator().manual_seed(seed)

        def drawn(*sides: int) -> Any:
            return 0.1 * torch.randn(sides, generator=generator)

        qkv, proj = ("double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_attn.proj.weight")
        last, whole = "single_blocks.1.linear2.weight", self.spec.hidden
        made = [
            words.LoraPart(qkv, i * whole, whole, False, words.LowRank(drawn(whole, 4), down), 0.5)
            for i, down in enumerate((drawn(4, whole), drawn(4, whole), drawn(4, whole)))
        ]
        kronecker = words.Kronecker(drawn(whole // 16, 16), drawn(16, whole // 16))
        made.append(words.LoraPart(proj, 0, whole, True, kronecker, 0.7))
        columns = whole + self.spec.mlp_width
        full = words.Full(drawn(whole, columns))
        made.append(words.LoraPart(last, 0, whole, True, full, 0.3))
        text = words.LowRank(drawn(whole, 4), drawn(4, 48))  # is not quantised
        made.append(words.LoraPart("txt_in.weight", 0, whole, True, text, 1.0))
        modulation = "single_stream_modulation.lin.weight"
        if not self.spec.shares_modulation:
            modulation = "single_blocks.0.modulation.lin.weight"
            bias = words.Full(drawn(whole))
            made.append(words.LoraPart(proj[:-6] + "bias", 0, whole, True, bias, 1.0))
        low = words.LowRank(drawn(3 * whole, 4), drawn(4, whole))
        made.append(words.LoraPart(modulation, 0, 3 * whole, True, low, 1.0))
        return made


def main(folder: Path) -> Answer:
    probe.load_pack()
    gc.disable()
    answer: Answer = {}
    for family, forms in FORMS.items():
        bench = StoredBench(folder, family)
        for form in forms:
            answer[f"{family} {form}"] = _compare(bench, bench.file(form))
        answer[f"{family} partly"] = _partly(bench, bench.file("layers"))
        answer[f"{family} kept"] = _kept(bench, bench.file("layers"))
        answer[f"{family} life"] = _life(bench, bench.file("layers"))
    for family in ("flux1-dev", "flux2-klein-4b"):
        bench = StoredBench(folder, family)
        forms = ("old", "layers", "nvfp4")
        answer[f"{family} native"] = {one: _native(bench, bench.file(one)) for one in forms}
    return answer


def _compare(bench: StoredBench, path: Path) -> Answer:
    stored, plain = bench.load(path), bench.load(path, "plain")
    parts, others = bench.parts(1), bench.parts(2)
    one, both = stored.with_changes(parts), stored.with_changes(parts).with_changes(others)
    before = _bytes(stored)
    guided = bench.pictures(stored)
    handles = (stored, one, both, one, stored)
    first, single, double, repeated, last = (bench.run(one) for one in handles)
    expected = bench.run(plain)
    changed = bench.run(plain.with_changes(parts))
    twice = bench.run(plain.with_changes(parts).with_changes(others))
    half = [bench.load(path, weights, "bfloat16") for weights in ("as stored", "plain")]
    rough = [bench.run(handle) for handle in half]
    return {
        "plain": _far(guided, bench.pictures(plain)),
        "again": _same(first, last) and _same(single, repeated),
        "lora": _far(single, changed),
        "loras": _far(double, twice),
        "lora differs": _far(single, first),
        "bfloat16": _far(rough[0], rough[1]),
        "bfloat16 off": [_far(one, expected) for one in rough],
        "identities": len({one._identity() for one in (stored, one, both)}),
        "shared": bench.load(path) is stored and stored is not plain,
        "layers": sum(len(_layers(stored, part)) for part in ("modulation", "blocks")),
        "bytes": [before, _bytes(plain), path.stat().st_size],
        "counted": sum(one.model_size() for one in stored.get_models()),
        "unchanged": before == _bytes(stored),
        "made": [one._dequantised for one in (stored, one, plain)],
        "reports": [stored.report, plain.report],
    }


def _partly(bench: StoredBench, path: Path) -> Answer:
    """A device too small for the blocks: half of them wait, and come back."""
    import torch

    handle = bench.load(path).with_changes(bench.parts(1))
    expected = bench.pictures(handle)
    whole = handle.patcher.loaded_size()
    bring, left = bench.host.load, list[int]()

    def short(patchers: Any, activations: int) -> Any:
        device = bring(patchers, activations)
        if patchers[0] is handle.patcher:
            handle.patcher.partially_unload(torch.device("cpu"), handle.patcher.model_size() // 2)
            left.append(handle.patcher.loaded_size())
        return device

    bench.host.load = short
    try:
        picture = bench.pictures(handle)
    finally:
        bench.host.load = bring
    back = bench.pictures(handle)
    bench.host.unload(handle.patcher)
    gone = handle.patcher.loaded_size()
    return {
        "waiting": left[-1] < 0.7 * whole and whole > 0,
        "gone": gone,
        "equal": _same(expected, picture, back, bench.pictures(handle)),
    }


def _kept(bench: StoredBench, path: Path) -> Answer:
    """What is kept of references under one set of changes is not used under another."""
    if bench.spec.pooled_width:
        return {}
    plain, picture = bench.load(path), bench.reference(1)
    one, two = plain.with_changes(bench.parts(1)), plain.with_changes(bench.parts(2))
    none = plain.with_changes([])
    runs = [bench.counted(handle, picture) for handle in (plain, one, plain, one, two, none)]
    return {"passes": [count for _, count in runs], "equal": _same(runs[1][0], runs[3][0])}


def _life(bench: StoredBench, path: Path) -> Answer:
    """A changed handle keeps its model; with it goes everything."""
    plain = bench.load(path)
    one = plain.with_changes(bench.parts(1))
    bench.run(one)
    seen = [weakref.ref(plain), weakref.ref(plain.network.blocks)]
    del plain
    held = [ref() is not None for ref in seen]
    seen += [weakref.ref(one), weakref.ref(one.network), weakref.ref(one.patcher)]
    del one
    return {"held": held, "freed": [ref() is None for ref in seen]}


def _native(bench: StoredBench, path: Path) -> Answer:
    """ComfyUI's own loader of the same file, in our sampler."""
    import comfy.sd

    native = _module("nodes.native.handle").NativeModelHandle(
        comfy.sd.load_diffusion_model(str(path))
    )
    handle = bench.load(path, dtype=str(native.network.dtype).removeprefix("torch."))
    return {
        "dtype": str(handle.dtype),
        "apart": _far(bench.run(handle), bench.run(native)),
        "sizes": [
            sum(one.model_size() for one in handle.get_models()),
            native.patcher.model_size(),
        ],
    }


def _layers(handle: Any, part: str) -> Any:
    return _module("nodes.host").quantised_layers(getattr(handle.network, part))


def _bytes(handle: Any) -> int:
    """Count the storage behind a handle, each once."""
    states = [patcher.model.state_dict() for patcher in handle.get_models()]  # alive together
    tensors = [tensor for state in states for tensor in state.values()]
    return sum({one.untyped_storage().data_ptr(): one.nbytes for one in tensors}.values())


def _far(one: Any, other: Any) -> float:
    return float((one - other).abs().max() / other.abs().max())


if __name__ == "__main__":
    probe.run(main)
