"""Probe: Apply LoRA on ComfyUI's own MODEL, loaded by ComfyUI and read weight by weight.

Every format against W + strength * (alpha / rank) * B A, and against ComfyUI's own LoRA loader;
then pictures in turn, quantised MODELs, and what is refused before a weight is read.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import probe
from probe_native import _message
from probe_native_in import BenchIn

Answer = dict[str, Any]
FILE = "style.safetensors"
STRENGTH = 0.7
FLOAT8 = "flux-2-klein-base-4b-float8.safetensors"


def main(scratch: Path) -> Answer:
    bench = LoraBench(scratch)
    answer: Answer = {"formats": bench.all_formats(), "stacked": bench.stacked()}
    answer |= {one: bench.in_turn(one) for one in bench.natives}
    answer["quantised"] = bench.quantised() | {"own class": bench.own_class()}
    answer |= bench.refused() | {"taken": bench.taken(), "control": bench.control()}
    return answer


class LoraBench(BenchIn):
    """Native MODELs, and LoRAs for them in ComfyUI's folder."""

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        import folder_paths

        from glassbox.tests.core import loras, quantised_files, test_lora
        from glassbox.tests.graph import tiny

        self.loras, self.scratch, self.published = loras, scratch, test_lora.published
        folder_paths.add_model_folder_path("loras", str(scratch))
        stored, _, _ = quantised_files.scaled_float8(self.state("FLUX.2"), "layers")
        tiny.save(stored, scratch / FLOAT8)
        self.formats: dict[str, Callable[[Any], Any]] = {
            "kohya": loras.kohya,
            "diffusers": lambda state: loras.with_prefix(state, "transformer."),
            "ai-toolkit": lambda state: loras.with_prefix(state, "diffusion_model."),
            "PEFT": lambda state: loras.with_prefix(state, "base_model.model."),
            "XLabs": loras.xlabs,
            "OneTrainer": _one_trainer,
            "LoKr": loras.lokr,
        }

    def state(self, generation: str) -> dict[str, Any]:
        """Our tensors' values, by our names."""
        return self.loras.state_of(self.ours[generation].network)

    def write(self, form: str, generation: str) -> dict[str, Any]:
        """Write a LoRA for every layer; gives what the weights become."""
        from glassbox.flux_core.weights.transformer_keys import to_diffusers
        from glassbox.tests.core.test_lora import with_deltas

        before = self.state(generation)
        is_split = form in ("diffusers", "OneTrainer")
        named = to_diffusers(before) if is_split else before
        maker = self.formats[form](named)
        maker.write(self.scratch)
        expected = with_deltas(named, maker.deltas, STRENGTH)
        return self.published(expected) if is_split else expected

    def apply(self, model: Any, strength: float = STRENGTH, **more: Any) -> Any:
        changed, report, native = self.run(
            "ApplyLoRA", model=model, file=FILE, strength=strength, **more
        )
        assert native is changed
        assert "in ComfyUI's own network" in report
        return changed

    def natively(self, model: Any, strength: float = STRENGTH) -> Any:
        return self.native_nodes.LoraLoaderModelOnly().load_lora_model_only(model, FILE, strength)[
            0
        ]

    def weights(self, model: Any) -> dict[str, Any]:
        """What its weights are while it is loaded."""
        import comfy.model_management as mm

        mm.load_models_gpu([model], force_full_load=True)
        state = model.model.diffusion_model.state_dict()
        return {key: tensor.clone() for key, tensor in state.items()}

    def all_formats(self) -> dict[str, Answer]:
        """The furthest weight from what it should be, and from ComfyUI's own loader's."""
        seen: dict[str, Answer] = {}
        for generation, native in self.natives.items():
            before = self.weights(native)
            for form in self.formats:
                expected = self.write(form, generation)
                made = self.weights(changed := self.apply(native))
                theirs = self.natively(native)
                missed = changed.patches.keys() - theirs.patches.keys()
                own = self.weights(theirs)
                read = [key for key in made if f"diffusion_model.{key}" in theirs.patches]
                seen[f"{generation} {form}"] = {
                    "furthest": _furthest(made, expected),
                    "patched": len(changed.patches),
                    "native reads": len(theirs.patches),
                    "only ours": len(missed),
                    "from native": _furthest(
                        {key: made[key] for key in read}, {key: own[key] for key in read}
                    ),
                    "restored": _same(before, self.weights(native)),
                }
        return seen

    def stacked(self) -> dict[str, float]:
        """A LoRA of ComfyUI's loader, then ours, then ours again with blocks of their own."""
        from glassbox.tests.core.test_lora import with_deltas

        apart: dict[str, float] = {}
        for generation, native in self.natives.items():
            state = self.state(generation)
            maker = self.loras.kohya(state)
            maker.write(self.scratch)
            twice = self.apply(self.natively(native), 0.4)
            expected = with_deltas(with_deltas(state, maker.deltas), maker.deltas, 0.4)
            apart[f"{generation} behind the native loader"] = _furthest(
                self.weights(twice), expected
            )
            single = {
                key: one for key, one in maker.deltas.items() if key.startswith("single_blocks")
            }
            blocks = "double: 0; single: 0.5; other: 0"
            thrice = self.apply(twice, 1.0, block_strengths=blocks)
            apart[f"{generation} thrice, by blocks"] = _furthest(
                self.weights(thrice), with_deltas(expected, single, 0.5)
            )
        return apart

    def in_turn(self, generation: str) -> Answer:
        """The MODEL, with a LoRA, and the MODEL again, under both samplers."""
        import torch

        self.write("kohya", generation)
        native = self.natives[generation]
        conditioning = self.conditioning(generation, 1, "as wired")
        patches, options = native.patches_uuid, repr(native.model_options)
        changed = self.apply(native)

        def ours(model: Any) -> Any:
            return self.guided_by(model, conditioning, generation).values

        def theirs(model: Any) -> Any:
            placed = self.run("ApplyToModel", model=model, conditioning=conditioning)
            side = self.run("ToConditioning", conditioning=conditioning)[0]
            return self.native_nodes.KSampler().sample(
                placed, 11, 3, 1.0, "euler", "simple", side, side, self.empty(generation)
            )[0]["samples"]

        answer: Answer = {}
        for name, run in (("our sampler", ours), ("KSampler", theirs)):
            order = (native, changed, native, self.natively(native), self.apply(native, 0.0))
            plain, patched, again, own, none = (run(model) for model in order)
            answer[name] = {
                "again": torch.equal(plain, again) and torch.equal(plain, none),
                "far": float((patched - plain).abs().max() / plain.abs().max()),
                "from native": float((patched - own).abs().max() / own.abs().max()),
            }
        untouched = (patches, options) == (native.patches_uuid, repr(native.model_options))
        return answer | {"untouched": untouched and not native.patches}

    def quantised(self) -> dict[str, Answer]:
        """Weights kept in float8, plainly and with scales."""
        loader = self.native_nodes.UNETLoader()
        nano = "glassbox_nano_kontext.safetensors"
        models = {
            "fp8_e4m3fn": (loader.load_unet(nano, "fp8_e4m3fn")[0], "FLUX.1"),
            "fp8_e5m2": (loader.load_unet(nano, "fp8_e5m2")[0], "FLUX.1"),
            "mixed": (loader.load_unet(FLOAT8, "default")[0], "FLUX.2"),
        }
        return {name: self._quantised(*one) for name, one in models.items()}

    def _quantised(self, model: Any, generation: str) -> Answer:
        import torch

        self.write("kohya", generation)
        before = self.weights(model)
        key = "single_blocks.0.linear1.weight"
        made = self.weights(changed := self.apply(model))
        own = self.weights(theirs := self.natively(model))
        restored = _same(before, self.weights(model))
        conditioning = self.conditioning(generation, 1, "as wired")
        pictures = [
            self.guided_by(one, conditioning, generation).values for one in (changed, theirs, model)
        ]
        return {
            "dtype": str(made[key].dtype),
            "equal": _same(made, own) and torch.equal(*pictures[:2]),
            "restored": restored,
            "differ": not (_same(made, before) or torch.equal(pictures[0], pictures[2])),
        }

    def own_class(self) -> Answer:
        """A patcher of another pack, which adds patches where a layer computes."""
        import comfy.lora

        expected = self.write("kohya", "FLUX.1")
        native = self.natives["FLUX.1"]
        before = self.weights(native)
        kind = _gguf_like()
        whole = native.clone()
        whole.__class__, whole.beside = kind, {}
        changed = self.apply(whole)
        loaded = self.weights(changed)
        made = {
            key: comfy.lora.calculate_weight(
                changed.beside[f"diffusion_model.{key}"], weight.clone(), key
            )
            if f"diffusion_model.{key}" in changed.beside
            else weight
            for key, weight in loaded.items()
        }
        return {
            "kept": type(changed) is kind and not whole.beside,
            "weights untouched": _same(before, loaded),
            "furthest": _furthest(made, expected),
            "beside": len(changed.beside) - len(changed.patches),
        }

    def refused(self) -> Answer:
        """What each wrong LoRA or MODEL says, how soon, and how many tensors were read."""
        files = sys.modules[f"{probe.PACK}.flux_core.weights.checkpoint"]
        native, others, reads = self.natives["FLUX.1"], self.changed(self.natives["FLUX.1"]), []
        stream = files.Checkpoint.stream
        files.Checkpoint.stream = lambda *given: reads.append(1) or stream(*given)
        fits: Answer = {"generation": "FLUX.1", "model": native, "dropped": None, "blocks": ""}
        uses: dict[str, Answer] = {
            "family": {**fits, "generation": "FLUX.2"},
            "generation": {**fits, "model": self.natives["FLUX.2"]},
            "half": {**fits, "dropped": "lora_unet_img_in.lora_up.weight"},
            "blocks": {**fits, "blocks": "double 0-99: 1"},
            **{name: {**fits, "model": others[name]} for name in ("forward", "fill", "sdxl")},
        }
        answer = {name: self._refused(**one) for name, one in uses.items()}
        files.Checkpoint.stream = stream
        answer["compiled"] = self._beside_compiled(native)
        return {"refused": answer, "reads": len(reads)}

    def _refused(self, generation: str, model: Any, dropped: str | None, blocks: str) -> Answer:
        """Apply a LoRA for a generation to a MODEL, perhaps without one of its keys."""
        maker = self.loras.kohya(self.state(generation))
        if dropped is not None:
            del maker.file[dropped]
        maker.write(self.scratch)
        before = time.perf_counter()
        said = _message(lambda: self.apply(model, block_strengths=blocks))
        return {"said": said, "seconds": time.perf_counter() - before}

    def _beside_compiled(self, native: Any) -> Answer:
        """Another clone is loaded, in which a layer lies deeper, as torch.compile puts it."""
        import comfy.model_management as mm
        import torch

        layer, other = native.model.diffusion_model.img_in, native.clone()
        deeper = torch.nn.ModuleDict({"_orig_mod": layer})
        other.add_object_patch("diffusion_model.img_in", deeper)
        mm.load_models_gpu([other])
        answer = self._refused("FLUX.1", native, None, "")
        mm.load_models_gpu([native])
        assert native.model.diffusion_model.img_in is layer
        return answer

    def control(self) -> Answer:
        """FLUX.1's Canny LoRA: the input twice as wide, biases, and norms that are replaced."""
        import torch

        from glassbox.tests.core.test_lora import with_deltas

        native, state = self.natives["FLUX.1"], self.state("FLUX.1")
        before, maker = self.weights(native), self.loras.Maker()
        for layer, (outputs, inputs) in self.loras.linear(state).items():
            maker.pair(layer, (outputs, 128 if layer == "img_in" else inputs), layer, self.loras.AB)
            maker.file[f"{layer}.lora_B.bias"] = maker.draw(outputs)
        norms = {key: maker.draw(len(one)) for key, one in state.items() if key.endswith(".scale")}
        maker.file |= norms
        maker.write(self.scratch)
        wide = torch.nn.functional.pad(state["img_in.weight"], (0, 64))
        expected = with_deltas({**state, "img_in.weight": wide}, maker.deltas)
        for key in maker.deltas:
            bias = maker.file[f"{key}.lora_B.bias"].double()
            expected[f"{key}.bias"] = expected[f"{key}.bias"] + STRENGTH * bias
        expected |= {key.replace(".scale", ".weight"): one for key, one in norms.items()}
        made = self.weights(changed := self.apply(native))
        answer: Answer = {
            "furthest": _furthest(made, expected),
            "norms": sum(key.replace(".scale", ".weight") in made for key in norms),
            "from native": _furthest(made, self.weights(theirs := self.natively(native))),
            "restored": _same(before, self.weights(native)),
            "at 0": self.apply(native, 0.0).patches,
        }
        conditioning = self.conditioning("FLUX.1", 1, "as wired")
        alone = self.conditioning("FLUX.1", 0, "offset")  # references are not as wide
        side = self.run("ToConditioning", conditioning=alone)[0]
        picture = {"concat_latent_image": maker.draw(2, 16, 8, 12)}
        side = [[text, {**given, **picture}] for text, given in side]
        settings = (11, 3, 1.0, "euler", "simple", side, side, self.empty("FLUX.1"))
        sampler = self.native_nodes.KSampler()
        ours, natively, plain = (
            sampler.sample(model, *settings)[0]["samples"] for model in (changed, theirs, native)
        )
        answer["sampled alike"] = torch.equal(ours, natively)
        answer["sampled apart"] = float((ours - plain).abs().max())
        said = {
            name: _message(lambda model=model: self.guided_by(model, conditioning))
            for name, model in (("sampled", changed), ("sampled from native", theirs))
        }
        said["our own"] = _message(
            lambda: self.run("ApplyLoRA", model=self.ours["FLUX.1"], file=FILE, strength=1.0)
        )
        said["twice"] = _message(lambda: self.apply(changed))
        said["other"] = _message(lambda: self.apply(self.natives["FLUX.2"]))
        said["behind"] = self._refused("FLUX.1", theirs, None, "")["said"]
        return answer | {"said": said}

    def taken(self) -> list[str]:
        """What only ComfyUI's samplers call stays on a MODEL, for them."""
        self.write("kohya", "FLUX.1")
        model = self.natives["FLUX.1"].clone()
        model.add_wrapper_with_key("outer_sample", "easycache", lambda run, *given: run(*given))
        model.set_model_sampler_post_cfg_function(lambda args: args["denoised"])
        model.add_object_patch("manual_cast_dtype", None)
        changed = self.apply(model)
        kept = [*changed.wrappers["outer_sample"], *changed.object_patches]
        return [*kept, *(one for one in changed.model_options if one.startswith("sampler"))]


