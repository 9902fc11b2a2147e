"""Training a ControlNet on a locked Stable Diffusion: the data in memory, the loss, the regimes, the loop.

Source: Zhang and Agrawala, arXiv:2302.05543v1, eq. (10) and section "Training"; 50% of the prompts are dropped. Used by
train_toy.py and `minicn train`. What a run leaves on disk is in recording.py.
"""

import contextlib
import dataclasses
import functools
import math
import os
import statistics
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from minicn import ddim, fast, toy
from minicn.checkpoints import files, weights
from minicn.controlnet import ControlNet
from minicn.pipeline import StableDiffusion
from minicn.trainer import data
from minicn.trainer.recording import Run, StopRequest, Validation, encode, stack, zero_norms
from minicn.unet import UNet

READ_EVERY = defaultdict(lambda: 20, cpu=1)  # steps between readings of the loss, by the kind of device
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults of the regime are the paper's: all 13 connections, the whole Stable Diffusion locked."""

    steps: int
    batch_size: int = 4  # of a step, over all processes and parts of an accumulation
    lr: float = 1e-5
    seed: int = 0  # of data order, noise, timesteps and dropped prompts
    drop_prompt: float = 0.5  # share of prompts replaced by the empty one
    connect: str = "all"  # "middle": the small-scale regime, only the middle block's residual
    unlock: str = "none"  # "decoder" (as the official code) or "all" (as the paper says): Stable Diffusion learns, too
    unlock_lr: float = 2e-6  # of what is unlocked
    accumulate: int = 1  # parts into which a process cuts its share of the batch, one after the other
    precision: str = "float32"  # of the computation; weights and optimiser stay in float32
    gradient_checkpointing: bool = False  # compute features again going backwards, instead of keeping them
    lr_decay: float = 0.3  # share of the steps, at the end, over which the learning rate falls to 0


@dataclass
class Batch:
    """Some samples of a step, as the paper's eq. (10) names them: z_0, epsilon, c_f (before E), t, c_t."""

    samples: Tensor  # (B,) places in the data
    latents: Tensor  # (B, 4, h, w)
    noise: Tensor  # (B, 4, h, w)
    hints: Tensor  # (B, 3, H, W) in [0, 1]
    timesteps: Tensor  # (B,)
    context: Tensor  # (B, 77, C)


class Examples:
    """What the ControlNet learns from, encoded once, so that autoencoder and text encoder are not needed again.

    latents   (N, 4, h, w)   scaled, clean
    hints     (N, 3, H, W)   uint8, [0, 255] stands for [0, 1]; or the N pairs on disk, read when needed
    contexts  (M, 77, C)     text features of the M different prompts; row 0 is the empty prompt
    prompt    (N,)           each example's row of `contexts`
    """

    def __init__(self, latents: Tensor, hints: Tensor | list[data.Pair], contexts: Tensor, prompt: Tensor):
        self.latents, self.hints, self.contexts, self.prompt = latents, hints, contexts, prompt

    @classmethod
    def from_scenes(cls, sd: StableDiffusion, scenes: Iterable[toy.Scene], condition: str) -> "Examples":
        """Encode toy scenes with a model's autoencoder and text encoder."""
        kept = [(scene.image, scene.hint(condition), scene.caption) for scene in scenes]  # not the 0.3 MB of the rest
        images, hints, captions = zip(*kept, strict=True)
        return cls(encode(sd.vae, stack(images)), stack(hints), *encode_prompts(sd, captions))

    @classmethod
    def from_pairs(
        cls, sd: StableDiffusion, pairs: list[data.Pair], size: int, batch_size: int = 8, keep: Path | None = None
    ) -> "Examples":
        """Encode a data folder's images and prompts; the hints stay on disk.

        keep  file in which latents and text features are kept; if it is there, they are read instead of made
        Raises FileNotFoundError or ValueError, naming the file, for a picture that is missing or does not fit.
        """
        if keep is not None and keep.is_file():
            kept = files.read(keep)
            return cls(kept["latents"], pairs, kept["contexts"], kept["prompt"])
        latents = []
        for i in tqdm(range(0, len(pairs), batch_size), desc="encoding", unit="batch"):
            images = [data.load_pair(pair, size)[1] for pair in pairs[i : i + batch_size]]
            latents.append(encode(sd.vae, stack(images)))
        contexts, prompt = encode_prompts(sd, [pair.prompt for pair in pairs])
        made = {"latents": torch.cat(latents), "contexts": contexts, "prompt": prompt}
        if keep is not None:
            files.write(keep, made)
        return cls(made["latents"], pairs, contexts, prompt)

    def hints_of(self, samples: Tensor) -> Tensor:
        """Return the hints (B, 3, H, W) uint8 of some samples."""
        if isinstance(self.hints, Tensor):
            return self.hints[samples]
        size = 8 * self.latents.shape[-1]
        return stack([data.load_pair(self.hints[i], size)[0] for i in samples.tolist()])

    def batch(
        self,
        seed: int,
        step: int,
        size: int,
        drop_prompt: float,
        device: str | torch.device,
        part: slice = slice(None),
    ) -> Batch:
        """Draw the batch of a step, or a part of it: sample i of step s is a function of (seed, s, i) alone.

        So a run can be resumed anywhere, and several processes, or parts of an accumulation, make one batch.
        """
        random = torch.Generator().manual_seed(seed * 1_000_003 + step)
        samples = torch.randint(len(self.latents), (size,), generator=random)
        dropped = torch.rand(size, generator=random) < drop_prompt
        timesteps = torch.randint(ddim.NUM_TRAIN_TIMESTEPS, (size,), generator=random)
        noise = torch.randn((size, *self.latents.shape[1:]), generator=random)
        samples, prompts = samples[part], torch.where(dropped, 0, self.prompt[samples])[part]
        hints = send(self.hints_of(samples), device).float().div(255)
        return Batch(
            samples,
            send(self.latents[samples], device),
            send(noise[part], device),
            hints.contiguous(memory_format=fast.layout(device)),
            send(timesteps[part], device),
            send(self.contexts[prompts], device),
        )


