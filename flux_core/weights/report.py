"""What a loader found in a file and did with it, for people to read."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """The outcome of loading one model."""

    title: str  # the published model, or the kind of part
    known_by: str  # how that is known: "named in the file", "guessed from the file name", …
    guessed: bool
    source: str  # the file or folder, by name
    files: int
    layout: str  # "BFL" or "diffusers"
    prefix: str
    dtype: torch.dtype  # of the module
    tensors: int
    parameters: int
    size: int  # bytes in memory
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Write one fact per line."""
        shards = f" in {self.files} files" if self.files > 1 else ""
        prefix = f", keys begin with '{self.prefix}'" if self.prefix else ""
        lines = [
            f"{self.title} ({self.known_by})",
            f"{self.source}{shards}, {self.layout} layout{prefix}",
            f"{self.tensors} tensors, {self.parameters:,} parameters, {dtype_name(self.dtype)}, "
            f"{self.size / 1e9:.2f} GB",
            *self.notes,
        ]
        return "\n".join(lines)


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype as people do: bfloat16."""
    return str(dtype).removeprefix("torch.")
