# SPDX-License-Identifier: MIT
"""Prefill on a latent: plain, and with a rope part."""

from ..ops.interface import flash_mla_prefill
from ..ops.interface_core import flash_mla_prefill_core
from ..ops.interface_fused import flash_mla_prefill_fused

__all__ = ["flash_mla_prefill", "flash_mla_prefill_core", "flash_mla_prefill_fused"]
