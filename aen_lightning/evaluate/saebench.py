"""How SAEBench runs one of our dictionaries.

SAEBench (0.6) asks for older versions of numpy and datasets than this package, so it lives in an environment
of its own. What we export is a plain SAELens dictionary, so there nothing of ours is needed::

    from sae_lens import SAE
    import sae_bench.evals.core.main as core

    sae = SAE.load_from_disk("FOLDER", device="cuda", fold_W_dec_norm=True)      # or SAE.from_pretrained("OWNER/REPO", "ID")
    core.multiple_evals(selected_saes=[("my_aen", sae)], n_eval_reconstruction_batches=200,
                        n_eval_sparsity_variance_batches=2000, eval_batch_size_prompts=16,
                        exclude_special_tokens_from_reconstruction=True, dataset="Skylion007/openwebtext",
                        context_size=128, output_folder="eval_results/core")

and so for its other evaluations, whose ``run_eval`` takes the same ``selected_saes``. Three things must hold,
which :func:`saebench_dictionary` sees to: decoder rows of norm 1 to 1e-5 (1e-2 in half precision),
``model_name``, and a TransformerLens ``hook_name`` with the layer's number in its metadata; its evaluations
read them from there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sae_lens import SAE

from aen_lightning.evaluate.dictionary import load_dictionary


def saebench_dictionary(
    reference: str | Path, *, name: str | None = None, device: str = "cpu", dtype: str | None = None
) -> tuple[str, SAE[Any]]:
    """An entry of SAEBench's ``selected_saes``, checked against what its evaluations read.

    Args:
        reference: See ``load_dictionary``.
        name: What SAEBench calls it in its results; None: the last part of the reference.
        device: Where to put it.
        dtype: None: as stored.

    Returns:
        The name and the dictionary, decoder norms folded into the encoder (same outputs).

    Raises:
        ValueError: If the metadata lack what SAEBench reads, or the decoder cannot be brought to unit norm.
    """
    sae = load_dictionary(reference, device=device, dtype=dtype)
    metadata = sae.cfg.metadata
    if not metadata["model_name"]:
        raise ValueError(f"{reference}: SAEBench needs model_name in the metadata of cfg.json")
    if not re.match(r"blocks\.\d+\.", str(metadata["hook_name"])):
        raise ValueError(
            f"{reference}: SAEBench needs a TransformerLens hook_name such as 'blocks.4.hook_resid_post' "
            "in the metadata of "
            f"cfg.json, got {metadata['hook_name']!r}"
        )
    try:
        sae.fold_W_dec_norm()
    except NotImplementedError as err:  # TopK and the like, where a norm would change which features win
        if float((sae.W_dec.norm(dim=-1) - 1).abs().max()) > 1e-5:
            raise ValueError(
                f"{reference}: decoder rows are not of norm 1, and a {sae.cfg.architecture()} cannot fold "
                "them"
            ) from err
    return name or Path(str(reference)).name, sae
