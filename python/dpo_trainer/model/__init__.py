"""Policy and reference models, and the computation of a batch's loss."""
