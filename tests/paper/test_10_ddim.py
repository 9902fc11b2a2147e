"""Sampling with DDIM: noise schedule, forward process, guidance and the DDIM step: each against its formula, in float64."""

import pytest
import torch
from closeness import assert_close

from minicn import ddim

pytestmark = pytest.mark.numbers


@pytest.fixture
def pair():
    """Clean latents, noise, more noise: standard normal, float64."""
    g = torch.Generator().manual_seed(3)
    return [torch.randn((2, 4, 3, 5), generator=g, dtype=torch.float64) for _ in range(3)]


def abar(t):
    return ddim.alphas_cumprod().double()[t]


# The schedule


@pytest.mark.parametrize(
    ("t", "value", "digits"), [(0, 0.99915, 5), (1, 0.9982960, 7), (951, 0.0081550, 7), (999, 0.0046601, 7)]
)
def test_alphas_cumprod_of_stable_diffusion(t, value, digits):
    """The published schedule at four steps, to every digit given."""
    assert round(ddim.alphas_cumprod()[t].item(), digits) == value


def test_alphas_cumprod_is_the_product_of_one_minus_beta():
    """abar_t is the product of 1 - beta, whose root goes evenly from that of 0.00085 to that of 0.012.

    In float64, then rounded to float32, once.
    """
    products, product = [], 1.0
    for t in range(1000):
        root = 0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * t / 999
        product *= 1 - root**2
        products.append(product)
    got = ddim.alphas_cumprod()
    assert torch.equal(got, torch.tensor(products, dtype=torch.float64).float())
    assert got.shape == (1000,)
    assert (got.diff() < 0).all()


# The steps


