# SPDX-License-Identifier: MIT
"""The README's example runs as it stands."""

import re
from pathlib import Path

import reference
import torch

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_example_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1 and len([x for x in blocks[0].splitlines() if x.strip()]) <= 12
    names = {}
    exec(compile(blocks[0], str(README), "exec"), names)
    q, k, v, cu, longest = (names[x] for x in ("q", "k", "v", "cu", "longest"))
    lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest}
    want = reference.forward(q, k, v, causal=True, **lengths).out
    torch.testing.assert_close(names["out"].double(), want.double(), rtol=2e-2, atol=2e-2)
