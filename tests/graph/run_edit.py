"""Edit one picture with the embedded model, as `make edit` does.

Starts ComfyUI with the pack linked in, uploads the picture, queues the graph with comfy-cli,
saves the result in output/ and stops the server. The graph on disk is not touched.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from .server import ROOT, Comfy, ComfyError

WORKFLOW = ROOT / "workflows" / "api" / "01_nano_kontext_edit.json"
PICTURES = ROOT / "workflows" / "input"
NANO_SIDE_PX = 96  # what the embedded model has seen

ABOUT = """\
The embedded model is a toy: it knows only coloured shapes on plain backgrounds (circle, square,
triangle, star, diamond; red, green, blue, yellow, orange, purple, white, black), and to recolour,
remove and add them. The same graph edits photographs with these files, see README:
  models/diffusion_models/  flux1-kontext-dev.safetensors
  models/text_encoders/     clip_l.safetensors and t5xxl_fp16.safetensors
  models/vae/               ae.safetensors
and FLUX.2's files are named there too."""

Graph = dict[str, dict[str, Any]]


class EditError(Exception):
    """The edit cannot be done; the message says what to change."""


def main() -> int:
    """Run one edit; 0 when the picture is saved."""
    settings = _arguments()
    print(ABOUT)
    try:
        graph = json.loads(settings.workflow.read_text())
        picture = Path(settings.image).expanduser() if settings.image else _named_picture(graph)
        note = fit_picture(graph, picture)
        if note:
            print(note)
        prompt = set_prompt(graph, settings.prompt)
        print(f"picture  {picture}\nprompt   {prompt}", flush=True)
        started = time.monotonic()
        with Comfy.start(arguments=settings.comfyui.split()) as comfy:
            up_s = time.monotonic() - started
            node(graph, "LoadImage")["image"] = comfy.upload(picture)
            found, edit_s = run_graph(comfy, graph)
            saved = [save(comfy.fetch(one), settings.output, picture) for one in found]
    except (EditError, ComfyError) as error:
        print(f"make edit failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    for path in saved:
        print(f"edited   {path}")
    print(
        f"time     {edit_s:.1f} s for the edit, models loaded in it; {up_s:.1f} s to start ComfyUI"
    )
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", default="", help="picture to edit; the graph's own without it")
    parser.add_argument("--prompt", default="", help="instruction; the graph's own without it")
    parser.add_argument("--workflow", type=Path, default=WORKFLOW, help="graph in API form")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "output", help="folder for the result"
    )
    parser.add_argument("--comfyui", default="--cpu", help="more arguments of ComfyUI's main.py")
    return parser.parse_args()


def node(graph: Graph, class_type: str) -> dict[str, Any]:
    """The inputs of the first node of a class in the graph."""
    for one in graph.values():
        if one["class_type"] == class_type:
            return one["inputs"]
    raise EditError(f"the workflow has no {class_type} node; it needs one to be filled in.")


def _named_picture(graph: Graph) -> Path:
    return PICTURES / node(graph, "LoadImage")["image"]


def set_prompt(graph: Graph, prompt: str) -> str:
    """Write the instruction into the graph's text node; returns the one it has then."""
    inputs = node(graph, "GlassboxEncodeText")
    inputs["prompt"] = prompt or inputs["prompt"]
    return inputs["prompt"]


def fit_picture(graph: Graph, picture: Path) -> str:
    """Check that the picture can be read, and let the graph fit a size the model cannot edit.

    Returns:
        What was changed in the graph, in words; empty when the picture goes in as it is.
    """
    try:
        with Image.open(picture) as image:
            image.verify()
            width, height = image.size
    except FileNotFoundError:
        raise EditError(f"there is no picture {picture}.") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        needed = "a whole PNG, JPEG or WebP file is needed"
        raise EditError(f"{picture} cannot be read as a picture ({error}); {needed}.") from None
    side = NANO_SIDE_PX
    if width == height == side:
        return ""
    node(graph, "GlassboxFitImage").update(size="exact", width=side, height=side, method="pad")
    return (
        f"The picture is {width}×{height}; the embedded model draws {side}×{side} pixels, so Fit "
        "Image pads and scales it to that."
    )


def run_graph(comfy: Comfy, graph: Graph) -> tuple[list[str], float]:
    """Run the graph with comfy-cli.

    Returns:
        Paths of the saved pictures on the server, and the seconds that ComfyUI worked.
    """
    program = Path(sys.executable).with_name("comfy")
    with tempfile.TemporaryDirectory(prefix="glassbox-cli-") as home:
        file = Path(home) / "graph.json"
        file.write_text(json.dumps(graph))
        command = [str(program), "--skip-prompt", "--no-enable-telemetry", "run", "--wait"]
        command += ["--workflow", str(file), "--timeout", "600"]
        command += ["--host", "127.0.0.1", "--port", str(comfy.port)]
        # comfy-cli keeps a list of jobs and settings in the home folder: not in the user's.
        environment = {**os.environ, "HOME": home}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    answer = _last_json(done.stdout)
    if not answer.get("ok"):
        raise EditError(_words(answer) or done.stdout + done.stderr)
    history = comfy.wait(answer["data"]["prompt_id"])
    found = [url.removeprefix(comfy.url) for url in answer["data"]["outputs"]]
    found = [path for path in found if _is_saved(path)]
    if not found:
        raise EditError("the workflow ended without a saved picture; it needs a Save Image node.")
    return found, _seconds(history)


def _last_json(text: str) -> dict[str, Any]:
    """The JSON object in the last line; {} when there is none."""
    lines = text.strip().splitlines()
    return json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}


def _is_saved(path: str) -> bool:
    query = urllib.parse.parse_qs(urllib.parse.urlsplit(path).query)
    return query.get("type") == ["output"] and query["filename"][0].lower().endswith(".png")


def _seconds(history: dict[str, Any]) -> float:
    """From the start to the success of a prompt, by ComfyUI's own clock."""
    times = {kind: data["timestamp"] for kind, data in history["status"]["messages"]}
    return (times["execution_success"] - times["execution_start"]) / 1000


def _words(answer: dict[str, Any]) -> str:
    """What comfy-cli says went wrong, and what each node says."""
    error = answer.get("error") or {}
    details = error.get("details") or {}
    words = [error.get("message", "")]
    for one in details.get("node_errors", []):
        for said in one["errors"]:
            words.append(f"{one['class_type']}: {said['message']}: {said['details']}")
    words += [f"node {one['node_id']}: {one['message']}" for one in details.get("errors", [])]
    return "\n".join(word for word in words if word)


def save(content: bytes, folder: Path, picture: Path) -> Path:
    """Write a result beside the earlier ones, under a name that none of them has."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, 100_000):
        path = folder / f"{picture.stem}_edited_{number:03d}.png"
        try:
            with path.open("xb") as file:
                file.write(content)
        except FileExistsError:
            continue
        return path
    raise EditError(f"{folder} is full of results of {picture.name}; move some away.")


if __name__ == "__main__":
    sys.exit(main())
