"""What ``benchmarks/gpu_step.py`` measured, beside what was predicted of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from aen_lightning.files.checked import OURS, Flag, Number, Size, Text, Word, read_checked

_Positive = Annotated[float, Field(gt=0, strict=True)]


class _Open(BaseModel):
    # of the file we read a part; a newer script may write more
    model_config = OURS | {"extra": "ignore"}


class MeasuredStep(_Open):
    """A line of the benchmark: times in milliseconds, memory in GiB, shape ``(batch, d_in, d_sae)``."""

    name: Word
    shape: Annotated[list[Size], Field(min_length=3, max_length=3)]
    l0: _Positive
    firing: Word
    ms: _Positive
    predicted_ms: _Positive | None
    peak_gib: Number | None = None
    predicted_gib: Number | None = None

    @property
    def times_predicted(self) -> float | None:
        """Measured time over predicted time; None if nothing was predicted for that card."""
        return None if self.predicted_ms is None else self.ms / self.predicted_ms

    def as_numbers(self) -> dict[str, Any]:
        """Plain values."""
        return self.model_dump() | {"measured_over_predicted": self.times_predicted}


class Measured(_Open):
    """The file that ``benchmarks/gpu_step.py --json`` writes; ``str()`` of it is a table."""

    device: Text
    dry_run: Flag
    steps: Annotated[list[MeasuredStep], Field(max_length=10_000)]

    def __str__(self) -> str:
        width = max([len("step"), *(len(step.name) for step in self.steps)])
        lines = [
            f"measured on: {self.device}",
            f"{'step':<{width}}  {'batch, d_in, d_sae':<20} {'L0':>5} {'firing':<8}"
            f"{'predicted ms':>13}{'measured ms':>13}{'ratio':>8}",
        ]
        for step in self.steps:
            shape = ", ".join(map(str, step.shape))
            lines.append(
                f"{step.name:<{width}}  {shape:<20} {step.l0:>5g} {step.firing:<8}"
                f"{_cell(step.predicted_ms)}{step.ms:>13.2f}{_cell(step.times_predicted, 8)}"
            )
        if self.dry_run:
            lines.append("note: a dry run; its times say nothing of a GPU")
        return "\n".join(lines)


def _cell(value: float | None, width: int = 13) -> str:
    return f"{'-' if value is None else format(value, '.2f'):>{width}}"


def read_measured(path: Path) -> Measured:
    """The results of ``benchmarks/gpu_step.py``.

    Raises:
        ValueError: In one line, if the file is not there or not what that script writes.
    """
    try:
        return read_checked(path, Measured)
    except FileNotFoundError as error:
        raise ValueError(f"measured: there is no file {path}") from error
    except ValueError as error:
        raise ValueError(f"not a file of `benchmarks/gpu_step.py --json`: {error}") from error
