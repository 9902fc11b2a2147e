"""A training under way, for a loop that says only what a step computes: where it stands, when to look, when to save.

with Progress(run, sd, net, optimizer, recipe, validation) as progress:
    for step in progress.steps():
        ...                         # a batch, its loss, the gradients
        progress.note(loss, batch.samples.tolist())
        ...                         # the optimiser's step
        if progress.looking: progress.validate()
        if progress.saving: progress.save()
    progress.finish()
"""

import contextlib
import math
import statistics
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minicn.checkpoints import models
from minicn.controlnet import ControlNet
from minicn.pipeline import StableDiffusion
from minicn.trainer import resuming
from minicn.trainer.distributed import Joint, OneProcess
from minicn.trainer.recording import Run, StopRequest, Validation, zero_norms
from minicn.training import Recipe

READ_EVERY = defaultdict(lambda: 20, cpu=1)  # steps between readings of the loss, by the kind of device


class Progress:
    """Counts the steps of a run, validates, saves, and resumes from a checkpoint. Inside `with`, Ctrl-C lets a step finish.

    score_every       steps between pictures drawn and scored
    score_after       steps after which they are, too
    checkpoint_every  steps between checkpoints
    spread            how the run is spread over processes, all of which call every method; the first draws and writes
    scaler            of float16's gradients
    """

    def __init__(
        self,
        run: Run,
        sd: StableDiffusion,
        net: ControlNet,
        optimizer: torch.optim.Optimizer,
        recipe: Recipe,
        validation: Validation | None,
        *,
        score_every: int = 250,
        score_after: Sequence[int] = (),
        checkpoint_every: int = 1000,
        spread: OneProcess | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ):
        self.run, self.sd, self.net, self.optimizer, self.recipe = run, sd, net, optimizer, recipe
        self.validation, self.score_every, self.score_after = validation, score_every, score_after
        self.checkpoint_every, self.device = checkpoint_every, sd.device
        self.spread = spread or OneProcess(Joint(sd.unet, net))
        self.first = self.spread.rank == 0
        self.parts = {"net": net, "scaler": scaler or torch.amp.GradScaler(sd.device.type, enabled=False)}
        if recipe.unlock != "none":
            self.parts["unet"] = sd.unet
        self.step, self.looking, self.saving, self.stopping = 0, False, False, False
        self.unread: list[tuple[int, list[int], Tensor]] = []  # step, samples and loss, not yet read from the device
        self.opened = contextlib.ExitStack()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.opened.close()
        self.run.release()

    def resume(self) -> None:
        """Go on from the run's newest checkpoint, if there is one. Warns if the number of threads has changed since."""
        if not resuming.resumable(self.run.folder):
            return
        state = self.run.load(self.check)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.spread.scatter()
        self.spread.load_optimizer(self.optimizer, state["optimizer"])
        self.step = state["step"]
        before, now = state.get("threads"), torch.get_num_threads()
        if before not in (None, now):
            warnings.warn(
                f"the run so far computed with {before} threads, and continues with {now}: results may differ by rounding; "
                f"--threads {before} continues as before",
                stacklevel=1,  # of the package: others' warnings are not shown
            )

    def check(self, state: dict, path: Path) -> None:
        """Raise ValueError, naming the place, unless a checkpoint is one of this run's models and optimiser."""
        found = state.get("takes")
        for name, value in self.takes().items() if isinstance(found, dict) else ():
            if found.get(name) is not value:
                raise ValueError(f"{path} is of a ControlNet whose {name} is not {value}: give the same --controlnet")
        for name, part in self.parts.items():
            resuming.compare(state.get(name), part.state_dict(), path, name)
        self.spread.check_optimizer(self.optimizer, state.get("optimizer"), path)

    def takes(self) -> dict[str, bool]:
        """Return how the ControlNet takes its hint, as far as its weights do not show it."""
        return {name: getattr(self.net.cfg, name) for name in ("global_pool", "bgr")}

    def steps(self) -> Iterator[int]:
        """Yield each remaining step, from 1; before the first, validate the ControlNet as it starts."""
        for part in (self.sd.vae, self.sd.text_encoder):  # the examples hold their results
            part.to("cpu")
        self.earlier, self.score = self.run.rows[-1]["seconds"] if self.run.rows else 0.0, "-"
        if not self.step:
            self.validate()
        done, last = self.step, self.recipe.steps
        bar = {"desc": "training", "unit": "step", "smoothing": 0.05, "disable": not self.first}
        with self.opened:  # closed by __exit__ if a step fails
            self.bar = self.opened.enter_context(tqdm(range(done + 1, last + 1), initial=done, total=last, **bar))
            self.stop = self.opened.enter_context(StopRequest())
            for step in self.bar:
                self.step = step
                self.looking = step % self.score_every == 0 or step in self.score_after or step == last
                self.saving = step % self.checkpoint_every == 0 or step == last
                yield step
                if self.stopping:
                    return

    def note(self, loss: Tensor, samples: list[int]) -> None:
        """Keep the loss of the step, and read those so far if it is time. Raises ValueError if one is not finite.

        Reading a number makes a GPU wait for it and its queue run empty, so there losses are read in batches.
        """
        self.unread.append((self.step, samples, loss.detach()))
        due = self.step % READ_EVERY[self.device.type] == 0
        if due or self.looking or self.saving or (self.stop.asked and self.spread.world == 1):
            self.read()
        if self.step % 20 == 0:
            self.bar.set_postfix(loss=f"{statistics.fmean(self.run.losses):.4f}", score=self.score, refresh=False)

    def read(self) -> None:
        """Read the losses of the steps since the last time, and whether to stop."""
        values, self.stopping = self.spread.total(torch.stack([loss for _, _, loss in self.unread]), self.stop.asked)
        for (step, samples, _), value in zip(self.unread, values, strict=True):
            if not math.isfinite(value):
                kept = self.run.checkpoint
                kept = f"the last good checkpoint is {kept}" if kept.is_file() else "there is no checkpoint yet"
                raise ValueError(
                    f"the loss is {value} at step {step} (samples {', '.join(map(str, samples))}): lower --lr or compute in "
                    f"float32; {kept}"
                )
            self.run.losses.append(value)
        self.unread.clear()
        self.saving = self.saving or self.stopping

    def validate(self) -> None:
        """Draw and score the held-out pictures, and log a row: score, loss since the last row, zero convolutions."""
        self.spread.gather()
        if not self.first:
            return
        loss = statistics.fmean(self.run.losses or [math.nan])
        self.run.losses.clear()
        score, more = math.nan, {}
        seconds = self.earlier + self.bar.format_dict["elapsed"] if self.step else 0.0  # without this row's pictures
        if self.validation is not None:
            with self.models_on_device():
                images = self.validation.draw(self.net.eval())
                score, more = self.validation.score(images), self.validation.losses(self.net)
                self.net.train()
                self.run.save_stage(self.step, images)
        more = {name: float(f"{value:.5g}") for name, value in {**more, **zero_norms(self.net)}.items()}
        self.run.log(step=self.step, loss=round(loss, 5), score=round(score, 4), seconds=round(seconds, 1), **more)
        if self.validation is not None:
            self.run.save_sheet(self.validation)
        self.score = f"{score:.2f}"

    @contextlib.contextmanager
    def models_on_device(self) -> Iterator[None]:
        """Inside `with`, all that draws is on the device; then what training does not need leaves it again."""
        parts = [self.sd.vae, self.sd.text_encoder]
        if self.spread.learner is not self.spread.joint:
            parts.append(self.spread.joint)
        for part in parts:
            part.to(self.device)
        yield
        for part in parts:
            part.to("cpu")

    def save(self) -> None:
        """Write the checkpoint: weights, moments, log, and where the run stands."""
        self.spread.gather()
        moments = self.spread.optimizer_state(self.optimizer)
        if self.first:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            more = {"optimizer": moments, "threads": torch.get_num_threads(), "takes": self.takes()}
            self.run.save(self.step, state | more)

    def finish(self) -> None:
        """Write the weights in both layouts, and print the outcome of the run.

        Raises KeyboardInterrupt if it was asked to stop before its last step.
        """
        self.sd.to(self.device)
        if self.first:
            self.net.save(self.run.folder / "controlnet.safetensors")
            if self.net.cfg.paper_hint_encoder:
                warnings.warn("diffusers does not have the paper's hint encoder: no folder for it is written", stacklevel=1)
            else:
                self.net.save(self.run.folder / "diffusers", layout="diffusers")
            if self.recipe.unlock != "none":
                whole = {
                    "unet": self.sd.unet,
                    "vae": self.sd.vae,
                    "text_encoder": self.sd.text_encoder,
                    "controlnet": self.net,
                }
                models.save_file(whole, self.run.folder / "model.safetensors", defaults=self.sd.defaults)
            if not self.stopping:
                self.run.finish()
        if self.stopping:
            raise KeyboardInterrupt(f"after step {self.step} of {self.recipe.steps}")
