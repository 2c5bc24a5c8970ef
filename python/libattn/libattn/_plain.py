# SPDX-License-Identifier: MIT
"""Tensors that DLPack does not carry: it would lose a sign without a word, and names no argument."""

from torch import Tensor, strided

from .errors import ArgumentError, DeviceError


def refuse_negated(**tensors):
    """ArgumentError for a tensor whose sign is only noted, such as the imaginary part of a conjugate."""
    for name, x in tensors.items():
        if isinstance(x, Tensor) and x.is_neg():
            raise ArgumentError(f"{name}: expected a plain tensor (resolve_neg()), got a negated view")


def _memory(x):
    """What x has in place of memory, or None when it has some."""
    if x.is_meta:
        return "one on meta"
    try:
        x.data_ptr()
    except RuntimeError:
        return "one inside a torch.func transform" if x.layout is strided else f"layout {x.layout}"
    return None


def named(error, arguments):
    """A refusal of DLPack's, which is a plain RuntimeError, with the name of the argument; else the error.

    arguments: {name: value}, such as the locals() of the function that called libattn.
    """
    if type(error) is RuntimeError:
        for name, x in arguments.items():
            found = _memory(x) if isinstance(x, Tensor) else None
            if found:
                return DeviceError(f"{name}: expected a tensor with memory of its own, got {found}")
    return error
