"""Probe: tensors that can be computed again, pushed about by ComfyUI's memory management.

The device is made up: its tensors are the CPU's and say they are elsewhere, and its free memory
is counted. What decides is ComfyUI's own `load_models_gpu` and `free_memory`.
"""

import gc
import importlib
import sys
import types
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import probe

FAR = torch.device("cuda", 0)
TENSOR, COUNT, TOTAL = 1000, 8, 10_000  # bytes of one, tensors kept, bytes of the device
Answer = dict[str, Any]
_to = torch.Tensor.to


class FarTensor(torch.Tensor):
    """Says that it is on the made-up device."""

    @property
    def device(self) -> torch.device:
        return FAR


class World:
    """ComfyUI with a made-up device; `ram` is what the CPU has free."""

    def __init__(self) -> None:
        self.ram, self.room = 10**9, 10**9  # room: tensors that still fit, whatever is counted
        self.pinned: set[int] = set()
        self.mm = importlib.import_module("comfy.model_management")
        self.replaceable = importlib.import_module(f"{probe.PACK}.nodes.runtime.replaceable")
        self.kept = importlib.import_module(f"{probe.PACK}.nodes.runtime.reference_cache")
        self.is_running = True
        importlib.import_module(f"{probe.PACK}.nodes.host").is_prompt_running = lambda: (
            self.is_running
        )
        torch.Tensor.to = lambda tensor, *to, **how: self.move(tensor, *to, **how)
        self.mm.get_free_memory = self.free
        self.mm.vram_state = self.mm.VRAMState.NORMAL_VRAM
        self.mm.minimum_inference_memory = self.mm.extra_reserved_memory = lambda: 0
        self.mm.pin_memory, self.mm.unpin_memory = self.pin, self.unpin

    def move(self, tensor: Any, *to: Any, **how: Any) -> Any:
        """What Tensor.to does, to and from the made-up device too."""
        if not to or not isinstance(to[0], torch.device):
            return _to(tensor, *to, **how)
        if to[0] == tensor.device:
            return tensor
        if to[0] != FAR:
            return tensor.as_subclass(torch.Tensor).clone()
        self.room -= 1
        if self.room < 0:
            raise torch.OutOfMemoryError
        return tensor.clone().as_subclass(FarTensor)

    def free(self, device: Any = None, torch_free_too: bool = False) -> Any:
        """Bytes free on a device."""
        free = self.ram
        if device == FAR:
            free = TOTAL - sum(one.model_loaded_memory() for one in self.mm.current_loaded_models)
        return (free, free) if torch_free_too else free

    def pin(self, tensor: Any) -> bool:
        assert tensor.device.type == "cpu"
        self.pinned.add(tensor.data_ptr())
        return True

    def unpin(self, tensor: Any) -> bool:
        self.pinned.remove(tensor.data_ptr())
        return True

    def make(self, count: int = COUNT) -> Any:
        """A patcher of tensors that wait for the made-up device, each of another value."""
        tensors = [
            torch.full((1, 1, 1, TENSOR), number, dtype=torch.uint8) for number in range(count)
        ]
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        kept = [types.SimpleNamespace(key=key, value=value) for key, value in pairs]
        return self.replaceable.ReplaceablePatcher(self.kept.CachedReferences(kept), FAR)

    def load(self, *patchers: Any) -> None:
        self.mm.load_models_gpu(list(patchers))

    def state(self, patcher: Any) -> Answer:
        """Tensors on the device, waiting pinned, and whether all are whole and can be read."""
        seen = self.kept._CachedKeyValues(patcher, [])
        values = [tensor for one in seen for tensor in (one.key, one.value)]
        whole = [
            tensor.device == FAR and bool((tensor == i).all()) for i, tensor in enumerate(values)
        ]
        listed = any(one.model is patcher for one in self.mm.current_loaded_models)
        return {
            "loaded": patcher.loaded_size() // TENSOR,
            "pinned": len(self.pinned),
            "whole": sum(whole),
            "listed": listed,
        }


def main(_: Path) -> Answer:
    probe.load_pack()
    gc.disable()
    world = World()
    return _pushed(world) | _short(world) | _unloaded(world)


def _pushed(world: World) -> Answer:
    """Another model takes some of the device, then nearly all, and they come back."""
    kept = world.make()
    world.load(kept)
    states = [world.state(kept)]
    some = world.make(4)
    world.load(some)
    states.append(world.state(kept))
    del some
    world.load(kept)
    states.append(world.state(kept))
    most = world.make(10)
    world.load(most)
    states.append(world.state(kept))
    world.load(most, kept)  # both are needed at once: what does not fit is read from where it is
    states.append(world.state(kept))
    del most
    world.load(kept)
    states.append(world.state(kept))
    return {"pushed": states}


def _short(world: World) -> Answer:
    """No room for all on the device, then none to wait in."""
    kept = world.make()
    world.load(kept)
    most = world.make(10)
    world.load(most)
    del most
    world.room = 3
    world.load(kept)
    world.room = 10**9
    states = [world.state(kept)]
    world.load(kept)
    world.ram = TENSOR
    most = world.make(10)
    world.load(most)
    states.append(world.state(kept))
    world.ram = 10**9
    return {"short": states, "short_empty": kept.model.is_empty}


def _unloaded(world: World) -> Answer:
    """What POST /free does; and death while they wait."""
    kept, other = world.make(), world.make(2)
    world.load(kept)
    world.is_running = False
    world.mm.free_memory(1e30, FAR)
    states = [world.state(kept)]
    world.is_running = True
    world.load(other)
    world.mm.free_memory(1e30, FAR)
    waiting = len(world.pinned)
    del other
    return {"unloaded": states, "waiting": waiting, "pinned_after_death": len(world.pinned)}


if __name__ == "__main__":
    probe.run(main)
