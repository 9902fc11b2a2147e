"""minicn: ControlNet on Stable Diffusion 1.5, from scratch, in plain PyTorch.

Public names: the models, the pipeline that joins them, and the modules `conditions`, `ddim`, `measures` and `toy`.
"""

import importlib
import sys

from minicn import threads  # noqa: F401  (before torch is loaded: it bounds how long OpenMP's threads spin)

# isort: split
from minicn import conditions, ddim, toy
from minicn.clip import TextConfig, TextEncoder
from minicn.controlnet import ControlledBlock, ControlNet, ControlNetConfig, hint_encoder, zero_conv, zero_linear
from minicn.pipeline import StableDiffusion
from minicn.tokenizer import Tokenizer
from minicn.toy import measures
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
sys.modules["minicn.measures"] = measures


def __getattr__(name: str):
    if name in MOVED:
        return importlib.import_module(f"minicn.{MOVED[name]}")
    raise AttributeError(f"module 'minicn' has no attribute {name!r}")
