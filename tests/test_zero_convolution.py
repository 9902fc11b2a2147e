"""The mathematics of the zero convolution: eqs. (2) to (8) of arXiv:2302.05543v1, by autograd and by hand.

Letters as in the paper: Z(I)_{p,i} = B_i + sum_j I_{p,j} W_{i,j}; G = dL/dZ for some loss L. "p" runs over every
position of every sample, so a map (B, C, H, W) is read as rows (B*H*W, C), tokens (B, N, C) as (B*N, C).
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import outputs_of
from torch import nn

from minicn import ControlledBlock, ControlNet, hint_encoder, zero_conv, zero_linear
from minicn.unet import ResBlock, TransformerBlock

LR = 0.1


def rows(t):
    """Read a map (B, C, H, W) or tokens (B, N, C) as (positions, channels)."""
    return t.movedim(1, -1).reshape(-1, t.shape[1]) if t.ndim == 4 else t.reshape(-1, t.shape[-1])


def assert_close(got, want, rtol=1e-10):
    """Compare relative to the largest value of what is wanted, which must not be all zero."""
    assert got.shape == want.shape
    scale = want.abs().max().item()
    assert scale > 0
    assert (got - want).abs().max().item() <= rtol * scale


def tensors(module):
    """Copies of every parameter and buffer."""
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# One zero convolution


KINDS = {  # what makes it, and its input: 3 channels in, 5 out
    "map": (zero_conv, (2, 3, 4, 5)),
    "tokens": (zero_linear, (2, 7, 3)),
}


@pytest.fixture(params=KINDS)
def single(request):
    """A fresh zero convolution Z, an input I and a gradient G behind it, in float64."""
    make, shape = KINDS[request.param]
    z = make(3, 5).double()
    inputs = torch.randn(shape, dtype=torch.float64)
    return z, inputs, torch.randn_like(z(inputs))


def weight(z):
    """W as the matrix (out, in) of eq. (5)."""
    return z.weight.reshape(z.weight.shape[0], -1)


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


# Eq. (2) for any block


def res_block():
    return ResBlock(4, 6, emb_dim=10, groups=2), zero_conv, 4, 6, ((3, 4, 5, 6), (3, 10))


def conv_bn_relu():
    block = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
    nn.init.normal_(block[1].running_mean, std=0.2)
    nn.init.uniform_(block[1].running_var, 0.5, 1.5)
    return block, zero_conv, 4, 6, ((3, 4, 5, 6),)


def transformer():
    return TransformerBlock(8, context_dim=12, heads=2), zero_linear, 8, None, ((3, 5, 8), (3, 7, 12))


BLOCKS = {f.__name__: f for f in (res_block, conv_bn_relu, transformer)}


@pytest.fixture(params=BLOCKS)
def controlled(request, dezero):
    """F as it was before (an independent copy), the controlled block, x, c and F's further arguments, in float64."""
    block, zero, c_in, c_out, shapes = BLOCKS[request.param]()
    dezero(block.double(), std=0.3)
    original = copy.deepcopy(block).eval()
    x, *args = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return original, ControlledBlock(block, c_in, c_out, zero).double(), x, torch.randn_like(x), args


def by_hand(z, inputs):
    """Eq. (5), in the shape of the layer's own output."""
    out = rows(inputs) @ weight(z).T + z.bias
    if inputs.ndim == 3:
        return out.reshape(*inputs.shape[:2], -1)
    b, _, h, w = inputs.shape
    return out.reshape(b, h, w, -1).movedim(-1, 1)


