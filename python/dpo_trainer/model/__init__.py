"""The policy, its reference, and the way from a batch to its loss."""
