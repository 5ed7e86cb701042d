"""Lightning callbacks. Each says *when* something happens; the state and the mathematics live in the SAE.

Import them as ``aen_lightning.callbacks``. ``SAEModule`` supplies the standard ones.
"""

from aen_lightning.callbacks.dead_features import DeadFeatureTracker
from aen_lightning.callbacks.ema import EMAWeightRefresh
from aen_lightning.callbacks.evaluate import EvaluateDictionaries
from aen_lightning.callbacks.export import ExportSAE
from aen_lightning.callbacks.hard_finish import HardFinish
from aen_lightning.callbacks.initialize import InitializeFromData
from aen_lightning.callbacks.interrupt import Interrupted, SaveOnSignal
from aen_lightning.callbacks.publish import PublishToHub
from aen_lightning.callbacks.rank_watch import RankWatch
from aen_lightning.callbacks.refit_finish import RefitFinish
from aen_lightning.callbacks.revive import ReviveSilent
from aen_lightning.callbacks.sparsity_target import TargetL0
from aen_lightning.callbacks.throughput import Throughput
from aen_lightning.callbacks.warmup import DelayedWarmup

__all__ = [
    "DeadFeatureTracker", "DelayedWarmup", "EMAWeightRefresh", "EvaluateDictionaries", "ExportSAE",
    "HardFinish",
    "InitializeFromData", "Interrupted", "PublishToHub", "RankWatch", "RefitFinish", "ReviveSilent", "SaveOnSignal", "TargetL0", "Throughput",
]  # fmt: skip
