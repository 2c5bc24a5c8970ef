# SPDX-License-Identifier: MIT
"""Settings of every Python test: one printed seed, devices, and what a test may need.

The seed is 0 unless ATTN_SEED says otherwise; the same seed draws the same cases on every machine.
A test that takes `device` runs once for each device there is: cpu, and cuda when there is one.
"""

import os
import sys
from pathlib import Path

# Before torch: idle OpenMP workers that spin slow every small call down a hundredfold on a machine
# whose cores are busy, as under a parallel make.  Results do not depend on it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from cases import ROUNDS, SEED  # noqa: E402

hypothesis.settings.register_profile(
    "attn",
    database=None,
    deadline=None,
    print_blob=False,
    report_multiple_bugs=False,
    phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("attn")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "slow: more than ten seconds on two cores")


def pytest_report_header(config):
    from hypothesis.version import __version__ as drawn_by

    return (
        f"attn: seed {SEED} (ATTN_SEED), rounds x{ROUNDS:g} (ATTN_ROUNDS), "
        f"hypothesis {drawn_by}, torch {torch.__version__}"
    )


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        kinds = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
        marks = {"cuda": [pytest.mark.gpu]}
        metafunc.parametrize("device", [pytest.param(kind, marks=marks.get(kind, [])) for kind in kinds])


def pytest_collection_modifyitems(config, items):
    """fp32 is the CPU's only."""
    taken, left = [], []
    for item in items:
        given = getattr(item, "callspec", None)
        given = given.params if given else {}
        fp32_on_gpu = given.get("device") == "cuda" and given.get("dtype") == "fp32"
        (left if fp32_on_gpu else taken).append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = taken


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(SEED)
