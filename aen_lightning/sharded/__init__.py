"""SAEs too big for one GPU: the features are sharded over the ranks, and every rank sees the whole batch.

One all-reduce of the reconstruction a step, besides vectors of one number a feature. Sources: the parallel layers of
Shoeybi et al. (arXiv:1909.08053), with the reconstruction as the row-parallel product.
"""

from aen_lightning.sharded.export import export_sharded_sae
from aen_lightning.sharded.gradients import clip_gradients_
from aen_lightning.sharded.saes import FeatureSharded, empty_sharded_sae
from aen_lightning.sharded.sharding import FeatureSharding
from aen_lightning.sharded.strategy import feature_mesh, in_turns

__all__ = [
    "FeatureSharded", "FeatureSharding", "clip_gradients_", "empty_sharded_sae", "export_sharded_sae",
    "feature_mesh", "in_turns",
]  # fmt: skip
