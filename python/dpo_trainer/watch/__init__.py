"""What is seen of a run while it goes: metrics, diagnoses, samples, progress."""
