"""Dictionaries on the Hugging Face Hub: publish, fetch, and adopt the checkpoints of the paper's authors."""

from aen_lightning.hub.checkpoint import Checkpoint, read_checkpoint
from aen_lightning.hub.imports import (
    AUTHORS_REPO,
    authors_checkpoint_disk_loader,
    authors_checkpoint_loader,
    import_checkpoint,
)
from aen_lightning.hub.plan import Plan, plan_push
from aen_lightning.hub.pull import Pulled, load_pretrained, pull
from aen_lightning.hub.push import Published, publish, push
from aen_lightning.hub.remote import Remote, look_up
from aen_lightning.hub.retry import HubError

__all__ = [
    "AUTHORS_REPO",
    "Checkpoint",
    "HubError",
    "Plan",
    "Published",
    "Pulled",
    "Remote",
    "authors_checkpoint_disk_loader",
    "authors_checkpoint_loader",
    "import_checkpoint",
    "load_pretrained",
    "look_up",
    "plan_push",
    "publish",
    "pull",
    "push",
    "read_checkpoint",
]
