"""diffusers and transformers as oracles: the same random weights, written by them, give the same numbers here.

Models of Stable Diffusion 1.5's full structure at narrow widths; `benchmarks/speed.py` does the same at full width.
"""

import copy
import json
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

diffusers = pytest.importorskip("diffusers", reason="extra parity is not installed")
transformers = pytest.importorskip("transformers", reason="extra parity is not installed")

from minicn import ControlNet, StableDiffusion, __main__, ddim  # noqa: E402
from minicn.checkpoints import converting, hub  # noqa: E402
from minicn.checkpoints.models import load_model, load_vae  # noqa: E402
from minicn.tokenizer import Tokenizer  # noqa: E402
from minicn.toy import captioning  # noqa: E402

WIDTHS = (32, 64, 128, 128)
BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "block_out_channels": WIDTHS,
    "cross_attention_dim": 64,
    "attention_head_dim": 8,
}


def randomise(model):
    """Give zero layers values, too, and keep the sizes of what flows through."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.1 * torch.randn(p.shape, generator=generator))
            else:
                fan = p[0].numel() if p.ndim > 1 else 100
                p.copy_(torch.randn(p.shape, generator=generator) / fan**0.5)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Stable Diffusion that diffusers wrote."""
    path = tmp_path_factory.mktemp("sd")
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, **BLOCKS
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=2,
    )
    tokenizer = transformers.CLIPTokenizer.from_pretrained(hub.TOY_BASE / "tokenizer")
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=1
        )
    )
    scheduler = diffusers.DDIMScheduler.from_pretrained(hub.TOY_BASE / "scheduler")
    diffusers.StableDiffusionPipeline(
        vae=randomise(vae),
        text_encoder=randomise(text),
        tokenizer=tokenizer,
        unet=randomise(unet),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def control_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("control")
    net = diffusers.ControlNetModel(conditioning_embedding_out_channels=(16, 32, 96, 256), **BLOCKS)
    randomise(net).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pipe(folder, control_folder):
    net = diffusers.ControlNetModel.from_pretrained(control_folder)
    pipe = diffusers.StableDiffusionControlNetPipeline.from_pretrained(folder, controlnet=net, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def sd(folder):
    return StableDiffusion.load(folder)


@pytest.fixture(scope="module")
def net(control_folder, sd):
    return ControlNet.load(control_folder, unet=sd.unet)


@pytest.fixture(scope="module")
def inputs():
    g = torch.Generator().manual_seed(3)
    return {
        "x": torch.randn(2, 4, 16, 24, generator=g),
        "hint": torch.rand(2, 3, 128, 192, generator=g),
        "t": torch.tensor([951, 1]),
        "context": torch.randn(2, 77, 64, generator=g),
    }


def error(a, b):
    """Relative error ||a - b|| / ||b||, in float64."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def levels(ours, theirs):
    """The greatest difference, in grey levels, of our picture and diffusers' numbers in [0, 1]."""
    return abs(np.asarray(ours) - (theirs * 255).round()).max()


def quiet(kind, components):
    """One of diffusers' pipelines, without its progress bar."""
    made = kind(**components, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


LIMIT = 2e-6


@torch.no_grad()
def test_text_encoder(sd, pipe):
    tokens = sd.tokenizer(["a red ball beside a yellow person", "", "a star"])
    assert error(sd.text_encoder(tokens), pipe.text_encoder(tokens)[0]) <= LIMIT


@torch.no_grad()
def test_unet_with_and_without_control(sd, net, pipe, inputs):
    x, t, context = inputs["x"], inputs["t"], inputs["context"]
    assert error(sd.unet(x, t, context), pipe.unet(x, t, context).sample) <= LIMIT
    control = net(x, inputs["hint"], t, context)
    theirs = pipe.unet(
        x, t, context, down_block_additional_residuals=control[:12], mid_block_additional_residual=control[12]
    ).sample
    assert error(sd.unet(x, t, context, control), theirs) <= LIMIT


@torch.no_grad()
def test_all_thirteen_residuals(net, pipe, inputs):
    ours = net(inputs["x"], inputs["hint"], inputs["t"], inputs["context"])
    down, mid = pipe.controlnet(inputs["x"], inputs["t"], inputs["context"], inputs["hint"], return_dict=False)
    assert len(ours) == len(down) + 1
    for a, b in zip(ours, [*down, mid], strict=True):
        assert error(a, b) <= LIMIT


@torch.no_grad()
def test_vae(sd, pipe, inputs):
    images = inputs["hint"] * 2 - 1
    mean, std = sd.vae.encode(images)
    theirs = pipe.vae.encode(images).latent_dist
    assert error(mean, theirs.mean) <= LIMIT
    assert error(std, theirs.std) <= LIMIT
    # diffusers' float32 decoder is 4e-6 off its own float64 (from its attention on it runs with channels last, where
    # PyTorch's GroupNorm loses digits); so float64 is the oracle here, and float32 has a wider limit.
    ours, double = sd.vae.decode(inputs["x"]), copy.deepcopy(pipe.vae).double()
    assert error(ours, double.decode(inputs["x"].double()).sample) <= LIMIT
    assert error(ours, pipe.vae.decode(inputs["x"]).sample) <= 5 * LIMIT


def strings(count):
    """Words, accents, CJK, emoji, digits, punctuation, all sorts of space, and very long ones; seeded."""
    rng = random.Random(0)
    pieces = [
        *"a red ball, photo of an astronaut's cat; 4k (best:1.3) don't we'll I've IT'S 2024 <|endoftext|> #@!?".split(),
        *"café naïve Über señor Ångström crème brûlée ß œuvre İstanbul".split(),
        *"日本語 赤いボール 中文 猫 한국어 العربية עברית हिन्दी ไทย Привет".split(),
        *"😀 🐱‍👤 👩🏽‍🚀 ❤️ 🇩🇪 ★ → ± ½".split(),
        *("\t", "\n", "  ", "\u00a0", "\u3000", "...", "--", "$12.50", "a_b", "x" * 40),
    ]
    made = []
    for i in range(count):
        n = rng.choice((1, 2, 5, 12, 30, 120)) if i % 50 else 400
        made.append("".join(rng.choice(pieces) + rng.choice((" ", " ", "", ", ")) for _ in range(n)))
    return made


def cleaners_agree(text):
    """Where OpenAI's cleaning (ours) and transformers' (NFC, lower case) give the same text."""
    import unicodedata

    from minicn.tokenizer import clean

    theirs = " ".join(unicodedata.normalize("NFC", text).lower().split())
    return clean(text) == theirs


def test_token_ids_are_equal(tmp_path, sd, pipe):
    """On 2,000 strings where the cleaners agree, with the toy's vocabulary and with a random one of CLIP's kind."""
    texts = [text for text in strings(4000) if cleaners_agree(text)][:2000]
    assert len(texts) == 2000
    vocabularies = {"toy": hub.TOY_BASE / "tokenizer", "large": tmp_path}
    from minicn.trainer.pretraining import learn_merges

    Tokenizer.from_merges(learn_merges([text.lower() for text in texts[:300]])).save(tmp_path)
    for folder in vocabularies.values():
        ours = Tokenizer.load(folder)(texts)
        theirs = transformers.CLIPTokenizer.from_pretrained(folder)(
            texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        different = [texts[i] for i in (ours != theirs).any(1).nonzero()[:3]]
        assert not different


@pytest.mark.parametrize("guess", [False, True])
def test_a_guided_controlled_picture(sd, net, pipe, inputs, guess):
    """20 steps from the same seed: within one grey level."""
    hint = inputs["hint"][:1, :, :, :128]
    theirs = pipe(
        "a red ball",
        image=hint,
        negative_prompt="a blue box",
        num_inference_steps=20,
        guidance_scale=7.5,
        controlnet_conditioning_scale=0.8,
        control_guidance_start=0.2,
        control_guidance_end=0.9,
        guess_mode=guess,
        generator=torch.Generator("cpu").manual_seed(5),
        output_type="np",
    ).images[0]
    [ours] = sd.generate(
        "a red ball",
        hint=hint,
        controlnet=net,
        negative_prompt="a blue box",
        guidance_scale=7.5,
        conditioning_scale=0.8,
        control_start=0.2,
        control_end=0.9,
        guess_mode="diffusers" if guess else False,
        seed=5,
    )
    assert theirs.std() > 0.02  # a picture, not a flat field
    assert levels(ours, theirs) <= 1


def test_two_controlnets(sd, net, pipe, inputs):
    hint = inputs["hint"][:1, :, :, :128]
    nets = [pipe.controlnet, pipe.controlnet]
    both = quiet(diffusers.StableDiffusionControlNetPipeline, {**pipe.components, "controlnet": nets})
    theirs = both(
        "a red ball",
        image=[hint, hint.flip(3)],
        num_inference_steps=5,
        guidance_scale=4.0,
        controlnet_conditioning_scale=[0.3, 0.6],
        generator=torch.Generator("cpu").manual_seed(5),
        output_type="np",
    ).images[0]
    [ours] = sd.generate(
        "a red ball",
        hint=[hint, hint.flip(3)],
        controlnet=[net, net],
        num_steps=5,
        guidance_scale=4.0,
        conditioning_scale=[0.3, 0.6],
        seed=5,
    )
    assert levels(ours, theirs) <= 1


def test_drawing_on_from_an_image(sd, pipe):
    """diffusers' image to image, from the same latents (its own encoder adds noise to them)."""
    components = {k: v for k, v in pipe.components.items() if k not in ("controlnet", "image_encoder")}
    from_image = quiet(diffusers.StableDiffusionImg2ImgPipeline, components)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8))
    theirs = from_image(
        "a red ball",
        image=sd.encode_images([image]),
        strength=0.5,
        num_inference_steps=10,
        guidance_scale=4.0,
        generator=torch.Generator("cpu").manual_seed(5),
        output_type="np",
    ).images[0]
    [ours] = sd.generate("a red ball", image=image, denoise=0.5, num_steps=10, guidance_scale=4.0, seed=5)
    assert levels(ours, theirs) <= 1


def test_drawing_inside_a_mask(sd, pipe, monkeypatch):
    """diffusers' inpainting with a plain U-Net; pixels of the mask are put back by minicn alone."""
    components = {k: v for k, v in pipe.components.items() if k not in ("controlnet", "image_encoder")}
    inside = quiet(diffusers.StableDiffusionInpaintPipeline, components)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8))
    mask = Image.new("L", (128, 128))
    mask.paste(255, (32, 40, 96, 120))
    monkeypatch.setattr(inside, "_encode_vae_image", lambda *_, **__: sd.encode_images([image]))  # its own is noisy
    theirs = inside(
        "a red ball",
        image=image,
        mask_image=mask,
        height=128,
        width=128,
        strength=1.0,
        num_inference_steps=10,
        guidance_scale=4.0,
        generator=torch.Generator("cpu").manual_seed(5),
        output_type="np",
    ).images[0]
    [ours] = sd.generate("a red ball", image=image, mask=mask, num_steps=10, guidance_scale=4.0, seed=5)
    drawn = np.asarray(mask) > 0
    assert levels(np.asarray(ours)[drawn], theirs[drawn]) <= 1
    assert np.array_equal(np.asarray(ours)[~drawn], np.asarray(image)[~drawn])


