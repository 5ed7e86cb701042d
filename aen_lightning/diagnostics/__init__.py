"""Diagnosis of a dictionary (``aen diagnose``) and comparison of several (``aen compare``).

The JSON of ``aen diagnose`` (``diagnosis.json`` in the dictionary's folder), schema 1; a *summary* is
``{"mean", "min", "p10", "p50", "p90", "max"}``, each a number or null::

    command, schema, created, versions, dictionary, data       as in aen_lightning.evaluate
    coherence     a summary of each atom's largest |cosine| with another, share_above_0.9, closest_pairs: [[i, j, cosine], ...]
    active_gram   n_tokens, and summaries: min_eigenvalue, max_eigenvalue, condition_number, leakage, leakage_per_pair,
                  cross_leverage_mean, cross_leverage_max                          -> diagnostics.gram.active_gram
    lipschitz     n_tokens, encoder: {bound, is_continuous, relative_step, and summaries local, empirical, between_inputs},
                  coding_map: null or {bound, relative_step, local, empirical}        -> diagnostics.lipschitz
    coding_gap    n_tokens, l1_coefficient_mean, l2_coefficient, source, objective: {encoder, best_on_support, exact},
                  excess_pct: a summary, from_magnitudes_share, from_support_share, squared_error,
                      explained_variance and l0:
                  {encoder, exact}, support: {precision, recall, jaccard}, starvation:
                  {features_fired_by_encoder, features_fired_by_exact, features_only_exact,
                  features_only_encoder, dead, dead_used_by_exact},
                  refined, if asked for: {n_steps, objective, squared_error, explained_variance, l0},
                  certificate: {max_relative_gap, encoder_gap_mean, dtype}           -> diagnostics.coding_gap.coding_gap
    composition   n_samples, by_frequency, sizes: [k, ...], and lists as long: lost_share, spurious, spurious_mass,
                  spurious_energy, magnitude_ratio, relative_error, reconstruction_error, interference,
                  tied_spurious_energy; random_sphere: {interference, tied_spurious_energy}; half_lost_at
    convexity     only with a concave penalty: penalty, l2_coefficient, activation_scale, l2_needed, ratio, is_convex
                                                                                   -> diagnostics.convexity.coding_convexity
    skipped       {section: why}

Sections not asked for, or skipped, are null. All but coherence is measured in the space the dictionary was
trained in.

The JSON of ``aen compare`` (``--json``): the same head, ``dictionaries`` (by name), and what
:func:`aen_lightning.diagnostics.stability.compare_dictionaries` returns.
"""

from aen_lightning.diagnostics.coding import Code, coding_gap_bound, coding_objective, solve_coding
from aen_lightning.diagnostics.coding_gap import CodingProblem, coding_gap, coding_problem
from aen_lightning.diagnostics.coherence import Coherence, coherence
from aen_lightning.diagnostics.composition import composition
from aen_lightning.diagnostics.diagnose import SECTIONS, diagnose_dictionary
from aen_lightning.diagnostics.gram import active_gram
from aen_lightning.diagnostics.lipschitz import coding_bound, coding_map_lipschitz, encoder_lipschitz
from aen_lightning.diagnostics.stability import compare_dictionaries

__all__ = [
    "SECTIONS", "Code", "CodingProblem", "Coherence", "active_gram", "coding_bound", "coding_gap",
    "coding_gap_bound", "coding_map_lipschitz", "coding_objective", "coding_problem", "coherence",
    "compare_dictionaries", "composition", "diagnose_dictionary",
    "encoder_lipschitz", "solve_coding",
]  # fmt: skip
