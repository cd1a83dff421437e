"""This pack's own sockets: each carries one value of `flux_core`, or a handle on a model."""

from comfy_api.latest import io

from ..flux_core import values
from .runtime import handles


@io.comfytype(io_type="GLASSBOX_MODEL")
class ModelSocket(io.ComfyTypeIO):
    """A transformer, and what ComfyUI needs to load and unload it."""

    Type = handles.ModelHandle


def model_input(tooltip: str, *, optional: bool = False) -> io.MultiType.Input:
    """An input that takes a model of this pack's loaders, or ComfyUI's own MODEL."""
    return io.MultiType.Input(
        "model", types=[ModelSocket, io.Model], tooltip=tooltip, optional=optional
    )


@io.comfytype(io_type="GLASSBOX_TEXT_ENCODERS")
class TextEncodersSocket(io.ComfyTypeIO):
    """The text encoders, and what ComfyUI needs to load and unload them."""

    Type = handles.TextEncodersHandle


def text_encoders_input(tooltip: str) -> io.MultiType.Input:
    """An input that takes text encoders of this pack's loaders, or ComfyUI's own CLIP."""
    return io.MultiType.Input("text_encoders", types=[TextEncodersSocket, io.Clip], tooltip=tooltip)


@io.comfytype(io_type="GLASSBOX_AUTOENCODER")
class AutoencoderSocket(io.ComfyTypeIO):
    """An autoencoder, and what ComfyUI needs to load and unload it."""

    Type = handles.AutoencoderHandle


def autoencoder_input(tooltip: str) -> io.MultiType.Input:
    """An input that takes an autoencoder of this pack's loaders, or ComfyUI's own VAE."""
    return io.MultiType.Input("autoencoder", types=[AutoencoderSocket, io.Vae], tooltip=tooltip)


@io.comfytype(io_type="GLASSBOX_TEXT")
class TextSocket(io.ComfyTypeIO):
    """An encoded prompt."""

    Type = values.TextFeatures


def text_input(tooltip: str) -> io.MultiType.Input:
    """An input that takes an encoded prompt, or ComfyUI's own CONDITIONING for its text."""
    return io.MultiType.Input("text", types=[TextSocket, io.Conditioning], tooltip=tooltip)


@io.comfytype(io_type="GLASSBOX_TOKENS")
class TokensSocket(io.ComfyTypeIO):
    """An image, or noise, as tokens with their position ids."""

    Type = values.Tokens


def tokens_input(name: str, tooltip: str, *, optional: bool = False) -> io.MultiType.Input:
    """An input that takes tokens, or ComfyUI's own LATENT with a target's position ids."""
    return io.MultiType.Input(
        name, types=[TokensSocket, io.Latent], tooltip=tooltip, optional=optional
    )


@io.comfytype(io_type="GLASSBOX_CONDITIONING")
class ConditioningSocket(io.ComfyTypeIO):
    """Text, placed references and guidance: what every step sees."""

    Type = values.Conditioning


def conditioning_input(name: str, tooltip: str, *, optional: bool = False) -> io.MultiType.Input:
    """An input that takes our conditioning, or ComfyUI's own CONDITIONING."""
    return io.MultiType.Input(
        name, types=[ConditioningSocket, io.Conditioning], tooltip=tooltip, optional=optional
    )


@io.comfytype(io_type="GLASSBOX_FIT")
class FitSocket(io.ComfyTypeIO):
    """How an image was made to fit, in enough detail to undo it."""

    Type = values.Fit
