# SPDX-License-Identifier: MIT
"""Build flags under upstream's names.  A flag says what this build is without, on any device;
docs/compatibility/flash_attn_3.md says what runs where."""

CONFIG = {
    "build_flags": {
        "FLASHATTENTION_DISABLE_BACKWARD": True,
        "FLASHATTENTION_DISABLE_SPLIT": False,
        "FLASHATTENTION_DISABLE_PAGEDKV": False,
        "FLASHATTENTION_DISABLE_APPENDKV": False,
        "FLASHATTENTION_DISABLE_LOCAL": False,
        "FLASHATTENTION_DISABLE_SOFTCAP": False,
        "FLASHATTENTION_DISABLE_PACKGQA": False,
        "FLASHATTENTION_DISABLE_FP16": False,
        "FLASHATTENTION_DISABLE_FP8": False,
        "FLASHATTENTION_DISABLE_VARLEN": False,
        "FLASHATTENTION_DISABLE_CLUSTER": False,
        "FLASHATTENTION_DISABLE_HDIM64": False,
        "FLASHATTENTION_DISABLE_HDIM96": False,
        "FLASHATTENTION_DISABLE_HDIM128": False,
        "FLASHATTENTION_DISABLE_HDIM192": False,
        "FLASHATTENTION_DISABLE_HDIM256": False,
        "FLASHATTENTION_DISABLE_SM8x": True,
        "FLASHATTENTION_ENABLE_VCOLMAJOR": False,
        "FLASH_ATTENTION_DISABLE_HDIMDIFF64": False,
        "FLASH_ATTENTION_DISABLE_HDIMDIFF192": False,
    }
}


def show() -> None:
    """Prints the build flags."""
    for name, value in CONFIG["build_flags"].items():
        print(f"{name} = {value}")
