"""The whole way from prompt and hint to picture, on the toy model that ships."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from minicn import ControlNet, ControlNetConfig, StableDiffusion, conditions, ddim, pipeline, toy, vae
from minicn.checkpoints import hub

PROMPT = "a red ball beside a yellow person on a white background"
QUICK = dict(num_steps=2, height=32, width=32)


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion.load("toy")


@pytest.fixture(scope="module")
def fresh(sd):
    return ControlNet.from_unet(sd.unet, hint_channels=(4, 4, 8, 8)).eval()


@pytest.fixture(scope="module")
def trained(fresh):
    """A ControlNet whose zero convolutions are no longer zero."""
    net = ControlNet(fresh.cfg).eval()
    net.load_state_dict(fresh.state_dict())
    torch.manual_seed(0)
    for module in (*net.zero_convs, net.middle_block_out, net.input_hint_block[-1]):
        for p in module.parameters():
            torch.nn.init.normal_(p, std=0.05)
    return net


@pytest.fixture
def hint():
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def pixels(images):
    return np.stack([np.asarray(image) for image in images])


def test_a_seed_is_a_picture(sd):
    """The same seed gives the same picture, another one another."""
    first, again = (pixels(sd.generate(PROMPT, seed=3, **QUICK)) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, pixels(sd.generate(PROMPT, seed=4, **QUICK)))


def test_the_first_noise_is_that_of_the_cpu_generator(sd, monkeypatch):
    """x_999 is torch.randn((n, 4, h, w)) of the seed's CPU generator: the noise that diffusers draws, too."""
    seen = []
    monkeypatch.setattr(sd, "unet", Recorder(sd.unet, seen))
    sd.generate(PROMPT, seed=5, num_images=2, **QUICK)
    expected = torch.randn((2, 4, 4, 4), generator=torch.Generator("cpu").manual_seed(5))
    assert torch.equal(seen[0][0], torch.cat([expected, expected]))  # for guidance


class Recorder(torch.nn.Module):
    """Stand in for a model and keep what it was called with."""

    def __init__(self, model, seen):
        super().__init__()
        self.model, self.seen = model, seen

    def __getattr__(self, name):
        return super().__getattr__(name) if name in ("model", "seen") else getattr(self.__dict__["_modules"]["model"], name)

    def forward(self, *args):
        self.seen.append(args)
        return self.model(*args)


def test_generate_is_guidance_and_ddim_by_hand(sd, trained, hint):
    """`generate` is: encode, noise, for each step control, U-Net, guidance, DDIM; decode."""
    context = sd.encode_prompts(["", PROMPT])
    x = torch.randn((1, 4, 4, 4), generator=torch.Generator("cpu").manual_seed(0))
    with torch.no_grad():
        for t, s in ((501, 1), (1, 0)):
            both, steps = torch.cat([x, x]), torch.tensor([t, t])
            control = [0.7 * c for c in trained(both, hint, steps, context)]
            eps_u, eps_c = sd.unet(both, steps, context, control=control).chunk(2)
            x = ddim.ddim_step(x, eps_u + 4 * (eps_c - eps_u), sd.alphas_cumprod[t], sd.alphas_cumprod[s])
        expected = ((sd.vae.decode(x / 0.18215) / 2 + 0.5).clamp(0, 1) * 255).round().byte()[0].permute(1, 2, 0).numpy()
    [image] = sd.generate(
        PROMPT, hint=hint, controlnet=trained, conditioning_scale=0.7, guidance_scale=4, num_steps=2, seed=0
    )
    assert np.abs(expected.astype(int) - np.asarray(image).astype(int)).max() <= 1  # the sum's order may differ


def test_scale_zero_is_no_control_and_another_scale_another_picture(sd, trained, hint):
    """conditioning_scale multiplies the 13 residuals."""
    plain = pixels(sd.generate(PROMPT, **QUICK))
    off, on = (pixels(sd.generate(PROMPT, hint=hint, controlnet=trained, conditioning_scale=s, num_steps=2)) for s in (0, 1))
    assert np.array_equal(plain, off)
    assert not np.array_equal(plain, on)


@pytest.mark.parametrize(("start", "end", "runs"), [(0, 1, 10), (0, 0.5, 5), (0.5, 1, 5), (0.2, 0.6, 4)])
def test_control_runs_only_in_its_window(sd, trained, hint, monkeypatch, start, end, runs):
    """Outside control_start to control_end the ControlNet is not even run (the paper's 50% experiment)."""
    seen, residuals = [], trained.residuals
    monkeypatch.setattr(trained, "residuals", lambda *args: seen.append(args) or residuals(*args))
    sd.generate(PROMPT, hint=hint, controlnet=trained, control_start=start, control_end=end, num_steps=10)
    assert len(seen) == runs


