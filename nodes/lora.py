"""LoRAs on models of this pack's loaders and on ComfyUI's own."""

from comfy_api.latest import io
from typing_extensions import override

from . import host
from .native.handle import AnyModel
from .node import Node
from .runtime import loading
from .sockets import ModelSocket, model_input

_LIMIT = 100.0  # of the strength, as in ComfyUI's LoRA loader


class ApplyLoRA(Node):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GlassboxApplyLoRA",
            display_name="Apply LoRA (FLUX)",
            category="FLUX Glassbox/loaders",
            description="Applies a LoRA of any trainer to a model of FLUX.1 or FLUX.2. Chain the "
            "node for several. The input model itself is not changed.",
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
                    tooltip="How strongly the LoRA is applied, from -100 to 100. 1: as trained; "
                    "0: not at all.",
                ),
                io.String.Input(
                    "block_strengths",
                    default="",
                    multiline=True,
                    optional=True,
                    advanced=True,
                    tooltip="Factors of the strength, block by block: 'double 0-7: 1.0; single "
                    "0,2,5-10: 0.5; other: 0'. Blocks that are not named have 1.",
                ),
            ],
            outputs=[
                ModelSocket.Output("model", tooltip="For the nodes of this pack."),
                io.String.Output(
                    "report",
                    tooltip="Which models the LoRA is for, its format and rank, and which of its "
                    "keys are used.",
                ),
                io.Model.Output(
                    "native",
                    tooltip="The same, for KSampler and ComfyUI's other nodes, if the input is a "
                    "native MODEL. Models of this pack's loaders work in this pack's nodes only.",
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
