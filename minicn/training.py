"""Training a ControlNet on a locked Stable Diffusion: the loss, the data in memory, the loop, what it leaves on disk.

Source: Zhang and Agrawala, arXiv:2302.05543v1, eq. (10) and section "Training"; 50% of the prompts are dropped.
Used by train_toy.py. Left out so far: other data than the toy world, several devices, mixed precision.
"""

import csv
import math
import os
import signal
import statistics
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from minicn import ddim, measures, toy
from minicn.controlnet import ControlNet
from minicn.pipeline import StableDiffusion
from minicn.unet import UNet
from minicn.vae import VAE

FOLLOWS = 0.5  # the score from which a ControlNet is said to follow


@dataclass
class Examples:
    """What the ControlNet learns from, encoded once, so that autoencoder and text encoder are not needed again.

    latents   (N, 4, h, w)   scaled, clean
    hints     (N, 3, H, W)   uint8; [0, 255] stands for [0, 1]
    contexts  (M, 77, C)     text features of the M different prompts; row 0 is the empty prompt
    prompt    (N,)           each example's row of `contexts`
    """

    latents: Tensor
    hints: Tensor
    contexts: Tensor
    prompt: Tensor

    @classmethod
    def from_scenes(cls, sd: StableDiffusion, scenes: Iterable[toy.Scene], condition: str) -> "Examples":
        """Encode toy scenes with a model's autoencoder and text encoder."""
        kept = [(scene.image, scene.hint(condition), scene.caption) for scene in scenes]  # not the 0.3 MB of the rest
        images, hints, captions = zip(*kept, strict=True)
        prompts = ["", *sorted(set(captions))]
        contexts = torch.cat([sd.encode_prompts(prompts[i : i + 256]) for i in range(0, len(prompts), 256)])
        row = {prompt: i for i, prompt in enumerate(prompts)}
        latents = encode(sd.vae, stack(images))
        return cls(latents, stack(hints), contexts.cpu(), torch.tensor([row[caption] for caption in captions]))

    def batch(self, seed: int, step: int, size: int, drop_prompt: float, device: torch.device) -> "Batch":
        """Draw the batch of a step: a function of (seed, step) alone, so that a run can be resumed anywhere."""
        random = torch.Generator().manual_seed(seed * 1_000_003 + step)
        chosen = torch.randint(len(self.latents), (size,), generator=random)
        dropped = torch.rand(size, generator=random) < drop_prompt
        timesteps = torch.randint(ddim.NUM_TRAIN_TIMESTEPS, (size,), generator=random)
        latents = self.latents[chosen]
        noise = torch.randn(latents.shape, generator=random)
        return Batch(
            latents.to(device),
            noise.to(device),
            self.hints[chosen].to(device).float().div(255).contiguous(memory_format=torch.channels_last),
            timesteps.to(device),
            self.contexts[torch.where(dropped, 0, self.prompt[chosen])].to(device),
        )


@dataclass
class Batch:
    """One step's data, as the paper's eq. (10) names it: z_0, epsilon, c_f (before E), t, c_t."""

    latents: Tensor
    noise: Tensor
    hints: Tensor
    timesteps: Tensor
    context: Tensor


def controlnet_loss(unet: UNet, net: ControlNet, batch: Batch, alphas_cumprod: Tensor) -> Tensor:
    """Return the mean squared error of the predicted noise, eq. (10).

    With every parameter of `unet` locked, autograd builds no graph for its encoder, whose inputs ask for none; the
    decoder passes gradients on to `net` and keeps none.
    """
    x_t = ddim.add_noise(batch.latents, batch.noise, alphas_cumprod[batch.timesteps])
    x_t = x_t.contiguous(memory_format=torch.channels_last)
    control = net(x_t, batch.hints, batch.timesteps, batch.context)
    return F.mse_loss(unet(x_t, batch.timesteps, batch.context, control), batch.noise)


def learning_rate_factor(step: int, steps: int) -> float:
    """Return 1, but over the last three tenths of the steps fall to 0, which sharpens the pictures; steps from 1."""
    return min(1.0, (steps - step + 1) / (0.3 * steps))


def check_resume(checkpoint: Path, resume: bool) -> None:
    """Raise an error if there is a checkpoint that nobody asked to resume, or none where somebody did."""
    if checkpoint.is_file() and not resume:
        raise ValueError(f"{checkpoint.parent} already holds a run: --resume goes on with it, another --output begins anew")
    if resume and not checkpoint.is_file():
        raise FileNotFoundError(f"{checkpoint.parent} holds no checkpoint: leave out --resume to begin anew")


def save_whole(state: dict, path: Path) -> None:
    """Write a checkpoint under a temporary name and rename it: a kill leaves the old or the new one whole."""
    temporary = path.with_suffix(".part")
    torch.save(state, temporary)
    os.replace(temporary, path)


