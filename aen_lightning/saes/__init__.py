"""Sparse autoencoders.

The architecture ``aen``, its penalty, the relaxed refit, checked construction and export.
"""

import sae_lens  # noqa: F401  # first, so that registration meets whole modules here whichever is imported first
