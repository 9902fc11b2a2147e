"""Training of the toy base: autoencoder, tokenizer, text transformer and U-Net, from scratch, on the toy world.

`python train_toy.py --base` runs it; the result is the Stable Diffusion in `minicn/toy_base/`. Source of the recipe:
Rombach et al., arXiv:2112.10752 (autoencoder with a slight KL term, then a U-Net on its latents with text), 10% of the
prompts dropped for classifier-free guidance (Ho and Salimans, arXiv:2207.12598). Left out: the discriminator and the
perceptual loss of the autoencoder; an L1 loss on differences of neighbouring pixels keeps the edges sharp instead.
"""

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minicn import toy
from minicn.vae import VAE, AttnBlock, Downsample, ResnetBlock, Upsample, VAEConfig

TOY_VAE = VAEConfig(channels=(16, 32, 64, 96), norm_num_groups=4)


def render(count: int, split: str = "train") -> tuple[Tensor, list[str]]:
    """Return `count` toy pictures, uint8 (count, 3, 128, 128), and their captions."""
    images = torch.empty(count, 3, toy.SIZE, toy.SIZE, dtype=torch.uint8)
    captions = []
    for i in tqdm(range(count), desc="rendering", unit="scene"):
        scene = toy.scene(i, split)
        images[i] = torch.from_numpy(scene.image).permute(2, 0, 1)
        captions.append(scene.caption)
    return images, captions


def init_vae(vae: VAE) -> None:
    """Start the autoencoder as a linear one: every resnet block and the attention begin as the identity.

    Otherwise the normalised branches, which have lost the absolute colour, drown the path that carries it: after as many
    steps the error is a third larger, and the pictures have outlines but no colours.
    """
    for module in vae.modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
        elif isinstance(module, AttnBlock):
            nn.init.zeros_(module.proj_out.weight)
        elif isinstance(module, (Downsample, Upsample)):
            nn.init.kaiming_normal_(module.conv.weight, nonlinearity="linear")
    for conv in (vae.encoder.conv_in, vae.encoder.conv_out, vae.decoder.conv_in):
        nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")


def vae_loss(vae: VAE, images: Tensor, edge_weight: float, kl_weight: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Return the training loss and the plain L1 error of a batch of pictures (B, 3, H, W) in [-1, 1]."""
    mean, std = vae.encode(images)
    error = vae.decode(mean + std * torch.randn_like(std)) - images
    l1 = error.abs().mean()
    edges = (error[..., 1:, :] - error[..., :-1, :]).abs().mean() + (error[..., 1:] - error[..., :-1]).abs().mean()
    kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
    return l1 + (error**2).mean() + edge_weight * edges + kl_weight * kl, l1.detach()


def train_vae(images: Tensor, steps: int, device: torch.device, batch_size: int = 16, lr: float = 1e-3) -> VAE:
    """Train the toy autoencoder: four fifths of the steps on 64x64 crops, four times cheaper, then whole pictures.

    images  (N, 3, 128, 128) uint8
    """
    vae = VAE(TOY_VAE)
    init_vae(vae)
    vae.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    # A higher rate gets stuck where outlines are right and colours wrong.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.03)
    bar = tqdm(range(steps), desc="autoencoder", unit="step")
    for step in bar:
        whole = step >= 0.8 * steps  # GroupNorm sees other statistics on whole pictures than on crops
        count, side = (batch_size // 2, toy.SIZE) if whole else (batch_size, toy.SIZE // 2)
        chosen = torch.randint(len(images), (count,))
        corners = torch.randint(toy.SIZE - side + 1, (count, 2)).tolist()
        crops = [images[i, :, y : y + side, x : x + side] for i, (y, x) in zip(chosen, corners, strict=True)]
        batch = torch.stack(crops).to(device).float() / 127.5 - 1
        loss, l1 = vae_loss(vae, batch.contiguous(memory_format=torch.channels_last), edge_weight=step / steps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(l1=f"{l1.item():.4f}")
    return vae.eval()


@torch.no_grad()
def normalise_latents(vae: VAE, images: Tensor, device: torch.device) -> None:
    """Fold a shift and a scale into the 1x1 convolutions around the latents, so that 0.18215 makes them N(0, 1).

    Stable Diffusion's factor 0.18215 is 1 / std of its own latents; with this the toy's has the same meaning and size.
    """
    means = encode_all(vae, images, device) / vae.cfg.scaling_factor
    shift = means.mean((0, 2, 3)).to(device)
    scale = 1 / (means.std((0, 2, 3)).to(device) * vae.cfg.scaling_factor)
    n = vae.cfg.latent_channels
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.bias[:n] = (quant.bias[:n] - shift) * scale
    quant.weight[:n] *= scale[:, None, None, None]
    quant.bias[n:] += 2 * scale.log()
    post.bias += (post.weight[:, :, 0, 0] * shift).sum(1)
    post.weight /= scale[None, :, None, None]


@torch.no_grad()
def encode_all(vae: VAE, images: Tensor, device: torch.device, batch_size: int = 32) -> Tensor:
    """Return the scaled latent means (N, 4, H/8, W/8) of pictures (N, 3, H, W) uint8, on the CPU."""
    chunks = []
    for batch in tqdm(images.split(batch_size), desc="encoding", unit="batch"):
        batch = (batch.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        chunks.append(vae.encode(batch)[0].cpu() * vae.cfg.scaling_factor)
    return torch.cat(chunks)
