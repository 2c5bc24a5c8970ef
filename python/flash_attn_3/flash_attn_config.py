# SPDX-License-Identifier: MIT
"""Build flags under upstream's names: what this flash_attn_3 was built without."""

from flash_attn_3.flash_attn_config import CONFIG, show

__all__ = ["CONFIG", "show"]
