# SPDX-License-Identifier: MIT
"""make bench runs: every kind of row once, small.  No figure is judged here."""

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[2] / "bench" / "cpu_mha_fwd.py"


def test_quick():
    run = subprocess.run([sys.executable, BENCH, "--quick"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    for text in (
        "dense",
        "decode",
        "page16",
        "ragged",
        "call",
        "fp16",
        "fp32",
        "isaavx2",
        "ATEN_CPU_CAPABILITY=avx2",
        "least ratio",
    ):
        assert text in run.stdout, run.stdout
