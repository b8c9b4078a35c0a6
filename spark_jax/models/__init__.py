"""Functional transformer: config, parameters, forward, prefill, decode step, checkpoints."""
