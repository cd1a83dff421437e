"""The two nano models: what their trainings differ in."""

from collections.abc import Callable
from dataclasses import dataclass

from ..families import NANO_AUTOENCODER, NANO_FLUX2_AUTOENCODER, NANO_KLEIN, NANO_KONTEXT
from ..nano.paths import NANO_KLEIN_FILES, NANO_KONTEXT_FILES, NanoFiles
from ..nano.world import SIDE_PX
from ..sampling.sigmas import flux_sigmas
from ..specs import AutoencoderSpec, FluxFamily
from .flow import Density, logit_normal, mixed, one_of
from .nano_text import NanoClipT5, NanoQwen, NanoText


@dataclass(frozen=True, slots=True, kw_only=True)
class NanoVariant:
    """One embedded model."""

    family: FluxFamily
    autoencoder: AutoencoderSpec
    text: Callable[[], NanoText]
    files: NanoFiles
    text_parts: tuple[tuple[str, str], ...]  # a module of the text and its key prefix, per file

    @property
    def two_pictures(self) -> bool:
        """Whether a second picture can show what is asked for."""
        return self.family.references.trained > 1

    def density(self) -> Density:
        """How often each sigma is trained: half of a few-step model's are those it will meet."""
        broad = logit_normal(1.2, 1.3)
        if not self.family.is_step_distilled:
            return broad
        latent, steps = self.family.latent, self.family.default_steps
        tokens = (SIDE_PX // latent.token_px) ** 2
        return mixed(broad, one_of(flux_sigmas(self.family.schedule, tokens, steps)))


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
