# SPDX-License-Identifier: MIT
"""The functions of interface with a rope part, whose query is rotated inside."""

from .._latent import decode_fused as flash_mla_decode_fused
from .._latent import prefill_fused as flash_mla_prefill_fused

__all__ = ["flash_mla_decode_fused", "flash_mla_prefill_fused"]
