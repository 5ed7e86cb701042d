"""``aen push``, ``aen pull`` and ``aen import``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from aen_lightning.hub import (
    AUTHORS_REPO,
    KINDS,
    fetch_checkpoint,
    import_checkpoint,
    listing,
    look_up,
    plan_push,
    publish,
    pull,
    read_config,
    usage,
)

_LOGIN = (
    "The token is the one `hf auth login` stored, or HF_TOKEN; it is never an argument. HF_ENDPOINT names another Hub."
)
_MOST_CONFIGS = 100


def push_command(args: Sequence[str]) -> int:
    """``aen push RUN_OR_FOLDER OWNER/REPO``."""
    parser = argparse.ArgumentParser(
        prog="aen push",
        description="Publish the dictionaries of a run, of several, or of one SAELens folder, in one commit with a model card. "
        "Run it again after a failure: what arrived is not sent twice.",
        epilog=_LOGIN,
    )
    parser.add_argument("folder", help="a run's folder, a SAELens folder, or a folder of several")
    parser.add_argument("repo", help="OWNER/REPO on the Hub; made if missing")
    parser.add_argument("--revision", help="branch to publish to, made if missing (default: main)")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--dry-run", action="store_true", help="print the tree, the sizes and the card; no network")
    parser.add_argument(
        "--architecture",
        choices=("standard", "aen"),
        default="standard",
        help="what dictionaries trained as aen call themselves: standard loads without this package (default)",
    )
    parser.add_argument("--id", help="name of the only dictionary (default: its folder's, or its hook's)")
    parser.add_argument("--model-name", help="Hub name of the language model, where the run knew only a folder")
    parser.add_argument("--dataset", help="Hub name of the data set, likewise")
    parser.add_argument("--license", help="for the card, e.g. mit")
    options = parser.parse_args(args)
    with plan_push(
        options.folder, options.repo, architecture=options.architecture, sae_id=options.id, model_name=options.model_name,
        dataset=options.dataset, license_name=options.license,
    ) as plan:  # fmt: skip
        print(f"{plan.repo_id}, {options.revision or 'main'}\n{plan.tree()}")
        for note in plan.notes:
            print(f"note: {note}")
        if options.dry_run:
            print(
                f"\nREADME.md (dictionaries and text that the repository may hold already will be kept):\n\n{plan.card(revision=options.revision)}"
            )
            print("dry run: nothing was published")
            return 0
        done = publish(plan, revision=options.revision, private=options.private)
    print(f"published {', '.join(done.sae_ids)} in commit {done.commit}: {done.url}")
    if options.revision in (None, "main"):
        print(f'SAE.from_pretrained("{plan.repo_id}", "{done.sae_ids[0]}")')
    else:
        print(f"aen pull {plan.repo_id} {done.sae_ids[0]} --revision {options.revision}")
    return 0


def pull_command(args: Sequence[str]) -> int:
    """``aen pull OWNER/REPO [ID]``."""
    parser = argparse.ArgumentParser(
        prog="aen pull",
        description="Without ID: list the dictionaries of a repository. With ID: fetch one into huggingface_hub's cache, check "
        "shapes, types and hashes, and say how to use it. Without a connection the cache answers.",
        epilog=_LOGIN,
    )
    parser.add_argument("repo", help="OWNER/REPO on the Hub")
    parser.add_argument("id", nargs="?", help="ID of a dictionary")
    parser.add_argument("--revision", help="branch, tag or commit (default: main)")
    options = parser.parse_args(args)
    if options.id is not None:
        print(usage(pull(options.repo, options.id, revision=options.revision)))
        return 0
    remote = look_up(options.repo, options.revision)
    ids = remote.sae_ids
    print(f"{remote.repo_id} at commit {remote.commit}{' (offline: what the cache has)' if remote.offline else ''}")
    rows = listing(remote, [(sae_id, read_config(remote, sae_id)) for sae_id in ids[:_MOST_CONFIGS]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    if len(ids) > _MOST_CONFIGS:
        print(f"  and {len(ids) - _MOST_CONFIGS} more: {', '.join(ids[_MOST_CONFIGS:])}")
    print(f"\naen pull {remote.repo_id} ID" if ids else "no SAELens dictionary in it")
    return 0


def import_command(args: Sequence[str]) -> int:
    """``aen import CHECKPOINT FOLDER``."""
    parser = argparse.ArgumentParser(
        prog="aen import",
        description="Turn one of the paper's authors' checkpoints (.pt) into a SAELens dictionary. Tensors only: a file that carries "
        "code is refused before any of it runs.",
        epilog=f"Example: aen import hf://{AUTHORS_REPO}/checkpoints/llama8b/regularization/seed0/adaptive_elastic_net/"
        "lambda1_0p002_lambda2_0p0001_gamma_0p5.pt llama-aen-l0-32",
    )
    parser.add_argument("checkpoint", help="a .pt file, or hf://OWNER/REPO[@REVISION]/PATH.pt")
    parser.add_argument("folder", help="where the dictionary goes; made if missing")
    parser.add_argument("--kind", choices=KINDS, help="what was trained, where the path does not say it")
    parser.add_argument("--k", type=int, help="of a TopK model, where the name does not say it")
    parser.add_argument(
        "--input-scaling",
        choices=("per_token", "none"),
        help="of the activations it was trained on (default: per_token; none for the authors' synthetic data)",
    )
    parser.add_argument("--model-name", help="language model, where the path does not say it")
    parser.add_argument("--hook-name", help="TransformerLens name of the hook, likewise")
    parser.add_argument(
        "--for-training", action="store_true", help="write the training SAE aen, with its adaptive state"
    )
    options = parser.parse_args(args)
    path, name = fetch_checkpoint(options.checkpoint)
    folder = import_checkpoint(
        path, options.folder, name=name, kind=options.kind, k=options.k, input_scaling=options.input_scaling,
        model_name=options.model_name, hook_name=options.hook_name, for_training=options.for_training,
    )  # fmt: skip
    loader = "TrainingSAE" if options.for_training else "SAE"
    print(f'written to {folder}\n\nfrom sae_lens import {loader}\nsae = {loader}.load_from_disk("{folder}")')
    return 0
