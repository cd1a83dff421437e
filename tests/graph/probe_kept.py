"""Probe: references' keys and values kept across runs, with every computation counted.

A tiny random network of a family that was trained for it samples through the pack's own handle,
inside ComfyUI's modules.
"""

import gc
import importlib
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import probe

Answer = dict[str, Any]
PROMPTS = {"red": 1, "blue": 2}


class Bench:
    """A model handle, what it samples, and how often references were computed."""

    def __init__(self) -> None:
        self.families = _module("flux_core.families")
        self.handles, self.host = _module("nodes.runtime.handles"), _module("nodes.host")
        self.kept, self.plan = (
            _module("nodes.runtime.reference_cache"),
            _module("flux_core.transformer.references"),
        )
        self.family = self.families.FLUX2_KLEIN_9B_KV
        self.spec = replace(
            self.family.transformer,
            hidden=256,
            double_blocks=1,
            single_blocks=2,
            context_width=48,
        )
        self.passes, self.told = 0, list[str]()
        self._count_passes()
        self.host.notify = lambda messages: setattr(self, "told", list(messages))

    def _count_passes(self) -> None:
        original = self.plan.ReferencePass.__iter__

        def counted(computed: Any) -> Any:
            self.passes += 1
            return original(computed)

        self.plan.ReferencePass.__iter__ = counted

    def handle(self) -> Any:
        """A new handle on the same random weights."""
        import torch

        flux = _module("flux_core.transformer.flux")
        network = flux.build_flux(self.family, self.spec, operations=self.host.operations())
        generator = torch.Generator().manual_seed(3)
        for name, parameter in network.named_parameters():
            noise = 0.05 * torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise + (1.0 if name.endswith("scale") else 0.0))
        return self.handles.ModelHandle(network, "", torch.float32)

    def reference(self, seed: int, rows: int = 4, columns: int = 6) -> Any:
        """A reference at its place, of random tokens."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        latent = torch.randn(1, 128, rows, columns, generator=generator)
        tokens = _module("flux_core.tokens.pack").latent_tokens(latent, self.family.latent)
        return _module("flux_core.tokens.ids").place(tokens, index=10.0)

    def conditioning(self, prompt: str, references: tuple[Any, ...]) -> Any:
        import torch

        values = _module("flux_core.values")
        generator = torch.Generator().manual_seed(PROMPTS[prompt])
        txt = torch.randn(1, 7, self.spec.context_width, generator=generator)
        text = values.TextFeatures(txt=txt, pooled=None)
        seen = tuple(values.Reference(tokens=one) for one in references)
        return values.Conditioning(text=text, references=seen)

    def run(
        self,
        handle: Any,
        *references: Any,
        prompt: str = "red",
        seed: int = 1,
        size: tuple[int, int] = (64, 64),
        mode: str = "auto",
        cfg: Any = None,
    ) -> Any:
        """Sample; the picture's tokens."""
        import torch

        noise = _module("flux_core.sampling.noise").make_noise(self.family.latent, *size, seed, 1)
        sigmas = torch.tensor([1.0, 0.8, 0.6, 0.3, 0.0])
        conditioning = self.conditioning(prompt, references)
        job = _module("flux_core.sampling.job").Job(
            conditioning=conditioning, noise=noise, sigmas=sigmas, cfg=cfg
        )
        return _module("nodes.runtime.sample").sample(handle, job, mode).values

    def counted(self, *arguments: Any, **settings: Any) -> tuple[Any, int]:
        """Sample; the tokens, and how often references were computed."""
        before = self.passes
        return self.run(*arguments, **settings), self.passes - before


def main(_: Path) -> Answer:
    probe.load_pack()
    gc.disable()  # what is freed below is freed without it
    answer: Answer = {}
    bench = Bench()
    for check in (
        _again,
        _modes,
        _order,
        _bound,
        _memory,
        _free,
        _cancel,
        _cfg,
        _life,
        _preview,
    ):
        answer |= check(bench)
    return answer


def _module(name: str) -> Any:
    return importlib.import_module(f"{probe.PACK}.{name}")


def _same(*pictures: Any) -> bool:
    import torch

    return all(torch.equal(pictures[0], one) for one in pictures[1:])