def _one_trainer(state: dict[str, Any]) -> Any:
    from glassbox.tests.core import loras

    maker = loras.Maker()
    for layer, size in loras.linear(state).items():
        name = "lora_transformer_" + layer.replace(".", "_")
        maker.pair(layer, size, name, loras.DOWN_UP, alpha=2.0)
    return maker


def _gguf_like() -> Any:
    """A class of patcher with a clone and a way of patching of its own."""
    import comfy.model_patcher

    class OwnPatcher(comfy.model_patcher.ModelPatcher):
        beside: dict[str, Any]

        def patch_weight_to_device(self, key: str, *given: Any, **more: Any) -> Any:
            if key in self.patches:
                self.beside[key] = self.patches[key]

        def clone(self, *given: Any, **more: Any) -> Any:
            made = super().clone(*given, **more)
            made.__class__, made.beside = OwnPatcher, {}
            return made

    return OwnPatcher


def _furthest(made: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest difference; our names of the norms' scales differ, and nothing changes them."""
    keys = [key for key in made if key in expected]
    assert all("norm" in key for key in made.keys() ^ expected.keys())
    return max((float((made[key] - expected[key]).abs().max()) for key in keys), default=0.0)


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    import torch

    assert one.keys() == other.keys()
    return all(torch.equal(_bits(one[key]), _bits(other[key])) for key in one)


def _bits(tensor: Any) -> Any:
    import torch

    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


if __name__ == "__main__":
    probe.run(main)
