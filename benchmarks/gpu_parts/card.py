"""What the card can do, where dense and sparse meet, and what copies of harvested activations cost."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from aen_lightning.device_copies import HostCopy, side_stream
from aen_lightning.sparse import cost
from gpu_parts.contestants import OurStep
from gpu_parts.problem import Problem
from gpu_parts.timing import free, timed


def ceilings(device: str, shape: tuple[int, int, int]) -> dict[str, float]:
    """TB/s of a copy, and TFLOP/s of the encoder's product in bf16, TF32 and float32."""
    batch, d_in, d_sae = shape
    x, w = torch.randn(batch, d_in, device=device), torch.randn(d_sae, d_in, device=device)
    found, to = {}, torch.empty_like(w)
    ms = statistics.median(timed(lambda: to.copy_(w), device, warmup=2, repeats=5))
    found["copy_tb_per_s"] = 2 * w.nbytes / ms / 1e9
    flops = 2 * batch * d_in * d_sae
    low_x, low_w = x.bfloat16(), w.bfloat16()
    ms = statistics.median(timed(lambda: low_w @ low_x.t(), device, warmup=2, repeats=5))
    found["bf16_tflops"] = flops / ms / 1e9
    before = torch.get_float32_matmul_precision()
    for name, precision in (("tf32_tflops", "high"), ("fp32_tflops", "highest")):
        torch.set_float32_matmul_precision(precision)
        ms = statistics.median(timed(lambda: w @ x.t(), device, warmup=1, repeats=3))
        found[name] = flops / ms / 1e9
    torch.set_float32_matmul_precision(before)
    return found


def crossover(device: str, shape: tuple[int, int, int], repeats: int) -> list[dict[str, Any]]:
    """Dense and sparse step over the density, in bf16."""
    batch, d_in, d_sae = shape
    rows = []
    for density in (0.001, 0.002, 0.004, 0.008, 0.016):
        problem = Problem(batch, d_in, d_sae, max(1.0, density * d_sae), device)
        row: dict[str, Any] = {"density": density}
        for path in ("dense", "sparse, rows"):
            free(device)
            step = OurStep(problem, path)  # type: ignore[arg-type]
            row[path] = statistics.median(timed(step.step, device, warmup=2, repeats=repeats))
            del step
        rows.append(row)
    return rows


def harvest_copies(device: str, tiny: bool) -> dict[str, float]:
    """Tokens per second of a random Llama of 17 layers, its activations copied to pageable and to pinned memory."""
    from transformers import LlamaConfig, LlamaModel

    sizes = (
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        if tiny
        else {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 17,
            "num_attention_heads": 32,
        }
    )
    config = LlamaConfig(**sizes, num_key_value_heads=4 if tiny else 8, vocab_size=1000)
    with torch.device(device):
        model = LlamaModel(config).bfloat16().eval()
    batch, context = (2, 16) if tiny else (128, 128)
    ids = torch.randint(0, 1000, (batch, context), device=device)
    found = {}
    for name, pinned in (("pageable", False), ("pinned", True)):
        stream = side_stream(torch.device(device)) if pinned else None

        @torch.inference_mode()
        def call(pinned: bool = pinned, stream: Any = stream) -> None:
            x = model(input_ids=ids, use_cache=False).last_hidden_state
            if not pinned:
                x.to("cpu")
            else:
                HostCopy(x, stream)

        ms = statistics.median(timed(call, device, warmup=2, repeats=5))
        found[f"{name}_tokens_per_s"] = batch * context / ms * 1e3
    return found


def card_here(device: str) -> tuple[str, cost.Card | None]:
    """The name of the card, and what the model of cost assumes of it."""
    if device == "cpu":
        return "no GPU: predictions are an H100's", cost.CARDS["h100"]
    name = torch.cuda.get_device_name()
    return name, next((card for key, card in cost.CARDS.items() if key.upper() in name.upper()), None)
