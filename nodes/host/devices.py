"""ComfyUI's devices: where each part computes, in which dtype and layers, and how much is free."""

from typing import cast

import comfy.model_management as mm
import comfy.ops
import comfy.quant_ops
import torch
from torch import Tensor

from ...flux_core.memory import require_memory
from ...flux_core.operations import Operations

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DTYPE_CHOICES = ["auto", *DTYPES]
_SHARE_OF_RAM = 0.5  # float32 on a CPU only if the weights fill at most this share of free memory


def operations() -> Operations:
    """The layers that ComfyUI can load and stream, with weights in the compute dtype."""
    return comfy.ops.disable_weight_init


def stored_operations(dtype: torch.dtype) -> Operations | None:
    """The layers that also hold quantised weights, and dequantise them to this dtype.

    Activations are not quantised: ComfyUI's fast float8 matrix products would round them. None
    where ComfyUI runs without comfy-kitchen, which implements such weights.
    """
    if not issubclass(comfy.quant_ops.QuantizedTensor, Tensor):
        return None
    return comfy.ops.mixed_precision_ops(compute_dtype=dtype, full_precision_mm=True)


def model_devices() -> tuple[torch.device, torch.device]:
    """The load and offload device of a transformer."""
    return mm.get_torch_device(), mm.unet_offload_device()


def text_devices() -> tuple[torch.device, torch.device]:
    """The load and offload device of text encoders."""
    return mm.text_encoder_device(), mm.text_encoder_offload_device()


def autoencoder_devices() -> tuple[torch.device, torch.device]:
    """The load and offload device of an autoencoder."""
    return mm.vae_device(), mm.vae_offload_device()


def model_dtype(choice: str, parameters: int) -> torch.dtype:
    """Chooses the dtype of a transformer's weights and activations; `parameters` is its size."""
    device, _ = model_devices()
    order = [torch.bfloat16, torch.float16, torch.float32]
    own = mm.unet_dtype(device, parameters, supported_dtypes=order)
    return _chosen(choice, own, device, parameters)


def text_dtype(choice: str, parameters: int) -> torch.dtype:
    """Chooses the dtype of text encoders."""
    device, _ = text_devices()
    own = torch.float32 if mm.is_device_cpu(device) else torch.float16
    if mm.should_use_bf16(device):
        own = torch.bfloat16
    return _chosen(choice, own, device, parameters)


def autoencoder_dtype(choice: str) -> torch.dtype:
    """Chooses the dtype of an autoencoder."""
    device, _ = autoencoder_devices()
    own = mm.vae_dtype(device, [torch.bfloat16, torch.float32])
    return _chosen(choice, own, device, 0)


def _chosen(choice: str, own: torch.dtype, device: torch.device, parameters: int) -> torch.dtype:
    """The user's choice, else ComfyUI's; bfloat16 on a CPU without room for float32."""
    if choice in DTYPES:
        return DTYPES[choice]
    if own not in DTYPES.values():
        own = torch.bfloat16
    room = free_bytes(torch.device("cpu")) * _SHARE_OF_RAM
    if mm.is_device_cpu(device) and own == torch.float32 and parameters * 4 > room:
        return torch.bfloat16
    return own


def to_outputs(tensor: Tensor) -> Tensor:
    """Moves a result to the device on which ComfyUI keeps node outputs."""
    return tensor.to(mm.intermediate_device())


def available_bytes(device: torch.device) -> float:
    """Bytes that are free on a device, or that ComfyUI could free by unloading models."""
    free = free_bytes(device)
    if mm.is_device_cpu(device):
        return free
    return free + sum(
        one.model_loaded_memory()
        for one in mm.current_loaded_models
        if one.device == device and one.model is not None
    )


def free_bytes(device: torch.device) -> float:
    """Bytes that are free on a device, without unloading anything."""
    return cast(float, mm.get_free_memory(device))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the CPU, had no memory left."""
    if mm.is_oom(error) or isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def require_room(needed: int, job: str, fix: str) -> None:
    """Raises for a tensor that the CPU's memory cannot hold.

    Raises:
        MemoryLimitError: it needs more bytes than there are.
    """
    require_memory(needed, available_bytes(torch.device("cpu")), job, fix)
