"""Models to and from disk, in any published layout: what the models' `load` and `save` do."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minicn.checkpoints import configs, files, hub, loading, weights
from minicn.clip import TextConfig, TextEncoder
from minicn.controlnet import ControlNet, ControlNetConfig
from minicn.inputs import Defaults
from minicn.tokenizer import Tokenizer
from minicn.unet import UNet, UNetConfig
from minicn.vae import VAE, VAEConfig

MODELS = {  # kind: model class, config class, reader of its config.json, names of its weights file
    "unet": (UNet, UNetConfig, configs.read_unet, ("diffusion_pytorch_model",)),
    "vae": (VAE, VAEConfig, configs.read_vae, ("diffusion_pytorch_model",)),
    "text_encoder": (TextEncoder, TextConfig, configs.read_text, ("model", "pytorch_model")),
}
DEFAULTS_FILE = "minicn.json"  # in the folder of a model whose defaults are not Stable Diffusion 1.5's
SHUFFLE = re.compile(r"control_v11e_sd15_shuffle([._]fp16)?\.(pth|safetensors|ckpt|bin)")  # the published files' names


# Loading


def load_model(
    kind: str,
    source: weights.Contents | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    variant: str | None = None,
    ema: bool = False,
) -> nn.Module:
    """Load one model, a key of MODELS, from what a file holds or from its own diffusers folder.

    Raises FileNotFoundError or ValueError, naming the file, for what is missing or does not fit.
    """
    model_class, config_class, read_config, names = MODELS[kind]
    cfg = None
    if isinstance(source, Path):
        cfg = read_config(source / "config.json")
        found = weights.contents(files.open_weights(files.find_weights(source, names, variant)))
    else:
        found = source
    if kind not in found.parts:
        held = ", ".join(weights.DISPLAY_NAMES[k] for k in found.parts)
        raise ValueError(f"{found.file.path} holds no {weights.DISPLAY_NAMES[kind]}, only: {held}")
    keys = found.parts[kind]
    if kind == "unet" and found.ema:
        lost = [key for key in keys if key not in found.ema]
        if ema and lost:
            raise ValueError(
                f"{found.file.path} holds a moving average (EMA) of only a part ({lost[0]} is missing): leave out ema"
            )
        using, other = ("EMA", "non-EMA") if ema else ("non-EMA", "EMA")
        warnings.warn(f"{found.file.path} holds the U-Net twice: {using} weights are used, not {other} (ema)", stacklevel=3)
        keys = found.ema if ema else keys
    elif kind == "unet" and ema:
        raise ValueError(f"{found.file.path} holds no moving average (EMA) of the weights: leave out ema")
    cfg = cfg or configs.checked(config_class, weights.fields_of(found, kind), found.file.path)
    with loading.Unfilled():
        model = model_class(cfg)
    loading.load_into(model, found.file, keys, dtype, device)
    return model.eval()


def load_vae(
    source: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", variant: str | None = None
) -> VAE:
    """Load an autoencoder from a file that holds one or from a folder, its own or that of a whole model."""
    path = hub.resolve(source, variant)
    if path.is_dir():
        return load_model("vae", path / "vae" if (path / "vae").is_dir() else path, dtype, device, variant)
    return load_model("vae", weights.contents(files.open_weights(path)), dtype, device)


def load_stable_diffusion(
    source: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    tokenizer: str | Path | None = None,
    vae: str | Path | None = None,
    vae_dtype: torch.dtype | None = None,
    variant: str | None = None,
    ema: bool = False,
) -> dict[str, Any]:
    """Load unet, vae, text_encoder, tokenizer and defaults, under these names.

    source     a diffusers folder; an ldm .safetensors, .ckpt or .pth; a Hugging Face repository; or "toy", the small
               model that ships with the package
    tokenizer  a folder with vocab.json and merges.txt, a model's folder, or "toy"; by default the model's own, for a
               single file CLIP's from the cache
    vae        another autoencoder: a file or a folder
    vae_dtype  precision of the autoencoder, if different from `dtype`: in float16 it may overflow
    variant    of a folder's weights, e.g. "fp16"
    ema        from a file that holds both, take the moving average (EMA) of the U-Net's weights
    Raises FileNotFoundError or ValueError, naming the file, for what is missing or does not fit. If there are two sets
    of weights, warns which one is used.
    """
    path = hub.resolve(source, variant)
    found = None
    if path.is_dir():
        if not (path / "unet").is_dir():
            raise FileNotFoundError(f"{path} holds no unet/: name a diffusers folder of a complete Stable Diffusion")
        configs.check_scheduler(path)
    else:
        found = weights.contents(files.open_weights(path))
        missing = [weights.DISPLAY_NAMES[kind] for kind in MODELS if kind not in found.parts and not (kind == "vae" and vae)]
        if missing:
            held = ", ".join(weights.DISPLAY_NAMES[kind] for kind in found.parts)
            raise ValueError(f"{path} holds no {' and no '.join(missing)}, only: {held}; name a complete Stable Diffusion")
    own = path / "tokenizer" if path.is_dir() else None
    words = Tokenizer.load(hub.tokenizer_folder(tokenizer) if tokenizer else own or hub.default_tokenizer())
    models = {}
    for kind in MODELS:
        if kind == "vae" and vae is not None:
            models[kind] = load_vae(vae, vae_dtype or dtype, device, variant)
            continue
        precision = vae_dtype or dtype if kind == "vae" else dtype
        models[kind] = load_model(kind, found or path / kind, precision, device, variant, ema and kind == "unet")
    size = models["text_encoder"].cfg.vocab_size
    if not all(isinstance(i, int) and 0 <= i < size for i in words.vocab.values()):
        raise ValueError(f"{path}: its text encoder knows {size} tokens, but the tokenizer gives others: use its own")
    return {**models, "tokenizer": words, "defaults": read_defaults(path, found)}


def read_defaults(path: Path, found: weights.Contents | None = None) -> Defaults:
    """Return the defaults that a model's folder keeps, or the file of which `found` are the contents."""
    if found is None:
        path = path / DEFAULTS_FILE
        return configs.checked(Defaults, files.read_json(path) if path.exists() else {}, path)
    return configs.checked(Defaults, weights.written(found).get("defaults", {}), path)


