"""Out to ComfyUI's own nodes: conditioning with references, and their places on a MODEL."""

from comfy_api.latest import io
from typing_extensions import override

from . import host
from .native.conditioning import AnyConditioning, as_conditioning
from .settings import Node
from .sockets import conditioning_input

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
        from .native.conditioning_out import to_native  # imported with the first use: it takes time

        native, report, notes = to_native(conditioning)
        host.tell(notes)
        return io.NodeOutput(native, report)


class ApplyToModel(Node):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GlassboxApplyToModel",
            display_name="Apply To Model (FLUX)",
            category=_CATEGORY,
            description="Put the places of the references, and the length of the text, onto a "
            "copy of ComfyUI's own MODEL. The references themselves come from To Conditioning.",
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
        from .native.model import apply_places

        return io.NodeOutput(apply_places(model, as_conditioning(conditioning)))