def test_timesteps_of_every_number_of_steps():
    """For S = 1..1000: S steps, 1000 // S apart, noisiest first, inside the schedule; they end at 1, for 1000 at 0."""
    for s in range(1, 1001):
        got = ddim.timesteps(s)
        end = 1 if s < 1000 else 0
        assert got == (torch.arange(s) * (1000 // s) + end).flip(0).tolist()
        assert len(got) == s
        assert all(a > b for a, b in zip(got, got[1:], strict=False))
        assert 0 <= got[-1] <= got[0] <= 999
        assert got[-1] == end


def test_timesteps_of_twenty_and_of_thirty():
    """20 steps visit 951, 901, ..., 1; 30 visit 958, 925, ..., 1 as in diffusers (ldm would take 31 from 991)."""
    assert ddim.timesteps(20)[:3] == [951, 901, 851]
    assert (ddim.timesteps(30)[0], ddim.timesteps(30)[1], len(ddim.timesteps(30))) == (958, 925, 30)


@pytest.mark.parametrize("s", [0, -1, 1001])
def test_timesteps_out_of_range_are_refused(s):
    """The error says the number and the range."""
    with pytest.raises(ValueError, match=f"num_steps is {s}, but the sampler takes 1 to 1000 steps"):
        ddim.timesteps(s)


# The forward process


def test_forward_process_eq4_of_ddpm(pair):
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, so from abar = 1 to pure noise at abar = 0, exactly."""
    x_0, eps, _ = pair
    a = abar(500)
    assert torch.equal(ddim.add_noise(x_0, eps, a), a**0.5 * x_0 + (1 - a) ** 0.5 * eps)
    assert torch.equal(ddim.add_noise(x_0, eps, torch.tensor(1.0)), x_0)
    assert torch.equal(ddim.add_noise(x_0, eps, torch.tensor(0.0)), eps)


def test_forward_process_takes_one_step_a_sample(pair):
    """abar_t of shape (B,) noises each sample by its own, exactly as one at a time does."""
    x_0, eps, _ = pair
    a = abar(torch.tensor([10, 900]))
    got = ddim.add_noise(x_0, eps, a)
    assert torch.equal(got, torch.stack([ddim.add_noise(x_0[i], eps[i], a[i]) for i in range(2)]))
    square = torch.randn(2, 2, 2, 2, dtype=torch.float64)  # every side 2: a wrong axis would not be seen by its shape
    got = ddim.add_noise(square, 0 * square, a)
    assert torch.equal(got, torch.stack([square[i] * a[i] ** 0.5 for i in range(2)]))


# Guidance


def test_guidance_of_zero_is_unconditional_and_of_one_conditional(pair):
    """eps_u + s (eps_c - eps_u): s = 0 is eps_u bit for bit, s = 1 is eps_c (bit for bit where no rounding occurs)."""
    u, c, _ = pair
    assert torch.equal(ddim.guide(u, c, 0.0), u)
    assert_close(ddim.guide(u, c, 1.0), c, 1e-14)
    u, c = (100 * u).round(), (100 * c).round()  # whole numbers subtract without rounding
    assert torch.equal(ddim.guide(u, c, 1.0), c)
    assert torch.equal(ddim.guide(u, c, 9.0), 9 * c - 8 * u)


def test_guidance_between_equal_predictions_changes_nothing(pair):
    """Where both predictions agree, every s gives them back, bit for bit."""
    u, *_ = pair
    assert all(torch.equal(ddim.guide(u, u.clone(), s), u) for s in (0.0, 1.0, 7.5, 9.0))


# The DDIM step


STEPS = [(999, 951), (951, 901), (901, 1), (51, 1), (2, 1), (1, 0)]


@pytest.mark.parametrize(("t", "s"), STEPS)
def test_a_step_with_the_true_noise_lands_on_the_forward_process(pair, t, s):
    """Eq. (12) with sigma 0: given the noise that was added, x_s is that of the forward process (1e-12 relative)."""
    x_0, eps, _ = pair
    x_t = ddim.add_noise(x_0, eps, abar(t))
    assert_close(ddim.ddim_step(x_t, eps, abar(t), abar(s)), ddim.add_noise(x_0, eps, abar(s)), 1e-12)


@pytest.mark.parametrize("t", [999, 500, 1])
def test_a_step_to_no_noise_returns_the_clean_latents(pair, t):
    """A step to abar = 1 is x_0 (1e-12 relative), with eta as without: sigma is 0 there."""
    x_0, eps, n = pair
    x_t = ddim.add_noise(x_0, eps, abar(t))
    one = torch.tensor(1.0, dtype=torch.float64)
    assert_close(ddim.ddim_step(x_t, eps, abar(t), one), x_0, 1e-12)
    assert_close(ddim.ddim_step(x_t, eps, abar(t), one, eta=1.0, noise=n), x_0, 1e-12)


def test_a_step_to_where_it_is_changes_nothing(pair):
    """With s = t the step is the identity (1e-12 relative)."""
    x_t, eps, _ = pair
    assert_close(ddim.ddim_step(x_t, eps, abar(500), abar(500)), x_t, 1e-12)


@pytest.mark.parametrize(("t", "s"), [(t, t - 1) for t in (999, 500, 2, 1)])
def test_eta_1_is_the_posterior_of_ddpm(pair, t, s):
    """Eq. (16) with eta = 1 between neighbours is DDPM's posterior q(x_s | x_t, x_0), arXiv:2006.11239 eqs. (6), (7).

    Mean: sqrt(abar_s) beta / (1 - abar_t) x_0 + sqrt(alpha) (1 - abar_s) / (1 - abar_t) x_t; variance:
    beta (1 - abar_s) / (1 - abar_t), where alpha = abar_t / abar_s and beta = 1 - alpha.
    """
    x_0, eps, n = pair
    a_t, a_s = abar(t), abar(s)
    alpha = a_t / a_s
    beta = 1 - alpha
    x_t = ddim.add_noise(x_0, eps, a_t)
    mean = ddim.ddim_step(x_t, eps, a_t, a_s, eta=1.0, noise=torch.zeros_like(n))
    want = a_s.sqrt() * beta / (1 - a_t) * x_0 + alpha.sqrt() * (1 - a_s) / (1 - a_t) * x_t
    assert_close(mean, want, 1e-12)
    sigma_n = ddim.ddim_step(x_t, eps, a_t, a_s, eta=1.0, noise=n) - mean
    assert_close(sigma_n, (beta * (1 - a_s) / (1 - a_t)).sqrt() * n, 1e-9)  # a difference of large numbers


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("t", "s"), STEPS)
def test_the_variance_is_preserved(t, s, eta):
    """For x_0, eps and new noise of variance 1 the step has the forward process' variance, for every eta.

    The step is linear, so its three coefficients are read off: abar_s on x_0, the other two make up 1 - abar_s.
    """
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)

    def step(x_0, eps, noise):
        return ddim.ddim_step(ddim.add_noise(x_0, eps, abar(t)), eps, abar(t), abar(s), eta, noise)

    clean, kept, new = step(one, zero, zero), step(zero, one, zero), step(zero, zero, one)
    assert_close(clean**2, abar(s)[None], 1e-12)
    assert_close(kept**2 + new**2, 1 - abar(s)[None], 1e-12)
    assert (new != 0) == (eta != 0)


def test_sigma_grows_linearly_with_eta(pair):
    """Eq. (16): sigma is proportional to eta; eta = 0 needs no noise and adds none."""
    x_t, eps, n = pair
    a_t, a_s = abar(951), abar(901)
    zero = torch.zeros_like(n)
    added = {
        eta: ddim.ddim_step(x_t, eps, a_t, a_s, eta, n) - ddim.ddim_step(x_t, eps, a_t, a_s, eta, zero)
        for eta in (0.0, 0.25, 0.5)
    }
    assert not added[0.0].any()
    assert_close(added[0.5], 2 * added[0.25], 1e-12)
    assert torch.equal(ddim.ddim_step(x_t, eps, a_t, a_s), ddim.ddim_step(x_t, eps, a_t, a_s, 0.0, n))
