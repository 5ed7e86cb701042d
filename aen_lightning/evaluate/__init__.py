"""Evaluation of any SAELens dictionary on held-out data: ``aen evaluate``.

The JSON (``evaluation.json`` in the dictionary's folder), schema 1; an *estimate* is ``{"value": number |
null, "se": number | null}``, its standard error by the jackknife over groups of context rows::

    command, schema, created, versions
    dictionary      path, architecture, d_in, d_sae, dtype, normalize_activations, training_architecture,
                    training_architecture_details, model_name, hook_name, hf_hook_name, context_size,
                    dataset_path
    data            kind: text | shards | synthetic; n_rows, n_tokens (counted), and what was read
    sparsity        l0, l1: estimates
    features        n_tokens, dead_pct, n_dead (never fired on these tokens), mean_density, gini, normalized_entropy,
                    top_1pct_mass, top_10pct_mass, density_histogram: {log10_edges, counts, n_never};
                    with --per_feature: density, mean_when_active (lists over features)
    reconstruction  raw: {...}, scaled: {...}, each estimates of explained_variance, r2, mse, squared_error,
                    cosine, shrinkage_ratio, l2_ratio, relative_reconstruction_bias
    downstream      null, or n_tokens, n_tokens_kl, n_rows, ablate, and estimates
                    ce: {clean, spliced, zero_ablated, mean_ablated}        mean loss per token, nats
                    ce_increase: {spliced, zero_ablated, mean_ablated}      over clean
                    ce_recovered: {zero, mean}                              1 - (spliced - clean) / (ablated - clean)
                    kl: {spliced, zero_ablated, mean_ablated}               KL(clean || changed), nats per token
                    kl_recovered: {zero, mean}                              1 - spliced / ablated
    ground_truth    null, or matched_cosine, found_at_0.9, support: {precision, recall, f1, jaccard,
                    exact_support_rate, l0, true_l0}
    mdl             null, or what aen_lightning.evaluate.mdl.description_length returns      (--suite core,mdl)
    probing         null, or what aen_lightning.evaluate.probing.sparse_probing returns      (--suite core,probing)
    absorption      null, or what aen_lightning.evaluate.absorption.first_letter_absorption returns
                    (--suite core,absorption)

``raw`` is the space the dictionary takes and returns; in ``scaled`` each token's ``x`` and ``x_hat`` are
multiplied by ``sqrt(d_in) / ||x||``, the space the paper trains and measures in, where no token counts more
than another. Against SAELens's ``run_evals`` (all raw): ``r2`` is its explained_variance, ``squared_error``
its mse, ``cosine`` its cossim, ``l2_ratio``, ``relative_reconstruction_bias`` (which it averages over
batches), ``l0`` and ``l1`` have the same names, ``ce_recovered.zero`` is its ce_loss_score and
``kl_recovered.zero`` its kl_div_score. The formulas stand with each class in :mod:`aen_lightning.metrics`.
Running SAEBench: :mod:`aen_lightning.evaluate.saebench`. Through Lightning (``aen test``): add the callback
``aen_lightning.callbacks.EvaluateDictionaries``.
"""

from aen_lightning.evaluate.dictionary import (
    describe_dictionary,
    load_dictionary,
    log_sparsity,
    run_dictionary,
    scaled_space,
    to_scaled_space,
)
from aen_lightning.evaluate.downstream import evaluate_downstream, replaced_activation
from aen_lightning.evaluate.evaluate import RESULT_FILE, evaluate_dictionary
from aen_lightning.evaluate.inputs import InputBatch, Inputs, ShardInputs, SyntheticInputs, TextInputs
from aen_lightning.evaluate.reconstruction import Reconstruction, evaluate_reconstruction
from aen_lightning.evaluate.saebench import saebench_dictionary

__all__ = [
    "RESULT_FILE", "InputBatch", "Inputs", "Reconstruction", "ShardInputs", "SyntheticInputs", "TextInputs",
    "describe_dictionary", "evaluate_dictionary", "evaluate_downstream", "evaluate_reconstruction", "load_dictionary", "log_sparsity", "replaced_activation", "run_dictionary", "saebench_dictionary",
    "scaled_space", "to_scaled_space",
]  # fmt: skip
