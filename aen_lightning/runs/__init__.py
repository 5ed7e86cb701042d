"""What a run leaves on disk, and its only reader: the layout, dictionaries, curves and provenance."""

from aen_lightning.runs.curves import Curves, read_curves, read_sweep
from aen_lightning.runs.dictionary import Dictionary, find_dictionaries
from aen_lightning.runs.provenance import collect_provenance, scrub, training_settings

__all__ = [
    "Curves",
    "Dictionary",
    "collect_provenance",
    "find_dictionaries",
    "read_curves",
    "read_sweep",
    "scrub",
    "training_settings",
]
