"""What tests share: the paper's letters read off a tensor, layers by their formulas, parameters compared, modules heard."""

import math

import torch


def rows(t):
    """Read a map (B, C, H, W) or tokens (B, N, C) as (positions, channels)."""
    return t.movedim(1, -1).reshape(-1, t.shape[1]) if t.ndim == 4 else t.reshape(-1, t.shape[-1])


def weight(z):
    """W as the matrix (out, in) of eq. (5)."""
    return z.weight.reshape(z.weight.shape[0], -1)


def by_hand(z, inputs):
    """Eq. (5), in the shape of the layer's own output."""
    out = rows(inputs) @ weight(z).T + z.bias
    if inputs.ndim == 3:
        return out.reshape(*inputs.shape[:2], -1)
    b, _, h, w = inputs.shape
    return out.reshape(b, h, w, -1).movedim(-1, 1)


def normed(x, module, groups, eps):
    """Group normalisation, as its definition says."""
    parts = x.reshape(len(x), groups, -1)
    mean, var = parts.mean(-1, keepdim=True), parts.var(-1, unbiased=False, keepdim=True)
    parts = ((parts - mean) / (var + eps).sqrt()).reshape(x.shape)
    return parts * module.weight[:, None, None] + module.bias[:, None, None]


def attention(q, k, v, heads, mask=None):
    """softmax(q k^T / sqrt(d)) v, head by head; (B, N, C) each."""
    results, d = [], q.shape[-1] // heads
    for i in range(heads):
        part = slice(i * d, (i + 1) * d)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(d)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        results.append(scores.softmax(-1) @ v[..., part])
    return torch.cat(results, -1)


def tensors(module):
    """Copies of every parameter and buffer."""
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def dezero(module, std=0.05, seed=1):
    """Give every parameter that is all zero normal values of this standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if not p.any():
                p.copy_(std * torch.randn(p.shape, generator=generator))
    return module


def filled(module):
    """Give every parameter normal values, in float64, so that none is neutral."""
    generator = torch.Generator().manual_seed(5)
    module = module.double().eval().requires_grad_(False)
    for p in module.parameters():
        p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return module


def normal(*shape):
    """Normal values in float64, the same at each call."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))


def randomise(net, seed=5):
    """Move every parameter away from where it starts, so that nothing is zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    return net


def random_control(net, b, seed=6):
    g = torch.Generator().manual_seed(seed)
    shapes = [c.shape for c in net(b.x, b.hint, b.timesteps, b.context)]
    return [torch.randn(shape, generator=g).to(b.x.dtype) for shape in shapes]


def inputs_of(modules, run):
    """Run, and return the first argument that each module got."""
    seen = []
    handles = [m.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach())) for m in modules]
    run()
    for handle in handles:
        handle.remove()
    return seen


def outputs_of(modules, run):
    """Run, and return what each module gave, with its graph."""
    seen = []
    handles = [m.register_forward_hook(lambda _m, _i, out: seen.append(out)) for m in modules]
    run()
    for handle in handles:
        handle.remove()
    return seen


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
