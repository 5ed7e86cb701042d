"""Dictionaries on the Hugging Face Hub: publish, fetch, and adopt the checkpoints of the paper's authors."""

from aen_lightning.hub.checkpoint import Checkpoint, read_checkpoint
from aen_lightning.hub.imports import (
    AUTHORS_REPO,
    authors_checkpoint_disk_loader,
    authors_checkpoint_loader,
    import_checkpoint,
)
from aen_lightning.hub.pull import Pulled, Remote, load_pretrained, look_up, pull
from aen_lightning.hub.push import Plan, Published, plan_push, publish, push
from aen_lightning.hub.retry import HubError
from aen_lightning.runs.dictionary import Dictionary, find_dictionaries

__all__ = [
    "AUTHORS_REPO",
    "Checkpoint",
    "Dictionary",
    "HubError",
    "Plan",
    "Published",
    "Pulled",
    "Remote",
    "authors_checkpoint_disk_loader",
    "authors_checkpoint_loader",
    "find_dictionaries",
    "import_checkpoint",
    "load_pretrained",
    "look_up",
    "plan_push",
    "publish",
    "pull",
    "push",
    "read_checkpoint",
]
