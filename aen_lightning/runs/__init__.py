"""What a run leaves on disk, and the only reader of it: where things are, the dictionaries, the curves, the provenance."""

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
