"""Probe: our samplers on ComfyUI's own MODEL against our own network with the same weights.

Then what stays on the MODEL and keeps working, what is refused, and a plain native run before and
after.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import probe
from probe_native import Bench, _message

Answer = dict[str, Any]


def main(scratch: Path) -> Answer:
    import torch

    bench = BenchIn(scratch)
    plain = bench.plain()
    answer: Answer = {"apart": bench.all_settings(), "others": bench.other_nodes()}
    answer |= bench.kept_working() | bench.float8() | {"refused": bench.refusals()}
    answer["same_as_before"] = torch.equal(plain, bench.plain())
    native = bench.natives["FLUX.1"]
    answer["left_behind"] = [
        *native.model_options["transformer_options"].get("patches", {}),
        *native.model_options["transformer_options"].get("wrappers", {}),
        *([] if native.model.current_patcher is None else ["current_patcher"]),
    ]
    return answer


class BenchIn(Bench):
    """The same, with the MODEL on our own sockets."""

    def all_settings(self) -> dict[str, float]:
        apart: dict[str, float] = {}
        for generation in self.ours:
            for count in range(4):
                for placement in ("index", "as wired") if count else ("offset",):
                    positive = self.conditioning(generation, count, placement)
                    name = f"{generation} {count} {placement}"
                    apart[name] = self.apart(generation, positive)
            negative = self.conditioning(generation, 2, "as wired", seed=5)
            positive = self.conditioning(generation, 2, "as wired")
            apart[f"{generation} cfg"] = self.apart(generation, positive, negative)
            apart[f"{generation} heun"] = self.apart(generation, positive, solver="heun")
            apart[f"{generation} target moved"] = self.apart(generation, positive, moved=True)
        return apart

    def wires(self, generation: str, *, moved: bool = False) -> dict[str, Any]:
        noise, sigmas = self.inputs(generation)
        if moved:
            noise = self.run("PositionIds", tokens=noise, index=0.5, row=2.0, column=-1.0)
        return {"noise": noise, "sigmas": sigmas}

    def apart(
        self,
        generation: str,
        positive: Any,
        negative: Any = None,
        *,
        solver: str = "euler",
        moved: bool = False,
    ) -> float:
        models = self.ours[generation], self.natives[generation]
        wires = self.wires(generation, moved=moved)
        made = [self.made(model, positive, negative, solver=solver, **wires) for model in models]
        ours, native = (one.values for one in made)
        return float((ours - native).abs().max() / ours.abs().max())

    def made(self, model: Any, positive: Any, negative: Any = None, **wires: Any) -> Any:
        if negative is None:
            return self.run("SampleGuided", model=model, conditioning=positive, **wires)
        window = {"cfg": 3.0, "start": 0.0, "end": 0.7, "passes": "batched"}
        both = {"positive": positive, "negative": negative}
        return self.run("SampleTrueCFG", model=model, **both, **window, **wires)

    def guided_by(self, model: Any, conditioning: Any, generation: str = "FLUX.1") -> Any:
        return self.made(model, conditioning, solver="euler", **self.wires(generation))

    def other_nodes(self) -> dict[str, bool]:
        """Noise, Schedule and Inspect Tokens on both models."""
        import torch

        same: dict[str, bool] = {}
        for generation in self.ours:
            ours, native = self.ours[generation], self.natives[generation]
            sides = {"width": 96, "height": 64, "seed": 3, "batch_size": 1}
            noises = [self.run("Noise", model=one, **sides) for one in (ours, native)]
            same[f"{generation} noise"] = torch.equal(noises[0].values, noises[1].values)
            curve = {"noise": noises[0], "steps": 5, "kind": "flux", "sigmas": ""}
            levels = [self.run("Schedule", model=one, **curve) for one in (ours, native)]
            same[f"{generation} schedule"] = torch.equal(*levels)
            shown = {"conditioning": self.conditioning(generation, 2, "index"), "noise": noises[0]}
            reports = [self.run("InspectTokens", model=one, **shown) for one in (ours, native)]
            same[f"{generation} report"] = reports[0] == reports[1]
        return same

    def kept_working(self) -> Answer:
        """Patches and wrappers do what they do under ComfyUI's own sampler."""
        import torch

        conditioning = self.conditioning("FLUX.1", 2, "as wired")
        native = self.natives["FLUX.1"]
        patched, calls = native.clone(), dict.fromkeys(("attention", "diffusion", "apply"), 0)
        weight = native.model.diffusion_model.single_blocks[0].linear1.weight
        generator = torch.Generator().manual_seed(4)
        added = 0.1 * torch.randn(weight.shape, generator=generator)
        key = "diffusion_model.single_blocks.0.linear1.weight"
        patched.add_patches({key: ("diff", (added,))}, 1.0)

        def attention(q: Any, k: Any, v: Any, pe: Any = None, **_: Any) -> dict[str, Any]:
            calls["attention"] += 1
            return {"q": q, "k": k, "v": 0.9 * v, "pe": pe}

        def diffusion(executor: Any, *args: Any, **kwargs: Any) -> Any:
            calls["diffusion"] += 1
            return 1.1 * executor(*args, **kwargs)

        def applied(executor: Any, *args: Any, **kwargs: Any) -> Any:
            calls["apply"] += 1
            return executor(*args, **kwargs)

        patched.set_model_attn1_patch(lambda q, k, v, **more: attention(q, k, v, **_rest(more)))
        patched.add_wrapper_with_key("diffusion_model", "probe", diffusion)
        patched.add_wrapper_with_key("apply_model", "probe", applied)
        ours = self.guided_by(patched, conditioning)
        counted = dict(calls)
        to_native, _ = self.run("ToConditioning", conditioning=conditioning)
        placed = self.run("ApplyToModel", model=patched, conditioning=conditioning)
        _, sigmas = self.inputs("FLUX.1")
        theirs = self.sampled(placed, to_native, sigmas, "FLUX.1")
        twice = {name: calls[name] - counted[name] for name in calls}
        plain = self.guided_by(native, conditioning)
        return {
            "patched_apart": self.distance(ours, theirs),
            "patched_from_plain": float((ours.values - plain.values).abs().max()),
            "calls": counted,
            "calls_under_comfyui": twice,
            "placed_before": float(
                (self.guided_by(placed, conditioning).values - ours.values).abs().max()
            ),
        }

    def float8(self) -> Answer:
        """Weights that ComfyUI's loader stores as float8."""
        import torch

        native = self.native_nodes.UNETLoader().load_unet(
            "glassbox_nano_kontext.safetensors", "fp8_e4m3fn"
        )[0]
        weights = native.model.diffusion_model.single_blocks[0].linear1.weight
        conditioning = self.conditioning("FLUX.1", 2, "as wired")
        ours = self.guided_by(native, conditioning)
        to_native, _ = self.run("ToConditioning", conditioning=conditioning)
        placed = self.run("ApplyToModel", model=native, conditioning=conditioning)
        _, sigmas = self.inputs("FLUX.1")
        theirs = self.sampled(placed, to_native, sigmas, "FLUX.1")
        return {
            "is_float8": weights.dtype == torch.float8_e4m3fn,
            "float8_apart": self.distance(ours, theirs),
        }

    def refusals(self) -> dict[str, str]:
        """What each wrong MODEL or wire says."""
        one = self.conditioning("FLUX.1", 1, "index")
        other = self.conditioning("FLUX.2", 1, "index")
        native = self.natives["FLUX.1"]
        models = {
            name: model for name, model in self.changed(native).items() if name != "lengthened"
        }
        models["cache"] = native.clone()
        models["cache"].add_wrapper_with_key("outer_sample", "easycache", lambda: None)
        models["cfg"] = native.clone()
        models["cfg"].set_model_sampler_post_cfg_function(lambda args: args["denoised"])
        models["broken"] = native.clone()
        models["broken"].set_model_post_input_patch(_break)
        uses = {
            name: (lambda model=model: self.guided_by(model, one)) for name, model in models.items()
        }
        kv = self.natives["FLUX.2"].clone()
        kv.cached_patcher_init = (None, ("models/flux-2-klein-9b-kv.safetensors",))
        uses["see only themselves"] = lambda: self.guided_by(kv, other, "FLUX.2")
        uses["text"] = lambda: self.guided_by(native, other)
        uses["noise"] = lambda: self.guided_by(native, one, "FLUX.2")
        uses["kept"] = lambda: self.run(
            "SampleGuided",
            model=native,
            conditioning=one,
            solver="euler",
            reference_kv="kept",
            **self.wires("FLUX.1"),
        )
        return {name: _message(use) for name, use in uses.items()}


def _rest(more: dict[str, Any]) -> dict[str, Any]:
    return {"pe": more.get("pe")}


def _break(inputs: dict[str, Any]) -> dict[str, Any]:
    raise ValueError("a patch of another pack failed")


if __name__ == "__main__":
    probe.run(main)
