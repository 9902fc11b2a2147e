"""From toy scenes, or a data folder, to `training.Examples`: everything that the locked parts say, computed once."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minicn import toy
from minicn.checkpoints import files
from minicn.pipeline import StableDiffusion
from minicn.trainer import data
from minicn.trainer.recording import encode, stack
from minicn.training import Examples


class HintsOnDisk:
    """The hints of a data folder's pairs, read when a batch asks for them."""

    def __init__(self, pairs: list[data.Pair], size: int):
        self.pairs, self.size = pairs, size

    def __getitem__(self, samples: Tensor) -> Tensor:
        """Return the hints of some samples, as a tensor of them would."""
        return stack([data.load_pair(self.pairs[i], self.size)[0] for i in samples.tolist()])


def from_scenes(sd: StableDiffusion, scenes: Iterable[toy.Scene], condition: str) -> Examples:
    """Encode toy scenes with a model's autoencoder and text encoder."""
    kept = [(scene.image, scene.hint(condition), scene.caption) for scene in scenes]  # not the 0.3 MB of the rest
    images, hints, captions = zip(*kept, strict=True)
    return Examples(encode(sd.vae, stack(images)), stack(hints), *encode_prompts(sd, captions))


def from_pairs(
    sd: StableDiffusion, pairs: list[data.Pair], size: int, batch_size: int = 8, keep: Path | None = None
) -> Examples:
    """Encode a data folder's images and prompts; the hints stay on disk.

    keep  file in which latents and text features are kept; if it exists, they are read instead of computed
    Raises FileNotFoundError or ValueError, naming the file, for a picture that is missing or does not fit.
    """
    hints = HintsOnDisk(pairs, size)
    if keep is not None and keep.is_file():
        kept = files.read(keep)
        return Examples(kept["latents"], hints, kept["contexts"], kept["prompt"])
    latents = []
    for i in tqdm(range(0, len(pairs), batch_size), desc="encoding", unit="batch"):
        images = [data.load_pair(pair, size)[1] for pair in pairs[i : i + batch_size]]
        latents.append(encode(sd.vae, stack(images)))
    contexts, prompt = encode_prompts(sd, [pair.prompt for pair in pairs])
    made = {"latents": torch.cat(latents), "contexts": contexts, "prompt": prompt}
    if keep is not None:
        files.write(keep, made)
    return Examples(made["latents"], hints, contexts, prompt)


def encode_prompts(sd: StableDiffusion, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return the text features of the different prompts, the empty one first, and each caption's row of them."""
    prompts = ["", *sorted(set(captions) - {""})]
    contexts = [sd.encode_prompts(prompts[i : i + 256]).float().cpu() for i in range(0, len(prompts), 256)]
    row = {prompt: i for i, prompt in enumerate(prompts)}
    return torch.cat(contexts), torch.tensor([row[caption] for caption in captions])
