"""Names and numbers that come out of files: whoever made a file may have put anything there."""

from pathlib import Path

from ..errors import CheckpointError

LONGEST_NAME = 80  # characters of a name that a message repeats
MOST_BLOCKS = 200  # of one kind in one network; the largest has 48


def is_text(name: str) -> bool:
    """Tell whether a name can be printed and written: half a character cannot."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def shorten(name: str, longest: int = LONGEST_NAME) -> str:
    """Make a name fit to stand in a message: not long, and with nothing unseen in it."""
    if len(name) > longest:
        name = name[: longest - 1] + "…"
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in name
    )


def check_path(path: Path) -> None:
    """Refuse a path that the safetensors library cannot open.

    Raises:
        CheckpointError: it holds bytes that are not text in the system's encoding.
    """
    if is_text(str(path)):
        return
    whose, what = "its name", "file" if path.suffix == ".safetensors" else "folder"
    if is_text(path.name):
        whose, what = "the name of a folder above it", "folder"
    raise CheckpointError(
        f"{shorten(path.name)} cannot be read: {whose} holds bytes that are not text.",
        "a name of letters that UTF-8 knows.",
        f"rename the {what}.",
    )
