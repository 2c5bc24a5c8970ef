# SPDX-License-Identifier: MIT
"""Exceptions of libattn, one class per status of the C library.

A class is both what Python code expects (ValueError, TypeError) and what the official packages
raise (RuntimeError), so that callers who catch either keep working.
"""


class ShapeError(ValueError, RuntimeError):
    """A tensor's rank, extent or stride."""


class DtypeError(TypeError, RuntimeError):
    """A tensor's element type."""


class ArgumentError(ValueError, RuntimeError):
    """A number out of range, or arguments that exclude each other."""


class DeviceError(ValueError, RuntimeError):
    """Tensors on different devices, or on one that libattn does not know."""


class NotBuiltError(NotImplementedError):
    """A feature, dtype, width or GPU that this build has no kernel for."""


class WorkspaceError(RuntimeError):
    """Workspace missing, short or misaligned: a fault of the binding, not of the caller."""


class VersionError(RuntimeError):
    """Two parts of libattn were built from different sources."""


class DriverError(RuntimeError):
    """The GPU driver said no; the message carries its words."""


class InternalError(RuntimeError):
    """A status that this package does not know."""


ALL = (
    ShapeError,
    DtypeError,
    ArgumentError,
    DeviceError,
    NotBuiltError,
    WorkspaceError,
    VersionError,
    DriverError,
    InternalError,
)
