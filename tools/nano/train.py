"""Trains a nano model from a seed: `python tools/run.py nano.train --model klein`.

Three parts, each with a time budget: the autoencoder, the flow (transformer and text encoders), and
the decoder once more, with the latent frozen. Then the files are written.
"""

import argparse
import logging
import os
from pathlib import Path

import torch
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

from ...flux_core.image.autoencoder import Autoencoder
from ...flux_core.nano import paths
from .autoencoder import polish_decoder, train_autoencoder
from .export import export_autoencoder, export_flow
from .ranks import Rank, run_ranks
from .trainer import FlowSettings, train_flow
from .variants import VARIANTS
from .vocabulary import write_tokenizers

_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_ARENA_MAX": "1"}


def _load_autoencoder(variant: str, path: Path) -> Autoencoder:
    model = Autoencoder(VARIANTS[variant].autoencoder)
    model.load_state_dict(load_file(str(path)))
    return model.eval().requires_grad_(False)


def _first(rank: Rank, variant: str, out: Path, seed: int, budget_s: float) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train_autoencoder(rank, VARIANTS[variant].autoencoder, out, seed=seed, budget_s=budget_s)


def _second(rank: Rank, source: Path, out: Path, settings: FlowSettings, resume: bool) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train_flow(rank, _load_autoencoder(settings.variant, source), out, settings, resume)


def _third(rank: Rank, variant: str, source: Path, out: Path, seed: int, budget_s: float) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    polish_decoder(rank, _load_autoencoder(variant, source), out, seed=seed, budget_s=budget_s)


def main() -> None:
    """Trains a model and writes its files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(VARIANTS), default="kontext")
    parser.add_argument("--out", type=Path, default=paths.FOLDER, help="folder for the files")
    parser.add_argument("--work", type=Path, default=Path(".cache/nano"), help="checkpoints")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--autoencoder-minutes", type=float, default=10.0)
    parser.add_argument("--flow-minutes", type=float, default=75.0)
    parser.add_argument("--decoder-minutes", type=float, default=13.0)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoints")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.update(_MALLOC)  # big blocks are reused: allocating them anew costs half the time
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    name = options.model
    first, last = (work / f"{name}_{part}.safetensors" for part in ("ae", "ae2"))
    flow = work / f"{name}_flow.pt"
    count, seed, resume = options.processes, options.seed, options.resume
    write_tokenizers()
    if not (resume and first.is_file()):
        run_ranks(count, _first, name, first, seed, 60.0 * options.autoencoder_minutes)
    settings = FlowSettings(
        variant=name, seed=seed, budget_s=60.0 * options.flow_minutes, pairs=64 // count
    )
    run_ranks(count, _second, first, flow, settings, resume and flow.is_file())
    run_ranks(count, _third, name, first, last, seed, 60.0 * options.decoder_minutes)
    export_flow(VARIANTS[name], flow, options.out)
    export_autoencoder(VARIANTS[name], _load_autoencoder(name, last), options.out)