def send(tensor: Tensor, device: str | torch.device) -> Tensor:
    """Copy a tensor from the CPU to a device, by a way on which CUDA does not wait for the steps before.

    Numerics: on MPS such a copy may read memory that is free again, and give other numbers (pytorch issue 189690).
    """
    cuda = torch.device(device).type == "cuda"
    return tensor.pin_memory().to(device, non_blocking=True) if cuda else tensor.to(device)


def encode_prompts(sd: StableDiffusion, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return the text features of the different prompts, the empty one first, and each caption's row of them."""
    prompts = ["", *sorted(set(captions) - {""})]
    contexts = [sd.encode_prompts(prompts[i : i + 256]).float().cpu() for i in range(0, len(prompts), 256)]
    row = {prompt: i for i, prompt in enumerate(prompts)}
    return torch.cat(contexts), torch.tensor([row[caption] for caption in captions])


def controlnet_loss(unet: UNet, net: ControlNet, batch: Batch, alphas_cumprod: Tensor) -> Tensor:
    """Return each sample's mean squared error of the predicted noise, (B,); its mean is eq. (10).

    With every parameter of `unet` locked, autograd builds no graph for its encoder, whose inputs ask for none; the
    decoder passes gradients on to `net` and keeps none.
    """
    x_t = ddim.add_noise(batch.latents, batch.noise, alphas_cumprod[batch.timesteps])
    x_t = x_t.contiguous(memory_format=fast.layout(x_t.device))
    control = net(x_t, batch.hints, batch.timesteps, batch.context)
    eps = unet(x_t, batch.timesteps, batch.context, control)
    return (eps.float() - batch.noise).square().mean((1, 2, 3))


def learning_rate_factor(step: int, steps: int, decay: float = 0.3) -> float:
    """Return 1, but over the last share `decay` of the steps fall to 0, which sharpens the pictures; steps from 1."""
    return min(1.0, (steps - step + 1) / (decay * steps)) if decay else 1.0


class Joint(nn.Module):
    """U-Net and ControlNet as one module: a batch in, its errors out."""

    def __init__(self, unet: UNet, net: ControlNet):
        super().__init__()
        self.unet, self.net = unet, net

    def forward(self, batch: Batch, alphas_cumprod: Tensor) -> Tensor:
        return controlnet_loss(self.unet, self.net, batch, alphas_cumprod)


def lock(unet: UNet, net: ControlNet, recipe: Recipe) -> list[dict]:
    """Lock and unlock parameters as a recipe says; return what the optimiser gets, with its learning rates.

    Small-scale regime: only the middle block's residual is connected; the twelve other zero convolutions are not even
    computed. Large-scale: the decoder, or all, of Stable Diffusion learns with a rate of its own.
    Paper vs code: the paper unlocks "all weights in Stable Diffusion", the official code its decoder alone.
    """
    net.requires_grad_(True)
    net.only_middle = recipe.connect == "middle"
    if net.only_middle:
        net.zero_convs.requires_grad_(False)
    unet.requires_grad_(recipe.unlock == "all")
    if recipe.unlock == "decoder":
        unet.output_blocks.requires_grad_(True)
        unet.out.requires_grad_(True)
    groups = [{"params": [p for p in net.parameters() if p.requires_grad], "lr": recipe.lr}]
    unlocked = [p for p in unet.parameters() if p.requires_grad]
    return groups + ([{"params": unlocked, "lr": recipe.unlock_lr}] if unlocked else [])


def autocast(device: torch.device, recipe: Recipe) -> torch.autocast:
    """Return what computes in a recipe's precision, inside `with`; the weights stay in float32."""
    return torch.autocast(device.type, PRECISIONS[recipe.precision], enabled=recipe.precision != "float32")


def fused(device: torch.device, recipe: Recipe) -> bool:
    """Tell whether AdamW may take its step in one kernel there.

    Numerics: MPS's ignored the scale of float16's gradients, and infinite ones, until June 2026 (pytorch pull 186360).
    """
    return device.type in ("cpu", "cuda", "mps") and not (device.type == "mps" and recipe.precision == "float16")


def process() -> tuple[int, int]:
    """Return this process's number and how many there are: (0, 1) unless torchrun started several."""
    if "RANK" in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # what "cuda" means from now on
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=3))
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """Inside `with`, the first process goes ahead; the others follow when it is through."""
    rank, world = process()
    if rank:
        dist.barrier()
    yield
    if world > 1 and not rank:
        dist.barrier()


