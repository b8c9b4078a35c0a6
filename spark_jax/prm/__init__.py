"""SPARK stage II: generative process reward models."""
