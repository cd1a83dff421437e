"""The only door to ComfyUI: files, devices, memory, progress, previews and cancelling.

`Any` stands for ComfyUI's own classes, which carry no usable types.
"""

import logging
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import comfy.latent_formats
import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.quant_ops
import comfy.utils
import comfy.weight_adapter
import folder_paths
import latent_preview
import torch
from comfy_execution.utils import get_executing_context
from torch import Tensor, nn

from ..flux_core.errors import CheckpointError, SettingError
from ..flux_core.memory import require_memory
from ..flux_core.nano.paths import DIFFUSION_MODELS
from ..flux_core.operations import Operations
from ..flux_core.sampling.solver import Step
from ..flux_core.specs import LatentSpec
from ..flux_core.tokens.pack import unpack_tokens
from ..flux_core.values import Tokens
from .settings import in_words

if TYPE_CHECKING:
    from ..flux_core.weights.lora import LoraPart

logger = logging.getLogger(__name__)

# ComfyUI's classic patcher, to build on. Models are wrapped by `wrap`, which asks ComfyUI's choice.
Patcher = comfy.model_patcher.ModelPatcher

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DTYPE_CHOICES = ["auto", *DTYPES]
_TRANSFORMERS = "diffusion_models"  # the folder of transformers
_WITH_GGUF = (_TRANSFORMERS, "text_encoders")  # where loaders read GGUF
_PREVIEW_PX = 512  # the side ComfyUI shrinks previews to
MAX_SIDE_PX = 16384  # ComfyUI's own MAX_RESOLUTION
_SHARE_OF_RAM = 0.5  # float32 on a CPU only if the weights fill at most this much of free memory
_PREVIEWED = (comfy.latent_formats.Flux, comfy.latent_formats.Flux2)


# ---- files


def add_nano_models() -> None:
    """Let every loader of diffusion models see the embedded one; what is listed stays first."""
    folder_paths.add_model_folder_path(_TRANSFORMERS, str(DIFFUSION_MODELS), is_default=False)


def model_names(folder: str) -> list[str]:
    """List the models in one of ComfyUI's folders, and GGUF files that it leaves out."""
    names = folder_paths.get_filename_list(folder)
    if folder not in _WITH_GGUF:
        return names
    found: set[str] = set()
    for place in folder_paths.get_folder_paths(folder):
        inside, _ = folder_paths.recursive_search(place, excluded_dir_names=[".git"])
        found.update(folder_paths.filter_files_extensions(inside, [".gguf"]))
    return [*names, *sorted(found.difference(names))]


def model_path(folder: str, name: str) -> Path:
    """Find a listed model's file.

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
    """Give the folders of CLIP-L's and T5's tokenizers, which ComfyUI itself carries."""
    package = Path(mm.__file__).parent
    return package / "sd1_tokenizer", package / "text_encoders" / "t5_tokenizer"


def native_qwen_tokenizer() -> Path:
    """Give the folder of Qwen's tokenizer, which ComfyUI itself carries."""
    return Path(mm.__file__).parent / "text_encoders" / "qwen25_tokenizer"


# ---- devices and dtypes


def operations() -> Operations:
    """Give the layers that ComfyUI can move and stream; weights are stored as they compute."""
    return comfy.ops.disable_weight_init


def stored_operations(dtype: torch.dtype) -> Operations | None:
    """Give those that hold quantised weights as well, and make numbers of this dtype of them.

    Activations stay as they are: ComfyUI's fast products of float8 would round them. None where
    ComfyUI runs without comfy-kitchen, which holds such weights.
    """
    if not issubclass(comfy.quant_ops.QuantizedTensor, Tensor):
        return None
    return comfy.ops.mixed_precision_ops(compute_dtype=dtype, full_precision_mm=True)


def model_devices() -> tuple[torch.device, torch.device]:
    """Where a transformer computes, and where it waits."""
    return mm.get_torch_device(), mm.unet_offload_device()


def text_devices() -> tuple[torch.device, torch.device]:
    """Where text encoders compute, and where they wait."""
    return mm.text_encoder_device(), mm.text_encoder_offload_device()


def autoencoder_devices() -> tuple[torch.device, torch.device]:
    """Where an autoencoder computes, and where it waits."""
    return mm.vae_device(), mm.vae_offload_device()


def model_dtype(choice: str, parameters: int) -> torch.dtype:
    """Choose the dtype a transformer of so many parameters is stored in and computes in."""
    device, _ = model_devices()
    order = [torch.bfloat16, torch.float16, torch.float32]
    own = mm.unet_dtype(device, parameters, supported_dtypes=order)
    return _chosen(choice, own, device, parameters)


