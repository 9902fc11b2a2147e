"""minicn: ControlNet on Stable Diffusion 1.5, from scratch, in plain PyTorch.

Public names: the models, the pipeline that joins them, and the modules `conditions`, `ddim`, `measures` and `toy`. Each is
imported when it is asked for.
"""

import importlib
from typing import TYPE_CHECKING

from minicn import threads  # noqa: F401  (before torch is loaded: it bounds how long OpenMP's threads spin)

if TYPE_CHECKING:
    from minicn import conditions, ddim, measures, toy
    from minicn.clip import TextConfig, TextEncoder
    from minicn.controlnet import ControlledBlock, ControlNet, ControlNetConfig, hint_encoder, zero_conv, zero_linear
    from minicn.pipeline import StableDiffusion
    from minicn.tokenizer import Tokenizer
    from minicn.unet import UNet, UNetConfig
    from minicn.vae import VAE, VAEConfig

__all__ = [
    "ControlNet",
    "ControlNetConfig",
    "ControlledBlock",
    "StableDiffusion",
    "TextConfig",
    "TextEncoder",
    "Tokenizer",
    "UNet",
    "UNetConfig",
    "VAE",
    "VAEConfig",
    "conditions",
    "ddim",
    "measures",
    "toy",
    "hint_encoder",
    "zero_conv",
    "zero_linear",
]
__version__ = "0.1.0"

NAMES = {  # module: the public names in it
    "clip": "TextConfig TextEncoder",
    "controlnet": "ControlNet ControlNetConfig ControlledBlock hint_encoder zero_conv zero_linear",
    "pipeline": "StableDiffusion",
    "tokenizer": "Tokenizer",
    "unet": "UNet UNetConfig",
    "vae": "VAE VAEConfig",
}
# Compat: where modules were before they had subpackages; `from minicn import hub` still works.
MOVED = {
    "annotators": "conditions.networks",
    "captioning": "toy.captioning",
    "cli": "commands.cli",
    "conditioning": "conditions.making",
    "converting": "checkpoints.converting",
    "data": "trainer.data",
    "device_check": "commands.check_device",
    "drawing": "conditions.drawing",
    "files": "checkpoints.files",
    "hub": "checkpoints.hub",
    "judging": "toy.judging",
    "ledger": "trainer.memory",
    "palettes": "conditions.palettes",
    "pretraining": "trainer.pretraining",
    "recording": "trainer.recording",
    "sharding": "trainer.distributed",
    "weights": "checkpoints.weights",
}


def __getattr__(name: str):
    """Return a public name, or a module: `minicn.UNet`, `minicn.toy`."""
    for module, names in NAMES.items():
        if name in names.split():
            return getattr(importlib.import_module(f"minicn.{module}"), name)
    if name.startswith("__"):
        raise AttributeError(name)
    try:
        return importlib.import_module(f"minicn.{MOVED.get(name, name)}")
    except ModuleNotFoundError as error:
        if error.name != f"minicn.{name}":  # a package that is missing
            raise
        raise AttributeError(f"module 'minicn' has no attribute {name!r}") from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
