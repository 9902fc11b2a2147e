"""diffusers as an oracle: it opens what ships, and draws the same pictures. Needs the extra `parity`."""

import numpy as np
import pytest
import torch
from PIL import Image

from minicn import ControlNet, StableDiffusion, toy
from minicn.checkpoints import hub

diffusers = pytest.importorskip("diffusers", reason="the extra `parity` is not installed")
pytest.importorskip("transformers", reason="the extra `parity` is not installed")

SETTINGS = dict(num_inference_steps=20, guidance_scale=9.0, height=128, width=128)
PROMPTS = ["a red ball on a white background", "a blue star, a green box and a yellow person on a black background"]


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion.load("toy")


@pytest.fixture(scope="module")
def pipe():
    return diffusers.StableDiffusionPipeline.from_pretrained(hub.TOY_BASE, torch_dtype=torch.float32)


def greatest_difference(a, b):
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_diffusers_opens_the_toy_base_and_draws_the_same_picture(sd, pipe, prompt):
    """StableDiffusionPipeline.from_pretrained and `generate` agree within 2 grey levels."""
    theirs = pipe(prompt, generator=torch.Generator("cpu").manual_seed(7), **SETTINGS).images[0]
    [ours] = sd.generate(prompt, guidance_scale=9.0, seed=7)
    assert greatest_difference(theirs, ours) <= 2
    assert np.asarray(ours).std() > 10  # a picture, not a flat field


def test_diffusers_opens_the_toy_controlnet_and_draws_the_same_picture(sd, pipe):
    """The ControlNet that ships is a diffusers folder, too; also with a scale and a window of steps."""
    net = ControlNet.load("toy-canny", unet=sd.unet)
    theirs = diffusers.ControlNetModel.from_pretrained(hub.TOY_CONTROLNETS / "canny", torch_dtype=torch.float32)
    controlled = diffusers.StableDiffusionControlNetPipeline(**pipe.components, controlnet=theirs)
    scene = toy.scene(5, "test")
    hint = Image.fromarray(scene.hint("canny"))
    for extra, own in (
        ({}, {}),
        (
            {"controlnet_conditioning_scale": 0.6, "control_guidance_start": 0.1, "control_guidance_end": 0.7},
            {"conditioning_scale": 0.6, "control_start": 0.1, "control_end": 0.7},
        ),
    ):
        generator = torch.Generator("cpu").manual_seed(8)
        expected = controlled(scene.caption, image=hint, generator=generator, **SETTINGS, **extra).images[0]
        [ours] = sd.generate(scene.caption, hint=hint, controlnet=net, guidance_scale=9.0, seed=8, **own)
        assert greatest_difference(expected, ours) <= 2


def test_the_plain_calls_draw_the_same_pictures(sd, tmp_path):
    """As the cards say: from_pretrained without further arguments, though the files are in half precision.

    Shipped, and written anew by `save`: base and ControlNet, a picture each, within 2 grey levels. The base's own defaults
    (minicn.json) are a file of ours: diffusers leaves it alone, and is told the guidance scale.
    """
    net, scene = ControlNet.load("toy-canny", unet=sd.unet), toy.scene(5, "test")
    sd.save(tmp_path / "base", dtype=torch.float16)
    net.save(tmp_path / "canny", layout="diffusers", dtype=torch.float16)
    hint = Image.fromarray(scene.hint("canny"))
    [ours] = sd.generate(scene.caption, guidance_scale=9.0, seed=9)
    [controlled] = sd.generate(scene.caption, hint=hint, controlnet=net, guidance_scale=9.0, seed=9)
    for base, canny in ((hub.TOY_BASE, hub.TOY_CONTROLNETS / "canny"), (tmp_path / "base", tmp_path / "canny")):
        assert (base / "minicn.json").is_file()
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(base)
        generator = torch.Generator("cpu").manual_seed(9)
        theirs = pipe(scene.caption, generator=generator, num_inference_steps=20, guidance_scale=9.0).images[0]
        assert theirs.size == ours.size
        assert greatest_difference(theirs, ours) <= 2
        pipe = diffusers.StableDiffusionControlNetPipeline.from_pretrained(
            base, controlnet=diffusers.ControlNetModel.from_pretrained(canny)
        )
        generator = torch.Generator("cpu").manual_seed(9)
        theirs = pipe(scene.caption, hint, generator=generator, num_inference_steps=20, guidance_scale=9.0).images[0]
        assert greatest_difference(theirs, controlled) <= 2


def test_the_tokenizer_gives_the_ids_of_transformers(sd, pipe):
    """Every caption form, an empty and an overlong prompt."""
    prompts = [*toy.captions(), "", "A  RED ball!", "a red ball " * 40]
    options = dict(padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    assert torch.equal(pipe.tokenizer(prompts, **options).input_ids, sd.tokenizer(prompts))
