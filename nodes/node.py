"""What every node of this pack is."""

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from .settings import SETTINGS, settings_named


class Node(io.ComfyNode):
    """Base of every node: errors of the library leave it with the names of nodes and widgets."""

    settings: Mapping[str, str] = SETTINGS  # what those of the library are called on it

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls).get("execute")
        # ComfyUI makes a locked copy of the class for every run, with the same function in it.
        if own is not None and all(
            vars(base).get("execute") is not own for base in cls.__mro__[1:]
        ):
            setattr(cls, "execute", classmethod(settings_named(cls.settings)(own.__func__)))  # noqa: B010
