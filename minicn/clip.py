"""The text transformer of CLIP: token ids to the context that the U-Net attends to.

Source: Radford et al., arXiv:2103.00020 (ViT-L/14's text tower); the key names are those of transformers, which the
published Stable Diffusion files use. Left out: the pooled output and its projection, which Stable Diffusion 1 ignores.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class TextConfig:
    """Shape of the text transformer; the defaults are CLIP ViT-L/14's, as in Stable Diffusion 1.5."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    max_positions: int = 77


class Embeddings(nn.Module):
    """Token plus position embeddings."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.position_embedding = nn.Embedding(cfg.max_positions, cfg.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]


class SelfAttention(nn.Module):
    """Causal multi-head attention: each token attends to itself and those before it."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.heads = cfg.num_heads
        self.q_proj = nn.Linear(cfg.hidden_size, cfg.hidden_size)
        self.k_proj = nn.Linear(cfg.hidden_size, cfg.hidden_size)
        self.v_proj = nn.Linear(cfg.hidden_size, cfg.hidden_size)
        self.out_proj = nn.Linear(cfg.hidden_size, cfg.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, dim / heads)
            for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        # CLIP masks the future but not the padding: all 77 positions take part, as in training.
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(h.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers. Numerics: CLIP's own GELU, x sigmoid(1.702 x), not the exact one."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.fc1 = nn.Linear(cfg.hidden_size, cfg.intermediate_size)
        self.fc2 = nn.Linear(cfg.intermediate_size, cfg.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(1.702 * h))


class Layer(nn.Module):
    """Attention and MLP, each after a LayerNorm, with a residual connection."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(cfg.hidden_size)
        self.self_attn = SelfAttention(cfg)
        self.layer_norm2 = nn.LayerNorm(cfg.hidden_size)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TextTransformer(nn.Module):
    """Embeddings, layers, a final LayerNorm."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.embeddings = Embeddings(cfg)
        layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.num_layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.final_layer_norm = nn.LayerNorm(cfg.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embeddings(tokens)
        for layer in self.encoder["layers"].children():
            h = layer(h)
        return self.final_layer_norm(h)


class TextEncoder(nn.Module):
    """CLIP's text tower, as Stable Diffusion uses it: the last hidden state of every position."""

    def __init__(self, cfg: TextConfig | None = None):
        super().__init__()
        self.cfg = cfg = cfg or TextConfig()
        self.text_model = TextTransformer(cfg)  # Compat: published keys begin with text_model

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the context (B, 77, 768) for token ids (B, 77) int64.

        Raises ValueError for ids of another shape, or too many of them.
        """
        if tokens.ndim != 2 or tokens.shape[1] > self.cfg.max_positions or tokens.dtype != torch.int64:
            raise ValueError(
                f"tokens are {tokens.dtype} of shape {tuple(tokens.shape)}, but the text encoder takes int64 of shape "
                f"(B, {self.cfg.max_positions}): use the model's tokenizer"
            )
        return self.text_model(tokens)
