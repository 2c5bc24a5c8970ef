# SPDX-License-Identifier: MIT
"""Any legal combination of options, every way in that can say it, against the oracle."""

import pytest
from cases import cases, entries, rounds, verify
from hypothesis import given


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp8"])
def test_random_combination(dtype, device):
    @rounds(400)
    @given(cases(dtype=dtype))
    def check(case):
        for entry in entries(case):
            verify(case, entry, device)

    check()


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp8"])
def test_random_prefill(dtype, device):
    """Longer, so that several blocks of queries and keys meet every mask."""

    @rounds(60)
    @given(cases(dtype=dtype, b=2, s_q=260, s_k=300, h_k=1, group=2))
    def check(case):
        for entry in entries(case):
            verify(case, entry, device)

    check()
