"""The operators of this copy of the package, and their full names.

kernel-builder, the tool that builds kernels for the Hugging Face Hub, writes a file with these two names in place of this one.
"""

import torch

from ._build import NAMESPACE

ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of an operator, such as "dpo_kernels::linear_logps"."""
    return f"{NAMESPACE}::{op_name}"
