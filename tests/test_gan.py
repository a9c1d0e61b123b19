"""The GAN parts of the installed package: losses, optimal logits, networks, devices, dtypes."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from optgen.data.images import digits
from optgen.models.gan import (
    GAN_LOSSES,
    SILU_GAIN,
    ConvDiscriminator,
    ConvGenerator,
    MLPDiscriminator,
    MLPGenerator,
    Silu,
    optimal_logit,
)
from optgen.testing import check_gradient, generator, jacobian, raises

KINDS = {
    "mlp": lambda: (
        MLPGenerator(6, (32, 32), (1, 12, 12), "sigmoid"),
        MLPDiscriminator((1, 12, 12), (32, 32)),
    ),
    "conv": lambda: (ConvGenerator((1, 12, 12), 6, 8), ConvDiscriminator((1, 12, 12), 8)),
}
both = pytest.mark.parametrize("build", KINDS.values(), ids=KINDS.keys())
losses = pytest.mark.parametrize("loss", GAN_LOSSES)


def test_the_five_losses_are_there():
    assert set(GAN_LOSSES) == {
        "saturating",
        "non-saturating",
        "hinge",
        "wasserstein",
        "relativistic",
    }


@losses
def test_a_loss_says_whether_the_generator_sees_real_images(loss):
    fake = torch.randn(50, generator=generator(1), requires_grad=True)
    real = torch.randn(50, generator=generator(2), requires_grad=True)
    entry = GAN_LOSSES[loss]
    value = entry.generator(real, fake)
    (slope,) = torch.autograd.grad(value, real, materialize_grads=True, retain_graph=True)
    assert entry.sees_real == bool((slope != 0).any())
    if not entry.sees_real:
        assert torch.equal(entry.generator(None, fake), value)
    assert entry.summary


def mean_log(logit):
    """Return the mean log-probability of a logit."""
    return logit.sigmoid().log().mean()


@losses
def test_losses_by_their_definition(loss):
    r, f = (torch.randn(50, generator=generator(s), dtype=torch.float64) for s in (1, 2))
    d, g = {
        "saturating": (-mean_log(r) - mean_log(-f), mean_log(-f)),
        "non-saturating": (-mean_log(r) - mean_log(-f), -mean_log(f)),
        "wasserstein": (f.mean() - r.mean(), -f.mean()),
        "hinge": ((1 - r).clamp(min=0).mean() + (1 + f).clamp(min=0).mean(), -f.mean()),
        "relativistic": (-mean_log(r - f), -mean_log(f - r)),
    }[loss]
    assert torch.allclose(GAN_LOSSES[loss].discriminator(r, f), d)
    assert torch.allclose(GAN_LOSSES[loss].generator(r, f), g)


@pytest.mark.parametrize("loss", ["saturating", "non-saturating", "hinge", "relativistic"])
@pytest.mark.parametrize("seed", range(3))
def test_no_other_logits_do_better_than_the_optimal(loss, seed):
    counts = torch.randint(1, 9, (2, 4), generator=generator(seed))
    p, q = counts / counts.sum(1, keepdim=True).double()
    real, fake = (torch.arange(4).repeat_interleave(c) for c in counts)

    def value(t):
        """Return the loss of the discriminator with the logits `t` of the points."""
        r, f = t[real], t[fake]
        if loss == "relativistic":  # every pair
            r, f = r.repeat_interleave(len(f)), f.repeat(len(r))
        return GAN_LOSSES[loss].discriminator(r, f)

    best = optimal_logit(p, q, loss)
    for s in range(200):
        for size in (0.01, 1.0):
            other = best + size * torch.randn(4, generator=generator(s), dtype=torch.float64)
            assert value(best) <= value(other) + 1e-15
    if loss != "hinge":
        assert jacobian(value(best.requires_grad_()), best).abs().max() < 1e-15


def test_wasserstein_has_no_optimal_logit_at_a_point():
    with pytest.raises(ValueError, match="wasserstein"):
        optimal_logit(torch.ones(2), torch.ones(2), "wasserstein")


@losses
def test_a_discriminator_learns_digits_from_noise(loss):
    D, x = ConvDiscriminator(width=4), digits("train").images[:128] / 255
    optimizer = torch.optim.Adam(D.parameters(), lr=1e-3)
    noise = torch.rand(128, 1, 28, 28, generator=generator())
    for _ in range(60):
        optimizer.zero_grad()
        GAN_LOSSES[loss].discriminator(D(x), D(noise)).backward()
        optimizer.step()
    assert D(x).min() > D(noise).max()


@both
def test_an_example_has_one_logit_in_any_company(build):
    D = build()[1].double()
    x = torch.rand(5, 1, 12, 12, generator=generator(), dtype=torch.float64).requires_grad_()
    J = jacobian(D(x), x).view(5, 5, -1)
    assert (J[~torch.eye(5, dtype=bool)] == 0).all()
    assert (J[range(5), range(5)].abs().amax(1) > 0).all()
    for net in build():
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())


@both
def test_first_and_second_derivatives(build):
    G, D = (net.double() for net in build())
    z = torch.randn(3, 6, generator=generator(), dtype=torch.float64)
    weights = [next(G.parameters())[:2, :3].detach().clone().requires_grad_(), next(D.parameters())]

    def value():
        """Return the loss of the generator, with a corner of its first matrix replaced."""
        w = dict(G.named_parameters())
        name, first = next(iter(w.items()))
        w[name] = torch.cat([torch.cat([weights[0], first[:2, 3:]], 1), first[2:]])
        fake = D(torch.func.functional_call(G, w, z))
        return GAN_LOSSES["non-saturating"].generator(None, fake)

    def squared_gradient():
        """Return the squared norm of the gradient."""
        grads = torch.autograd.grad(value(), weights, create_graph=True)
        return sum(g.square().sum() for g in grads)

    if isinstance(D, ConvDiscriminator):
        check_gradient(value, weights)
        check_gradient(squared_gradient, weights)
    else:
        check_gradient(squared_gradient, weights[:1])


def test_hidden_layers_stand_between_noise_and_map_and_between_map_and_logit():
    torch.manual_seed(0)
    G = ConvGenerator((1, 9, 8), 3, 2, hidden=(5, 4)).double()
    D = ConvDiscriminator((1, 9, 8), 2, hidden=(6,)).double()
    h = z = torch.randn(7, 3, dtype=torch.float64)
    dense = [m for m in G.net if isinstance(m, nn.Linear)]
    assert [m.out_features for m in dense] == [5, 4, 2 * 4 * 4]
    for layer in dense:
        h = silu(h @ layer.weight.T + layer.bias)
    (conv,) = [m for m in G.net if isinstance(m, nn.ConvTranspose2d)]
    x = conv(h.view(7, 2, 4, 4)).sigmoid()
    torch.testing.assert_close(G(z), x)
    (down,) = [m for m in D.net if isinstance(m, nn.Conv2d)]
    first, last = [m for m in D.net if isinstance(m, nn.Linear)]
    h = silu(silu(down(2 * x - 1)).flatten(1) @ first.weight.T + first.bias)
    torch.testing.assert_close(D(x), (h @ last.weight.T + last.bias)[:, 0])


@pytest.mark.parametrize(
    "shape", [(1, 28, 28), (3, 28, 28), (3, 32, 32), (1, 8, 8), (1, 9, 31), (3, 64, 64)]
)
def test_any_size_from_eight(shape):
    x = ConvGenerator(shape, 5, 4)(torch.randn(2, 5))
    assert x.shape == (2, *shape) and x.min() >= 0 and x.max() <= 1
    assert ConvDiscriminator(shape, 4)(x).shape == (2,)
    assert MLPDiscriminator(shape, (7,))(x).shape == (2,)
    assert MLPGenerator(5, (7,), shape, "sigmoid")(torch.randn(2, 5)).shape == x.shape


def test_toy_examples_are_not_centered():
    D = MLPDiscriminator((2,), ()).double()
    x = torch.randn(4, 2, dtype=torch.float64)
    assert torch.allclose(D(x), (x @ D.net[-1].weight.T)[:, 0])
    assert MLPGenerator(3)(torch.randn(4, 3)).shape == (4, 2)


def test_images_are_centered():
    """Biases start at zero, so a gray image, the center, has the logit zero."""
    for D in (ConvDiscriminator(width=4), MLPDiscriminator((1, 28, 28))):
        assert (D(torch.full((2, 1, 28, 28), 0.5)) == 0).all()
        assert (D(torch.zeros(2, 1, 28, 28)) != 0).all()


def test_layers_start_with_variance_one():
    u = torch.randn(1_000_000, generator=generator(), dtype=torch.float64)
    y = (SILU_GAIN * Silu()(u)) ** 2
    assert abs(y.mean() - 1) < 5 * y.std() / 1000
    x = torch.randn(500, 300, generator=generator())
    for layer in list(MLPDiscriminator((300,), (600, 600)).net)[1:-1]:
        x = layer(x)
        if isinstance(layer, nn.Linear):
            assert abs(x.square().mean() - 1) < 0.15


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_weights_start_by_the_inputs_that_an_output_sums(seed):
    torch.manual_seed(seed)
    # Kernels of 4 x 4; a transposed one of stride 2 has a quarter of its taps on each output.
    generator_net = ConvGenerator((1, 16, 16), 30, 16).net
    discriminator_net = ConvDiscriminator((1, 16, 16), 16).net
    found = [m for net in (generator_net, discriminator_net) for m in net if hasattr(m, "weight")]
    gain = 1 / torch.nn.functional.silu(torch.randn(10**6)).square().mean().sqrt()
    expected = [1 / 30, gain**2 / (32 * 4), gain**2 / (16 * 4)]
    expected += [1 / 16, gain**2 / (16 * 16), gain**2 / (32 * 16)]
    for layer, variance in zip(found, expected, strict=True):
        w = layer.weight.double()
        error = (2 / w.numel()) ** 0.5
        assert abs(w.square().mean() / variance - 1) < 5 * error + 0.01
        assert not layer.bias.any()


def values(G, D, x, z):
    """Return both values of every loss, and the penalty R1."""
    x = x.clone().requires_grad_()
    r, f = D(x), D(G(z))
    r1 = torch.autograd.grad(r.sum(), x, create_graph=True)[0].square().mean()
    r1.backward(retain_graph=True)
    found = []
    for loss in GAN_LOSSES.values():
        found += [loss.discriminator(r, f), loss.generator(r, f)]
    return [*found, r1]


@both
def test_nothing_depends_on_a_value_on_meta(build):
    with torch.device("meta"):
        G, D = build()
        x, z = torch.rand(3, 1, 12, 12), torch.randn(3, 6)
    assert all(v.is_meta and v.dim() == 0 for v in values(G, D, x, z))


@both
def test_float64_and_autocast_agree(build):
    G, D = build()
    x, z = torch.rand(3, 1, 12, 12, generator=generator()), torch.randn(3, 6, generator=generator())
    single = values(G, D, x, z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = values(G, D, x, z)
    exact = values(G.double(), D.double(), x.double(), z.double())
    for e, s, h in zip(exact, single, half):
        assert e.dtype == torch.float64 and s.dtype == h.dtype == torch.float32
        assert torch.allclose(s.double(), e, rtol=1e-4, atol=1e-5)
        assert torch.allclose(h.double(), e, rtol=0.05, atol=0.05)


@pytest.mark.cuda
@both
def test_on_a_gpu_as_on_the_cpu(build):
    G, D = (net.double() for net in build())
    x, z = torch.rand(3, 1, 12, 12, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    here = values(G, D, x, z)
    there = values(G.cuda(), D.cuda(), x.cuda(), z.cuda())
    for a, b in zip(here, there):
        assert b.is_cuda
        assert math.isclose(a.item(), b.item(), rel_tol=1e-9, abs_tol=1e-12)


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda: ConvGenerator((1, 7, 28)), "8 x 8"),
        (lambda: ConvDiscriminator((1, 28, 4)), "8 x 8"),
        (lambda: ConvGenerator(width=0), "width"),
        (lambda: MLPGenerator(0), "z_dim"),
        (lambda: MLPDiscriminator((2,), (5, 0)), "hidden"),
        (lambda: MLPGenerator(2, out="tanh"), "'sigmoid'"),
        (lambda: ConvGenerator(width=2)(torch.randn(3, 5)), "(B, 64)"),
        (lambda: ConvDiscriminator(width=2)(torch.rand(3, 784)), "(1, 28, 28)"),
    ],
)
def test_bad_input_is_one_clear_error(call, word):
    with raises(ValueError, word):
        call()
