"""Text encoder files as sets of plain tensors: quantised weights, GGUF names, and refusals."""

from pathlib import Path

from ..errors import CheckpointError
from ..text.encoders import LOADER
from .files import Checkpoint
from .gguf_text import with_plain_names
from .kinds import LIBRARIES, identify
from .quantised_layers import PLAIN_FILE, open_plain

# For what is quantised in a way that is not read here.
WAY_OUT = (
    f"choose its bfloat16 or float16 file in {LOADER}, or load this one with the loader it is "
    "made for, such as ComfyUI's own, and wire that one's CLIP to 'Encode Text (FLUX)'."
)
_READ = "float32, bfloat16, float16, float8, NVFP4 as ComfyUI writes it, or GGUF."
# Of tokens: ComfyUI 0.30.0 comfy/ops.py MixedPrecisionOps.Embedding takes them without a scale.
_TABLES = ("embed_tokens.weight", "shared.weight", "token_embedding.weight")
_OTHER_PARTS = ("model.diffusion_model.", "first_stage_model.", "vae.")  # of a whole checkpoint


def open_text(path: Path) -> Checkpoint:
    """Open a text encoder's file: quantised weights read as the numbers they stand for.

    Raises:
        CheckpointError: the file is broken, or quantised in a way that is not read here.
        FamilyMismatchError: it is a GGUF file of another architecture.
    """
    try:
        checkpoint = open_plain(path, others=_OTHER_PARTS, unscaled=_TABLES)
    except CheckpointError as error:
        if error.fix != PLAIN_FILE:
            raise
        raise CheckpointError(error.found, _READ, WAY_OUT) from None
    keys = [key for key in checkpoint.shapes if not key.startswith(_OTHER_PARTS)]
    library = identify(keys, {}, LIBRARIES)
    if library is not None:
        raise CheckpointError(f"{checkpoint.path.name} is {library.title}.", _READ, WAY_OUT)
    return with_plain_names(checkpoint)
