"""The noise schedule, the forward process, guidance, the DDIM step and the sampler's loop.

Source: Ho et al., arXiv:2006.11239 (forward process); Song et al., arXiv:2010.02502 (DDIM; that paper's alpha is our
abar = alphas_cumprod); Ho and Salimans, arXiv:2207.12598 (guidance). Left out: other samplers, clipping of x_0.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

NUM_TRAIN_TIMESTEPS = 1000


def alphas_cumprod() -> Tensor:
    """Return abar_t for t = 0..999, (1000,) float32, decreasing from 0.99915 to 0.00466.

    Stable Diffusion's "scaled linear" schedule: sqrt(beta) grows linearly from sqrt(0.00085) to sqrt(0.012).
    Numerics: computed in float64 and then cast, as ldm does; diffusers computes in float32, up to 9.3e-7 off.
    """
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, NUM_TRAIN_TIMESTEPS, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


def add_noise(x_0: Tensor, eps: Tensor, abar_t: Tensor) -> Tensor:
    """Return x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, the forward process, arXiv:2006.11239 eq. (4).

    x_0, eps  (B, 4, h, w)  clean latents, standard normal noise
    abar_t    (B,) or ()    alphas_cumprod at each sample's t
    """
    abar_t = abar_t.reshape(-1, *[1] * (x_0.ndim - 1)) if abar_t.ndim else abar_t
    return abar_t.sqrt() * x_0 + (1 - abar_t).sqrt() * eps


def guide(eps_uncond: Tensor, eps_cond: Tensor, guidance_scale: float) -> Tensor:
    """Return eps_u + s (eps_c - eps_u), classifier-free guidance; s = 1 is eps_c alone."""
    return eps_uncond + guidance_scale * (eps_cond - eps_uncond)


def timesteps(num_steps: int) -> list[int]:
    """Return the steps that a sampler of `num_steps` steps visits, noisiest first: 951, 901, ..., 1 for 20.

    They are 1000 // num_steps apart and end at 1, as in Stable Diffusion. 1000 steps would then begin at 1000, one past
    the schedule (where ldm and diffusers crash), so these end at 0.
    Raises ValueError for fewer than 1 or more than 1000.
    """
    if not 1 <= num_steps <= NUM_TRAIN_TIMESTEPS:
        raise ValueError(f"num_steps is {num_steps}, but the sampler takes 1 to {NUM_TRAIN_TIMESTEPS} steps")
    last = 1 if num_steps < NUM_TRAIN_TIMESTEPS else 0
    return [last + i * (NUM_TRAIN_TIMESTEPS // num_steps) for i in reversed(range(num_steps))]


def ddim_step(
    x_t: Tensor, eps: Tensor, abar_t: Tensor, abar_s: Tensor, eta: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """Move x_t to the less noisy step s < t.

    Source: arXiv:2010.02502, eqs. (12) and (16).
    x_t, eps        (B, 4, h, w)  noisy latents, predicted noise
    abar_t, abar_s  scalars       alphas_cumprod at t and s, 0 < abar_t <= abar_s <= 1
    eta             0 and up      0 adds no noise; 1 adds as much as DDPM does, sigma of eq. (16)
    noise           (B, 4, h, w)  standard normal, needed unless eta is 0
    """
    x_0 = (x_t - (1 - abar_t).sqrt() * eps) / abar_t.sqrt()
    if eta == 0:
        return abar_s.sqrt() * x_0 + (1 - abar_s).sqrt() * eps
    if noise is None:
        raise ValueError(f"eta is {eta}, but noise is missing: give standard normal noise shaped like x_t, or eta 0")
    sigma = eta * ((1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)).sqrt()
    return abar_s.sqrt() * x_0 + (1 - abar_s - sigma**2).clamp(min=0).sqrt() * eps + sigma * noise


def sample(
    predict: Callable[[Tensor, int, int], Tensor],
    x: Tensor,
    abar: Tensor,
    num_steps: int,
    begin: int = 0,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    after: Callable[[Tensor, int], Tensor] | None = None,
    progress: bool = False,
) -> Tensor:
    """Return clean latents (B, 4, h, w) from noisy ones x, by the DDIM sampler.

    predict    predicts the noise in x at timestep t, in step i of num_steps: eps = predict(x, t, i)
    x          (B, 4, h, w)  float32; at step 0 pure noise
    abar       (1000,)       alphas_cumprod
    begin      the first step, 0 to num_steps - 1; above 0, x is an image noised to that step
    eta        0 is DDIM; 1 adds as much noise as DDPM does, drawn from `generator` on the CPU
    after      changes x after step i: x = after(x, i)
    """
    visited = timesteps(num_steps)
    for i in tqdm(range(begin, num_steps), desc="denoising", unit="step", leave=None, disable=not progress):
        eps = predict(x, visited[i], i)
        noise = torch.randn(x.shape, generator=generator).to(x) if eta else None
        x = ddim_step(x, eps, abar[visited[i]], abar[next_timestep(visited[i], num_steps)], eta, noise)
        if after is not None:
            x = after(x, i)
    return x


def next_timestep(t: int, num_steps: int) -> int:
    """Return the timestep that a step from t leads to; the last one leads to 0, as in Stable Diffusion, not to abar = 1."""
    return max(t - NUM_TRAIN_TIMESTEPS // num_steps, 0)
