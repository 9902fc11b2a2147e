"""Configurations of diffusers folders: the fields of our config classes, to and from the config.json of each model."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any, TypeVar

from minicn.checkpoints import files
from minicn.clip import TextConfig
from minicn.unet import UNetConfig
from minicn.vae import VAEConfig

C = TypeVar("C")

UNET_FIELDS = {  # ours: diffusers'
    "in_channels": "in_channels",
    "num_res_blocks": "layers_per_block",
    "num_heads": "attention_head_dim",  # Compat: diffusers' name for the number of heads
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

RANGES = {  # of every field that decides what is built, lowest and highest; of a list of one to eight widths, of each
    "in_channels": (1, 64),
    "out_channels": (1, 64),
    "latent_channels": (1, 64),
    "model_channels": (1, 4096),
    "channel_mult": (1, 64),
    "channels": (1, 4096),
    "hint_channels": (1, 4096),
    "num_res_blocks": (1, 8),
    "layers_per_block": (1, 8),
    "num_heads": (1, 256),
    "norm_num_groups": (1, 4096),
    "context_dim": (1, 8192),
    "vocab_size": (2, 2**20),
    "hidden_size": (1, 8192),
    "intermediate_size": (1, 2**16),
    "num_layers": (1, 64),
    "max_positions": (1, 1024),
    "scaling_factor": (1e-4, 1e4),
    "guidance_scale": (0, 100),
    "default_prompt": (0, 1000),  # characters
    "words": (0, 10000),
}

# Settings in which other models differ, with Stable Diffusion 1.5's values, which hold where a file states none.

UNET_FIXED = {
    "out_channels": 4,
    "conditioning_channels": 3,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "mid_block_scale_factor": 1,
    "mid_block_only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "class_embed_type": None,
    "num_class_embeds": None,
    "class_embeddings_concat": False,
    "projection_class_embeddings_input_dim": None,
    "addition_embed_type": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "attention_type": "default",
    "num_attention_heads": None,
    "only_cross_attention": False,
    "dual_cross_attention": False,
    "cross_attention_norm": None,
    "use_linear_projection": False,
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
}
VAE_FIXED = {
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "silu",
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}
TEXT_FIXED = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULE_FIXED = {
    "num_train_timesteps": 1000,
    **BETAS,
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
}
SAMPLER = {"clip_sample": False, "thresholding": False, "set_alpha_to_one": False, "steps_offset": 1}
SAMPLER |= {"timestep_spacing": "leading"}


def check_fixed(fixed: dict, config: dict, source: str | Path) -> None:
    """Raise ValueError, naming the setting, for a configuration that asks for what Stable Diffusion 1.5 does not do."""
    for name, value in fixed.items():
        if config.get(name) not in (value, None):
            raise ValueError(f"{source} has {name} {config[name]!r}, but minicn runs Stable Diffusion 1.5 ({value!r})")


def check_scheduler(folder: Path) -> None:
    """Raise ValueError if a model's folder states another noise schedule; warn of what it states for other samplers."""
    source = folder / "scheduler" / "scheduler_config.json"
    if not source.is_file():
        return
    config = files.read_json(source)
    check_fixed(SCHEDULE_FIXED, config, source)
    for name, value in BETAS.items():
        if config.get(name) is None:  # diffusers would take betas of its own
            raise ValueError(f"{source} has no {name}, but minicn runs Stable Diffusion 1.5 ({value!r}): state it")
    other = [f"{name} {config[name]!r} ({value!r})" for name, value in SAMPLER.items() if config.get(name, value) != value]
    if other:
        warnings.warn(f"{source} has {', '.join(other)}; minicn samples as DDIM does (in brackets)", stacklevel=3)


def checked(config_class: type[C], found: dict, source: str | Path, names: dict[str, str] | None = None) -> C:
    """Return the configuration of fields that a file gave, before anything is built of it.

    names  of our fields in that file, where they differ
    Raises ValueError, naming the file and the field, for a value of another type or outside RANGES, and for heads or
    groups that do not divide every width.
    """
    fields, names = {field.name: field.default for field in dataclasses.fields(config_class)}, names or {}
    for name in found:
        if name not in fields:
            raise ValueError(f"{source} has {name!r}, which is no field of a {config_class.__name__}: fetch it again")
    cfg = config_class(**found)
    for name, like in fields.items():
        value, (low, high) = getattr(cfg, name), RANGES.get(name, (False, True))
        if like is not dataclasses.MISSING and not _fits(value, like, low, high):
            expected = {
                tuple: f"1 to 8 integers from {low} to {high}",
                int: f"an integer from {low} to {high}",
                float: f"a number from {low} to {high}",
                str: f"text of {low} to {high} characters",
                bool: "true or false",
            }[type(like)]
            raise ValueError(f"{source} has {names.get(name, name)} {value!r}, but expected {expected}")
    for name, widths in _divided(cfg).items():
        if any(width % getattr(cfg, name) for width in widths):
            raise ValueError(
                f"{source} has {names.get(name, name)} {getattr(cfg, name)}, but expected a divisor of {widths}"
            )
    if getattr(cfg, "model_channels", 2) % 2:
        raise ValueError(f"{source} has model_channels {cfg.model_channels}, but a timestep's sinusoids take an even number")
    return cfg


