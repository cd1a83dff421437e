"""Probe: our samplers on ComfyUI's own CONDITIONING against ComfyUI's samplers on the same one.

`sampled` and `guided`: both generations, with and without a guidance input, on our network and on
a native MODEL. `elsewhere`: where a CONDITIONING goes beside the samplers, and what is said of it.
"""

import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import probe
from probe_native import SIZES, STEPS, Bench

Answer = dict[str, Any]
GUIDED = "FLUX.2 dev"  # FLUX.2 with a guidance input
LENGTHS = {"FLUX.1": 20, "FLUX.2": 36, GUIDED: 40}  # of the text
METHODS = (None, "offset", "index")


def main(scratch: Path) -> Answer:
    bench = BenchConditioning(scratch)
    answer: Answer
    if sys.argv[1] == "sampled":
        answer = {"apart": bench.all_settings() | bench.text_lengths()}
    elif sys.argv[1] == "guided":
        answer = {"guidance": bench.guidances(), "cfg": bench.with_negatives()}
    else:
        answer = {"round_trip": bench.round_trips(), "again": bench.handed_on()}
        answer |= {"told": bench.notes(), "schedule": bench.schedules()}
        answer |= {"conditioner": bench.conditioner(), "inspected": bench.inspected()}
    return answer


class BenchConditioning(Bench):
    """The same weights on both sides, a FLUX.2 with guidance among them, and what nodes tell."""

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        from glassbox.flux_core.families import FLUX2_DEV
        from glassbox.tests.graph import tiny, tiny_flux2

        name = tiny_flux2.DEV_FILE
        spec = replace(tiny_flux2.DEV, context_width=FLUX2_DEV.transformer.context_width)
        tiny.save(tiny_flux2.transformer_state(FLUX2_DEV, spec, seed=3), scratch / name)
        self.natives[GUIDED] = self.native_nodes.UNETLoader().load_unet(name, "default")[0]
        self.ours[GUIDED] = self.run("LoadModel", file=name, family="auto", dtype="auto")[0]
        self.told: list[str] = []
        sys.modules[f"{probe.PACK}.nodes.host"].notify = self.told.extend

    def inputs(self, generation: str) -> tuple[Any, Any]:
        noise, sigmas = super().inputs(generation)
        return replace(noise, values=noise.values[:1]), sigmas

    def empty(self, generation: str) -> Any:
        return {"samples": super().empty(generation)["samples"][:1]}

    def native(
        self,
        generation: str,
        count: int = 0,
        *,
        length: int = 0,
        seed: int = 0,
        odd: bool = False,
        **settings: Any,
    ) -> Any:
        """A CONDITIONING as ComfyUI's nodes make it; the same references whatever the text."""
        import torch

        spec = self.ours[generation].network.spec
        latent = self.ours[generation].family.latent
        generator = torch.Generator().manual_seed(seed)
        shape = (1, length or LENGTHS[generation], spec.context_width)
        txt = torch.randn(shape, generator=generator)
        pooled = torch.randn(1, spec.pooled_width or 64, generator=generator)
        if generation == "FLUX.2":  # as ComfyUI's text encoders of FLUX.2 leave it
            pooled = None
        inside: Answer = {"pooled_output": pooled, **settings}
        if not spec.pooled_width:
            inside["attention_mask"] = torch.ones(txt.shape[:2], dtype=torch.long)
        if count:
            generator.manual_seed(99)
            sides = [[side * latent.patch - odd for side in grid] for grid in SIZES[:count]]
            latents = [torch.randn(1, latent.channels, *one, generator=generator) for one in sides]
            inside.setdefault("reference_latents", latents)
        return [[txt, inside]]

    def theirs(self, generation: str, native: Any) -> Any:
        _, sigmas = self.inputs(generation)
        return self.sampled(self.natives[generation], native, sigmas, generation)

    def made(self, model: Any, generation: str, conditioning: Any) -> Any:
        noise, sigmas = self.inputs(generation)
        wires = {"noise": noise, "sigmas": sigmas, "solver": "euler"}
        return self.run("SampleGuided", model=model, conditioning=conditioning, **wires)

    def apart(self, generation: str, native: Any) -> float:
        """The larger distance of the two, our network and the native MODEL."""
        theirs = self.theirs(generation, native)
        models = self.ours[generation], self.natives[generation]
        return max(self.distance(self.made(one, generation, native), theirs) for one in models)

    def all_settings(self) -> dict[str, float]:
        apart: dict[str, float] = {}
        for generation in self.ours:
            for count in (0, 2) if generation == GUIDED else range(4):
                for method in METHODS if count else METHODS[:1]:
                    placed = {} if method is None else {"reference_latents_method": method}
                    native = self.native(generation, count, guidance=2.0, **placed)
                    apart[f"{generation} {count} {method}"] = self.apart(generation, native)
        for method in METHODS[1:]:
            native = self.native("FLUX.1", 3, odd=True, reference_latents_method=method)
            apart[f"FLUX.1 odd sides {method}"] = self.apart("FLUX.1", native)
        return apart

    def text_lengths(self) -> dict[str, float]:
        apart: dict[str, float] = {}
        for length in (1, 512, 530):
            native = self.native("FLUX.2", 1, length=length)
            apart[f"FLUX.2 text of {length}"] = self.apart("FLUX.2", native)
        half = self.native("FLUX.1", 1)
        half[0][0] = half[0][0].double()
        half[0][1]["pooled_output"] = half[0][1]["pooled_output"].half()
        apart["FLUX.1 text in float64"] = self.apart("FLUX.1", half)
        whole = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "of_a_pack": None}
        apart["FLUX.1 all of it"] = self.apart("FLUX.1", self.native("FLUX.1", 1, **whole))
        return apart

    def guidances(self) -> dict[str, float]:
        """Set, not set, and switched off where the model reads none; and that it matters."""
        apart: dict[str, float] = {}
        for generation in self.ours:
            unset = self.native(generation, 1)
            apart[f"{generation} unset"] = self.apart(generation, unset)
            given = self.native(generation, 1, guidance=3)
            apart[f"{generation} whole number"] = self.apart(generation, given)
        apart["FLUX.2 off"] = self.apart("FLUX.2", self.native("FLUX.2", 1, guidance=None))
        for generation in ("FLUX.1", GUIDED):
            ours = [
                self.made(self.ours[generation], generation, self.native(generation, 1, **one))
                for one in ({}, {"guidance": 2.5})
            ]
            apart[f"{generation} matters"] = float((ours[0].values - ours[1].values).abs().max())
        return apart

    def with_negatives(self) -> dict[str, float]:
        """KSampler with another prompt, an emptied one, and one without the references."""
        apart: dict[str, float] = {}
        for generation in ("FLUX.1", "FLUX.2"):
            positive = self.native(generation, 2, guidance=2.0)
            emptied = self.native_nodes.ConditioningZeroOut().zero_out(positive)[0]
            sides = {
                "other": (self.native(generation, 2, seed=5, guidance=2.0), "batched"),
                "emptied": (emptied, "batched"),
                "without references": (self.native(generation, 0, seed=5, length=9), "in turn"),
            }
            for name, (negative, passes) in sides.items():
                apart[f"{generation} {name}"] = self.cfg_apart(
                    generation, positive, negative, passes
                )
        return apart

    def cfg_apart(self, generation: str, positive: Any, negative: Any, passes: str) -> float:
        """The larger distance of the two, our network and the native MODEL.

        ComfyUI's norms of queries and keys take PyTorch's epsilon, 1.2e-7, ours the published
        1e-6: empty tokens and CFG make 2e-5 of it here, so ours is compared at its own.
        """
        model = self.natives[generation]
        sigmas = self.custom.BasicScheduler.execute(model, "simple", STEPS, 1.0).result[0]
        noise, _ = self.inputs(generation)
        window = {"cfg": 3.0, "start": 0.0, "end": 1.0, "passes": passes, "solver": "euler"}
        sides = {"positive": positive, "negative": negative}
        wires = {"noise": noise, "sigmas": sigmas, **sides, **window}
        native = self.run("SampleTrueCFG", model=model, **wires)
        ours = self.run("SampleTrueCFG", model=self.ours[generation], **wires)
        with _published_epsilon(model):
            published = self.with_ksampler(generation, positive, negative)
        theirs = self.with_ksampler(generation, positive, negative)
        return max(self.distance(native, theirs), self.distance(ours, published))

    def with_ksampler(self, generation: str, positive: Any, negative: Any) -> Any:
        curve = (11, STEPS, 3.0, "euler", "simple")
        model, empty = self.natives[generation], self.empty(generation)
        sampled = self.native_nodes.KSampler().sample(model, *curve, positive, negative, empty)
        return sampled[0]["samples"]

    def round_trips(self) -> dict[str, float]:
        """Our conditioning, and what To Conditioning makes of it, in our sampler."""
        apart: dict[str, float] = {}
        for generation in ("FLUX.1", "FLUX.2"):
            for count in range(4):
                for placement in ("offset", "index"):
                    native = self.native(generation, length=512)
                    text = self.text_of(native)
                    own = self.conditioned(generation, text, count, placement)
                    back, _ = self.run("ToConditioning", conditioning=own)
                    model = self.ours[generation]
                    made = [self.made(model, generation, one).values for one in (own, back)]
                    name = f"{generation} {count} {placement}"
                    apart[name] = float((made[0] - made[1]).abs().max() / made[0].abs().max())
        return apart

    def text_of(self, native: Any) -> Any:
        values = sys.modules[f"{probe.PACK}.flux_core.values"]
        txt, settings = native[0]
        pooled = settings["pooled_output"] if "attention_mask" not in settings else None
        return values.TextFeatures(txt=txt, pooled=pooled)

    def conditioned(self, generation: str, text: Any, count: int, placement: str) -> Any:
        """Our own, with references that are the model's."""
        latents = self.native(generation, count)[0][1].get("reference_latents", [])
        pack = sys.modules[f"{probe.PACK}.flux_core.tokens.pack"]
        spec = self.ours[generation].family.latent
        wired = {
            f"reference_{number}": pack.latent_tokens(one, spec)
            for number, one in enumerate(latents, 1)
        }
        settings = {"guidance": 1.5, "placement": placement, "references": wired}
        return self.run("ReferenceConditioner", text=text, **settings)

    def handed_on(self) -> dict[str, float]:
        """A CONDITIONING through To Conditioning and Apply To Model, in ComfyUI's sampler."""
        apart: dict[str, float] = {}
        cases = [(one, {"guidance": 2.0}) for one in self.ours]
        cases += [(GUIDED, {}), (GUIDED, {"guidance": None})]
        for generation, settings in cases:
            native = self.native(generation, 2, **settings)
            theirs = self.theirs(generation, native)
            again, _ = self.run("ToConditioning", conditioning=native)
            model = self.run("ApplyToModel", model=self.natives[generation], conditioning=native)
            _, sigmas = self.inputs(generation)
            name = f"{generation} {settings.get('guidance', 'unset')}"
            sampled = self.theirs(generation, again)
            apart[f"{name} to conditioning"] = float((sampled - theirs).abs().max())
            sampled = self.sampled(model, native, sigmas, generation)
            apart[f"{name} apply to model"] = float((sampled - theirs).abs().max())
        return apart

    def notes(self) -> dict[str, list[str]]:
        """What each use says."""
        odd = self.native("FLUX.1", 1, odd=True, guidance=2.0)
        uses: dict[str, Any] = {
            "unset": lambda: self.made(self.ours["FLUX.1"], "FLUX.1", self.native("FLUX.1")),
            "unset native": lambda: self.made(self.natives[GUIDED], GUIDED, self.native(GUIDED)),
            "not read": lambda: self.made(self.ours["FLUX.2"], "FLUX.2", self.native("FLUX.2")),
            "odd": lambda: self.made(self.ours["FLUX.1"], "FLUX.1", odd),
            "unset to conditioning": lambda: self.run(
                "ToConditioning", conditioning=self.native("FLUX.1")
            ),
            "replaced": lambda: self.wired(self.native("FLUX.1", guidance=2.0)),
            "kept": lambda: self.wired(self.native("FLUX.1", guidance=1.5)),
            "switched off": lambda: self.wired(self.native("FLUX.1", guidance=None)),
        }
        said: dict[str, list[str]] = {}
        for name, use in uses.items():
            self.told.clear()
            use()
            said[name] = list(self.told)
        return said

    def wired(self, text: Any, count: int = 0) -> Any:
        """Reference Conditioner with a CONDITIONING for its text."""
        return self.conditioned("FLUX.1", text, count, "offset")

    def conditioner(self) -> dict[str, float]:
        """The same picture as from the same text as text; FLUX.2's is filled as in KSampler."""
        apart: dict[str, float] = {}
        for generation, length in (("FLUX.1", 20), ("FLUX.2", 512)):
            native = self.native(generation, length=length)
            given = native, self.text_of(native)
            made = [
                self.made(
                    self.ours[generation],
                    generation,
                    self.conditioned(generation, one, 2, "index"),
                ).values
                for one in given
            ]
            apart[generation] = float((made[0] - made[1]).abs().max())
        short = self.native("FLUX.2")
        ours = self.conditioned("FLUX.2", short, 2, "index")
        native = self.native("FLUX.2", 2, guidance=1.5)
        made = self.made(self.ours["FLUX.2"], "FLUX.2", ours)
        apart["FLUX.2 short"] = self.distance(made, self.theirs("FLUX.2", native))
        return apart

    def schedules(self) -> dict[str, bool]:
        """Schedule on a LATENT of the picture's size, and on its noise."""
        import torch

        same: dict[str, bool] = {}
        for generation in self.ours:
            for name, model in ("ours", self.ours), ("native", self.natives):
                _, sigmas = self.inputs(generation)
                curve = {"steps": STEPS, "kind": "flux", "sigmas": ""}
                noise = self.empty(generation)
                found = self.run("Schedule", model=model[generation], noise=noise, **curve)
                same[f"{generation} {name}"] = torch.equal(found, sigmas)
        return same

    def inspected(self) -> dict[str, str]:
        """The sequence of a CONDITIONING with two references."""
        reports: dict[str, str] = {}
        for generation in self.ours:
            native = self.native(generation, 2, guidance=2.0)
            shown = {"conditioning": native, "noise": self.inputs(generation)[0]}
            alone = self.run("InspectTokens", **shown)
            reports[generation] = self.run("InspectTokens", model=self.natives[generation], **shown)
            assert alone == reports[generation]
        return reports


@contextmanager
def _published_epsilon(patcher: Any) -> Generator[None]:
    """Let ComfyUI's norms of queries and keys take the epsilon of the published code."""
    import torch

    norms = [one for one in patcher.model.modules() if isinstance(one, torch.nn.RMSNorm)]
    assert norms
    for norm in norms:
        norm.eps = 1e-6
    yield
    for norm in norms:
        norm.eps = None


if __name__ == "__main__":
    probe.run(main)
