"""Tensors that can be computed again, under ComfyUI's memory management.

ComfyUI sees a model like others: it may push it off the device for another one, and bring it back.
"""

import torch
from torch import Tensor, nn
from typing_extensions import override

from .. import host

_SHARE_TO_SPILL = 0.25  # of the CPU's free memory, that what is pushed off may fill at once


class ReplaceablePatcher(host.Patcher):
    """Manages a module's buffers one by one, wherever they are.

    What is where is read from the tensors themselves, so no count can be out of step with them.
    Pushed off their device they wait in pinned memory, or in plain memory where ComfyUI cannot
    pin; they are dropped if they would fill too much of it, and when ComfyUI unloads them while
    no prompt runs, which is what POST /free does. A user of the module looks before it reads.
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
        """Name the device, so that ComfyUI makes room for what is elsewhere, and no more."""
        return self.load_device

    @override
    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Bring what fits into so many more bytes; the rest stays where it waits.

        Returns:
            How many bytes more are on the device.
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
                here = tensor.to(device_to)  # while it is pinned, which makes the copy fast
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
        """Push off what frees so many bytes; drop all of it where it has no place to wait.

        Returns:
            How many bytes of the device are free now.
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
        """Push everything off; not `unpatch_all`: it is loaded again at once, or dies."""
        if unpatch_all and not host.is_prompt_running():
            self.drop()
        elif unpatch_all and self.load_device != self.offload_device:
            self.partially_unload(self.offload_device, self.loaded_size())
        return self.model

    def drop(self) -> None:
        """Free every buffer."""
        self.unpin_all_weights()
        for name, _ in list(self.model.named_buffers()):
            self._set(name, None)

    def _set(self, name: str, tensor: Tensor | None) -> None:
        path, _, attribute = name.rpartition(".")
        setattr(self.model.get_submodule(path), attribute, tensor)


def _is_on(tensor: Tensor, device: torch.device) -> bool:
    return tensor.device.type == device.type  # one says "mps", the other "mps:0"
