# SPDX-License-Identifier: MIT
"""FlashAttention-3's names on libattn.  The functions are in flash_attn_interface."""

__version__ = "3.1.0"
