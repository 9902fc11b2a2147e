"""Training of the toy base: autoencoder, tokenizer, text transformer and U-Net, from scratch, on the toy world.

`python train_toy.py --base` runs it; the result is the Stable Diffusion in `minicn/toy/next/base/`. Source of the recipe:
Rombach et al., arXiv:2112.10752 (autoencoder with a slight KL term, then a U-Net on its latents with text), 10% of the
prompts dropped for classifier-free guidance (Ho and Salimans, arXiv:2207.12598). Left out: the discriminator and the
perceptual loss of the autoencoder; an L1 loss on differences of neighbouring pixels keeps the edges sharp instead.
"""

import contextlib
import copy
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from minicn import ddim, fast, toy
from minicn.checkpoints import files
from minicn.clip import TextConfig, TextEncoder
from minicn.inputs import Defaults
from minicn.pipeline import StableDiffusion
from minicn.tokenizer import Tokenizer, byte_letters
from minicn.trainer import resuming
from minicn.trainer.distributed import init_distributed
from minicn.trainer.recording import StopRequest, check_folder, encode, save_whole
from minicn.training import learning_rate_factor, send
from minicn.unet import UNet, UNetConfig
from minicn.vae import VAE, AttnBlock, Downsample, ResnetBlock, Upsample, VAEConfig

TOY_VAE = VAEConfig(channels=(16, 32, 64, 96), norm_num_groups=4)
TOY_UNET = UNetConfig(model_channels=32, num_heads=2, context_dim=96, norm_num_groups=8)
TOY_TEXT = dict(hidden_size=96, intermediate_size=384, num_layers=3, num_heads=3)  # the vocabulary is learned
DROP_PROMPT = 0.1  # share of empty prompts, so that guidance has an unconditional prediction to start from
MIN_SNR = 5.0  # the signal-to-noise ratio above which steps are down-weighted, see `snr_weight`
VARIANTS = 8  # ways in which a scene is described, drawn once; each step takes one of them
DECAY = 0.4  # share of the U-Net's steps over which its learning rate falls
WARM_UP = 200  # steps over which the U-Net's learning rate warms up
RESULTS = ("model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler")  # names in the folder written
PEOPLE = 2.0  # how much more often scenes with people are shown: people are hardest


def init_vae(vae: VAE) -> None:
    """Initialise the autoencoder as a linear one: every resnet block and the attention begin as the identity.

    Otherwise the normalised branches, which have lost the absolute colour, drown out the path that carries it: the pictures
    get outlines but no colours. In a trial, 250 steps of 8 crops left an L1 error of 0.17 (learning rate 0.001), and 0.24
    without this initialisation (learning rate 0.0005).
    """
    for module in vae.modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
        elif isinstance(module, AttnBlock):
            nn.init.zeros_(module.proj_out.weight)
        elif isinstance(module, (Downsample, Upsample)):
            nn.init.kaiming_normal_(module.conv.weight, nonlinearity="linear")
    for conv in (vae.encoder.conv_in, vae.encoder.conv_out, vae.decoder.conv_in):
        nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")


def vae_loss(vae: VAE, images: Tensor, edge_weight: float, kl_weight: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Return the training loss and the plain L1 error of a batch of pictures (B, 3, H, W) in [-1, 1]."""
    mean, std = vae.encode(images)
    error = vae.decode(mean + std * torch.randn_like(std)) - images
    l1 = error.abs().mean()
    edges = (error[..., 1:, :] - error[..., :-1, :]).abs().mean() + (error[..., 1:] - error[..., :-1]).abs().mean()
    kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
    return l1 + (error**2).mean() + edge_weight * edges + kl_weight * kl, l1.detach()


class Checkpoint:
    """Counts the steps of a training run and keeps its state in a file, so that --resume works after Ctrl-C or a kill.

    stage  what is trained, in a word
    every  steps between two checkpoints
    seed   for the random numbers: each step's are a function of (seed, step, process) alone
    """

    def __init__(self, file: Path, stage: str, every: int, seed: int):
        self.file, self.stage, self.every, self.seed = file, stage, every, seed

    def loop(self, steps: int, **parts) -> Iterator[tuple[int, tqdm]]:
        """Yield each step that is left, from 0, and the progress bar; `parts` are all that have a state_dict.

        Raises KeyboardInterrupt after a checkpoint if asked to stop. (Under torchrun the last regular one remains.)
        """
        rank, world = init_distributed()
        done = self._load(steps, parts) if self.file.is_file() else 0
        bar = tqdm(range(done, steps), initial=done, total=steps, desc=self.stage, unit="step", disable=rank > 0)
        with StopRequest() if world == 1 else contextlib.nullcontext() as stop:
            for step in bar:
                torch.manual_seed((self.seed * 1_000_003 + step) * world + rank)
                yield step, bar
                stopping = stop is not None and stop.asked
                if rank == 0 and ((step + 1) % self.every == 0 or stopping):
                    state = {name: part.state_dict() for name, part in parts.items()}
                    save_whole({**state, "stage": self.stage, "steps": steps, "done": step + 1}, self.file)
                if stopping:
                    raise KeyboardInterrupt

    def _load(self, steps: int, parts: dict) -> int:
        state = resuming.read(self.file)
        done, before = state.get("done"), state.get("steps")
        resuming.compare([done, before], [0, 0], self.file, "done, steps")
        flat = done <= (1 - DECAY) * min(steps, before)  # the learning rate has not begun to fall
        if state.get("stage") != self.stage or (before != steps and not (flat and self.stage == "U-Net")):
            stage = files.printable(state.get("stage"), 100)
            raise ValueError(
                f"{self.file} is from a run of {before} steps of the {stage}, not {steps} of the {self.stage}: resume with "
                "the same"
            )
        for name, part in parts.items():
            if name != "optimizer":
                resuming.compare(state.get(name), part.state_dict(), self.file, name)
                continue
            parameters = dict(enumerate(p for group in part.param_groups for p in group["params"]))
            resuming.compare_optimizer(state.get(name), parameters, len(part.param_groups), self.file)
            state[name] = resuming.as_own(state[name], part, parameters)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return done

    def remove(self) -> None:
        """Remove the file: the training has ended."""
        self.file.unlink(missing_ok=True)


def train_vae(
    images: Tensor, steps: int, device: torch.device, checkpoint: Checkpoint, batch_size: int = 16, lr: float = 1e-3
) -> VAE:
    """Train the toy autoencoder: four fifths of the steps on 64x64 crops, four times cheaper, then whole pictures.

    images  (N, 3, 128, 128) uint8
    """
    vae = VAE(TOY_VAE)
    init_vae(vae)
    vae.to(device, memory_format=fast.layout(device))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    # A higher rate gets stuck where outlines are right and colours wrong.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.03)
    for step, bar in checkpoint.loop(steps, vae=vae, optimizer=optimizer, schedule=schedule):
        whole = step >= 0.8 * steps  # GroupNorm sees different statistics on whole pictures than on crops
        count, side = (batch_size // 2, toy.SIZE) if whole else (batch_size, toy.SIZE // 2)
        chosen = torch.randint(len(images), (count,))
        corners = torch.randint(toy.SIZE - side + 1, (count, 2)).tolist()
        crops = [images[i, :, y : y + side, x : x + side] for i, (y, x) in zip(chosen, corners, strict=True)]
        batch = send(torch.stack(crops), device).float() / 127.5 - 1
        loss, l1 = vae_loss(vae, batch.contiguous(memory_format=fast.layout(device)), edge_weight=step / steps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(l1=f"{l1.item():.4f}")
    return vae.eval()


@torch.no_grad()
def normalise_latents(vae: VAE, images: Tensor) -> None:
    """Fold a shift and a scale into the 1x1 convolutions around the latents, so that 0.18215 makes them N(0, 1).

    Stable Diffusion's factor 0.18215 is 1 / std of its own latents; with this the toy's has the same meaning and size.
    """
    means = encode(vae, images) / vae.cfg.scaling_factor
    shift = means.mean((0, 2, 3)).to(vae.quant_conv.weight.device)
    scale = 1 / (means.std((0, 2, 3)).to(shift.device) * vae.cfg.scaling_factor)
    n = vae.cfg.latent_channels
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.bias[:n] = (quant.bias[:n] - shift) * scale
    quant.weight[:n] *= scale[:, None, None, None]
    quant.bias[n:] += 2 * scale.log()
    post.bias += (post.weight[:, :, 0, 0] * shift).sum(1)
    post.weight /= scale[None, :, None, None]


def learn_merges(texts: list[str]) -> list[tuple[str, str]]:
    """Learn byte pairs until every word of the texts is one token: merge the commonest pair, again and again.

    Source: Sennrich et al., arXiv:1508.07909, algorithm 1.
    """
    letters = byte_letters()
    counts = Counter(word for text in texts for word in text.replace(",", " ,").split())
    words = {word: [letters[b] for b in word.encode()] for word in counts}
    for parts in words.values():
        parts[-1] += "</w>"
    merges = []
    while any(len(parts) > 1 for parts in words.values()):
        pairs = Counter()
        for word, parts in words.items():
            for pair in zip(parts, parts[1:], strict=False):
                pairs[pair] += counts[word]
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for parts in words.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def describe(scene: toy.Scene, draw: Callable[[], float]) -> str:
    """Say what a scene shows as people would, not always as the toy world does.

    draw  a random number in [0, 1)

    Half of the time the scene's own caption; else with "and" between two things, without the background, without
    colours, with words that mean nothing here, or a sentence that says nothing about the scene: so prompts with other words
    draw something sensible, too.
    """
    names = [f"{toy.world._article(thing.colour)} {thing.kind}" for thing in scene.things]
    background = f" on a {scene.background} background"
    kind = draw()
    if kind < 0.5:
        return scene.caption
    if kind < 0.7:
        if len(names) == 2:
            names = names if draw() < 0.5 else names[::-1]
            said = " and ".join(names)
        else:
            said = scene.caption.removesuffix(background)
        return said + (background if draw() < 0.7 else "")
    if kind < 0.78:
        return scene.caption.removesuffix(background)
    if kind < 0.84:
        kinds = [f"a {thing.kind}" for thing in scene.things]
        said = kinds[0] if len(kinds) == 1 else ", ".join(kinds[:-1]) + " and " + kinds[-1]
        return said + (background if draw() < 0.5 else "")
    if kind < 0.94:
        words = scene.caption.split(" ")
        for _ in range(1 + int(3 * draw())):
            words.insert(int((len(words) + 1) * draw()), _unknown(draw))
        return " ".join(words)
    if kind < 0.98:
        return NEUTRAL[int(len(NEUTRAL) * draw())]
    return " ".join(_unknown(draw) for _ in range(1 + int(6 * draw())))


def _unknown(draw: Callable[[], float]) -> str:
    if draw() < 0.5:
        return OTHER_WORDS[int(len(OTHER_WORDS) * draw())]
    return "".join("abcdefghijklmnopqrstuvwxyz"[int(26 * draw())] for _ in range(2 + int(8 * draw())))


NEUTRAL = (
    "a picture",
    "a picture of things",
    "things on a background",
    "a professional, detailed, high-quality image",  # the paper's default prompt
)
DEFAULTS = Defaults(
    guidance_scale=3.0,
    default_prompt=NEUTRAL[0],
    words=" ".join(
        dict.fromkeys(
            " ".join([*toy.THINGS, *toy.COLOURS, *toy.BACKGROUNDS, *toy.captions(), *NEUTRAL[:3]]).replace(",", "").split()
        )
    ),
)
# Words that people write and that mean nothing in the toy world.
OTHER_WORDS = (
    "photo drawing painting image art scene masterpiece beautiful detailed big small shiny simple colourful realistic best "
    "quality 4k with the of in and an nice house dog cat car tree sky woman man girl boy room street city river"
).split()


def snr_weight(abar_t: Tensor) -> Tensor:
    """Return the weight of the loss at abar_t: min(SNR, 5) / SNR, SNR = abar_t / (1 - abar_t).

    Source: Hang et al., arXiv:2303.09556, min-SNR weighting for predicted noise. The steps with little noise, at which
    the small network can only guess the noise, would dominate the gradient; what a picture shows, and which
    thing has which colour, is decided at the others.
    """
    snr = abar_t / (1 - abar_t)
    return snr.clamp(max=MIN_SNR) / snr


class Denoiser(nn.Module):
    """U-Net and text transformer as one module: noisy latents, timesteps and tokens to predicted noise."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.unet = UNet(TOY_UNET)
        self.text = TextEncoder(TextConfig(vocab_size=vocab_size, **TOY_TEXT))

    def forward(self, x: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        return self.unet(x, timesteps, self.text(tokens))


def train_unet(
    latents: Tensor,
    captions: list[list[str]],
    chances: Tensor,
    tokenizer: Tokenizer,
    steps: int,
    batch_size: int,
    lr: float,
    device: torch.device,
    checkpoint: Checkpoint,
    start: StableDiffusion | None = None,
) -> Denoiser:
    """Train U-Net and text transformer together; return their moving average (EMA).

    latents     (N, 4, 16, 16)  scaled latents of the pictures with these captions; under torchrun, this process's own
    captions    N lists         VARIANTS ways to describe each picture
    chances     (N,)            how often each is shown, in any unit
    batch_size  samples per step, in each process
    start       the model whose weights to start from, where their shapes fit; None: random ones
    """
    tokens = torch.stack([tokenizer(said).short() for said in captions])  # (N, VARIANTS, 77)
    empty = tokenizer([""])
    abar = ddim.alphas_cumprod().to(device)
    torch.manual_seed(checkpoint.seed)
    model = Denoiser(len(tokenizer.vocab))
    if start is not None:
        for part, old in ((model.unet, start.unet), (model.text, start.text_encoder)):
            shapes = {name: tensor.shape for name, tensor in part.state_dict().items()}
            fits = {name: tensor for name, tensor in old.state_dict().items() if tensor.shape == shapes.get(name)}
            part.load_state_dict(fits, strict=False)
    model.to(device)
    fast.prepare(model.unet)
    average = copy.deepcopy(model).requires_grad_(False)
    parallel = (
        nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True) if init_distributed()[1] > 1 else model
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    smooth = None
    for step, bar in checkpoint.loop(steps, model=model, average=average, optimizer=optimizer):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / WARM_UP) * learning_rate_factor(step + 1, steps, DECAY)
        chosen = torch.multinomial(chances, batch_size, replacement=True)
        dropped = torch.rand(batch_size, 1) < DROP_PROMPT
        said = tokens[chosen, torch.randint(VARIANTS, (batch_size,))].long()
        words = send(torch.where(dropped, empty, said), device)
        x_0 = send(latents[chosen], device).contiguous(memory_format=fast.layout(device))
        t, eps = torch.randint(ddim.NUM_TRAIN_TIMESTEPS, (batch_size,), device=device), torch.randn_like(x_0)
        error = parallel(ddim.add_noise(x_0, eps, abar[t]), t, words) - eps
        loss = (error.square().mean((1, 2, 3)) * snr_weight(abar[t])).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            kept = min(0.999, step / (step + 9))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - kept)
        if step % 20 == 0:
            smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
            bar.set_postfix(loss=f"{smooth:.4f}")
    return average.eval()


