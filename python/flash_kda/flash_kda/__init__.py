# SPDX-License-Identifier: MIT
"""FlashKDA's names on libattn.  The functions are in flash_kda_interface."""

__version__ = "0.1.0"

from .flash_kda_interface import fwd, get_workspace_size, step

__all__ = ["fwd", "get_workspace_size", "step"]
