"""Names of weights: every published layout of Stable Diffusion 1.5 and its ControlNets, to and from our modules' own names.

Our modules carry the names of the ldm checkpoints (CompVis, the official ControlNet). diffusers' differ in names alone,
except for the autoencoder's attention, whose 1x1 convolutions are linear layers there. A part of a file is a dictionary from
our names to the file's. Nothing here imports a model class: a model gives its keys and shapes, a file its tensors.
"""

import itertools
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from minicn.checkpoints.files import WeightFile, parse_json

State = dict[str, Tensor]
Keys = dict[str, str]  # our name of a tensor: the file's

# ldm -> diffusers, by the prefix of a key

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 2023


def _unet_names() -> dict[str, str]:
    """U-Net and ControlNet. In both layouts, level l holds resnets j; ldm numbers blocks throughout, diffusers by level."""
    names = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.1": "mid_block.attentions.0",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
        "middle_block_out.0": "controlnet_mid_block",
        "input_hint_block.0": "controlnet_cond_embedding.conv_in",
        "input_hint_block.14": "controlnet_cond_embedding.conv_out",
    }
    names |= {f"input_hint_block.{2 * i + 2}": f"controlnet_cond_embedding.blocks.{i}" for i in range(6)}
    names |= {f"zero_convs.{i}.0": f"controlnet_down_blocks.{i}" for i in range(12)}
    resnets = {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    for level, j in itertools.product(range(4), range(3)):
        down, up = 3 * level + j + 1, 3 * level + j
        if j < 2:
            resnets[f"input_blocks.{down}.0"] = f"down_blocks.{level}.resnets.{j}"
            names[f"input_blocks.{down}.1"] = f"down_blocks.{level}.attentions.{j}"
        elif level < 3:
            names[f"input_blocks.{down}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        resnets[f"output_blocks.{up}.0"] = f"up_blocks.{level}.resnets.{j}"
        names[f"output_blocks.{up}.1"] = f"up_blocks.{level}.attentions.{j}"
        if j == 2 and level < 3:  # after the attention, which the coarsest level does not have
            names[f"output_blocks.{up}.{2 if level else 1}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return names | _inside(resnets, RESNET)


def _vae_names() -> dict[str, str]:
    """The autoencoder. ldm stores the decoder's levels in the encoder's order, diffusers in the order they run."""
    names = {f"{side}.norm_out": f"{side}.conv_norm_out" for side in ("encoder", "decoder")}
    attention, shortcut = {}, {}
    for side in ("encoder", "decoder"):
        attention[f"{side}.mid.attn_1"] = f"{side}.mid_block.attentions.0"
        names |= {f"{side}.mid.block_{j + 1}": f"{side}.mid_block.resnets.{j}" for j in range(2)}
    for level, j in itertools.product(range(4), range(3)):
        shortcut[f"encoder.down.{level}.block.{j}"] = f"encoder.down_blocks.{level}.resnets.{j}"
        shortcut[f"decoder.up.{level}.block.{j}"] = f"decoder.up_blocks.{3 - level}.resnets.{j}"
        names[f"encoder.down.{level}.downsample.conv"] = f"encoder.down_blocks.{level}.downsamplers.0.conv"
        names[f"decoder.up.{level}.upsample.conv"] = f"decoder.up_blocks.{3 - level}.upsamplers.0.conv"
    return names | _inside(attention, VAE_ATTENTION) | _inside(shortcut, {"nin_shortcut": "conv_shortcut"}) | shortcut


def _inside(blocks: dict[str, str], inner: dict[str, str]) -> dict[str, str]:
    """Join the names of blocks with those of the layers in them."""
    return {f"{a}.{x}": f"{b}.{y}" for (a, b), (x, y) in itertools.product(blocks.items(), inner.items())}


TO_DIFFUSERS = {"unet": _unet_names(), "vae": _vae_names(), "text_encoder": {}}  # transformers' names are the published ones
TO_DIFFUSERS["controlnet"] = TO_DIFFUSERS["unet"]
FROM_DIFFUSERS = {kind: {new: old for old, new in names.items()} for kind, names in TO_DIFFUSERS.items()}
DEEPEST = max(name.count(".") for names in FROM_DIFFUSERS.values() for pair in names.items() for name in pair) + 1


def rename(key: str, names: dict[str, str]) -> str:
    """Replace the longest prefix of a key that is in a table; a key without one is kept."""
    parts = key.split(".", DEEPEST)
    for n in range(min(len(parts), DEEPEST), 0, -1):
        new = names.get(".".join(parts[:n]))
        if new is not None:
            return ".".join([new, *parts[n:]])
    return key


def own_name(kind: str, key: str) -> str:
    """Return our name of a file's key, its prefix removed, whichever layout it has."""
    if kind == "text_encoder":
        return key if key.startswith("text_model.") else f"text_model.{key}"
    if kind == "vae" and ".attentions." in key:
        block, _, rest = key.partition(".attentions.0.")
        layer, _, tail = rest.rpartition(".")
        key = f"{block}.attentions.0.{OLD_VAE_ATTENTION.get(layer, layer)}.{tail}"
    return rename(key, FROM_DIFFUSERS[kind])


def to_diffusers(kind: str, state: State) -> State:
    """Rename a model's own state into the diffusers layout. `kind` is a key of TO_DIFFUSERS."""
    renamed = {}
    for key, tensor in state.items():
        new = rename(key, TO_DIFFUSERS[kind])
        linear = kind == "vae" and ".attentions." in new and tensor.ndim == 4
        renamed[new] = tensor[:, :, 0, 0] if linear else tensor
    return renamed


# What is in a file

PREFIXES = {  # in a checkpoint of several models
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
    "controlnet": "control_model.",
}
SIGNATURE_KEYS = {  # keys that identify a model alone in its file; one is enough
    "controlnet": ("input_hint_block.0.weight", "zero_convs.0.0.weight", "controlnet_cond_embedding.conv_in.weight"),
    "unet": ("input_blocks.0.0.weight", "up_blocks.0.resnets.0.conv1.weight"),
    "vae": ("encoder.conv_in.weight",),
    "text_encoder": ("text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight"),
}
# What a model's file may hold beside it: loss and moving average, CLIP's other tower, the positions 0, 1, 2, ...
UNUSED = re.compile(
    r"(loss|model_ema|vision_model)\.|(text_model\.)?embeddings\.position_ids$"
    r"|((text|visual)_projection(\.weight)?|logit_scale|difference)$"
)
DISPLAY_NAMES = {"unet": "U-Net", "vae": "autoencoder", "text_encoder": "text encoder", "controlnet": "ControlNet"}


@dataclass
class Contents:
    """What a file holds.

    layout      in words, for people
    parts       kind of model: our names of its tensors -> the file's
    ema         the U-Net's moving average, the same way; empty if there is none
    difference  a ControlNet that holds its difference from the U-Net it was made for
    other       how many tensors belong to no model
    """

    file: WeightFile
    layout: str
    parts: dict[str, Keys]
    ema: Keys = field(default_factory=dict)
    difference: bool = False
    other: int = 0

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        return {own: self.file.shapes[key] for own, key in self.parts[kind].items()}


def contents(file: WeightFile) -> Contents:
    """Find out what a file holds, from its keys and shapes alone.

    Raises ValueError, naming what it is instead, for everything but Stable Diffusion 1.5 and its ControlNets.
    """
    names: Keys = {}
    for key in file.shapes:
        _put(names, re.sub(r"^((module|_orig_mod)\.)+", "", key), key, file.path)
    refuse_others({name: file.shapes[key] for name, key in names.items()}, file.path)
    parts: dict[str, Keys] = {}
    flat, other = {}, 0
    for name, key in names.items():
        kind = next((kind for kind, prefix in PREFIXES.items() if name.startswith(prefix)), None)
        inner = name.removeprefix(PREFIXES[kind]) if kind else name
        if kind is not None and not UNUSED.match(inner):
            _put(parts.setdefault(kind, {}), own_name(kind, inner), key, file.path)
        elif name.startswith("model_ema.diffusion_model"):
            flat[name.removeprefix("model_ema.diffusion_model")] = key
        else:
            other += 1
    if parts:
        whole = "ldm checkpoint" if "unet" in parts else "ldm"
        layout = f"{whole} with ControlNet (v1.0)" if {"unet", "controlnet"} <= parts.keys() else whole
        layout = "ldm ControlNet (v1.1)" if parts.keys() == {"controlnet"} else layout
    else:
        kind = next((kind for kind, marks in SIGNATURE_KEYS.items() if any(mark in names for mark in marks)), None)
        if kind is None:
            raise ValueError(
                f"{file.path} holds no model that minicn knows (its first tensors: {', '.join(list(names)[:3])}); minicn "
                "runs Stable Diffusion 1.5 and its ControlNets"
            )
        used = [name for name in names if not UNUSED.match(name)]
        parts[kind], other = {}, len(names) - len(used)
        for name in used:
            _put(parts[kind], own_name(kind, name), names[name], file.path)
        new = kind == "text_encoder" or any(name not in parts[kind] for name in used)
        layout = "diffusers" if new else "ldm, without a prefix"
    for keys in parts.values():
        for key in keys.values():
            if not file.shapes[key] or 0 in file.shapes[key]:
                raise ValueError(f"{file.path}: {key} has shape {file.shapes[key]}, which no weight has: fetch it again")
    ema = {own: flat[own.replace(".", "")] for own in parts.get("unet", {}) if own.replace(".", "") in flat}
    found = Contents(file, layout, parts, ema, "difference" in names, other)
    refuse_other_widths(found)
    return found


def _put(part: Keys, own: str, key: str, path: Path) -> None:
    """Add a tensor to a part. Raises ValueError if it is there already."""
    if own in part:
        raise ValueError(f"{path} holds {own} twice, as {part[own]} and as {key}: remove the one that is wrong")
    part[own] = key


def refuse_others(shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    """Raise ValueError for a file of another architecture, by the keys that give it away."""
    control = any("zero_convs." in k or "controlnet_" in k or "input_hint_block" in k for k in shapes)
    net = "ControlNet" if control else "model"

    def has(*parts: str) -> bool:
        return any(part in key for key in shapes for part in parts)

    for what, found in (
        ("a Control-LoRA", has("lora_controlnet")),
        ("a LoRA", has("lora_unet", "lora_te_", ".lora_A.", ".lora_B.", "lora_up", "lora_down", "lora.up")),
        ("a T2I-Adapter", has("body.0.in_conv.weight", "adapter.body.0") or ("conv_in.weight" in shapes and has("body.0."))),
        ("a SparseCtrl ControlNet", has("motion_modules")),
        ("a ControlNet Union", has("control_add_embedding", "task_embedding")),
        (f"an SDXL {net}", has("conditioner.embedders", "label_emb.0.0.weight", "add_embedding.linear_1.weight")),
        (
            "a Stable Diffusion 3 or Flux model",
            has("joint_blocks.", "double_blocks.", "transformer_blocks.0.attn.add_q_proj"),
        ),
        ("a Stable Diffusion 2 model", has("cond_stage_model.model.")),
    ):
        if found:
            context = [shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight") and len(shape) == 2]
            width = f" (context width {context[0]})" if context else ""
            raise ValueError(f"{path} is {what}{width}; minicn runs Stable Diffusion 1.5 and its ControlNets")


def refuse_other_widths(found: Contents) -> None:
    """Raise ValueError for relatives of Stable Diffusion 1.5 that differ in a shape alone."""
    for kind in ("unet", "controlnet"):
        shapes = found.shapes(kind) if kind in found.parts else {}
        first = shapes.get("input_blocks.0.0.weight", (0, 4))
        keys = shapes.get("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", (0, 768))
        what = RELATIVES.get(("context", *keys[1:2])) or RELATIVES.get(("channels", *first[1:2]))
        if what:
            raise ValueError(
                f"{found.file.path} is {what.format(DISPLAY_NAMES[kind])}; minicn runs Stable Diffusion 1.5 (context width "
                "768, 4 latent channels)"
            )


RELATIVES = {
    ("context", 1024): "a Stable Diffusion 2 {} (context width 1024)",
    ("context", 2048): "an SDXL {} (context width 2048)",
    ("channels", 9): "an inpainting {} (9 input channels)",
    ("channels", 8): "an instruct-pix2pix {} (8 input channels)",
}


# Our configurations, from shapes or from metadata


def fields_of(found: Contents, kind: str) -> dict:
    """Return the fields of a model's configuration: those that minicn wrote into the file, else read from the shapes.

    Heads and groups leave no trace in the shapes: they are Stable Diffusion 1.5's unless the file says otherwise.
    Raises ValueError, naming the tensor, where the structure is different.
    """
    own = written(found).get(kind)
    if own is not None:
        return {k: tuple(v) if isinstance(v, list) else v for k, v in own.items()}
    shapes, name = found.shapes(kind), DISPLAY_NAMES[kind]

    def size(key: str, dim: int) -> int:
        if key not in shapes:
            raise ValueError(f"{found.file.path} has no {key}: its {name} is incomplete, or has a different structure")
        if len(shapes[key]) <= dim:
            raise ValueError(f"{found.file.path}: {key} has shape {shapes[key]}: its {name} has a different structure")
        return shapes[key][dim]

    if kind == "vae":
        widths = [size(f"encoder.down.{level}.block.0.conv1.weight", 0) for level in range(4)]
        return {"channels": tuple(widths), "latent_channels": size("decoder.conv_in.weight", 1)}
    if kind == "text_encoder":
        embedding, layer = "text_model.embeddings.token_embedding.weight", "text_model.encoder.layers."
        hidden = size(embedding, 1)
        return {
            "vocab_size": size(embedding, 0),
            "hidden_size": hidden,
            "intermediate_size": size(f"{layer}0.mlp.fc1.weight", 0),
            "num_layers": len({key.split(".")[3] for key in shapes if key.startswith(layer)}),
            "num_heads": max(hidden // 64, 1),  # CLIP's heads are 64 wide
            "max_positions": size("text_model.embeddings.position_embedding.weight", 0),
        }
    base = size("input_blocks.0.0.weight", 0)
    # In a "difference" file even this may be missing; then the U-Net decides.
    widths = [size(f"input_blocks.{3 * level + 1}.0.in_layers.2.weight", 0) for level in range(4)]
    if any(width % base for width in widths):
        raise ValueError(f"{found.file.path} has widths {widths}, but each must be a multiple of the first, {base}")
    return {
        "model_channels": base,
        "in_channels": size("input_blocks.0.0.weight", 1),
        "channel_mult": tuple(width // base for width in widths),
        "context_dim": size("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", 1),
    }


def written(found: Contents) -> dict[str, dict]:
    """Return what minicn wrote into a file's metadata; {} if it did not. Raises ValueError if that cannot be read."""
    try:
        content = parse_json(found.file.metadata.get("minicn", "{}"), found.file.path)
        if isinstance(content, dict) and all(isinstance(value, dict) for value in content.values()):
            return content
    except ValueError:
        pass
    raise ValueError(f"{found.file.path} has metadata of minicn that cannot be read: fetch or convert it again")


def metadata(configs: dict[str, dict]) -> str:
    """Return what minicn writes into a file: the fields of each model's configuration, for `fields_of`."""
    return json.dumps(configs, default=int)  # numpy's integers are no JSON


def hint_channels_of(found: Contents) -> tuple[int, ...]:
    """Return the widths of a ControlNet's hint encoder."""
    shapes = found.shapes("controlnet")
    keys = [f"input_hint_block.{i}.weight" for i in (0, 4, 8, 12)]
    if any(key not in shapes for key in keys):
        raise ValueError(
            f"{found.file.path} has no {next(k for k in keys if k not in shapes)}: its hint encoder is incomplete"
        )
    return tuple(shapes[key][0] for key in keys)


def differences(found: Contents, kind: str, model: torch.nn.Module) -> list[tuple[str, float, str]]:
    """Return the tensors in which a part of a file differs from a model, as ||a - b|| / ||b||, largest first, and in words.

    Those that cannot be compared come first, as infinite: held by one of the two alone, of another shape, not finite.
    """
    own, keys, different = model.state_dict(), found.parts[kind], []
    for name in [*keys, *(name for name in own if name not in keys)]:
        if name not in own or name not in keys:
            different.append((name, math.inf, "is in the file alone" if name in keys else "is not in the file"))
            continue
        b = own[name].float().cpu()
        try:
            a = found.file.weight(keys[name], b.shape).to(own[name].dtype).float()  # as the model rounds it
        except ValueError as error:
            different.append((name, math.inf, str(error).removeprefix(f"{found.file.path}: ")))
            continue
        if not torch.equal(a, b):
            much = ((a - b).norm() / b.norm().clamp(min=1e-12)).item()
            words = f"||a - b|| / ||b|| = {much:.3g}" if math.isfinite(much) else "holds NaN or infinite values"
            different.append((name, much if math.isfinite(much) else math.inf, words))
    return sorted(different, key=lambda one: -one[1])
