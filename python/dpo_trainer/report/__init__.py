"""The pages about a run: report, comparison, model card."""
