# SPDX-License-Identifier: MIT
"""make bench runs: every kind of row once, small.  No figure is judged here."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
ROWS = {
    "cpu_mha_fwd": (
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
    ),
    "cpu_mla": ("dense b 8", "dense b 1", "sparse v32", "sparse model1", "prefill 192/128"),
    "cpu_kda": ("kda_fwd_bf16", "torch, chunk 32", "few heads", "kda_step b 2", "torch mul_ in place"),
}


@pytest.mark.parametrize("name", ROWS)
def test_quick(name):
    command = [sys.executable, BENCH / f"{name}.py", "--quick"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    for text in ROWS[name]:
        assert text in run.stdout, run.stdout
