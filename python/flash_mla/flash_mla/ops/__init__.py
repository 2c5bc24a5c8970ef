# SPDX-License-Identifier: MIT
"""Module names of the Triton package of the same name."""
