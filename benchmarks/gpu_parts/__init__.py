"""Parts of ``benchmarks/gpu_step.py``. To be imported before Triton: a dry run takes its interpreter."""

from __future__ import annotations

import importlib.util
import os
import sys

TRITON = importlib.util.find_spec("triton") is not None
if TRITON and "--dry-run" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported
