"""Turns tokenised pairs into batches."""
