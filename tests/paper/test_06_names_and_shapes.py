"""Section 3.2, Stable Diffusion: names and shapes of the published weights, from their tables and not from minicn.

The tables: Stable Diffusion 1.5's U-Net and autoencoder (CompVis), CLIP ViT-L/14's text tower, ControlNet v1.0.
"""

import copy
import math

import pytest
import torch

from minicn import VAE, ControlNet, TextConfig, TextEncoder, UNet, UNetConfig, VAEConfig
from minicn.checkpoints import files, loading, weights

# The published names, written out


def affine(name, *shape):
    """A weight and a bias as long as the weight's first side."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def conv(name, c_in, c_out, k):
    return affine(name, c_out, c_in, k, k)


def res(name, c_in, c_out):
    """A resnet block of the U-Net; the time embedding is 1280 wide."""
    return {
        **affine(f"{name}.in_layers.0", c_in),
        **conv(f"{name}.in_layers.2", c_in, c_out, 3),
        **affine(f"{name}.emb_layers.1", c_out, 1280),
        **affine(f"{name}.out_layers.0", c_out),
        **conv(f"{name}.out_layers.3", c_out, c_out, 3),
        **(conv(f"{name}.skip_connection", c_in, c_out, 1) if c_in != c_out else {}),
    }


def transformer(name, c):
    """A spatial transformer of the U-Net; the text is 768 wide."""
    block = f"{name}.transformer_blocks.0"
    found = {**affine(f"{name}.norm", c), **conv(f"{name}.proj_in", c, c, 1), **conv(f"{name}.proj_out", c, c, 1)}
    for attn, width in (("attn1", c), ("attn2", 768)):
        found |= {f"{block}.{attn}.to_q.weight": (c, c)}
        found |= {f"{block}.{attn}.to_k.weight": (c, width), f"{block}.{attn}.to_v.weight": (c, width)}
        found |= affine(f"{block}.{attn}.to_out.0", c, c)
    found |= affine(f"{block}.ff.net.0.proj", 8 * c, c) | affine(f"{block}.ff.net.2", c, 4 * c)
    return found | {k: v for i in (1, 2, 3) for k, v in affine(f"{block}.norm{i}", c).items()}


def encoder():
    """What U-Net and ControlNet share."""
    found = affine("time_embed.0", 1280, 320) | affine("time_embed.2", 1280, 1280)
    found |= conv("input_blocks.0.0", 4, 320, 3)
    table = {1: (320, 320), 2: (320, 320), 4: (320, 640), 5: (640, 640), 7: (640, 1280), 8: (1280, 1280)}
    for i, (c_in, c_out) in table.items():
        found |= res(f"input_blocks.{i}.0", c_in, c_out) | transformer(f"input_blocks.{i}.1", c_out)
    for i, c in {3: 320, 6: 640, 9: 1280}.items():
        found |= conv(f"input_blocks.{i}.0.op", c, c, 3)
    found |= res("input_blocks.10.0", 1280, 1280) | res("input_blocks.11.0", 1280, 1280)
    found |= res("middle_block.0", 1280, 1280) | transformer("middle_block.1", 1280)
    return found | res("middle_block.2", 1280, 1280)


def unet():
    found = encoder()
    table = [(2560, 1280)] * 5 + [
        (1920, 1280),
        (1920, 640),
        (1280, 640),
        (960, 640),
        (960, 320),
        (640, 320),
        (640, 320),
    ]
    for i, (c_in, c_out) in enumerate(table):
        found |= res(f"output_blocks.{i}.0", c_in, c_out)
        found |= transformer(f"output_blocks.{i}.1", c_out) if i >= 3 else {}
    for key, c in {"output_blocks.2.1": 1280, "output_blocks.5.2": 1280, "output_blocks.8.2": 640}.items():
        found |= conv(f"{key}.conv", c, c, 3)
    return found | affine("out.0", 320) | conv("out.2", 320, 4, 3)


def controlnet():
    found = encoder()
    for i, c in enumerate([320] * 4 + [640] * 3 + [1280] * 5):
        found |= conv(f"zero_convs.{i}.0", c, c, 1)
    found |= conv("middle_block_out.0", 1280, 1280, 1)
    widths = [3, 16, 16, 32, 32, 96, 96, 256, 320]
    for i in range(8):
        found |= conv(f"input_hint_block.{2 * i}", widths[i], widths[i + 1], 3)
    return found


def vae_res(name, c_in, c_out):
    return {
        **affine(f"{name}.norm1", c_in),
        **conv(f"{name}.conv1", c_in, c_out, 3),
        **affine(f"{name}.norm2", c_out),
        **conv(f"{name}.conv2", c_out, c_out, 3),
        **(conv(f"{name}.nin_shortcut", c_in, c_out, 1) if c_in != c_out else {}),
    }


def vae_mid(name):
    found = vae_res(f"{name}.block_1", 512, 512) | affine(f"{name}.attn_1.norm", 512)
    found |= vae_res(f"{name}.block_2", 512, 512)
    return found | {
        k: v for part in ("q", "k", "v", "proj_out") for k, v in conv(f"{name}.attn_1.{part}", 512, 512, 1).items()
    }


def vae():
    found = conv("encoder.conv_in", 3, 128, 3) | vae_mid("encoder.mid") | affine("encoder.norm_out", 512)
    found |= conv("encoder.conv_out", 512, 8, 3) | conv("quant_conv", 8, 8, 1) | conv("post_quant_conv", 4, 4, 1)
    for i, (c_in, c_out) in enumerate([(128, 128), (128, 256), (256, 512), (512, 512)]):
        found |= vae_res(f"encoder.down.{i}.block.0", c_in, c_out) | vae_res(f"encoder.down.{i}.block.1", c_out, c_out)
        found |= conv(f"encoder.down.{i}.downsample.conv", c_out, c_out, 3) if i < 3 else {}
    found |= conv("decoder.conv_in", 4, 512, 3) | vae_mid("decoder.mid") | affine("decoder.norm_out", 128)
    found |= conv("decoder.conv_out", 128, 3, 3)
    for i, (c_in, c_out) in {3: (512, 512), 2: (512, 512), 1: (512, 256), 0: (256, 128)}.items():  # 3 runs first
        found |= vae_res(f"decoder.up.{i}.block.0", c_in, c_out)
        found |= vae_res(f"decoder.up.{i}.block.1", c_out, c_out) | vae_res(f"decoder.up.{i}.block.2", c_out, c_out)
        found |= conv(f"decoder.up.{i}.upsample.conv", c_out, c_out, 3) if i > 0 else {}
    return found


def text_encoder():
    found = {
        "text_model.embeddings.token_embedding.weight": (49408, 768),
        "text_model.embeddings.position_embedding.weight": (77, 768),
        **affine("text_model.final_layer_norm", 768),
    }
    for i in range(12):
        layer = f"text_model.encoder.layers.{i}"
        found |= affine(f"{layer}.layer_norm1", 768) | affine(f"{layer}.layer_norm2", 768)
        found |= {k: v for part in "qkv" for k, v in affine(f"{layer}.self_attn.{part}_proj", 768, 768).items()}
        found |= affine(f"{layer}.self_attn.out_proj", 768, 768)
        found |= affine(f"{layer}.mlp.fc1", 3072, 768) | affine(f"{layer}.mlp.fc2", 768, 3072)
    return found


MODELS = {  # kind: our class, the published names, how many tensors, how many parameters
    "unet": (UNet, unet, 686, 859_520_964),
    "controlnet": (ControlNet, controlnet, 340, 361_279_120),
    "vae": (VAE, vae, 248, 83_653_863),
    "text_encoder": (TextEncoder, text_encoder, 196, 123_060_480),
}


@pytest.fixture(scope="module")
def states():
    """The state of each full-size model, without memory."""
    with torch.device("meta"):
        return {kind: model().state_dict() for kind, (model, *_) in MODELS.items()}


@pytest.mark.parametrize("kind", MODELS)
def test_the_tables_here_count_what_was_published(kind):
    """The tables of this file themselves give the published numbers of tensors and parameters."""
    _, published, count, parameters = MODELS[kind]
    assert (len(published()), sum(map(math.prod, published().values()))) == (count, parameters)


@pytest.mark.parametrize("kind", MODELS)
def test_full_size_models_have_the_published_number_of_parameters(states, kind):
    """686, 340, 248 and 196 tensors; 859,520,964, 361,279,120, 83,653,863 and 123,060,480 parameters."""
    _, _, count, parameters = MODELS[kind]
    assert len(states[kind]) == count
    assert sum(t.numel() for t in states[kind].values()) == parameters


@pytest.mark.parametrize("kind", MODELS)
def test_full_size_models_have_the_published_names_and_shapes(states, kind):
    """Every key of the published checkpoint, with its shape, and none besides."""
    assert {key: tuple(t.shape) for key, t in states[kind].items()} == MODELS[kind][1]()


def test_the_locked_part_that_controlnet_copies(states):
    """298 tensors of 348,712,960 parameters are common to U-Net and ControlNet."""
    both = states["unet"].keys() & states["controlnet"].keys()
    assert (len(both), sum(states["unet"][key].numel() for key in both)) == (298, 348_712_960)


def test_default_sizes_that_no_weight_shows():
    """Stable Diffusion 1.5's heads, groups and scale, which no shape of a weight gives away."""
    assert (UNetConfig().num_heads, UNetConfig().norm_num_groups) == (8, 32)
    assert (VAEConfig().norm_num_groups, VAEConfig().scaling_factor) == (32, 0.18215)
    assert TextConfig().num_heads == 12


