"""`make bench`: ours against diffusers and ComfyUI, same weights, interleaved in one process.

Figures are ratios with their spread; random weights prove time, memory and equality, never
picture quality.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

TESTS = Path(__file__).resolve().parents[1]
sys.path[0] = str(TESTS)  # for conftest, which names the pack; never the pack's own root
sys.path.append(str(TESTS.parent / ".cache" / "comfyui-in-use"))

import conftest  # noqa: E402, F401
import torch  # noqa: E402
from comfy.cli_args import args as comfyui_arguments  # noqa: E402

comfyui_arguments.cpu = not torch.cuda.is_available()
comfyui_arguments.use_pytorch_cross_attention = True  # else ComfyUI is slower on a CPU

from glassbox.flux_core.families import (  # noqa: E402
    FLUX1_KONTEXT,
    FLUX2_KLEIN_9B,
    FLUX2_KLEIN_9B_KV,
)
from glassbox.flux_core.transformer.flux import build_flux  # noqa: E402
from glassbox.tests.bench import cached, encoders, networks  # noqa: E402
from glassbox.tests.graph.run_edit import WORKFLOW, node  # noqa: E402
from glassbox.tests.graph.server import Comfy  # noqa: E402

PEERS = ("diffusers", "comfyui")
STAGES = ("weights", "equality", "steps", "cached", "encoder", "import", "edit")
SIDE_TOKENS = 32  # 512 x 512 pixels: 1024 tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=STAGES)
    options = parser.parse_args()
    print(f"{_machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'what':72} {'figure':>10}  spread")
    rounds = options.rounds
    stages: dict[str, Callable[[], None]] = {
        "weights": _weights,
        "equality": _equality,
        "steps": lambda: _steps(rounds),
        "cached": lambda: _cached(rounds),
        "encoder": lambda: _encoder(rounds),
        "import": _import,
        "edit": _edit,
    }
    with torch.inference_mode():
        for name in STAGES:
            if options.only in (None, name):
                stages[name]()


def _row(what: str, figure: str, spread: str = "") -> None:
    print(f"{what:72} {figure:>10}  {spread}", flush=True)


def _machine() -> str:
    names = [line for line in _cpuinfo() if line.startswith("model name")]
    return names[0].split(":")[1].strip() if names else platform.processor()


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []


def _weights() -> None:
    """Bytes of weights a step needs, as a share of the checkpoint."""
    # At width 1024 with FLUX.1's own 19 + 38 blocks, and at full size; both on the meta device.
    for hidden in (1024, 3072):
        spec = replace(FLUX1_KONTEXT.transformer, hidden=hidden)
        network = build_flux(FLUX1_KONTEXT, spec, device="meta", dtype=torch.bfloat16)
        kept, whole = (
            sum(one.nbytes for one in module.parameters()) for module in (network.blocks, network)
        )
        what = f"weights needed while sampling, width {hidden}"
        _row(what, f"{kept / whole:.3f}", f"{kept / 1e9:.2f} of {whole / 1e9:.2f} GB bf16")


def _equality() -> None:
    """Largest difference of one step, fp32."""
    for family in (FLUX1_KONTEXT, FLUX2_KLEIN_9B):
        spec = networks.MID_SPECS[family.name]
        small = replace(spec, hidden=256, double_blocks=2, single_blocks=2)
        built = networks.build(family, small, torch.float32)
        for references in range(3):
            step = networks.Step.make(built, 8, references)
            for peer in PEERS:
                difference = (step.ours() - getattr(step, peer)()).abs().max().item()
                what = f"{family.name}, one step, fp32, {references} references: ours - {peer}"
                _row(what, f"{difference:.1e}")


def _steps(rounds: int) -> None:
    """Step time, bf16, width 1024: ours / peer, round by round."""
    for family in (FLUX1_KONTEXT, FLUX2_KLEIN_9B):
        built = networks.build(family, networks.MID_SPECS[family.name], torch.bfloat16)
        for references in range(3):
            step = networks.Step.make(built, SIDE_TOKENS, references)
            seconds = _interleaved(step, rounds)
            for peer in PEERS:
                _ratio(
                    f"{family.name}, step, bf16, {references} references: ours / {peer}",
                    seconds["ours"],
                    seconds[peer],
                )


def _cached(rounds: int) -> None:
    """Four steps over references seen before: peer / ours, and what recomputing costs."""
    for dtype in (torch.float32, torch.bfloat16):
        built = cached.build_cached(dtype)
        for references in (1, 2, 4):
            run = cached.CachedRun.make(built, references)
            seconds = _interleaved(run, rounds)
            for peer in PEERS:
                _ratio(
                    f"{FLUX2_KLEIN_9B_KV.name}, again, {str(dtype)[6:]}, {references} references: "
                    f"{peer} / ours",
                    seconds[peer],
                    seconds["ours"],
                )


def _encoder(rounds: int) -> None:
    """A prompt through the layers that are read, against all layers."""
    seconds = _interleaved(encoders.Prompt.make(), rounds, ("ours", "transformers"))
    _ratio("Qwen3 encoder, 512 tokens: all layers / ours", seconds["transformers"], seconds["ours"])


def _interleaved(
    job: object, rounds: int, names: tuple[str, ...] = ("ours", *PEERS)
) -> dict[str, list[float]]:
    """Run a job's ways in turn; seconds of each, without the first round."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):  # the first is a warm-up
        for name in names:
            start = time.perf_counter()
            getattr(job, name)()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _ratio(what: str, above: list[float], below: list[float]) -> None:
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} rounds"
    _row(what, f"{statistics.median(ratios):.2f}", spread)


