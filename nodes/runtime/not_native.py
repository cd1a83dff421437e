"""A model of this pack in the hands of ComfyUI's own nodes: it says so in words.

Sockets keep the two apart, but wires of any type, such as a switch's, and the output `native` of
Apply LoRA do not. A native node then fails at the first thing it asks a MODEL for.
"""

from typing import TYPE_CHECKING, Any

from ...flux_core.errors import SettingError

if TYPE_CHECKING:
    from ...flux_core.specs import FluxFamily


class NotNativeError(SettingError, AttributeError):
    """A model of this pack's loader where ComfyUI's own MODEL is needed.

    An AttributeError, so that code that only looks whether something is there gets its answer.
    """


class NotNative:
    """What is no MODEL of ComfyUI's, and says so to whoever asks for what one has."""

    family: "FluxFamily"

    def not_native(self) -> NotNativeError:
        """Say what it is, and what to wire instead."""
        return NotNativeError(
            f"{self.family.title} was loaded by this pack's loader, whose models ComfyUI's own "
            "nodes cannot use.",
            "ComfyUI's own MODEL.",
            "load it with 'Load Diffusion Model', or wire it to 'Sample Guided (FLUX)'.",
        )

    if not TYPE_CHECKING:  # a type checker would take every attribute for one that is there

        def __getattr__(self, name: str) -> Any:
            """Called for what is not there; names that begin with _ are Python's own questions."""
            if name.startswith("_") or "family" not in vars(self):
                raise AttributeError(name)
            raise self.not_native()