# ldm <-> diffusers


SPOTS = {
    "unet": {
        "time_embed.0.weight": "time_embedding.linear_1.weight",
        "time_embed.2.bias": "time_embedding.linear_2.bias",
        "input_blocks.0.0.weight": "conv_in.weight",
        "input_blocks.1.0.in_layers.0.weight": "down_blocks.0.resnets.0.norm1.weight",
        "input_blocks.2.1.proj_in.weight": "down_blocks.0.attentions.1.proj_in.weight",
        "input_blocks.3.0.op.weight": "down_blocks.0.downsamplers.0.conv.weight",
        "input_blocks.4.0.skip_connection.bias": "down_blocks.1.resnets.0.conv_shortcut.bias",
        "input_blocks.5.0.out_layers.3.weight": "down_blocks.1.resnets.1.conv2.weight",
        "input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight": (
            "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k.weight"
        ),
        "input_blocks.9.0.op.bias": "down_blocks.2.downsamplers.0.conv.bias",
        "input_blocks.11.0.emb_layers.1.weight": "down_blocks.3.resnets.1.time_emb_proj.weight",
        "middle_block.0.in_layers.2.weight": "mid_block.resnets.0.conv1.weight",
        "middle_block.1.norm.weight": "mid_block.attentions.0.norm.weight",
        "middle_block.2.out_layers.0.bias": "mid_block.resnets.1.norm2.bias",
        "output_blocks.0.0.skip_connection.weight": "up_blocks.0.resnets.0.conv_shortcut.weight",
        "output_blocks.2.1.conv.weight": "up_blocks.0.upsamplers.0.conv.weight",
        "output_blocks.5.2.conv.weight": "up_blocks.1.upsamplers.0.conv.weight",
        "output_blocks.7.1.proj_out.bias": "up_blocks.2.attentions.1.proj_out.bias",
        "output_blocks.8.2.conv.bias": "up_blocks.2.upsamplers.0.conv.bias",
        "output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight": (
            "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj.weight"
        ),
        "out.0.weight": "conv_norm_out.weight",
        "out.2.bias": "conv_out.bias",
    },
    "controlnet": {
        "time_embed.0.bias": "time_embedding.linear_1.bias",
        "input_blocks.0.0.bias": "conv_in.bias",
        "input_blocks.6.0.op.weight": "down_blocks.1.downsamplers.0.conv.weight",
        "input_blocks.7.1.norm.bias": "down_blocks.2.attentions.0.norm.bias",
        "input_blocks.10.0.in_layers.2.bias": "down_blocks.3.resnets.0.conv1.bias",
        "middle_block.2.emb_layers.1.bias": "mid_block.resnets.1.time_emb_proj.bias",
        "input_hint_block.0.weight": "controlnet_cond_embedding.conv_in.weight",
        "input_hint_block.2.weight": "controlnet_cond_embedding.blocks.0.weight",
        "input_hint_block.4.bias": "controlnet_cond_embedding.blocks.1.bias",
        "input_hint_block.12.weight": "controlnet_cond_embedding.blocks.5.weight",
        "input_hint_block.14.bias": "controlnet_cond_embedding.conv_out.bias",
        "zero_convs.0.0.weight": "controlnet_down_blocks.0.weight",
        "zero_convs.11.0.bias": "controlnet_down_blocks.11.bias",
        "middle_block_out.0.weight": "controlnet_mid_block.weight",
    },
    "vae": {
        "encoder.conv_in.weight": "encoder.conv_in.weight",
        "encoder.norm_out.bias": "encoder.conv_norm_out.bias",
        "encoder.down.1.block.0.nin_shortcut.weight": "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
        "encoder.down.2.downsample.conv.bias": "encoder.down_blocks.2.downsamplers.0.conv.bias",
        "encoder.mid.block_1.norm1.weight": "encoder.mid_block.resnets.0.norm1.weight",
        "encoder.mid.attn_1.norm.weight": "encoder.mid_block.attentions.0.group_norm.weight",
        "encoder.mid.attn_1.q.weight": "encoder.mid_block.attentions.0.to_q.weight",
        "encoder.mid.attn_1.k.bias": "encoder.mid_block.attentions.0.to_k.bias",
        "decoder.mid.attn_1.v.weight": "decoder.mid_block.attentions.0.to_v.weight",
        "decoder.mid.attn_1.proj_out.weight": "decoder.mid_block.attentions.0.to_out.0.weight",
        "decoder.mid.block_2.conv2.bias": "decoder.mid_block.resnets.1.conv2.bias",
        "decoder.up.3.block.0.conv1.weight": "decoder.up_blocks.0.resnets.0.conv1.weight",
        "decoder.up.0.block.2.norm2.weight": "decoder.up_blocks.3.resnets.2.norm2.weight",
        "decoder.up.1.upsample.conv.weight": "decoder.up_blocks.2.upsamplers.0.conv.weight",
        "decoder.norm_out.weight": "decoder.conv_norm_out.weight",
        "decoder.conv_out.weight": "decoder.conv_out.weight",
        "quant_conv.weight": "quant_conv.weight",
        "post_quant_conv.bias": "post_quant_conv.bias",
    },
    "text_encoder": {
        key: key
        for key in (
            "text_model.embeddings.token_embedding.weight",
            "text_model.encoder.layers.11.self_attn.out_proj.bias",
            "text_model.encoder.layers.0.mlp.fc1.weight",
            "text_model.final_layer_norm.bias",
        )
    },
}