def _fits(value: object, like: object, low: float, high: float) -> bool:
    """Return whether a value is of the type of a default, and it, or each of a tuple, lies in a range."""
    if isinstance(like, tuple):
        return isinstance(value, tuple) and 1 <= len(value) <= 8 and all(_fits(v, 1, low, high) for v in value)
    if isinstance(like, str):
        return isinstance(value, str) and low <= len(value) <= high
    return type(value) in ((int, float) if isinstance(like, float) else (type(like),)) and low <= value <= high


def _divided(cfg: Any) -> dict[str, list[int]]:
    """Return, for each field that must divide widths, those widths."""
    if hasattr(cfg, "channel_mult"):
        widths = [cfg.model_channels * mult for mult in cfg.channel_mult]
        return {"num_heads": widths, "norm_num_groups": widths}
    if hasattr(cfg, "channels"):
        return {"norm_num_groups": list(cfg.channels)}
    return {"num_heads": [cfg.hidden_size]} if hasattr(cfg, "hidden_size") else {}


def fields_from_config(fields: dict[str, str], config: dict, source: str | Path) -> dict:
    """Return our fields from a diffusers configuration. Raises ValueError naming a field that is missing."""
    found = {}
    for ours, theirs in fields.items():
        value = config.get(theirs)
        if value is None:
            value = DEFAULTS.get(theirs)
        if value is None:
            raise ValueError(f"{source} has no {theirs}: this is not a Stable Diffusion 1.5 configuration")
        found[ours] = tuple(value) if isinstance(value, list) else value
    return found


def read_vae(source: Path) -> VAEConfig:
    """Read a diffusers configuration of an autoencoder. Raises what `check_fixed` and `checked` raise, as the others do."""
    config = files.read_json(source)
    check_fixed(VAE_FIXED, config, source)
    return checked(VAEConfig, fields_from_config(VAE_FIELDS, config, source), source, VAE_FIELDS)


def read_text(source: Path) -> TextConfig:
    """Read a transformers configuration of a text encoder, also an old one of both CLIP towers."""
    config = files.read_json(source)
    config = config.get("text_config") or config
    if not isinstance(config, dict):
        raise ValueError(f"{source} has text_config {config!r}, but expected an object, {{...}}")
    check_fixed(TEXT_FIXED, config, source)
    return checked(TextConfig, fields_from_config(TEXT_FIELDS, config, source), source, TEXT_FIELDS)


def read_unet(source: Path) -> UNetConfig:
    """Read a diffusers configuration of a U-Net or a ControlNet."""
    config = files.read_json(source)
    check_fixed(UNET_FIXED, config, source)
    found = fields_from_config(UNET_FIELDS | {"widths": "block_out_channels"}, config, source)
    widths = found.pop("widths")
    if not _fits(widths, (), *RANGES["channels"]) or any(width % widths[0] for width in widths):
        raise ValueError(
            f"{source} has block_out_channels {widths!r}, but expected integers from 1 to 4096, multiples of the first"
        )
    found |= {"model_channels": widths[0], "channel_mult": tuple(width // widths[0] for width in widths)}
    return checked(UNetConfig, found, source, UNET_FIELDS)


def unet_config(cfg, **more) -> dict:
    """Return diffusers' configuration of a U-Net (or, with other class name and fields in `more`, a ControlNet)."""
    config = {theirs: getattr(cfg, ours) for ours, theirs in UNET_FIELDS.items()}
    return {
        **config,
        "block_out_channels": [cfg.model_channels * mult for mult in cfg.channel_mult],
        "down_block_types": UNET_FIXED["down_block_types"],
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "act_fn": "silu",
        "norm_eps": 1e-5,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
    } | (
        more
        or {
            "_class_name": "UNet2DConditionModel",
            "out_channels": cfg.out_channels,
            "up_block_types": UNET_FIXED["up_block_types"],
        }
    )


def controlnet_config(cfg) -> dict:
    """Return diffusers' configuration of a ControlNet."""
    return unet_config(
        cfg.unet,
        _class_name="ControlNetModel",
        conditioning_channels=3,
        conditioning_embedding_out_channels=list(cfg.hint_channels),
        controlnet_conditioning_channel_order="bgr" if cfg.bgr else "rgb",
        global_pool_conditions=cfg.global_pool,
    )


def vae_config(cfg, sample_size: int = 512) -> dict:
    """Return diffusers' configuration of an autoencoder."""
    config = {theirs: getattr(cfg, ours) for ours, theirs in VAE_FIELDS.items()}
    return {
        "_class_name": "AutoencoderKL",
        **config,
        "block_out_channels": list(cfg.channels),
        "down_block_types": VAE_FIXED["down_block_types"],
        "up_block_types": VAE_FIXED["up_block_types"],
        "in_channels": 3,
        "out_channels": 3,
        "act_fn": "silu",
        "sample_size": sample_size,
    }


def text_config(cfg, tokenizer) -> dict:
    """Return transformers' configuration of a CLIP text transformer.

    Compat: transformers 5 computes in the precision of the file unless told otherwise, diffusers in float32; a file in half
    precision must not make one part of a pipeline differ from the others. The key is the published folders'.
    """
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
        "torch_dtype": "float32",
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
