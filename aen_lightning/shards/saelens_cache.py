"""Reading the cached-activation datasets of SAELens, memory-mapped."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import torch
from pyarrow.lib import ArrowException
from pydantic import Field
from torch import Tensor

from aen_lightning.compat import is_index_into_other_rows
from aen_lightning.files import DTYPES
from aen_lightning.files.checked import FileName, Foreign, read_checked
from aen_lightning.shards.manifest import ShardError, file_inside
from aen_lightning.shards.source import ActivationSource
from aen_lightning.spelling import printable


class _DataFile(Foreign):
    filename: FileName


class _State(Foreign):
    """``state.json`` of a dataset on disk, as far as it names files."""

    data_files: Annotated[list[_DataFile], Field(alias="_data_files")]


def _check_file_names(folder: Path) -> None:
    try:
        for file in read_checked(folder / "state.json", _State).data_files:
            file_inside(folder, file.filename)
    except ValueError as error:
        raise ShardError(f"{error}; {folder} is no dataset that SAELens cached, or a damaged one") from error


class SAELensCache(ActivationSource):
    """A cached-activation dataset of SAELens (Arrow; one column (context_size, d_in) per hook point, maybe
    ``token_ids``).

    Args:
        path: Folder that SAELens's ``CacheActivationsRunner`` or ``datasets.save_to_disk`` wrote.

    Raises:
        ShardError: If it has no activation column, or has missing values.
    """

    def __init__(self, path: str | Path) -> None:
        import datasets

        self.path = Path(path)
        _check_file_names(self.path)
        try:
            dataset = datasets.load_from_disk(str(path))
        except (
            ArrowException,
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            IndexError,
        ) as error:
            reason = " ".join(printable(f"{type(error).__name__}: {error}").split())
            raise ShardError(f"{path} cannot be read as a dataset that SAELens cached: {reason}") from error
        if not isinstance(dataset, datasets.Dataset):
            raise ShardError(f"{path} holds several datasets ({', '.join(dataset)}): give the folder of one")
        if is_index_into_other_rows(dataset):
            raise ShardError(
                f"{path} is an index into other rows: write it with dataset.flatten_indices() first"
            )
        self._table = dataset.data
        columns = {n: f for n, f in dataset.features.items() if isinstance(f, datasets.Array2D)}
        if not columns:
            raise ShardError(f"{path} has no column of activations (Array2D), only {dataset.column_names}")
        shapes = {f.shape for f in columns.values()}
        if len({s[0] for s in shapes}) > 1:
            raise ShardError(f"{path}: the columns differ in context_size: {sorted(shapes)}")
        self.d_in = {n: f.shape[1] for n, f in columns.items()}
        self.context_size = next(iter(shapes))[0]
        stored = next(iter(columns.values())).dtype
        if stored not in DTYPES:
            raise ShardError(f"{path} has activations of {stored}, expected one of {', '.join(DTYPES)}")
        self.dtype = DTYPES[stored]
        self.metadata = {}
        self._columns = [*columns, *(["token_ids"] if "token_ids" in dataset.column_names else [])]
        chunks = self._table.column(next(iter(columns))).chunks
        self.part_sizes = [len(c) * self.context_size for c in chunks]
        self._parts: dict[int, dict[str, Tensor]] = {}

    def part(self, index: int) -> dict[str, Tensor]:
        """See base class: one Arrow record batch, without copying it."""
        if index not in self._parts:
            self._parts[index] = {name: self._column(name, index) for name in self._columns}
        return self._parts[index]

    def _column(self, name: str, index: int) -> Tensor:
        array = self._table.column(name).chunk(index)
        array = getattr(array, "storage", array)
        while hasattr(array, "flatten") and hasattr(array.type, "value_type"):
            array = array.flatten()
        expected = self.part_sizes[index] * self.d_in.get(name, 1)
        if array.null_count or len(array) != expected:
            raise ShardError(
                f"{self.path}: column {name!r} has missing or ragged values, expected {expected}, got "
                f"{len(array)}"
            )
        with warnings.catch_warnings():
            # mapped read-only; nothing here writes to it
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            flat = torch.from_numpy(array.to_numpy(zero_copy_only=True))
        return flat.view(-1, self.d_in[name]) if name in self.d_in else flat