@pytest.mark.parametrize("kind", MODELS)
def test_diffusers_names_are_those_of_the_table(kind):
    """Row by row: the ldm name on the left becomes the diffusers name on the right."""
    shapes = MODELS[kind][1]()
    state = {key: torch.empty(shapes[key], device="meta") for key in SPOTS[kind]}
    assert list(weights.to_diffusers(kind, state)) == list(SPOTS[kind].values())


@pytest.mark.parametrize("kind", MODELS)
def test_diffusers_names_are_a_bijection(states, kind):
    """No two ldm names share a diffusers name, none is lost, and the way back gives every name and shape again."""
    there = weights.to_diffusers(kind, states[kind])
    assert len(there) == len(states[kind])
    assert [weights.own_name(kind, key) for key in there] == list(states[kind])
    assert [weights.own_name(kind, key) for key in states[kind]] == list(states[kind])  # our own names stay
    parts = {
        "unet": {"time_embedding", "conv_in", "down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_out"},
        "vae": {"encoder", "decoder", "quant_conv", "post_quant_conv"},
        "text_encoder": {"text_model"},
    }
    hint = {"controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block"}
    parts["controlnet"] = hint | {"time_embedding", "conv_in", "down_blocks", "mid_block"}
    assert {key.split(".")[0] for key in there} == parts[kind]