@pytest.mark.parametrize(
    ("start", "end", "denoise", "runs"),
    [(0, 0.5, 0.5, 2), (0.4, 1, 0.5, 3), (0, 0.2, 0.5, 1), (0.5, 1, 0.2, 1), (0, 1, 0.3, 3)],
)
def test_the_window_is_one_of_the_steps_that_run(sd, trained, hint, monkeypatch, start, end, denoise, runs):
    """With 10 steps and denoise 0.5 five run; as in diffusers, control_end 0.5 lets the first two be controlled."""
    seen, residuals = [], trained.residuals
    monkeypatch.setattr(trained, "residuals", lambda *args: seen.append(args) or residuals(*args))
    image = Image.new("RGB", (32, 32))
    window = {"control_start": start, "control_end": end, "image": image, "denoise": denoise}
    sd.generate(PROMPT, hint=hint, controlnet=trained, num_steps=10, guidance_scale=1, **window)
    assert len(seen) == runs


@pytest.mark.parametrize("window", [{"control_end": 0.3}, {"control_start": 0.4, "control_end": 0.6}, {"control_start": 1}])
def test_a_window_without_a_step_is_said(sd, trained, hint, window):
    with pytest.warns(UserWarning, match="none of the 3 steps lies between control_start .*: the hint steers nothing"):
        sd.generate(PROMPT, hint=hint, controlnet=trained, num_steps=3, guidance_scale=1, **window)


def test_guidance_one_runs_the_model_once_a_step(sd, monkeypatch):
    """guidance_scale 1 is off: no unconditional half in the batch."""
    seen = []
    monkeypatch.setattr(sd, "unet", Recorder(sd.unet, seen))
    sd.generate(PROMPT, guidance_scale=1, **QUICK)
    assert [(len(x), len(context)) for x, _, context, *_ in seen] == [(1, 1), (1, 1)]


def test_a_list_of_prompts_is_a_picture_each(sd, trained):
    """Row i of a list has prompt i, hint i and row i of the noise."""
    hints = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    both = sd.generate(["a red ball", "a blue box"], hint=hints, controlnet=trained, num_steps=2)
    [first] = sd.generate("a red ball", hint=hints[:1], controlnet=trained, num_steps=2)
    assert np.abs(pixels(both)[0].astype(int) - np.asarray(first).astype(int)).max() <= 1
    assert not np.array_equal(*pixels(both))


def test_eta_adds_noise_that_the_seed_fixes(sd):
    """eta 1 differs from eta 0, and repeats."""
    zero, one, again = (pixels(sd.generate(PROMPT, eta=eta, **QUICK)) for eta in (0, 1, 1))
    assert np.array_equal(one, again)
    assert not np.array_equal(zero, one)


@pytest.mark.parametrize("kind", ["picture", "grey", "rgba", "array", "tensor"])
def test_hints_of_every_kind_are_the_same_hint(kind):
    """A picture, a grey or RGBA one, an array and a tensor give the same (1, 3, H, W) in [0, 1]."""
    edges = toy.scene(0, "test").hint("canny")
    image = Image.fromarray(edges)
    hint = {
        "picture": image,
        "grey": image.convert("L"),
        "rgba": image.convert("RGBA"),
        "array": edges,
        "tensor": torch.from_numpy(edges).permute(2, 0, 1).float() / 255,
    }[kind]
    expected = torch.from_numpy(edges.copy()).permute(2, 0, 1)[None].float() / 255
    assert torch.equal(conditions.hint_tensor(hint), expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(num_steps=0), "num_steps is 0"),
        (dict(num_steps=1001), r"must lie in \[1, 1000\]"),
        (dict(guidance_scale=float("nan")), "guidance_scale is nan"),
        (dict(conditioning_scale=-1), "conditioning_scale is -1"),
        (dict(control_start=0.6, control_end=0.4), "lies after"),
        (dict(seed=-1), "seed is -1"),
        (dict(num_images=0), "num_images is 0"),
        (dict(height=30), "multiples of 8"),
        (dict(hint="file.png"), "go together"),
        (dict(controlnet="fresh"), "go together, but the hint is missing"),
    ],
)
def test_settings_out_of_range_are_named(sd, fresh, settings, words):
    """An error says what came and what was expected, before any work."""
    settings = settings | ({"controlnet": fresh} if "controlnet" in settings else {})
    with pytest.raises(ValueError, match=words):
        sd.generate(PROMPT, **settings)


def test_a_hint_of_another_size_or_range_is_refused(sd, fresh):
    """The hint must be as large as the picture, in [0, 1], of three channels."""
    with pytest.raises(ValueError, match="hint is 32x32 pixels"):
        sd.generate(PROMPT, hint=torch.rand(3, 32, 32), controlnet=fresh, height=64, width=64)
    with pytest.raises(ValueError, match="divide by 255"):
        sd.generate(PROMPT, hint=torch.rand(3, 32, 32) * 255, controlnet=fresh)
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        sd.generate(PROMPT, hint=torch.rand(2, 32, 32), controlnet=fresh)


def test_a_prompt_that_is_no_text_is_refused(sd):
    with pytest.raises(TypeError, match="prompts are"):
        sd.generate([3], **QUICK)


