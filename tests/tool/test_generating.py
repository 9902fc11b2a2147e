"""Generating like the field's tools: several ControlNets, guess mode, images and masks, prompts, and the shortcuts."""

import contextlib
import copy
import dataclasses
import json
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from closeness import assert_as_exact, assert_close
from PIL import Image

from minicn import ControlNet, StableDiffusion, __main__, fast, toy
from minicn.commands import cli
from minicn.toy import captioning
from minicn.unet import Attention, Block, TransformerBlock

STEPS = 3
SCENE = toy.scene(1, "test")
MASK = np.repeat(np.uint8([255, 0]), 64)[None].repeat(128, 0)  # the left half


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion.load("toy")


@pytest.fixture(scope="module")
def net(sd):
    return ControlNet.load("toy-canny", unet=sd.unet)


@pytest.fixture(scope="module")
def exact(sd, net):
    """Both in float64, for what must be equal but for rounding: there that is far from anything else."""
    double = [copy.deepcopy(model).double() for model in (sd.unet, sd.vae, sd.text_encoder, net)]
    return StableDiffusion(*double[:3], sd.tokenizer), double[3]


@pytest.fixture(scope="module")
def hint():
    return SCENE.hint("canny")


def held_out(i):
    return toy.scene(i, "test")


def pixels(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


def draw(sd, prompt=SCENE.caption, **settings):
    return pixels(sd.generate(prompt, **{"num_steps": STEPS, "guidance_scale": 3.0} | settings))


# What is computed once equals what is computed every step


def test_the_text_is_read_once_and_gives_the_same_numbers(sd, net):
    """Inside `sampling`, U-Net and ControlNet make keys and values once, and their output is equal bit for bit."""
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([981, 1]), sd.encode_prompts(["a red ball", ""])
    hint, counts = torch.rand(1, 3, 128, 128), []
    layers = [m.attn2.to_k for model in (sd.unet, net) for m in model.modules() if isinstance(m, TransformerBlock)]
    handles = [layer.register_forward_hook(lambda *_: counts.append(1)) for layer in layers]
    assert len(layers) == 16 + 7  # the cross-attentions of the U-Net and of its encoder's copy
    with torch.no_grad():
        plain = [sd.unet(x, t, context), *net(x, hint, t, context)]
        counts.clear()
        with fast.sampling(sd.unet, equal_halves=False), fast.sampling(net, equal_halves=False):
            for _ in range(3):
                got = [sd.unet(x, t, context), *net(x, hint, t, context)]
            assert len(counts) == len(layers)
            assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))
            assert not torch.equal(sd.unet(x, t, context.flip(0)), plain[0])  # another text is read anew
        assert torch.equal(sd.unet(x, t, context), plain[0])
    for handle in handles:
        handle.remove()
    assert {type(m.attn2) for m in sd.unet.modules() if isinstance(m, TransformerBlock)} == {Attention}


@pytest.mark.numbers
def test_both_halves_of_guidance_share_what_comes_before_the_text(exact):
    """Inside `sampling`, of two equal halves one is computed up to the first cross-attention; the numbers stay."""
    sd, net = exact
    context = sd.encode_prompts(["", "", "a red ball", "a blue star"])
    x, hint, t = torch.randn(2, 4, 16, 16).double(), torch.rand(2, 3, 128, 128).double(), torch.tensor([981, 21])
    x, hint, t = (torch.cat([a, a]) for a in (x, hint, t))
    seen = []
    handle = sd.unet.input_blocks[1][0].register_forward_hook(lambda _m, _i, out: seen.append(len(out)))
    with torch.no_grad():
        plain = sd.unet(x, t, context, net(x, hint, t, context))
        with fast.sampling(sd.unet, equal_halves=True), fast.sampling(net, equal_halves=True):
            shared = sd.unet(x, t, context, net(x, hint, t, context))
    handle.remove()
    assert seen == [4, 2]
    assert_close(shared, plain)
    assert {type(block) for model in (sd.unet, net) for block in model.input_blocks} == {Block}


