"""The command `dpo-train`."""

from .main import main

__all__ = ["main"]
