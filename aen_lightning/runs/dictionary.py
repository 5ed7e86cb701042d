"""A dictionary on disk: a SAELens folder, of a run or not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
)
from torch import Tensor

from aen_lightning.files import read_json, read_tensor, require_finite
from aen_lightning.files.checked import Foreign, Number, read_checked
from aen_lightning.runs.ids import check_id, id_of_one, ids_of_several
from aen_lightning.runs.layout import is_dictionary, is_step, run_of
from aen_lightning.runs.weights import check_config
from aen_lightning.saes.export import ADAPTIVE_STATE_FILENAME


@dataclass(frozen=True)
class Dictionary:
    """A SAELens folder on disk. Tensors are read when they are asked for.

    Args:
        path: The folder.
        cfg: Its ``cfg.json``.
        run: The folder of the run that wrote it; None if it lies in none.
        name: Its name among the SAEs of its run; empty for the only one.
        sae_id: What it is called in a repository, and the folder it gets there.
    """

    path: Path
    cfg: dict[str, Any]
    run: Path | None = None
    name: str = ""
    sae_id: str = ""

    @property
    def metadata(self) -> dict[str, Any]:
        """SAELens's metadata; empty if it has none."""
        return dict(self.cfg.get("metadata") or {})

    @property
    def training_architecture(self) -> str:
        """The architecture it was trained as, whatever it is saved as."""
        return str(self.metadata.get("training_architecture") or self.cfg.get("architecture", "standard"))

    def log_sparsity(self) -> Tensor | None:
        """``log10`` of each feature's firing rate per token, shape (d_sae,); None if it was not saved."""
        return self._per_feature(read_log_sparsity(self.path), SPARSITY_FILENAME)

    def l1_weights(self) -> Tensor | None:
        """L1 weights at the end of training, (d_sae,), multiples of the L1 coefficient; None if not saved.

        They lie beside an exported dictionary, and among the weights of one that was saved for training.
        """
        beside = self.path / ADAPTIVE_STATE_FILENAME
        file = beside if beside.is_file() else self.path / SAE_WEIGHTS_FILENAME
        # an imported checkpoint has the running means only
        weights = self._per_feature(read_tensor(file, "l1_weights"), file.name)
        if weights is not None:
            require_finite([("l1_weights", weights)], file)
        return weights

    def _per_feature(self, values: Tensor | None, file: str) -> Tensor | None:
        if values is not None and tuple(values.shape) != (self.cfg["d_sae"],):
            raise ValueError(
                f"{self.path / file} has values of shape {tuple(values.shape)}, expected one for each of "
                f"{self.cfg['d_sae']} features"
            )
        return values

    def W_dec(self) -> Tensor:
        """Decoder directions as stored, shape (d_sae, d_in).

        Raises:
            ValueError: If the weights hold none, one of another shape, or numbers that are not finite.
        """
        file = self.path / SAE_WEIGHTS_FILENAME
        W_dec = read_tensor(file, "W_dec")
        if W_dec is None:
            raise ValueError(f"{file} has no tensor W_dec")
        if tuple(W_dec.shape) != (expected := (self.cfg["d_sae"], self.cfg["d_in"])):
            raise ValueError(
                f"{file}: W_dec has shape {tuple(W_dec.shape)} where the config means {expected}"
            )
        require_finite([("W_dec", W_dec)], file)
        return W_dec


def read_cfg(path: Path) -> dict[str, Any]:
    """``cfg.json`` of a SAELens folder.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is no JSON object, lacks the sizes, or has a field of another type or out of range.
    """
    file = path / SAE_CFG_FILENAME
    return check_config(read_json(file), file)


def read_log_sparsity(path: Path) -> Tensor | None:
    """``log10`` of each feature's firing rate per token as saved in a folder, shape (d_sae,), or None."""
    file = path / SPARSITY_FILENAME
    return read_tensor(file, "sparsity") if file.is_file() else None


def read_activation_scale(path: Path) -> float | None:
    """The average scale that SAELens's trainer leaves beside a checkpoint's weights, or None.

    Raises:
        ValueError: If the file is there and holds no number.
    """
    file = path / ACTIVATION_SCALER_CFG_FILENAME
    if not file.is_file():
        return None
    return read_checked(file, _ActivationScaler).scaling_factor


class _ActivationScaler(Foreign):
    """``activation_scaler.json`` of SAELens."""

    scaling_factor: Annotated[Number, Field(gt=0)] | None = None


def dictionaries_in(root: Path) -> list[Dictionary]:
    """The finished dictionaries in a folder, which may be one itself, by their paths; perhaps none.

    What a run wrote beside its checkpoints (``sae/step_N``) is left out; name such a folder itself to have
    it.

    Raises:
        ValueError: For a ``cfg.json`` that is none.
    """
    paths = [root] if is_dictionary(root) else _below(root)
    return [Dictionary(path, read_cfg(path), *run_of(path)) for path in paths]


def _below(root: Path) -> list[Path]:
    folders = (file.parent for file in sorted(root.rglob(SAE_CFG_FILENAME)))
    # steps are a run's checkpoints whether they lie right here or below `sae`
    return [
        folder
        for folder in folders
        if is_dictionary(folder)
        and not any(part.startswith(".") or is_step(part) for part in folder.relative_to(root).parts)
    ]


def find_dictionaries(root: str | Path, *, sae_id: str | None = None) -> list[Dictionary]:
    """The finished dictionaries in a folder, with the IDs they get in a repository.

    What a run wrote beside its checkpoints (``sae/step_N``) is left out; name such a folder itself to have
    it.

    Args:
        root: A SAELens folder, a run's folder, or a folder of runs.
        sae_id: ID for the only dictionary there.

    Returns:
        In the order of their IDs, which are the folders' names without what every run has (``sae/final``,
        ``version_0``). A single dictionary is called after its hook.

    Raises:
        FileNotFoundError: If there is no such folder, or no finished dictionary in it.
        ValueError: For an unusable ID, or a ``cfg.json`` that is none.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(
            f"no folder {str(root)!r}: give a run's folder, a SAELens folder, or a folder of several"
        )
    found = dictionaries_in(root)
    if not found:
        raise FileNotFoundError(
            f"no dictionary below {str(root)!r}: looked for {SAE_CFG_FILENAME} beside {SAE_WEIGHTS_FILENAME} "
            "(a run writes them to sae/final when it ends; a sae/step_N folder can be named itself)"
        )
    if sae_id is not None and len(found) > 1:
        raise ValueError(
            f"an ID can be given to one dictionary only, and below {str(root)!r} there are {len(found)}"
        )
    if sae_id is not None:
        ids = [sae_id]
    elif len(found) == 1:
        hook_name = found[0].metadata.get("hook_name") or found[0].cfg.get("hook_name")
        ids = [id_of_one(root, found[0].path, hook_name)]
    else:
        ids = ids_of_several([d.path.relative_to(root).parts for d in found])
    named = [
        replace(d, sae_id=check_id(i, found_in=d.path if sae_id is None else None))
        for d, i in zip(found, ids, strict=True)
    ]
    return sorted(named, key=lambda d: d.sae_id)
