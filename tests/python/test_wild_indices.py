# SPDX-License-Identifier: MIT
"""Index values out of range on a GPU, where the host cannot look at them: lengths, cache rows, left
paddings and page numbers count as the nearest value in range, new tokens without a place are not
stored.  Every tensor lies between guards: NaN where only reads could go astray (it would show in
`out`), a pattern where writes could.
"""

import libattn
import pytest
import torch

pytestmark = pytest.mark.gpu
GUARD = 1 << 16  # elements on either side
PATTERN = 0x5A5A
WILD = (-(2**31), -(2**20), -7, -1, 0, 1, 5, 40, 1000, 2**20, 2**30, 2**31 - 1)


@pytest.fixture(autouse=True)
def hopper():
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")


class Guarded:
    """Tensors between guards."""

    def __init__(self):
        self.kept = []

    def __call__(self, *shape, written=False):
        n = torch.Size(shape).numel()
        whole = torch.full((n + 2 * GUARD,), torch.nan, device="cuda", dtype=torch.bfloat16)
        if written:
            whole.view(torch.int16).fill_(PATTERN)
            self.kept.append((whole.view(torch.int16), n))
        inside = whole[GUARD : GUARD + n].view(shape)
        return inside.zero_() if written else inside.normal_()

    def unharmed(self):
        return all((x[:GUARD] == PATTERN).all() and (x[GUARD + n :] == PATTERN).all() for x, n in self.kept)


def wild(*shape):
    return torch.tensor(WILD, dtype=torch.int32)[torch.randint(len(WILD), shape)].cuda()


def sometimes(chance=0.5):
    return torch.rand(()).item() < chance


def run(g, q, k, v, **features):
    out = g(*q.shape[:-1], v.shape[-1], written=True)
    libattn.mha_fwd(q, k, v, causal=sometimes(), out=out, **features)
    assert out.isfinite().all() and g.unharmed()
    return out


@pytest.mark.parametrize("d, d_v", [(64, 64), (128, 128), (192, 128), (64, 256)])
def test_packed(d, d_v):
    for _ in range(20):
        g = Guarded()
        features = {"cu_seqlens_q": wild(6), "cu_seqlens_k": wild(6)}
        if sometimes():
            features |= {"seqused_q": wild(5), "seqused_k": wild(5), "leftpad_k": wild(5)}
        run(g, g(400, 4, d), g(500, 2, d), g(500, 2, d_v), max_seqlen_q=400, max_seqlen_k=500, **features)


@pytest.mark.parametrize("s_q", [2, 70], ids=["decode", "prefill"])
@pytest.mark.parametrize("page", [0, 1, 16, 80, 256])
def test_caches(page, s_q):
    for _ in range(20):
        g = Guarded()
        features = {"seqused_k": wild(5), "kv_batch_idx": wild(5)}
        if page:
            k, v = g(9, page, 2, 128), g(9, page, 2, 128)
            features["page_table"] = wild(3, -(-300 // page))
        else:
            k, v = g(3, 300, 2, 128), g(3, 300, 2, 128)
        if sometimes():
            features["leftpad_k"] = wild(5)
        if sometimes():
            features["seqused_q"] = wild(5)
        if sometimes(0.2):
            features |= {"cp_world_size": 2, "cp_rank": 1, "cp_tot_seqused_k": wild(5)}
        run(g, g(5, s_q, 4, 128), k, v, **features)


@pytest.mark.parametrize("page", [0, 16])
def test_appends(page):
    for _ in range(40):
        g = Guarded()
        rows = (9, page) if page else (3, 300)
        k, v = (g(*rows, 2, 64, written=True).normal_() for _ in range(2))
        features = {"seqused_k": wild(5), "kv_batch_idx": wild(5)}
        if page:
            features["page_table"] = wild(3, 20)
        if sometimes():
            features |= {"k_new": g(30, 2, 64), "v_new": g(30, 2, 64), "cu_seqlens_k_new": wild(6)}
        else:
            features |= {"k_new": g(5, 6, 2, 64), "v_new": g(5, 6, 2, 64)}
        if sometimes():
            features |= {"rotary_cos": g(320, 16), "rotary_sin": g(320, 16), "seqlens_rotary": wild(5)}
        run(g, g(5, 7, 4, 64), k, v, **features)
        assert k.isfinite().all() and v.isfinite().all()


def test_the_nearest_in_range():
    q, k, v = (torch.randn(4, 70, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    pages = [t.view(28, 10, 4, 128) for t in (k, v)]
    table = torch.randint(28, (4, 7), dtype=torch.int32).cuda()
    far = table.clone()
    table[0, 1], far[0, 1] = 0, -9
    table[1, 2], far[1, 2] = 27, 28
    table[3, 0], far[3, 0] = 27, 2**31 - 1
    for inside, outside in (
        ({"seqused_k": [0, 70, 3, 70]}, {"seqused_k": [-1, 71, 3, 2**31 - 1]}),
        ({"seqused_q": [0, 70, 3, 70]}, {"seqused_q": [-1, 71, 3, 2**31 - 1]}),
        ({"leftpad_k": [0, 70, 3, 70]}, {"leftpad_k": [-1, 71, 3, 2**31 - 1]}),
        ({"kv_batch_idx": [0, 3, 2, 3]}, {"kv_batch_idx": [-1, 4, 2, 2**31 - 1]}),
        ({"page_table": table}, {"page_table": far}),
    ):
        keys = pages if "page_table" in inside else (k, v)
        got = []
        for features in (inside, outside):
            out = torch.zeros_like(q)
            features = {n: torch.as_tensor(x, dtype=torch.int32).cuda() for n, x in features.items()}
            libattn.mha_fwd(q, *keys, causal=True, out=out, **features)
            got.append(out)
        assert torch.equal(*got), inside.keys()


@pytest.mark.parametrize("page", [1, 16, 64])
def test_entries_past_the_live_length_are_not_looked_at(page):
    b, n = 3, 256 // page
    q = torch.randn(b, 9, 4, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(b * n + 1, page, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k[0] = v[0] = torch.nan  # where a wild number would be brought to
    table = 1 + torch.randperm(b * n).int().view(b, n)
    lengths = torch.tensor([0, 65, 200])
    want = libattn.mha_fwd(q, k, v, page_table=table.cuda(), seqused_k=lengths.int().cuda())[0]
    table[torch.arange(n) * page >= lengths[:, None]] = -(2**31)
    got = libattn.mha_fwd(q, k, v, page_table=table.cuda(), seqused_k=lengths.int().cuda())[0]
    assert want.isfinite().all() and torch.equal(want, got)