def test_without_fast_everything_is_right_only_slower(sd, net, hint, monkeypatch):
    """A picture drawn, and weights trained, by the models as they stand in their files, and by the exchanged layers."""
    together = {"hint": hint, "controlnet": net, "num_images": 2}
    quick = draw(sd, SCENE.caption, **together)
    monkeypatch.setattr(fast, "prepare", lambda model: None)
    monkeypatch.setattr(fast, "sampling", lambda model, equal_halves: contextlib.nullcontext())
    plain_sd, plain_net = StableDiffusion.load("toy"), ControlNet.load("toy-canny")
    kinds = {type(m) for model in (plain_sd.unet, plain_net) for m in model.modules()}
    assert not {kind for kind in kinds if kind.__module__ == "minicn.fast"}
    plain = draw(plain_sd, SCENE.caption, **together | {"controlnet": plain_net})
    assert abs(quick - plain).max() <= 1


@pytest.mark.numbers
@pytest.mark.parametrize(("size", "learns"), [((3, 5), True), ((3, 5), False), ((16, 16), True), ((17, 16), True)])
def test_a_wide_convolution_of_a_small_map_is_a_matrix_product(monkeypatch, size, learns):
    """Forwards and backwards the numbers of a convolution, up to rounding; only where it is quicker: CPUs, float32."""
    conv, x = fast.Conv3x3(768, 768, 3, padding=1).requires_grad_(learns), torch.randn(1, 768, *size, requires_grad=True)
    push = torch.randn(1, 768, *size)
    inputs = [x, conv.weight, conv.bias] if learns else [x]

    def plain(x, weight, bias):
        want = F.conv2d(x, weight, bias, padding=1)
        return [want, *torch.autograd.grad(want, [x, weight, bias][: len(inputs)], push.to(x.dtype))]

    theirs = plain(x, conv.weight, conv.bias)
    true = plain(*(a.detach().double().requires_grad_(a.requires_grad) for a in (x, conv.weight, conv.bias)))
    products, linear = [], F.linear
    monkeypatch.setattr("minicn.fast.F.linear", lambda *arguments: products.append(1) or linear(*arguments))
    got = conv(x)
    assert len(products) == (size[0] * size[1] <= 256)
    assert_as_exact([got, *torch.autograd.grad(got, inputs, push)], theirs, true)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16
    conv.double()(x.double()), fast.Conv3x3(4, 4, 3, padding=1)(x[:, :4])
    assert len(products) == (size[0] * size[1] <= 256)


def test_generate_runs_each_network_no_more_often_than_it_must(sd, net, hint, monkeypatch):
    """E(hint) and text once; U-Net and ControlNet once a step; the ControlNet not outside its window (X20)."""
    counts = dict.fromkeys(("unet", "net", "hint", "text"), 0)
    modules = {"unet": sd.unet, "hint": net.input_hint_block, "text": sd.text_encoder}
    handles = []
    for name, module in modules.items():
        handles.append(module.register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1})))
    handles.append(net.middle_block_out.register_forward_hook(lambda *_: counts.update(net=counts["net"] + 1)))
    draw(sd, hint=hint, controlnet=net, num_steps=4, control_start=0.25, control_end=0.75)
    for handle in handles:
        handle.remove()
    assert counts == {"unet": 4, "net": 2, "hint": 1, "text": 1}


# Several ControlNets, guess mode


