# SPDX-License-Identifier: MIT
"""A small model of DeepSeek's shape generates over a paged latent cache, on flash_mla.layer.

    make demo-mla

Its attention has the widths of DeepSeek-V2-Lite: 16 heads of 128 + 64 and 128, a latent of 512 and 64 rope
values a token.  The weights are random, so the text is nonsense; what counts is that two ways of computing
it agree.  Ours keeps one row of 576 values a token and layer, prefills without and decodes with matrix
absorption.  Eager keeps the keys and values of all heads and attends in plain torch operations.  Where a
token differs, or a logit by more than rounding, the exit status is 1.
"""

import argparse
import sys
import time

import torch
from flash_mla import layer as mla
from terminal import bold, dim, green
from torch import nn

LAYERS, HEADS, HIDDEN, VOCABULARY = 3, 16, 512, 4096
D_NOPE, D_ROPE, D_V, LATENT = 128, 64, 128, 512
PROMPTS = (900, 37, 400, 1)  # tokens
CLOSE = 2e-4  # largest difference of two logits, in units of their spread, that fp32 rounding explains


class Layer(nn.Module):
    """One layer of the model; attention of either kind, with the same weights."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)])
        self.attention = mla.LatentAttention(HIDDEN, HEADS, 256, LATENT, D_NOPE, D_ROPE, D_V)
        self.up, self.down = (
            nn.Linear(HIDDEN, 2 * HIDDEN, bias=False),
            nn.Linear(2 * HIDDEN, HIDDEN, bias=False),
        )

    def forward(self, x, attend):
        x = x + attend(self.attention, self.norms[0](x))
        return x + self.down(nn.functional.silu(self.up(self.norms[1](x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])
        self.norm, self.head = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, ids, last, attend):
        """ids (t,) packed -> logits of the tokens `last`; attend(index of the layer, attention, x)."""
        x = self.embedding(ids)
        for index, layer in enumerate(self.layers):
            x = layer(x, lambda attention, y, index=index: attend(index, attention, y))
        return self.head(self.norm(x[last]))


class Ours:
    """One row a token and layer, in pages of 64."""

    def __init__(self, dtype):
        pages = sum(-(-(n + 200) // 64) for n in PROMPTS)
        self.cache = mla.PagedLatentCache(LAYERS, pages, 64, LATENT + D_ROPE, dtype)
        self.rope = mla.rope_frequencies(D_ROPE)
        self.bytes_per_token = self.cache.bytes_per_token

    def __call__(self, model, tokens):
        step = self.cache.step({s: len(new) for s, new in enumerate(tokens)})
        tables = mla.rope_tables(step.positions, *self.rope)

        def attend(index, attention, x):
            return attention(x, *tables, self.cache[index], step)

        return model(torch.cat(tokens), step.last, attend)


class Eager:
    """Keys and values of all heads, and softmax(q k^T) v in plain torch operations."""

    def __init__(self, dtype):
        self.k = [[torch.empty(0, HEADS, D_NOPE + D_ROPE, dtype=dtype)] * len(PROMPTS) for _ in range(LAYERS)]
        self.v = [[torch.empty(0, HEADS, D_V, dtype=dtype)] * len(PROMPTS) for _ in range(LAYERS)]
        self.rope = mla.rope_frequencies(D_ROPE)
        self.bytes_per_token = LAYERS * HEADS * (D_NOPE + D_ROPE + D_V) * dtype.itemsize

    def __call__(self, model, tokens):
        new = [len(x) for x in tokens]
        start = [len(k) for k in self.k[0]]
        positions = torch.cat([torch.arange(a, a + n) for a, n in zip(start, new)])
        tables = mla.rope_tables(positions, *self.rope)

        def attend(index, attention, x):
            w = attention.kv_b_proj.weight.view(HEADS, D_NOPE + D_V, LATENT)
            q = torch.cat(attention.query(x, *tables), -1)
            rows = attention.cache_row(x, *tables)
            expanded = torch.einsum("tr,hnr->thn", rows[:, :LATENT], w)
            k = torch.cat((expanded[..., :D_NOPE], rows[:, None, LATENT:].expand(-1, HEADS, -1)), -1)
            parts = zip(q.split(new), k.split(new), expanded[..., D_NOPE:].split(new))
            out = [self.one(index, s, *part, attention.scale) for s, part in enumerate(parts)]
            return attention.o_proj(torch.cat(out).flatten(1))

        return model(torch.cat(tokens), torch.tensor(new).cumsum(0) - 1, attend)

    def one(self, index, sequence, q, k, v, scale):
        """Appends a sequence's new keys and values, and attends to all of them."""
        k = self.k[index][sequence] = torch.cat((self.k[index][sequence], k))
        v = self.v[index][sequence] = torch.cat((self.v[index][sequence], v))
        scores = torch.einsum("shd,thd->hst", q, k) * scale
        seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        weights = scores.masked_fill_(~seen, float("-inf")).softmax(-1)
        return torch.einsum("hst,thv->shv", weights, v)


