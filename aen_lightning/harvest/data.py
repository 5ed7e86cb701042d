"""The tokens of a harvest: made once, cut into shards, shared out to whatever ranks there are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from aen_lightning.data.options import DatasetOptions, refuse_unknown, require_at_least
from aen_lightning.data.ranks import rank_and_world_size
from aen_lightning.data.token_filter import TokenFilter
from aen_lightning.harvest.batches import HarvestBatches
from aen_lightning.harvest.module import HarvestModule
from aen_lightning.harvest.tokens import (
    MarkedTokenRows,
    read_token_shard,
    token_shard_path,
    write_token_shards,
)
from aen_lightning.harvest.writer import ShardWriter, writer_of
from aen_lightning.language_model.source import load_tokenizer
from aen_lightning.shards.manifest import Manifest, ShardError, require_disk
from aen_lightning.shards.write import ShardFolder


class HarvestDataModule(pl.LightningDataModule):
    """Rows of tokens for ``HarvestModule``, out of a dataset, in an order that no number of ranks can change.

    Rank 0 tokenises the whole text before the first model call and keeps it beside the shards (4 bytes a
    token) until the set is complete. So a run that continues needs no network and no tokenizer, and finds the
    same tokens.

    Args:
        dataset_path: Hub name, folder, file, glob, or list of files. See
            ``aen_lightning.data.documents.open_dataset``.
        model_name: Whose tokenizer; None: the harvested model's.
        revision: Of the tokenizer; None: the model's.
        n_tokens: Tokens the model sees in all, before filters; None: the whole dataset, once.
        batch_size_prompts: Rows a model call.
        pack: Fill rows across documents, no token of padding; a rest that fills no row is left out. False: a
            document is a row (cut every ``context_size`` tokens) and batches are made of rows of like length.
        mask_documents: In packed rows, let no token attend to another document, and count positions within
            documents. The paper does not mask (False).
        **dataset: The other fields of ``aen_lightning.data.options.DatasetOptions``: ``dataset_split``,
            ``context_size``, ...

    Raises:
        TypeError: For an option that does not exist.
        ValueError: For values that make no sense; in ``prepare_data`` for what does not fit the model or the
            dataset.
    """

    def __init__(
        self,
        dataset_path: str | list[str],
        model_name: str | None = None,
        revision: str | None = None,
        n_tokens: int | None = None,
        batch_size_prompts: int = 32,
        pack: bool = True,
        mask_documents: bool = False,
        **dataset: Any,
    ) -> None:
        super().__init__()
        self.prepare_data_per_node = False  # the folder is shared by all nodes
        own = ("model_name", "revision", "n_tokens", "batch_size_prompts", "pack", "mask_documents")
        refuse_unknown(dataset, DatasetOptions, *own)
        self.options = DatasetOptions(dataset_path=dataset_path, **dataset)
        require_at_least(2, context_size=self.options.context_size)
        require_at_least(1, batch_size_prompts=batch_size_prompts, n_tokens=n_tokens)
        self.model_name, self.revision = model_name, revision
        self.n_tokens, self.batch_size_prompts = n_tokens, batch_size_prompts
        self.pack, self.mask_documents = pack, mask_documents
        self._work: list[tuple[int, int, bool]] = []

    def settings(self) -> dict[str, Any]:
        """What decides which tokens are harvested."""
        how = ("streaming", "stream_retries", "stream_backoff_seconds")
        deciding = {name: value for name, value in asdict(self.options).items() if name not in how}
        return deciding | {
            "n_tokens": self.n_tokens,
            "pack": self.pack,
            "mask_documents": self.mask_documents,
            "exclude_token_ids": list(self.options.exclude_token_ids),
        }

    def _module_and_writer(self) -> tuple[HarvestModule, ShardWriter]:
        if self.trainer is None or not isinstance(self.trainer.lightning_module, HarvestModule):
            raise RuntimeError(
                "HarvestDataModule works under Trainer.predict of a HarvestModule: call run_harvest"
            )
        return self.trainer.lightning_module, writer_of(self.trainer)

    def prepare_data(self) -> None:
        """On rank 0: begin or continue the folder; tokenise unless that is done; refuse what the disk cannot
        hold."""
        module, writer = self._module_and_writer()
        self._check_positions(module)
        manifest = self._manifest(module)
        if self.n_tokens is not None and not (writer.path / "manifest.json").exists():
            require_disk(writer.path, self.n_tokens * (manifest.bytes_per_token + 5), force=writer.force_disk)
        folder = ShardFolder(writer.path)
        manifest = folder.begin(manifest)
        if manifest.complete:
            writer.drop_work_orders()  # cut off between the last line of the manifest and this
            return
        done = {s.index for s in manifest.shards}
        if not self._has_work_orders(writer, manifest, done):
            self._write_work_orders(module, writer, manifest)
        missing_rows = sum(n for i, n in enumerate(manifest.plan["rows"]) if i not in done)
        require_disk(
            writer.path,
            missing_rows * self.options.context_size * manifest.bytes_per_token,
            force=writer.force_disk,
        )
        if not missing_rows:
            writer.finish()  # cut off after the last shard

    @staticmethod
    def _has_work_orders(writer: ShardWriter, manifest: Manifest, done: set[int]) -> bool:
        missing = set(range(manifest.n_shards or 0)) - done
        return manifest.n_shards is not None and all(
            token_shard_path(writer.path, i).is_file() for i in missing
        )

    def _write_work_orders(self, module: HarvestModule, writer: ShardWriter, manifest: Manifest) -> None:
        """Tokenise: at first, after being cut off at it, or when a shard of a finished set was deleted to be
        made again."""
        writer.drop_work_orders()
        per_shard = manifest.plan.get("rows_per_shard")
        if per_shard is None:
            row_bytes = self.options.context_size * manifest.bytes_per_token
            # whole batches, so that no shard ends in a small one
            n_batches = int(writer.shard_size_mib * 2**20) // (row_bytes * self.batch_size_prompts)
            per_shard = max(1, n_batches) * self.batch_size_prompts
        rows, excluded = self._rows(module)
        counts = write_token_shards(writer.path, rows, rows_per_shard=per_shard, n_tokens=self.n_tokens)
        if not counts:
            raise ValueError(
                f"the dataset {self.options.dataset_path!r} fills no row of context_size "
                f"{self.options.context_size}"
            )
        if manifest.plan and manifest.plan["rows"] != counts:
            raise ShardError(
                f"{writer.path} was made of {sum(manifest.plan['rows'])} rows of tokens, and the dataset now "
                f"gives {sum(counts)}: it has changed; harvest into another folder"
            )
        n_read = sum(len(read_token_shard(writer.path, i).tokens) for i in range(len(counts)))
        if self.n_tokens is not None and n_read < self.n_tokens:
            rank_zero_warn(
                f"the dataset ends after {n_read} tokens; n_tokens was {self.n_tokens}: the set holds what "
                "there is"
            )
        manifest.plan = {"rows_per_shard": per_shard, "rows": counts, "exclude_token_ids": excluded}
        manifest.n_shards = len(counts)
        manifest.write(writer.path)

    def _manifest(self, module: HarvestModule) -> Manifest:
        settings, options = module.settings() | self.settings(), self.options
        multiple = module.token_filter.norm_outlier_multiple
        if multiple is not None:
            settings["batch_size_prompts"] = self.batch_size_prompts  # the median is over a batch
        names = [h.hook_name for h in module.hooks]
        metadata = {
            "model_name": module.model_name,
            "revision": module.revision,
            "model_class_name": "AutoModelForCausalLM",
            "model_from_pretrained_kwargs": settings["model_from_pretrained_kwargs"],
            "hook_name": names[0] if len(names) == 1 else names,
            "hf_hook_names": {h.hook_name: h.hf_hook_name for h in module.hooks},
            "model_dtype": module.model_dtype,
            "disable_concat_sequences": not self.pack,
            "mask_documents": self.mask_documents,
        }
        metadata |= options.metadata()
        filters = {
            "exclude_special_tokens": options.exclude_special_tokens,
            "exclude_token_ids": list(options.exclude_token_ids),
            "norm_outlier_multiple": multiple,
        }
        return Manifest(
            d_in=module.d_in,
            dtype=module.stored_dtype,
            context_size=options.context_size,
            metadata=metadata,
            filters=filters,
            settings=settings,
        )

    def _check_positions(self, module: HarvestModule) -> None:
        most = getattr(module.hf_config, "max_position_embeddings", None)
        if most is not None and self.options.context_size > most:
            raise ValueError(f"context_size {self.options.context_size} exceeds the model's {most} positions")
        if self.mask_documents and not self.pack:
            raise ValueError(
                "mask_documents is for packed rows; without packing a row holds one document only"
            )

    def _rows(self, module: HarvestModule) -> tuple[Iterator[tuple[Tensor, Tensor]], list[int]]:
        """The tokens of the dataset, and the ids whose activations are not kept."""
        options = self.options
        tokenizer = load_tokenizer(
            self.model_name or module.model_name, revision=self.revision or module.revision,
            model_from_pretrained_kwargs=module.model_from_pretrained_kwargs,
        )  # fmt: skip
        rows = MarkedTokenRows.of(options, options.open_dataset(), tokenizer, pack=self.pack, shuffle=False)
        return rows.marked(), list(options.excluded_token_ids(tokenizer))

    def setup(self, stage: str) -> None:
        """On every rank: take a share of the missing shards; every rank makes the same number of model
        calls."""
        _, writer = self._module_and_writer()
        # as rank 0 left it in prepare_data: a quick rank may be writing records by now, and all must see the
        # same work
        manifest = Manifest.read(writer.path)
        done = {s.index for s in manifest.shards}
        rank, world_size = rank_and_world_size(self.trainer)
        rows = manifest.plan["rows"] if manifest.plan else []
        missing = [i for i in range(len(rows)) if i not in done]

        def calls(indices: list[int]) -> list[tuple[int, int, bool]]:
            return [(i, b, True) for i in indices for b in range(-(-rows[i] // self.batch_size_prompts))]

        shares = [calls(missing[r::world_size]) for r in range(world_size)]
        longest = max(len(s) for s in shares)
        # a sharded model needs all ranks at each call: idle ranks repeat one, whose result is not written
        filler = [(missing[0], 0, False)] if missing else []
        self._work = shares[rank] + filler * (longest - len(shares[rank]))
        self._token_filter = TokenFilter(tuple(manifest.plan.get("exclude_token_ids", ())))
        self._path = writer.path

    @property
    def n_batches(self) -> int:
        """Model calls that this rank, like every other, has to make."""
        return len(self._work)

    def predict_dataloader(self) -> HarvestBatches:
        """The batches of this rank, shard after shard."""
        return HarvestBatches(
            self._path,
            self._work,
            batch_size=self.batch_size_prompts,
            token_filter=self._token_filter,
            mask_documents=self.mask_documents,
        )
