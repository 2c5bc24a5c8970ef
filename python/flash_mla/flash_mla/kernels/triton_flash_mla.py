# SPDX-License-Identifier: MIT
"""Paged decode on a latent cache."""

from .._latent import paged_decode as flash_mla_decode

__all__ = ["flash_mla_decode"]
