"The GAN parts of the installed package: losses and their optimal discriminators, networks, shapes, devices and dtypes."

import math

import pytest
import torch
from conftest import rng
from torch import nn

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
from optgen.testing import check_gradient, jacobian

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
def test_losses_by_their_definition(loss):
    r, f = (torch.randn(50, generator=rng(s), dtype=torch.float64) for s in (1, 2))
    log = lambda logit: logit.sigmoid().log().mean()
    d, g = {
        "saturating": (-log(r) - log(-f), log(-f)),
        "non-saturating": (-log(r) - log(-f), -log(f)),
        "wasserstein": (f.mean() - r.mean(), -f.mean()),
        "hinge": ((1 - r).clamp(min=0).mean() + (1 + f).clamp(min=0).mean(), -f.mean()),
        "relativistic": (-log(r - f), -log(f - r)),
    }[loss]
    assert torch.allclose(GAN_LOSSES[loss][0](r, f), d) and torch.allclose(
        GAN_LOSSES[loss][1](r, f), g
    )


@pytest.mark.parametrize("loss", ["saturating", "non-saturating", "hinge", "relativistic"])
@pytest.mark.parametrize("seed", range(3))
def test_no_other_logits_do_better_than_the_optimal(loss, seed):
    counts = torch.randint(1, 9, (2, 4), generator=rng(seed))
    p, q = counts / counts.sum(1, keepdim=True).double()
    real, fake = (torch.arange(4).repeat_interleave(c) for c in counts)

    def value(t):
        r, f = t[real], t[fake]
        return GAN_LOSSES[loss][0](
            *((r.repeat_interleave(len(f)), f.repeat(len(r))) if loss == "relativistic" else (r, f))
        )

    best = optimal_logit(p, q, loss)
    for s in range(200):
        for size in (0.01, 1.0):
            assert (
                value(best)
                <= value(best + size * torch.randn(4, generator=rng(s), dtype=torch.float64))
                + 1e-15
            )
    if loss != "hinge":
        assert jacobian(value(best.requires_grad_()), best).abs().max() < 1e-15


def test_wasserstein_has_no_optimal_logit_at_a_point():
    with pytest.raises(ValueError, match="wasserstein"):
        optimal_logit(torch.ones(2), torch.ones(2), "wasserstein")


@losses
def test_a_discriminator_learns_digits_from_noise(loss):
    D, x = ConvDiscriminator(width=4), digits("train").images[:128] / 255
    opt, noise = (
        torch.optim.Adam(D.parameters(), lr=1e-3),
        torch.rand(128, 1, 28, 28, generator=rng()),
    )
    for _ in range(60):
        opt.zero_grad()
        GAN_LOSSES[loss][0](D(x), D(noise)).backward()
        opt.step()
    assert D(x).min() > D(noise).max()


@both
def test_an_example_has_one_logit_in_any_company(build):
    D = build()[1].double()
    x = torch.rand(5, 1, 12, 12, generator=rng(), dtype=torch.float64).requires_grad_()
    J = jacobian(D(x), x).view(5, 5, -1)
    assert (J[~torch.eye(5, dtype=bool)] == 0).all() and (
        J[range(5), range(5)].abs().amax(1) > 0
    ).all()
    assert not any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) for net in build() for m in net.modules()
    )


@both
def test_first_and_second_derivatives(build):
    G, D = (net.double() for net in build())
    z = torch.randn(3, 6, generator=rng(), dtype=torch.float64)
    weights = [next(G.parameters())[:2, :3].detach().clone().requires_grad_(), next(D.parameters())]

    def value():
        w = dict(G.named_parameters())
        name, first = next(iter(w.items()))
        w[name] = torch.cat([torch.cat([weights[0], first[:2, 3:]], 1), first[2:]])
        return GAN_LOSSES["non-saturating"][1](None, D(torch.func.functional_call(G, w, z)))

    if isinstance(D, ConvDiscriminator):
        check_gradient(value, weights)
        check_gradient(
            lambda: sum(
                g.square().sum() for g in torch.autograd.grad(value(), weights, create_graph=True)
            ),
            weights,
        )
    else:
        check_gradient(
            lambda: sum(
                g.square().sum() for g in torch.autograd.grad(value(), weights, create_graph=True)
            ),
            weights[:1],
        )


