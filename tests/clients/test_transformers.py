# SPDX-License-Identifier: MIT
"""transformers with flash_attention_3 on the CPU equals eager attention, feature by feature."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

import models  # noqa: E402

FLASH = "flash_attention_3"
EVERY = list(models.ALL)


def logits(model, implementation, **inputs):
    with torch.no_grad():
        return models.use(model, implementation)(**inputs, use_cache=False).logits.float()


def agree(name, dtype, live=None, **inputs):
    """fp32: the two agree.  16 bit: flash is no further from fp32 eager than twice 16-bit eager."""
    exact = logits(models.build(name), "eager", **inputs)
    if dtype == torch.float32:
        got, limit = logits(models.build(name), FLASH, **inputs), 2e-5 * float(exact.abs().max())
    else:
        model = models.build(name, dtype)
        got, low = logits(model, FLASH, **inputs), logits(model, "eager", **inputs)
        error = (low - exact).abs()
        limit = 2 * float((error if live is None else error[live]).max()) + 1e-3
    error = (got - exact).abs()
    error = error if live is None else error[live]
    assert float(error.max()) <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_dense_batch(name, dtype, calls):
    agree(name, dtype, input_ids=torch.randint(3, 128, (2, 40)))
    assert calls["flash_attn_func"] == 2 and calls["flash_attn_varlen_func"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", EVERY)
def test_padded_batch(name, side, dtype, calls):
    mask = torch.ones(3, 30, dtype=torch.long)
    for row, pad in enumerate((0, 11, 25)):
        if pad:
            mask[row, :pad] = 0
    if side == "right":
        mask = mask.flip(1)
    ids = torch.randint(3, 128, (3, 30)) * mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    agree(name, dtype, mask.bool(), input_ids=ids, attention_mask=mask, position_ids=positions)
    assert calls["flash_attn_varlen_func"] == 2 and calls["flash_attn_func"] == 0


def check_packed(name, **kwargs):
    """Documents end to end in one row: each as if it were alone."""
    lengths = (9, 1, 23, 14)
    documents = [torch.randint(3, 128, (n,)) for n in lengths]
    model = models.build(name)
    want = torch.cat([logits(model, "eager", input_ids=x[None])[0] for x in documents])
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    got = logits(model, FLASH, input_ids=torch.cat(documents)[None], position_ids=positions, **kwargs)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5 * float(want.abs().max()))


@pytest.mark.parametrize("name", EVERY)
def test_packed_by_position_ids(name, calls):
    check_packed(name)
    assert calls["flash_attn_varlen_func"] == 2


@pytest.mark.parametrize("name", EVERY)
def test_packed_by_cu_seqlens(name, calls):
    cu = torch.tensor([0, 9, 10, 33, 47], dtype=torch.int32)
    check_packed(name, cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=23, max_length_k=23)
    assert calls["flash_attn_varlen_func"] == 2


def test_features_reach_the_library(calls):
    """Window, softcap and sinks are arguments of the call, not silently dropped."""
    ids = torch.randint(3, 128, (1, 40))
    for name, wish in (("mistral", {"window_size": (6, 6)}), ("gemma2", {"softcap": 5.0}), ("gpt_oss", {})):
        calls.keywords["flash_attn_func"].clear()
        logits(models.build(name), FLASH, input_ids=ids)
        seen = calls.keywords["flash_attn_func"]
        assert seen, name
        for key, value in wish.items():
            assert any(x.get(key) == value for x in seen), (name, seen[0].keys())
        if name == "gpt_oss":
            assert all(x.get("s_aux") is not None for x in seen)


def generate(model, implementation, ids, mask, **kwargs):
    models.use(model, implementation)
    with torch.no_grad():
        return model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            **kwargs,
        )


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("name", EVERY)
def test_generate(name, padded, cache, calls):
    """The same tokens, and scores within rounding; windows are shorter than the text."""
    ids, mask = torch.randint(3, 128, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    if padded:
        mask[1, :5] = 0
        ids = ids * mask
    model = models.build(name)
    more = {"output_scores": True, "return_dict_in_generate": True, "disable_compile": True}
    if cache == "static":
        more["cache_implementation"] = "static"
    want = generate(model, "eager", ids, mask, **more)
    got = generate(model, FLASH, ids, mask, **more)
    assert sum(calls.values()) >= 40
    assert torch.equal(got.sequences, want.sequences)
    for x, y in zip(got.scores, want.scores, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("name", EVERY)
def test_continuous_batching(name, calls):
    """A paged cache over requests of different lengths: the tokens of `generate` one by one."""
    if name in ("mistral", "gemma2") and has_paged_functions():
        pytest.skip("the paged flash attention of this transformers passes no window of theirs, no softcap")
    prompts = [torch.randint(3, 128, (n,)).tolist() for n in (5, 17, 1, 9)]
    model = models.build(name)
    want = [
        generate(model, "eager", torch.tensor([p]), torch.ones(1, len(p), dtype=torch.long))[
            0, len(p) :
        ].tolist()
        for p in prompts
    ]
    got = continuous(model, prompts)
    assert got == want
    assert calls["flash_attn_varlen_func"] > 0


@pytest.mark.parametrize("name", ["llama"])
def test_continuous_batching_with_block_table(name, calls, monkeypatch):
    """The decode path through flash_attn_with_kvcache, which transformers opens on CUDA only."""
    module = pytest.importorskip("transformers.generation.continuous_batching.initialization")
    if not hasattr(module, "torch"):
        pytest.skip("this transformers decides on the block table elsewhere")

    class Torch:
        """torch as it is, but for the answer to one question in that one module."""

        class cuda:
            is_available = staticmethod(lambda: True)

        def __getattr__(self, attribute):
            return getattr(torch, attribute)

    prompts = [torch.randint(3, 128, (n,)).tolist() for n in (5, 17, 1, 9)]
    model = models.build(name)
    want = continuous(model, prompts)
    assert calls["flash_attn_with_kvcache"] == 0
    monkeypatch.setattr(module, "torch", Torch())
    got = continuous(model, prompts, max_blocks_per_request=4)
    if not calls["flash_attn_with_kvcache"]:
        pytest.skip("this transformers kept the varlen path")
    assert got == want


def has_paged_functions():
    """Until 5.17 continuous batching had attention functions of its own."""
    return f"paged|{FLASH}" in transformers.AttentionInterface._global_mapping


def continuous(model, prompts, **kwargs):
    models.use(model, f"paged|{FLASH}" if has_paged_functions() else FLASH)
    known = transformers.ContinuousBatchingConfig.__dataclass_fields__
    kwargs["page_size" if "page_size" in known else "block_size"] = 16  # the older name, until 5.17
    fixed = {"num_blocks": 32, "max_batch_tokens": 64, "use_cuda_graph": False, "use_async_batching": False}
    config = transformers.ContinuousBatchingConfig(**{**fixed, **kwargs})
    generation = transformers.GenerationConfig(
        max_new_tokens=20, do_sample=False, eos_token_id=-1, pad_token_id=0, bos_token_id=1
    )
    done = model.generate_batch(
        prompts, generation_config=generation, continuous_batching_config=config, progress_bar=False
    )
    for request in done.values():
        assert not request.error, request.error
    order = sorted(done.values(), key=lambda x: prompts.index(list(x.prompt_ids)))
    return [list(x.generated_tokens) for x in order]
