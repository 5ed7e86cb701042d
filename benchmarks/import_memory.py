"""Peak memory of importing one of the authors' checkpoints at full size, and whether the dictionary computes
the same.

    python benchmarks/import_memory.py [--d-in 4096] [--d-sae 131072] [--kind aen|topk] [--folder FOLDER]

Writes a synthetic bfloat16 checkpoint (random weights, with the optimizer state that the authors' files
carry), imports it in a process of its own, and compares the outputs with the formulas on a few tokens. Memory
is what the kernel says of that process (Linux): "anonymous" is memory that must be there; "peak" has also the
pages of the mapped file that were read, which the kernel may drop.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

_NAMES = {
    "aen": "checkpoints/llama8b/regularization/seed0/adaptive_elastic_net/lambda1_0p002_lambda2_0p0001_gamma_0p5.pt",
    "topk": "checkpoints/llama8b/topk/seed0/k32_llm-topk_baseline_sweep000-seed0.pt",
}
_CHILD = """
import json, sys, threading, time
from aen_lightning.hub import import_checkpoint

def memory():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return {key: int(lines[key].split()[0]) / 1e6 for key in ("VmHWM", "VmRSS", "RssAnon")}

before, peak, done = memory(), {"anonymous": 0.0}, threading.Event()

def watch():
    while not done.wait(0.01):
        peak["anonymous"] = max(peak["anonymous"], memory()["RssAnon"])

thread = threading.Thread(target=watch)
thread.start()
start = time.perf_counter()
import_checkpoint(sys.argv[1], sys.argv[2])
seconds = time.perf_counter() - start
done.set()
thread.join()
print(json.dumps({
    "before_gb": before["VmRSS"], "peak_gb": memory()["VmHWM"], "anonymous_before_gb": before["RssAnon"],
    "peak_anonymous_gb": peak["anonymous"], "seconds": seconds,
}))
"""


def write_checkpoint(path: Path, d_in: int, d_sae: int, kind: str) -> None:
    torch.manual_seed(0)
    encoder = torch.empty(d_sae, d_in, dtype=torch.bfloat16).uniform_(-(d_in**-0.5), d_in**-0.5)
    decoder = torch.empty(d_in, d_sae, dtype=torch.bfloat16).uniform_(-1, 1)
    decoder /= decoder.norm(dim=0, dtype=torch.float32).to(torch.bfloat16)
    state = {
        "b_dec": torch.randn(d_in).to(torch.bfloat16) * 0.01,
        "encoder.weight": encoder,
        "encoder.bias": torch.randn(d_sae).to(torch.bfloat16) * 0.01,
        "decoder.weight": decoder,
    }
    if kind == "aen":
        state |= {
            "ema_abs_activations": torch.rand(d_sae).to(torch.bfloat16),
            "_step_count": torch.tensor(100_000),
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    moments = {0: {"exp_avg": encoder.clone(), "exp_avg_sq": encoder.clone()}}
    torch.save(
        {
            "model_state_dict": state,
            "optimizer_state_dict": {"state": moments, "param_groups": [{"lr": 5e-4}]},
            "trainer_config": {"lr": 5e-4},
            "run_name": "synthetic",
            "run_metadata": {"seed": 0},
            "metrics_history": [{"l0": 32.0}],
        },
        path,
    )


def largest_error(checkpoint: Path, folder: Path, kind: str) -> tuple[float, float]:
    """Largest difference of features and reconstructions from the formulas in float32, relative to the
    largest value.
    """
    from sae_lens import SAE

    s = {
        k: v.float()
        for k, v in torch.load(checkpoint, weights_only=True, mmap=True)["model_state_dict"].items()
    }
    x = torch.randn(16, s["b_dec"].numel()) * 3
    norm = x.norm(dim=-1, keepdim=True)
    pre = torch.nn.functional.linear(
        x * x.shape[1] ** 0.5 / norm - s["b_dec"], s["encoder.weight"], s["encoder.bias"]
    )
    h = pre.relu()
    if kind == "topk":
        top = h.topk(32)
        h = torch.zeros_like(h).scatter(-1, top.indices, top.values)
    x_hat = (torch.nn.functional.linear(h, s["decoder.weight"]) + s["b_dec"]) * norm / x.shape[1] ** 0.5
    del s, pre
    sae = SAE.load_from_disk(folder, dtype="float32")
    with torch.no_grad():
        found = sae.encode(x)
        rebuilt = sae.decode(found)
    return float((found - h).abs().max() / h.abs().max()), float(
        (rebuilt - x_hat).abs().max() / x_hat.abs().max()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-in", type=int, default=4096)
    parser.add_argument("--d-sae", type=int, default=131072)
    parser.add_argument("--kind", choices=("aen", "topk"), default="aen")
    parser.add_argument(
        "--folder", help="for the files, several times the weights (default: the temporary folder)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        checkpoint, folder = Path(temporary) / _NAMES[options.kind], Path(temporary) / "dictionary"
        write_checkpoint(checkpoint, options.d_in, options.d_sae, options.kind)
        start = time.perf_counter()
        answer = subprocess.run(
            [sys.executable, "-c", _CHILD, str(checkpoint), str(folder)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        m = json.loads(answer.stdout.splitlines()[-1])
        weights_gb = (folder / "sae_weights.safetensors").stat().st_size / 1e9
        h_error, x_error = largest_error(checkpoint, folder, options.kind)
        print(f"{options.kind}, {options.d_sae} x {options.d_in}, bfloat16: weights {weights_gb:.2f} GB, checkpoint {checkpoint.stat().st_size / 1e9:.2f} GB")  # fmt: skip
        rows = [
            ("memory before the import (Python, torch, SAELens)", m["before_gb"], None),
            ("peak", m["peak_gb"], (m["peak_gb"] - m["before_gb"]) / weights_gb),
            (
                "peak anonymous",
                m["peak_anonymous_gb"],
                (m["peak_anonymous_gb"] - m["anonymous_before_gb"]) / weights_gb,
            ),
        ]
        print(f"{'':<52}{'GB':>7}{'of the weights, above before':>32}")
        for name, gigabytes, ratio in rows:
            print(f"{name:<52}{gigabytes:>7.2f}{'' if ratio is None else f'{ratio:.2f} x':>32}")
        print(
            f"import {m['seconds']:.1f} s (process {time.perf_counter() - start:.1f} s with the comparison)"
        )
        print(
            f"largest relative error against the formulas: features {h_error:.1e}, reconstruction "
            f"{x_error:.1e}"
        )


if __name__ == "__main__":
    main()
