"""Noise, noise levels, and the samplers."""

from comfy_api.latest import io
from typing_extensions import override

from ..flux_core.checks import check_latent
from ..flux_core.memory import noise_bytes
from ..flux_core.sampling.guidance import Passes, TrueCFG
from ..flux_core.sampling.noise import MAX_SEED, make_noise
from ..flux_core.sampling.sigmas import SigmaKind, make_sigmas
from ..flux_core.sampling.solvers import SOLVERS, SolverName
from . import host
from .native.conditioning import AnyConditioning, as_conditioning
from .native.handle import AnyModel, as_model
from .native.latent import AnyTokens, as_tokens
from .native.skipped import shift_notes
from .runtime.reference_cache import REFERENCE_KV, ReferenceKV
from .settings import Node
from .sockets import TokensSocket, conditioning_input, model_input, tokens_input

_CATEGORY = "FLUX Glassbox/sampling"


def _side_input(name: str) -> io.Int.Input:
    return io.Int.Input(
        name,
        default=1024,
        min=16,
        max=host.MAX_SIDE_PX,
        step=16,
        tooltip="Of the picture to make, in pixels, a multiple of 16. Wire Fit Image's to it.",
    )


def _solver_input() -> io.Combo.Input:
    return io.Combo.Input(
        "solver",
        options=list(SOLVERS),
        tooltip="euler: one pass a step, what FLUX was published with. heun: second order, two "
        "passes a step.",
    )


def _reference_kv_input() -> io.Combo.Input:
    return io.Combo.Input(
        "reference_kv",
        options=list(REFERENCE_KV),
        default="auto",
        optional=True,
        advanced=True,
        tooltip="Keys and values of references, on a model trained for it (klein 9B KV). kept: "
        "computed once and reused by later runs with the same references, which auto does too. "
        "this run: computed once and let go. every step: computed anew, with the least memory. "
        "All make the same picture.",
    )


class Noise(Node):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GlassboxNoise",
            display_name="Noise (FLUX)",
            category=_CATEGORY,
            description="Draw the noise the picture is made from, as tokens at the target's "
            "places. A seed gives the same noise on every machine, and ComfyUI's own.",
            search_aliases=["random noise", "empty latent", "seed", "size"],
            inputs=[
                model_input("The model that will sample: from a loader, or a native MODEL."),
                _side_input("width"),
                _side_input("height"),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="0 to 2^64 - 1.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=4096,
                    tooltip="Pictures made at once, 1 to 4096; memory decides.",
                ),
            ],
            outputs=[TokensSocket.Output("noise")],
        )

    @classmethod
    @override
    def execute(
        cls, model: AnyModel, width: int, height: int, seed: int, batch_size: int
    ) -> io.NodeOutput:
        latent = as_model(model).family.latent
        host.require_room(
            noise_bytes(latent, height, width, batch_size),
            f"Noise for {batch_size} of {width}x{height}",
            "make the picture or the batch smaller.",
        )
        return io.NodeOutput(make_noise(latent, height, width, seed, batch_size))


class Schedule(Node):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GlassboxSchedule",
            display_name="Schedule (FLUX)",
            category=_CATEGORY,
            description="Choose the noise level of every step. The flux schedule depends on the "
            "size of the picture, with FLUX.2 on the number of steps too, never on text or "
            "references.",
            search_aliases=["flux scheduler", "sigmas", "steps", "karras", "shift"],
            inputs=[
                model_input("The model that will sample: from a loader, or a native MODEL."),
                tokens_input(
                    "noise", "From Noise, or a native LATENT: its token count sets the shift."
                ),
                io.Int.Input(
                    "steps",
                    default=30,
                    min=1,
                    max=1000,
                    tooltip="1 to 1000. Kontext 30, schnell and klein 4, klein base and FLUX.2 dev "
                    "50, nano Kontext 8, nano klein 4.",
                ),
                io.Combo.Input(
                    "kind",
                    options=["flux", "linear", "karras", "exponential", "by hand"],
                    tooltip="flux: the model's own. linear: evenly spaced. karras, exponential: "
                    "other curves between the same ends. by hand: the numbers below.",
                ),
                io.String.Input(
                    "sigmas",
                    default="",
                    advanced=True,
                    placeholder="1.0, 0.75, 0.5, 0.25, 0",
                    tooltip="For kind by hand: numbers falling from at most 1 to 0; steps is not "
                    "read then.",
                ),
            ],
            outputs=[io.Sigmas.Output("sigmas")],
        )

    @classmethod
    @override
    def execute(
        cls,
        model: AnyModel,
        noise: AnyTokens,
        steps: int,
        kind: SigmaKind,
        sigmas: str,
    ) -> io.NodeOutput:
        family = as_model(model).family
        tokens = as_tokens(noise, family.latent)
        check_latent(tokens.latent, family.latent, "noise")
        count = tokens.ids.shape[0]
        if kind == "flux":
            host.tell(shift_notes(model))
        return io.NodeOutput(make_sigmas(family.schedule, count, steps, kind=kind, by_hand=sigmas))


