"""Probe: ComfyUI's own samplers with our references against our sampler, in one process.

Both generations, references of several sizes and placements, guided and with a negative prompt;
then what is refused, and a plain native run before and after.
"""

import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import probe

Answer = dict[str, Any]
SIZES = ((4, 4), (5, 7), (6, 4))  # of the references, in tokens
GRID = (4, 6)  # of the picture
STEPS = 3


def main(scratch: Path) -> Answer:
    import torch

    bench = Bench(scratch)
    plain = bench.plain()
    answer: Answer = {"apart": bench.all_routes()}
    answer["twice"] = bench.twice()
    answer["without_places"] = {one: bench.without_places(one) for one in bench.ours}
    answer["refused"] = bench.refused()
    answer["same_as_before"] = torch.equal(plain, bench.plain())
    answer["original_is_clean"] = [
        "post_input" not in one.model_options["transformer_options"].get("patches", {})
        for one in bench.natives.values()
    ]
    return answer


class Bench:
    """The same weights in our network and in ComfyUI's, and nodes of both sides."""

    def __init__(self, scratch: Path) -> None:
        self.nodes = _nodes(scratch)
        from comfy_extras import nodes_custom_sampler

        import nodes

        self.native_nodes, self.custom = nodes, nodes_custom_sampler
        flux2 = "flux-2-klein-base-4b.safetensors"
        kontext = "glassbox_nano_kontext.safetensors"
        loader = nodes.UNETLoader()
        self.natives = {
            "FLUX.1": loader.load_unet(kontext, "default")[0],
            "FLUX.2": loader.load_unet(flux2, "default")[0],
        }
        self.ours = {
            "FLUX.1": self.run("LoadNano", name="kontext")[0],
            "FLUX.2": self.run("LoadModel", file=flux2, family="auto", dtype="auto")[0],
        }

    def run(self, name: str, /, **inputs: Any) -> Any:
        result = self.nodes[f"Glassbox{name}"].execute(**inputs).result
        return result[0] if len(result) == 1 else result

    def conditioning(self, generation: str, count: int, placement: str, seed: int = 0) -> Any:
        import torch

        values = sys.modules[f"{probe.PACK}.flux_core.values"]
        ids = sys.modules[f"{probe.PACK}.flux_core.tokens.ids"]
        network = self.ours[generation].network
        spec, latent = network.spec, network.family.latent
        generator = torch.Generator().manual_seed(seed)
        length = {"FLUX.1": 20, "FLUX.2": 36}[generation]
        pooled = (
            torch.randn(1, spec.pooled_width, generator=generator) if spec.pooled_width else None
        )
        text = values.TextFeatures(
            txt=torch.randn(1, length, spec.context_width, generator=generator), pooled=pooled
        )
        generator.manual_seed(99)  # the same references whatever the text
        references = []
        for number, grid in enumerate(SIZES[:count], 1):
            cells = torch.randn(1, grid[0] * grid[1], latent.token_width, generator=generator)
            tokens = values.Tokens(
                values=cells, ids=ids.image_ids(grid, latent), grid=grid, latent=latent
            )
            references.append(ids.place(tokens, index=3.0 * number, row=1.5, column=-number))
        wired = {f"reference_{number}": one for number, one in enumerate(references, 1)}
        return self.run(
            "ReferenceConditioner",
            text=text,
            guidance=1.5,
            placement=placement,
            references=wired,
        )

    def all_routes(self) -> dict[str, float]:
        apart: dict[str, float] = {}
        for generation in self.ours:
            for count in range(4):
                for placement in ("offset", "index", "as wired") if count else ("offset",):
                    positive = self.conditioning(generation, count, placement)
                    name = f"{generation} {count} {placement}"
                    apart[f"{name} guider"] = self.guided(generation, positive)
                    if count == 2:
                        negative = self.conditioning(generation, count, placement, seed=5)
                        apart[f"{name} ksampler cfg"] = self.with_cfg(
                            generation, positive, negative
                        )
        return apart

    def inputs(self, generation: str) -> tuple[Any, Any]:
        rows, columns = GRID
        sides = {"width": 16 * columns, "height": 16 * rows, "seed": 11, "batch_size": 2}
        model = self.ours[generation]
        noise = self.run("Noise", model=model, **sides)
        curve = {"steps": STEPS, "kind": "flux", "sigmas": ""}
        return noise, self.run("Schedule", model=model, noise=noise, **curve)

    def empty(self, generation: str) -> Any:
        import torch

        latent = self.ours[generation].family.latent
        rows, columns = (side * latent.patch for side in GRID)
        return {"samples": torch.zeros(2, latent.channels, rows, columns)}

    def guided(self, generation: str, conditioning: Any) -> float:
        """SamplerCustomAdvanced with BasicGuider."""
        noise, sigmas = self.inputs(generation)
        ours = self.run(
            "SampleGuided",
            model=self.ours[generation],
            conditioning=conditioning,
            noise=noise,
            sigmas=sigmas,
            solver="euler",
        )
        native, _ = self.run("ToConditioning", conditioning=conditioning)
        model = self.run("ApplyToModel", model=self.natives[generation], conditioning=conditioning)
        return self.distance(ours, self.sampled(model, native, sigmas, generation))

    def sampled(self, model: Any, native: Any, sigmas: Any, generation: str) -> Any:
        guider = self.custom.BasicGuider.execute(model, native).result[0]
        sampler = self.custom.KSamplerSelect.execute("euler").result[0]
        noise = self.custom.RandomNoise.execute(11).result[0]
        run = self.custom.SamplerCustomAdvanced.execute
        return run(noise, guider, sampler, sigmas, self.empty(generation)).result[0]["samples"]

    def with_cfg(self, generation: str, positive: Any, negative: Any) -> float:
        """KSampler with its own scheduler, whose sigmas our sampler takes by hand."""
        noise, _ = self.inputs(generation)
        model = self.run("ApplyToModel", model=self.natives[generation], conditioning=positive)
        sides = [self.run("ToConditioning", conditioning=one)[0] for one in (positive, negative)]
        sampled = self.native_nodes.KSampler().sample(
            model, 11, STEPS, 3.0, "euler", "simple", *sides, self.empty(generation)
        )[0]["samples"]
        sigmas = self.custom.BasicScheduler.execute(model, "simple", STEPS, 1.0).result[0]
        window = {"cfg": 3.0, "start": 0.0, "end": 1.0, "passes": "batched", "solver": "euler"}
        ours = self.run(
            "SampleTrueCFG",
            model=self.ours[generation],
            positive=positive,
            negative=negative,
            noise=noise,
            sigmas=sigmas,
            **window,
        )
        return self.distance(ours, sampled)

    def distance(self, tokens: Any, samples: Any) -> float:
        latent = self.run("UnpackLatent", tokens=tokens)["samples"]
        return float((latent - samples).abs().max() / samples.abs().max())

    def without_places(self, generation: str) -> float:
        """How far a run is off whose references lie where ComfyUI puts them."""
        conditioning = self.conditioning(generation, 2, "as wired")
        noise, sigmas = self.inputs(generation)
        wires = {"noise": noise, "sigmas": sigmas, "solver": "euler"}
        ours = self.run(
            "SampleGuided", model=self.ours[generation], conditioning=conditioning, **wires
        )
        native, report = self.run("ToConditioning", conditioning=conditioning)
        assert "Apply To Model (FLUX)" in report
        return self.distance(
            ours, self.sampled(self.natives[generation], native, sigmas, generation)
        )

    def twice(self) -> float:
        """Applied for one conditioning, then for another: the last one holds."""
        first = self.conditioning("FLUX.1", 2, "as wired")
        second = self.conditioning("FLUX.1", 1, "as wired")
        noise, sigmas = self.inputs("FLUX.1")
        model = self.run("ApplyToModel", model=self.natives["FLUX.1"], conditioning=first)
        model = self.run("ApplyToModel", model=model, conditioning=second)
        native, _ = self.run("ToConditioning", conditioning=second)
        wires = {"noise": noise, "sigmas": sigmas, "solver": "euler"}
        ours = self.run("SampleGuided", model=self.ours["FLUX.1"], conditioning=second, **wires)
        return self.distance(ours, self.sampled(model, native, sigmas, "FLUX.1"))

    def plain(self) -> Any:
        """A native run without any node of the pack, one reference."""
        conditioning = self.conditioning("FLUX.1", 1, "offset")
        settings = {"pooled_output": conditioning.text.pooled, "guidance": 1.5}
        samples = self.run("UnpackLatent", tokens=conditioning.references[0].tokens)["samples"]
        settings["reference_latents"] = [samples]
        _, sigmas = self.inputs("FLUX.1")
        native = [[conditioning.text.txt, settings]]
        return self.sampled(self.natives["FLUX.1"], native, sigmas, "FLUX.1")

    def refused(self) -> dict[str, str]:
        """What each wrong use says."""
        one, two = (self.conditioning("FLUX.1", count, "index") for count in (1, 2))
        other = self.conditioning("FLUX.2", 1, "index")
        native = self.natives["FLUX.1"]
        _, sigmas = self.inputs("FLUX.1")
        settled = self.run("ApplyToModel", model=native, conditioning=two)
        uses: dict[str, Any] = {
            "count": lambda: self.sampled(
                settled, self.run("ToConditioning", conditioning=one)[0], sigmas, "FLUX.1"
            ),
            "none": lambda: self.sampled(settled, [[one.text.txt, {}]], sigmas, "FLUX.1"),
            "generation": lambda: self.run("ApplyToModel", model=native, conditioning=other),
        }
        for name, changed in self.changed(native).items():
            uses[name] = lambda model=changed: self.sampled(
                self.run("ApplyToModel", model=model, conditioning=one),
                self.run("ToConditioning", conditioning=one)[0],
                sigmas,
                "FLUX.1",
            )
        return {name: _message(use) for name, use in uses.items()}

    def changed(self, native: Any) -> dict[str, Any]:
        """MODELs that other packs and nodes have changed."""
        forward = native.clone()
        forward.add_object_patch("diffusion_model.forward_orig", lambda *_, **__: None)
        scaled = native.clone()
        scaled.model_options["transformer_options"]["rope_options"] = {"scale_x": 2.0}

        def longer(inputs: dict[str, Any]) -> dict[str, Any]:
            import torch

            added = inputs["img_ids"][:, -2:]
            img = torch.cat((inputs["img"], inputs["img"][:, -2:]), dim=1)
            return {**inputs, "img": img, "img_ids": torch.cat((inputs["img_ids"], added), dim=1)}

        lengthened = native.clone()
        lengthened.set_model_post_input_patch(longer)
        kind = type("Flux", (types.SimpleNamespace,), {"__module__": "comfy.ldm.flux.model"})
        inside = kind(in_channels=384, out_channels=64)
        fill = types.SimpleNamespace(
            model=type("Flux", (), {"diffusion_model": inside})(), object_patches={}
        )
        sdxl = types.SimpleNamespace(model=type("SDXL", (), {"diffusion_model": object()})())
        return {
            "forward": forward,
            "scaled": scaled,
            "lengthened": lengthened,
            "fill": fill,
            "sdxl": sdxl,
        }


def _message(use: Any) -> str:
    try:
        use()
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _nodes(scratch: Path) -> dict[str, Any]:
    """The pack's nodes by id, with a tiny FLUX.2 in ComfyUI's folders."""
    import folder_paths

    probe.load_glassbox()
    from glassbox.flux_core.families import FLUX2_KLEIN_BASE_4B
    from glassbox.tests.graph import tiny, tiny_flux2

    state = tiny_flux2.transformer_state(
        FLUX2_KLEIN_BASE_4B, replace(tiny_flux2.KLEIN, context_width=7680), seed=2
    )
    tiny.save(state, scratch / tiny_flux2.BASE_FILE)
    folder_paths.add_model_folder_path("diffusion_models", str(scratch))
    return probe.load_nodes()


if __name__ == "__main__":
    probe.run(main)
