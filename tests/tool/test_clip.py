"""The text transformer against its formula written out, in float64."""

import pytest
import torch
from by_hand import attention, filled
from closeness import assert_close

from minicn.clip import TextConfig, TextEncoder


@pytest.fixture
def text_encoder() -> TextEncoder:
    sizes = dict(vocab_size=20, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=2, max_positions=9)
    return filled(TextEncoder(TextConfig(**sizes)))


def test_the_text_transformer_is_its_formula(text_encoder):
    """Token + position; per layer causal attention, then x sigmoid(1.702 x) between two linear layers; a last LayerNorm."""
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5], [0, 19, 7, 7, 7, 7, 7, 7, 7]])
    model = text_encoder.text_model
    x = model.embeddings.token_embedding.weight[tokens] + model.embeddings.position_embedding.weight
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    for layer in model.encoder.layers:
        h, a = layer.layer_norm1(x), layer.self_attn
        x = x + a.out_proj(attention(a.q_proj(h), a.k_proj(h), a.v_proj(h), 2, mask))
        h = layer.mlp.fc1(layer.layer_norm2(x))
        x = x + layer.mlp.fc2(h / (1 + (-1.702 * h).exp()))
    assert_close(text_encoder(tokens), model.final_layer_norm(x), rtol=1e-12)


def test_a_word_does_not_change_the_features_before_it(text_encoder):
    """Causal: features 0 to i - 1 are the same, bit for bit, whatever stands at i; those from i on are not."""
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5]])
    other = tokens.clone()
    other[0, 4] = 8
    a, b = text_encoder(tokens), text_encoder(other)
    assert torch.equal(a[:, :4], b[:, :4])
    assert (a[:, 4:] != b[:, 4:]).any(-1).all()


def test_tokens_that_do_not_fit_are_refused(text_encoder):
    """Another shape, too many, or not whole numbers: the error says what came."""
    for tokens in (torch.zeros(9, dtype=torch.int64), torch.zeros(1, 10, dtype=torch.int64), torch.zeros(1, 9)):
        with pytest.raises(ValueError, match="tokens are .* but the text encoder takes int64 of shape"):
            text_encoder(tokens)
