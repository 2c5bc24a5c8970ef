# SPDX-License-Identifier: MIT
"""A module `triton` for code that imports it and decorates kernels with it, but launches none.

fla imports Triton wherever a kernel is defined, and Triton is of no use without a GPU.  `installed()`
puts the stub where `import triton` finds it, for the length of a with block; what was imported inside
keeps working afterwards, and nothing else meets the stub.
"""

import contextlib
import importlib.abc
import importlib.machinery
import sys
import types


def _absent(name):
    """Names that must be missing: Python's own, and the active driver, so that fla sees no GPU."""
    return name.startswith("__") or name == "active"


class _Meta(type):
    def __getattr__(cls, name):
        if _absent(name):
            raise AttributeError(name)
        return Anything


class Anything(metaclass=_Meta):
    """Stands for every class, function and decorator of Triton's."""

    arg_names = ()
    fn = object

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return self

    def __class_getitem__(cls, item):
        return cls

    def __getattr__(self, name):
        if _absent(name):
            raise AttributeError(name)
        return self


class _Module(types.ModuleType):
    def __getattr__(self, name):
        if _absent(name):
            raise AttributeError(name)
        return Anything


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        module.__version__ = "3.4.0"


@contextlib.contextmanager
def installed():
    finder = _Finder()
    sys.meta_path.append(finder)  # last: a real Triton is found before it
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name, module in list(sys.modules.items()):
            if isinstance(module, _Module):
                del sys.modules[name]
