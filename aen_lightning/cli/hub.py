"""``aen push``, ``aen pull`` and ``aen import``."""

from __future__ import annotations

import sys
from typing import Literal

_MOST_CONFIGS = 100


def push(
    folder: str,
    repo: str,
    *,
    revision: str | None = None,
    private: bool = False,
    dry_run: bool = False,
    architecture: Literal["standard", "aen"] = "standard",
    id: str | None = None,
    model_name: str | None = None,
    dataset: str | None = None,
    license: str | None = None,
) -> None:
    """Publish dictionaries on the Hugging Face Hub.

    Those of a run, of several, or of one SAELens folder, in one commit with a model card. Run it again after
    a failure: what arrived is not sent twice. The token is the one that `hf auth login` stored, or HF_TOKEN;
    it is never an argument. HF_ENDPOINT names another Hub.

    Args:
        folder: A run's folder, a SAELens folder, or a folder of several.
        repo: OWNER/REPO on the Hub; made if missing.
        revision: Branch to publish to, made if missing. null: main.
        private: Make the repository private.
        dry_run: Print the tree, the sizes and the card; no network.
        architecture: What dictionaries trained as aen call themselves: standard loads without this package.
        id: Name of the only dictionary. null: its folder's, or its hook's.
        model_name: Hub name of the language model, where the run knew only a folder.
        dataset: Hub name of the data set, likewise.
        license: For the card, e.g. mit.
    """
    from huggingface_hub.utils import disable_progress_bars

    from aen_lightning.cli.output import remark
    from aen_lightning.hub.plan import plan_push
    from aen_lightning.hub.push import publish
    from aen_lightning.progress import working
    from aen_lightning.spelling import printable

    if not sys.stderr.isatty():
        disable_progress_bars()  # in a file they are thousands of lines

    with plan_push(
        folder,
        repo,
        architecture=architecture,
        sae_id=id,
        model_name=model_name,
        dataset=dataset,
        license_name=license,
    ) as plan:
        remark(f"{plan.repo_id}, {revision or 'main'}\n{plan.tree()}")
        for note in plan.notes:
            remark(f"note: {note}")
        if dry_run:
            print("\nREADME.md (dictionaries and text that the repository may hold already will be kept):")
            print(f"\n{printable(plan.card(revision=revision))}\ndry run: nothing was published")
            return
        with working(f"publishing to {plan.repo_id}"):
            done = publish(plan, revision=revision, private=private)
    print(f"published {', '.join(done.sae_ids)} in commit {done.commit}: {done.url}")
    if revision in (None, "main"):
        print(f'SAE.from_pretrained("{plan.repo_id}", "{done.sae_ids[0]}")')
    else:
        print(f"aen pull {plan.repo_id} {done.sae_ids[0]} --revision {revision}")


def pull(repo: str, id: str | None = None, *, revision: str | None = None) -> None:
    """List the dictionaries of a Hub repository, or fetch one.

    With ID: fetch it into huggingface_hub's cache, check shapes, types and hashes, and say how to use it.
    Without a connection the cache answers. The token is the one that `hf auth login` stored, or HF_TOKEN;
    HF_ENDPOINT names another Hub.

    Args:
        repo: OWNER/REPO on the Hub.
        id: ID of a dictionary.
        revision: Branch, tag or commit. null: main.
    """
    from aen_lightning.hub.pull import listing, usage
    from aen_lightning.hub.pull import pull as fetch
    from aen_lightning.hub.remote import look_up, read_config

    if id is not None:
        print(usage(fetch(repo, id, revision=revision)))
        return
    remote = look_up(repo, revision)
    ids = remote.sae_ids
    print(
        f"{remote.repo_id} at commit "
        f"{remote.commit}{' (offline: what the cache has)' if remote.offline else ''}"
    )
    rows = listing(remote, [(sae_id, read_config(remote, sae_id)) for sae_id in ids[:_MOST_CONFIGS]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    if len(ids) > _MOST_CONFIGS:
        print(f"  and {len(ids) - _MOST_CONFIGS} more: {', '.join(ids[_MOST_CONFIGS:])}")
    print(f"\naen pull {remote.repo_id} ID" if ids else "no SAELens dictionary in it")


def import_(
    checkpoint: str,
    folder: str,
    *,
    kind: Literal["adaptive_elastic_net", "adaptive_lasso", "elastic_net", "l1", "topk"] | None = None,
    k: int | None = None,
    input_scaling: Literal["per_token", "none"] | None = None,
    model_name: str | None = None,
    hook_name: str | None = None,
    for_training: bool = False,
) -> None:
    """Turn one of the paper's authors' checkpoints (.pt) into a SAELens dictionary.

    Tensors only: a file that carries code is refused before any of it runs. Example: aen import
    hf://farischaudhry/adaptive-elastic-net-sae/checkpoints/llama8b/regularization/seed0/adaptive_elastic_net/lambda1_0p002_lambda2_0p0001_gamma_0p5.pt
    llama-aen-l0-32

    Args:
        checkpoint: A .pt file, or hf://OWNER/REPO[@REVISION]/PATH.pt.
        folder: Where the dictionary goes; made if missing.
        kind: What was trained, where the path does not say it.
        k: Of a TopK model, where the name does not say it.
        input_scaling: Of the activations it was trained on. null: per_token; none for the authors' synthetic
            data.
        model_name: Language model, where the path does not say it.
        hook_name: TransformerLens name of the hook, likewise.
        for_training: Write the training SAE aen, with its adaptive state.
    """
    from aen_lightning.hub.imports import fetch_checkpoint, import_checkpoint

    path, name = fetch_checkpoint(checkpoint)
    target = import_checkpoint(
        path, folder, name=name, kind=kind, k=k, input_scaling=input_scaling, model_name=model_name,
        hook_name=hook_name, for_training=for_training,
    )  # fmt: skip
    loader = "TrainingSAE" if for_training else "SAE"
    print(f'written to {target}\n\nfrom sae_lens import {loader}\nsae = {loader}.load_from_disk("{target}")')
