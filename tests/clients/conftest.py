# SPDX-License-Identifier: MIT
"""Clients of flash_attn_interface as their users run them, on the CPU and (test_gpu.py) on a Hopper
GPU, with no download.

transformers offers `flash_attention_3` on CUDA only, so the tests on the CPU set it on a model's config after
construction.  Everything behind that gate runs as it is: the import of `flash_attn_interface`, the
reading of its signatures, the choice between the dense, packed and cache functions.
"""

import functools
import inspect
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in tests/python/conftest.py
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

FUNCTIONS = ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch):
    """How often each function of flash_attn_interface was called, and with which keywords."""
    utils = pytest.importorskip("transformers.modeling_flash_attention_utils")
    import flash_attn_interface as fa

    class Calls(dict):
        keywords = {name: [] for name in FUNCTIONS}

    seen = Calls.fromkeys(FUNCTIONS, 0)
    seen.keywords = {name: [] for name in FUNCTIONS}

    def counted(name, function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            seen[name] += 1
            seen.keywords[name].append(inspect.signature(function).bind(*args, **kwargs).arguments)
            return function(*args, **kwargs)

        return call

    for name in FUNCTIONS:
        monkeypatch.setattr(fa, name, counted(name, getattr(fa, name)))
    monkeypatch.setattr(utils, "_loaded_implementation", None)  # import our counted functions again
    yield seen
    utils._loaded_implementation = None
