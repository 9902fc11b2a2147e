"""Section 3.1, eqs. (5) to (8): the zero convolution, its gradients, and its first step, by autograd and by hand.

Letters as in the paper: Z(I)_{p,i} = B_i + sum_j I_{p,j} W_{i,j}; G = dL/dZ for some loss L. "p" runs over every
position of every sample, so a map (B, C, H, W) is read as rows (B*H*W, C), tokens (B, N, C) as (B*N, C).
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from by_hand import by_hand, features, loss_of, outputs_of, rows, weight, zero_convs
from closeness import assert_close
from torch import nn

from minicn import zero_conv

pytestmark = pytest.mark.numbers
LR = 0.1


def test_eq5_a_fresh_zero_convolution_gives_zero(single):
    """Eq. (5) with W = B = 0: the output is zero, bit for bit, whatever comes in."""
    z, inputs, _ = single
    assert not any(p.any() for p in z.parameters())
    assert not z(1e3 * inputs).any()


def test_eq5_is_the_bias_plus_the_weighted_sum_of_the_channels(single):
    """Eq. (5): Z(I)_{p,i} = B_i + sum_j I_{p,j} W_{i,j}, written out in loops."""
    z, inputs, _ = single
    for p in z.parameters():
        nn.init.normal_(p)
    got, ins = rows(z(inputs)), rows(inputs)
    for p in range(ins.shape[0]):
        for i in range(5):
            want = z.bias[i] + sum(ins[p, j] * weight(z)[i, j] for j in range(3))
            assert abs(got[p, i] - want) < 1e-12


def test_eq5_control_is_the_zero_convolutions_of_the_features(whole, dezero):
    """Eq. (5) at all 13 places: control_i = B_i + sum_j h_j W_ij, and the first h holds the hint, E(c) of eq. (9)."""
    _, net, b = whole
    dezero(net, std=0.5)
    control, h = features(net, b)
    for z, c, ins in zip(zero_convs(net), control, h, strict=True):
        assert_close(c, by_hand(z, ins))
    first = outputs_of([net.input_blocks[0]], lambda: net(b.x, b.hint, b.timesteps, b.context))[0]
    assert_close(h[0] - first, net.input_hint_block(b.hint))


def test_eq6_jacobian_at_zero(single):
    """Eq. (6), entry by entry at W = B = 0.

    dZ_{p,i}/dB_k = [i = k]; dZ_{p,i}/dI_{q,j} = [p = q] W_{i,j} = 0; dZ_{p,i}/dW_{k,j} = [i = k] I_{p,j}, not zero.
    """
    z, inputs, _ = single
    n = rows(inputs).shape[0]

    def f(bias, weights, ins):
        out = torch.func.functional_call(z, {"bias": bias, "weight": weights}, (ins,))
        return rows(out)

    d_bias, d_weight, d_input = torch.autograd.functional.jacobian(f, (z.bias, z.weight, inputs))
    one = torch.eye(5, dtype=torch.float64)
    assert torch.equal(d_bias, one.expand(n, 5, 5))
    want = torch.einsum("ik,pj->pikj", one, rows(inputs))
    assert torch.equal(d_weight.reshape(n, 5, 5, 3), want)
    assert want.any()
    assert not d_input.any()


def test_eq6_input_gradient_is_the_weight(single):
    """Eq. (6) before W is set to zero: dZ_{p,i}/dI_{q,j} = [p = q] W_{i,j}, and nothing across positions."""
    z, inputs, _ = single
    nn.init.normal_(z.weight)
    n = rows(inputs).shape[0]
    d_input = torch.autograd.functional.jacobian(lambda ins: rows(z(ins)), inputs)
    d_input = d_input.movedim(3, -1) if inputs.ndim == 4 else d_input  # channels last
    got = d_input.reshape(n, 5, n, 3)
    want = torch.einsum("pq,ij->piqj", torch.eye(n, dtype=torch.float64), weight(z).detach())
    assert_close(got, want)


def test_eq6_loss_gradients_sum_over_the_positions(single):
    """Eq. (6) chained with G = dL/dZ: dL/dB_i = sum_p G_{p,i}; dL/dW_{i,j} = sum_p G_{p,i} I_{p,j}; dL/dI = 0."""
    z, inputs, g = single
    inputs.requires_grad_()
    z(inputs).backward(g)
    assert_close(z.bias.grad, sum(rows(g)))
    assert_close(weight_grad := z.weight.grad.reshape(5, 3), torch.einsum("pi,pj->ij", rows(g), rows(inputs.detach())))
    assert weight_grad.all()
    assert not inputs.grad.any()


def test_eq6_holds_for_the_3x3_zero_convolution():
    """Eq. (6) for the one zero convolution of 3x3 (in the hint encoder): I_{p,j} becomes its 9 neighbours."""
    z = zero_conv(3, 5, kernel_size=3).double()
    inputs = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    out = z(inputs)
    assert out.shape == (2, 5, 4, 5)
    assert not out.any()
    g = torch.randn_like(out)
    out.backward(g)
    patches = F.unfold(inputs.detach(), 3, padding=1)  # (B, 3*9, positions)
    assert_close(z.weight.grad, torch.einsum("bip,bjp->ij", g.flatten(2), patches).reshape(5, 3, 3, 3))
    assert_close(z.bias.grad, g.sum((0, 2, 3)))
    assert not inputs.grad.any()


def test_eq6_only_the_outer_zero_convolution_has_a_gradient_at_first(controlled):
    """Eq. (6) at T_z2, whose I is F(x; T); all that stands behind it, T_c and T_z1, has a gradient of zero.

    The gradient of x is the locked block's own: deep features see no noise.
    """
    original, net, x, c, args = controlled
    net.eval()
    x.requires_grad_()
    y = net(x, c, *args)
    g = torch.randn_like(y)
    y.backward(g)
    f = original(x, *args)
    assert_close(net.zero_out.weight.grad.reshape(g_rows := rows(g).shape[1], g_rows), rows(g).T @ rows(f.detach()))
    assert_close(net.zero_out.bias.grad, rows(g).sum(0))
    assert not any(p.grad.any() for p in [*net.copy.parameters(), *net.zero_in.parameters()])
    assert torch.equal(x.grad, torch.autograd.grad(f, x, g)[0])


def test_eq6_gradients_of_all_thirteen_zero_convolutions(whole):
    """Eq. (6): with G_i = dL/dcontrol_i through the locked U-Net, dL/dW_i = G_i^T h_i and dL/dB_i = sum_p G_i.

    Everything else in the ControlNet has a gradient of exactly zero at this step.
    """
    unet, net, b = whole
    control, h = features(net, b)
    loss_of(unet, b, control).backward()
    leaves = [torch.zeros_like(c).requires_grad_() for c in control]
    g = torch.autograd.grad(loss_of(unet, b, leaves), leaves)
    for z, g_i, h_i in zip(zero_convs(net), g, h, strict=True):
        assert_close(weight_grad := z.weight.grad.flatten(1), rows(g_i).T @ rows(h_i.detach()))
        assert weight_grad.any()
        assert_close(z.bias.grad, rows(g_i).sum(0))
    outer = {id(p) for z in zero_convs(net) for p in z.parameters()}
    assert not any(p.grad.any() for p in net.parameters() if id(p) not in outer)


def test_eq7_one_step_of_gradient_descent_is_a_matrix_product(single):
    """Eq. (7): after one step from zero, W* = -lr G^T I (a matmul, no Hadamard product) and B* = -lr sum_p G."""
    z, inputs, g = single
    optimizer = torch.optim.SGD(z.parameters(), lr=LR)
    z(inputs).backward(g)
    optimizer.step()
    assert_close(weight(z).detach(), -LR * rows(g).T @ rows(inputs))
    assert_close(z.bias.detach(), -LR * rows(g).sum(0))


def test_eq7_no_step_without_a_gradient_or_an_input(single):
    """Eq. (7) needs both factors: with I = 0 or G = 0 the weight stays zero (the paper's text names only I)."""
    z, inputs, g = single
    for ins, grad in ((0 * inputs, g), (inputs, 0 * g)):
        z.zero_grad()
        z(ins).backward(grad)
        assert not z.weight.grad.any()


def test_eq7_and_eq8_one_step_opens_the_way_to_the_copy(controlled):
    """Eqs. (7), (8): T_z2 becomes -lr G^T F(x), after which the gradient behind it is G W*, not zero."""
    original, net, x, c, args = controlled
    net.eval()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=LR)
    y = net(x, c, *args)
    g = torch.randn_like(y)
    y.backward(g)
    optimizer.step()
    optimizer.zero_grad()
    w = -LR * rows(g).T @ rows(original(x, *args).detach())
    assert_close(weight(net.zero_out).detach(), w)
    assert not any(p.any() for p in net.zero_in.parameters())  # the inner one has not moved yet

    y = net(x, c, *args)
    y.backward(g)
    # The copy still equals F, so its gradients are F's own for the gradient G W* behind it.
    behind = (rows(g) @ w).reshape(g.movedim(1, -1).shape).movedim(-1, 1) if g.ndim == 4 else g @ w
    x2 = x.clone().requires_grad_()
    wanted = copy.deepcopy(original).requires_grad_(True)
    wanted(x2, *args).backward(behind)
    for (name, got), want in zip(net.copy.named_parameters(), wanted.parameters(), strict=True):
        assert got.grad.any(), name
        assert_close(got.grad, want.grad, rtol=1e-8)
    # Eq. (6) again, now for the inner zero convolution: its I is the condition.
    assert_close(
        net.zero_in.weight.grad.reshape(x.shape[1] if x.ndim == 4 else x.shape[2], -1),
        rows(x2.grad).T @ rows(c),
        rtol=1e-8,
    )


