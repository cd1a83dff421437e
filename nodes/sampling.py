"""The samplers: guided, and with true CFG."""

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io
from typing_extensions import override

from ..flux_core.sampling.solvers import SOLVERS, SolverName
from ..flux_core.values import Tokens
from .native.conditioning import AnyConditioning, as_conditioning
from .native.handle import AnyModel, as_model
from .native.latent import AnyTokens, as_tokens
from .node import Node
from .runtime.reference_cache import REFERENCE_KV, ReferenceKV
from .runtime.sample import Handle, sample
from .sockets import TokensSocket, conditioning_input, model_input, tokens_input

if TYPE_CHECKING:
    from ..flux_core.sampling.guidance import Passes
    from ..flux_core.sampling.job import Job

_CATEGORY = "FLUX Glassbox/sampling"


def _solver_input() -> io.Combo.Input:
    return io.Combo.Input(
        "solver",
        options=list(SOLVERS),
        tooltip="euler: one pass a step, what FLUX was published with. heun: second order, two "
        "passes a step. dpm++ 2m, res multistep: second order, one pass a step. Not read when a "
        "SAMPLER is wired.",
    )


def reference_kv_input() -> io.Combo.Input:
    """The input that says how keys and values of isolated references are cached."""
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


def cfg_inputs(*, optional: bool = False) -> list[io.Input]:
    """The settings of true CFG."""
    return [
        io.Float.Input(
            "cfg",
            default=4.0,
            min=0.0,
            max=100.0,
            step=0.1,
            optional=optional,
            tooltip="Scale, 0 to 100, 4 for klein base; 1 or less runs the positive pass alone.",
        ),
        io.Float.Input(
            "start",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=optional,
            advanced=True,
            tooltip="First step with two passes, as a fraction of the steps, 0 to 1.",
        ),
        io.Float.Input(
            "end",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=optional,
            advanced=True,
            tooltip="First step without them again, as a fraction of the steps, 0 to 1.",
        ),
        io.Combo.Input(
            "passes",
            options=["batched", "in turn"],
            optional=optional,
            advanced=True,
            tooltip="batched: both in one batch. in turn: one after the other, with half the "
            "memory; the two may then differ in length and references.",
        ),
    ]


def _start_and_sampler_inputs() -> list[io.Input]:
    return [
        tokens_input(
            "start_tokens",
            "A picture to begin from, from Encode and Pack or a native LATENT of the noise's size. "
            "It is seen where the sigmas begin below 1: set denoise on Schedule.",
            optional=True,
        ),
        io.Sampler.Input(
            "sampler",
            optional=True,
            tooltip="A native SAMPLER in place of solver, such as KSamplerSelect's.",
        ),
    ]


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
                reference_kv_input(),
                *_start_and_sampler_inputs(),
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
        start_tokens: AnyTokens | None = None,
        sampler: io.Sampler.Type | None = None,
    ) -> io.NodeOutput:
        from ..flux_core.sampling.job import Job  # with the first use: it takes time

        handle = as_model(model)
        job = Job(
            conditioning=as_conditioning(conditioning, handle),
            noise=noise,
            sigmas=sigmas,
            solver=solver,
            start=_start(start_tokens, handle),
        )
        return io.NodeOutput(_sample(handle, job, reference_kv, sampler))


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
                *cfg_inputs(),
                _solver_input(),
                reference_kv_input(),
                *_start_and_sampler_inputs(),
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
        passes: "Passes",
        solver: SolverName,
        reference_kv: ReferenceKV = "auto",
        start_tokens: AnyTokens | None = None,
        sampler: io.Sampler.Type | None = None,
    ) -> io.NodeOutput:
        from ..flux_core.sampling.guidance import TrueCFG
        from ..flux_core.sampling.job import Job

        handle = as_model(model)
        wanted = as_conditioning(positive, handle, "positive")
        avoid = as_conditioning(negative, handle, "negative")
        job = Job(
            conditioning=wanted,
            noise=noise,
            sigmas=sigmas,
            solver=solver,
            cfg=TrueCFG(negative=avoid, scale=cfg, start=start, end=end, passes=passes),
            start=_start(start_tokens, handle),
        )
        return io.NodeOutput(_sample(handle, job, reference_kv, sampler))


def _sample(handle: Handle, job: "Job", reference_kv: ReferenceKV, sampler: Any) -> Tokens:
    if sampler is None:
        return sample(handle, job, reference_kv)
    from .native.guider import sample_with  # with the first use: it takes time

    return sample_with(sampler, handle, job, reference_kv)


def _start(wired: AnyTokens | None, handle: Handle) -> Tokens | None:
    return None if wired is None else as_tokens(wired, handle.family.latent)
