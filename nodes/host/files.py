"""ComfyUI's model folders: the models in them, and the path of each."""

from pathlib import Path

import comfy.model_management as mm
import folder_paths

from ...flux_core.errors import CheckpointError
from ...flux_core.nano.paths import DIFFUSION_MODELS

_TRANSFORMERS = "diffusion_models"  # the folder of transformers
_WITH_GGUF = (_TRANSFORMERS, "text_encoders")  # where our loaders read GGUF


def add_nano_models() -> None:
    """Adds the embedded models to the list of diffusion models, after the user's own."""
    folder_paths.add_model_folder_path(_TRANSFORMERS, str(DIFFUSION_MODELS), is_default=False)


def model_names(folder: str) -> list[str]:
    """Lists the models in one of ComfyUI's folders, with the GGUF files that ComfyUI ignores."""
    names = folder_paths.get_filename_list(folder)
    if folder not in _WITH_GGUF:
        return names
    found: set[str] = set()
    for path in folder_paths.get_folder_paths(folder):
        inside, _ = folder_paths.recursive_search(path, excluded_dir_names=[".git"])
        found.update(folder_paths.filter_files_extensions(inside, [".gguf"]))
    return [*names, *sorted(found.difference(names))]


def model_path(folder: str, name: str) -> Path:
    """Returns the file of a listed model.

    Raises:
        CheckpointError: it is not listed, or has vanished.
    """
    path = folder_paths.get_full_path(folder, name) if name in model_names(folder) else None
    if path is None:
        raise CheckpointError(
            f"'{name}' is not in ComfyUI's {folder} folders.",
            "a file that is there.",
            "put it back, or press R to refresh the lists and choose another.",
        )
    return Path(path)


def native_tokenizers() -> tuple[Path, Path]:
    """The folders of CLIP-L's and T5's tokenizers, which ComfyUI ships."""
    package = Path(mm.__file__).parent
    return package / "sd1_tokenizer", package / "text_encoders" / "t5_tokenizer"


def native_qwen_tokenizer() -> Path:
    """The folder of Qwen's tokenizer, which ComfyUI ships."""
    return Path(mm.__file__).parent / "text_encoders" / "qwen25_tokenizer"
