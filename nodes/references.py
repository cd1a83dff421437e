"""Text, references and guidance: what every step reads besides the noisy tokens."""

from comfy_api.latest import io
from typing_extensions import override

from ..flux_core.errors import SettingError, shorten
from ..flux_core.specs import Placement
from ..flux_core.tokens.references import check_references, place_references
from ..flux_core.values import Conditioning, Reference, Tokens
from . import host
from .native.conditioning import AnyText, as_text
from .native.latent import as_tokens, is_latent
from .node import Node
from .sockets import ConditioningSocket, text_input, tokens_input

_AUTO_GUIDANCE = -1.0  # saved graphs hold numbers, so auto is one outside 0..100
_MAX_REFERENCES = 100  # ComfyUI's own limit for inputs that grow
_NAMES = [f"reference_{number}" for number in range(1, _MAX_REFERENCES + 1)]


class ReferenceConditioner(Node):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GlassboxReferenceConditioner",
            display_name="Reference Conditioner (FLUX)",
            category="FLUX Glassbox/conditioning",
            description="Put text, reference pictures and guidance together. References are seen "
            "by every step and changed by none. Without one it is text to image.",
            search_aliases=["reference latent", "kontext", "flux guidance", "multi reference"],
            inputs=[
                text_input("From Encode Text; or a native CONDITIONING, for its text alone."),
                io.Float.Input(
                    "guidance",
                    default=_AUTO_GUIDANCE,
                    min=_AUTO_GUIDANCE,
                    max=100.0,
                    step=0.1,
                    tooltip="Strength of the text, 0 to 100, read by guidance-distilled models. "
                    "-1: auto, the model's own: Kontext 2.5, FLUX.2 [dev] 4, nano kontext 1. "
                    "FLUX.1 [schnell] and the kleins ignore it.",
                ),
                io.Combo.Input(
                    "placement",
                    options=["offset", "index", "single", "as wired", "auto"],
                    default="auto",
                    tooltip="Position ids of the references. auto: index on FLUX.2, offset on "
                    "FLUX.1. index: one layer each, as FLUX.2 was trained. single: one, as Kontext "
                    "was trained. offset: side by side on one canvas, ComfyUI's way for several on "
                    "FLUX.1. as wired: what Position Ids set.",
                ),
                io.Autogrow.Input(
                    "references",
                    template=io.Autogrow.TemplateNames(
                        tokens_input(
                            "reference", "From Encode and Pack or Position Ids; or a native LATENT."
                        ),
                        names=_NAMES,
                        min=0,
                    ),
                    tooltip=f"0 to {_MAX_REFERENCES} pictures, in this order.",
                ),
            ],
            outputs=[ConditioningSocket.Output("conditioning")],
        )

    @classmethod
    @override
    def execute(
        cls,
        text: AnyText,
        guidance: float,
        placement: Placement,
        references: io.Autogrow.Type | None = None,
        **unknown: object,
    ) -> io.NodeOutput:
        wired = {} if references is None else references
        if unknown or not _is_tokens_by_name(wired):
            found = (
                ", ".join(map(shorten, [*unknown][:3])) or "something that is not tokens by name"
            )
            raise SettingError(
                f"references holds {found}.",
                f"tokens on reference_1, reference_2, … to reference_{_MAX_REFERENCES}.",
                "wire [image encoding] to each; in API form the inputs are called "
                "references.reference_1 and so on.",
            )
        ordered = [as_tokens(wired[name]) for name in _NAMES if wired.get(name) is not None]
        check_references(ordered)
        placed = place_references(ordered, placement)
        features, strength, notes = as_text(text, None if guidance == _AUTO_GUIDANCE else guidance)
        if placement == "auto" and len(placed) > 1:
            latent = placed[0].latent
            notes.append(f"placement is {latent.placement}, the default of {latent.name}.")
        host.notify(notes)
        final = tuple(Reference(tokens=one) for one in placed)
        return io.NodeOutput(Conditioning(text=features, references=final, guidance=strength))


def _is_tokens_by_name(wired: object) -> bool:
    """Whether the growing input holds tokens by name; a hand-written workflow may hold anything."""
    return isinstance(wired, dict) and all(
        isinstance(one, Tokens | None) or is_latent(one) for one in wired.values()
    )
