"""Tensors that can be computed again, under ComfyUI's memory management.

To ComfyUI they are a model like any other, which it may offload for another one and load again.
"""

import torch
from torch import Tensor, nn
from typing_extensions import override

from .. import host

_SHARE_TO_SPILL = 0.25  # of the CPU's free memory that one offload may fill


class ReplaceablePatcher(host.Patcher):
    """Manages a module's buffers one by one, wherever they are.

    Sizes and devices are read from the tensors themselves, so no count can be out of date.
    Offloaded buffers go to pinned memory, or to plain memory where ComfyUI cannot pin. They are
    dropped if they would fill too much of it, and when ComfyUI unloads them while no prompt runs,
    as POST /free does. A user of the module checks that they are there before reading them.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        super().__init__(module, load_device=device, offload_device=torch.device("cpu"))

    @override
    def model_size(self) -> int:
        return sum(one.nbytes for one in self.model.buffers())

    @override
    def loaded_size(self) -> int:
        return sum(one.nbytes for one in self.model.buffers() if _is_on(one, self.load_device))

    @override
    def current_loaded_device(self) -> torch.device:
        """The load device, so that ComfyUI makes room only for what is not on it yet."""
        return self.load_device

    @override
    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Loads the buffers that fit into `extra_memory` bytes; the rest stays offloaded.

        Returns:
            How many more bytes are on the device.
        """
        if extra_memory < 0:
            return -self.partially_unload(self.offload_device, -extra_memory)
        moved = 0
        for name, tensor in list(self.model.named_buffers()):
            if _is_on(tensor, device_to):
                continue
            if moved + tensor.nbytes > extra_memory:
                break
            try:
                here = tensor.to(device_to)  # still pinned, which makes the copy fast
            except RuntimeError as error:
                if not host.is_out_of_memory(error):
                    raise
                break
            self.unpin_weight(name)
            self._set(name, here)
            moved += tensor.nbytes
        return moved

    @override
    def partially_unload(
        self, device_to: torch.device, memory_to_free: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Offloads enough buffers to free so many bytes; drops all where the CPU has no room.

        Returns:
            How many bytes of the device were freed.
        """
        loaded = self.loaded_size()
        if min(memory_to_free, loaded) > host.free_bytes(device_to) * _SHARE_TO_SPILL:
            self.drop()
            return loaded
        freed = 0
        for name, tensor in list(self.model.named_buffers()):
            if freed >= memory_to_free:
                break
            if _is_on(tensor, device_to):
                continue
            self._set(name, tensor.to(device_to))
            self.pin_weight_to_device(name)
            freed += tensor.nbytes
        return freed

    @override
    def detach(self, unpatch_all: bool = True) -> nn.Module:
        """Offloads every buffer if `unpatch_all`; else the caller loads it again, or frees it."""
        if unpatch_all and not host.is_prompt_running():
            self.drop()
        elif unpatch_all and self.load_device != self.offload_device:
            self.partially_unload(self.offload_device, self.loaded_size())
        return self.model

    def drop(self) -> None:
        """Frees every buffer."""
        self.unpin_all_weights()
        for name, _ in list(self.model.named_buffers()):
            self._set(name, None)

    def _set(self, name: str, tensor: Tensor | None) -> None:
        path, _, attribute = name.rpartition(".")
        setattr(self.model.get_submodule(path), attribute, tensor)


def _is_on(tensor: Tensor, device: torch.device) -> bool:
    return tensor.device.type == device.type  # one says "mps", the other "mps:0"