def test_eq2_is_the_block_plus_its_copy_between_zero_convolutions(controlled):
    """Eq. (2): y_c = F(x; T) + Z(F(x + Z(c; T_z1); T_c); T_z2), away from zero, each part written by hand."""
    original, net, x, c, args = controlled
    net.eval()
    with torch.no_grad():
        for p in [*net.copy.parameters(), *net.zero_in.parameters(), *net.zero_out.parameters()]:
            p.add_(0.3 * torch.randn_like(p))
    copied = copy.deepcopy(original)
    copied.load_state_dict(net.copy.state_dict())
    want = original(x, *args) + by_hand(net.zero_out, copied(x + by_hand(net.zero_in, c), *args))
    got = net(x, c, *args)
    assert_close(got, want)
    assert not torch.allclose(got, original(x, *args))
    assert not torch.allclose(got, net(x, 0 * c, *args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eq3_fresh_copy_sees_the_same_input_and_its_output_is_blocked(controlled, dtype):
    """Eq. (3), bit for bit: Z(c) = 0, so F(x + Z(c); T_c) = F(x; T), and Z of that is 0."""
    original, net, x, c, args = controlled
    original, net = original.to(dtype), net.to(dtype).eval()
    x, c, *args = (t.to(dtype) for t in (x, c, *args))
    seen = {}
    for name in ("zero_in", "copy", "zero_out"):
        getattr(net, name).register_forward_hook(lambda _m, ins, out, name=name: seen.update({name: (ins[0], out)}))
    net(x, c, *args)
    assert torch.equal(seen["zero_in"][0], c)
    assert not seen["zero_in"][1].any()
    assert torch.equal(seen["copy"][0], x)
    assert torch.equal(seen["copy"][1], original(x, *args))
    assert torch.equal(seen["zero_out"][0], original(x, *args))
    assert seen["zero_out"][0].any()
    assert not seen["zero_out"][1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [False, True])
def test_eq4_fresh_controlled_block_changes_nothing(controlled, dtype, training):
    """Eq. (4): y_c = y, bit for bit, in evaluation and in training mode."""
    original, net, x, c, args = controlled
    original, net = original.to(dtype), net.to(dtype).train(training)
    x, c, *args = (t.to(dtype) for t in (x, c, *args))
    assert torch.equal(net(x, c, *args), original(x, *args))


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


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_the_locked_block_never_changes(controlled, optimizer):
    """T is locked: three steps in training mode leave it, and batch norm's counts in it, bit for bit as they were."""
    original, net, x, c, args = controlled
    net.train()
    before, first = tensors(net.locked), tensors(net)
    optimizer = optimizer(net.parameters(), lr=0.01)  # given everything: what is locked has no gradient
    for _ in range(3):
        optimizer.zero_grad()
        net(x, c, *args).square().sum().backward()
        optimizer.step()
    assert same(tensors(net.locked), before)
    assert same(before, tensors(original))
    assert all(p.grad is None and not p.requires_grad for p in net.locked.parameters())
    changed = {name for name, t in tensors(net).items() if not torch.equal(t, first[name])}
    assert changed == {name for name in first if not name.startswith("locked.")}


def test_the_locked_batch_norm_does_not_count(dezero):
    """In training mode a forward moves the copy's running statistics, and the locked block's not at all."""
    block, *_ = conv_bn_relu()
    net = ControlledBlock(block, 4, 6).train()
    before = tensors(net)
    net(torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6))
    moved = {name for name, t in tensors(net).items() if not torch.equal(t, before[name])}
    assert moved == {f"copy.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert [net.training, net.copy.training, net.locked.training, net.locked[1].training] == [True, True, False, False]


def test_the_copy_shares_no_memory_with_the_locked_block(controlled):
    """T_c is a clone of T: equal values, other memory."""
    _, net, *_ = controlled
    assert same(tensors(net.copy), tensors(net.locked))
    places = [{p.data_ptr() for p in part.parameters()} for part in (net.copy, net.locked)]
    assert not places[0] & places[1]


# The whole network: 13 zero convolutions on the U-Net of Stable Diffusion


@pytest.fixture
def whole(unet, hint_channels, batch):
    """The locked U-Net, its fresh ControlNet and inputs, in float64."""
    unet = unet.double()
    return unet, ControlNet.from_unet(unet, hint_channels=hint_channels), batch.to(torch.float64)


def zero_convs(net):
    """The 13 zero convolutions whose outputs are the control."""
    return [*(z[0] for z in net.zero_convs), net.middle_block_out[0]]


def encoder(model):
    return [*model.input_blocks, model.middle_block]


def features(net, batch):
    """The 13 inputs of the zero convolutions: the copy's features, the first with the hint added."""
    seen = []
    handles = [z.register_forward_pre_hook(lambda _m, args: seen.append(args[0])) for z in zero_convs(net)]
    control = net(batch.x, batch.hint, batch.timesteps, batch.context)
    for handle in handles:
        handle.remove()
    return control, seen


def loss_of(unet, batch, control):
    return unet(batch.x, batch.timesteps, batch.context, control=control).square().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eq3_fresh_controlnet_computes_the_unets_own_features(unet, controlnet, batch, dtype):
    """Eq. (3) for the whole network, bit for bit: each of the copy's 13 blocks gives what the U-Net's block gives."""
    unet, net, b = unet.to(dtype), controlnet.to(dtype), batch.to(dtype)
    own = outputs_of(encoder(unet), lambda: unet(b.x, b.timesteps, b.context))
    copied = outputs_of(encoder(net), lambda: net(b.x, b.hint, b.timesteps, b.context))
    assert len(own) == len(copied) == 13
    for i, (a, c) in enumerate(zip(own, copied, strict=True)):
        assert torch.equal(a, c), i
    assert not net.input_hint_block(b.hint).any()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eq4_fresh_controlnet_changes_nothing(unet, controlnet, batch, dtype, training):
    """Eq. (4) for the whole network: while every zero convolution is zero, y_c equals y, bit for bit."""
    unet, net, b = unet.to(dtype), controlnet.to(dtype).train(training), batch.to(dtype)
    control = net(b.x, b.hint, b.timesteps, b.context)
    assert [c.abs().max().item() for c in control] == [0.0] * 13
    y = unet(b.x, b.timesteps, b.context)
    assert y.any()
    assert torch.equal(y, unet(b.x, b.timesteps, b.context, control=control))


def test_eq5_control_is_the_zero_convolutions_of_the_features(whole, dezero):
    """Eq. (5) at all 13 places: control_i = B_i + sum_j h_j W_ij, and the first h holds the hint, E(c) of eq. (9)."""
    _, net, b = whole
    dezero(net, std=0.5)
    control, h = features(net, b)
    for z, c, ins in zip(zero_convs(net), control, h, strict=True):
        assert_close(c, by_hand(z, ins))
    first = outputs_of([net.input_blocks[0]], lambda: net(b.x, b.hint, b.timesteps, b.context))[0]
    assert_close(h[0] - first, net.input_hint_block(b.hint))


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


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_training_changes_the_controlnet_alone(whole, optimizer):
    """Steps of the optimizer, given both networks, leave every tensor of the locked U-Net bit for bit as it was."""
    unet, net, b = whole
    unet.train()
    net.train()
    before, first = tensors(unet), tensors(net)
    optimizer = optimizer([*unet.parameters(), *net.parameters()], lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(unet, b, net(b.x, b.hint, b.timesteps, b.context)).backward()
        optimizer.step()
    assert same(tensors(unet), before)
    assert all(p.grad is None for p in unet.parameters())
    assert all(not torch.equal(t, first[name]) for name, t in tensors(net).items())


@pytest.mark.parametrize("channels", [(8, 16, 32, 64), (16, 32, 96, 256)])
@pytest.mark.parametrize("paper", [False, True])
def test_a_hint_arrives_at_the_end_of_the_hint_encoder(channels, paper):
    """The difference between two hints keeps its size up to the last layer, not as with PyTorch's own first weights.

    Those dim it several thousand times in the released encoder of eight layers.
    """
    torch.manual_seed(0)
    encoder, (a, b) = hint_encoder(32, channels, paper)[:-1], (torch.rand(2, 1, 3, 64, 64) > 0.9).float()

    def arrives():
        return ((encoder(a) - encoder(b)).norm() / encoder(a).numel() ** 0.5) / ((a - b).norm() / a.numel() ** 0.5)

    with torch.no_grad():
        assert (0.1 if paper else 0.02) < arrives() < 1
        for layer in encoder[::2]:
            layer.reset_parameters()
        assert arrives() < (0.1 if paper else 1 / 2000)