def generate(model, way, prompts, new):
    """(tokens [new, sequences], logits [new, sequences, vocabulary], seconds of prefill and of decode)."""
    tokens, scores, times = [], [], []
    feed = prompts
    for turn in range(new):
        began = time.perf_counter()
        scores.append(way(model, feed).float())
        if turn:
            times.append(time.perf_counter() - began)
        else:
            prefill = time.perf_counter() - began
        tokens.append(scores[-1].argmax(-1))
        feed = list(tokens[-1].split(1))
    return torch.stack(tokens), torch.stack(scores), prefill, sum(times)


def show(label, way, new, prefill, decode):
    rate = len(PROMPTS) * (new - 1) / decode
    print(
        f"  {label:<38} {way.bytes_per_token:>8,} bytes a token   prefill {1e3 * prefill:7.0f} ms   "
        f"decode {rate:7.0f} tokens/s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="a small model of DeepSeek's shape over a latent cache")
    parser.add_argument(
        "--tokens", type=int, default=32, help="how many to generate for each prompt (2 ... 200)"
    )
    new = min(max(parser.parse_args().tokens, 2), 200)

    torch.manual_seed(0)
    model = Model().eval()
    for name, weight in model.named_parameters():
        if "attention" in name and weight.dim() == 2:
            weight.mul_(2.5)  # scores that tell keys apart
    prompts = [torch.randint(VOCABULARY, (n,)) for n in PROMPTS]
    print(f"\n{bold('A model of DeepSeek-V2-Lite’s attention, over a paged latent cache')}")
    print(
        f"  {LAYERS} layers, {HEADS} heads, prompts of {', '.join(map(str, PROMPTS))} tokens, {new} new "
        f"tokens each, {torch.get_num_threads()} threads, fp32\n"
    )
    for way in (Ours, Eager):
        generate(
            model, way(torch.float32), [p[:8] for p in prompts], 2
        )  # the first calls set up thread pools
    ours, eager = Ours(torch.float32), Eager(torch.float32)
    got, scores, *times = generate(model, ours, prompts, new)
    show("flash_mla, one latent row", ours, new, *times)
    want, wanted_scores, *times = generate(model, eager, prompts, new)
    show("eager, keys and values of every head", eager, new, *times)
    print(dim(f"  {eager.bytes_per_token / ours.bytes_per_token:.1f} times fewer bytes in the cache"))

    same = float((got == want).float().mean())
    worst = float((scores - wanted_scores).abs().max() / wanted_scores.std())
    print(f"\n{bold('Agreement with eager, same weights')}")
    verdict = green("the same tokens") if same == 1 else f"{same:.1%} of the tokens"
    print(f"  {got.numel()} tokens: {verdict}   logits: max difference {worst:.1e} of their spread\n")
    if same < 1 or worst > CLOSE:
        print(f"the two disagree (largest difference allowed: {CLOSE:.0e})", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
