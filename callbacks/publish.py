"""Publishes the finished dictionaries on the Hugging Face Hub when the fit ends."""

from __future__ import annotations

import lightning.pytorch as pl
from huggingface_hub import HfApi, get_token
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from aen_lightning.callbacks.export import ExportSAE
from aen_lightning.callbacks.modules import training_saes
from aen_lightning.hub.push import push
from aen_lightning.hub.retry import HubError, hub_errors, with_retries
from aen_lightning.hub.staging import PublishedArchitecture
from aen_lightning.runs.layout import FINAL_FOLDER


class PublishToHub(pl.Callback):
    """One commit with every dictionary of the run and its model card, after ``ExportSAE`` has written them.

    Rank 0 publishes, and no other rank waits. A run that is interrupted or fails publishes nothing; ``aen
    push`` does it later. The login is huggingface_hub's own (``hf auth login``, ``HF_TOKEN``) and is checked
    before the first step.

    Args:
        repo_id: ``OWNER/REPO``; made if missing.
        revision: Branch, made if missing. None: ``main``.
        private: Make the repository private.
        architecture: What dictionaries trained as ``aen`` call themselves: ``standard`` loads without this
            package.
        sae_id: Name of the dictionary, if the run has one. None: its hook's.
        model_name: Hub name of the language model, where the run knows only a folder.
        dataset: Hub name of the data set, likewise.
        license_name: For the card: ``mit``, ...

    Raises:
        HubError: In ``setup`` without a login that works; at the end if the Hub refuses. The run's folder is
            complete then.
    """

    def __init__(
        self,
        repo_id: str,
        revision: str | None = None,
        private: bool = False,
        architecture: PublishedArchitecture = "standard",
        sae_id: str | None = None,
        model_name: str | None = None,
        dataset: str | None = None,
        license_name: str | None = None,
    ) -> None:
        if architecture not in ("standard", "aen"):
            raise ValueError(f"architecture must be 'standard' or 'aen', got {architecture!r}")
        self.repo_id, self.revision, self.private = repo_id, revision, private
        self.architecture, self.sae_id = architecture, sae_id
        self.model_name, self.dataset, self.license_name = model_name, dataset, license_name
        self.published_commit: str | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a run that could not publish in the end."""
        if stage != "fit":
            return
        training_saes(pl_module, self)
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if get_token() is None:
            raise HubError(
                f"PublishToHub to {self.repo_id} needs a login: run `hf auth login`, or set HF_TOKEN"
            )
        with hub_errors(self.repo_id, "checking the login for"):
            with_retries(lambda: HfApi().whoami(), "checking the login")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Publish what ``ExportSAE`` wrote in ``on_fit_end``, which all callbacks have behind them here."""
        if stage != "fit" or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        folder = next((c.resolved_dirpath for c in callbacks if isinstance(c, ExportSAE)), None)
        if folder is None:
            raise TypeError("PublishToHub publishes what ExportSAE writes: add the callback ExportSAE")
        for logger in trainer.loggers:
            logger.save()  # the card's numbers are read from its file
        try:
            done = push(
                folder / FINAL_FOLDER, self.repo_id, revision=self.revision, private=self.private,
                architecture=self.architecture, sae_id=self.sae_id, model_name=self.model_name,
                dataset=self.dataset, license_name=self.license_name,
            )  # fmt: skip
        except HubError as error:
            raise HubError(
                f"{error} (the dictionaries are in {folder}; `aen push` publishes them)"
            ) from error
        self.published_commit = done.commit
        rank_zero_info(f"published {', '.join(done.sae_ids)} in commit {done.commit}: {done.url}")