def test_residuals_averaged_over_all_positions(control_folder, sd, pipe, inputs, tmp_path):
    """v1.1's "shuffle": global_pool_conditions, which diffusers lets control the conditional half alone."""
    shutil.copytree(control_folder, tmp_path / "shuffle")
    config = json.loads((control_folder / "config.json").read_text()) | {"global_pool_conditions": True}
    (tmp_path / "shuffle" / "config.json").write_text(json.dumps(config))
    theirs = diffusers.ControlNetModel.from_pretrained(tmp_path / "shuffle")
    pooled = quiet(diffusers.StableDiffusionControlNetPipeline, {**pipe.components, "controlnet": theirs})
    hint, settings = inputs["hint"][:1, :, :, :128], {"guidance_scale": 4.0}
    theirs = pooled(
        "a red ball",
        image=hint,
        num_inference_steps=5,
        generator=torch.Generator("cpu").manual_seed(5),
        output_type="np",
        **settings,
    ).images[0]
    net = ControlNet.load(tmp_path / "shuffle", unet=sd.unet)
    [ours] = sd.generate("a red ball", hint=hint, controlnet=net, num_steps=5, seed=5, **settings)
    assert levels(ours, theirs) <= 1


def test_blip_captions_a_picture(tmp_path):
    """A BLIP model of random weights, as transformers saves it, captions through `--captioner`."""
    vision = transformers.BlipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=32
    )
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", "red", "ball"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    text = transformers.BlipTextConfig(
        vocab_size=len(words), hidden_size=16, encoder_hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=1, bos_token_id=5, sep_token_id=3, pad_token_id=0, eos_token_id=3,
    )  # fmt: skip
    config = transformers.BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), image_text_hidden_size=16)
    transformers.BlipForConditionalGeneration(config).save_pretrained(tmp_path)
    size = {"height": 32, "width": 32}
    transformers.BlipProcessor(
        transformers.BlipImageProcessorPil(size=size), transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    ).save_pretrained(tmp_path)
    caption = captioning.blip(str(tmp_path))(Image.new("RGB", (40, 40), "red"))
    assert set(caption.split()) <= {"red", "ball", "[UNK]", "[MASK]", "[DEC]", "[ENC]"}


