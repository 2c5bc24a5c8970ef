# SPDX-License-Identifier: MIT
"""What DLPack does not carry of a torch tensor, and would be lost without a word."""

from torch import Tensor

from .errors import ArgumentError


def refuse_negated(**tensors):
    """ArgumentError for a tensor whose sign is only noted, such as the imaginary part of a conjugate."""
    for name, x in tensors.items():
        if isinstance(x, Tensor) and x.is_neg():
            raise ArgumentError(f"{name}: expected a plain tensor (resolve_neg()), got a negated view")
