"""Language models to take activations from: where, how much of the model, on which devices."""