def test_two_controlnets_add_their_residuals(sd, net, hint):
    """A ControlNet at 0.3 and again at 0.7 is the ControlNet at 1; a fresh one beside it changes nothing (eq. 4)."""
    one = draw(sd, hint=hint, controlnet=net)
    both = draw(sd, hint=[hint, hint], controlnet=[net, net], conditioning_scale=[0.3, 0.7])
    assert abs(one - both).max() <= 1
    fresh = ControlNet.from_unet(sd.unet).eval()
    other = toy.scene(2, "test").hint("canny")
    assert np.array_equal(draw(sd, hint=[hint, other], controlnet=[net, fresh]), one)
    assert not np.array_equal(draw(sd, hint=[hint, other], controlnet=[net, net]), one)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hint": [1], "controlnet": []}, "the ControlNet is missing"),
        ({"hint": "both", "controlnet": "one"}, "got 1 ControlNets, 2 hints"),
        ({"hint": "both", "controlnet": "two", "conditioning_scale": [1.0]}, "1 conditioning scales"),
        ({"hint": "both", "controlnet": "two", "conditioning_scale": [1.0, -1.0]}, "conditioning_scale is -1.0"),
        ({"hint": "both", "controlnet": "two", "conditioning_scale": [1.0, float("nan")]}, "conditioning_scale is nan"),
        ({"guess_mode": "guess"}, "guess_mode is 'guess'"),
        ({"denoise": 0.0}, "denoise is 0"),
        ({"denoise": 1.5}, "denoise is 1.5"),
        ({"mask": Image.new("L", (128, 128))}, "a mask needs the image"),
        ({"image": Image.new("RGB", (64, 64)), "height": 128}, "the image is 64x64 pixels, but the picture 64x128"),
        ({"image": Image.new("RGB", (64, 64)), "mask": Image.new("L", (8, 8))}, "the mask is 8x8 pixels"),
        ({"num_steps": 1001}, "num_steps is 1001"),
        ({"height": 100}, "multiples of 8"),
        ({"height": 0}, "multiples of 8"),
    ],
)
def test_settings_that_do_not_fit_are_named(sd, net, hint, settings, words):
    names = {"both": [hint, hint], "one": net, "two": [net, net]}
    settings = {key: names.get(value, value) if isinstance(value, str) else value for key, value in settings.items()}
    with pytest.raises(ValueError, match=words):
        sd.generate("a red ball", **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seed": 1.5}, "seed is 1.5, but must be an integer"),
        ({"num_steps": "20"}, "num_steps is '20', but must be a number"),
        ({"image": "picture.png"}, "image is str, but must be a PIL picture"),
        ({"image": Image.new("RGB", (64, 64)), "mask": np.zeros((64, 64))}, "mask is ndarray"),
        ({"controlnet": "toy-canny", "hint": "hint.png"}, "controlnet is 'toy-canny', but must be a ControlNet"),
    ],
)
def test_settings_of_another_type_are_named(sd, settings, words):
    with pytest.raises(TypeError, match=words):
        sd.generate("a red ball", **settings)


@pytest.mark.numbers
@pytest.mark.parametrize(("mode", "ratio"), [(True, 0.825), ("diffusers", 10 ** (-1 / 12))])
def test_guess_mode_controls_the_conditional_half_with_falling_scales(exact, hint, mode, ratio):
    """Residual i is scaled by ratio^(12 - i) and added on the conditional half alone, as if done by hand."""
    (sd, net), seen = exact, []
    handle = sd.unet.register_forward_pre_hook(lambda _m, args: seen.append(args))
    draw(sd, hint=hint, controlnet=net, guess_mode=mode, conditioning_scale=0.5, num_steps=1)
    handle.remove()
    [(x, t, _, control)] = seen
    with torch.no_grad():
        picture = torch.from_numpy(hint).permute(2, 0, 1)[None] / 255
        plain = net(x[1:], picture.double(), t[1:], sd.encode_prompts([SCENE.caption]))
    assert len(control) == 13
    for i, (mine, one) in enumerate(zip(control, plain, strict=True)):
        assert not mine[0].any()
        assert_close(mine[1], 0.5 * ratio ** (12 - i) * one[0])


def test_nets_of_one_half_and_of_both_add_for_several_pictures(sd, net, hint):
    """A ControlNet averaged over all positions controls one half; beside another, and for two pictures, too."""
    averaged = ControlNet(dataclasses.replace(net.cfg, global_pool=True)).eval()
    averaged.load_state_dict(net.state_dict())
    images = draw(sd, hint=[hint, hint], controlnet=[net, averaged], num_images=2)
    again = draw(sd, hint=[hint, hint], controlnet=[averaged, net], num_images=2)
    assert abs(images - again).max() <= 1
    [first] = draw(sd, hint=[hint, hint], controlnet=[net, averaged])
    assert abs(images[0] - first).max() <= 1


def test_prompts_may_come_from_anything_that_yields_them(sd):
    both = draw(sd, ["a red ball", "a blue box"], num_steps=1)
    assert np.array_equal(draw(sd, (prompt for prompt in ("a red ball", "a blue box")), num_steps=1), both)


def test_only_convolutions_that_keep_the_size_are_exchanged():
    """Others of 3x3, as strided, unpadded, dilated or grouped ones, stay what they are."""
    others = [{"stride": 2, "padding": 1}, {}, {"padding": 2, "dilation": 2}, {"padding": 1, "groups": 2}]
    layers = torch.nn.Sequential(*(torch.nn.Conv2d(4, 4, 3, **settings) for settings in [*others, {"padding": 1}]))
    fast.prepare(layers)
    assert [type(layer) for layer in layers] == 4 * [torch.nn.Conv2d] + [fast.Conv3x3]


