"""One small tree of errors: each says what was found, what was needed, and the fix.

The library knows settings, not nodes. A fix and a note name a setting in brackets, "set [steps]";
`name_settings` puts in the words of whoever shows them: the nodes say which node and widget it is.
"""

import re
from collections.abc import Mapping

_LONGEST = 600  # characters of one part of a message
SETTINGS = frozenset(
    {
        "model loader",
        "text encoder loader",
        "autoencoder loader",
        "nano loader",
        "LoRA loader",
        "text encoding",
        "image fit",
        "image encoding",
        "image decoding",
        "latent packing",
        "noise",
        "schedule",
        "guided sampling",
        "true CFG",
        "native conditioning",
        "guider",
        "native positions",
        "family",
        "model dtype",
        "text encoder dtype",
        "autoencoder dtype",
        "block_strengths",
        "prompt",
        "text tokens",
        "fit size",
        "fit method",
        "fit width",
        "fit height",
        "latent_format",
        "index",
        "row",
        "column",
        "guidance",
        "placement",
        "references",
        "width",
        "height",
        "seed",
        "batch_size",
        "steps",
        "schedule kind",
        "sigmas",
        "denoise",
        "cfg",
        "cfg start",
        "cfg end",
        "passes",
        "solver",
        "sampler",
        "start tokens",
        "reference_kv",
    }
)
"""What a fix or a note may name; any other word in brackets, as in FLUX.1 [dev], is only a word."""

_BRACKETS = re.compile(r"\[([A-Za-z0-9_ ]+)\]")


def printable(text: str) -> str:
    """Make words from a file or a workflow safe to print: encodable, and not endless."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 4 :]}"
    return text.encode("utf-8", "backslashreplace").decode()


def shorten(name: str, longest: int = 80) -> str:
    """Makes a name from a file fit into a message: not long, and with nothing unprintable in it."""
    if len(name) > longest:
        name = name[: longest - 1] + "…"
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in name
    )


def settings_in(text: str) -> tuple[str, ...]:
    """Names of the settings that a text mentions in brackets, in order."""
    return tuple(name for name in _BRACKETS.findall(text) if name in SETTINGS)


def name_settings(text: str, names: Mapping[str, str] | None = None) -> str:
    """Replaces every setting in brackets by what `names` calls it, else by its own name."""

    def named(found: re.Match[str]) -> str:
        setting = found[1]
        return (names or {}).get(setting, setting) if setting in SETTINGS else found[0]

    return _BRACKETS.sub(named, text)


class GlassboxError(ValueError):
    """Base of every error a user can cause and cure.

    Args:
        found: what is there, with its numbers.
        needed: what has to be there.
        fix: what to change, with settings in brackets: "set [steps] to 4."
    """

    __module__ = "glassbox"  # people read it: the real one holds the folder of the pack

    def __init_subclass__(cls) -> None:
        cls.__module__ = "glassbox"

    def __init__(self, found: str, needed: str, fix: str) -> None:
        self.found, self.needed, self.fix = map(printable, (found, needed, fix))
        self.settings = settings_in(self.fix)
        super().__init__(self.found, self.needed, self.fix)

    def __str__(self) -> str:
        return f"{self.found} Needed: {self.needed} Fix: {name_settings(self.fix)}"

    def name_settings(self, names: Mapping[str, str]) -> None:
        """Put the fix into the words of whoever shows it."""
        self.fix = name_settings(self.fix, names)


class ShapeError(GlassboxError):
    """A size, a channel count or a batch does not fit."""


class FamilyMismatchError(GlassboxError):
    """Parts of two model families were wired together."""


class CheckpointError(GlassboxError):
    """A model file is missing, broken, incomplete or of another kind."""


class SettingError(GlassboxError):
    """A setting is outside what can be computed."""


class MemoryLimitError(GlassboxError):
    """The job needs more memory than there is."""


class NonFiniteError(GlassboxError):
    """Values hold NaN or infinity."""
