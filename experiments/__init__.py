"""Entry scripts: each reads top to bottom like the algorithm box of the paper."""
