"""Grading, pass@k, ProcessBench scores and confidence intervals."""