def text_dtype(choice: str, parameters: int) -> torch.dtype:
    """Choose the dtype of text encoders."""
    device, _ = text_devices()
    own = torch.float32 if mm.is_device_cpu(device) else torch.float16
    if mm.should_use_bf16(device):
        own = torch.bfloat16
    return _chosen(choice, own, device, parameters)


def autoencoder_dtype(choice: str) -> torch.dtype:
    """Choose the dtype of an autoencoder."""
    device, _ = autoencoder_devices()
    own = mm.vae_dtype(device, [torch.bfloat16, torch.float32])
    return _chosen(choice, own, device, 0)


def _chosen(choice: str, own: torch.dtype, device: torch.device, parameters: int) -> torch.dtype:
    """Follow the user, else ComfyUI; on a CPU without room for float32 take bfloat16."""
    if choice in DTYPES:
        return DTYPES[choice]
    if own not in DTYPES.values():
        own = torch.bfloat16
    room = free_bytes(torch.device("cpu")) * _SHARE_OF_RAM
    if mm.is_device_cpu(device) and own == torch.float32 and parameters * 4 > room:
        return torch.bfloat16
    return own


def latent_samples(latent: Any) -> Tensor:
    """Take the tensor out of a LATENT.

    Raises:
        SettingError: it carries something that tokens cannot, and that would be lost.
    """
    if latent.get("noise_mask") is not None:
        raise SettingError(
            "The latent carries a noise mask, which tokens cannot carry.",
            "a latent without one.",
            "take 'Set Latent Noise Mask' or 'VAE Encode (for Inpainting)' off this wire.",
        )
    nested = not isinstance(latent["samples"], Tensor)
    if latent.get("type") is not None or nested:
        several = "several at once, as videos with sound have them"
        raise SettingError(
            f"The latent is {several if nested else 'of type ' + repr(latent['type'])}.",
            "the latent of a picture.",
            "encode a picture with FLUX's autoencoder.",
        )
    if latent.get("batch_index") is not None:
        tell(["The latent's batch_index is ignored: tokens carry no noise indices."])
    return latent["samples"]


def to_outputs(tensor: Tensor) -> Tensor:
    """Bring a result to where ComfyUI keeps what travels between nodes."""
    return tensor.to(mm.intermediate_device())


# ---- models


def wrap(module: nn.Module, devices: tuple[torch.device, torch.device]) -> Any:
    """Hand a module to ComfyUI's model management; returns its patcher."""
    module.eval().requires_grad_(False)
    mm.archive_model_dtypes(module)
    held: Any = module
    for layer in quantised_layers(module).values():  # room for its numbers beside what is stored
        held.manual_cast_dtype = layer.weight.dtype
    # Looked up here: ComfyUI binds another class to this name when it starts with DynamicVRAM.
    return comfy.model_patcher.CoreModelPatcher(
        module, load_device=devices[0], offload_device=devices[1]
    )


def changed(patcher: Any, parts: Sequence["LoraPart"]) -> Any:
    """Clone a patcher, and put on the clone those changes that are of its model.

    ComfyUI adds them to the weights when it loads the clone, in its own dtype for LoRAs: float32,
    or float16 on GPUs that compute well in it. It takes them off for another clone.
    """
    clone = patcher.clone()
    state = patcher.model.state_dict()
    # One call takes one strength, and each slice once.
    calls: dict[float, list[dict[object, Any]]] = {}
    for part in parts:
        if part.key not in state:
            continue
        place = part.key if part.whole else (part.key, (0, part.start, part.rows))
        groups = calls.setdefault(part.scale, [])
        group = next((one for one in groups if place not in one), None)
        if group is None:
            group = {}
            groups.append(group)
        group[place] = _patch(part)
    for scale, groups in calls.items():
        for group in groups:
            clone.add_patches(group, scale)
    return clone


def quantised_layers(module: nn.Module) -> dict[str, Any]:
    """Name the layers whose weights stay as they are stored."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(getattr(layer, "weight", None), comfy.quant_ops.QuantizedTensor)
    }


def _patch(part: "LoraPart") -> Any:
    """Say a change in ComfyUI's words."""
    from ..flux_core.weights.lora import Kronecker, LowRank

    change = part.change
    if isinstance(change, LowRank):
        weights = (change.up, change.down, None, None, None, None)
        return comfy.weight_adapter.LoRAAdapter(set(), weights)
    if isinstance(change, Kronecker):
        factors = (change.first, change.second, *[None] * 7)
        return comfy.weight_adapter.LoKrAdapter(set(), factors)
    return ("diff", (change.values,))