def train(
    sd: StableDiffusion,
    net: ControlNet,
    examples: Examples,
    validation: Validation | None,
    run: Run,
    recipe: Recipe,
    *,
    score_every: int = 250,
    score_after: Sequence[int] = (),
    checkpoint_every: int = 1000,
    resume: bool = False,
    pace: contextlib.AbstractContextManager | None = None,
) -> None:
    """Train a ControlNet by a recipe; leave log, sheets, checkpoints and weights (both layouts) in the run's folder.

    score_every       steps between pictures drawn and scored
    score_after       steps after which they are, too
    checkpoint_every  steps between checkpoints
    pace              entered for each step, e.g. threads.Pace
    Under torchrun every process takes its share of each batch (DDP; with unlock "all", of the model, too: FSDP2); the first
    one draws, logs and saves.
    Ctrl-C or SIGTERM lets the step end, saves checkpoint and weights, then raises KeyboardInterrupt. Raises ValueError,
    naming step and samples, if the loss is no number any more.
    """
    try:
        pace = pace or contextlib.nullcontext()
        _train(sd, net, examples, validation, run, recipe, score_every, score_after, checkpoint_every, resume, pace)
    finally:
        run.release()


def _train(sd, net, examples, validation, run, recipe, score_every, score_after, checkpoint_every, resume, pace) -> None:
    device, (rank, world) = sd.device, process()
    if recipe.batch_size % (world * recipe.accumulate):
        raise ValueError(
            f"a batch of {recipe.batch_size} cannot be shared by {world} processes in {recipe.accumulate} parts each: "
            "make it a multiple"
        )
    if world > 1 and device.type not in ("cpu", "cuda"):
        raise ValueError(f"{world} processes cannot share a training on {device.type}: use --device cpu, or one process")
    sd.prepare()
    fast.prepare(net.train())
    groups = lock(sd.unet, net, recipe)
    for module in (sd.unet, net):
        fast.recompute(module, recipe.gradient_checkpointing)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16")
    parts = {"net": net, "scaler": scaler} | ({} if recipe.unlock == "none" else {"unet": sd.unet})
    state = run.load() if resume else {"step": 0}
    done = state["step"]
    if resume:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        before, now = state.get("threads"), torch.get_num_threads()
        if before not in (None, now):
            warnings.warn(
                f"the run so far computed with {before} threads, and goes on with {now}: results may differ by rounding; "
                f"--threads {before} goes on as before",
                stacklevel=3,
            )
    joint = Joint(sd.unet, net)
    model, sharded = joint, world > 1 and recipe.unlock == "all"
    if sharded:
        from minicn.trainer import distributed

        model = distributed.shard(joint)
        groups, synchronise = lock(model.unet, model.net, recipe), model.set_requires_gradient_sync
    elif world > 1:
        model = nn.parallel.DistributedDataParallel(joint)
        synchronise = functools.partial(setattr, model, "require_backward_grad_sync")
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=fused(device, recipe))
    if resume and sharded:
        distributed.load_optimizer(model, optimizer, state["optimizer"])
    elif resume:
        if any(isinstance(key, str) for key in state["optimizer"]["state"]):
            raise ValueError("the checkpoint was made with --unlock all by several processes: resume it so")
        optimizer.load_state_dict(state["optimizer"])
    abar, rates = sd.alphas_cumprod.to(device), [group["lr"] for group in groups]
    del state, groups
    share = recipe.batch_size // (world * recipe.accumulate)

    def look(step: int, seconds: float) -> float:
        loss = statistics.fmean(run.losses or [math.nan])
        run.losses.clear()
        score, more = math.nan, {}
        if validation is not None:
            seen = (sd.vae, sd.text_encoder, *([joint] if sharded else []))
            for part in seen:
                part.to(device)
            images = validation.draw(net.eval())
            score, more = validation.score(images), validation.losses(net)
            net.train()
            run.save_stage(step, images)
            for part in seen:
                part.to("cpu")
        more = {name: float(f"{value:.5g}") for name, value in {**more, **zero_norms(net)}.items()}
        run.log(step=step, loss=round(loss, 5), score=round(score, 4), seconds=round(seconds, 1), **more)
        if validation is not None:
            run.save_sheet(validation)
        return score

    for part in (sd.vae, sd.text_encoder):  # what they had to say lies in `examples`
        part.to("cpu")
    if not done and rank == 0:
        look(0, 0.0)
    bar = tqdm(
        range(done + 1, recipe.steps + 1),
        initial=done,
        total=recipe.steps,
        desc="training",
        unit="step",
        smoothing=0.05,
        disable=rank > 0,
    )
    shown = {"loss": "-", "score": "-"}
    earlier = run.rows[-1]["seconds"] if run.rows else 0.0
    stopping, unread = False, []

    def read() -> bool:
        """Read the losses of the steps since the last time; tell whether to stop. All processes call it."""
        values, asked = torch.stack([error for _, _, error in unread]), stop.asked
        if world > 1:
            both = torch.cat([values.double(), values.new_tensor([asked], dtype=torch.float64)])
            dist.all_reduce(both)
            values, asked = both[:-1], both[-1].item() > 0
        for (at, samples, _), value in zip(unread, values.tolist(), strict=True):
            if not math.isfinite(value):
                kept = f"the last good checkpoint is {run.checkpoint}" if run.checkpoint.is_file() else "no checkpoint yet"
                raise ValueError(
                    f"the loss is {value} at step {at} (samples {', '.join(map(str, samples))}): lower --lr or compute in "
                    f"float32; {kept}"
                )
            run.losses.append(value)
        unread.clear()
        return asked

    with StopRequest() as stop:
        for step in bar:
            error, samples = torch.zeros((), device=device), []
            with pace:
                for i in range(recipe.accumulate):
                    begin = (rank * recipe.accumulate + i) * share
                    part = slice(begin, begin + share)
                    batch = examples.batch(recipe.seed, step, recipe.batch_size, recipe.drop_prompt, device, part)
                    samples += batch.samples.tolist()
                    if world > 1:  # the processes' gradients meet at the last part
                        synchronise(i == recipe.accumulate - 1)
                    with autocast(device, recipe):
                        loss = model(batch, abar).sum() / recipe.batch_size
                    scaler.scale(loss * world).backward()  # both engines take the mean over the processes
                    error += loss.detach()
            unread.append((step, samples, error))
            looking = step % score_every == 0 or step in score_after or step == recipe.steps
            saving = step % checkpoint_every == 0 or step == recipe.steps
            # A graphics card would wait for each number that is read: its queue of work would run empty.
            if step % READ_EVERY[device.type] == 0 or looking or saving or (stop.asked and world == 1):
                stopping = read()
                saving = saving or stopping
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * learning_rate_factor(step, recipe.steps, recipe.lr_decay)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if step % 20 == 0:
                bar.set_postfix(shown | {"loss": f"{statistics.fmean(run.losses):.4f}"}, refresh=False)
            if sharded and (looking or saving):
                distributed.gather(model, joint)
            if rank == 0 and looking:
                shown["score"] = f"{look(step, earlier + bar.format_dict['elapsed']):.2f}"
            if saving:
                moments = distributed.optimizer_state(model, optimizer) if sharded else optimizer.state_dict()
                if rank == 0:
                    state = {name: part.state_dict() for name, part in parts.items()}
                    run.save(step, state | {"optimizer": moments, "threads": torch.get_num_threads()})
            if stopping:
                break
    bar.close()
    sd.to(device)
    if rank == 0:
        net.save(run.folder / "controlnet.safetensors")
        net.save(run.folder / "diffusers", layout="diffusers")
        if recipe.unlock != "none":
            save_whole_model(sd, net, run.folder / "model.safetensors")
        if not stopping:
            run.finish()
    if stopping:
        raise KeyboardInterrupt(f"after step {step} of {recipe.steps}")


def save_whole_model(sd: StableDiffusion, net: ControlNet, path) -> None:
    """Write Stable Diffusion and ControlNet as one file, in the layout of the official v1.0 files."""
    models = {"unet": sd.unet, "vae": sd.vae, "text_encoder": sd.text_encoder, "controlnet": net}
    state = {weights.PREFIXES[kind] + key: t for kind, model in models.items() for key, t in model.state_dict().items()}
    configs = {kind: dataclasses.asdict(model.cfg) for kind, model in models.items()}
    configs["controlnet"] = configs["controlnet"]["unet"]
    files.write(path, state, {"minicn": weights.metadata(configs)})
