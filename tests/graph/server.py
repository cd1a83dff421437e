"""Start, drive and stop a real ComfyUI that has this pack linked in.

with Comfy.start() as comfy:
    name = comfy.upload(picture)
    history = comfy.run(graph)
    comfy.images(history)
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACK = "flux-glassbox"
FOR_TESTS = Path(__file__).with_name("only_for_tests.py")  # nodes for tests alone
NATIVE_PARTS = Path(__file__).with_name("native_parts")  # and small text encoders of ComfyUI's
IN_USE = ROOT / ".cache" / "comfyui-in-use"  # made by prepare.py

Json = dict[str, Any]


class ComfyError(Exception):
    """ComfyUI did not start, refused a graph or failed in a node; the message has its words."""

    def __init__(self, message: str, details: Json | None = None) -> None:
        self.details = details or {}
        super().__init__(message)


class Comfy:
    """A running ComfyUI.

    Args:
        process: the server, leader of its own process group.
        base: its base directory, with input, output, models and custom_nodes.
        port: where it listens, on 127.0.0.1.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", base: Path, port: int) -> None:
        self.process, self.base, self.port = process, base, port
        self.url = f"http://127.0.0.1:{port}"
        self.input_dir, self.output_dir = base / "input", base / "output"
        self.models_dir, self.log_path = base / "models", base / "server.log"

    @classmethod
    @contextlib.contextmanager
    def start(
        cls,
        *,
        arguments: Sequence[str] = ("--cpu",),
        base: Path | None = None,
        port: int | None = None,
        timeout_s: float = 240,
        packs: Sequence[Path] = (),
        is_absent: bool = False,
    ) -> Iterator["Comfy"]:
        """Start a ComfyUI and stop it in the end, whatever happens in between.

        Args:
            arguments: more arguments of main.py.
            base: base directory to keep; a temporary one without it.
            port: a free one without it.
            timeout_s: seconds it may take until it answers.
            packs: other node packs to link in beside this one.
            is_absent: leave this one out.
        """
        with contextlib.ExitStack() as stack:
            if base is None:
                scratch = tempfile.TemporaryDirectory(
                    prefix="glassbox-", ignore_cleanup_errors=True
                )
                base = Path(stack.enter_context(scratch))
            stack.enter_context(_stopped_by_sigterm())
            linked = {one.name: one for one in packs} | ({} if is_absent else {PACK: ROOT})
            comfy = cls._launch(base.resolve(), _free_port(port or 0), arguments, linked)
            stack.callback(comfy.stop)
            comfy._wait_until_up(timeout_s)
            yield comfy

    @classmethod
    def _launch(
        cls, base: Path, port: int, arguments: Sequence[str], packs: dict[str, Path]
    ) -> "Comfy":
        """Start the process in a base directory into which the packs are linked."""
        for folder in ("custom_nodes", "input", "output", "models"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        for name, pack in packs.items():
            link = base / "custom_nodes" / name
            if link.is_symlink():
                link.unlink()
            link.symlink_to(pack, target_is_directory=pack.is_dir())
        home = comfyui_path()
        command = [sys.executable, str(home / "main.py"), "--listen", "127.0.0.1"]
        command += ["--port", str(port), "--base-directory", str(base)]
        command += ["--disable-api-nodes", "--database-url", "sqlite:///:memory:"]
        command += ["--preview-method", "latent2rgb", "--disable-auto-launch", *arguments]
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        with (base / "server.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=home,
                env={**os.environ, **offline},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        return cls(process, base, port)

    def _wait_until_up(self, timeout_s: float) -> None:
        """Return when the server answers and has imported the pack."""
        end = time.monotonic() + timeout_s
        while True:
            if self.process.poll() is not None:
                raise ComfyError(f"ComfyUI ended while starting.\n{self._log_end()}")
            if time.monotonic() > end:
                raise ComfyError(f"ComfyUI is not up after {timeout_s:.0f} s.\n{self._log_end()}")
            with contextlib.suppress(OSError, ComfyError):
                self.get("/system_stats", timeout_s=5)
                break
            time.sleep(0.1)
        log = self.log()
        if "IMPORT FAILED" in log or "Cannot import" in log:
            raise ComfyError(f"ComfyUI could not import the pack.\n{self._log_end()}")

    def stop(self) -> None:
        """End the server and all it started."""
        for kind, wait_s in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, kind)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(wait_s)
                break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def log(self) -> str:
        """What the server has printed so far."""
        return self.log_path.read_text(errors="replace")

    def _log_end(self) -> str:
        return "\n".join(self.log().splitlines()[-40:])

    def get(self, path: str, *, timeout_s: float = 60) -> Any:
        """GET a route and read its JSON."""
        return json.loads(self.fetch(path, timeout_s=timeout_s))

    def fetch(self, path: str, *, timeout_s: float = 60) -> bytes:
        """GET a route and return its body."""
        return self._send(urllib.request.Request(self.url + path), timeout_s)

    def post(self, path: str, body: Json, *, timeout_s: float = 60) -> Any:
        """POST JSON; the answer's JSON, or None where it has no body."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        answer = self._send(request, timeout_s)
        return json.loads(answer) if answer else None

    def _send(self, request: urllib.request.Request, timeout_s: float) -> bytes:
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            body = error.read().decode(errors="replace")
            try:
                details = json.loads(body)
            except json.JSONDecodeError:
                raise ComfyError(f"HTTP {error.code}: {body}") from error
            raise ComfyError(f"HTTP {error.code}: {refusal(details)}", details) from error

    def object_info(self, node: str = "") -> Json:
        """The schemas of all nodes, or of one."""
        return self.get(f"/object_info/{node}" if node else "/object_info")

    def upload(self, path: Path, *, name: str = "") -> str:
        """Put a picture into the input folder; returns the name to use in LoadImage."""
        shown = (name or path.name).replace('"', "_")
        boundary = uuid.uuid4().hex
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{shown}"\r\n'
            f"Content-Type: application/octet-stream\r\n\r\n"
        )
        body = head.encode() + path.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        request = urllib.request.Request(self.url + "/upload/image", body, headers)
        return json.loads(self._send(request, 60))["name"]

    def queue(self, graph: Json, *, client: str = "") -> str:
        """Queue a graph in API form; returns its prompt id. ComfyError when it is refused."""
        body: Json = {"prompt": graph, **({"client_id": client} if client else {})}
        answer = self.post("/prompt", body)
        if answer.get("node_errors"):
            raise ComfyError(refusal(answer), answer)
        return answer["prompt_id"]

    def wait(self, prompt_id: str, *, timeout_s: float = 240) -> Json:
        """The history entry of a prompt once it has ended, however it ended."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry and entry.get("status"):
                return entry
            if self.process.poll() is not None:
                raise ComfyError(f"ComfyUI ended during a prompt.\n{self._log_end()}")
            time.sleep(0.02)
        raise ComfyError(f"The prompt has not ended after {timeout_s:.0f} s.\n{self._log_end()}")

    def run(self, graph: Json, *, timeout_s: float = 240) -> Json:
        """Run a graph; returns its history entry. ComfyError with the node's words when it fails.

        The entry has `outputs` {node id: ui} and `status`; `.details` of the error holds
        node_id, node_type, exception_message and exception_type.
        """
        history = self.wait(self.queue(graph), timeout_s=timeout_s)
        if history["status"]["status_str"] != "success":
            details = failure(history)
            words = details.get("exception_message", "the prompt was interrupted").strip()
            raise ComfyError(f"{details.get('node_type', 'ComfyUI')}: {words}", details)
        return history

    def watch(self, graph: Json, *, timeout_s: float = 240) -> Iterator[Json | bytes]:
        """Queue a graph and yield its websocket messages until it ends.

        Yields:
            {"type", "data"} as ComfyUI sends them, and previews as bytes (after 8 bytes of
            header a picture). Closing the iterator early leaves the prompt running.
        """
        import websocket

        client = uuid.uuid4().hex
        address = f"ws://127.0.0.1:{self.port}/ws?clientId={client}"
        with contextlib.closing(websocket.create_connection(address, timeout=timeout_s)) as wire:
            prompt_id = self.queue(graph, client=client)
            while True:
                message = wire.recv()
                if isinstance(message, bytes):
                    yield message
                    continue
                event = json.loads(message)
                if event["data"].get("prompt_id", prompt_id) != prompt_id:
                    continue
                yield event
                if event["type"] in (
                    "execution_success",
                    "execution_error",
                    "execution_interrupted",
                ):
                    return

    def interrupt(self) -> None:
        """Cancel the running prompt."""
        self.post("/interrupt", {})

    def free(self) -> None:
        """Ask ComfyUI to unload all models and forget its cached results."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    def images(self, history: Json) -> list[bytes]:
        """The files of all pictures that a prompt saved or previewed, in node order."""
        found: list[bytes] = []
        for node in history["outputs"].values():
            for image in node.get("images", []):
                place = {key: image[key] for key in ("filename", "subfolder", "type")}
                found.append(self.fetch("/view?" + urllib.parse.urlencode(place)))
        return found


def comfyui_path() -> Path:
    """The ComfyUI that the setup found or fetched."""
    if not (IN_USE / "main.py").is_file():
        raise ComfyError("ComfyUI is not set up here. Run `make setup` first.")
    return IN_USE.resolve()


def refusal(answer: Json) -> str:
    """The words of ComfyUI for a graph it did not accept, node by node."""
    error = answer.get("error", {})
    words = [error["message"]] if isinstance(error, dict) and error.get("message") else []
    for number, node in answer.get("node_errors", {}).items():
        for one in node["errors"]:
            words.append(f"node {number} {node['class_type']}: {one['message']}: {one['details']}")
    return "\n".join(words) or json.dumps(answer)


def failure(history: Json) -> Json:
    """The execution_error message of a prompt that failed, {} when there is none."""
    for kind, data in history["status"]["messages"]:
        if kind == "execution_error":
            return data
    return {}


def _free_port(wanted: int) -> int:
    """The wanted port if nobody listens there; any free one for 0."""
    with socket.socket() as probe:
        # As ComfyUI's own server listens: connections of one just stopped do not hold the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError as error:
            raise ComfyError(f"Port {wanted} is taken ({error.strerror}); give another.") from None
        return probe.getsockname()[1]


def _die_with_parent() -> None:
    """In the child: be killed when the process that started it is gone (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end this process as an exception, so that `finally` blocks run."""

    def leave(*_: object) -> None:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
