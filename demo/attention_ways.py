# SPDX-License-Identifier: MIT
"""Four ways to compute one attention layer, and the clock that compares them.

q, k, v and out are [t, heads, d]; document i holds rows cu[i] to cu[i + 1], the longest has `longest`.
"""

import time

import torch
import torch.nn.functional as F
from flash_attn_interface import flash_attn_varlen_func

TIMED = 8  # one batch in so many is also given to torch SDPA, to compare the times
ROUNDS = 3  # and the best of so many goes counts, so that a busy machine disturbs less


def ours(q, k, v, cu, longest):
    return flash_attn_varlen_func(q, k, v, cu, cu, longest, longest)


def eager(q, k, v, cu, longest):
    """softmax(q k^T / sqrt(d)) v in plain torch operations, on the padded batch."""
    padded = Padded(q, k, v, cu, longest)
    qs, ks, vs = padded.qkv
    scores = qs @ ks.transpose(2, 3) * q.shape[-1] ** -0.5
    weights = scores.masked_fill_(~padded.live[:, None, None], float("-inf")).softmax(-1)
    return padded.unpadded(weights @ vs)


def sdpa_each(q, k, v, cu, longest):
    """torch SDPA without padding: a call a document."""
    out = torch.empty_like(q)
    for begin, end in zip(cu[:-1].tolist(), cu[1:].tolist()):
        qs, ks, vs = (x[begin:end].transpose(0, 1)[None] for x in (q, k, v))
        out[begin:end] = F.scaled_dot_product_attention(qs, ks, vs)[0].transpose(0, 1)
    return out


class Padded:
    """torch SDPA on the batch padded to its longest document.  Padding is done beforehand and not
    timed: a padded model would carry its tensors in this shape all along."""

    def __init__(self, q, k, v, cu, longest):
        lengths = (cu[1:] - cu[:-1]).long()
        self.live = torch.arange(longest)[None] < lengths[:, None]
        self.qkv = [self._pad(x) for x in (q, k, v)]
        self.slots = self.live.numel()

    def _pad(self, x):
        padded = x.new_zeros(*self.live.shape, *x.shape[1:])
        padded[self.live] = x
        return padded.transpose(1, 2).contiguous()

    def run(self):
        return F.scaled_dot_product_attention(*self.qkv, attn_mask=self.live[:, None, None])

    def unpadded(self, out):
        return out.transpose(1, 2)[self.live]


class Comparison:
    """The eager model's attention, which also times the other ways on the very same q, k and v, in
    the first batch and every TIMED-th after it."""

    def __init__(self):
        self.batch = None
        self.batches = 0
        self.seconds = dict.fromkeys(("ours", "padded", "each"), 0.0)
        self.difference = dict.fromkeys(self.seconds, 0.0)
        self.slots = self.tokens = 0

    def __call__(self, q, k, v, cu, longest):
        expected = eager(q, k, v, cu, longest)
        if cu is not self.batch:
            self.batch, self.batches = cu, self.batches + 1
        if self.batches % TIMED != 1:
            return expected
        padded = Padded(q, k, v, cu, longest)
        self.slots += padded.slots
        self.tokens += len(q)
        self._time("ours", expected, lambda: ours(q, k, v, cu, longest))
        self._time("padded", expected, padded.run, padded.unpadded)
        self._time("each", expected, lambda: sdpa_each(q, k, v, cu, longest))
        return expected

    def _time(self, name, expected, run, finish=lambda out: out):
        best = float("inf")
        for _ in range(ROUNDS):
            start = time.perf_counter()
            out = run()
            best = min(best, time.perf_counter() - start)
        self.seconds[name] += best
        self.difference[name] = max(self.difference[name], float((finish(out) - expected).abs().max()))