def test_guess_mode_without_guidance_scales_all(sd, net, hint):
    """Guidance off leaves one half; it is controlled."""
    plain = draw(sd, hint=hint, controlnet=net, guidance_scale=1.0)
    guess = draw(sd, hint=hint, controlnet=net, guidance_scale=1.0, guess_mode=True)
    none = draw(sd, guidance_scale=1.0)
    assert not np.array_equal(guess, plain)
    assert not np.array_equal(guess, none)


# Images and masks


def test_an_image_is_kept_the_more_the_less_is_denoised(sd):
    """X18 without a mask: the smaller `denoise`, the nearer the picture stays to the image."""
    image = Image.fromarray(SCENE.image)
    through = pixels(sd.decode_latents(sd.encode_images([image])))
    far = [abs(draw(sd, num_steps=10, image=image, denoise=d) - through).mean() for d in (0.1, 0.5, 1.0)]
    assert far[0] < far[1] < far[2]
    assert far[0] < 12
    assert np.array_equal(draw(sd, image=image, denoise=1.0), draw(sd))  # nothing of it is left


def test_outside_the_mask_pixels_come_back_unchanged(sd, net, hint):
    """X18: black in the mask is kept exactly, white is drawn anew, at any share of the steps, with or without control."""
    image = Image.fromarray(SCENE.image)
    mask = Image.new("L", (128, 128))
    mask.paste(255, (40, 30, 90, 101))  # not on the grid of the latents
    anew = np.asarray(mask) > 0
    for settings in ({}, {"denoise": 0.7, "hint": hint, "controlnet": net}, {"num_images": 2}):
        for picture in draw(sd, "a blue cone on a black background", image=image, mask=mask, **settings):
            assert np.array_equal(picture[~anew], SCENE.image[~anew])
            assert not np.array_equal(picture[anew], SCENE.image[anew])


# Sizes, several pictures, precision


def test_any_multiple_of_eight_is_drawn(sd, net):
    """Also latents of odd height and width; far from what the model was trained at, a note says so."""
    hint = np.zeros((72, 104, 3), np.uint8)
    [picture] = sd.generate("a red ball", hint=hint, controlnet=net, num_steps=2)
    assert picture.size == (104, 72)
    with pytest.warns(UserWarning, match="was trained at 128x128 pixels, and 200x8 may come out as nonsense"):
        assert sd.generate("a red ball", num_steps=1, height=8, width=200)[0].size == (200, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd.generate("a red ball", num_steps=1, height=128, width=192)


def test_precision_of_autoencoder_and_networks(sd, hint):
    """bfloat16 draws nearly the picture of float32; the autoencoder's precision can be chosen."""
    half = StableDiffusion.load("toy", dtype=torch.bfloat16, vae_dtype=torch.float32)
    assert (half.dtype, half.vae_dtype) == (torch.bfloat16, torch.float32)
    assert half.text_encoder(half.tokenizer([""])).dtype == torch.bfloat16
    net = ControlNet.load("toy-canny", unet=half.unet, dtype=torch.bfloat16)
    full = ControlNet.load("toy-canny", unet=sd.unet)
    a, b = (draw(s, hint=hint, controlnet=n) for s, n in ((half, net), (sd, full)))
    assert abs(a - b).mean() < 4


def test_nan_names_step_and_remedy(sd):
    """A network that overflows stops at once."""
    broken = StableDiffusion.load("toy")
    with torch.no_grad():
        broken.unet.out[2].bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"step 1 of 3 \(t = 667\) gave NaN in torch\.float32: the weights are damaged"):
        draw(broken)
    broken = StableDiffusion.load("toy")
    with torch.no_grad():
        broken.vae.decoder.conv_out.bias[0] = float("inf")
    with pytest.raises(ValueError, match="autoencoder gave NaN in torch.float32: its weights are damaged"):
        draw(broken)
    broken.vae.bfloat16()
    with pytest.raises(ValueError, match="autoencoder gave NaN in torch.bfloat16: .* --vae-dtype float32"):
        draw(broken)


# Prompts


