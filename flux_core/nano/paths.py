"""Where the embedded models' files lie."""

from pathlib import Path

FOLDER = Path(__file__).parent
DIFFUSION_MODELS = FOLDER / "diffusion_models"  # the pack adds it to ComfyUI's folder of that name

TRANSFORMER = DIFFUSION_MODELS / "glassbox_nano_kontext.safetensors"
AUTOENCODER = FOLDER / "glassbox_nano_autoencoder.safetensors"
CLIP = FOLDER / "glassbox_nano_clip.safetensors"
T5 = FOLDER / "glassbox_nano_t5.safetensors"
CLIP_TOKENIZER = FOLDER / "clip_tokenizer"
T5_TOKENIZER = FOLDER / "t5_tokenizer"

KLEIN_TRANSFORMER = DIFFUSION_MODELS / "glassbox_nano_klein.safetensors"
KLEIN_AUTOENCODER = FOLDER / "glassbox_nano_klein_autoencoder.safetensors"
QWEN3 = FOLDER / "glassbox_nano_qwen3.safetensors"
QWEN_TOKENIZER = FOLDER / "qwen_tokenizer"
