"""A clear error when ComfyUI's own nodes get a model of this pack's loaders.

Sockets keep the two apart, but wires of any type, such as a switch's, and the output `native` of
Apply LoRA do not. A native node then fails at the first attribute of a MODEL it reads.
"""

from typing import TYPE_CHECKING, Any

from ...flux_core.errors import SettingError

if TYPE_CHECKING:
    from ...flux_core.specs import FluxFamily


class NotNativeError(SettingError, AttributeError):
    """A model of this pack's loader where ComfyUI's own MODEL is needed.

    Also an AttributeError, so that `hasattr` and `getattr` with a default still work.
    """


class NotNative:
    """Base of handles that are not ComfyUI's MODEL: reading a MODEL's attributes raises."""

    family: "FluxFamily"

    def not_native(self) -> NotNativeError:
        """Returns the error, which names this model and what to wire instead."""
        return NotNativeError(
            f"{self.family.title} was loaded by this pack's loader, whose models ComfyUI's own "
            "nodes cannot use.",
            "ComfyUI's own MODEL.",
            "load it with 'Load Diffusion Model', or wire it to 'Sample Guided (FLUX)'.",
        )

    if not TYPE_CHECKING:  # a type checker would believe that every attribute exists

        def __getattr__(self, name: str) -> Any:
            """Called for missing attributes; Python itself looks up those that begin with _."""
            if name.startswith("_") or "family" not in vars(self):
                raise AttributeError(name)
            raise self.not_native()
