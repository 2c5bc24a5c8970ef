# SPDX-License-Identifier: MIT
"""transformers' DeepseekV3 and DeepseekV2 with flash_mla's layer over a paged latent cache in place of
their attention: the same tokens, and logits within rounding, prefill and decode, ragged batches."""

import pytest
import torch

transformers = pytest.importorskip("transformers", "5.0")

from flash_mla import layer as mla  # noqa: E402

PAGE = 16
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 1.2,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
COMMON = {
    "vocab_size": 96,
    "hidden_size": 80,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MODELS = {
    "v3": ("DeepseekV3", {"q_lora_rank": 40, "rope_parameters": PLAIN}),
    "v3-yarn": ("DeepseekV3", {"q_lora_rank": 40, "rope_parameters": YARN, "attention_bias": True}),
    "v2": ("DeepseekV2", {"q_lora_rank": 40, "rope_parameters": PLAIN}),
    "v2-lite": ("DeepseekV2", {"q_lora_rank": None, "rope_parameters": PLAIN}),
}


class Latent(torch.nn.Module):
    """A decoder layer's self_attn on packed tokens: what transformers hands over beside them is unused."""

    def __init__(self, theirs, config, index, world):
        super().__init__()
        self.ours = mla.LatentAttention.from_config(config)
        self.ours.load_state_dict(theirs.state_dict())
        self.index, self.world = index, world

    def forward(self, hidden_states, **unused):
        world = self.world
        out = self.ours(hidden_states[0], world.cos, world.sin, world.cache[self.index], world.step)
        return out[None], None


class World:
    """What the layers of one pass share."""

    def __init__(self, model, dtype):
        config = model.config
        self.model, device = model, model.device
        width = config.kv_lora_rank + config.qk_rope_head_dim
        self.cache = mla.PagedLatentCache(config.num_hidden_layers, 40, PAGE, width, dtype, device)
        parameters = config.rope_parameters
        frequencies, gain = mla.rope_frequencies(
            config.qk_rope_head_dim, parameters["rope_theta"], parameters
        )
        self.rope = frequencies.to(device), gain
        for index, layer in enumerate(model.model.layers):
            layer.self_attn = Latent(layer.self_attn, config, index, self).to(device, dtype)

    def logits(self, tokens):
        """tokens {sequence: new ids} -> logits of each new token, packed."""
        self.step = self.cache.step({s: len(ids) for s, ids in tokens.items()})
        self.cos, self.sin = mla.rope_tables(self.step.positions, *self.rope)
        ids = torch.tensor([x for new in tokens.values() for x in new], device=self.model.device)[None]
        with torch.no_grad():
            result = self.model(input_ids=ids, position_ids=self.step.positions[None], use_cache=False)
        return result.logits[0].float()


def build(name, dtype, **settings):
    family, more = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **more, **settings})
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "self_attn" in key and weight.dim() == 2:
                weight.mul_(4)  # scores far enough apart to show a wrong one
    return model.to(dtype)


def generate(model, prompts, new):
    """Greedy tokens and the logits they come from, by transformers, each prompt by itself."""
    tokens, scores = [], []
    for prompt in prompts:
        done = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=new,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens.append(done.sequences[0, len(prompt) :].tolist())
        scores.append(torch.cat(done.logits).float())
    return tokens, scores


@pytest.mark.parametrize("name", MODELS)
def test_same_tokens_and_logits(name):
    """fp32, a ragged batch: one prefill of all prompts, then decode steps of one token each."""
    prompts = [torch.randint(3, 96, (n,)).tolist() for n in (5, 17, 1, 40)]
    model, new = build(name, torch.float32), 12
    want, want_scores = generate(model, prompts, new)
    world = World(model, torch.float32)
    logits = world.logits(dict(enumerate(prompts)))[world.step.last]
    got, scores = [], []
    for _ in range(new):
        scores.append(logits)
        got.append(logits.argmax(-1).tolist())
        logits = world.logits({i: [token] for i, token in enumerate(got[-1])})
    assert [list(x) for x in zip(*got)] == want
    for theirs, ours in zip(want_scores, torch.stack(scores, 1)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["v3-yarn", "v2-lite"])
def test_any_cut_of_the_same_tokens(name):
    """A prompt at once, in ragged chunks, in steps of three (speculative) and one by one: one result."""
    ids = [torch.randint(3, 96, (n,)).tolist() for n in (30, 21)]
    model = build(name, torch.float32)
    with torch.no_grad():
        want = [model(input_ids=torch.tensor([x]), use_cache=False).logits[0] for x in ids]
    world = World(model, torch.float32)
    got = [[], []]
    for cuts in ([9, 4], [3, 3], [2, 8], [1, 1], [10, 2], [3, 3], [2, 0]):
        done = [sum(len(x) for x in g) for g in got]
        new = {i: ids[i][done[i] : done[i] + n] for i, n in enumerate(cuts) if n}
        logits = world.logits(new)
        for i, part in zip(new, logits.split(world.step.new)):
            got[i].append(part)
    for ours, theirs in zip(got, want):
        torch.testing.assert_close(torch.cat(ours), theirs, rtol=1e-4, atol=1e-4)


def test_bf16_is_as_close_as_eager_bf16():
    prompts = [torch.randint(3, 96, (n,)).tolist() for n in (20, 33)]
    exact = generate(build("v3", torch.float32), prompts, 1)[1]
    low = generate(build("v3", torch.bfloat16), prompts, 1)[1]
    world = World(build("v3", torch.bfloat16), torch.bfloat16)
    got = world.logits(dict(enumerate(prompts)))[world.step.last]
    limit = 2 * max(float((x - y).abs().max()) for x, y in zip(low, exact)) + 1e-2
    assert float((got - torch.cat(exact)).abs().max()) <= limit


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU",
)
@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu(name):
    """bf16: a ragged prefill, then steps of 1 and of 3 tokens, no further from eager attention in fp32
    than twice eager attention in bf16.  Without experts, of which rounding may choose others, and with
    DeepSeek's own widths, which a GPU has prefill for."""
    ids = [torch.randint(3, 96, (n,)).tolist() for n in (19, 30, 17, 53)]
    exact, low, ours = (
        build(name, dtype, first_k_dense_replace=3, qk_nope_head_dim=128, v_head_dim=128).cuda()
        for dtype in (torch.float32, torch.bfloat16, torch.bfloat16)
    )
    with torch.no_grad():
        want, rough = (
            torch.cat([m(torch.tensor([x]).cuda(), use_cache=False).logits[0].float() for x in ids])
            for m in (exact, low)
        )
    world, got = World(ours, torch.bfloat16), [[] for _ in ids]
    for news in ([5, 16, 0, 36], [1, 1, 1, 1], [0, 1, 1, 1], *[[1, 0, 3, 1]] * 4, [3] * 4, [6, 9, 0, 8]):
        new = {i: ids[i][len(got[i]) :][:n] for i, n in enumerate(news) if n}
        for i, part in zip(new, world.logits(new).split(world.step.new)):
            got[i].extend(part)
    got = torch.stack([row for rows in got for row in rows])
    assert got.is_cuda and got.shape == want.shape
    limit = 2 * float((rough - want).abs().max()) + 1e-2
    assert float((got - want).abs().max()) <= limit


def test_one_row_a_token():
    world = World(build("v3", torch.bfloat16), torch.bfloat16)
    assert world.cache.bytes_per_token == 3 * 576 * 2
    mha = 3 * 5 * (32 + 64 + 24) * 2
    assert world.cache.bytes_per_token < mha
