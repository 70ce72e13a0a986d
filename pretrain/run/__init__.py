"""A run: config, the training loop, meters, evaluation, the run folder."""
