"""Reading dictionaries from the Hub: fetch what is asked for, check it, say how to use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from sae_lens import SAE
from sae_lens.constants import SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME

from aen_lightning.hub.remote import Remote, choose, download, look_up, read_config
from aen_lightning.runs.ids import check_id
from aen_lightning.runs.weights import check_weights, expected_shapes
from aen_lightning.spelling import printable


@dataclass(frozen=True)
class Pulled:
    """A dictionary in the local cache.

    Args:
        path: Its folder, as ``SAE.load_from_disk`` reads it.
        repo_id: ``OWNER/REPO``.
        sae_id: Its ID there.
        commit: The commit it is from.
        cfg: Its ``cfg.json``.
    """

    path: Path
    repo_id: str
    sae_id: str
    commit: str
    cfg: dict[str, Any]


def pull(
    repo_id: str,
    sae_id: str | None = None,
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
) -> Pulled:
    """Fetch a dictionary into huggingface_hub's cache and check it: config, then weights, then hashes.

    Everything comes from one commit, that ``revision`` means now. What is cached already is checked and not
    fetched again.

    Args:
        repo_id: ``OWNER/REPO``.
        sae_id: None: the only one there.
        revision: Branch, tag or commit. None: ``main``.
        endpoint: Of another Hub; None: ``HF_ENDPOINT``, or huggingface.co.
        token: None: huggingface_hub's own login, if any.

    Raises:
        HubError: If it is not there, may not be read, or cannot be fetched in full and unharmed.
        ValueError: If the weights do not fit their config; it says in what.
    """
    remote = look_up(repo_id, revision, endpoint=endpoint, token=token)
    chosen = check_id(choose(remote, sae_id))
    cfg = read_config(remote, chosen, endpoint=endpoint, token=token)
    expected_shapes(cfg)  # refuse a config that cannot be loaded before gigabytes are fetched
    api = HfApi(endpoint=endpoint, token=token)
    weights = download(remote, f"{chosen}/{SAE_WEIGHTS_FILENAME}", api)
    if f"{chosen}/{SPARSITY_FILENAME}" in remote.files:
        download(remote, f"{chosen}/{SPARSITY_FILENAME}", api)
    check_weights(cfg, weights)
    return Pulled(weights.parent, repo_id, chosen, remote.commit, cfg)


def load_pretrained(
    repo_id: str,
    sae_id: str | None = None,
    *,
    revision: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
) -> SAE[Any]:
    """:func:`pull`, then load: ``SAE.from_pretrained`` with a revision, checks, and clear errors.

    Args:
        repo_id: ``OWNER/REPO``.
        sae_id: None: the only one there.
        revision: Branch, tag or commit. None: ``main``.
        device: Where the weights go.
        dtype: None: as stored.
        endpoint: As for :func:`pull`.
        token: As for :func:`pull`.
    """
    pulled = pull(repo_id, sae_id, revision=revision, endpoint=endpoint, token=token)
    return SAE.load_from_disk(pulled.path, device=device, dtype=dtype)  # checked by pull, down to each number


def usage(pulled: Pulled) -> str:
    """How to use a pulled dictionary, as text."""
    cfg, metadata = pulled.cfg, dict(pulled.cfg.get("metadata") or {})
    needs = "import aen_lightning  # registers the architecture\n" if cfg.get("architecture") == "aen" else ""
    lines = [
        f"{pulled.sae_id} from {pulled.repo_id} at commit {pulled.commit}",
        f"  {cfg.get('architecture', 'standard')}, d_in {cfg.get('d_in')}, d_sae {cfg.get('d_sae')}, "
        f"{cfg.get('dtype')}",
    ]
    if metadata.get("model_name"):
        lines.append(f"  {metadata['model_name']}, {metadata.get('hook_name')}")
    lines += [
        f"  {pulled.path}",
        "",
        f"{needs}from sae_lens import SAE",
        f'sae = SAE.load_from_disk("{pulled.path}")  # this commit, offline too',
        f'sae = SAE.from_pretrained("{pulled.repo_id}", "{pulled.sae_id}")  # whatever main is then',
    ]
    return printable("\n".join(lines))


def listing(remote: Remote, configs: Sequence[tuple[str, dict[str, Any]]]) -> list[list[str]]:
    """Rows of ID, architecture, sizes, hook and model, and megabytes of weights."""
    rows = []
    for sae_id, cfg in configs:
        metadata = dict(cfg.get("metadata") or {})
        megabytes = remote.files[f"{sae_id}/{SAE_WEIGHTS_FILENAME}"].size / 1e6
        row = [
                sae_id, str(cfg.get("architecture", "standard")), f"{cfg.get('d_in')} -> {cfg.get('d_sae')}",
                str(metadata.get("hook_name") or cfg.get("hook_name") or ""),
                str(metadata.get("model_name") or ""),
                f"{megabytes:.1f} MB",
            ]  # fmt: skip
        rows.append([" ".join(printable(cell).split()) for cell in row])
    return rows