def test_the_command_line_draws_the_same(folder, control_folder, pipe, tmp_path, inputs):
    """`minicn generate` on diffusers' own folders, hint from a PNG."""
    hint = Image.fromarray((inputs["hint"][0, :, :, :128].permute(1, 2, 0) * 255).byte().numpy())
    hint.save(tmp_path / "hint.png")
    theirs = pipe(
        "a red ball",
        image=hint,
        num_inference_steps=20,
        guidance_scale=9.0,
        generator=torch.Generator("cpu").manual_seed(2),
        output_type="np",
    ).images[0]
    models = ["--model", str(folder), "--controlnet", str(control_folder), "--hint", str(tmp_path / "hint.png")]
    more = ["--prompt", "a red ball", "--seed", "2", "--device", "cpu", "--output", str(tmp_path / "out.png")]
    assert __main__.main(["generate", *models, *more]) == 0
    assert levels(Image.open(tmp_path / "out.png"), theirs) <= 1


def test_timesteps_and_steps_for_every_number_of_steps(pipe):
    """1 to 1000 (diffusers' own list begins one past the schedule for 1000); each step's result, relative to 2e-6."""
    scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    abar, g = ddim.alphas_cumprod(), torch.Generator().manual_seed(0)
    x, eps = (torch.randn(1, 4, 8, 8, generator=g) for _ in range(2))
    for n in range(1, 1001):
        scheduler.set_timesteps(n)
        ours = ddim.timesteps(n)
        if n == 1000:
            assert [t + 1 for t in ours] == scheduler.timesteps.tolist()
            continue
        assert ours == scheduler.timesteps.tolist()
        for t in {ours[0], ours[len(ours) // 2], ours[-1]}:
            step = ddim.ddim_step(x, eps, abar[t], abar[max(t - 1000 // n, 0)])
            assert error(step, scheduler.step(eps, t, x).prev_sample) <= LIMIT


def test_eta_adds_the_same_noise(pipe):
    scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(20)
    abar, g = ddim.alphas_cumprod(), torch.Generator().manual_seed(0)
    x, eps, noise = (torch.randn(1, 4, 8, 8, generator=g) for _ in range(3))
    for eta in (0.3, 1.0):
        ours = ddim.ddim_step(x, eps, abar[501], abar[451], eta, noise)
        theirs = scheduler.step(eps, 501, x, eta=eta, variance_noise=noise).prev_sample
        assert error(ours, theirs) <= LIMIT


# What minicn writes, diffusers reads


@torch.no_grad()
def test_diffusers_reads_what_minicn_converts(folder, control_folder, pipe, inputs, tmp_path):
    """from_single_file on the ldm files and from_pretrained on the folders, with equal outputs, bit for bit."""
    x, t, context, hint = inputs["x"], inputs["t"], inputs["context"], inputs["hint"]
    converting.convert(folder, tmp_path / "model.safetensors", "ldm")
    converting.convert(control_folder, tmp_path / "control.safetensors", "ldm")
    converting.convert(folder, tmp_path / "vae.safetensors", "ldm", part="vae")
    converting.convert(folder, tmp_path / "unet.safetensors", "ldm", part="unet")
    converting.convert(tmp_path / "model.safetensors", tmp_path / "model", "diffusers", tokenizer=folder / "tokenizer")
    converting.convert(tmp_path / "control.safetensors", tmp_path / "control", "diffusers")
    want = pipe.unet(x, t, context).sample
    local = {"local_files_only": True}
    config = {"config": str(folder / "unet"), **local}
    for unet in (
        diffusers.UNet2DConditionModel.from_single_file(tmp_path / "model.safetensors", **config),
        diffusers.UNet2DConditionModel.from_single_file(tmp_path / "unet.safetensors", **config),
        diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "model" / "unet"),
    ):
        assert torch.equal(unet.eval()(x, t, context).sample, want)
    want = pipe.controlnet(x, t, context, hint, return_dict=False)
    for net in (
        diffusers.ControlNetModel.from_single_file(tmp_path / "control.safetensors", config=str(control_folder), **local),
        diffusers.ControlNetModel.from_pretrained(tmp_path / "control"),
    ):
        got = net.eval()(x, t, context, hint, return_dict=False)
        assert all(torch.equal(a, b) for a, b in zip([*got[0], got[1]], [*want[0], want[1]], strict=True))
    want = pipe.vae.decode(x).sample
    for vae in (
        diffusers.AutoencoderKL.from_single_file(tmp_path / "vae.safetensors", config=str(folder / "vae"), **local),
        diffusers.AutoencoderKL.from_single_file(tmp_path / "model.safetensors", config=str(folder / "vae"), **local),
        diffusers.AutoencoderKL.from_pretrained(tmp_path / "model" / "vae"),
    ):
        assert torch.equal(vae.eval().decode(x).sample, want)
    tokens = torch.arange(77)[None]
    for whole in (
        diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None),
        diffusers.StableDiffusionPipeline.from_single_file(
            str(tmp_path / "model.safetensors"), config=str(folder), safety_checker=None, **local
        ),
    ):
        assert torch.equal(whole.text_encoder(tokens)[0], pipe.text_encoder(tokens)[0])
        assert torch.equal(whole.unet(x, t, context).sample, pipe.unet(x, t, context).sample)


def test_what_diffusers_saves_in_its_variants_loads(folder, control_folder, sd, net, tmp_path):
    """save_pretrained with variant, shards, and without safetensors."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    unet.save_pretrained(tmp_path / "shards", max_shard_size="5MB")
    assert (tmp_path / "shards" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    unet.save_pretrained(tmp_path / "bin", safe_serialization=False)
    unet.half().save_pretrained(tmp_path / "half", variant="fp16")
    vae.save_pretrained(tmp_path / "vae", variant="fp16")
    ours = sd.unet.state_dict()
    for name in ("shards", "bin"):
        assert all(torch.equal(t, ours[k]) for k, t in load_model("unet", tmp_path / name).state_dict().items())
    half = load_model("unet", tmp_path / "half", variant="fp16").state_dict()
    assert all(torch.equal(t, ours[key].half().float()) for key, t in half.items())
    assert all(torch.equal(t, sd.vae.state_dict()[key]) for key, t in load_vae(tmp_path / "vae").state_dict().items())
    config = json.loads((control_folder / "config.json").read_text())
    assert config["_class_name"] == "ControlNetModel"
    theirs = diffusers.ControlNetModel.from_pretrained(control_folder)
    theirs.save_pretrained(tmp_path / "control", max_shard_size="3MB", safe_serialization=False)
    again = ControlNet.load(tmp_path / "control").state_dict()
    assert all(torch.equal(t, again[key]) for key, t in net.state_dict().items())
