"""SPARK stage I: step-by-step verifications without references."""