def bring(patchers: Sequence[Any], activations: int) -> torch.device:
    """Load models to where they compute, with room for so many bytes of activations."""
    mm.load_models_gpu(list(patchers), memory_required=activations)
    return patchers[0].load_device


def bring_whole(patcher: Any) -> None:
    """Load a model with parameters outside ComfyUI's layers, such as T5's norms.

    ComfyUI leaves those behind when it loads a model in part; they are small, so they follow.
    """
    device = bring([patcher], 0)
    for module in patcher.model.modules():
        if not hasattr(module, "comfy_cast_weights"):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(device)


def send_away(patcher: Any) -> None:
    """Free what one model holds where it computes, and leave every other model in place."""
    if patcher.is_dynamic():  # keeps its pinned copy in RAM, so that it comes back fast
        patcher.partially_unload(patcher.offload_device, patcher.loaded_size())
        return
    loaded = mm.current_loaded_models
    if any(one.model is patcher for one in loaded):
        others = [one for one in loaded if one.model is not patcher]
        mm.free_memory(1e30, patcher.load_device, keep_loaded=others)


def available_bytes(device: torch.device) -> float:
    """Count what is free on a device, and what ComfyUI could free there by unloading models."""
    free = free_bytes(device)
    if mm.is_device_cpu(device):
        return free
    return free + sum(
        one.model_loaded_memory()
        for one in mm.current_loaded_models
        if one.device == device and one.model is not None
    )


def free_bytes(device: torch.device) -> float:
    """Count what is free on a device, without unloading anything."""
    return cast(float, mm.get_free_memory(device))


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether a device, or the CPU, had no memory left."""
    if mm.is_oom(error) or isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def attention_backend() -> str:
    """Name what PyTorch may compute attention with: what was kept under another is not reused."""
    cuda = torch.backends.cuda
    allowed = {
        "flash": cuda.flash_sdp_enabled(),
        "memory efficient": cuda.mem_efficient_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled(),
    }
    return ", ".join(name for name, is_allowed in allowed.items() if is_allowed)


def require_room(needed: int, job: str, fix: str) -> None:
    """Refuse a tensor that the CPU's memory cannot hold.

    Raises:
        MemoryLimitError: it needs more bytes than there are.
    """
    require_memory(needed, available_bytes(torch.device("cpu")), job, fix)


# ---- running


def tell(messages: Sequence[str]) -> None:
    """Show notes on the node that runs."""
    from server import PromptServer

    server, context = getattr(PromptServer, "instance", None), get_executing_context()
    if messages and server is not None and context is not None:
        server.send_progress_text(
            "\n".join(map(in_words, messages)), context.node_id, server.client_id
        )


def is_prompt_running() -> bool:
    """Tell whether ComfyUI works on a prompt; what it asks for otherwise, a person asked for."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    return server is not None and bool(server.prompt_queue.get_current_queue_volatile()[0])


def stop_if_cancelled() -> None:
    """Raise ComfyUI's interruption if the user pressed cancel."""
    mm.throw_exception_if_processing_interrupted()


def drive(steps: Iterator[Step], target: Tokens, device: torch.device) -> Step:
    """Run a sampler to its last step: progress, previews, and cancelling between steps.

    The sampler is closed however this ends, so nothing it holds outlives a cancel.
    """
    previewer = latent_preview.get_previewer(device, _latent_format(target.latent))
    last: Step | None = None
    bar: Any = None
    try:
        stop_if_cancelled()
        for last in steps:
            bar = bar or comfy.utils.ProgressBar(last.steps)
            bar.update_absolute(last.index + 1, last.steps, _preview(previewer, last, target))
            stop_if_cancelled()
    finally:
        if isinstance(steps, Generator):
            steps.close()
    assert last is not None  # sigmas hold at least one step
    return last


def _preview(previewer: Any, step: Step, target: Tokens) -> Any:
    if previewer is None:
        return None
    short, long = sorted(target.grid)
    if long >= _PREVIEW_PX * short:
        return None  # ComfyUI would shrink the short side to nothing, and stop its server
    latent = unpack_tokens(step.denoised, target.grid, target.latent)
    return previewer.decode_latent_to_preview_image("JPEG", latent)


def _latent_format(spec: LatentSpec) -> Any:
    """Describe a latent to ComfyUI's previews, in its own words where those fit."""
    described: Any = next(one for one in _PREVIEWED if one.latent_channels == spec.channels)()
    if spec.preview_rgb:
        *described.latent_rgb_factors, described.latent_rgb_factors_bias = spec.preview_rgb
        described.taesd_decoder_name = None  # that one decodes the published model's latents
    return described
