"""Prompt to text features."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeAlias

from comfy_api.latest import io
from typing_extensions import override

from ..flux_core.values import TokenCount
from . import host
from .node import Node
from .runtime.handles import TextEncodersHandle
from .sockets import TextSocket, text_encoders_input

if TYPE_CHECKING:
    from .native.text import NativeTextEncoders

AnyTextEncoders: TypeAlias = TextEncodersHandle | Any  # the other is ComfyUI's CLIP


class EncodeText(Node):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GlassboxEncodeText",
            display_name="Encode Text (FLUX)",
            category="FLUX Glassbox/text",
            description="Encodes a prompt with a model's text encoders, and shows how many tokens "
            "it takes and which part did not fit.",
            search_aliases=["clip text encode flux", "prompt", "instruction", "t5", "qwen"],
            has_intermediate_output=True,
            inputs=[
                text_encoders_input("From a loader, or a native CLIP of FLUX.1 or FLUX.2."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What to make, or what to change. CLIP-L takes 77 tokens; T5, Qwen3 "
                    "and Mistral 512, including special tokens and chat template.",
                ),
                io.String.Input(
                    "prompt_2",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="FLUX.1: another text for T5 only. Empty: the same as prompt. FLUX.2 "
                    "has one encoder, which reads only prompt.",
                ),
                io.Int.Input(
                    "t5_tokens",
                    default=0,
                    min=0,
                    max=512,
                    advanced=True,
                    tooltip="Text length, 1 to 512 tokens: what T5, Qwen3 or Mistral read is "
                    "padded or cut to it. 0: the model's default, 512. FLUX.1 [schnell] was "
                    "trained with 256.",
                ),
            ],
            outputs=[
                TextSocket.Output("text"),
                io.String.Output(
                    "report", tooltip="Tokens used and text cut off, for each encoder, and notes."
                ),
            ],
        )

    @classmethod
    @override
    def execute(
        cls, text_encoders: AnyTextEncoders, prompt: str, prompt_2: str, t5_tokens: int
    ) -> io.NodeOutput:
        text = _as_text_encoders(text_encoders).encode(prompt, prompt_2, t5_tokens or None)
        counts = [asdict(count) for count in text.counts]
        host.notify(text.notes)
        report = "\n".join([*map(_describe, text.counts), *text.notes])
        return io.NodeOutput(text, report, ui={"glassbox_text": counts})


def _as_text_encoders(encoders: AnyTextEncoders) -> "TextEncodersHandle | NativeTextEncoders":
    """Returns the text encoders that are wired: this pack's own, or a native CLIP."""
    if isinstance(encoders, TextEncodersHandle):
        return encoders
    from .native.text import NativeTextEncoders  # late: takes time to import

    return NativeTextEncoders(encoders)


def _describe(count: TokenCount) -> str:
    cut = f"; cut: {count.cut!r}" if count.cut else ""
    return f"{count.encoder}: {count.used} of {count.limit} tokens{cut}"