class SampleGuided(Node):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GlassboxSampleGuided",
            display_name="Sample Guided (FLUX)",
            category=_CATEGORY,
            description="Follow the model from noise to picture, one pass a step. Guidance goes to "
            "models distilled with it; klein and schnell take none.",
            search_aliases=["ksampler", "flux sampler", "denoise", "basic guider"],
            inputs=[
                model_input("From a loader, or a native MODEL with its LoRAs."),
                conditioning_input(
                    "conditioning", "From Reference Conditioner, or a native CONDITIONING."
                ),
                TokensSocket.Input("noise", tooltip="From Noise."),
                io.Sigmas.Input(
                    "sigmas", tooltip="From Schedule: falling from at most 1 to 0, one a step."
                ),
                _solver_input(),
                _reference_kv_input(),
            ],
            outputs=[TokensSocket.Output("tokens")],
        )

    @classmethod
    @override
    def execute(
        cls,
        model: AnyModel,
        conditioning: AnyConditioning,
        noise: TokensSocket.Type,
        sigmas: io.Sigmas.Type,
        solver: SolverName,
        reference_kv: ReferenceKV = "auto",
    ) -> io.NodeOutput:
        handle = as_model(model)
        given = as_conditioning(conditioning, handle)
        tokens = handle.sample(given, noise, sigmas, solver, None, reference_kv)
        return io.NodeOutput(tokens)


class SampleTrueCFG(Node):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GlassboxSampleTrueCFG",
            display_name="Sample True CFG (FLUX)",
            category=_CATEGORY,
            description="Sample with a negative prompt: two passes a step, and away from the "
            "negative one. Steps outside the window run the positive pass alone.",
            search_aliases=[
                "cfg guider",
                "negative prompt",
                "ksampler",
                "classifier-free guidance",
            ],
            inputs=[
                model_input("From a loader, or a native MODEL with its LoRAs."),
                conditioning_input(
                    "positive",
                    "What to make: from Reference Conditioner, or a native CONDITIONING.",
                ),
                conditioning_input(
                    "negative",
                    "What to move away from, with the same references; native CONDITIONING too.",
                ),
                TokensSocket.Input("noise", tooltip="From Noise."),
                io.Sigmas.Input(
                    "sigmas", tooltip="From Schedule: falling from at most 1 to 0, one a step."
                ),
                io.Float.Input(
                    "cfg",
                    default=4.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Scale, 0 to 100, 4 for klein base; 1 or less runs the positive pass "
                    "alone.",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="First step with two passes, as a fraction of the steps, 0 to 1.",
                ),
                io.Float.Input(
                    "end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="First step without them again, as a fraction of the steps, 0 to 1.",
                ),
                io.Combo.Input(
                    "passes",
                    options=["batched", "in turn"],
                    advanced=True,
                    tooltip="batched: both in one batch. in turn: one after the other, with half "
                    "the memory; the two may then differ in length and references.",
                ),
                _solver_input(),
                _reference_kv_input(),
            ],
            outputs=[TokensSocket.Output("tokens")],
        )

    @classmethod
    @override
    def execute(
        cls,
        model: AnyModel,
        positive: AnyConditioning,
        negative: AnyConditioning,
        noise: TokensSocket.Type,
        sigmas: io.Sigmas.Type,
        cfg: float,
        start: float,
        end: float,
        passes: Passes,
        solver: SolverName,
        reference_kv: ReferenceKV = "auto",
    ) -> io.NodeOutput:
        handle = as_model(model)
        make = as_conditioning(positive, handle, "positive")
        avoid = as_conditioning(negative, handle, "negative")
        settings = TrueCFG(negative=avoid, scale=cfg, start=start, end=end, passes=passes)
        tokens = handle.sample(make, noise, sigmas, solver, settings, reference_kv)
        return io.NodeOutput(tokens)