def test_the_toy_base_is_small_and_its_latents_have_the_size_of_stable_diffusions(sd):
    """The folder weighs at most 24 MB, and 0.18215 makes the toy's latents about standard normal, too."""
    assert sum(path.stat().st_size for path in hub.TOY_BASE.rglob("*") if path.is_file()) <= 24e6
    images = torch.from_numpy(np.stack([toy.scene(i, "test").image for i in range(16)])).permute(0, 3, 1, 2)
    with torch.no_grad():
        latents = sd.vae.encode(images.float() / 127.5 - 1)[0] * sd.vae.cfg.scaling_factor
    assert sd.vae.cfg.scaling_factor == 0.18215
    assert latents.mean().abs() < 0.2
    assert 0.8 < latents.std() < 1.2


def test_pictures_become_latents_and_back_by_one_scale():
    """encode_images: [0, 255] to [-1, 1], times 0.18215; decode_latents divides by it, rounds to the nearest level."""

    class Open(nn.Module):
        """An autoencoder that keeps what it is given."""

        cfg = vae.VAEConfig()
        quant_conv = nn.Conv2d(1, 1, 1)

        def encode(self, images):
            return images, None

        def decode(self, latents):
            return latents

    sd = StableDiffusion.__new__(StableDiffusion)
    sd.vae, sd.unet = Open(), nn.Module()
    sd.unet.out = nn.Sequential(nn.Identity(), nn.Identity(), nn.Conv2d(1, 1, 1))
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    latents = sd.encode_images([Image.fromarray(levels)])
    want = (torch.arange(256) / 127.5 - 1).view(1, 1, 16, 16).expand(1, 3, 16, 16) * 0.18215
    assert (latents - want).abs().max() < 1e-7
    [back] = sd.decode_latents(latents)
    assert np.array_equal(np.asarray(back), levels)
    [nearest] = sd.decode_latents(torch.full((1, 3, 1, 1), 2 * 100.7 / 255 - 1) * 0.18215)
    assert np.asarray(nearest)[0, 0, 0] == 101


@pytest.mark.parametrize(("mode", "ratio"), [(True, 0.825), ("diffusers", 10 ** (-1 / 12)), (False, 1.0)])
@pytest.mark.parametrize("guided", [True, False])
def test_guess_mode_scales_the_conditional_half_by_hand(mode, ratio, guided):
    """Residual i is scaled by ratio^(12 - i), and where there are two halves, the unconditional one gets zeros."""

    class Ones(nn.Module):
        """A ControlNet whose 13 residuals are 1."""

        cfg = ControlNetConfig()

        def hint_features(self, hint):
            return hint

        def residuals(self, x, *_):
            return [torch.ones(len(x), 2, 1, 1)] * 13

    context, latents = torch.zeros(1 + guided, 7, 12), torch.zeros(1, 4, 1, 1)
    control = pipeline.Control(Ones(), torch.zeros(1, 3, 8, 8), 0.5, mode, context, guided, latents)
    residuals = control.residuals(torch.cat([latents] * (1 + guided)), torch.tensor([501] * (1 + guided)))
    assert len(residuals) == 13
    for i, c in enumerate(residuals):
        halves = c.flatten(1).tolist()
        assert len(halves) == 1 + guided
        assert not guided or halves[0] == ([0, 0] if mode else [0.5, 0.5])
        assert halves[-1] == pytest.approx([0.5 * ratio ** (12 - i)] * 2, rel=1e-6)


def test_python_says_what_it_holds_and_takes_what_it_is_given(sd, trained, tmp_path):
    """A path is a hint; a whole model stands for its U-Net; models and scenes are a line; numpy's integers are integers."""
    scene = toy.scene(1, "test")
    Image.fromarray(scene.hint("canny")).save(tmp_path / "hint.png")
    settings = {"controlnet": trained, "num_steps": 1}
    for hint in (tmp_path / "hint.png", str(tmp_path / "hint.png"), [tmp_path / "hint.png"]):
        [a], [b] = (sd.generate(PROMPT, hint=each, **settings) for each in (hint, scene.hint("canny")))
        assert a.tobytes() == b.tobytes()
    names = ("num_steps", "seed", "num_images", "height", "width")
    [a], [b] = (
        sd.generate(PROMPT, **dict(zip(names, map(kind, (1, 2, 1, 64, 64)), strict=True))) for kind in (int, np.uint64)
    )
    assert a.tobytes() == b.tobytes()
    trained.save(tmp_path / "net.safetensors")
    net = ControlNet.load(tmp_path / "net.safetensors", unet=sd)
    assert repr(net).startswith("<ControlNet for a U-Net of width 32, float32 on cpu; million parameters: ")
    assert repr(sd).startswith("<StableDiffusion for 128x128 pixels, float32 on cpu; million parameters: U-Net ")
    with pytest.raises(TypeError, match="unet is VAE, but must be a UNet or a StableDiffusion"):
        ControlNet.load(tmp_path / "net.safetensors", unet=sd.vae)
