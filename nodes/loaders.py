"""Loaders: files to models."""

from comfy_api.latest import io
from typing_extensions import override

from . import host, loading
from .sockets import AutoencoderSocket, ModelSocket, TextEncodersSocket

_FAMILIES = ["auto", "flux1-kontext", "flux1-dev", "flux1-krea", "flux1-schnell"]
_NONE = "none"
_CATEGORY = "FLUX Glassbox/loaders"


def _dtype_input() -> io.Combo.Input:
    return io.Combo.Input(
        "dtype",
        options=host.DTYPE_CHOICES,
        default="auto",
        advanced=True,
        tooltip="Number type of the weights and of the computation. auto: what this machine "
        "computes well; on a CPU float32 if it fits in memory.",
    )


def _report_output() -> io.String.Output:
    return io.String.Output("report", tooltip="What was found in the file, and what was guessed.")


class LoadNano(io.ComfyNode):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GlassboxLoadNano",
            display_name="Load Nano (FLUX)",
            category=_CATEGORY,
            description="Load the small model that comes with this pack. It has FLUX.1 Kontext's "
            "architecture and knows coloured shapes on plain backgrounds, no photographs.",
            search_aliases=["flux nano", "kontext demo", "embedded model", "tiny flux"],
            inputs=[
                io.Combo.Input(
                    "name", options=["kontext"], tooltip="kontext: edits a picture as told."
                ),
            ],
            outputs=[
                ModelSocket.Output("model"),
                TextEncodersSocket.Output("text_encoders"),
                AutoencoderSocket.Output("autoencoder"),
            ],
        )

    @classmethod
    @override
    def execute(cls, name: str) -> io.NodeOutput:
        return io.NodeOutput(*loading.load_nano())


class LoadModel(io.ComfyNode):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GlassboxLoadModel",
            display_name="Load Model (FLUX)",
            category=_CATEGORY,
            description="Load a FLUX.1 transformer: the published layout or diffusers', one file "
            "or any shard of a set.",
            search_aliases=["flux unet loader", "diffusion model loader", "kontext", "checkpoint"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.model_names("diffusion_models"),
                    tooltip="A .safetensors file in models/diffusion_models. Any one shard of a "
                    "set opens the whole set.",
                ),
                io.Combo.Input(
                    "family",
                    options=_FAMILIES,
                    default="auto",
                    tooltip="Which model it is. dev, Kontext and Krea share every shape, so auto "
                    "goes by the file's name and says in the report that it guessed.",
                ),
                _dtype_input(),
            ],
            outputs=[ModelSocket.Output("model"), _report_output()],
        )

    @classmethod
    @override
    def fingerprint_inputs(cls, file: str, family: str, dtype: str) -> object:
        return loading.fingerprint("diffusion_models", file)

    @classmethod
    @override
    def execute(cls, file: str, family: str, dtype: str) -> io.NodeOutput:
        model = loading.load_model(host.model_path("diffusion_models", file), family, dtype)
        return io.NodeOutput(model, model.report)


class LoadTextEncoders(io.ComfyNode):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GlassboxLoadTextEncoders",
            display_name="Load Text Encoders (FLUX)",
            category=_CATEGORY,
            description="Load CLIP-L and T5, in any order.",
            search_aliases=["dual clip loader", "flux clip", "t5xxl", "clip_l"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.model_names("text_encoders"),
                    tooltip="CLIP-L or T5-XXL, in models/text_encoders.",
                ),
                io.Combo.Input(
                    "file_2",
                    options=[_NONE, *host.model_names("text_encoders")],
                    tooltip="The other one; none if the first file holds both.",
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
        encoders = loading.load_text_encoders(files, dtype, *host.native_tokenizers())
        return io.NodeOutput(encoders, encoders.report)


class LoadAutoencoder(io.ComfyNode):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GlassboxLoadAutoencoder",
            display_name="Load Autoencoder (FLUX)",
            category=_CATEGORY,
            description="Load the autoencoder (VAE) of FLUX.1: the published layout or diffusers'.",
            search_aliases=["flux vae loader", "ae.safetensors", "vae"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.model_names("vae"),
                    tooltip="A .safetensors file in models/vae, such as ae.safetensors.",
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
