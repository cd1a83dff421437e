"""Forks a child for every probe out of one process that has imported torch and ComfyUI alone.

A child is as unused as a fresh process with the same imports, which take seconds. Nothing of the
pack is imported here, and nothing computed: children would miss the threads torch starts for that.

Each line on stdin is JSON, [script, its arguments, file for its stdout, file for its stderr]; each
line on stdout is the exit code of that child. Ends with its stdin.
"""

import gc
import json
import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import probe


def main() -> None:
    """Answer one line after the other; in a child, run the script to this process's end."""
    probe.load_comfyui()
    gc.freeze()  # else each child copies all pages when it collects
    for line in sys.stdin:
        script, arguments, *files = json.loads(line)
        child = os.fork()
        if child == 0:
            _write_to(*files)
            sys.argv = [script, *arguments]
            runpy.run_path(script, run_name="__main__")
            return
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _write_to(*files: str) -> None:
    """Point stdout and stderr to two files."""
    for descriptor, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)


if __name__ == "__main__":
    main()