def _again(bench: Bench) -> Answer:
    """A new prompt, seed or size uses the references again, as a cold model computes them."""
    handle, pictures = bench.handle(), (bench.reference(1), bench.reference(2, 2, 3))
    changes: list[Answer] = [{}, {"prompt": "blue"}, {"seed": 2}, {"size": (96, 48)}]
    warm = [bench.counted(handle, *pictures, **change) for change in changes]
    told = list(bench.told)
    cold = [bench.run(bench.handle(), *pictures, **change) for change in changes]
    return {
        "again_passes": [count for _, count in warm],
        "again_equal": [_same(one, other) for (one, _), other in zip(warm, cold, strict=True)],
        "again_told": told,
        "again_differ": not _same(warm[0][0], warm[1][0]),
    }


def _modes(bench: Bench) -> Answer:
    """Every way to treat references makes the same picture."""
    picture, told = bench.reference(1), list[list[str]]()
    results = list[tuple[Any, int]]()
    handle = bench.handle()
    for mode in ("every step", "this run", "this run", "kept", "auto"):
        results.append(bench.counted(handle, picture, mode=mode))
        told.append(list(bench.told))
    return {
        "modes_equal": _same(*(one for one, _ in results)),
        "modes_passes": [count for _, count in results],
        "modes_told": told,
        "modes_left": handle.network.reference_cache.__name__,
    }


def _order(bench: Bench) -> Answer:
    """A, then B, then A; two in another order, at another place, and patched weights."""
    handle, a, b = bench.handle(), bench.reference(1), bench.reference(2)
    aba = [bench.counted(handle, one) for one in (a, b, a)]
    moved = replace(a, ids=a.ids + 1)
    others = [bench.counted(handle, *some)[1] for some in ((a, b), (b, a), (b, a), (moved,))]
    handle.patcher.add_patches({})
    return {
        "aba_passes": [count for _, count in aba],
        "aba_equal": _same(aba[0][0], aba[2][0]),
        "aba_differ": not _same(aba[0][0], aba[1][0]),
        "order_passes": others,
        "patched_passes": bench.counted(handle, a)[1],
    }


def _bound(bench: Bench) -> Answer:
    """The least recently used leaves first."""
    handle = bench.handle()
    one, two, three = (bench.reference(seed) for seed in (1, 2, 3))
    bench.run(handle, one)
    size = handle._cached.held_bytes
    available = bench.host.available_bytes
    bench.host.available_bytes = lambda device: (
        2.5 * size / bench.kept._SHARE_OF_DEVICE - (handle._cached.held_bytes)
    )
    try:
        passes = [bench.counted(handle, some)[1] for some in (two, one, three, one, two)]
    finally:
        bench.host.available_bytes = available
    return {"bound_passes": passes, "bound_entries": handle._cached.held_bytes / size}


def _memory(bench: Bench) -> Answer:
    """Out of memory before and while computing: every step computes anew."""
    import torch

    picture, expected = bench.reference(1), bench.run(bench.handle(), bench.reference(1))
    available, needed = bench.host.available_bytes, list[float]()
    before = bench.handle()
    keep = bench.kept.RunCache

    def tight(device: Any) -> float:
        return needed[0] if needed else available(device)

    def recorded(*arguments: Any, **settings: Any) -> Any:
        needed.append(settings["step_bytes"])  # enough for it, and for the references' own pass
        return keep(*arguments, **settings)

    bench.host.available_bytes, bench.handles.RunCache = tight, recorded
    short, short_passes = bench.counted(before, picture)
    short_told = list(bench.told)
    bench.host.available_bytes, bench.handles.RunCache = available, keep

    init, made = bench.kept._CachedBlock.__init__, 0

    def full(self: Any, kept: Any) -> None:
        nonlocal made
        made += 1
        if made == 2:
            raise torch.OutOfMemoryError
        init(self, kept)

    while_computing = bench.handle()
    bench.kept._CachedBlock.__init__ = full
    midway, midway_passes = bench.counted(while_computing, picture)
    midway_told = list(bench.told)
    bench.kept._CachedBlock.__init__ = init
    return {
        "memory_equal": _same(expected, short, midway),
        "memory_passes": [short_passes, midway_passes],
        "memory_told": [short_told, midway_told],
        "memory_held": [before._cached.held_bytes, while_computing._cached.held_bytes],
        "memory_after": bench.counted(while_computing, picture)[1],
    }


