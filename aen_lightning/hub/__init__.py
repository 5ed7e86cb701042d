"""Dictionaries on the Hugging Face Hub: publish, fetch, and adopt the checkpoints of the paper's authors."""

from aen_lightning.hub.checkpoint import Checkpoint, read_checkpoint
from aen_lightning.hub.checkpoint_config import AUTHORS_REPO
from aen_lightning.hub.checkpoint_settings import KINDS
from aen_lightning.hub.imports import (
    authors_checkpoint_disk_loader,
    authors_checkpoint_loader,
    fetch_checkpoint,
    import_checkpoint,
)
from aen_lightning.hub.plan import Plan, plan_push
from aen_lightning.hub.pull import Pulled, listing, load_pretrained, pull, usage
from aen_lightning.hub.push import Published, publish, push
from aen_lightning.hub.remote import Remote, look_up, read_config
from aen_lightning.hub.retry import HubError

__all__ = [
    "AUTHORS_REPO",
    "KINDS",
    "Checkpoint",
    "HubError",
    "Plan",
    "Published",
    "Pulled",
    "Remote",
    "authors_checkpoint_disk_loader",
    "authors_checkpoint_loader",
    "fetch_checkpoint",
    "import_checkpoint",
    "listing",
    "load_pretrained",
    "look_up",
    "plan_push",
    "publish",
    "pull",
    "push",
    "read_checkpoint",
    "read_config",
    "usage",
]
