"""Out to ComfyUI's own nodes: conditioning with references, and their places on a MODEL."""

from typing import Any

from comfy_api.latest import io
from typing_extensions import override

from ..flux_core.tokens.native import native_method
from ..flux_core.tokens.pack import tokens_latent
from ..flux_core.values import Conditioning
from . import host, native_model
from .sockets import ConditioningSocket

_CATEGORY = "FLUX Glassbox/native"
_BY_HAND = (
    "the references are placed by hand, which ComfyUI has no name for: put 'Apply To Model "
    "(FLUX)' between the MODEL and the sampler."
)
_NO_GUIDANCE = "no guidance is set: ComfyUI takes 3.5 where the model reads one."


class ToConditioning(io.ComfyNode):
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
                ConditioningSocket.Input("conditioning", tooltip="From Reference Conditioner.")
            ],
            outputs=[
                io.Conditioning.Output("native"),
                io.String.Output("report", tooltip="What goes along, and what cannot."),
            ],
        )

    @classmethod
    @override
    def execute(cls, conditioning: ConditioningSocket.Type) -> io.NodeOutput:
        settings, notes = _settings(conditioning)
        host.tell(notes)
        report = "\n".join([_describe(conditioning, settings), *notes])
        return io.NodeOutput([[conditioning.text.txt, settings]], report)


class ApplyToModel(io.ComfyNode):
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
                ConditioningSocket.Input(
                    "conditioning", tooltip="The one that goes to To Conditioning."
                ),
            ],
            outputs=[io.Model.Output("model")],
        )

    @classmethod
    @override
    def execute(cls, model: io.Model.Type, conditioning: ConditioningSocket.Type) -> io.NodeOutput:
        return io.NodeOutput(native_model.apply_places(model, conditioning))


def _settings(conditioning: Conditioning) -> tuple[dict[str, Any], list[str]]:
    """Give what ComfyUI reads beside the text, and what it cannot be told."""
    settings, notes = dict[str, Any](), list[str]()
    if conditioning.text.pooled is not None:
        settings["pooled_output"] = conditioning.text.pooled
    if conditioning.guidance is None:
        notes.append(_NO_GUIDANCE)
    else:
        settings["guidance"] = conditioning.guidance
    if conditioning.references:
        method = native_method(conditioning.references)
        if method is None:
            notes.append(_BY_HAND)
        settings["reference_latents"] = [tokens_latent(one) for one in conditioning.references]
        settings["reference_latents_method"] = method or "index"
    return settings, notes


def _describe(conditioning: Conditioning, settings: dict[str, Any]) -> str:
    references = len(conditioning.references)
    method = settings.get("reference_latents_method")
    placed = f", method {method}" if method else ""
    return f"{conditioning.text.txt.shape[1]} text tokens; {references} references{placed}"
