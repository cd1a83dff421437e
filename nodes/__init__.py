"""The nodes, in the order in which an image is made."""

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from . import host
from .handover import ApplyToModel, GuiderNode, ToConditioning
from .images import EncodeAndPack, FitImage, UnpackAndDecode
from .loaders import LoadAutoencoder, LoadModel, LoadNano, LoadTextEncoders
from .lora import ApplyLoRA
from .noise import Noise, Schedule
from .references import ReferenceConditioner
from .sampling import SampleGuided, SampleTrueCFG
from .text import EncodeText
from .tokens import InspectTokens, PackLatent, PositionIds, UnpackLatent

NODES: list[type[io.ComfyNode]] = [
    LoadNano,
    LoadModel,
    LoadTextEncoders,
    LoadAutoencoder,
    EncodeText,
    FitImage,
    EncodeAndPack,
    PositionIds,
    ReferenceConditioner,
    Noise,
    Schedule,
    SampleGuided,
    SampleTrueCFG,
    UnpackAndDecode,
    PackLatent,
    UnpackLatent,
    InspectTokens,
    ToConditioning,
    ApplyToModel,
    ApplyLoRA,
    GuiderNode,
]


class Glassbox(ComfyExtension):
    """The extension that ComfyUI loads."""

    @override
    async def on_load(self) -> None:
        host.add_nano_models()

    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
