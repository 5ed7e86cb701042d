"""LightningModules that train SAEs: one, a grid of them on one stream, a refit."""
