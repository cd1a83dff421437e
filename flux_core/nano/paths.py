"""Where the embedded models' files lie."""

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
DIFFUSION_MODELS = FOLDER / "diffusion_models"  # the pack adds it to ComfyUI's folder of that name
CLIP_TOKENIZER = FOLDER / "clip_tokenizer"
T5_TOKENIZER = FOLDER / "t5_tokenizer"
QWEN_TOKENIZER = FOLDER / "qwen_tokenizer"


@dataclass(frozen=True, slots=True)
class NanoFiles:
    """The files of one embedded model."""

    transformer: Path
    autoencoder: Path
    text_encoders: tuple[Path, ...]


NANO_KONTEXT_FILES = NanoFiles(
    transformer=DIFFUSION_MODELS / "glassbox_nano_kontext.safetensors",
    autoencoder=FOLDER / "glassbox_nano_autoencoder.safetensors",
    text_encoders=(
        FOLDER / "glassbox_nano_clip.safetensors",
        FOLDER / "glassbox_nano_t5.safetensors",
    ),
)
NANO_KLEIN_FILES = NanoFiles(
    transformer=DIFFUSION_MODELS / "glassbox_nano_klein.safetensors",
    autoencoder=FOLDER / "glassbox_nano_klein_autoencoder.safetensors",
    text_encoders=(FOLDER / "glassbox_nano_qwen3.safetensors",),
)
FILES = {"nano-kontext": NANO_KONTEXT_FILES, "nano-klein": NANO_KLEIN_FILES}
