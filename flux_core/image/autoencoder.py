"""The FLUX autoencoder: pixels to latent and back.

Parameter names are the published ones, so a checkpoint loads without a key map.
Source: black-forest-labs/flux@802fb47 src/flux/modules/autoencoder.py;
black-forest-labs/flux2@ab7cca6 src/flux2/autoencoder.py, whose bottleneck is patched and
batch-normalised. Deviations: neither direction applies the transformer's scale and shift, which
belong to the plan (LatentSpec); the log variance of a sample is clamped as in huggingface/diffusers
0.42.1.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ShapeError
from ..operations import Operations, torch_operations
from ..specs import AutoencoderSpec
from ..types import Latent

AttendCells: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]  # (B, C, h, w) each


class _Build:
    """Builds layers of one namespace, dtype, device and group count."""

    def __init__(
        self,
        groups: int,
        operations: Operations,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        self.groups, self.operations = groups, operations
        self.dtype, self.device = dtype, device

    def conv(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1) -> nn.Module:
        padding = kernel // 2 if stride == 1 else 0
        return self.operations.Conv2d(
            inputs,
            outputs,
            kernel_size=kernel,
            stride=stride,
            padding=padding,
            dtype=self.dtype,
            device=self.device,
        )

    def norm(self, channels: int) -> nn.Module:
        return self.operations.GroupNorm(
            num_groups=self.groups,
            num_channels=channels,
            eps=1e-6,
            affine=True,
            dtype=self.dtype,
            device=self.device,
        )


class _ResBlock(nn.Module):
    def __init__(self, build: _Build, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = build.norm(inputs)
        self.conv1 = build.conv(inputs, outputs, 3)
        self.norm2 = build.norm(outputs)
        self.conv2 = build.conv(outputs, outputs, 3)
        self.nin_shortcut = None if inputs == outputs else build.conv(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h


def attend_cells(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Single-head attention over all cells, by PyTorch: q, k, v and result (B, C, h, w)."""
    shape = q.shape
    q, k, v = (
        one.flatten(2).transpose(1, 2).unsqueeze(1).contiguous()  # (B, 1, h w, C)
        for one in (q, k, v)
    )
    attended = F.scaled_dot_product_attention(q, k, v)
    return attended.squeeze(1).transpose(1, 2).reshape(shape)


class _Attention(nn.Module):
    """Single-head self-attention over all latent cells, with 1x1 convolutions."""

    def __init__(self, build: _Build, channels: int) -> None:
        super().__init__()
        self.norm = build.norm(channels)
        self.q = build.conv(channels, channels, 1)
        self.k = build.conv(channels, channels, 1)
        self.v = build.conv(channels, channels, 1)
        self.proj_out = build.conv(channels, channels, 1)
        self.attend: AttendCells = attend_cells

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return x + self.proj_out(self.attend(self.q(normed), self.k(normed), self.v(normed)))


