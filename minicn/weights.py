"""Files <-> modules: the published layouts of weights and configurations, read and written.

Two layouts: "ldm" (CompVis, the official ControlNet, and our modules' own names) and "diffusers" (Hugging Face). They
differ by names alone, but for the autoencoder's attention, whose 1x1 convolutions are linear layers in diffusers.
Nothing here imports a model class: a model gives its keys and shapes, a file its tensors.
"""

import json
import os
import re
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

State = dict[str, Tensor]

# ldm -> diffusers, applied in order to the front of a key; {i} {j} are filled from the block number
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "middle_block_out.0": "controlnet_mid_block",
    "input_hint_block.0": "controlnet_cond_embedding.conv_in",
    "input_hint_block.14": "controlnet_cond_embedding.conv_out",
}
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def unet_to_diffusers(key: str) -> str:
    """Rename a key of the U-Net or the ControlNet from ldm to diffusers."""
    for old, new in TOP.items():
        if key.startswith(old + "."):
            return new + _resnet(key.removeprefix(old))
    part, *rest = key.split(".")
    if part == "input_hint_block":
        return f"controlnet_cond_embedding.blocks.{int(rest[0]) // 2 - 1}.{rest[1]}"
    if part == "zero_convs":
        return f"controlnet_down_blocks.{rest[0]}.{rest[2]}"
    i, layer, tail = int(rest[0]), int(rest[1]), "." + ".".join(rest[2:])
    if part == "input_blocks":
        level, j = (i - 1) // 3, (i - 1) % 3
        if tail.startswith(".op."):
            return f"down_blocks.{level}.downsamplers.0.conv{tail.removeprefix('.op')}"
        return f"down_blocks.{level}.{'attentions' if layer else 'resnets'}.{j}{_resnet(tail)}"
    level, j = i // 3, i % 3
    if tail.startswith(".conv."):
        return f"up_blocks.{level}.upsamplers.0{tail}"
    return f"up_blocks.{level}.{'attentions' if layer else 'resnets'}.{j}{_resnet(tail)}"


def _resnet(tail: str) -> str:
    for old, new in RESNET.items():
        if tail.startswith(f".{old}."):
            return f".{new}{tail.removeprefix('.' + old)}"
    return tail


def vae_to_diffusers(key: str) -> str:
    """Rename a key of the autoencoder (of four levels) from ldm to diffusers."""
    key = key.replace("norm_out", "conv_norm_out").replace("nin_shortcut", "conv_shortcut")
    key = re.sub(r"\.down\.(\d)\.block\.", r".down_blocks.\1.resnets.", key)
    key = re.sub(r"\.down\.(\d)\.downsample\.", r".down_blocks.\1.downsamplers.0.", key)
    key = re.sub(r"\.up\.(\d)\.block\.", lambda m: f".up_blocks.{3 - int(m[1])}.resnets.", key)
    key = re.sub(r"\.up\.(\d)\.upsample\.", lambda m: f".up_blocks.{3 - int(m[1])}.upsamplers.0.", key)
    key = re.sub(r"\.mid\.block_(\d)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", key)
    return re.sub(r"\.mid\.attn_1\.(\w+)\.", lambda m: f".mid_block.attentions.0.{VAE_ATTENTION[m[1]]}.", key)


TO_DIFFUSERS = {
    "unet": unet_to_diffusers,
    "controlnet": unet_to_diffusers,
    "vae": vae_to_diffusers,
    "text_encoder": lambda key: key,  # transformers' names are the published ones
}


def to_diffusers(kind: str, state: State) -> State:
    """Rename a model's own state into the diffusers layout. `kind` is a key of TO_DIFFUSERS."""
    renamed = {}
    for key, tensor in state.items():
        new = TO_DIFFUSERS[kind](key)
        linear = kind == "vae" and ".attentions." in new and tensor.ndim == 4
        renamed[new] = tensor[:, :, 0, 0] if linear else tensor
    return renamed


def from_diffusers(kind: str, state: State, like: State) -> State:
    """Rename a diffusers state into the names of a model whose own state is `like` (it may live on "meta")."""
    names = {TO_DIFFUSERS[kind](key): key for key in like}
    renamed = {}
    for key, tensor in state.items():
        own = names.get(key, key)
        if own in like and tensor.ndim == 2 and like[own].ndim == 4:
            tensor = tensor[:, :, None, None]
        renamed[own] = tensor
    return renamed


# Files


def read(path: str | Path) -> tuple[State, dict[str, str]]:
    """Read a .safetensors file: its tensors and its metadata.

    Raises FileNotFoundError or ValueError, naming the file, if it is missing or not whole.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: name a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no whole .safetensors file ({error}): fetch it again") from error


def write(path: str | Path, state: State, metadata: dict[str, str] | None = None) -> None:
    """Write a .safetensors file under a temporary name, then rename it: a file of this name is always whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    temporary.touch()
    mode = temporary.stat().st_mode  # what the user's umask gives; safetensors makes its files private
    safetensors.torch.save_file(state, temporary, {"format": "pt", **(metadata or {})})
    temporary.chmod(mode)
    os.replace(temporary, path)


