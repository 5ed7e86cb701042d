"""Starts a test's script on several processes, as a user does: with torchrun, once a node."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_ranks(module: str, *args: str, n_ranks: int, n_nodes: int = 1) -> None:
    """Run ``python -m module *args`` on ``n_ranks`` processes, shared out over so many torchruns on this machine.

    Raises:
        AssertionError: If one fails; it says what was printed.
    """
    known = ("LOCAL_RANK", "RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in known} | {"OMP_NUM_THREADS": "1"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", f"--nnodes={n_nodes}", f"--node_rank={node}",
                f"--nproc_per_node={n_ranks // n_nodes}", "--master_addr=127.0.0.1", f"--master_port={port}",
                "-m", module, *args,
            ],
            cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for node in range(n_nodes)
    ]  # fmt: skip
    try:
        for node in nodes:
            output, _ = node.communicate(timeout=240)
            assert node.returncode == 0, output[-4000:]
    finally:
        for node in nodes:
            node.kill()