def pictures(indices: Iterable[int]) -> tuple[Tensor, list[list[str]], Tensor]:
    """Draw toy pictures, uint8 (N, 3, 128, 128), VARIANTS descriptions of each, and how often each is to be shown (N,)."""
    images, captions, chances = [], [], []
    for i in tqdm(indices, desc="drawing scenes", unit="scene", disable=init_distributed()[0] > 0):
        scene, draw = toy.scene(i), random.Random(i).random
        images.append(torch.from_numpy(scene.image))
        captions.append([describe(scene, draw) for _ in range(VARIANTS)])
        chances.append(PEOPLE if any(thing.kind == "person" for thing in scene.things) else 1.0)
    return torch.stack(images).permute(0, 3, 1, 2).contiguous(), captions, torch.tensor(chances)


def train_base(
    output: Path,
    model: str | None,
    scenes: int,
    vae_steps: int,
    unet_steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    device: torch.device,
    checkpoint_every: int = 1000,
    resume: bool = False,
) -> None:
    """Train the whole toy base and write it to `output` in half precision. A finished autoencoder there is kept.

    model  the toy base whose U-Net and text transformer to train further, its autoencoder kept; None: from scratch

    Under torchrun each process learns from its own share of the scenes, `batch_size` in all: one process per core waits
    for the others once per step, the threads of one process at every layer.
    """
    rank, world = init_distributed()
    check_folder(output, resume, RESULTS)
    output.mkdir(parents=True, exist_ok=True)
    start = None if model is None else StableDiffusion.load(model, device=device)
    checkpoints = [
        Checkpoint(output / "checkpoint.pt", stage, checkpoint_every, seed + i)
        for i, stage in enumerate(("autoencoder", "U-Net"))
    ]
    with resuming.lock(output) if rank == 0 else contextlib.nullcontext():
        vae = start.vae if start else autoencoder(output / "vae.pt", scenes, vae_steps, seed, device, checkpoints[0])
        tokenizer = Tokenizer.from_merges(learn_merges([*toy.captions(), *NEUTRAL[:3]]))
        images, captions, chances = pictures(range(rank, scenes, world))
        latents = encode(vae, images)
        del images
        size = batch_size // world
        trained = train_unet(latents, captions, chances, tokenizer, unet_steps, size, lr, device, checkpoints[1], start)
        if rank == 0:
            StableDiffusion(trained.unet, vae, trained.text, tokenizer, DEFAULTS).save(output, dtype=torch.float16)
            checkpoints[1].remove()


def autoencoder(finished: Path, scenes: int, steps: int, seed: int, device: torch.device, checkpoint: Checkpoint) -> VAE:
    """Return the autoencoder in the file `finished`, trained first if there is none: in one process, while others wait."""
    if not finished.is_file() and init_distributed()[0] == 0:
        images, _, _ = pictures(range(min(scenes, 4000)))
        torch.manual_seed(seed)
        vae = train_vae(images, steps, device, checkpoint)
        normalise_latents(vae, images[:1000])
        save_whole(vae.state_dict(), finished)
        checkpoint.remove()
    if init_distributed()[1] > 1:
        dist.barrier()
    vae = VAE(TOY_VAE).to(device, memory_format=fast.layout(device)).eval()
    state = resuming.read(finished)
    resuming.compare(state, vae.state_dict(), finished, "its content")
    vae.load_state_dict(state)
    return vae
