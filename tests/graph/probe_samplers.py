"""Probe: everyone's samplers on our network, and ours on everyone's.

The Guider under SamplerCustomAdvanced and native SAMPLERs in our samplers against our own; our
solvers, image to image and masks against ComfyUI's on the same native MODEL; and what is refused.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import probe
from probe_native import GRID, STEPS, Bench

Answer = dict[str, Any]
WINDOW = {"start": 0.0, "end": 1.0}
SOLVERS = {"dpm++ 2m": "dpmpp_2m", "res multistep": "res_multistep", "heun": "heun"}


def main(scratch: Path) -> Answer:
    bench = Samplers(scratch)
    answer: Answer = {"apart": {}}
    for generation in bench.ours:
        for check in (
            bench.guider_and_ours,
            bench.native_sampler_inside_ours,
            bench.shift,
            bench.solvers,
            bench.image_to_image,
            bench.mask,
            bench.cfg_plus_plus,
        ):
            answer["apart"] |= {
                f"{generation} {name}": one for name, one in check(generation).items()
            }
    answer |= bench.cached_references()
    answer["same_noise_twice"] = bench.same_noise_twice()
    answer["refused"] = bench.refused()
    return answer


class Samplers(Bench):
    """The bench of `probe_native`, with samplers in both directions."""

    def ours_with(self, generation: str, one: Any, **changes: Any) -> Any:
        """Sample Guided or True CFG; the latent."""
        noise, sigmas = self.inputs(generation)
        wires = {"model": self.ours[generation], "noise": noise, "sigmas": sigmas}
        wires |= {"solver": "euler", **changes}
        if "negative" in changes:
            tokens = self.run("SampleTrueCFG", positive=one, **wires)
        else:
            tokens = self.run("SampleGuided", conditioning=one, **wires)
        return self.run("UnpackLatent", tokens=tokens)["samples"]

    def advanced(self, generation: str, guider: Any, sampler: str = "euler", **changes: Any) -> Any:
        """SamplerCustomAdvanced; the latent."""
        _, sigmas = self.inputs(generation)
        chosen = self.custom.KSamplerSelect.execute(sampler).result[0]
        noise = self.custom.RandomNoise.execute(11).result[0]
        given = {
            "noise": noise,
            "guider": guider,
            "sampler": chosen,
            "sigmas": sigmas,
            "latent_image": self.empty(generation),
            **changes,
        }
        return self.custom.SamplerCustomAdvanced.execute(**given).result[0]["samples"]

    def native_guider(self, generation: str, one: Any, negative: Any = None, cfg: float = 1) -> Any:
        """ComfyUI's own guider on its MODEL, with our references."""
        model = self.run("ApplyToModel", model=self.natives[generation], conditioning=one)
        sides = [
            self.run("ToConditioning", conditioning=side)[0] for side in (one, negative or one)
        ]
        if negative is None:
            return self.custom.BasicGuider.execute(model, sides[0]).result[0]
        return self.custom.CFGGuider.execute(model, *sides, cfg).result[0]

    def guider_and_ours(self, generation: str) -> dict[str, float]:
        """Both families, with and without CFG, 0 to 2 references; on our network and on theirs."""
        apart: dict[str, float] = {}
        for count in range(3):
            one = self.conditioning(generation, count, "auto")
            expected = self.ours_with(generation, one)
            for name, model in (("ours", self.ours), ("MODEL", self.natives)):
                guider = self.run("Guider", model=model[generation], conditioning=one)
                made = self.advanced(generation, guider)
                apart[f"guider {name} {count}"] = _apart(made, expected)
        negative = self.conditioning(generation, 2, "auto", seed=5)
        for passes in ("batched", "in turn"):
            settings = {"negative": negative, "cfg": 3.0, "start": 0.0, "end": 0.7}
            settings["passes"] = passes
            expected = self.ours_with(generation, one, **settings)
            guider = self.run("Guider", model=self.ours[generation], conditioning=one, **settings)
            apart[f"guider cfg {passes}"] = _apart(self.advanced(generation, guider), expected)
        return apart

    def native_sampler_inside_ours(self, generation: str) -> dict[str, float]:
        one = self.conditioning(generation, 1, "auto")
        euler = self.custom.KSamplerSelect.execute("euler").result[0]
        moved = self.run("PositionIds", tokens=self.inputs(generation)[0], index=0, row=3, column=2)
        apart: dict[str, float] = {}
        for name, changes in (("", {}), (", moved noise", {"noise": moved})):
            expected = self.ours_with(generation, one, **changes)
            made = self.ours_with(generation, one, sampler=euler, **changes)
            apart[f"SAMPLER euler{name}"] = _apart(made, expected)
        return apart

    def shift(self, generation: str) -> dict[str, float]:
        """A sampler that turns percents of the way into noise levels, by the model's own shift."""
        one = self.conditioning(generation, 1, "auto")
        guider = self.run("Guider", model=self.ours[generation], conditioning=one)
        made = self.advanced(generation, guider, "sa_solver")
        native = self.native_guider(generation, one)
        return {"sa_solver": _apart(made, self.advanced(generation, native, "sa_solver"))}

    def solvers(self, generation: str) -> dict[str, float]:
        """Our solvers against ComfyUI's, on the same native MODEL and sigmas."""
        one = self.conditioning(generation, 1, "auto")
        return {
            ours: _apart(
                self.ours_with(generation, one, model=self.natives[generation], solver=ours),
                self.advanced(generation, self.native_guider(generation, one), theirs),
            )
            for ours, theirs in SOLVERS.items()
        }

    def image_to_image(self, generation: str) -> dict[str, float]:
        """`start_tokens` with sigmas of KSampler's denoise, against KSampler."""
        one = self.conditioning(generation, 1, "auto")
        native = self.natives[generation]
        model = self.run("ApplyToModel", model=native, conditioning=one)
        latent = self.image(generation)
        wired = self.run("ToConditioning", conditioning=one)[0]
        settings = (11, STEPS, 1.0, "euler", "simple", wired, wired)
        expected = self.native_nodes.KSampler().sample(model, *settings, latent, denoise=0.6)[0]
        sigmas = self.custom.BasicScheduler.execute(model, "simple", STEPS, 0.6).result[0]
        return {
            f"image to image, {name}": _apart(
                self.ours_with(generation, one, model=ours, sigmas=sigmas, start_tokens=latent),
                expected["samples"],
            )
            for name, ours in (("ours", self.ours[generation]), ("MODEL", native))
        }

    def mask(self, generation: str) -> dict[str, float]:
        """A noise mask and a picture beneath it, against ComfyUI's guider on its MODEL."""
        one = self.conditioning(generation, 1, "auto")
        latent = {**self.image(generation), "noise_mask": self.half(generation)}
        guider = self.run("Guider", model=self.ours[generation], conditioning=one)
        made = self.advanced(generation, guider, latent_image=latent)
        native = self.native_guider(generation, one)
        expected = self.advanced(generation, native, latent_image=latent)
        outside = latent["noise_mask"][0, 0, 0, 0] == 0
        kept = _apart(made[..., :1], latent["samples"][..., :1]) if outside else 1.0
        return {"mask": _apart(made, expected), "outside the mask": kept}

    def cfg_plus_plus(self, generation: str) -> dict[str, float]:
        """A sampler that asks for the negative pass of every step."""
        sides = [self.conditioning(generation, 1, "auto", seed=seed) for seed in (0, 5)]
        settings = {"conditioning": sides[0], "negative": sides[1], "cfg": 1.5}
        guider = self.run("Guider", model=self.ours[generation], **settings)
        made = self.advanced(generation, guider, "euler_cfg_pp")
        native = self.native_guider(generation, *sides, cfg=1.5)
        return {"euler_cfg_pp": _apart(made, self.advanced(generation, native, "euler_cfg_pp"))}

    def cached_references(self) -> Answer:
        """klein KV: the guider reuses keys and values that our sampler cached, and the reverse."""
        handle = self.ours["FLUX.2"]
        family = handle.family
        isolated = replace(
            family.references, isolated=True, sequence=("text", "reference", "target")
        )
        handle.family = handle.network.family = replace(family, references=isolated)
        references = sys.modules[f"{probe.PACK}.flux_core.transformer.references"]
        original, passes = references.ReferencePass.__iter__, [0]

        def counted(computed: Any) -> Any:
            passes[0] += 1
            return original(computed)

        references.ReferencePass.__iter__ = counted
        try:
            one = self.conditioning("FLUX.2", 2, "auto")
            expected = self.ours_with("FLUX.2", one)
            guider = self.run("Guider", model=handle, conditioning=one)
            made = self.advanced("FLUX.2", guider)
        finally:
            references.ReferencePass.__iter__ = original
            handle.family = handle.network.family = family
        return {"cached": _apart(made, expected), "cached_passes": passes[0]}

    def same_noise_twice(self) -> bool:
        """A sampler that adds noise of its own, in our sampler."""
        one = self.conditioning("FLUX.1", 1, "auto")
        ancestral = self.custom.KSamplerSelect.execute("euler_ancestral").result[0]
        made = [self.ours_with("FLUX.1", one, sampler=ancestral) for _ in range(2)]
        return bool((made[0] == made[1]).all())

    def image(self, generation: str) -> Any:
        import torch

        shape = self.empty(generation)["samples"].shape
        return {"samples": torch.randn(shape, generator=torch.Generator().manual_seed(3))}

    def half(self, generation: str) -> Any:
        """A mask in the image's pixels: the right half."""
        import torch

        rows, columns = GRID
        del generation
        mask = torch.zeros(1, 1, 16 * rows, 16 * columns)
        mask[..., 16 * columns // 2 :] = 1.0
        return mask

    def refused(self) -> dict[str, list[str]]:
        """What each wrong use says."""
        import comfy.nested_tensor
        import torch

        one, other = (self.conditioning(name, 1, "auto") for name in ("FLUX.1", "FLUX.2"))
        guider = self.run("Guider", model=self.ours["FLUX.1"], conditioning=one)
        small = {**self.image("FLUX.1"), "noise_mask": torch.ones(1, 1, 20, 20)}
        samples = self.image("FLUX.1")["samples"]
        nested = {"samples": comfy.nested_tensor.NestedTensor([samples, samples])}
        rising = torch.tensor([0.2, 0.5, 0.0])
        large = {"samples": torch.ones(1, 16, 20, 20)}
        euler = self.custom.KSamplerSelect.execute("euler").result[0]
        published = self.run("PackLatent", latent=self.image("FLUX.1"), latent_format="FLUX.1")

        def advanced(**changes: Any) -> Callable[[], Any]:
            return lambda: self.advanced("FLUX.1", guider, **changes)

        def ours(**changes: Any) -> Callable[[], Any]:
            return lambda: self.ours_with("FLUX.1", one, **changes)

        def schedule(denoise: float, kind: str = "linear", by_hand: str = "") -> Callable[[], Any]:
            settings = {"steps": 4, "kind": kind, "sigmas": by_hand, "denoise": denoise}
            noise, _ = self.inputs("FLUX.1")
            return lambda: self.run("Schedule", model=self.ours["FLUX.1"], noise=noise, **settings)

        uses = {
            "mask of another size": advanced(latent_image=small),
            "nested latent": advanced(latent_image=nested),
            "latent of FLUX.2": advanced(latent_image=self.image("FLUX.2")),
            "rising sigmas": advanced(sigmas=rising),
            "no negative pass": lambda: self.advanced("FLUX.1", guider, "euler_cfg_pp"),
            "unknown option": lambda: self._with_option(guider),
            "no sampler": ours(sampler="euler"),
            "rising sigmas, ours": ours(sigmas=rising),
            "start of another size": ours(start_tokens=large),
            "start of another size, SAMPLER": ours(start_tokens=large, sampler=euler),
            "noise of FLUX.1, SAMPLER": ours(noise=published, sampler=euler),
            "no sigmas, SAMPLER": ours(sigmas=torch.zeros(0), sampler=euler),
            "noise of another size": advanced(noise=_Noise(torch.ones(2, 16, 4, 4))),
            "SAMPLER of another shape": lambda: self._with(guider, lambda *_, **__: samples[:1]),
            "start of FLUX.2": ours(start_tokens=self.empty("FLUX.2")),
            "conditioning of FLUX.2": lambda: self.run(
                "SampleGuided",
                model=self.ours["FLUX.1"],
                conditioning=other,
                noise=self.inputs("FLUX.1")[0],
                sigmas=self.inputs("FLUX.1")[1],
                solver="euler",
            ),
            "denoise 0": schedule(0.0),
            "denoise by hand": schedule(0.5, "by hand", "1, 0.5, 0"),
        }
        return {name: _refusal(use) for name, use in uses.items()}

    def _with_option(self, guider: Any) -> Any:
        """A sampler of another pack that sets what only ComfyUI's guiders follow."""

        def sample(model: Any, x: Any, sigmas: Any, extra_args: Any, **_: Any) -> Any:
            options = {**extra_args["model_options"], "sampler_cfg_function": print}
            given = {**extra_args, "model_options": options}
            return model(x, sigmas[0].expand(x.shape[0]), **given)

        return self._with(guider, sample)

    def _with(self, guider: Any, sample: Any) -> Any:
        import comfy.samplers

        noise = self.custom.RandomNoise.execute(11).result[0]
        sampler, (_, sigmas) = comfy.samplers.KSAMPLER(sample), self.inputs("FLUX.1")
        run = self.custom.SamplerCustomAdvanced.execute
        return run(noise, guider, sampler, sigmas, self.empty("FLUX.1"))


class _Noise:
    """A NOISE node's output that is always the same tensor."""

    seed = 0

    def __init__(self, noise: Any) -> None:
        self.noise = noise

    def generate_noise(self, latent: Any) -> Any:
        del latent
        return self.noise


def _apart(made: Any, expected: Any) -> float:
    assert made.shape == expected.shape
    return float((made - expected).abs().max() / expected.abs().max())


def _refusal(use: Callable[[], Any]) -> list[str]:
    try:
        use()
    except ValueError as error:
        return [type(error).__name__, str(error)]
    return ["", "nothing was refused"]


if __name__ == "__main__":
    probe.run(main)
