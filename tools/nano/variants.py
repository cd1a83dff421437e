"""What differs between the two nano models, as data."""

from collections.abc import Callable
from dataclasses import dataclass

from ...flux_core.families import NANO_AUTOENCODER, NANO_FLUX2_AUTOENCODER, NANO_KLEIN, NANO_KONTEXT
from ...flux_core.nano.paths import NANO_KLEIN_FILES, NANO_KONTEXT_FILES, NanoFiles
from ...flux_core.specs import AutoencoderSpec, FluxFamily
from .text import NanoClipT5, NanoQwen, NanoText


@dataclass(frozen=True, slots=True, kw_only=True)
class NanoVariant:
    """One embedded model: what is trained, and the files it is written to."""

    family: FluxFamily
    autoencoder: AutoencoderSpec
    text: Callable[[], NanoText]
    files: NanoFiles
    text_parts: tuple[tuple[str, str], ...]  # module of the text and its key prefix, per file

    @property
    def two_images(self) -> bool:
        """Whether a second image can show what is asked for."""
        return self.family.references.trained > 1


VARIANTS = {
    "kontext": NanoVariant(
        family=NANO_KONTEXT,
        autoencoder=NANO_AUTOENCODER,
        text=NanoClipT5,
        files=NANO_KONTEXT_FILES,
        text_parts=(("clip", "text_model."), ("t5", "encoder.")),
    ),
    "klein": NanoVariant(
        family=NANO_KLEIN,
        autoencoder=NANO_FLUX2_AUTOENCODER,
        text=NanoQwen,
        files=NANO_KLEIN_FILES,
        text_parts=(("model", "model."),),
    ),
}
