"""What a training run leaves on disk, and how it is monitored: log, sheets, checkpoints, validation.

The loss says nothing about following: it hardly changes when a ControlNet suddenly begins to obey. So the same hints and
seeds are drawn at every stage and scored, and numbers that do change are logged beside the loss.
"""

import contextlib
import csv
import json
import math
import os
import signal
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

from minicn import conditions, ddim
from minicn.checkpoints import files
from minicn.controlnet import ControlNet
from minicn.pipeline import StableDiffusion
from minicn.toy import measures
from minicn.trainer import resuming
from minicn.vae import VAE

FOLLOWS = 0.3  # the score from which a ControlNet is said to follow
QUARTERS = (125, 375, 625, 875)  # timesteps that represent the quarters of the schedule


def stack(pictures: Sequence[np.ndarray]) -> Tensor:
    """Return pictures (H, W, 3) uint8 as one tensor (N, 3, H, W) uint8."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def encode(vae: VAE, images: Tensor, batch_size: int = 8) -> Tensor:
    """Return scaled latents (N, 4, H/8, W/8) on the CPU of pictures (N, 3, H, W) uint8: the means, without noise."""
    chunks, like = [], vae.quant_conv.weight
    for chunk in tqdm(images.split(batch_size), desc="encoding", unit="batch", leave=False):
        chunk = (chunk.to(like.device).float() / 127.5 - 1).to(like.dtype)
        chunks.append(vae.encode(chunk)[0].float().cpu() * vae.cfg.scaling_factor)
    return torch.cat(chunks)


class Validation:
    """The same hints, prompts and seeds at every stage: drawn, scored, and measured.

    truths, hint_pictures  (H, W, 3) uint8, all of one size
    measure                (image, wanted) -> value in [0, 1]: how well a picture follows, e.g. measures.measure("depth")
    wanted                 what `measure` compares each picture with, e.g. the scenes; default: the truths
    """

    def __init__(
        self,
        sd: StableDiffusion,
        truths: list[np.ndarray],
        hint_pictures: list[np.ndarray],
        captions: list[str],
        guidance_scale: float | None = None,
        seed: int = 0,
        num_steps: int = 10,
        measure: Callable[..., float] = measures.edge_f1,
        wanted: Sequence | None = None,
    ):
        self.measure, self.wanted = measure, truths if wanted is None else wanted
        self.sd, self.truths, self.hint_pictures, self.captions = sd, truths, hint_pictures, captions
        self.guidance_scale, self.seed, self.num_steps = guidance_scale, seed, num_steps
        self.hints = stack(hint_pictures).float() / 255
        self.latents = encode(sd.vae, stack(truths))
        decoded = [image for part in self.latents.split(16) for image in sd.decode_latents(part.to(sd.device))]
        self.ceiling = measures.mean(measure, decoded, self.wanted)
        self.floor = measures.mean(measure, self.draw(None), self.wanted)

    def draw(self, net: ControlNet | None) -> list[Image.Image]:
        """Draw every hint with its prompt, or without the ControlNet."""
        height, width = self.truths[0].shape[:2]
        return self.sd.generate(
            self.captions,
            hint=None if net is None else self.hints,
            controlnet=net,
            num_steps=self.num_steps,
            guidance_scale=self.guidance_scale,
            seed=self.seed,
            height=height,
            width=width,
            progress=True,
        )

    def score(self, images: list[Image.Image]) -> float:
        """Return the following score of pictures from `draw`: 0 without control, 1 as good as the autoencoder."""
        return measures.score(measures.mean(self.measure, images, self.wanted), self.floor, self.ceiling)

    @torch.no_grad()
    def losses(self, net: ControlNet, most: int = 8) -> dict[str, float]:
        """Return what changes while a ControlNet learns, with fixed noise, over up to `most` of the pictures.

        loss_q1 .. loss_q4  mean squared error in each quarter of the timesteps, the least noisy first
        sensitivity         ||eps(c) - eps(c')|| / ||eps(c)||, where c' is another picture's hint, or a blank one
        """
        sd, n = self.sd, min(most, len(self.captions))
        device, dtype = sd.device, sd.dtype
        x_0, hints = self.latents[:n].to(device), self.hints[:n].to(device, dtype)
        noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(self.seed)).to(device)
        others = hints.roll(1, 0) if n > 1 else torch.zeros_like(hints)
        context, found, changed, size = sd.encode_prompts(self.captions[:n]), {}, 0.0, 0.0
        for i, t in enumerate(QUARTERS, 1):
            x_t = ddim.add_noise(x_0, noise, sd.alphas_cumprod[t]).to(dtype)
            steps = torch.full((n,), t, device=device)
            eps, other = (sd.unet(x_t, steps, context, net(x_t, c, steps, context)).float() for c in (hints, others))
            found[f"loss_q{i}"] = F.mse_loss(eps, noise).item()
            changed, size = changed + (eps - other).square().sum().item(), size + eps.square().sum().item()
        return {**found, "sensitivity": math.sqrt(changed / size)}


def words(score: float) -> str:
    """Write a score with two digits, and never as -0.00."""
    return f"{score:.2f}".replace("-0.00", "0.00")


def zero_norms(net: ControlNet) -> dict[str, float]:
    """Return the norm of each of the 13 zero convolutions' weights: zero_0 .. zero_11, zero_middle."""
    names = [f"zero_{i}" for i in range(len(net.zero_convs))] + ["zero_middle"]
    layers = [*(zero[0] for zero in net.zero_convs), net.middle_block_out[0]]
    return {name: layer.weight.detach().float().norm().item() for name, layer in zip(names, layers, strict=True)}


def save_whole(state: dict, path: Path) -> None:
    """Write a checkpoint: a kill, or a full disk, leaves the one before intact. Raises OSError, saying so."""
    with files.replacing(path) as new:
        torch.save(state, new)


def check_folder(folder: Path, resume: bool, results: Sequence[str], reports: Sequence[str] = ()) -> bool:
    """Return whether there is a run to resume in a folder; where there is none, `resume` begins it, with a note.

    Raises ValueError for a run without `resume`, or if a new one would replace what is not its own, see `check_free`.
    """
    found = resuming.resumable(folder)
    if found and not resume:
        raise ValueError(f"{folder} already holds a run: --resume continues it, another --output starts anew")
    if not found:
        resuming.check_free(folder, results, reports)
        if resume:
            warnings.warn(f"{folder} holds no checkpoint yet: the run begins", stacklevel=1)
    return found


class Run:
    """The folder of a training run: log.csv, stages/*.png, sheet.png, checkpoint.pt, controlnet.safetensors.

    settings  what must be the same when a run is resumed, except `steps`, which may grow
    keep      how many older checkpoints are kept, as checkpoint-STEP.pt
    """

    RESULTS = ("controlnet.safetensors", "diffusers", "model.safetensors", "checkpoint.pt")
    REPORTS = ("log.csv", "sheet.png", "curve.png", "stages", "tensorboard")

    def __init__(self, folder: Path, settings: dict, keep: int = 0):
        self.folder, self.settings, self.keep = folder, settings, keep
        self.rows: list[dict] = []
        self.losses: list[float] = []  # since the last row
        self.kept: list[int] = []  # steps of the older checkpoints
        self._saved: int | None = None  # step of the newest, unless it is damaged
        self._lock: IO | None = None
        self._made: list[Path] = []  # what `prepare` found missing

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def older(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step:08d}.pt"

    @property
    def encoded(self) -> Path:
        """Latents and text features of a data folder, for --resume."""
        return self.folder / "encoded.safetensors"

    def prepare(self, resume: bool) -> None:
        """Take the folder for this run, until `release`. What lies in it stays as it is.

        Raises ValueError if it holds another run, or something in a result's place, or is in use.
        """
        found = check_folder(self.folder, resume, self.RESULTS, self.REPORTS)
        self._made = [path for path in (self.folder / resuming.LOCK, self.folder) if not os.path.lexists(path)]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = resuming.lock(self.folder)
        try:
            for name in self.REPORTS:
                if (self.folder / name).is_symlink():
                    raise ValueError(f"{self.folder / name} is a link: a run writes nothing elsewhere; remove it")
            if found:
                self.load()
        except BaseException:
            self.release(unused=True)
            raise

    def release(self, unused: bool = False) -> None:
        """Let other processes use the folder; `unused` by the run, which was refused, it is left as it was found."""
        if self._lock is None:
            return
        if unused:
            with contextlib.suppress(OSError):  # a folder that holds something stays
                for path in self._made:
                    path.rmdir() if path == self.folder else path.unlink(missing_ok=True)
        self._lock.close()
        self._lock = None

    def save(self, step: int, state: dict) -> None:
        """Write the checkpoint; keep as many older ones as asked for. `state` is what resuming needs."""
        before = self.kept
        if self.keep and self._saved not in (None, step):
            with contextlib.suppress(OSError):  # not on every file system
                os.link(self.checkpoint, self.older(self._saved))
                before = [*before, self._saved]
        self.kept = before[len(before) - min(self.keep, len(before)) :]
        more = {"settings": self.settings, "rows": self.rows, "losses": self.losses, "kept": self.kept}
        save_whole({**state, "step": step, **more}, self.checkpoint)
        self._saved = step
        for old in set(before) - set(self.kept):
            self.older(old).unlink(missing_ok=True)

    def load(self, check: Callable[[dict, Path], None] = lambda state, path: None) -> dict:
        """Return the newest checkpoint that is whole. Warns if that is an older one.

        check  looks at what a run alone does not know: called with a checkpoint and its file, raises Damaged
        Raises ValueError if it was made with other settings, or has done more steps, or none is whole.
        """
        reason = None
        for path in (self.checkpoint, *sorted(self.folder.glob(f"checkpoint-{'[0-9]' * 8}.pt"), reverse=True)):
            try:
                state = resuming.read(path)
                resuming.check_log(state, path)
                self._check_settings(state, path)
                check(state, path)
                break
            except resuming.Damaged as error:
                reason = reason or error
        else:
            raise ValueError(f"{reason}; no older one is kept: start a new run in another --output")
        self.rows, self.losses, self.kept = state["rows"], state["losses"], state.get("kept", [])
        self._saved = state["step"] if reason is None else None
        if reason is not None:
            self.kept = [*self.kept, state["step"]]
            warnings.warn(f"{reason}; {path.name} is whole, and taken instead", stacklevel=1)
        return state

    def _check_settings(self, state: dict, path: Path) -> None:
        """Raise ValueError unless a checkpoint was made with the run's settings."""
        for name, value in self.settings.items():
            before = state["settings"].get(name)
            if before != value and name != "steps":
                option, before = name.replace("_", "-"), files.printable(before, 100)
                raise ValueError(f"{path} was made with --{option} {before}, not {value}: give the same")
        if state["step"] > self.settings["steps"]:
            raise ValueError(f"{path} has done {state['step']} steps already: give a larger --steps")

    def log(self, **row) -> None:
        """Add a row to log.csv, which is always the whole table."""
        self.rows.append(row)
        names = dict.fromkeys(name for row in self.rows for name in row)  # with pictures there are more
        with files.replacing(self.folder / "log.csv") as new, open(new, "w", newline="") as file:
            table = csv.DictWriter(file, list(names))
            table.writeheader()
            table.writerows(self.rows)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # TensorBoard is not installed
            return
        with SummaryWriter(self.folder / "tensorboard") as board:
            for name, value in row.items():
                if name != "step" and not math.isnan(value):
                    board.add_scalar(name, value, row["step"])

    def stage(self, step: int) -> Path:
        return self.folder / "stages" / f"{step:06d}.png"

    def save_stage(self, step: int, images: list[Image.Image]) -> None:
        """Keep the pictures of a stage as one column, for later sheets."""
        column = np.concatenate([np.asarray(image) for image in images])
        conditions.save_image(Image.fromarray(column), self.stage(step))

    def read_stage(self, step: int, shape: tuple[int, ...]) -> np.ndarray:
        """Return the column of a stage, or, with a warning, a red one if the file is not what the run wrote."""
        try:
            column = np.asarray(conditions.load_image(self.stage(step)))
            if column.shape[1:] == shape[1:]:
                return column
            reason = f"{self.stage(step)} has {column.shape[1]}x{column.shape[0]} pixels, not {shape[1]} across"
        except (OSError, ValueError) as error:
            reason = error
        warnings.warn(f"{reason}: it is red in the sheet", stacklevel=1)
        return np.full(shape, (255, 0, 0), np.uint8)

    def save_sheet(self, validation: Validation, rows: int = 6, most: int = 11) -> Path:
        """Draw sheet.png: hint, truth, then the same seeds at up to `most` stages: the first, the last, those around the
        one where it begins to follow, the others evenly chosen. The PNG holds the run's settings.
        """
        stages = [(0, None)] + [(row["step"], row["score"]) for row in self.rows if row["step"]]
        begins = next((i for i, row in enumerate(self.rows) if row["score"] >= FOLLOWS), None)
        around = [] if begins is None else list(range(max(begins - 2, 0), min(begins + 2, len(stages))))
        others = [i for i in range(len(stages)) if i not in around]
        evenly = np.linspace(0, len(others) - 1, min(most - len(around), len(others)))
        stages = [stages[i] for i in sorted(around + [others[round(k)] for k in evenly])]
        truth = np.concatenate(validation.truths)
        columns = [("hint", np.concatenate(validation.hint_pictures)), ("truth", truth)]
        for step, score in stages:
            title = f"step {step}" + ("\nno control" if score is None else f"\nscore {words(score)}")
            columns.append((title, self.read_stage(step, truth.shape)))
        height, text = min(rows, len(validation.truths)) * len(validation.truths[0]), PngInfo()
        sheet = conditions.side_by_side([(title, Image.fromarray(column[:height])) for title, column in columns])
        path = self.folder / "sheet.png"
        text.add_text("minicn", json.dumps(self.settings, default=str))
        conditions.save_image(sheet, path, pnginfo=text)
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
        with files.replacing(self.folder / "curve.png") as new:
            figure.savefig(new, dpi=110)
        pyplot.close(figure)
        return self.folder / "curve.png"

    def finish(self) -> None:
        """Draw the curve and print the outcome of the run."""
        self.save_curve()
        print(self.verdict())
        print(f"(Score: 0 is as without a hint, 1 as the true pictures through the autoencoder; from {FOLLOWS} it follows.)")
        diffusers = self.folder / "diffusers"
        more = f", and for diffusers {diffusers}" if diffusers.is_dir() else ""
        print(f"Weights: {self.folder / 'controlnet.safetensors'}{more}")
        if (self.folder / "sheet.png").is_file():
            print(f"Pictures: {self.folder / 'sheet.png'}")

    def verdict(self) -> str:
        """Say in a sentence at which step the ControlNet began to follow."""
        if not self.rows or math.isnan(self.rows[-1]["score"]):
            return "No pictures were drawn during training, so nothing can be said about following."
        for before, row in zip(self.rows, self.rows[1:], strict=False):
            if row["score"] >= FOLLOWS:
                return (
                    f"It began to follow between step {before['step']} (score {words(before['score'])}) and step "
                    f"{row['step']} (score {words(row['score'])}); the last score is {words(self.rows[-1]['score'])}."
                )
        last = self.rows[-1]
        return f"After {last['step']} steps it does not follow yet (score {words(last['score'])}): train longer."


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
