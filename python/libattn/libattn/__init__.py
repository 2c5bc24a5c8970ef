# SPDX-License-Identifier: MIT
"""libattn: attention on CPUs and on NVIDIA Hopper, for torch tensors.

The packages flash_attn_3, flash_mla and flash_kda give upstream's names to what is here.

Importing loads the native library and raises ImportError, in a sentence, when that cannot be done.
`python -m libattn` says what is installed and what this machine offers.
"""

import sys

from .errors import (
    ArgumentError,
    DeviceError,
    DriverError,
    DtypeError,
    InternalError,
    NotBuiltError,
    ShapeError,
    VersionError,
    WorkspaceError,
)

__version__ = "0.1.0"


def _is_report() -> bool:
    """True while `python -m libattn` starts: the report must come even where the library cannot."""
    argv = sys.orig_argv
    return sys.argv[:1] == ["-m"] and "-m" in argv and argv[argv.index("-m") + 1 :][:1] == [__name__]


try:
    from ._native import mha_fwd_plan as _loaded  # noqa: F401
except ImportError:
    if not _is_report():
        raise
else:
    from .kda import KdaFwdPlan, kda_fwd, kda_fwd_plan, kda_fwd_ref, kda_step
    from .mha import (
        MhaFwdPlan,
        mha_fwd,
        mha_fwd_plan,
        mha_fwd_ref,
        mha_metadata_length,
        split_combine,
    )
    from .mla import (
        mla_cache_dequantize,
        mla_cache_quantize,
        mla_decode,
        mla_decode_ref,
        mla_plan,
        mla_sparse_decode,
        mla_sparse_decode_ref,
        mla_sparse_fwd,
        mla_sparse_fwd_ref,
    )

__all__ = [
    "ArgumentError",
    "DeviceError",
    "DriverError",
    "DtypeError",
    "InternalError",
    "KdaFwdPlan",
    "MhaFwdPlan",
    "NotBuiltError",
    "ShapeError",
    "VersionError",
    "WorkspaceError",
    "kda_fwd",
    "kda_fwd_plan",
    "kda_fwd_ref",
    "kda_step",
    "mha_fwd",
    "mha_fwd_plan",
    "mha_fwd_ref",
    "mha_metadata_length",
    "mla_cache_dequantize",
    "mla_cache_quantize",
    "mla_decode",
    "mla_decode_ref",
    "mla_plan",
    "mla_sparse_decode",
    "mla_sparse_decode_ref",
    "mla_sparse_fwd",
    "mla_sparse_fwd_ref",
    "split_combine",
]
