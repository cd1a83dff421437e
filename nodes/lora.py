"""LoRAs on models of this pack's own loader, and on ComfyUI's own."""

from comfy_api.latest import io
from typing_extensions import override

from . import host
from .native.handle import AnyModel
from .runtime import loading
from .settings import Node
from .sockets import ModelSocket, model_input

_LIMIT = 100.0  # ComfyUI's own of a LoRA's strength


class ApplyLoRA(Node):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GlassboxApplyLoRA",
            display_name="Apply LoRA (FLUX)",
            category="FLUX Glassbox/loaders",
            description="Put a LoRA on a model of FLUX.1 or FLUX.2, whichever trainer wrote it. "
            "Chain the node for several. The model that comes in stays as it is.",
            search_aliases=["flux lora loader", "lokr", "load lora", "kohya", "ai-toolkit"],
            inputs=[
                model_input(
                    "From Load Model, or from another Apply LoRA; or a native MODEL, which may "
                    "carry LoRAs of ComfyUI's own loaders."
                ),
                io.Combo.Input(
                    "file",
                    options=host.model_names("loras"),
                    tooltip="A .safetensors file in models/loras: kohya, diffusers, ai-toolkit, "
                    "PEFT, XLabs, OneTrainer or LoKr.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-_LIMIT,
                    max=_LIMIT,
                    step=0.05,
                    tooltip="How much of the LoRA is added, from -100 to 100. 1: as it was "
                    "trained; 0: none of it.",
                ),
                io.String.Input(
                    "block_strengths",
                    default="",
                    multiline=True,
                    optional=True,
                    advanced=True,
                    tooltip="Factors of the strength, block by block: 'double 0-7: 1.0; single "
                    "0,2,5-10: 0.5; other: 0'. What is not named has 1.",
                ),
            ],
            outputs=[
                ModelSocket.Output("model", tooltip="For the nodes of this pack."),
                io.String.Output(
                    "report",
                    tooltip="For which models it is, its format and rank, and which of its keys "
                    "are used.",
                ),
                io.Model.Output(
                    "native",
                    tooltip="The same, for KSampler and ComfyUI's other nodes, if a native MODEL "
                    "came in. Models of this pack's loaders are for this pack's nodes.",
                ),
            ],
        )

    @classmethod
    @override
    def fingerprint_inputs(
        cls, file: str, strength: float, block_strengths: str = "", **_: object
    ) -> object:
        return loading.fingerprint("loras", file)

    @classmethod
    @override
    def execute(
        cls, model: AnyModel, file: str, strength: float, block_strengths: str = ""
    ) -> io.NodeOutput:
        path = host.model_path("loras", file)
        changed, report = loading.apply_lora(model, path, strength, block_strengths)
        return io.NodeOutput(changed, report, changed)
