"""Probe: what importing the pack costs and brings in, after ComfyUI's own imports."""

import asyncio
import json
import socket
import sys
import tempfile
import time
from dataclasses import make_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parent))
import probe

ROUNDS = 5
YARDSTICK_MS = 17.0  # of `_build_classes`, on a machine that does nothing else


def main() -> None:
    probe.load_comfyui()
    import execution  # noqa: F401 - as main.py does before custom nodes are loaded
    import server  # noqa: F401
    import torch

    import nodes  # noqa: F401

    _forbid(socket.socket, "connect", "network")
    _forbid(torch.cuda, "_lazy_init", "CUDA")
    # Compiled once, as Python does at a pack's first start, whatever the environment says.
    compiled = tempfile.TemporaryDirectory()  # gone when this process is
    sys.dont_write_bytecode, sys.pycache_prefix = False, compiled.name
    before = set(sys.modules)
    costs, yardstick = list[float](), list[float]()
    for _ in range(ROUNDS):
        started = time.process_time()
        _build_classes()
        yardstick.append(1000 * (time.process_time() - started))
        for name in [name for name in sys.modules if name.split(".")[0] == probe.PACK]:
            del sys.modules[name]
        started = time.process_time()
        asyncio.run(_use(probe.load_pack()))
        costs.append(1000 * (time.process_time() - started))
    new = sorted(name for name in set(sys.modules) - before if not name.startswith(probe.PACK))
    # As the machine is now: what is next to it on the processor may halve its speed for minutes.
    slowness = max(1.0, min(yardstick) / YARDSTICK_MS)
    cost = {"cpu_ms": min(costs), "first_ms": costs[0], "slowness": slowness}
    print(json.dumps({**cost, "yardstick_ms": min(yardstick), "new": new}))


def _build_classes() -> None:
    """Work of the kind that an import is, and that no change of the pack makes longer."""
    for number in range(20):
        fields = [(f"field_{name}", int, 0) for name in range(8)]
        make_dataclass(f"Yardstick{number}", fields, frozen=True, slots=True, kw_only=True)


async def _use(pack: ModuleType) -> None:
    """Do what nodes.load_custom_node does with a pack."""
    extension = await pack.comfy_entrypoint()
    await extension.on_load()
    for node in await extension.get_node_list():
        node.GET_SCHEMA()


def _forbid(owner: Any, name: str, what: str) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError(f"importing the pack used {what}")

    setattr(owner, name, refuse)


if __name__ == "__main__":
    main()
