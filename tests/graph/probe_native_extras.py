"""Probe: ControlNet and step caches of ComfyUI's own under our references, placed by hand.

Where ComfyUI has a name for the places, its own placement without Apply To Model is the reference;
the route over Apply To Model is told another name by the conditioning, so that only our places can
give the same picture.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import probe
from probe_native import GRID, Bench

Answer = dict[str, Any]
STEPS = 6
FULL_TEXT = 512  # tokens, to which ComfyUI fills up a shorter text of FLUX.2
NAMES = {"offset": "index", "index": "offset"}  # the other of the two
CACHES = ("EasyCache", "LazyCache")
NEVER, OFTEN = 0.0, 3.0  # thresholds of reuse


def main(scratch: Path) -> Answer:
    import torch

    bench = Extras(scratch)
    plain = bench.plain()
    answer: Answer = {"control": bench.control(), "caches": bench.caches()}
    answer["ksampler"] = bench.in_ksampler()
    answer["same_as_before"] = torch.equal(plain, bench.plain())
    return answer


class Extras(Bench):
    """The same MODELs, with what people hang on them and on their conditioning."""

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        from comfy_extras import nodes_easycache

        self.cache_nodes = nodes_easycache
        self.control_net = make_control_net(scratch)

    def run_native(
        self, generation: str, native: Any, *, places: Any = None, cache: Any = None
    ) -> Any:
        """Sample with BasicGuider; our places and a cache on the MODEL where given."""
        model = self.natives[generation]
        if places is not None:
            model = self.run("ApplyToModel", model=model, conditioning=places)
        if cache is not None:
            name, threshold = cache
            node = getattr(self.cache_nodes, f"{name}Node")
            model = node.execute(model, threshold, 0.0, 1.0, False).result[0]
        sigmas = self.custom.BasicScheduler.execute(model, "simple", STEPS, 1.0).result[0]
        return self.sampled(model, native, sigmas, generation)

    def controlled(self, native: Any, strength: float) -> Any:
        """A CONDITIONING with the ControlNet on it, as Apply ControlNet puts it there."""
        import torch

        hint = torch.rand(1, 3, 16 * GRID[0], 16 * GRID[1], generator=torch.Generator())
        net = self.control_net.copy().set_cond_hint(hint, strength, (0.0, 1.0))
        more = {"control": net, "control_apply_to_uncond": False}
        return [[text, {**settings, **more}] for text, settings in native]

    def to_native(self, conditioning: Any, method: str = "") -> Any:
        native, *_ = self.run("ToConditioning", conditioning=conditioning)
        named = {"reference_latents_method": method} if method else {}
        return [[text, {**settings, **named}] for text, settings in native]

    def control(self) -> Answer:
        """FLUX.1, which ComfyUI has ControlNets for."""
        answer: Answer = {"off": {}, "named": {}, "changes": {}}
        for count in range(4):
            one = self.conditioning("FLUX.1", count, "as wired")
            native = self.to_native(one)
            without = self.run_native("FLUX.1", native, places=one)
            off = self.run_native("FLUX.1", self.controlled(native, 0.0), places=one)
            on = self.run_native("FLUX.1", self.controlled(native, 0.7), places=one)
            answer["off"][count] = apart(off, without)
            answer["changes"][count] = apart(on, without)
            for name, other in NAMES.items() if count else ():
                placed = self.conditioning("FLUX.1", count, name)
                hooked = self.controlled(self.to_native(placed, other), 0.7)
                theirs = self.controlled(self.to_native(placed, name), 0.7)
                ours = self.run_native("FLUX.1", hooked, places=placed)
                answer["named"][f"{count} {name}"] = apart(ours, self.run_native("FLUX.1", theirs))
        unplaced = self.run_native("FLUX.1", self.controlled(native, 0.7))
        answer["unplaced"] = apart(unplaced, on)
        return answer

    def caches(self) -> Answer:
        answer: Answer = {"never": {}, "often": {}, "changes": {}}
        for generation in self.natives:
            for count in range(4):
                one = self.conditioning(generation, count, "as wired")
                native = self.to_native(one)
                without = self.run_native(generation, native, places=one)
                for name in CACHES:
                    key = f"{generation} {count} {name}"
                    never, often = (
                        self.run_native(generation, native, places=one, cache=(name, threshold))
                        for threshold in (NEVER, OFTEN)
                    )
                    answer["never"][key] = apart(never, without)
                    answer["changes"][key] = apart(often, without)
                    if count:
                        answer["often"][key] = self.cached_places(generation, count, name)
        return answer

    def with_full_text(self, generation: str, conditioning: Any) -> Any:
        """The same with a text that ComfyUI leaves as long as it is."""
        import torch

        if generation == "FLUX.1":
            return conditioning
        width = conditioning.text.txt.shape[-1]
        txt = torch.randn(1, FULL_TEXT, width, generator=torch.Generator().manual_seed(0))
        return replace(conditioning, text=replace(conditioning.text, txt=txt))

    def cached_places(self, generation: str, count: int, cache: str) -> float:
        """How far our places are from the same under ComfyUI's name, with steps skipped."""
        name = {"FLUX.1": "offset", "FLUX.2": "index"}[generation]
        placed = self.with_full_text(generation, self.conditioning(generation, count, name))
        extra = {"cache": (cache, OFTEN)}
        hooked = self.to_native(placed, NAMES[name])
        ours = self.run_native(generation, hooked, places=placed, **extra)
        theirs = self.to_native(placed, name)
        return apart(ours, self.run_native(generation, theirs, **extra))

    def in_ksampler(self) -> float:
        """KSampler with a negative prompt and the ControlNet, against our names for the places."""
        sides = [self.conditioning("FLUX.1", 2, "offset", seed=seed) for seed in (0, 5)]
        pictures: list[Any] = []
        for method, is_placed in (("index", True), ("offset", False)):
            model = self.natives["FLUX.1"]
            if is_placed:
                model = self.run("ApplyToModel", model=model, conditioning=sides[0])
            wired = [self.controlled(self.to_native(one, method), 0.7) for one in sides]
            latent = self.empty("FLUX.1")
            sampled = self.native_nodes.KSampler().sample(
                model, 11, STEPS, 3.0, "euler", "simple", *wired, latent
            )
            pictures.append(sampled[0]["samples"])
        return apart(*pictures)


def apart(one: Any, other: Any) -> float:
    """The largest difference, in the largest number."""
    return float((one - other).abs().max() / other.abs().max())


def make_control_net(folder: Path) -> Any:
    """A random FLUX.1 ControlNet of the nano model's widths, from a file by ComfyUI's loader."""
    import comfy.controlnet

    from glassbox.flux_core.families import NANO_KONTEXT
    from glassbox.tests.graph import tiny
    from glassbox.tests.graph.native_files import control_net_state

    state = control_net_state(NANO_KONTEXT.transformer)
    return comfy.controlnet.load_controlnet(str(tiny.save(state, folder / "control.safetensors")))


if __name__ == "__main__":
    probe.run(main)