def _import() -> None:
    """Seconds to import the pack once ComfyUI is imported, each in a fresh process."""
    program = (
        "import sys, time, types; sys.path.append(sys.argv[1])\n"
        "from comfy.cli_args import args; args.cpu = True\n"
        "import asyncio, importlib.util, nodes, comfy_api.latest\n"
        "start = time.perf_counter()\n"
        "spec = importlib.util.spec_from_file_location('pack', sys.argv[2] + '/__init__.py',"
        " submodule_search_locations=[sys.argv[2]])\n"
        "pack = importlib.util.module_from_spec(spec); sys.modules['pack'] = pack\n"
        "spec.loader.exec_module(pack)\n"
        "extension = pack.comfy_entrypoint()\n"
        "async def load(it):\n"
        "    it = await it if hasattr(it, '__await__') else it\n"
        "    await it.on_load(); return await it.get_node_list()\n"
        "nodes_found = asyncio.run(load(extension))\n"
        "print((time.perf_counter() - start) * 1000)\n"
    )
    import subprocess

    arguments = [sys.executable, "-c", program, sys.path[-1], str(TESTS.parent)]
    # Compiled by the first, as at a pack's first start.
    compiled = TemporaryDirectory()
    environment = {
        **os.environ,
        "PYTHONDONTWRITEBYTECODE": "",
        "PYTHONPYCACHEPREFIX": compiled.name,
    }
    milliseconds = [
        float(
            subprocess.run(
                arguments,
                capture_output=True,
                text=True,
                check=True,
                cwd=sys.path[-1],
                env=environment,
            ).stdout.split()[-1]
        )
        for _ in range(5)
    ]
    median, most = statistics.median(milliseconds), max(milliseconds)
    _row("import of the pack after ComfyUI, nodes listed", f"{median:.0f} ms", f"to {most:.0f} ms")


def _edit() -> None:
    """Seconds of a nano edit in a real ComfyUI, its models loaded by an edit before."""
    graph = json.loads(WORKFLOW.read_text())
    seconds: list[float] = []
    with Comfy.start() as comfy:
        picture = WORKFLOW.parents[1] / "input" / node(graph, "LoadImage")["image"]
        node(graph, "LoadImage")["image"] = comfy.upload(picture)
        for seed in range(6):
            node(graph, "GlassboxNoise")["seed"] = seed
            times = dict(comfy.run(graph)["status"]["messages"])
            start, end = (times[f"execution_{what}"]["timestamp"] for what in ("start", "success"))
            seconds.append((end - start) / 1000)
    warm = seconds[1:]
    median = statistics.median(warm)
    _row("nano edit, warm, in ComfyUI", f"{median:.2f} s", f"{min(warm):.2f} to {max(warm):.2f} s")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
