"""Prompt to text features."""

from dataclasses import asdict

from comfy_api.latest import io
from typing_extensions import override

from ..flux_core.values import TokenCount
from .sockets import TextEncodersSocket, TextSocket


class EncodeText(io.ComfyNode):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GlassboxEncodeText",
            display_name="Encode Text (FLUX)",
            category="FLUX Glassbox/text",
            description="Encode a prompt with CLIP-L and T5, and say how many tokens it took and "
            "which end of it did not fit.",
            search_aliases=["clip text encode flux", "prompt", "instruction", "t5"],
            has_intermediate_output=True,
            inputs=[
                TextEncodersSocket.Input("text_encoders", tooltip="From a loader."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What to make, or what to change. CLIP-L takes 77 tokens, T5 512, "
                    "their begin and end marks included.",
                ),
                io.String.Input(
                    "prompt_2",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="Another text for T5 alone. Empty: the same as prompt.",
                ),
                io.Int.Input(
                    "t5_tokens",
                    default=0,
                    min=0,
                    max=512,
                    advanced=True,
                    tooltip="Length T5's text is padded or cut to, 1 to 512 tokens; 0 is the "
                    "encoders' own: 512 for FLUX.1. FLUX.1 [schnell] was trained with 256.",
                ),
            ],
            outputs=[
                TextSocket.Output("text"),
                io.String.Output("report", tooltip="Tokens used and text cut, for each encoder."),
            ],
        )

    @classmethod
    @override
    def execute(
        cls, text_encoders: TextEncodersSocket.Type, prompt: str, prompt_2: str, t5_tokens: int
    ) -> io.NodeOutput:
        text = text_encoders.encode(prompt, prompt_2, t5_tokens or None)
        counts = [asdict(count) for count in text.counts]
        report = "\n".join(_describe(count) for count in text.counts)
        return io.NodeOutput(text, report, ui={"glassbox_text": counts})


def _describe(count: TokenCount) -> str:
    cut = f"; cut: {count.cut!r}" if count.cut else ""
    return f"{count.encoder}: {count.used} of {count.limit} tokens{cut}"
