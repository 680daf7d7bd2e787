"""From tokenised pairs to a batch."""
