"""Activations on disk: safetensors shards beside a ``manifest.json``; write, read, verify, convert to and
from SAELens.

A set is a folder: ``shard-00000.safetensors``, ... each with ``token_ids`` (n_tokens,) int32 and one tensor
(n_tokens, d_in) per hook point, and ``manifest.json``, which says what they are. A shard exists whole or not
at all: it is written under another name, hashed, and renamed; its record follows, and the manifest that lists
all records is written last.
"""

from aen_lightning.shards.convert import Conversion, convert, from_saelens, to_saelens
from aen_lightning.shards.manifest import Manifest, ShardError, ShardRecord, require_disk
from aen_lightning.shards.read import ShardSet, info, open_activations, verify
from aen_lightning.shards.saelens_cache import SAELensCache
from aen_lightning.shards.source import ActivationSource
from aen_lightning.shards.write import ShardFolder, ShardStream

__all__ = [
    "ActivationSource", "Conversion", "Manifest", "SAELensCache", "ShardError", "ShardFolder", "ShardRecord",
    "ShardSet", "ShardStream", "convert", "from_saelens", "info", "open_activations", "require_disk",
    "to_saelens", "verify",
]  # fmt: skip
