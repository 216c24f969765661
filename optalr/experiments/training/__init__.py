"""The training loop of a run."""