def _free(bench: Bench) -> Answer:
    """What POST /free does with no prompt running, between runs and while a plan is alive."""
    import comfy.model_management as mm

    handle, picture = bench.handle(), bench.reference(1)
    expected = bench.run(handle, picture)
    held = handle._cached.held_bytes
    mm.unload_all_models()
    freed = handle._cached.held_bytes
    again, passes = bench.counted(handle, picture)
    original, calls = _module("flux_core.transformer.plan").Plan.velocity, 0

    def dropped(self: Any, x: Any, step: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            mm.unload_all_models()
        return original(self, x, step)

    _module("flux_core.transformer.plan").Plan.velocity = dropped
    midway = bench.run(handle, picture)
    _module("flux_core.transformer.plan").Plan.velocity = original
    return {
        "free_bytes": [held, freed],
        "free_passes": passes,
        "free_equal": _same(expected, again, midway),
    }


def _cancel(bench: Bench) -> Answer:
    """A cancel while references are computed, and one in the middle of the steps."""
    handle, picture = bench.handle(), bench.reference(1)
    expected = bench.run(bench.handle(), picture)
    held = [_cancelled(bench, handle, picture, cls) for cls in ("_CachedBlock", "_CachedKeyValues")]
    result, passes = bench.counted(handle, picture)
    return {
        "cancel_held": held,
        "cancel_equal": _same(expected, result),
        "cancel_passes": passes,
        "cancel_keep": handle.network.reference_cache.__name__,
    }


def _cancelled(bench: Bench, handle: Any, picture: Any, where: str) -> int:
    """Press cancel where a class of kept.py begins its work; the bytes then kept."""
    import comfy.model_management as mm

    cls = getattr(bench.kept, where)
    name = "__init__" if where == "_CachedBlock" else "__iter__"
    original: Callable[..., Any] = getattr(cls, name)

    def cancelling(*arguments: Any) -> Any:
        mm.interrupt_current_processing(True)
        mm.throw_exception_if_processing_interrupted()
        return original(*arguments)

    setattr(cls, name, cancelling)
    try:
        bench.run(handle, picture)
    except mm.InterruptProcessingException:
        return handle._cached.held_bytes
    finally:
        setattr(cls, name, original)
    raise AssertionError("the run was not cancelled")


def _cfg(bench: Bench) -> Answer:
    """Both passes of true CFG share what is kept; so does a negative with other references."""
    guidance = _module("flux_core.sampling.guidance")
    picture, other = bench.reference(1), bench.reference(2)
    passes, results = list[int](), list[Any]()
    for way, negative in (("batched", picture), ("in turn", picture), ("in turn", other)):
        cfg = guidance.TrueCFG(
            negative=bench.conditioning("blue", (negative,)), scale=2.0, passes=way
        )
        for mode in ("kept", "every step"):
            result, count = bench.counted(bench.handle(), picture, cfg=cfg, mode=mode)
            results.append(result)
            passes.append(count)
    equal = [_same(*results[i : i + 2]) for i in (0, 2, 4)]
    return {"cfg_passes": passes, "cfg_equal": equal}


def _life(bench: Bench) -> Answer:
    """What is kept dies with its model, and nothing else keeps it alive."""
    import comfy.model_management as mm

    handle, picture = bench.handle(), bench.reference(1)
    bench.run(handle, picture)
    (patcher,) = handle._cached._held.values()
    alive = [weakref.ref(one) for one in (handle, handle.network, patcher, patcher.model)]
    alive.append(weakref.ref(patcher.model.blocks[0].value))
    listed = any(one.model is patcher for one in mm.current_loaded_models)
    del handle, patcher
    return {"life_listed": listed, "life_freed": [one() is None for one in alive]}


def _preview(bench: Bench) -> Answer:
    """Previews of FLUX.2's latents, in ComfyUI's own colours and in given ones."""
    import comfy.latent_formats
    import latent_preview
    import torch
    from comfy.cli_args import LatentPreviewMethod, args

    args.preview_method = LatentPreviewMethod.Latent2RGB
    own, rows = bench.family.latent, tuple((0.01 * i, 0.02, -0.03) for i in range(33))
    latent = torch.randn(1, 128, 3, 6, generator=torch.Generator().manual_seed(1))
    pictures = list[Any]()
    for spec in (own, replace(own, preview_rgb=rows)):
        previewer = latent_preview.get_previewer(
            torch.device("cpu"), bench.host.latent_format(spec)
        )
        pictures.append(previewer.decode_latent_to_preview(latent))
    theirs = latent_preview.get_previewer(torch.device("cpu"), comfy.latent_formats.Flux2())
    expected = theirs.decode_latent_to_preview(latent)
    return {
        "preview_sizes": [one.size for one in pictures],
        "preview_equal": [one.tobytes() == expected.tobytes() for one in pictures],
    }


if __name__ == "__main__":
    probe.run(main)
