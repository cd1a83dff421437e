"""Loaders of the parts of a model."""

from comfy_api.latest import io
from typing_extensions import override

from . import host
from .node import Node
from .runtime import loading
from .sockets import AutoencoderSocket, ModelSocket, TextEncodersSocket

_FAMILIES = [  # saved graphs hold these: new ones go to the end
    "auto",
    "flux1-kontext",
    "flux1-dev",
    "flux1-krea",
    "flux1-schnell",
    "flux2-dev",
    "flux2-klein-4b",
    "flux2-klein-9b",
    "flux2-klein-9b-kv",
    "flux2-klein-base-4b",
    "flux2-klein-base-9b",
]
_WEIGHTS = [loading.AS_STORED, "plain"]
_NANO = {"kontext": "nano-kontext", "klein": "nano-klein"}
_NONE = "none"
_CATEGORY = "FLUX Glassbox/loaders"


def _dtype_input() -> io.Combo.Input:
    return io.Combo.Input(
        "dtype",
        options=host.DTYPE_CHOICES,
        default="auto",
        advanced=True,
        tooltip="Number type of the weights and of the computation. auto: the best for this "
        "machine; on a CPU float32 if it fits in memory.",
    )


def _model_output() -> io.Output:
    return ModelSocket.Output(
        "model",
        tooltip="For the nodes of this pack. KSampler takes the MODEL of 'Load Diffusion Model'.",
    )


def _report_output() -> io.String.Output:
    return io.String.Output("report", tooltip="What was found in the file, and what was guessed.")


class LoadNano(Node):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GlassboxLoadNano",
            display_name="Load Nano (FLUX)",
            category=_CATEGORY,
            description="Loads one of the small models that come with this pack. They have the "
            "architecture of FLUX.1 Kontext or FLUX.2 klein, and know coloured shapes on plain "
            "backgrounds, no photographs.",
            search_aliases=["flux nano", "kontext demo", "klein demo", "embedded model"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=list(_NANO),
                    tooltip="Both edit pictures by instruction. kontext: FLUX.1 Kontext's "
                    "architecture, 8 steps. klein: FLUX.2 klein's, 4 steps, up to two references.",
                ),
            ],
            outputs=[
                _model_output(),
                TextEncodersSocket.Output("text_encoders"),
                AutoencoderSocket.Output("autoencoder"),
            ],
        )

    @classmethod
    @override
    def execute(cls, name: str) -> io.NodeOutput:
        return io.NodeOutput(*loading.load_nano(_NANO[name]))


class LoadModel(Node):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GlassboxLoadModel",
            display_name="Load Model (FLUX)",
            category=_CATEGORY,
            description="Loads a transformer of FLUX.1 or FLUX.2: the published layout or "
            "diffusers', one file or any shard of a set.",
            search_aliases=[
                "flux unet loader",
                "diffusion model loader",
                "kontext",
                "klein",
                "flux2",
                "checkpoint",
            ],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.model_names("diffusion_models"),
                    tooltip="A .safetensors or .gguf file in models/diffusion_models, plain or "
                    "quantised. Any one shard of a set opens the whole set.",
                ),
                io.Combo.Input(
                    "family",
                    options=_FAMILIES,
                    default="auto",
                    tooltip="Which model it is. FLUX.1 dev, Kontext and Krea share every shape, "
                    "and so do a klein, its base and its KV: there auto guesses from the file's "
                    "name, and the report says so.",
                ),
                _dtype_input(),
                io.Combo.Input(
                    "weights",
                    options=_WEIGHTS,
                    default=loading.AS_STORED,
                    optional=True,
                    advanced=True,
                    tooltip="as stored: float8 and NVFP4 weights stay quantised in memory, and "
                    "each layer is dequantised when it is used. plain: they are dequantised once, "
                    "take the memory of the dtype, and steps are faster, most of all at small "
                    "sizes.",
                ),
            ],
            outputs=[_model_output(), _report_output()],
        )

    @classmethod
    @override
    def fingerprint_inputs(
        cls, file: str, family: str, dtype: str, weights: str = loading.AS_STORED
    ) -> object:
        return loading.fingerprint("diffusion_models", file)

    @classmethod
    @override
    def execute(
        cls, file: str, family: str, dtype: str, weights: str = loading.AS_STORED
    ) -> io.NodeOutput:
        path = host.model_path("diffusion_models", file)
        model = loading.load_model(path, family, dtype, weights)
        return io.NodeOutput(model, model.report)


class LoadTextEncoders(Node):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GlassboxLoadTextEncoders",
            display_name="Load Text Encoders (FLUX)",
            category=_CATEGORY,
            description="Loads the text encoders of a model: CLIP-L and T5 for FLUX.1, in any "
            "order; Qwen3 for FLUX.2 klein; Mistral 3 for FLUX.2 dev.",
            search_aliases=[
                "dual clip loader",
                "flux clip",
                "t5xxl",
                "clip_l",
                "qwen3",
                "mistral",
            ],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.model_names("text_encoders"),
                    tooltip="A .safetensors or .gguf file in models/text_encoders, plain or "
                    "quantised. FLUX.1: CLIP-L or T5-XXL. FLUX.2: Qwen3 4B for klein 4B, Qwen3 8B "
                    "for klein 9B, Mistral 3 for dev.",
                ),
                io.Combo.Input(
                    "file_2",
                    options=[_NONE, *host.model_names("text_encoders")],
                    tooltip="FLUX.1: the other one; none if the first file holds both. FLUX.2 has "
                    "one encoder: none.",
                ),
                _dtype_input(),
            ],
            outputs=[TextEncodersSocket.Output("text_encoders"), _report_output()],
        )

    @classmethod
    @override
    def fingerprint_inputs(cls, file: str, file_2: str, dtype: str) -> object:
        return loading.fingerprint("text_encoders", file, file_2)

    @classmethod
    @override
    def execute(cls, file: str, file_2: str, dtype: str) -> io.NodeOutput:
        names = [name for name in (file, file_2) if name != _NONE]
        files = [host.model_path("text_encoders", name) for name in names]
        encoders = loading.load_text_encoders(files, dtype, loading.native_tokenizers())
        return io.NodeOutput(encoders, encoders.report)


class LoadAutoencoder(Node):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GlassboxLoadAutoencoder",
            display_name="Load Autoencoder (FLUX)",
            category=_CATEGORY,
            description="Loads the autoencoder (VAE) of FLUX.1 or FLUX.2: the published layout or "
            "diffusers'.",
            search_aliases=["flux vae loader", "ae.safetensors", "flux2-vae", "vae"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.model_names("vae"),
                    tooltip="A .safetensors file in models/vae: ae.safetensors for FLUX.1, "
                    "flux2-vae.safetensors for FLUX.2.",
                ),
                _dtype_input(),
            ],
            outputs=[AutoencoderSocket.Output("autoencoder"), _report_output()],
        )

    @classmethod
    @override
    def fingerprint_inputs(cls, file: str, dtype: str) -> object:
        return loading.fingerprint("vae", file)

    @classmethod
    @override
    def execute(cls, file: str, dtype: str) -> io.NodeOutput:
        autoencoder = loading.load_autoencoder(host.model_path("vae", file), dtype)
        return io.NodeOutput(autoencoder, autoencoder.report)