def test_eq7_and_eq8_one_step_opens_all_thirteen_connections(whole):
    """Eqs. (7), (8): W_i* = -lr G_i^T h_i; then dL/dh_i = G_i W_i*, so the copy behind has a gradient."""
    unet, net, b = whole
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    control, h = features(net, b)
    for c in control:
        c.retain_grad()
    loss_of(unet, b, control).backward()
    optimizer.step()
    optimizer.zero_grad()
    for z, c, h_i in zip(zero_convs(net), control, h, strict=True):
        assert_close(weight(z).detach(), -LR * rows(c.grad).T @ rows(h_i.detach()))

    control, h = features(net, b)
    for t in (*control, *h):
        t.retain_grad()
    loss_of(unet, b, control).backward()
    assert_close(rows(h[-1].grad), rows(control[-1].grad) @ weight(net.middle_block_out[0]).detach())
    for module in (net.time_embed, net.input_blocks, net.middle_block):
        for name, p in module.named_parameters():
            assert p.grad.any(), name


def test_eq8_after_one_step_the_input_has_a_gradient(single):
    """Eq. (8): dZ_{p,i}/dI_{p,j} = W*_{i,j}, no longer zero: what stands behind can learn now."""
    z, inputs, g = single
    inputs.requires_grad_()
    optimizer = torch.optim.SGD(z.parameters(), lr=LR)
    z(inputs).backward(g)
    assert not inputs.grad.any()
    optimizer.step()
    g2 = torch.randn_like(g)
    z(inputs).backward(g2)
    assert inputs.grad.all()
    assert_close(rows(inputs.grad), rows(g2) @ (-LR * rows(g).T @ rows(inputs.detach())))
