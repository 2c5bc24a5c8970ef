# SPDX-License-Identifier: MIT
"""Attention on a latent that is K and V of all heads."""

from .._latent import decode as flash_mla_decode
from .._latent import prefill as flash_mla_prefill

__all__ = ["flash_mla_decode", "flash_mla_prefill"]