def test_only_the_attention_of_the_vae_changes_its_shape(states):
    """8 weights, 1x1 convolutions in ldm, are linear layers in diffusers; every other tensor keeps its shape."""
    for kind, state in states.items():
        there = weights.to_diffusers(kind, state)
        changed = {
            key: tuple(new.shape)
            for (key, old), new in zip(state.items(), there.values(), strict=True)
            if old.shape != new.shape
        }
        want = {f"{s}coder.mid.attn_1.{p}.weight" for s in ("en", "de") for p in ("q", "k", "v", "proj_out")}
        assert changed == (dict.fromkeys(want, (512, 512)) if kind == "vae" else {})


def test_there_and_back_is_the_same_bit_for_bit(unet, controlnet, tmp_path):
    """Written in diffusers' names and loaded again, random values are the same; the input is not touched."""
    models = {
        "unet": unet,
        "controlnet": controlnet,
        "vae": VAE(VAEConfig(channels=(4, 8, 8, 8), norm_num_groups=2)),
        "text_encoder": TextEncoder(
            TextConfig(vocab_size=20, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2)
        ),
    }
    for kind, model in models.items():
        state = {key: torch.randn_like(t) for key, t in model.state_dict().items()}
        before = {key: t.clone() for key, t in state.items()}
        files.write(tmp_path / f"{kind}.safetensors", weights.to_diffusers(kind, state))
        found = weights.contents(files.open_weights(tmp_path / f"{kind}.safetensors"))
        assert list(found.parts) == [kind]
        again = copy.deepcopy(model).to("meta")
        loading.load_into(again, found.file, found.parts[kind], torch.float32)
        back = again.state_dict()
        assert back.keys() == before.keys() == state.keys()
        assert all(torch.equal(back[key], before[key]) and torch.equal(state[key], before[key]) for key in before)
