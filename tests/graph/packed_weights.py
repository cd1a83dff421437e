"""What GGUF loaders do, built anew for a test: imported once ComfyUI can be.

Weights are tensors of another shape than they say, layers are custom operations that unpack them
at every use, and the MODEL is a ModelPatcher of another class, which hangs LoRAs on the packed
weights instead of changing them.
"""

from typing import Any

import comfy.lora
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch


class Packed(torch.Tensor):
    """Rows of int8 with their float32 step behind them; `shape` is the weight's own."""

    hung: Any = ()

    @property
    def shape(self) -> Any:
        rows, width = self.size()
        return torch.Size((rows, width - 4))

    def unpacked(self) -> torch.Tensor:
        stored = self.as_subclass(torch.Tensor)
        step = stored[:, -4:].contiguous().view(torch.float32)
        return stored[:, :-4].contiguous().view(torch.int8).float() * step


def pack(weight: torch.Tensor) -> Packed:
    step = weight.abs().amax(1, keepdim=True).clamp(min=1e-9) / 127
    codes = (weight / step).round().to(torch.int8).view(torch.uint8)
    return torch.cat((codes, step.view(torch.uint8)), dim=1).as_subclass(Packed)


class Linear(comfy.ops.manual_cast.Linear):
    """No weight until one is loaded; a packed one is unpacked, and patched, at every use."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True, **_: Any) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = inputs, outputs
        self.weight = self.bias = None

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name in ("weight", "bias"):
            if prefix + name in state:
                held = torch.nn.Parameter(state[prefix + name], requires_grad=False)
                setattr(self, name, held)

    def forward_comfy_cast_weights(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if isinstance(weight, Packed):
            hung, weight = weight.hung, weight.unpacked()
            for patches, key in hung:
                weight = comfy.lora.calculate_weight(patches, weight, key)
        bias = None if self.bias is None else self.bias.to(x)
        return torch.nn.functional.linear(x, weight.to(x), bias)


class Operations(comfy.ops.manual_cast):
    """The layers of a packed network."""

    Linear = Linear


class PackedPatcher(comfy.model_patcher.ModelPatcher):
    """Hangs patches on packed weights; all else is changed as ever."""

    def patch_weight_to_device(self, key: str, *args: Any, **kwargs: Any) -> Any:
        weight = comfy.utils.get_attr(self.model, key)
        if key in self.patches and isinstance(weight, Packed):
            weight.hung = [(self.patches[key], key)]
            return None
        return super().patch_weight_to_device(key, *args, **kwargs)

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> Any:
        for weight in self.model.parameters() if unpatch_weights else ():
            if isinstance(weight, Packed):
                weight.hung = ()
        return super().unpatch_model(device_to, unpatch_weights)

    def load(self, *args: Any, **kwargs: Any) -> None:
        super().load(*args, **{**kwargs, "force_patch_weights": True})

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        made = comfy.model_patcher.ModelPatcher.clone(self, *args, **kwargs)
        made.__class__ = PackedPatcher
        return made
