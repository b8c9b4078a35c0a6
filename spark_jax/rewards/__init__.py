"""Rewards: format checks, outcome rewards, reward-model verdicts, process rewards."""
