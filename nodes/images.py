"""Images to tokens and back."""

import torch
from comfy_api.latest import io
from typing_extensions import override

from ..flux_core.checks import check_finite
from ..flux_core.families import REFERENCE_SIZES, TOKEN_PX
from ..flux_core.image.fit import FitMethod, fit_image, fit_reference, keep_size, undo_fit
from ..flux_core.image.pixels import check_image
from ..flux_core.image.sizes import floor_size, preferred_size
from ..flux_core.memory import fit_bytes
from ..flux_core.tokens.pack import latent_tokens, tokens_latent
from ..flux_core.types import Image
from ..flux_core.values import Fit
from . import host
from .native.latent import AnyTokens, as_tokens
from .native.vae import AnyAutoencoder, as_autoencoder
from .node import Node
from .sockets import FitSocket, TokensSocket, autoencoder_input, tokens_input

_CATEGORY = "FLUX Glassbox/image"


class FitImage(Node):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GlassboxFitImage",
            display_name="Fit Image (FLUX)",
            category=_CATEGORY,
            description="Fits a picture to a size that the model accepts; Unpack and Decode can "
            "undo it.",
            search_aliases=["kontext image scale", "resize", "flux size", "pad", "crop"],
            inputs=[
                io.Image.Input("image", tooltip="Any size; three channels."),
                io.Combo.Input(
                    "size",
                    options=["preferred", "keep", "exact", *REFERENCE_SIZES],
                    tooltip="preferred: the nearest of Kontext's 17 trained sizes, about 1 "
                    "megapixel. keep: the picture's own size, to the next multiple of 16 px. "
                    "exact: width and height below. FLUX.2 one reference, several references: "
                    "its own size, scaled down to 4.1 or 1.05 megapixels if it is larger.",
                ),
                io.Int.Input(
                    "width",
                    default=1024,
                    min=16,
                    max=host.MAX_SIDE_PX,
                    step=16,
                    tooltip="In pixels, a multiple of 16. Used by size exact only.",
                ),
                io.Int.Input(
                    "height",
                    default=1024,
                    min=16,
                    max=host.MAX_SIDE_PX,
                    step=16,
                    tooltip="In pixels, a multiple of 16. Used by size exact only.",
                ),
                io.Combo.Input(
                    "method",
                    options=["crop", "pad", "stretch"],
                    default="stretch",
                    tooltip="crop cuts off what does not fit, as published for FLUX.2; pad repeats "
                    "the edge pixels around the picture; stretch changes the proportions.",
                ),
            ],
            outputs=[
                io.Image.Output("image"),
                FitSocket.Output("fit", tooltip="For Unpack and Decode, to undo the fit."),
                io.Int.Output("width", tooltip="Of the fitted picture, for Noise."),
                io.Int.Output("height", tooltip="Of the fitted picture, for Noise."),
                io.Int.Output(
                    "match_width",
                    tooltip="Of the input picture, rounded down to a multiple of 16 px: for Noise, "
                    "to make a picture of that size.",
                ),
                io.Int.Output("match_height", tooltip="As match_width."),
            ],
        )

    @classmethod
    @override
    def execute(
        cls, image: io.Image.Type, size: str, width: int, height: int, method: FitMethod
    ) -> io.NodeOutput:
        fitted, fit = _fit(image, size, (height, width), method)
        match_height, match_width = floor_size(*fit.original, TOKEN_PX)
        return io.NodeOutput(fitted, fit, fit.canvas[1], fit.canvas[0], match_width, match_height)


def _fit(image: Image, size: str, exact: tuple[int, int], method: FitMethod) -> tuple[Image, Fit]:
    check_image(image)
    if size in REFERENCE_SIZES:
        return fit_reference(image, REFERENCE_SIZES[size], method)
    if size == "keep":
        return keep_size(image, method, TOKEN_PX)
    if size == "preferred":
        width, height = preferred_size(image.shape[2], image.shape[1])
        return fit_image(image, (height, width), method, TOKEN_PX)
    host.require_room(
        fit_bytes(image.shape[0], *exact),
        f"{image.shape[0]} pictures of {exact[1]}x{exact[0]}",
        "make [fit width] and [fit height] smaller.",
    )
    return fit_image(image, exact, method, TOKEN_PX)


class EncodeAndPack(Node):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GlassboxEncodeAndPack",
            display_name="Encode and Pack (FLUX)",
            category=_CATEGORY,
            description="Encodes a picture to a latent and packs it into tokens with the position "
            "ids of a target: index 0, rows and columns from 0.",
            search_aliases=["vae encode", "reference latent", "image to tokens", "patchify"],
            inputs=[
                autoencoder_input("From a loader, or a native VAE of FLUX.1 or FLUX.2."),
                io.Image.Input("image", tooltip="Sides must be multiples of 16 px: see Fit Image."),
                io.Combo.Input(
                    "posterior",
                    options=["mode", "sample"],
                    tooltip="mode: the same latent every time, as published. "
                    "sample: drawn from the posterior with the seed.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=False,  # else the browser would change it at each run
                    tooltip="0 to 2^64 - 1. Used by posterior sample only.",
                ),
            ],
            outputs=[TokensSocket.Output("tokens")],
        )

    @classmethod
    @override
    def execute(
        cls, autoencoder: AnyAutoencoder, image: io.Image.Type, posterior: str, seed: int
    ) -> io.NodeOutput:
        generator = torch.Generator().manual_seed(seed) if posterior == "sample" else None
        encoder = as_autoencoder(autoencoder)
        latent = encoder.encode(image, generator)
        return io.NodeOutput(latent_tokens(latent, encoder.latent))


class UnpackAndDecode(Node):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GlassboxUnpackAndDecode",
            display_name="Unpack and Decode (FLUX)",
            category=_CATEGORY,
            description="Unpacks tokens to a latent, decodes it to a picture, and undoes the fit.",
            search_aliases=["vae decode", "tokens to image", "unpatchify"],
            inputs=[
                autoencoder_input("Of the model that sampled: from a loader, or a native VAE."),
                tokens_input("tokens", "From a sampler; or a native LATENT."),
                FitSocket.Input(
                    "fit",
                    optional=True,
                    tooltip="Of the picture that was edited: padding is cut off and the rest "
                    "resized back. What was cropped does not come back.",
                ),
            ],
            outputs=[io.Image.Output("image")],
        )

    @classmethod
    @override
    def execute(
        cls,
        autoencoder: AnyAutoencoder,
        tokens: AnyTokens,
        fit: FitSocket.Type | None = None,
    ) -> io.NodeOutput:
        decoder = as_autoencoder(autoencoder)
        packed = as_tokens(tokens, decoder.latent)
        check_finite(packed.values, "tokens input")
        image = decoder.decode(tokens_latent(packed), packed.latent)
        return io.NodeOutput(image if fit is None else undo_fit(image, fit))
