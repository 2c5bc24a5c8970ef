# SPDX-License-Identifier: MIT
"""MiniLM-L6 (a BERT of six layers) on packed tokens, with attention as an argument.

All documents of a batch lie end to end in one [t, 384] tensor and `cu_seqlens` says where each
begins: no token is padding.  Linear layers, norms and GELU do not care where a document ends; only
attention does, and it is whatever function the caller passes in:

    attention(q, k, v, cu_seqlens, max_seqlen) -> out        q, k, v, out: [t, heads, head_dim]
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


class MiniLM:
    def __init__(self, folder: Path, max_tokens: int = 256):
        config = json.loads((folder / "config.json").read_text())
        self.heads = config["num_attention_heads"]
        self.layers = config["num_hidden_layers"]
        self.eps = config["layer_norm_eps"]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(max_tokens)
        weights = load_file(folder / "model.safetensors")
        self.w = {name: tensor.float() for name, tensor in weights.items() if tensor.is_floating_point()}
        for layer in range(self.layers):  # q, k and v in one product: views of it go to attention
            at = f"encoder.layer.{layer}.attention.self."
            for kind in ("weight", "bias"):
                self.w[f"{at}qkv.{kind}"] = torch.cat(
                    [self.w[f"{at}{x}.{kind}"] for x in ("query", "key", "value")]
                )

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]

    def encode(self, documents: list[list[int]], attention: Attention) -> torch.Tensor:
        """Unit vectors [len(documents), 384], one a document."""
        lengths = torch.tensor([len(ids) for ids in documents])
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
        longest = int(lengths.max())
        owner = torch.repeat_interleave(torch.arange(len(documents)), lengths)
        position = torch.arange(len(owner)) - cu_seqlens[:-1].long()[owner]
        x = self._embed(torch.tensor([i for ids in documents for i in ids]), position)
        for layer in range(self.layers):
            x = self._layer(
                f"encoder.layer.{layer}.", x, lambda q, k, v: attention(q, k, v, cu_seqlens, longest)
            )
        mean = torch.zeros(len(documents), x.shape[1]).index_add_(0, owner, x) / lengths[:, None]
        return F.normalize(mean, dim=1)

    def _embed(self, ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        word, place, kind = (
            self.w[f"embeddings.{x}_embeddings.weight"] for x in ("word", "position", "token_type")
        )
        return self._norm("embeddings.LayerNorm", word[ids] + place[position] + kind[0])

    def _layer(self, at: str, x: torch.Tensor, attention) -> torch.Tensor:
        qkv = self._linear(f"{at}attention.self.qkv", x).view(len(x), 3, self.heads, -1)
        a = attention(*qkv.unbind(1)).flatten(1)
        x = self._norm(f"{at}attention.output.LayerNorm", x + self._linear(f"{at}attention.output.dense", a))
        h = F.gelu(self._linear(f"{at}intermediate.dense", x))
        return self._norm(f"{at}output.LayerNorm", x + self._linear(f"{at}output.dense", h))

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], self.eps)


def batches(documents: list[list[int]], tokens: int) -> Iterator[slice]:
    """Cuts the documents, in order, into runs of about `tokens` tokens."""
    start, filled = 0, 0
    for end, ids in enumerate(documents, 1):
        filled += len(ids)
        if filled >= tokens or end == len(documents):
            yield slice(start, end)
            start, filled = end, 0
