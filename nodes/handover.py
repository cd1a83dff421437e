"""For ComfyUI's own nodes: a CONDITIONING, position ids on a MODEL, and a GUIDER."""

from typing import TYPE_CHECKING

from comfy_api.latest import io
from typing_extensions import override

from . import host
from .native.conditioning import AnyConditioning, as_conditioning
from .native.handle import AnyModel, as_model
from .node import Node
from .runtime.reference_cache import ReferenceKV, choose
from .sampling import cfg_inputs, reference_kv_input
from .settings import ON_GUIDER, in_words
from .sockets import conditioning_input, model_input

if TYPE_CHECKING:
    from ..flux_core.sampling.guidance import Passes

_CATEGORY = "FLUX Glassbox/native"


class ToConditioning(Node):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GlassboxToConditioning",
            display_name="To Conditioning (FLUX)",
            category=_CATEGORY,
            description="Hand text, references and guidance to ComfyUI's own samplers. The "
            "references go along as latents, in their order.",
            search_aliases=["reference latent", "native", "ksampler", "basic guider"],
            inputs=[
                conditioning_input(
                    "conditioning", "From Reference Conditioner, or a native CONDITIONING."
                )
            ],
            outputs=[
                io.Conditioning.Output("native", tooltip="For KSampler and ComfyUI's other nodes."),
                io.String.Output("report", tooltip="What goes along, and what cannot."),
            ],
        )

    @classmethod
    @override
    def execute(cls, conditioning: AnyConditioning) -> io.NodeOutput:
        from .native.conditioning_out import to_native  # imported on first use: it takes time

        native, report, notes = to_native(conditioning)
        host.notify(notes)
        return io.NodeOutput(native, in_words(report))


class ApplyToModel(Node):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GlassboxApplyToModel",
            display_name="Apply To Model (FLUX)",
            category=_CATEGORY,
            description="Put the position ids of the references, and the length of the text, onto "
            "a copy of ComfyUI's own MODEL. The references themselves come from To Conditioning.",
            search_aliases=["rope ids", "img_ids", "native", "ksampler", "model patch"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="FLUX.1 or FLUX.2 from ComfyUI's loaders, LoRAs included.",
                ),
                conditioning_input(
                    "conditioning",
                    "The one that goes to To Conditioning; or the native one that goes to the "
                    "sampler.",
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="For KSampler and ComfyUI's other nodes.")],
        )

    @classmethod
    @override
    def execute(cls, model: io.Model.Type, conditioning: AnyConditioning) -> io.NodeOutput:
        from .native.model import apply_positions

        return io.NodeOutput(apply_positions(model, as_conditioning(conditioning)))


class GuiderNode(Node):
    settings = ON_GUIDER

    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GlassboxGuider",
            display_name="Guider (FLUX)",
            category=_CATEGORY,
            description="Let ComfyUI's own samplers run this pack's network, with its references "
            "and their cache: for SamplerCustomAdvanced, with any SAMPLER, NOISE and mask.",
            search_aliases=["basic guider", "cfg guider", "sampler custom advanced", "native"],
            inputs=[
                model_input("From a loader, or a native MODEL with its LoRAs."),
                conditioning_input(
                    "conditioning", "From Reference Conditioner, or a native CONDITIONING."
                ),
                conditioning_input(
                    "negative",
                    "What to move away from, with the same references; native CONDITIONING too. "
                    "Without it every step has one pass.",
                    optional=True,
                ),
                *cfg_inputs(optional=True),
                reference_kv_input(),
            ],
            outputs=[io.Guider.Output("guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    @override
    def execute(
        cls,
        model: AnyModel,
        conditioning: AnyConditioning,
        negative: AnyConditioning | None = None,
        cfg: float = 4.0,
        start: float = 0.0,
        end: float = 1.0,
        passes: "Passes" = "batched",
        reference_kv: ReferenceKV = "auto",
    ) -> io.NodeOutput:
        from ..flux_core.sampling.guidance import TrueCFG  # with the first use: it takes time
        from .native.guider import Guider

        handle = as_model(model)
        positive = as_conditioning(conditioning, handle)
        settings = None
        if negative is not None:
            avoid = as_conditioning(negative, handle, "negative")
            settings = TrueCFG(negative=avoid, scale=cfg, start=start, end=end, passes=passes)
        chosen = choose(reference_kv, handle.family)
        return io.NodeOutput(Guider(handle, positive, settings, chosen))
