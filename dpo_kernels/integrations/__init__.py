"""Drop-ins for other trainers: `integrations.trl` under TRL's trainers, `integrations.liger` in place of Liger's loss."""