@pytest.mark.parametrize(
    "shape", [(1, 28, 28), (3, 28, 28), (3, 32, 32), (1, 8, 8), (1, 9, 31), (3, 64, 64)]
)
def test_any_size_from_eight(shape):
    x = ConvGenerator(shape, 5, 4)(torch.randn(2, 5))
    assert x.shape == (2, *shape) and x.min() >= 0 and x.max() <= 1
    assert ConvDiscriminator(shape, 4)(x).shape == (2,) and MLPDiscriminator(shape, (7,))(
        x
    ).shape == (2,)
    assert MLPGenerator(5, (7,), shape, "sigmoid")(torch.randn(2, 5)).shape == x.shape


def test_toy_examples_are_taken_as_they_are():
    D = MLPDiscriminator((2,), ()).double()
    x = torch.randn(4, 2, dtype=torch.float64)
    assert torch.allclose(D(x), (x @ D.net[-1].weight.T)[:, 0]) and MLPGenerator(3)(
        torch.randn(4, 3)
    ).shape == (4, 2)


def test_images_are_centred():
    "Biases start at zero, so a grey image, the centre, has the logit zero."
    for D in (ConvDiscriminator(width=4), MLPDiscriminator((1, 28, 28))):
        assert (D(torch.full((2, 1, 28, 28), 0.5)) == 0).all() and (
            D(torch.zeros(2, 1, 28, 28)) != 0
        ).all()


def test_layers_start_with_variance_one():
    u = torch.randn(1_000_000, generator=rng(), dtype=torch.float64)
    y = (SILU_GAIN * Silu()(u)) ** 2
    assert abs(y.mean() - 1) < 5 * y.std() / 1000
    x = torch.randn(500, 300, generator=rng())
    for layer in list(MLPDiscriminator((300,), (600, 600)).net)[1:-1]:
        x = layer(x)
        if isinstance(layer, nn.Linear):
            assert abs(x.square().mean() - 1) < 0.15


def values(G, D, x, z):
    x = x.clone().requires_grad_()
    r, f = D(x), D(G(z))
    r1 = torch.autograd.grad(r.sum(), x, create_graph=True)[0].square().mean()
    r1.backward(retain_graph=True)
    return [l(r, f) for pair in GAN_LOSSES.values() for l in pair] + [r1]


@both
def test_meta_has_nothing_to_peek_at(build):
    with torch.device("meta"):
        G, D = build()
    assert all(
        v.is_meta and v.dim() == 0
        for v in values(
            G, D, torch.rand(3, 1, 12, 12, device="meta"), torch.randn(3, 6, device="meta")
        )
    )


@both
def test_float64_and_autocast_agree(build):
    G, D = build()
    x, z = torch.rand(3, 1, 12, 12, generator=rng()), torch.randn(3, 6, generator=rng())
    single = values(G, D, x, z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = values(G, D, x, z)
    exact = values(G.double(), D.double(), x.double(), z.double())
    for e, s, h in zip(exact, single, half):
        assert e.dtype == torch.float64 and s.dtype == h.dtype == torch.float32
        assert torch.allclose(s.double(), e, rtol=1e-4, atol=1e-5) and torch.allclose(
            h.double(), e, rtol=0.05, atol=0.05
        )


@pytest.mark.cuda
@both
def test_on_a_gpu_as_on_the_cpu(build):
    G, D = (net.double() for net in build())
    x, z = torch.rand(3, 1, 12, 12, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    here = values(G, D, x, z)
    there = values(G.cuda(), D.cuda(), x.cuda(), z.cuda())
    assert all(
        b.is_cuda and math.isclose(a.item(), b.item(), rel_tol=1e-9, abs_tol=1e-12)
        for a, b in zip(here, there)
    )


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
def test_bad_input_is_told(call, word):
    with pytest.raises(ValueError) as e:
        call()
    assert word in str(e.value)