def load_controlnet(
    source: str | Path,
    unet: UNet | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    variant: str | None = None,
) -> ControlNet:
    """Load a ControlNet, in any published layout.

    source   a diffusers folder; a .safetensors, .pth, .ckpt or .bin file; a Hugging Face repository; or "toy-canny"
    unet     the U-Net to be controlled, or the StableDiffusion that holds it: the ControlNet must match its widths, and
             "difference" files are added to it
    variant  of a folder's weights, e.g. "fp16"
    Raises FileNotFoundError or ValueError, naming the file, for what is missing or does not fit. Warns if the file
    holds a U-Net of its own (v1.0, "control_sd15_*.pth") that is not `unet`.
    """
    unet = getattr(unet, "unet", unet)  # a StableDiffusion has one
    if not isinstance(unet, UNet | None):
        raise TypeError(f"unet is {type(unet).__name__}, but must be a UNet or a StableDiffusion: give sd.unet")
    path = hub.resolve(source, variant)
    config: dict = {}
    if path.is_dir():
        config = files.read_json(path / "config.json")
        file = files.open_weights(files.find_weights(path, ("diffusion_pytorch_model",), variant))
    else:
        file = files.open_weights(path)
    found = weights.contents(file)
    if "controlnet" not in found.parts:
        held = ", ".join(weights.DISPLAY_NAMES[kind] for kind in found.parts)
        raise ValueError(f"{file.path} holds no ControlNet, only: {held}; give it as the model instead")
    if config:
        shape = configs.read_unet(path / "config.json")
    elif found.difference:
        if unet is None:
            raise ValueError(f"{file.path} is a difference file: give the U-Net that it was made for (--unet, unet=sd.unet)")
        shape = unet.cfg
    else:
        shape = configs.checked(UNetConfig, weights.fields_of(found, "controlnet"), file.path)
    cfg = configs.checked(ControlNetConfig, {"unet": shape, **_hint_fields(found, config, path)}, file.path)
    if unet is not None and unet.cfg != cfg.unet:
        raise ValueError(f"{file.path} was made for a U-Net of shape {cfg.unet}, but this one is {unet.cfg}")
    with loading.Unfilled():
        net = ControlNet(cfg)
    if found.difference:
        found.file, found.parts["controlnet"] = _add_difference(found, unet, net)
    loading.load_into(net, found.file, found.parts["controlnet"], dtype, device)
    if unet is not None and "unet" in found.parts and not unet.out[2].weight.is_meta:
        _warn_of_another_unet(found, unet)
    return net.eval()


def _hint_fields(found: weights.Contents, config: dict, path: Path) -> dict:
    """Return what a ControlNet's configuration, or else minicn's metadata or the shapes, say of how it takes hints."""
    hints = weights.written(found).get("hints", {})
    paper = found.shapes("controlnet").get("input_hint_block.0.weight", (0,))[-1] == 4  # its convolutions are 4x4
    widths = ControlNetConfig.hint_channels if paper else weights.hint_channels_of(found)
    order = config.get("controlnet_conditioning_channel_order", "rgb")
    configs.check_fixed({"conditioning_embedding_out_channels": [*widths]}, config, path / "config.json")
    if order not in ("rgb", "bgr"):
        raise ValueError(f'{path} has controlnet_conditioning_channel_order {order!r}, but expected "rgb" or "bgr"')
    pool = config.get("global_pool_conditions", hints.get("global_pool"))
    if pool is None and not config and SHUFFLE.fullmatch(path.name):
        pool = True  # Compat: nothing in the published file says so
        warnings.warn(f"{path} has the name of v1.1's shuffle: its residuals are averaged over all positions", stacklevel=4)
    return {
        "hint_channels": widths,
        "paper_hint_encoder": paper,
        "global_pool": False if pool is None else pool,
        "bgr": order == "bgr" if config else hints.get("bgr", False),
    }


