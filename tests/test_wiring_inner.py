"""The inner optimizer in `BetaVAE`: loss, gradient, evaluation and pictures, step by step."""

from functools import partial

import pytest
import torch
from vae_reference import (
    F64,
    Normal,
    Z,
    kl,
    log_likelihood,
    make_batch,
    make_model,
    posterior,
    reference_loss,
)

from optgen.data.images import Batch
from optgen.inner import Refinement
from optgen.optim import Momentum
from optgen.schemes.elbo import BetaVAE
from optgen.testing import generator


def refined(model, x, eps, beta, clip, lr=0.02, momentum=0.5):
    """Return the posterior after steps of momentum on each image's own bound."""
    q = posterior(model, x)
    mean, log_var = (t.detach() for t in (q.loc, 2 * q.scale.log()))
    velocity = [torch.zeros_like(mean), torch.zeros_like(mean)]
    for noise in eps:
        leaf = [t.clone().requires_grad_() for t in (mean, log_var)]
        q = Normal(leaf[0], (leaf[1] / 2).exp())
        z = q.loc + q.scale * noise
        bounds = beta * kl(q).sum(1) - log_likelihood(model, x, z)
        g = torch.autograd.grad(bounds.sum(), leaf)
        if clip is not None:
            norm = (g[0].square().sum(1) + g[1].square().sum(1)).sqrt()
            shrink = (clip / norm).clamp(max=1)[:, None]
            g = [t * shrink for t in g]
        velocity = [momentum * v + t for v, t in zip(velocity, g)]
        mean, log_var = (t - lr * v for t, v in zip((mean, log_var), velocity))
    return Normal(mean, (log_var / 2).exp())


momentum_descent = partial(Momentum, lr=0.2, momentum=0.7)

REFINEMENTS = {
    "default": (lambda: Refinement(3), {"beta": 1.0, "clip": 5.0}),
    "all set": (
        lambda: Refinement(4, momentum_descent, beta=0.4, clip=0.5),
        {"beta": 0.4, "clip": 0.5, "lr": 0.2, "momentum": 0.7},
    ),
    "without a clip": (
        lambda: Refinement(2, momentum_descent, beta=3.0, clip=None),
        {"beta": 3.0, "clip": None, "lr": 0.2, "momentum": 0.7},
    ),
}


@pytest.mark.parametrize("name", REFINEMENTS)
def test_the_inner_optimizer_refines_loss_evaluation_and_reconstruction(name):
    make, settings = REFINEMENTS[name]
    model, x = make_model(), make_batch(2).x
    scheme = BetaVAE(model, 0.6, estimator="iwae", k=3, inner=make())
    steps = scheme.inner.steps
    noisy = scheme.draw(Batch(x))
    assert noisy.inner.shape == (7, steps, Z)
    q = refined(model, x, noisy.inner.transpose(0, 1), **settings)
    expected = reference_loss(model, x, noisy.eps.transpose(0, 1), "iwae", 0.6, q).mean()
    torch.testing.assert_close(scheme.loss(noisy), expected)

    fixed = torch.randn(steps, 7, Z, generator=generator(0), dtype=F64)
    q = refined(model, x, fixed, **settings)
    plain = posterior(model, x)
    assert (q.loc - plain.loc).abs().max() > 1e-3
    pictures = model.p_net(q.loc).sigmoid().view_as(x)
    torch.testing.assert_close(scheme.reconstruct(x), pictures.detach())

    found = scheme.evaluate([Batch(x)], seed=5)
    z = q.loc + q.scale * torch.randn(1, 7, Z, generator=generator(5), dtype=F64)
    distortion = -log_likelihood(model, x, z).mean().item()
    rate = kl(q).sum(1).mean().item()
    assert found["distortion"] == pytest.approx(distortion)
    assert found["rate"] == pytest.approx(rate)
    assert found["loss"] == pytest.approx(distortion + 0.6 * rate)


def test_a_refined_model_of_another_seed_takes_other_noise():
    model, x = make_model(), make_batch(2).x
    view = Refinement(3, momentum_descent, clip=None).refined_model(model, seed=8)
    noise = torch.randn(3, 7, Z, generator=generator(8), dtype=F64)
    q = refined(model, x, noise, 1.0, None, 0.2, 0.7)
    for _ in range(2):
        mean, log_var = view.encoder(x)
        torch.testing.assert_close(mean, q.loc)
        torch.testing.assert_close(log_var, 2 * q.scale.log())


@pytest.mark.parametrize("mode", ["graph", "adjoint", "difference", "first-order"])
def test_the_gradient_passes_the_inner_steps_as_its_mode_says(mode):
    model, x, h = make_model(), make_batch(2, 4).x, 1e-5
    scheme = BetaVAE(model, inner=Refinement(2, momentum_descent, clip=None, mode=mode))
    noisy = scheme.draw(Batch(x))
    params = list(model.parameters())
    found = torch.autograd.grad(scheme.loss(noisy), params)
    start = posterior(model, x)
    end = refined(model, x, noisy.inner.transpose(0, 1), 1.0, None, 0.2, 0.7)
    if mode == "first-order":  # the steps are a constant shift of the encoder's output
        shift = end.loc - start.loc.detach(), end.scale.log() - start.scale.log().detach()
        q = Normal(start.loc + shift[0], (start.scale.log() + shift[1]).exp())
        loss = reference_loss(model, x, noisy.eps.transpose(0, 1), "elbo", 1.0, q).mean()
        expected = torch.autograd.grad(loss, params)
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b)
        return
    rng = generator(3)
    directions = [torch.randn(p.shape, generator=rng, dtype=F64) for p in params]

    def loss_at(step):
        """Return the reference loss at weights moved along the directions."""
        for p, v in zip(params, directions):
            p.data.add_(step * v)
        q = refined(model, x, noisy.inner.transpose(0, 1), 1.0, None, 0.2, 0.7)
        loss = reference_loss(model, x, noisy.eps.transpose(0, 1), "elbo", 1.0, q).mean()
        for p, v in zip(params, directions):
            p.data.sub_(step * v)
        return loss.item()

    slope = (loss_at(h) - loss_at(-h)) / (2 * h)
    along = sum((g * v).sum() for g, v in zip(found, directions)).item()
    assert along == pytest.approx(slope, rel=1e-4)
