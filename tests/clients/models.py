# SPDX-License-Identifier: MIT
"""Small random models, one for each feature that clients use, and the switch to flash_attention_3."""

import torch
import transformers

COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama():
    """GQA."""
    return transformers.LlamaForCausalLM, transformers.LlamaConfig(**COMMON)


def mistral():
    """A sliding window."""
    return transformers.MistralForCausalLM, transformers.MistralConfig(**COMMON, sliding_window=7)


def gemma2():
    """Soft-capped scores, and a window in every other layer."""
    config = transformers.Gemma2Config(
        **COMMON, sliding_window=6, attn_logit_softcapping=5.0, query_pre_attn_scalar=16
    )
    return transformers.Gemma2ForCausalLM, config


def gpt_oss():
    """A learned sink for every head, and a window in every other layer.  A token takes all experts:
    where it takes some, the rounding of 16 bits may choose others, and the logits are another model's."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = transformers.GptOssConfig(
        **COMMON, sliding_window=8, num_local_experts=4, num_experts_per_tok=4, rope_parameters=rope
    )
    return transformers.GptOssForCausalLM, config


ALL = {f.__name__: f for f in (llama, mistral, gemma2, gpt_oss)}


def build(name, dtype=torch.float32):
    """A model in eager attention whose scores are far enough apart to show a wrong mask."""
    torch.manual_seed(0)
    kind, config = ALL[name]()
    config._attn_implementation = "eager"
    model = kind(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "q_proj.weight" in key or "k_proj.weight" in key:
                weight.mul_(12)
            if "sinks" in key:
                weight.normal_()
    return model.to(dtype)


def use(model, implementation):
    """Sets the attention after construction: the gate at construction wants CUDA."""
    model.config._attn_implementation = implementation
    return model
