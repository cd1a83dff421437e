"""ComfyUI's own FLUX network in our samplers, as a transformer they can run.

Every step goes through `apply_model`, so that weights, patches and wrappers of the MODEL do what
they do under KSampler; our position ids are set by the same patch that `Apply To Model` uses.
`Any` stands for ComfyUI's own classes, which carry no usable types.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import torch
from torch import Tensor

from ...flux_core.errors import SettingError
from ...flux_core.specs import TransformerSpec
from ...flux_core.tokens.native import NativePositions
from ...flux_core.tokens.pack import pack_latent, unpack_tokens
from ...flux_core.types import TokenValues
from ...flux_core.values import Conditioning, Tokens
from ...flux_core.weights.detect import detect_family
from .lora import larger_weights
from .model import WATCH, PositionReferences, native_network
from .skipped import check_skipped, merged_wrappers


class NativeNetwork:
    """A native MODEL as the samplers' Network.

    Args:
        patcher: ComfyUI's ModelPatcher around its FLUX.

    Raises:
        FamilyMismatchError, SettingError: it is not FLUX, or has changes that would be ignored.
    """

    def __init__(self, patcher: Any) -> None:
        self.patcher = patcher
        self._network = network = native_network(patcher)
        self.spec = _spec(network.params, network)
        detected = detect_family(self.spec, _file(patcher), {}, None)
        self.family, self.is_guess = detected.family, detected.guessed
        self.report = f"{self.family.title} in ComfyUI's own network ({detected.known_by})"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it computes in."""
        return self.patcher.get_model_object("manual_cast_dtype") or self._network.dtype

    supports: frozenset[str] = frozenset()  # of `Reference.controls`

    def plans(
        self,
        conditionings: Sequence[Conditioning],
        target: Tokens,
        sigmas: Sequence[float],
        asked: Sequence[float] | None = None,
    ) -> list["NativePlan"]:
        """Makes one plan for each conditioning; ComfyUI computes everything in each step.

        Raises:
            SettingError: something on the MODEL that only ComfyUI's samplers call or provide.
        """
        del asked
        check_skipped(self.patcher)
        _check_inputs(self.patcher)
        for conditioning in conditionings:
            if conditioning.references and self.family.references.isolated:
                raise SettingError(
                    f"{self.family.title} is wired as ComfyUI's own MODEL.",
                    "a network in which references see themselves alone, as it was trained.",
                    "load it with [model loader].",
                )
        levels = torch.as_tensor(sigmas, dtype=torch.float32)
        return [
            NativePlan(
                patcher=self.patcher,
                target=target,
                sigmas=levels,
                inputs=_inputs(conditioning, self.patcher.load_device),
                positions=PositionReferences(
                    NativePositions(
                        references=tuple(one.tokens.ids for one in conditioning.references),
                        text_tokens=conditioning.text.txt.shape[1],
                        target=target.ids,
                    )
                ),
                side=side,
            )
            for side, conditioning in enumerate(conditionings)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class NativePlan:
    """One conditioning, as ComfyUI's network takes it."""

    patcher: Any
    target: Tokens
    sigmas: Tensor
    inputs: dict[str, Any]
    positions: PositionReferences
    side: int  # 0 positive, 1 negative, as in `cond_or_uncond`
    uuid: UUID = field(default_factory=uuid4)  # by which patches tell prompts apart

    @property
    def device(self) -> torch.device:
        """The device it computes on."""
        return self.patcher.load_device

    def velocity(self, x: TokenValues, sigma: float) -> TokenValues:
        """Predicts noise - image for x (B, N, D) at a noise level, float32."""
        return self._velocity(x, torch.tensor(sigma, dtype=torch.float32, device=self.device))

    def _velocity(self, x: TokenValues, sigma: Tensor) -> TokenValues:
        latent = unpack_tokens(x.to(sigma.device).float(), self.target.grid, self.target.latent)
        batch = latent.shape[0]
        inputs = {name: _batched(one, batch) for name, one in self.inputs.items()}
        inputs["transformer_options"] = self._options(sigma)
        levels = sigma.expand(batch)
        model = self.patcher.model
        wrapper = self.patcher.model_options.get("model_function_wrapper")
        if wrapper is None:
            denoised = model.apply_model(latent, levels, **inputs)
        else:
            sides = [self.side]
            call = {"input": latent, "timestep": levels, "c": inputs, "cond_or_uncond": sides}
            denoised = wrapper(model.apply_model, call)
        if getattr(denoised, "shape", None) != latent.shape:
            raise SettingError(
                f"A wrapper on the MODEL gave back a {_described(denoised)}.",
                f"a picture of the shape it was given, {tuple(latent.shape)}.",
                "take the node off that put it there.",
            )
        return pack_latent((latent - denoised.float()) / sigma, self.target.latent)

    def _options(self, sigma: Tensor) -> dict[str, Any]:
        """Returns the transformer_options of ComfyUI's samplers, with our patch added last."""
        options = dict(self.patcher.model_options["transformer_options"])
        patches = dict(options.get("patches", {}))
        others = [
            one for one in patches.get("post_input", []) if not isinstance(one, PositionReferences)
        ]
        patches["post_input"] = [*others, self.positions]
        wrappers = merged_wrappers(self.patcher)
        wrappers.setdefault("apply_model", {})[WATCH] = [self.positions.watch]
        return {
            **options,
            "patches": patches,
            "wrappers": wrappers,
            "cond_or_uncond": [self.side],
            "uuids": [self.uuid],
            "sigmas": sigma.reshape(1),
            "sample_sigmas": self.sigmas,
        }


def _check_inputs(patcher: Any) -> None:
    """Raises for a LoRA that makes the network take more than a noisy image."""
    larger = larger_weights(patcher)
    if larger:
        name, size = next(iter(larger.items()))
        raise SettingError(
            f"A LoRA on the MODEL makes its '{name.removeprefix('diffusion_model.')}' "
            f"{'x'.join(map(str, size))}: it takes a control picture too, as with Canny and Depth.",
            "a model that takes a noisy picture alone.",
            "take that LoRA off, or sample with KSampler and 'InstructPixToPixConditioning'.",
        )


def _inputs(conditioning: Conditioning, device: torch.device) -> dict[str, Any]:
    """Returns a conditioning's parts as keyword arguments of ComfyUI's network."""
    inputs: dict[str, Any] = {"c_crossattn": conditioning.text.txt.to(device)}
    if conditioning.text.pooled is not None:
        inputs["y"] = conditioning.text.pooled.to(device)
    if conditioning.guidance is not None:
        inputs["guidance"] = torch.tensor([conditioning.guidance], device=device)
    if conditioning.references:
        inputs["ref_latents"] = [
            unpack_tokens(one.latent.to_network(one.values).to(device), one.grid, one.latent)
            for one in (reference.tokens for reference in conditioning.references)
        ]
        inputs["ref_latents_method"] = "index"  # either: the ids are replaced by ours
    return inputs


def _batched(value: Any, batch: int) -> Any:
    """Expands tensors of batch 1 to the batch."""
    if isinstance(value, list):
        return [_batched(one, batch) for one in value]
    return value.expand(batch, *value.shape[1:]) if isinstance(value, Tensor) else value


def _described(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{type(value).__name__} of {tuple(shape)}"


def _file(patcher: Any) -> Path:
    """The file a MODEL came from, if its loader tells."""
    match getattr(patcher, "cached_patcher_init", None):
        case (_, (str() as path, *_), *_):
            return Path(path)
        case _:
            return Path("MODEL.safetensors")


def _spec(params: Any, network: Any) -> TransformerSpec:
    """Reads the shape of ComfyUI's network."""
    return TransformerSpec(
        hidden=params.hidden_size,
        double_blocks=params.depth,
        single_blocks=params.depth_single_blocks,
        mlp_ratio=params.mlp_ratio,
        in_channels=network.in_channels,
        out_channels=network.out_channels,
        context_width=params.context_in_dim,
        pooled_width=params.vec_in_dim or 0,
        has_guidance=params.guidance_embed,
        axes_dim=tuple(params.axes_dim),
        theta=float(params.theta),
        has_bias=params.ops_bias,
        is_gated=params.mlp_silu_act,
        shares_modulation=params.global_modulation,
    )
