"""From toy scenes, or a data folder, to `training.Examples`: everything that the locked parts say, computed once."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minicn import toy, training
from minicn.checkpoints import files
from minicn.pipeline import StableDiffusion
from minicn.trainer import data, resuming
from minicn.trainer.recording import encode, stack
from minicn.training import Examples, Recipe

MADE_OF = "minicn.made_of"  # in a kept file's metadata: which model and data it was made of


class HintsOnDisk:
    """The hints of a data folder's pairs, read when a batch asks for them."""

    def __init__(self, pairs: list[data.Pair], size: int):
        self.pairs, self.size = pairs, size

    def __getitem__(self, samples: Tensor) -> Tensor:
        """Return the hints of some samples, as a tensor of them would."""
        return stack([data.load_pair(self.pairs[i], self.size)[0] for i in samples.tolist()])


def from_toy(sd: StableDiffusion, condition: str, count: int, recipe: Recipe) -> Examples:
    """Draw and encode the toy's first `count` training scenes, but only those that the recipe's steps are shown.

    Numerics: not only those that are left when a run is resumed: in other batches their latents would round differently.
    """
    seen = training.seen(recipe, count)
    rows = torch.full((count,), len(seen))  # what is not there is an error, not another scene
    rows[seen] = torch.arange(len(seen))
    return from_scenes(sd, toy.scenes(count, "train", condition, only=set(seen)), condition, rows)


def from_scenes(sd: StableDiffusion, scenes: Iterable[toy.Scene], condition: str, rows: Tensor | None = None) -> Examples:
    """Encode toy scenes with a model's autoencoder and text encoder; `rows` as in `Examples`."""
    kept = [(scene.image, scene.hint(condition), scene.caption) for scene in scenes]  # not the 0.3 MB of the rest
    images, hints, captions = zip(*kept, strict=True)
    return Examples(encode(sd.vae, stack(images)), stack(hints), *encode_prompts(sd, captions), rows)


def from_pairs(
    sd: StableDiffusion,
    pairs: list[data.Pair],
    size: int,
    batch_size: int = 8,
    keep: Path | None = None,
    of: dict | None = None,
) -> Examples:
    """Encode a data folder's images and prompts; the hints stay on disk.

    keep  file in which latents and text features are kept; what was made of the same is read instead of computed
    of    the digests of data and model; default: found here
    Raises FileNotFoundError or ValueError, naming the file, for a picture that is missing or does not fit, or a kept file
    that no run wrote.
    """
    hints = HintsOnDisk(pairs, size)
    if keep is not None:
        made_of = repr({**(of or {"data": data.digest(pairs), "model": resuming.digest(sd)}), "resolution": size})
        if kept := _kept(keep, made_of, len(pairs), size, sd):
            return Examples(kept["latents"], hints, kept["contexts"], kept["prompt"])
    latents = []
    for i in tqdm(range(0, len(pairs), batch_size), desc="encoding", unit="batch"):
        images = [data.load_pair(pair, size)[1] for pair in pairs[i : i + batch_size]]
        latents.append(encode(sd.vae, stack(images)))
    contexts, prompt = encode_prompts(sd, [pair.prompt for pair in pairs])
    made = {"latents": torch.cat(latents), "contexts": contexts, "prompt": prompt}
    if keep is not None:
        files.write(keep, made, {MADE_OF: made_of})
    return Examples(made["latents"], hints, contexts, prompt)


def _kept(path: Path, made_of: str, count: int, size: int, sd: StableDiffusion) -> dict[str, Tensor] | None:
    """Return what a file keeps of the same model and data; None if it keeps that of others, or is not there.

    Raises ValueError, naming it, if it is not what `from_pairs` writes.
    """
    if not os.path.lexists(path):
        return None
    file = files.open_weights(path)
    if MADE_OF not in file.metadata:
        raise ValueError(f"{path} was not written by a run: move it, or name another --output")
    if file.metadata[MADE_OF] != made_of:
        return None
    prompts = file.shapes.get("contexts", (0,))[0]
    side, text = size // 8, sd.text_encoder.cfg
    latents, contexts = (count, sd.vae.cfg.latent_channels, side, side), (prompts, 77, text.hidden_size)
    wanted = {"latents": ("float32", latents), "contexts": ("float32", contexts), "prompt": ("int64", (count,))}
    kept = {name: file.get(name) for name in wanted if wanted[name] == (file.dtypes.get(name), file.shapes.get(name))}
    whole = len(kept) == len(wanted) and 0 <= kept["prompt"].min() <= kept["prompt"].max() < prompts
    if not whole or not (files.finite(kept["latents"]) and files.finite(kept["contexts"])):
        raise ValueError(f"{path} does not hold what the run wrote: remove it, and it is made again")
    return kept


def encode_prompts(sd: StableDiffusion, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return the text features of the different prompts, the empty one first, and each caption's row of them."""
    prompts = ["", *sorted(set(captions) - {""})]
    contexts = [sd.encode_prompts(prompts[i : i + 256]).float().cpu() for i in range(0, len(prompts), 256)]
    row = {prompt: i for i, prompt in enumerate(prompts)}
    return torch.cat(contexts), torch.tensor([row[caption] for caption in captions])
