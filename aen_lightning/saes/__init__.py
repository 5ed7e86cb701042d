"""Sparse autoencoders: the architecture ``aen``, its penalty, the relaxed refit, checked construction and export."""
