"""The pages that a run leaves: report, comparison, model card."""
