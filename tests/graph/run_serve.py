"""Run ComfyUI with this pack for a person, as `make serve` does, until Ctrl-C.

Its models, pictures and settings stay in .cache/serve between runs.
"""

import argparse
import shutil
import sys

from .server import ROOT, Comfy, ComfyError


def main() -> int:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8188, help="where to listen, on 127.0.0.1")
    parser.add_argument("--comfyui", default="--cpu", help="more arguments of ComfyUI's main.py")
    settings = parser.parse_args()
    base = ROOT / ".cache" / "serve"
    pictures = base / "input"
    shutil.copytree(ROOT / "workflows" / "input", pictures, dirs_exist_ok=True)
    example = ROOT / ".cache" / "comfyui-in-use" / "input" / "example.png"
    if example.is_file():  # what ComfyUI brings, and its own graphs and ours begin with
        shutil.copy(example, pictures)
    print("Starting ComfyUI …", flush=True)
    try:
        with Comfy.start(
            arguments=settings.comfyui.split(), base=base, port=settings.port
        ) as comfy:
            print(f"ComfyUI is at {comfy.url}; Ctrl-C stops it.")
            print(f"The example graphs are under Templates; models go into {comfy.models_dir}")
            print(f"Its log is {comfy.log_path}", flush=True)
            return comfy.process.wait()
    except KeyboardInterrupt:
        print("stopped")
        return 0
    except ComfyError as error:
        print(f"make serve failed: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
