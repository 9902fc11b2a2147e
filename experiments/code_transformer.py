"""A picture as a sequence of codes, and a causal transformer that writes it: what taming_transformers.py compares.

Source: Esser et al., "Taming Transformers for High-Resolution Image Synthesis", arXiv:2012.09841, section 3.2. There a VQGAN
is trained; here the vectors of a given autoencoder's latents get a code book by k-means.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minicn import toy
from minicn.conditions import palettes

SIDE, LABELS = 16, 8  # codes along a side of a picture, and pieces along a side of a label map
WORDS = 17  # of the 77 text features: the longest caption's tokens, with its start and end
COLOURS = torch.from_numpy(palettes.ADE20K_COLOURS)[[palettes.ADE20K_NAMES.index(name) for name in toy.ADE20K]]
Past = tuple[Tensor, Tensor]  # a block's keys and values (B, heads, N, width / heads)


# Codes


def fit_codes(vectors: Tensor, count: int, rounds: int = 5) -> Tensor:
    """Return a code book (count, C) of vectors (N, C), N >= count: k-means.

    Begun by k-means++: seven tenths of the vectors are background, and would take as many of the codes.
    """
    random = torch.Generator().manual_seed(0)
    codes, far = vectors[:1], (vectors - vectors[0]).square().sum(1)
    while len(codes) < count:
        code = vectors[far.multinomial(1, generator=random)]
        codes, far = torch.cat([codes, code]), far.minimum((vectors - code).square().sum(1))
    for _ in range(rounds):
        nearest = tokens_of(vectors, codes)
        sizes = nearest.bincount(minlength=count)[:, None]
        sums = torch.zeros_like(codes).index_add_(0, nearest, vectors)
        codes = torch.where(sizes > 0, sums / sizes.clamp(min=1), codes)
    return codes


def tokens_of(vectors: Tensor, codes: Tensor) -> Tensor:
    """Return the nearest code of each vector, (N, C) -> (N,) int64."""
    size = codes.square().sum(1)  # |v - c|^2 = |v|^2 - 2 v.c + |c|^2, and |v|^2 is the same for every code
    return torch.cat([(size - 2 * part @ codes.T).argmin(1) for part in vectors.split(4096)])


def vectors_of(latents: Tensor) -> Tensor:
    """Return the vectors of all places of latents (B, 4, 16, 16), row by row, (B * 256, 4)."""
    return latents.permute(0, 2, 3, 1).flatten(0, 2)


def latents_of(tokens: Tensor, codes: Tensor) -> Tensor:
    """Return the latents (B, 4, 16, 16) of tokens (B, 256)."""
    return codes[tokens].transpose(1, 2).unflatten(2, (SIDE, SIDE)).contiguous()


def pieces(hints: Tensor) -> Tensor:
    """Cut label maps (B, 3, 128, 128) in [0, 1] into pieces of 16x16 pixels, (B, 64, 112): each label's share of 4x4."""
    same = (hints[:, None] * 255).round() == COLOURS[:, :, None, None]  # (B, 7, 3, 128, 128)
    shares = F.avg_pool2d(same.all(2).float(), 4)  # (B, 7, 32, 32)
    return F.pixel_unshuffle(shares, 32 // LABELS).flatten(2).transpose(1, 2)


# The transformer


class Block(nn.Module):
    """Causal attention, then an MLP, each behind a norm and added, as in GPT-2."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.norm_1, self.norm_2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        # Keys begin as queries, so that a token attends to what lies at its own place. From GPT-2's start (small weights,
        # and none alike) the labels were still ignored after 475 steps.
        self.qkv.weight.data[width : 2 * width] = self.qkv.weight.data[:width]

    def forward(self, x: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        """Take tokens (B, N, width), or the one that follows a past; return them, and all keys and values."""
        q, k, v = self.qkv(self.norm_1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if past:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.proj(h.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x)), (k, v)


class Transformer(nn.Module):
    """Predict each code s_i of a picture from the condition c and the codes before it: p(s | c) = prod_i p(s_i | s_<i, c).

    c is the caption's features, then the label map's pieces. Labels and codes share what says where they lie; a code is read
    at the place of the one that it predicts.
    """

    def __init__(self, context_dim: int, codes: Tensor, width: int = 128, depth: int = 4, heads: int = 4):
        super().__init__()
        self.words, self.labels = nn.Linear(context_dim, width), nn.Linear(len(COLOURS) * (32 // LABELS) ** 2, width)
        self.order = nn.Parameter(torch.zeros(WORDS, width))
        self.rows, self.columns = (nn.Parameter(0.3 * torch.randn(width, *shape)) for shape in ((SIDE, 1), (1, SIDE)))
        self.start, self.codes = nn.Parameter(torch.zeros(1, 1, width)), nn.Embedding(len(codes), width)
        alike = (codes - codes.mean(0)) / codes.std(0) @ torch.randn(codes.shape[1], width)
        self.codes.weight.data = 0.15 * alike + 0.02 * torch.randn(len(codes), width)  # codes near each other begin alike
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(codes))

    def prefix(self, context: Tensor, hints: Tensor) -> Tensor:
        """Return the condition (B, 17 + 64, width) of text features (B, 77, C) and label maps (B, 3, 128, 128)."""
        places = F.avg_pool2d(self.rows + self.columns, SIDE // LABELS).flatten(1).T
        return torch.cat([self.words(context[:, :WORDS]) + self.order, self.labels(pieces(hints)) + places], 1)

    def places(self) -> Tensor:
        return (self.rows + self.columns).flatten(1).T  # (256, width)

    def forward(self, context: Tensor, hints: Tensor, tokens: Tensor) -> Tensor:
        """Return the logits (B, 256, codes) of a picture's tokens (B, 256), each from those before it."""
        before = torch.cat([self.start.expand(len(tokens), -1, -1), self.codes(tokens[:, :-1])], 1)
        x = torch.cat([self.prefix(context, hints), before + self.places()], 1)
        return self.follow(x, [None] * len(self.blocks))[0][:, -(SIDE**2) :]

    def follow(self, x: Tensor, past: list) -> tuple[Tensor, list[Past]]:
        """Return the logits (B, N, codes) of what follows each token of x (B, N, width), and the keys and values of all."""
        now = []
        for block, before in zip(self.blocks, past, strict=True):
            x, kept = block(x, before)
            now.append(kept)
        return self.head(self.norm(x)), now

    @torch.no_grad()
    def sample(self, context: Tensor, hints: Tensor, seed: int, top_k: int) -> tuple[Tensor, Tensor]:
        """Draw tokens (B, 256), each among the `top_k` likeliest, at temperature 1; return them, and their logits."""
        random, tokens, seen = torch.Generator().manual_seed(seed), [], []
        x, past = self.start.expand(len(hints), -1, -1) + self.places()[0], [None] * len(self.blocks)
        x = torch.cat([self.prefix(context, hints), x], 1)
        for i in range(SIDE**2):
            logits, past = self.follow(x, past)
            best, which = logits[:, -1].topk(min(top_k, logits.shape[2]))
            tokens.append(which.gather(1, best.softmax(1).multinomial(1, generator=random)))
            seen.append(logits[:, -1])
            x = self.codes(tokens[-1]) + self.places()[min(i + 1, SIDE**2 - 1)]
        return torch.cat(tokens, 1), torch.stack(seen, 1)