def _add_difference(found: weights.Contents, unet: UNet, net: ControlNet) -> tuple[files.WeightFile, weights.Keys]:
    """Return the full weights of a "difference" file, whose copied layers hold copy - U-Net, unless that is small."""
    keys, base, state = found.parts["controlnet"], unet.state_dict(), {}
    for name in net.state_dict():
        if name in keys:
            state[name] = found.file.get(keys[name])
        copied = name.startswith(("time_embed.", "input_blocks.", "middle_block."))
        if copied:
            whole = base[name].detach().float().cpu()
            state[name] = whole + found.file.weight(keys[name], whole.shape).float() if name in keys else whole
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in state.items()}
    return files.WeightFile(found.file.path, state.__getitem__, shapes, dtypes), {**keys, **{name: name for name in state}}


def _warn_of_another_unet(found: weights.Contents, unet: UNet) -> None:
    """Warn if the file's own U-Net, with which the ControlNet was trained, is a different one."""
    different = weights.differences(found, "unet", unet)
    if different:
        name, most, _ = different[0]
        warnings.warn(
            f"{found.file.path} holds a U-Net of its own: {len(different)} of {len(found.parts['unet'])} tensors differ "
            f"from this base (most, by {most:.2g}: {name}); to draw with it, load the file as the model",
            stacklevel=3,
        )


# Saving


def save_file(
    models: Mapping[str, nn.Module], path: str | Path, dtype: torch.dtype | None = None, defaults: Defaults | None = None
) -> None:
    """Write models, by kind, into one .safetensors in the ldm layout, in their own precision unless `dtype` is given."""
    state, fields = {}, {} if defaults in (None, Defaults()) else {"defaults": asdict(defaults)}
    for kind, model in models.items():
        state |= {weights.PREFIXES[kind] + key: t.to(dtype or t.dtype) for key, t in model.state_dict().items()}
        if kind == "controlnet":
            hints = {"global_pool": model.cfg.global_pool, "bgr": model.cfg.bgr}
            fields |= {kind: asdict(model.cfg.unet), "hints": hints}
        else:
            fields[kind] = asdict(model.cfg)
    files.write(path, state, {"minicn": weights.metadata(fields)})


def save_folder(kind: str, model: nn.Module, folder: str | Path, config: dict, dtype: torch.dtype | None = None) -> None:
    """Write a single model in the diffusers layout: its configuration, as given, and its weights."""
    name = "model" if kind == "text_encoder" else "diffusion_pytorch_model"
    state = {key: tensor.to(dtype or tensor.dtype) for key, tensor in model.state_dict().items()}
    files.write_json(Path(folder) / "config.json", config)
    files.write(Path(folder) / f"{name}.safetensors", weights.to_diffusers(kind, state))


def save_model(kind: str, model: nn.Module, path: str | Path, layout: str, dtype: torch.dtype | None = None) -> None:
    """Write a U-Net, an autoencoder or a ControlNet alone, in its own precision unless `dtype` is given.

    path    layout "ldm": a .safetensors file with the official names; "diffusers": a folder with config.json
    Raises ValueError for another layout, or the paper's hint encoder in diffusers, which does not have it.
    """
    check_layout(layout)
    if layout == "ldm":
        save_file({kind: model}, path, dtype)
        return
    if kind == "controlnet" and model.cfg.paper_hint_encoder:
        raise ValueError('diffusers does not have the paper\'s hint encoder: save with layout "ldm"')
    describe = {"controlnet": configs.controlnet_config, "unet": configs.unet_config, "vae": configs.vae_config}[kind]
    with files.filling(path) as folder:
        save_folder(kind, model, folder, describe(model.cfg), dtype)


def save_stable_diffusion(sd, path: str | Path, dtype: torch.dtype | None = None, layout: str = "diffusers") -> None:
    """Write a whole model, in its own precision unless `dtype` is given.

    path    layout "diffusers": a folder of weights, configurations, tokenizer and scheduler; "ldm": one .safetensors
    Raises ValueError for another layout.
    """
    check_layout(layout)
    parts = {kind: getattr(sd, kind) for kind in MODELS}
    if layout == "ldm":
        save_file(parts, path, dtype, sd.defaults)
        return
    sample_size = sd.image_size // 8  # side of the latents that diffusers draws by default
    config = {
        "unet": configs.unet_config(sd.unet.cfg) | {"sample_size": sample_size},
        "vae": configs.vae_config(sd.vae.cfg, 8 * sample_size),
        "text_encoder": configs.text_config(sd.text_encoder.cfg, sd.tokenizer),
    }
    with files.filling(path) as folder:
        for kind, model in parts.items():
            save_folder(kind, model, folder / kind, config[kind], dtype)
        sd.tokenizer.save(folder / "tokenizer")
        files.write_json(folder / "scheduler" / "scheduler_config.json", configs.SCHEDULER_CONFIG)
        files.write_json(folder / "model_index.json", configs.MODEL_INDEX)
        if sd.defaults != Defaults():
            files.write_json(folder / DEFAULTS_FILE, asdict(sd.defaults))


def check_layout(layout: str) -> None:
    if layout not in ("ldm", "diffusers"):
        raise ValueError(f'layout is {layout!r}, but must be "ldm" or "diffusers"')
