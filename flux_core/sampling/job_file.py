"""A job on disk: JSON beside a safetensors file, to be read by another process or machine."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from ..checks import check_finite
from ..errors import CheckpointError, SettingError, ShapeError, printable
from ..families import LATENTS
from ..values import Conditioning, Reference, TextFeatures, TokenCount, Tokens
from .guidance import Passes, TrueCFG
from .job import Job
from .solvers import SOLVERS

FORMAT = 1
_UNREADABLE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError),
    *(RecursionError, OverflowError, SafetensorError),
)
_Json = dict[str, Any]
_Name = TypeVar("_Name", bound=str)


def write_job(job: Job, path: Path) -> None:
    """Writes `path` (.json) and the tensors beside it (.safetensors).

    Raises:
        SettingError: edits, which are code and not data.
        CheckpointError: the name does not end in .json, or there is no such folder.
    """
    if path.suffix != ".json" or not path.parent.is_dir():
        raise CheckpointError(
            f"The job is to be written to {printable(str(path))}.",
            "a name that ends in .json, in a folder that exists.",
            "choose another name.",
        )
    if job.edits:
        raise SettingError(
            f"The job has {len(job.edits)} edits after its steps.",
            "a job of data alone.",
            "leave the edits out, and add them where the job is run.",
        )
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}  # tensors that both conditionings share are written once

    def store(name: str, tensor: Tensor | None) -> str | None:
        if tensor is None:
            return None
        if id(tensor) not in names:
            names[id(tensor)] = name
            tensors[name] = tensor.detach().cpu().contiguous().clone()
        return names[id(tensor)]

    cfg = job.cfg
    written: _Json = {
        "format": FORMAT,
        "solver": job.solver,
        "sigmas": [float(sigma) for sigma in job.sigmas],
        "conditioning": _conditioning_out(job.conditioning, "conditioning", store),
        "noise": _tokens_out(job.noise, "noise", store),
        "start": None if job.start is None else _tokens_out(job.start, "start", store),
        "cfg": None
        if cfg is None
        else {
            "negative": _conditioning_out(cfg.negative, "negative", store),
            "scale": cfg.scale,
            "start": cfg.start,
            "end": cfg.end,
            "passes": cfg.passes,
        },
    }
    save_file(tensors, path.with_suffix(".safetensors"))
    path.write_text(json.dumps(written, indent=1), encoding="utf-8")


def read_job(path: Path) -> Job:
    """Reads what `write_job` wrote.

    Raises:
        CheckpointError: a file is missing, or holds no job of this format.
    """
    try:
        written: Any = json.loads(path.read_text(encoding="utf-8"))
        tensors = load_file(path.with_suffix(".safetensors"))
        if written["format"] != FORMAT:
            raise _no_job(path, f"format {written['format']!r}")
        cfg = written["cfg"]
        return Job(
            conditioning=_conditioning_in(written["conditioning"], tensors),
            noise=_tokens_in(written["noise"], tensors),
            sigmas=torch.tensor(written["sigmas"], dtype=torch.float32),
            solver=_one_of(written["solver"], SOLVERS),
            start=None if written["start"] is None else _tokens_in(written["start"], tensors),
            cfg=None if cfg is None else _cfg_in(cfg, tensors),
        )
    except _UNREADABLE as error:
        if isinstance(error, CheckpointError):
            raise
        raise _no_job(path, f"{type(error).__name__}: {error}") from error


def _cfg_in(written: _Json, tensors: dict[str, Tensor]) -> TrueCFG:
    return TrueCFG(
        negative=_conditioning_in(written["negative"], tensors),
        scale=written["scale"],
        start=written["start"],
        end=written["end"],
        passes=_one_of(written["passes"], get_args(Passes)),
    )


def _one_of(written: Any, known: Iterable[_Name]) -> _Name:
    """A name that is known.

    Raises:
        KeyError: it is not.
    """
    return {one: one for one in known}[written]


def _no_job(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{path.name} holds no job: {found}.",
        f"JSON of format {FORMAT}, and a safetensors file of the same name beside it.",
        "write it again.",
    )


def _conditioning_out(
    one: Conditioning, name: str, store: Callable[[str, Tensor | None], str | None]
) -> _Json:
    text = one.text
    return {
        "text": {
            "txt": store(f"{name}.txt", text.txt),
            "pooled": store(f"{name}.pooled", text.pooled),
            "counts": [asdict(count) for count in text.counts],
            "notes": list(text.notes),
            "source": text.source,
        },
        "references": [
            {
                "tokens": _tokens_out(each.tokens, f"{name}.reference_{number}", store),
                "name": each.name,
                "strength": each.strength,
                "mask": store(f"{name}.reference_{number}.mask", each.mask),
                "steps": list(each.steps),
                "blocks": None if each.blocks is None else list(each.blocks),
            }
            for number, each in enumerate(one.references, 1)
        ],
        "guidance": one.guidance,
        "notes": list(one.notes),
    }


def _conditioning_in(written: _Json, tensors: dict[str, Tensor]) -> Conditioning:
    text = written["text"]
    return Conditioning(
        text=TextFeatures(
            txt=tensors[text["txt"]],
            pooled=None if text["pooled"] is None else tensors[text["pooled"]],
            counts=tuple(TokenCount(**count) for count in text["counts"]),
            notes=tuple(text["notes"]),
            source=text["source"],
        ),
        references=tuple(
            Reference(
                tokens=_tokens_in(one["tokens"], tensors),
                name=one["name"],
                strength=one["strength"],
                mask=None if one["mask"] is None else tensors[one["mask"]],
                steps=(one["steps"][0], one["steps"][1]),
                blocks=None if one["blocks"] is None else tuple(one["blocks"]),
            )
            for one in written["references"]
        ),
        guidance=written["guidance"],
        notes=tuple(written["notes"]),
    )


def _tokens_out(
    tokens: Tokens, name: str, store: Callable[[str, Tensor | None], str | None]
) -> _Json:
    return {
        "values": store(f"{name}.values", tokens.values),
        "ids": store(f"{name}.ids", tokens.ids),
        "cells": store(f"{name}.cells", tokens.cells),
        "grid": list(tokens.grid),
        "latent": tokens.latent.name,
        "is_noise": tokens.is_noise,
    }


def _tokens_in(written: _Json, tensors: dict[str, Tensor]) -> Tokens:
    rows, columns = (int(side) for side in written["grid"])
    tokens = Tokens(
        values=tensors[written["values"]],
        ids=tensors[written["ids"]],
        cells=None if written["cells"] is None else tensors[written["cells"]],
        grid=(rows, columns),
        latent=LATENTS[written["latent"]],
        is_noise=bool(written["is_noise"]),
    )
    _check_tokens(tokens)
    return tokens


def _check_tokens(tokens: Tokens) -> None:
    """Refuses tokens whose parts do not fit each other.

    Raises:
        ShapeError, NonFiniteError: they do not.
    """
    rows, columns = tokens.grid
    count, cells = tokens.count, tokens.cells
    whole = cells is None and count == rows * columns
    parts = cells is not None and cells.dtype == torch.int64 and cells.shape == (count,)
    shapes = tokens.values.shape, tokens.ids.shape
    needed = (count, tokens.latent.token_width), (count, len(tokens.latent.id_axes))
    if shapes[0][1:] != needed[0] or shapes[1] != needed[1] or not (whole or parts):
        raise ShapeError(
            f"Tokens have values {tuple(shapes[0])} and ids {tuple(shapes[1])} on a grid of {rows} "
            f"x {columns}.",
            f"(batch, tokens, {needed[0][1]}) and (tokens, {needed[1][1]}) of one count.",
            "write the job again.",
        )
    check_finite(tokens.ids, "position ids")
