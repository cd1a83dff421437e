"""One small tree of errors: each says what was found, what was needed, and the fix."""

_LONGEST = 600  # characters of one part of a message


def printable(text: str) -> str:
    """Make words from a file or a workflow safe to print: encodable, and not endless."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 4 :]}"
    return text.encode("utf-8", "backslashreplace").decode()


class GlassboxError(ValueError):
    """Base of every error a user can cause and cure.

    Args:
        found: what is there, with its numbers.
        needed: what has to be there.
        fix: which node or setting changes it.
    """

    __module__ = "glassbox"  # people read it: the real one holds the folder of the pack

    def __init_subclass__(cls) -> None:
        cls.__module__ = "glassbox"

    def __init__(self, found: str, needed: str, fix: str) -> None:
        self.found, self.needed, self.fix = map(printable, (found, needed, fix))
        super().__init__(f"{self.found} Needed: {self.needed} Fix: {self.fix}")


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
