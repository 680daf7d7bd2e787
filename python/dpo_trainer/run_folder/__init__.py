"""The files in a run's folder: records, checkpoints, the lock."""