def stack(pictures: Sequence[np.ndarray]) -> Tensor:
    """Return pictures (H, W, 3) uint8 as one tensor (N, 3, H, W) uint8."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def encode(vae: VAE, images: Tensor, batch_size: int = 32) -> Tensor:
    """Return scaled latents (N, 4, H/8, W/8) on the CPU of pictures (N, 3, H, W) uint8: the means, without noise."""
    chunks, device = [], vae.quant_conv.weight.device
    for chunk in tqdm(images.split(batch_size), desc="encoding", unit="batch", leave=False):
        chunk = chunk.to(device).float() / 127.5 - 1
        chunks.append(vae.encode(chunk)[0].cpu() * vae.cfg.scaling_factor)
    return torch.cat(chunks)


class Validation:
    """The same scenes, hints and seeds, drawn again at every stage, so that following can be seen and scored."""

    def __init__(self, sd: StableDiffusion, scenes: list[toy.Scene], condition: str, guidance_scale: float, seed: int = 0):
        self.sd, self.scenes, self.seed, self.guidance_scale = sd, scenes, seed, guidance_scale
        self.truths = [scene.image for scene in scenes]
        self.hint_pictures = [scene.hint(condition) for scene in scenes]
        self.hints = stack(self.hint_pictures).float() / 255
        latents = encode(sd.vae, stack(self.truths))
        self.ceiling = measures.mean_edge_f1(sd.decode_latents(latents.to(sd.device)), self.truths)
        self.floor = measures.mean_edge_f1(self.draw(None), self.truths)

    def draw(self, net: ControlNet | None, num_steps: int = 10) -> list[Image.Image]:
        """Draw every scene from its caption, with or without the ControlNet."""
        return self.sd.generate(
            [scene.caption for scene in self.scenes],
            hint=None if net is None else self.hints,
            controlnet=net,
            num_steps=num_steps,
            guidance_scale=self.guidance_scale,
            seed=self.seed,
            height=toy.SIZE,
            width=toy.SIZE,
        )

    def score(self, images: list[Image.Image]) -> float:
        """Return the following score of pictures from `draw`: 0 without control, 1 as good as the autoencoder."""
        return measures.score(measures.mean_edge_f1(images, self.truths), self.floor, self.ceiling)


class Run:
    """The folder of a training run: log.csv, stages/*.png, sheet.png, checkpoint.pt, controlnet.safetensors."""

    FIELDS = ("step", "loss", "score", "seconds")

    def __init__(self, folder: Path, settings: dict):
        self.folder, self.settings = folder, settings
        self.rows: list[dict] = []
        self.losses: list[float] = []  # since the last row

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def prepare(self, resume: bool) -> None:
        """Make the folder. Raises ValueError if it holds a run already, or none to resume."""
        check_resume(self.checkpoint, resume)
        (self.folder / "stages").mkdir(parents=True, exist_ok=True)

    def save(self, step: int, net: ControlNet, optimizer: torch.optim.Optimizer) -> None:
        """Write the checkpoint."""
        state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        state |= {"settings": self.settings, "rows": self.rows, "losses": self.losses}
        save_whole(state, self.checkpoint)

    def resume(self, net: ControlNet, optimizer: torch.optim.Optimizer) -> int:
        """Load the checkpoint and return its step.

        Raises ValueError if it was made with other settings, or has done more steps.
        """
        state = torch.load(self.checkpoint, weights_only=True)
        for name, value in self.settings.items():
            before = state["settings"].get(name)
            if before != value and name != "steps":
                raise ValueError(f"{self.checkpoint} was made with --{name} {before}, not {value}: give the same")
        if state["step"] > self.settings["steps"]:
            raise ValueError(f"{self.checkpoint} has done {state['step']} steps already: give more --steps")
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        self.rows, self.losses = state["rows"], state["losses"]
        return state["step"]

    def log(self, **row) -> None:
        """Add a row to log.csv, which is always the whole table."""
        self.rows.append(row)
        with open(self.folder / "log.csv", "w", newline="") as file:
            table = csv.DictWriter(file, self.FIELDS)
            table.writeheader()
            table.writerows(self.rows)

    def save_stage(self, step: int, images: list[Image.Image]) -> None:
        """Keep the pictures of a stage as one column, for the sheets to come."""
        column = np.concatenate([np.asarray(image) for image in images])
        Image.fromarray(column).save(self.folder / "stages" / f"{step:06d}.png")

    def save_sheet(self, validation: Validation, rows: int = 6, most: int = 11) -> Path:
        """Draw sheet.png: hint, truth, then the same seeds at up to `most` stages, evenly chosen, the last included."""
        stages = [(0, None)] + [(row["step"], row["score"]) for row in self.rows if row["step"]]
        stages = [stages[round(i)] for i in np.linspace(0, len(stages) - 1, min(most, len(stages)))]
        columns = [("hint", np.concatenate(validation.hint_pictures)), ("truth", np.concatenate(validation.truths))]
        for step, score in stages:
            title = f"step {step}" + ("" if score is None else f"\nscore {score:.2f}")
            columns.append((title, np.asarray(Image.open(self.folder / "stages" / f"{step:06d}.png"))))
        height = min(rows, len(validation.scenes)) * toy.SIZE
        head, gap = 30, 4
        sheet = Image.new("RGB", (len(columns) * (toy.SIZE + gap) - gap, head + height), "white")
        draw = ImageDraw.Draw(sheet)
        for i, (title, column) in enumerate(columns):
            draw.text((i * (toy.SIZE + gap) + 3, 1), title, fill="black", spacing=1)
            sheet.paste(Image.fromarray(column[:height]), (i * (toy.SIZE + gap), head))
        path = self.folder / "sheet.png"
        sheet.save(path)
        return path

    def save_curve(self) -> Path | None:
        """Draw curve.png, loss and score over the steps, if matplotlib is installed."""
        try:
            from matplotlib import pyplot
        except ImportError:
            return None
        steps = [row["step"] for row in self.rows]
        figure, axes = pyplot.subplots(2, 1, sharex=True, figsize=(7, 5))
        for axis, name in zip(axes, ("score", "loss"), strict=True):
            axis.plot(steps, [row[name] for row in self.rows], marker=".")
            axis.set_ylabel({"score": "following score", "loss": "training loss"}[name])
            axis.grid(alpha=0.3)
        axes[1].set_xlabel("step")
        figure.savefig(self.folder / "curve.png", dpi=110)
        pyplot.close(figure)
        return self.folder / "curve.png"

    def verdict(self) -> str:
        """Say in a sentence at which step the ControlNet began to follow."""
        for before, row in zip(self.rows, self.rows[1:], strict=False):
            if row["score"] >= FOLLOWS:
                return (
                    f"It began to follow between step {before['step']} (score {before['score']:.2f}) and step "
                    f"{row['step']} (score {row['score']:.2f}); the last score is {self.rows[-1]['score']:.2f}."
                )
        last = self.rows[-1]
        return f"After {last['step']} steps it does not follow yet (score {last['score']:.2f}): train longer."


def train(
    sd: StableDiffusion,
    net: ControlNet,
    examples: Examples,
    validation: Validation,
    run: Run,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    drop_prompt: float = 0.5,
    score_every: int = 250,
    checkpoint_every: int = 1000,
    resume: bool = False,
) -> None:
    """Train a ControlNet on a locked model, with a log, a sheet and checkpoints in the run's folder.

    Ctrl-C or SIGTERM lets the step end, saves checkpoint and weights, then raises KeyboardInterrupt.
    """
    device = sd.device
    sd.prepare()
    sd.unet.requires_grad_(False)
    net.train().requires_grad_(True).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.01, fused=True)
    abar = sd.alphas_cumprod.to(device)
    done = run.resume(net, optimizer) if resume else 0

    def look(step: int, seconds: float) -> float:
        images = validation.draw(net.eval())
        net.train()
        score = validation.score(images)
        run.save_stage(step, images)
        loss = statistics.fmean(run.losses or [math.nan])
        run.losses.clear()
        run.log(step=step, loss=round(loss, 5), score=round(score, 4), seconds=round(seconds, 1))
        run.save_sheet(validation)
        return score

    if not done:
        look(0, 0.0)
    bar = tqdm(range(done + 1, steps + 1), initial=done, total=steps, desc="training", unit="step", smoothing=0.05)
    shown = {"loss": "-", "score": "-"}
    earlier = run.rows[-1]["seconds"]
    with StopRequest() as stop:
        for step in bar:
            loss = controlnet_loss(sd.unet, net, examples.batch(seed, step, batch_size, drop_prompt, device), abar)
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = lr * learning_rate_factor(step, steps)
            optimizer.step()
            optimizer.zero_grad()
            run.losses.append(loss.item())
            if step % 20 == 0:
                bar.set_postfix(shown | {"loss": f"{statistics.fmean(run.losses):.4f}"}, refresh=False)
            if step % score_every == 0 or step == steps:
                seconds = earlier + bar.format_dict["elapsed"]
                shown["score"] = f"{look(step, seconds):.2f}"
            if step % checkpoint_every == 0 or step == steps or stop.asked:
                run.save(step, net, optimizer)
            if stop.asked:
                break
    bar.close()
    net.save(run.folder / "controlnet.safetensors")
    if stop.asked:
        raise KeyboardInterrupt


class StopRequest:
    """Inside `with`, the first Ctrl-C or SIGTERM only sets `asked`, so that a step is never left half done.

    A second Ctrl-C interrupts at once.
    """

    def __init__(self):
        self.asked = False
        self._before = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # the only one that signals reach
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, *_) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
