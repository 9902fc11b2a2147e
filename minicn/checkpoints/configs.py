"""Configurations of diffusers folders: the fields of our config classes, to and from the config.json of each model."""

import math
from pathlib import Path

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


def _whole(widths: object) -> bool:
    """Return whether this is a non-empty list of positive integers."""
    return isinstance(widths, list) and bool(widths) and all(isinstance(w, int) and w > 0 for w in widths)


FIXED = {  # settings in which other models differ, with Stable Diffusion 1.5's values
    "act_fn": "silu",
    "hidden_act": "quick_gelu",
    "center_input_sample": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "only_cross_attention": False,
    "use_linear_projection": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "prediction_type": "epsilon",
}


def check_fixed(config: dict, source: str | Path) -> None:
    """Raise ValueError for a configuration that asks for what Stable Diffusion 1.5 does not do."""
    for name, value in FIXED.items():
        if config.get(name, value) not in (value, None):
            raise ValueError(f"{source} has {name} {config[name]!r}, but minicn runs Stable Diffusion 1.5 ({value!r})")


def check_heads(heads: object, widths: list[int], source: str | Path) -> None:
    """Raise ValueError unless a number of heads divides every width."""
    if not isinstance(heads, int) or heads < 1 or any(width % heads for width in widths):
        raise ValueError(f"{source} has {heads!r} attention heads, but expected an integer that divides {widths}")


def vae_fields(config: dict, source: str | Path) -> dict:
    """Return the fields of VAEConfig from a diffusers configuration."""
    check_fixed(config, source)
    found = fields_from_config(VAE_FIELDS, config, source)
    factor = found["scaling_factor"]
    if not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
        raise ValueError(f"{source} has scaling_factor {factor!r}, but expected a number above 0 (0.18215)")
    return found


def text_fields(config: dict, source: str | Path) -> dict:
    """Return the fields of TextConfig from a transformers configuration, also an old one of both CLIP towers."""
    config = config.get("text_config") or config
    check_fixed(config, source)
    found = fields_from_config(TEXT_FIELDS, config, source)
    check_heads(found["num_heads"], [found["hidden_size"]], source)
    return found


def unet_fields(config: dict, source: str | Path) -> dict:
    """Return the fields of UNetConfig from a diffusers configuration of a U-Net or a ControlNet."""
    check_fixed(config, source)
    found = fields_from_config(UNET_FIELDS, config, source)
    widths = config.get("block_out_channels")
    if not _whole(widths) or any(width % widths[0] for width in widths):
        raise ValueError(f"{source} has block_out_channels {widths}, but each must be a multiple of the first")
    check_heads(found["num_heads"], widths, source)
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
        controlnet_conditioning_channel_order="bgr" if cfg.bgr else "rgb",
        global_pool_conditions=cfg.global_pool,
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