def test_words_that_are_lost_are_named(sd):
    """A prompt of more than 77 tokens is cut, and the warning says what was lost."""
    long = "a red ball " * 26 + "and at last a star"  # 78 tokens before the end
    with pytest.warns(UserWarning, match="longer than 77 tokens: 'a red ball and at last a star' is cut off"):
        context = sd.encode_prompts([long])
    assert torch.equal(context, sd.text_encoder(sd.tokenizer([long])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd.encode_prompts(["a red ball " * 25])


def test_words_that_a_model_of_few_words_does_not_know_are_named(sd):
    """Also in the negative prompt; once for all prompts; never for a model of any words."""
    with pytest.warns(UserWarning, match=r"does not know: dog, shiny; its words are: ball box cone .* things$"):
        sd.generate(["a Dog, a red ball", "a dog"], negative_prompt="shiny", num_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd.generate([*toy.captions()[::40], sd.defaults.default_prompt], num_steps=1)
        StableDiffusion(sd.unet, sd.vae, sd.text_encoder, sd.tokenizer).generate("dog", num_steps=1)


def test_the_guidance_scale_is_the_models_own(sd):
    """3 for the toy, whose folder says so; 9 for Stable Diffusion 1.5."""
    other = StableDiffusion(sd.unet, sd.vae, sd.text_encoder, sd.tokenizer)
    for model, own in ((sd, 3.0), (other, 9.0)):
        drawn, said = (pixels(model.generate("a red ball", num_steps=2, **more)) for more in ({}, {"guidance_scale": own}))
        assert np.array_equal(drawn, said)


def test_automatic_prompts_caption_a_first_picture(sd, net, hint):
    """The paper's automatic setting: draw with the default prompt, caption that, draw with the caption."""
    shown = []

    def captioner(image):
        shown.append(image)
        return "a green star on a black background"

    settings = {"hint": hint, "controlnet": net, "num_steps": 2, "seed": 5}
    images = sd.generate(captioner, **settings)
    assert np.array_equal(pixels(shown), pixels(sd.generate("a picture", **settings)))
    assert np.array_equal(pixels(images), pixels(sd.generate("a green star on a black background", **settings)))


def test_the_toys_own_captioner_names_what_is_there():
    """Of held-out scenes every thing, its colour and the background; and how pairs stand."""
    said = [(scene, captioning.toy_caption(Image.fromarray(scene.image))) for scene in map(held_out, range(24))]
    right = [all(f"{thing.colour} {thing.kind}" in text for thing in scene.things) for scene, text in said]
    assert np.mean(right) > 0.9
    assert all(text.endswith(f" on a {scene.background} background") for scene, text in said)
    assert sum(text == scene.caption for scene, text in said if len(scene.things) == 1) >= 8
    assert all(f" {relation} " in text for scene, text in said for relation in ("above",) if relation in scene.caption)
    assert captioning.toy_caption(Image.new("RGB", (128, 128), "white")) == "things on a white background"


def test_a_thing_of_two_colours_is_one_thing():
    """As what is drawn without words often is; that of the colour that covers more. Two things that touch stay two."""
    plain = next(scene for scene in map(held_out, range(50)) if [thing.kind for thing in scene.things] == ["person"])
    other = next(colour for colour in toy.COLOURS if colour != plain.things[0].colour)
    image, rows = plain.image.copy(), np.argwhere(plain.labels > 0)[:, 0]
    top = np.arange(128)[:, None] < np.quantile(rows, 0.3)
    shade = image.max(2, keepdims=True) / image[plain.labels > 0].max()
    repainted = (shade * np.array(toy.COLOURS[other]) * (1 if max(toy.COLOURS[other]) > 1 else 255)).clip(0, 255)
    image = np.where((top & (plain.labels > 0))[..., None], repainted, image).astype(np.uint8)
    assert ([*toy.COLOURS].index(other) == toy.name_colours(image)).sum() > 200
    assert captioning.toy_caption(Image.fromarray(image)) == plain.caption


def test_a_captioner_must_be_there(sd):
    """A model captions for itself if it knows the toy's words, whatever its folder is called."""
    assert captioning.captioner(None, sd) is captioning.toy_caption
    other = StableDiffusion(sd.unet, sd.vae, sd.text_encoder, sd.tokenizer)
    with pytest.raises(ValueError, match="need --captioner"):
        captioning.captioner(None, other)


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        ((255, 255, 255, 0), "black or transparent everywhere, so nothing of the image is redrawn"),
        ((0, 0, 0, 255), "black or transparent everywhere, so nothing"),
        ((255, 255, 255, 255), "white everywhere, so all of the image is redrawn"),
    ],
)
def test_a_mask_that_selects_nothing_or_all_says_so(sd, pixels, words):
    mask = Image.new("RGBA", (128, 128), pixels)
    with pytest.warns(UserWarning, match=words):
        sd.generate("", image=Image.fromarray(SCENE.image), mask=mask, num_steps=1, denoise=0.5)


def test_a_mask_is_black_where_it_is_transparent(sd):
    """White paint on nothing, and black paint under the transparent part: the same as white on black."""
    painted = np.zeros((128, 128, 4), np.uint8)
    painted[:, :64] = 255
    options = {"image": Image.fromarray(SCENE.image), "num_steps": 1}
    want = sd.generate("", mask=Image.fromarray(MASK), **options)[0]
    for beneath in (0, 255):
        painted[:, 64:, :3] = beneath
        assert np.array_equal(sd.generate("", mask=Image.fromarray(painted), **options)[0], want)


def test_a_hint_of_a_single_colour_says_so(sd, net):
    hints = [Image.fromarray(SCENE.hint("canny")), Image.new("L", (128, 128), 255)]
    with pytest.warns(UserWarning, match="hint 1 is a single colour: it shows no shapes"):
        sd.generate("", hint=hints, controlnet=[net, net], num_steps=1)


# The command line


def run(tmp_path, *arguments):
    output = tmp_path / "out.png"
    base = ["generate", "--num-steps", "2", "--device", "cpu", "--output", str(output)]
    assert __main__.main([*base, *map(str, arguments)]) == 0
    return output


def test_a_png_keeps_the_settings_that_made_it(tmp_path):
    output = run(tmp_path, "--prompt", "a red ball", "--seed", "7")
    record = json.loads(Image.open(output).text["minicn"])
    assert (record["prompt"], record["seed"], record["num_steps"], record["model"]) == ("a red ball", 7, 2, "toy")


def test_a_png_of_an_automatic_prompt_keeps_the_caption(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(captioning, "captioner", lambda *_: lambda picture: "a green star")
    record = json.loads(Image.open(run(tmp_path, "--prompt-setting", "automatic")).text["minicn"])
    assert (record["prompt"], record["device"]) == ("a green star", "cpu")
    assert "automatic prompt: a green star" in capsys.readouterr().out


def test_several_pictures_are_numbered(tmp_path, sd):
    run(tmp_path, "--prompt", "a red ball", "--num-images", "2")
    images = sd.generate("a red ball", num_steps=2, num_images=2)
    for i in range(2):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"out-{i}.png")), np.asarray(images[i]))


