"""Tensor aliases and the axis glossary.

B batch · H W pixels · C h w latent channels, cells · L D sequence tokens, token width ·
N image tokens · T E text tokens, features · P pooled features · A id axes · S steps.
"""

from collections.abc import Mapping
from typing import Annotated, TypeAlias

from torch import Tensor

Image: TypeAlias = Annotated[Tensor, "B H W 3, 0..1"]  # ComfyUI's IMAGE
Latent: TypeAlias = Annotated[Tensor, "B C h w"]  # as the autoencoder returns it, unscaled
TokenValues: TypeAlias = Annotated[Tensor, "B N D"]
Ids: TypeAlias = Annotated[Tensor, "N A, float32"]
Sigmas: TypeAlias = Annotated[Tensor, "S+1, float32, 1 = noise, falling to 0"]
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]  # of tensors, by name
