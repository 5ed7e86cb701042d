"""Runs every notebook from top to bottom in a folder of its own, and fails where one fails. Nothing is written back.

python notebooks/run.py [NOTEBOOK ...]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def main(paths: list[str]) -> None:
    """Run the notebooks of these paths, or all."""
    for path in map(Path, paths or sorted(map(str, HERE.glob("*.ipynb")))):
        notebook = nbformat.read(path, as_version=4)
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            NotebookClient(
                notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}
            ).execute()
        print(f"{path.name}: {len(notebook.cells)} cells in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
