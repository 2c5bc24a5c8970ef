# SPDX-License-Identifier: MIT
"""The functions of interface under their later names."""

from .._latent import decode as flash_mla_decode_core
from .._latent import prefill as flash_mla_prefill_core

__all__ = ["flash_mla_decode_core", "flash_mla_prefill_core"]
