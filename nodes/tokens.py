"""Tokens: their position ids, to and from ComfyUI's latents, and the whole sequence drawn."""

from comfy_api.latest import io
from typing_extensions import override

from ..flux_core.checks import check_finite
from ..flux_core.families import LATENTS
from ..flux_core.tokens.ids import place
from ..flux_core.tokens.pack import latent_tokens, tokens_latent
from . import host
from .native.conditioning import AnyConditioning, as_conditioning
from .native.handle import AnyModel, as_model
from .native.latent import AnyTokens, as_tokens
from .node import Node
from .sockets import TokensSocket, conditioning_input, model_input, tokens_input

_CATEGORY = "FLUX Glassbox/tokens"
_FARTHEST = 4096.0  # tokens, or images: far beyond any that fits in memory


def _position_input(name: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(
        name,
        default=default,
        min=-_FARTHEST,
        max=_FARTHEST,
        step=1.0,
        round=0.001,
        tooltip=f"{tooltip} -4096 to 4096.",
    )


class PositionIds(Node):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GlassboxPositionIds",
            display_name="Position Ids (FLUX)",
            category=_CATEGORY,
            description="Give every token of a picture its place: which picture it belongs to, "
            "its row and its column. Reference Conditioner keeps them with placement 'as wired'.",
            search_aliases=["rope ids", "img_ids", "place reference", "offset"],
            inputs=[
                tokens_input("tokens", "From Encode and Pack, or a native LATENT."),
                _position_input(
                    "index",
                    1.0,
                    "Which picture: 0 is the one being made, Kontext's reference is 1, FLUX.2's "
                    "are 10, 20, 30 and so on.",
                ),
                _position_input("row", 0.0, "Row of the top left token, in tokens of 16 px."),
                _position_input("column", 0.0, "Column of the top left token, in tokens of 16 px."),
            ],
            outputs=[TokensSocket.Output("tokens")],
        )

    @classmethod
    @override
    def execute(cls, tokens: AnyTokens, index: float, row: float, column: float) -> io.NodeOutput:
        return io.NodeOutput(place(as_tokens(tokens), index=index, row=row, column=column))


class PackLatent(Node):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GlassboxPackLatent",
            display_name="Pack Latent (FLUX)",
            category=_CATEGORY,
            description="Cut one of ComfyUI's latents into tokens, placed as a target. Every value "
            "comes through unchanged.",
            search_aliases=["latent to tokens", "patchify"],
            inputs=[
                io.Latent.Input(
                    "latent",
                    tooltip="Sides are multiples of 16 px: 2 cells of FLUX.1, 1 of FLUX.2. Without "
                    "a noise mask.",
                ),
                io.Combo.Input(
                    "latent_format",
                    options=list(LATENTS),
                    tooltip="Whose autoencoder made it. FLUX.1: 16 channels, 8 px a cell. FLUX.2: "
                    "128 channels, 16 px a cell.",
                ),
            ],
            outputs=[TokensSocket.Output("tokens")],
        )

    @classmethod
    @override
    def execute(cls, latent: io.Latent.Type, latent_format: str) -> io.NodeOutput:
        samples = host.latent_samples(latent)
        check_finite(samples, "latent input")
        return io.NodeOutput(latent_tokens(samples, LATENTS[latent_format]))


class UnpackLatent(Node):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GlassboxUnpackLatent",
            display_name="Unpack Latent (FLUX)",
            category=_CATEGORY,
            description="Lay tokens out as one of ComfyUI's latents. Every value comes through "
            "unchanged; position ids are dropped, a latent has none.",
            search_aliases=["tokens to latent", "unpatchify"],
            inputs=[TokensSocket.Input("tokens", tooltip="From a sampler, or Encode and Pack.")],
            outputs=[io.Latent.Output("latent")],
        )

    @classmethod
    @override
    def execute(cls, tokens: TokensSocket.Type) -> io.NodeOutput:
        return io.NodeOutput({"samples": tokens_latent(tokens)})


class InspectTokens(Node):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GlassboxInspectTokens",
            display_name="Inspect Tokens (FLUX)",
            category=_CATEGORY,
            description="Draw the sequence the model reads: text, target and every reference, with "
            "their token counts and the range of their ids.",
            search_aliases=["sequence", "debug tokens", "img_ids", "token count"],
            is_output_node=True,
            inputs=[
                conditioning_input(
                    "conditioning", "From Reference Conditioner, or a native CONDITIONING."
                ),
                tokens_input(
                    "noise",
                    "From Noise, or a native LATENT: adds the target to the sequence.",
                    optional=True,
                ),
                model_input(
                    "From a loader, or a native MODEL: shows the sequence in the order this model "
                    "reads it.",
                    optional=True,
                ),
            ],
            outputs=[io.String.Output("report", tooltip="The same as text, one line a segment.")],
        )

    @classmethod
    @override
    def execute(
        cls,
        conditioning: AnyConditioning,
        noise: AnyTokens | None = None,
        model: AnyModel | None = None,
    ) -> io.NodeOutput:
        from ..flux_core.tokens.inspect import describe_sequence, sequence_report

        handle = None if model is None else as_model(model)
        described = as_conditioning(conditioning, handle)
        rule = None if handle is None else handle.family.references
        target = None if noise is None else as_tokens(noise)
        sequence = describe_sequence(described, target, rule)
        return io.NodeOutput(sequence_report(sequence), ui={"glassbox_tokens": [sequence]})
