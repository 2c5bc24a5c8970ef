# SPDX-License-Identifier: MIT
"""Random caches: appends, pages, rotary, left padding and the rest at once."""

import pytest
from cases import cases, entries, rounds, verify
from hypothesis import given


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp8"])
@pytest.mark.parametrize("kind", ["cache", "paged"])
def test_random_cache(kind, dtype, device):
    @rounds(200)
    @given(cases(dtype=dtype, k_kind=kind))
    def check(case):
        for entry in entries(case):
            verify(case, entry, device)

    check()


def test_random_append(device):
    @rounds(300)
    @given(cases(k_kind="paged", new=5))
    def check(case):
        for entry in entries(case):
            verify(case, entry, device)

    check()


def test_random_decode(device):
    """One query, many keys, splits left to the library."""

    @rounds(100)
    @given(cases(s_q=1, k_kind="paged", splits=0, s_k=1300, k_used=True))
    def check(case):
        for entry in entries(case):
            verify(case, entry, device)

    check()
