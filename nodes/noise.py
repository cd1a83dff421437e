"""The noise, and the noise level of every step."""

from comfy_api.latest import io
from typing_extensions import override

from ..flux_core.checks import check_latent
from ..flux_core.memory import noise_bytes
from ..flux_core.sampling.noise import MAX_SEED, make_noise
from ..flux_core.sampling.sigmas import SigmaKind, make_sigmas
from . import host
from .native.handle import AnyModel, as_model
from .native.latent import AnyTokens, as_tokens
from .native.skipped import shift_notes
from .node import Node
from .sockets import TokensSocket, model_input, tokens_input

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


class Noise(Node):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GlassboxNoise",
            display_name="Noise (FLUX)",
            category=_CATEGORY,
            description="Draw the noise the picture is made from, as tokens with the position ids "
            "of a target. A seed gives the same noise on every machine, and ComfyUI's own.",
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
            "make [width], [height] or [batch_size] smaller.",
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
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Part of the way to go, above 0 to 1, as KSampler has it: below 1 the "
                    "sigmas begin lower, for a sampler with start_tokens. 1: from noise alone.",
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
        denoise: float = 1.0,
    ) -> io.NodeOutput:
        family = as_model(model).family
        tokens = as_tokens(noise, family.latent)
        check_latent(tokens.latent, family.latent, "noise")
        count = tokens.ids.shape[0]
        if kind == "flux":
            host.notify(shift_notes(model))
        made = make_sigmas(
            family.schedule, count, steps, kind=kind, by_hand=sigmas, denoise=denoise
        )
        return io.NodeOutput(made)
