# SPDX-License-Identifier: MIT
"""Decode on a latent: contiguous, and with a rope part."""

from ..ops.interface import flash_mla_decode
from ..ops.interface_core import flash_mla_decode_core
from ..ops.interface_fused import flash_mla_decode_fused

__all__ = ["flash_mla_decode", "flash_mla_decode_core", "flash_mla_decode_fused"]
