"""Recipes: one YAML a recipe, no logic. ``aen recipes`` lists them."""
