"""Runs a tool of this folder: `python tools/run.py nano.evaluate --model klein`.

The pack's imports are relative, so it needs a name; here it is `glassbox`, as in the tests. Its
root stays off sys.path, where its `nodes` folder would hide ComfyUI's nodes.py.
"""

import sys
import types
from importlib import import_module
from pathlib import Path

TOOLS = ("nano.train", "nano.evaluate")

# At the top, because the processes that a tool spawns import this file and need the name too.
_pack = types.ModuleType("glassbox")
_pack.__path__ = [str(Path(__file__).resolve().parents[1])]
sys.modules.setdefault("glassbox", _pack)


def main() -> None:
    """Runs the `main` of the tool that the first argument names; the tool reads the others."""
    if len(sys.argv) < 2 or sys.argv[1] not in TOOLS:
        sys.exit(f"usage: python tools/run.py {' | '.join(TOOLS)} [--help]")
    name = sys.argv.pop(1)
    sys.argv[0] += f" {name}"  # what --help calls the program
    import_module(f"glassbox.tools.{name}").main()


if __name__ == "__main__":
    main()
