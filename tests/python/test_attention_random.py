# SPDX-License-Identifier: MIT
"""Any legal combination of options, every way in that can say it, against the oracle."""

import pytest
from cases import build, cases, entries, rounds, run, verify
from hypothesis import given


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp8"])
def test_random_combination(dtype, device):
    @rounds(120)
    @given(cases(dtype=dtype))
    def check(case):
        for entry in entries(case):
            verify(case, entry, device)

    check()
