"""Train state, optimisers, train steps, checkpoints and metrics."""
