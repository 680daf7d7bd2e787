"""Observation of a run while it trains: metrics, diagnoses, samples, progress."""
