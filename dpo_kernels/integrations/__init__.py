"""Drop-in replacements: `integrations.trl` for the log-probabilities of TRL's trainers, `integrations.liger` for Liger's loss."""