def load_into(model: torch.nn.Module, state: State, source: str | Path, dtype: torch.dtype) -> None:
    """Give a model built on "meta" its tensors, without a copy in between.

    Raises ValueError, naming file and tensor, for a missing, unknown or misshapen tensor.
    """
    own = model.state_dict()
    missing, unknown = [k for k in own if k not in state], [k for k in state if k not in own]
    if missing or unknown:
        raise ValueError(
            f"{source} does not fit: {len(missing)} tensors are missing ({', '.join(missing[:3]) or '-'}), "
            f"{len(unknown)} are unknown ({', '.join(unknown[:3]) or '-'})"
        )
    for key, tensor in state.items():
        if tensor.shape != own[key].shape:
            raise ValueError(f"{source}: {key} has shape {tuple(tensor.shape)}, but needs {tuple(own[key].shape)}")
    model.load_state_dict({key: tensor.to(dtype) for key, tensor in state.items()}, assign=True)


def read_json(path: str | Path) -> dict:
    """Read a configuration file. Raises FileNotFoundError or ValueError naming it."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: a diffusers folder holds it")
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def write_json(path: str | Path, config: dict) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


# Configurations: the fields of our config classes, from and to diffusers' config.json

UNET_FIELDS = {  # ours: diffusers'
    "in_channels": "in_channels",
    "num_res_blocks": "layers_per_block",
    "num_heads": "attention_head_dim",  # Compat: diffusers means the number of heads by this name
    "context_dim": "cross_attention_dim",
    "norm_num_groups": "norm_num_groups",
}
VAE_FIELDS = {
    "channels": "block_out_channels",
    "layers_per_block": "layers_per_block",
    "latent_channels": "latent_channels",
    "norm_num_groups": "norm_num_groups",
    "scaling_factor": "scaling_factor",
}
TEXT_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_positions": "max_position_embeddings",
}
DEFAULTS = {  # of fields that a config.json may leave out
    "in_channels": 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "attention_head_dim": 8,
    "max_position_embeddings": 77,
}


def fields_from_config(fields: dict[str, str], config: dict, source: str | Path) -> dict:
    """Return our fields from a diffusers configuration. Raises ValueError naming a field that is missing."""
    found = {}
    for ours, theirs in fields.items():
        value = config.get(theirs)
        if value is None:
            value = DEFAULTS.get(theirs)
        if value is None:
            raise ValueError(f"{source} has no {theirs}: this is not a configuration of Stable Diffusion 1.5's kind")
        found[ours] = tuple(value) if isinstance(value, list) else value
    return found


def unet_fields(config: dict, source: str | Path) -> dict:
    """Return the fields of UNetConfig from a diffusers configuration of a U-Net or a ControlNet."""
    found = fields_from_config(UNET_FIELDS, config, source)
    widths = config.get("block_out_channels")
    if not widths or any(width % widths[0] for width in widths):
        raise ValueError(f"{source} has block_out_channels {widths}, but each must be a multiple of the first")
    return {**found, "model_channels": widths[0], "channel_mult": tuple(width // widths[0] for width in widths)}


def unet_config(cfg, **more) -> dict:
    """Return diffusers' configuration of a U-Net (or, with other class name and fields in `more`, a ControlNet)."""
    down = ["CrossAttnDownBlock2D"] * (len(cfg.channel_mult) - 1) + ["DownBlock2D"]
    up = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (len(cfg.channel_mult) - 1)
    config = {theirs: getattr(cfg, ours) for ours, theirs in UNET_FIELDS.items()}
    return {
        **config,
        "block_out_channels": [cfg.model_channels * mult for mult in cfg.channel_mult],
        "down_block_types": down,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "act_fn": "silu",
        "norm_eps": 1e-5,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
    } | (more or {"_class_name": "UNet2DConditionModel", "out_channels": cfg.out_channels, "up_block_types": up})


def controlnet_config(cfg) -> dict:
    """Return diffusers' configuration of a ControlNet."""
    return unet_config(
        cfg.unet,
        _class_name="ControlNetModel",
        conditioning_channels=3,
        conditioning_embedding_out_channels=list(cfg.hint_channels),
        controlnet_conditioning_channel_order="rgb",
        global_pool_conditions=False,
    )


def vae_config(cfg, sample_size: int) -> dict:
    """Return diffusers' configuration of an autoencoder."""
    levels = len(cfg.channels)
    config = {theirs: getattr(cfg, ours) for ours, theirs in VAE_FIELDS.items()}
    return {
        "_class_name": "AutoencoderKL",
        **config,
        "block_out_channels": list(cfg.channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "in_channels": 3,
        "out_channels": 3,
        "act_fn": "silu",
        "sample_size": sample_size,
    }


def text_config(cfg, tokenizer) -> dict:
    """Return transformers' configuration of a CLIP text transformer."""
    config = {theirs: getattr(cfg, ours) for ours, theirs in TEXT_FIELDS.items()}
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        **config,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": cfg.hidden_size,
        "bos_token_id": tokenizer.start,
        "eos_token_id": tokenizer.end,
        "pad_token_id": tokenizer.end,
    }


SCHEDULER_CONFIG = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
}
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
}

TOY_BASE = Path(__file__).parent / "toy_base"
TOY_CONTROLNETS = Path(__file__).parent / "toy_controlnets"  # a folder for each condition: "toy-canny" is canny/