def test_the_command_line_reaches_every_setting(tmp_path, sd, net, hint):
    """Two ControlNets with scales, a window, guess mode, image, mask: the picture that Python gives."""
    for name, array in (("hint", hint), ("image", SCENE.image), ("mask", MASK)):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    hints = ["--controlnet", "toy-canny", "--hint", tmp_path / "hint.png"] * 2
    scales = ["--conditioning-scale", "0.5", "--conditioning-scale", "0.25"]
    more = ["--control-end", "0.5", "--guess-mode", "diffusers", "--denoise", "0.9", "--prompt-setting", "default"]
    images = ["--image", tmp_path / "image.png", "--mask", tmp_path / "mask.png"]
    output = run(tmp_path, *hints, *scales, *more, *images)
    [want] = sd.generate(
        "a picture",
        hint=[hint, hint],
        controlnet=[net, net],
        conditioning_scale=[0.5, 0.25],
        control_end=0.5,
        guess_mode="diffusers",
        image=Image.fromarray(SCENE.image),
        mask=Image.fromarray(MASK),
        denoise=0.9,
        num_steps=2,
    )
    assert np.array_equal(np.asarray(Image.open(output)), np.asarray(want))


def test_what_was_drawn_is_kept_where_it_can_be(tmp_path, sd, refused, monkeypatch, capsys):
    """The first of two has no place (here: a folder of its name): both are kept, the error says where the first is."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(cli, "check_picture", lambda *_: (tmp_path / "out-0.png" / "x").mkdir(parents=True, exist_ok=True))
    line = refused(run, tmp_path, "--prompt", "a red ball", "--num-images", "2")
    [kept] = (tmp_path / "temporary").rglob("*.png")
    assert "out-0.png cannot be written (Is a directory)" in line
    assert line.endswith(f"the picture is kept as {kept}")
    for path, want in zip((kept, tmp_path / "out-1.png"), sd.generate("a red ball", num_steps=2, num_images=2), strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(want))
        assert json.loads(Image.open(path).text["minicn"])["prompt"] == "a red ball"


def test_numbered_pictures_replace_no_input(tmp_path, refused):
    Image.fromarray(SCENE.image).save(tmp_path / "out-1.png")
    line = refused(run, tmp_path, "--prompt", "x", "--num-images", "2", "--image", tmp_path / "out-1.png")
    assert "out-1.png is also read, and would be lost: name another file" in line


def write_bomb(path):
    """A PNG of 100 bytes that says it is 30,000 x 30,000 pixels large."""
    header = b"IHDR" + (30000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    data = b"IDAT" + zlib.compress(b"")
    chunks = [len(c).to_bytes(4, "big") for c in (header[4:], data[4:])]
    content = [n + c + zlib.crc32(c).to_bytes(4, "big") for n, c in zip(chunks, (header, data), strict=True)]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(content))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--prompt is missing"),
        (["--prompt", "x", "--prompt-setting", "none"], "exclude each other"),
        (["--prompt", "x", "--hint", "a.png", "--hint", "b.png", "--controlnet", "toy-canny"], "got 2 and 1"),
        (["--prompt", "x", "--mask", "{tmp}/mask.png"], "--mask has no effect without --image"),
        (["--prompt", "x", "--denoise", "0.5"], "--denoise has no effect without --image"),
        (["--prompt", "x", "--guess-mode"], "--guess-mode has no effect without --controlnet"),
        (["--prompt", "x", "--control-end", "0.5"], "--control-end has no effect without --controlnet"),
        (["--prompt", "x", "--conditioning-scale", "1"], "--conditioning-scale has no effect without --controlnet"),
        (["--prompt", "x", "--captioner", "blip"], "--captioner has no effect without --prompt-setting automatic"),
        (["--prompt", "x", "--image", "{tmp}/bomb.png"], "pixels"),
        (["--prompt", "x", "--output", "{tmp}/kept.png"], "is not writable"),
        (["--prompt", "x", "--image", "{tmp}/cut.png"], "is not a readable image"),
        (["--prompt", "x", "--image", "{tmp}/tiny.png"], "multiples of 8"),
        (["--prompt", "x", "--denoise", "0", "--image", "{tmp}/mask.png"], "denoise is 0"),
        (["--prompt", "x", "--height", "100"], "multiples of 8"),
        (["--prompt", "x", "--model", "{tmp}/cut.png"], "is not a weights file"),
        (["--prompt", "x", "--tokenizer", "{tmp}"], "has no vocab.json"),
        (["--prompt-setting", "automatic", "--captioner", "{tmp}"], "--captioner"),
    ],
)
def test_generate_refuses_in_one_line(tmp_path, refused, monkeypatch, arguments, words):
    """Bad input: exit status 2, one line, no traceback, no picture written."""
    Image.new("RGB", (128, 128)).save(tmp_path / "mask.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "tiny.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "mask.png").read_bytes()[:60])
    (tmp_path / "kept.png").write_bytes(b"")
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "kept.png")  # root may write everywhere
    if "{tmp}/bomb.png" in arguments:
        write_bomb(tmp_path / "bomb.png")
    assert words in refused(run, tmp_path, *(argument.format(tmp=tmp_path) for argument in arguments))
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convert", "toy", "{tmp}/x.bin", "--layout", "ldm"], "must end in .safetensors"),
        (["convert", "toy", "{tmp}", "--layout", "diffusers"], "exists already"),
        (["convert", "toy", "{tmp}/x.safetensors", "--layout", "ldm", "--part", "controlnet"], "holds no ControlNet"),
        (["convert", "toy-canny", "{tmp}/x.safetensors", "--layout", "ldm", "--part", "vae"], "holds no autoencoder"),
        (["convert", "{tmp}/none", "{tmp}/x.safetensors", "--layout", "ldm"], "is not a file or folder"),
        (["inspect", "{tmp}/none"], "is not a file or folder"),
        (["inspect", "{tmp}/text"], "is not a weights file"),
        (["inspect", "toy-canny", "--compare-to", "toy"], "holds no U-Net"),
    ],
)
def test_convert_and_inspect_refuse_in_one_line(tmp_path, refused, arguments, words):
    (tmp_path / "text").write_text("no weights at all")
    assert words in refused(__main__.main, [argument.format(tmp=tmp_path) for argument in arguments])
    assert not list(tmp_path.glob("x.*"))
