"""A small VAE and its densities in plain torch, from `torch.distributions`: references of tests."""

import math

import torch
from torch import nn

from optgen.data.images import Batch
from optgen.models.vae import VAE
from optgen.testing import generator

F64, Z = torch.float64, 2
Normal, Bernoulli = torch.distributions.Normal, torch.distributions.Bernoulli


class DropoutVAE(VAE):
    """A VAE whose encoder drops units in training."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.q_net.insert(1, nn.Dropout(0.5))


def make_model(seed=0, kind=VAE):
    """Return a small VAE of six pixels with seeded weights, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(6, 5, 4, Z).to(F64)
    for p in model.parameters():
        p.data.mul_(3)
    return model


def make_batch(seed=0, n=7):
    """Return binary images."""
    return Batch(torch.randint(2, (n, 1, 2, 3), generator=generator(seed)).to(F64))


def posterior(model, x):
    """Return the encoder's distribution."""
    mean, log_var = model.q_net(x.flatten(1)).chunk(2, 1)
    return Normal(mean, (log_var / 2).exp())


def log_likelihood(model, x, z):
    """Return log p(x | z) of black and white or, where there is a variance, of gray pixels."""
    logits = model.p_net(z)
    if hasattr(model, "variance"):
        return Normal(logits.sigmoid(), model.variance.sqrt()).log_prob(x.flatten(1)).sum(-1)
    return Bernoulli(logits=logits).log_prob(x.flatten(1).expand_as(logits)).sum(-1)


def log_prior(z):
    """Return log p(z) of each latent."""
    return Normal(torch.zeros_like(z), 1.0).log_prob(z)


def kl(q):
    """Return the KL divergence of each latent to the prior."""
    return torch.distributions.kl_divergence(q, Normal(torch.zeros_like(q.loc), 1.0))


def reference_loss(model, x, eps, estimator, beta, q=None):
    """Return the loss of each image, (B,); the bound's value, with autograd's own gradient."""
    q = posterior(model, x) if q is None else q
    z = q.loc + q.scale * eps  # (k, B, z_dim)
    log_p = log_likelihood(model, x, z)
    if estimator == "elbo":
        return -log_p.mean(0) + (beta * kl(q)).sum(-1)
    log_w = log_p + (beta * (log_prior(z) - q.log_prob(z))).sum(-1)
    if estimator == "stl":
        return -log_w.mean(0)
    return math.log(len(eps)) - log_w.logsumexp(0)


def record_draws(scheme):
    """Return a list that receives what the scheme draws."""
    drawn, draw = [], scheme.draw

    def recording_draw(batch):
        """Draw the noise and keep it."""
        drawn.append(draw(batch))
        return drawn[-1]

    scheme.draw = recording_draw
    return drawn
