"""Turns tokenised pairs into batches."""

#: What `batch_layout` may be, and `train_sampling_strategy`; here, so that settings need not import torch to know them.
LAYOUTS = ("auto", "padded", "prefix_shared")
STRATEGIES = ("random", "group_by_length", "sequential")