class _Downsample(nn.Module):
    def __init__(self, build: _Build, channels: int) -> None:
        super().__init__()
        self.conv = build.conv(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Upsample(nn.Module):
    def __init__(self, build: _Build, channels: int) -> None:
        super().__init__()
        self.conv = build.conv(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Level(nn.Module):
    """The residual blocks of one resolution, then an optional change of resolution."""

    def __init__(self, build: _Build, inputs: int, outputs: int, blocks: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            _ResBlock(build, inputs if i == 0 else outputs, outputs) for i in range(blocks)
        )
        self.downsample: _Downsample | None = None
        self.upsample: _Upsample | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if self.downsample is not None:
            return self.downsample(x)
        return x if self.upsample is None else self.upsample(x)


class _Middle(nn.Module):
    def __init__(self, build: _Build, channels: int) -> None:
        super().__init__()
        self.block_1 = _ResBlock(build, channels, channels)
        self.attn_1 = _Attention(build, channels)
        self.block_2 = _ResBlock(build, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Encoder(nn.Module):
    def __init__(self, spec: AutoencoderSpec, build: _Build) -> None:
        super().__init__()
        widths = [spec.channels * mult for mult in spec.channel_mult]
        self.conv_in = build.conv(3, spec.channels, 3)
        self.down = nn.ModuleList()
        for level, (inputs, outputs) in enumerate(
            zip([spec.channels, *widths], widths, strict=False)
        ):
            down = _Level(build, inputs, outputs, spec.res_blocks)
            if level < len(widths) - 1:
                down.downsample = _Downsample(build, outputs)
            self.down.append(down)
        self.mid = _Middle(build, widths[-1])
        self.norm_out = build.norm(widths[-1])
        moments = 2 * spec.bottleneck
        self.conv_out = build.conv(widths[-1], moments, 3)
        self.quant_conv = build.conv(moments, moments, 1) if spec.patch > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        moments = self.conv_out(F.silu(self.norm_out(self.mid(h))))
        return moments if self.quant_conv is None else self.quant_conv(moments)


class _Decoder(nn.Module):
    def __init__(self, spec: AutoencoderSpec, build: _Build) -> None:
        super().__init__()
        channels = spec.decoder_channels or spec.channels
        widths = [channels * mult for mult in spec.channel_mult]
        inputs = [*widths[1:], widths[-1]]
        bottleneck = spec.bottleneck
        self.post_quant_conv = build.conv(bottleneck, bottleneck, 1) if spec.patch > 1 else None
        self.conv_in = build.conv(bottleneck, widths[-1], 3)
        self.mid = _Middle(build, widths[-1])
        self.up = nn.ModuleList()
        for level, outputs in enumerate(widths):
            up = _Level(build, inputs[level], outputs, spec.res_blocks + 1)
            if level > 0:
                up.upsample = _Upsample(build, outputs)
            self.up.append(up)
        self.norm_out = build.norm(widths[0])
        self.conv_out = build.conv(widths[0], 3, 3)

    def forward(self, z: Tensor) -> Tensor:
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class _LatentNorm(nn.Module):
    """Batch norm over the channels of the patched latent, with the statistics of training."""

    EPS = 1e-4
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, device: torch.device | str | None) -> None:
        super().__init__()
        # float32 whatever the weights are: `undo` inverts `forward` exactly only then
        ones = torch.ones(channels, dtype=torch.float32, device=device)
        self.register_buffer("running_mean", torch.zeros_like(ones))
        self.register_buffer("running_var", ones)
        count = torch.zeros((), dtype=torch.int64, device=device)
        self.register_buffer("num_batches_tracked", count)

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self._statistics(x)
        return ((x.float() - mean) / std).to(x.dtype)

    def undo(self, x: Tensor) -> Tensor:
        mean, std = self._statistics(x)
        return (x.float() * std + mean).to(x.dtype)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = (
            buffer.to(x.device, torch.float32)[None, :, None, None]
            for buffer in (self.running_mean, self.running_var)
        )
        return mean, torch.sqrt(var + self.EPS)


class Autoencoder(nn.Module):
    """Pixels (B, 3, H, W) in -1..1 to a latent (B, C, H/f, W/f) and back; f is the downscale."""

    def __init__(
        self,
        spec: AutoencoderSpec,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        operations: Operations | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        build = _Build(spec.norm_groups, operations or torch_operations(), dtype, device)
        self.encoder = _Encoder(spec, build)
        self.decoder = _Decoder(spec, build)
        self.bn = _LatentNorm(spec.latent.channels, device) if spec.patch > 1 else None

    def use_attention(self, attend: AttendCells) -> None:
        """Hands in what computes attention over all cells; `attend_cells` until then."""
        for module in self.modules():
            if isinstance(module, _Attention):
                module.attend = attend

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and log variance of the bottleneck, each (B, c, H/8, W/8)."""
        mean, logvar = self.encoder(pixels).chunk(2, dim=1)
        return mean, logvar

    def encode(self, pixels: Tensor, *, generator: torch.Generator | None = None) -> Latent:
        """Encodes pixels.

        Args:
            pixels: (B, 3, H, W) in -1..1; sides are multiples of the downscale factor.
            generator: None for the posterior's mode, as published; a CPU generator for a sample.

        Returns:
            (B, C, H/f, W/f), in the convention of ComfyUI's LATENT.

        Raises:
            ShapeError: a side is not a multiple of the downscale factor.
        """
        factor = self.spec.latent.downscale
        height, width = pixels.shape[-2:]
        if height % factor or width % factor:
            raise ShapeError(
                f"The picture is {width}x{height}.",
                f"sides that are multiples of {factor}.",
                "bring the image to size with [image fit].",
            )
        mean, logvar = self.moments(pixels)
        if generator is None:
            return self.to_latent(mean)
        noise = torch.randn(mean.shape, generator=generator, dtype=torch.float32)
        return self.to_latent(mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * noise.to(mean))

    def decode(self, latent: Latent) -> Tensor:
        """Decodes a latent (B, C, h, w) to pixels (B, 3, f h, f w), about -1..1.

        Raises:
            ShapeError: the latent has another number of channels.
        """
        if latent.shape[1] != self.spec.latent.channels:
            raise ShapeError(
                f"The latent has {latent.shape[1]} channels.",
                f"{self.spec.latent.channels}, which {self.spec.latent.name} has.",
                "load files of one family with [model loader] and [autoencoder loader].",
            )
        return self.decoder(self.from_latent(latent))

    def to_latent(self, z: Tensor) -> Latent:
        """Patches and normalises a bottleneck (B, c, H/8, W/8); the identity if patch is 1."""
        if self.bn is None:
            return z
        return self.bn(F.pixel_unshuffle(z, self.spec.patch))

    def from_latent(self, latent: Latent) -> Tensor:
        """Inverts `to_latent`."""
        if self.bn is None:
            return latent
        return F.pixel_shuffle(self.bn.undo(latent), self.spec.patch)
