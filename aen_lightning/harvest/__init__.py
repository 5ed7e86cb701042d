"""``aen harvest``: the activations of a language model to disk, by Lightning's ``predict``.

``HarvestDataModule`` tokenises the text once and cuts the work into shards that do not depend on the number
of ranks; ``HarvestModule`` runs the model up to the deepest hook point; ``ShardWriter`` writes in the
background. A run that is cut off is continued by running it again, on any number of ranks: shards that exist
are kept, the others made.
"""

from aen_lightning.harvest.data import HarvestDataModule
from aen_lightning.harvest.module import HarvestModule
from aen_lightning.harvest.run import run_harvest
from aen_lightning.harvest.writer import ShardWriter

__all__ = ["HarvestDataModule", "HarvestModule", "ShardWriter", "run_harvest"]
