"""Training: config, the loop and its objective, optimisers, checkpoints, the run folder."""
