"""Arguments out of range, one by one: refused by their name, or they work for a call.

A case has good arguments and what is done with the result. Each of its numbers is then replaced by
every value of `BAD`. The last test compares the table with the public functions of the package.
"""

import importlib
import inspect
import math
import pkgutil
import re

import numpy as np
import pytest
import torch
from torch import nn

import optgen
from optgen import (
    averaging,
    controllers,
    design,
    estimators,
    metrics,
    multipliers,
    named_controllers,
    posthoc,
    sample_quality,
)
from optgen.data import toy
from optgen.guidance import operators, restoration, rules
from optgen.inner import Refinement
from optgen.models import (
    adaptive,
    autoregressive,
    classifier,
    conditional,
    diffusion,
    features,
    flow,
    gan,
    labels,
    ladder,
    mixture,
    pixels,
    schedules,
    synthetic,
    tokens,
    vae,
)
from optgen.muon import Muon
from optgen.opponents import CompetitiveGradient, Unrolled
from optgen.optim import SGD, Adam, AdamW, Momentum, RMSProp
from optgen.rules import Clipped, Consensus, Feedback, Lookahead, SymplecticAdjustment
from optgen.schemes import levels
from optgen.schemes.denoising import DenoisingDiffusion
from optgen.schemes.elbo import Aggressive, BetaVAE
from optgen.schemes.likelihood import MaximumLikelihood
from optgen.search import (
    ask_tell,
    cma,
    covariances,
    diffusion_evolution,
    distributions,
    learned,
    tuning,
)
from optgen.testing import generator

BAD = {
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "2**64": 2**64,
    "10**400": 10**400,
    "1e39": 1e39,
    "-1": -1,
    "0": 0,
    "1": 1,
    "1.5": 1.5,
    "True": True,
    "'3'": "3",
    "None": None,
    "a list": [1],
    "1j": 1j,
    "numpy nan": np.float32("nan"),
    "numpy 2": np.int64(2),
    "numpy 0.5": np.float64(0.5),
    "tensor": torch.tensor(2),
    "tensor nan": torch.tensor(math.nan),
    "tensors": torch.ones(2),
}

X = torch.rand(4, 1, 4, 4, generator=generator(1))
FLAT = X.flatten(1)
SIGMA = torch.tensor([0.1, 1.0, 3.0, 0.5])
WEIGHT = torch.ones(3, 2)


def nothing(result):
    """Use nothing of a result."""


def update(controller):
    """Update a controller twice."""
    for _ in range(2):
        beta = controller.update(torch.tensor([1.0, 2.0]), torch.tensor(50.0))
    assert beta.isfinite().all()


def call(x):
    """Return a function that calls a module, whose output is finite."""

    def use(module):
        """Call it."""
        assert module(x).isfinite().all()

    return use


def mean_and_draw(model):
    """Encode and decode."""
    mean, _ = model.encoder(FLAT if model.x_dim == 16 and model.shape is None else X)
    assert model.decoder(mean).isfinite().all()


def finite(result):
    """Check that a result is finite."""
    values = result if isinstance(result, (tuple, list)) else [result]
    assert all(torch.as_tensor(v).isfinite().all() for v in values)


def draw_levels(schedule):
    """Draw levels of training and of a sampler."""
    drawn = schedule(torch.tensor([0.001, 0.5, 0.999]))
    assert drawn.isfinite().all() and (drawn > 0).all() and schedule.steps(3).isfinite().all()


def levels_walk(adaptive):
    """Draw and update."""
    u, density = adaptive.draw(6, torch.zeros(()), generator(2))
    adaptive.update(u, torch.rand(6))
    assert u.isfinite().all() and density.isfinite().all() and adaptive.shares().isfinite().all()


def profile_walk(profile):
    """Return weights of a few steps."""
    assert profile.weights(5).isfinite().all()


def log_prob(model):
    """Evaluate a density."""
    assert model.log_prob(X.round()).isfinite().all()


def flow_prob(model):
    """Evaluate a flow of 16 numbers, inside (0, 1)."""
    assert model.log_prob(FLAT * 0.8 + 0.1).isfinite().all()


def image_prob(model):
    """Evaluate a flow of images."""
    assert model.log_prob(X).isfinite().all()


def step(make):
    """Return a function that makes an optimizer of a matrix and takes a step."""

    def build(**options):
        """Build and step."""
        p = nn.Parameter(WEIGHT.clone())
        optimizer = make([p], **options)
        p.grad = torch.full_like(p, 0.1)
        optimizer.step()
        return p.detach()

    return build


def denoiser(**options):
    """Return a denoiser of 4 x 4 images."""
    return diffusion.Denoiser(diffusion.PerceptronDenoiser(16, 8, 1), (16,), **options)


def denoise(model):
    """Denoise four vectors."""
    assert model(FLAT, SIGMA).isfinite().all()


def unet(**options):
    """Return a U-Net of small images, without classes unless they are given."""
    return diffusion.UNet((1, 4, 4), **options)


def unet_call(net):
    """Call a U-Net."""
    labels = [torch.zeros(4, dtype=torch.int64)] if net.embedding.classes else []
    assert net(X, SIGMA.log() / 4, *labels).isfinite().all()


def shrink(y, sigma):
    """Return the denoised images of standard normal data."""
    return y / (1 + sigma.view(-1, *[1] * (y.dim() - 1)) ** 2)


def search_walk(found):
    """Take two steps of a search."""
    for _ in range(2):
        assert found.step(lambda x: x.square().flatten(1).sum(1)).isfinite().all()


def fitted_once(weights):
    """Take two steps of a search with these weights."""
    search_walk(distributions.Search(distributions.Gaussian(torch.ones(2)), weights))


def minimized(**options):
    """Minimize the square of two numbers."""
    square = {"objective": lambda x: x.square().sum(1), "x0": torch.ones(2)}
    return torch.tensor(cma.minimize(**square, **options).value)


def designed_by(method, budget=9, seed=0):
    """Design a few examples."""
    x = torch.rand(8, 16)
    scheme = BetaVAE(vae.VAE(16, 8, 8, 2))
    found = design.design(scheme, x, x.sum(1), lambda x: x.sum(1), budget, method, seed)
    assert found.values.isfinite().all()


def learned_bits(**options):
    """Return a learned distribution of four bits."""
    scheme = MaximumLikelihood(pixels.MADE((1, 2, 2), (8,)), "binary")
    return learned.Learned(scheme, **options)


VAE16 = vae.VAE(16, 8, 8, 2)
GAN16 = {"shape": (1, 4, 4), "hidden": (8,), "out": "sigmoid"}
HALF = torch.full((20, 3), 1 / 3)
COV = torch.eye(3, dtype=torch.float64)
IMAGES, SMALLER = torch.rand(2, 1, 4, 4), operators.Downsample((1, 4, 4), 2)
SEEN = operators.Observation(SMALLER, SMALLER.apply(IMAGES), 0.1)
DIFFUSION = DenoisingDiffusion(
    diffusion.Denoiser(diffusion.PerceptronDenoiser(16, 8, 1), (1, 4, 4)), pixels=False
)

# name: function, good numbers, what is done with the result.
CASES = {
    "averaging.Exponential": (averaging.Exponential, {"decay": 0.9, "warmup": 3.0}, profile_walk),
    "averaging.Power": (averaging.Power, {"gamma": 3.0}, profile_walk),
    "averaging.Power.of_width": (averaging.Power.of_width, {"width": 0.1}, profile_walk),
    "averaging.Average": (
        lambda **o: averaging.Average([torch.zeros(2)], **o),
        {"profile": 0.9},
        lambda a: a.update(),
    ),
    "controllers.Constant": (controllers.Constant, {"beta": 0.5}, update),
    "controllers.LinearWarmup": (
        controllers.LinearWarmup,
        {"steps": 3, "beta": 1.0, "start": 0.0},
        update,
    ),
    "controllers.Cyclical": (
        controllers.Cyclical,
        {"steps": 8, "cycles": 2, "ramp": 0.5, "beta": 1.0},
        update,
    ),
    "controllers.Capacity": (
        controllers.Capacity,
        {"target": 2.0, "steps": 3, "weight": 1.0, "start": 0.0},
        update,
    ),
    "controllers.FreeBits": (
        controllers.FreeBits,
        {"minimum": 0.1, "groups": 2, "beta": 1.0},
        update,
    ),
    "controllers.Geco": (
        controllers.Geco,
        {"target": 9.0, "rate": 1e-3, "smoothing": 0.9, "clip": 0.1, "low": 0.1, "high": 9.0},
        update,
    ),
    "controllers.ControlVAE": (
        controllers.ControlVAE,
        {"target": 9.0, "kp": 0.1, "ki": 0.1, "low": 0.1, "high": 9.0},
        update,
    ),
    "controllers.SigmaVAE": (controllers.SigmaVAE, {"dim": 6}, update),
    "multipliers.NuPI": (
        multipliers.NuPI,
        {"target": 2.0, "ki": 0.1, "kp": 0.1, "smoothing": 0.5, "low": 0.0, "high": 9.0},
        update,
    ),
    "multipliers.AugmentedLagrangian": (
        multipliers.AugmentedLagrangian,
        {"target": 2.0, "step": 0.1, "penalty": 0.1, "low": 0.0, "high": 9.0},
        update,
    ),
    "controllers.linear_ramp": (
        lambda **o: controllers.linear_ramp(torch.tensor(2), **o),
        {"steps": 5, "start": 0.0, "end": 1.0},
        finite,
    ),
    "controllers.calibrated_nll": (
        lambda **o: controllers.calibrated_nll(torch.tensor(2.0), **o),
        {"dim": 5},
        finite,
    ),
    "named_controllers.steps_of_epochs": (
        lambda **o: named_controllers.steps_of_epochs("warmup", **o),
        {"epochs": 2.0, "steps": 100, "epoch_steps": 10},
        nothing,
    ),
    "named_controllers.build_controller": (
        lambda **o: named_controllers.build_controller("warmup", **o),
        {"steps": 100, "epoch_steps": 10},
        update,
    ),
    "data.toy.ring_centers": (toy.ring_centers, {"modes": 3, "radius": 1.0}, finite),
    "data.toy.grid_centers": (toy.grid_centers, {"side": 3, "spacing": 1.0}, finite),
    "data.toy.ring_mixture": (
        toy.ring_mixture,
        {"n": 4, "modes": 3, "radius": 1.0, "std": 0.1},
        finite,
    ),
    "data.toy.grid_mixture": (
        toy.grid_mixture,
        {"n": 4, "side": 3, "spacing": 1.0, "std": 0.1},
        finite,
    ),
    "data.toy.two_moons": (toy.two_moons, {"n": 4, "noise": 0.1}, finite),
    "estimators.check_estimator": (
        lambda **o: estimators.check_estimator("iwae", **o),
        {"k": 3},
        nothing,
    ),
    "inner.Refinement": (Refinement, {"steps": 2, "beta": 1.0, "clip": 5.0}, nothing),
    "metrics.distortion": (lambda **o: metrics.distortion(VAE16, FLAT, **o), {"k": 2}, finite),
    "metrics.elbo": (lambda **o: metrics.elbo(VAE16, FLAT, **o), {"k": 2}, finite),
    "metrics.importance_nll": (
        lambda **o: metrics.importance_nll(VAE16, FLAT, **o).nll,
        {"k": 2, "chunk": 3},
        finite,
    ),
    "metrics.bits_per_dim": (lambda **o: metrics.bits_per_dim(3.0, **o), {"dim": 5}, finite),
    "metrics.active_units": (
        lambda **o: metrics.active_units([FLAT], **o),
        {"threshold": 0.1},
        finite,
    ),
    "metrics.mutual_information": (
        lambda **o: metrics.mutual_information(FLAT, FLAT, **o),
        {"k": 2, "chunk": 3},
        finite,
    ),
    "metrics.evaluate_vae": (
        lambda **o: metrics.evaluate_vae(VAE16, [FLAT], **o)["nll"],
        {"k": 2, "chunk": 3, "seed": 1, "threshold": 0.1, "information_images": 3},
        finite,
    ),
    "metrics.wilson_interval": (
        lambda **o: metrics.wilson_interval(1, **o),
        {"n": 5, "z": 1.9},
        finite,
    ),
    "metrics.measure_calibration": (
        lambda **o: metrics.measure_calibration(HALF, torch.zeros(20).long(), **o).ece,
        {"bins": 5},
        finite,
    ),
    "sample_quality.frechet_floor": (
        lambda **o: sample_quality.frechet_floor(COV, **o),
        {"n": 5, "m": 6},
        finite,
    ),
    "sample_quality.mode_coverage": (
        lambda **o: sample_quality.mode_coverage(torch.randn(9, 2), torch.zeros(1, 2), **o).share,
        {"std": 1.0, "max_sigmas": 3.0, "min_share": 0.01},
        finite,
    ),
    "sample_quality.label_coverage": (
        lambda **o: sample_quality.label_coverage(torch.tensor([0, 1]), **o),
        {"classes": 3},
        finite,
    ),
    "sample_quality.label_floor": (sample_quality.label_floor, {"n": 5, "classes": 3}, finite),
    "models.autoregressive.AutoregressiveVAE": (
        lambda **o: autoregressive.AutoregressiveVAE((1, 4, 4), **o),
        {"z_dim": 2, "hidden": 5, "width": 4, "radius": 2},
        mean_and_draw,
    ),
    "models.autoregressive.CausalDecoder": (
        autoregressive.CausalDecoder,
        {"pixels": 16, "z_dim": 2, "hidden": 5, "width": 4, "neighbors": 3},
        nothing,
    ),
    "models.autoregressive.SequenceVAE": (
        autoregressive.SequenceVAE,
        {"vocab": 9, "length": 4, "z_dim": 2, "embed": 3, "hidden": 4},
        nothing,
    ),
    "models.autoregressive.causal_window": (
        lambda **o: autoregressive.causal_window(X[:, 0], **o),
        {"radius": 2},
        finite,
    ),
    "models.classifier.Classifier": (
        lambda **o: classifier.Classifier((1, 8, 8), **o),
        {"classes": 3, "width": 4, "dim": 5, "dropout": 0.1},
        call(torch.rand(3, 1, 8, 8)),
    ),
    "models.classifier.Perceptron": (
        classifier.Perceptron,
        {"x_dim": 16, "classes": 3, "dropout": 0.1},
        nothing,
    ),
    "models.classifier.predict_classes": (
        lambda **o: classifier.predict_classes(nn.Linear(16, 3), FLAT, **o),
        {"batch_size": 3},
        finite,
    ),
    "models.conditional.ConditionalVAE": (
        conditional.ConditionalVAE,
        {"x_dim": 16, "classes": 3, "z_dim": 2, "hidden": 5},
        nothing,
    ),
    "models.diffusion.Denoiser": (denoiser, {"std": 1.0}, denoise),
    "models.diffusion.Embedding": (
        diffusion.Embedding,
        {"width": 4, "classes": 0, "n_frequencies": 3},
        nothing,
    ),
    "models.diffusion.PerceptronDenoiser": (
        diffusion.PerceptronDenoiser,
        {"x_dim": 16, "width": 4, "layers": 2, "classes": 0},
        nothing,
    ),
    "models.diffusion.ResidualBlock": (
        diffusion.ResidualBlock,
        {"inputs": 4, "outputs": 4, "width": 4, "dropout": 0.1},
        nothing,
    ),
    "models.diffusion.Attention": (diffusion.Attention, {"channels": 4}, nothing),
    "models.diffusion.UNet": (
        unet,
        {"channels": 4, "blocks": 1, "dropout": 0.1, "classes": 0},
        nothing,
    ),
    "models.diffusion.gaussian_log_prob": (
        lambda **o: diffusion.gaussian_log_prob(FLAT, **o),
        {"var": 1.0},
        finite,
    ),
    "models.diffusion.variational_bound": (
        lambda **o: diffusion.variational_bound(shrink, X, **o),
        {"low": 0.01, "high": 9.0, "std": 1.0, "n_levels": 2},
        finite,
    ),
    "models.diffusion.ode_log_prob": (
        lambda **o: diffusion.ode_log_prob(shrink, X, **o),
        {"low": 0.01, "high": 9.0, "std": 1.0, "steps": 2, "probes": 1},
        finite,
    ),
    "models.adaptive.dopri5": (
        lambda **o: adaptive.dopri5(shrink, X, [9.0, 0.1], **o),
        {"rtol": 0.1, "atol": 0.1},
        finite,
    ),
    "models.adaptive.adaptive_log_prob": (
        lambda **o: adaptive.adaptive_log_prob(shrink, X, **o),
        {"low": 0.01, "high": 9.0, "std": 1.0, "rtol": 0.1, "atol": 0.1, "probes": 1},
        finite,
    ),
    "models.features.compare": (
        lambda **o: features.compare(X, X, lambda x: x.flatten(1), **o),
        {"batch_size": 2},
        nothing,
    ),
    "models.labels.unit_vectors": (
        lambda **o: labels.unit_vectors(torch.tensor([0, 1]), like=X, **o),
        {"n_classes": 2},
        finite,
    ),
    "models.labels.ClassConditioned": (
        lambda **o: labels.ClassConditioned(nn.Identity(), (1, 4, 4), **o),
        {"n_classes": 2},
        nothing,
    ),
    "models.tokens.TokenLSTM": (
        tokens.TokenLSTM,
        {"vocab": 5, "embed": 3, "hidden": 4, "layers": 1, "dropout": 0.1},
        lambda model: finite(model.next_nats(torch.tensor([[0, 0]]))[0]),
    ),
    "models.diffusion.trace_directions": (
        lambda **o: diffusion.trace_directions(FLAT, generator=None, **o),
        {"probes": 1},
        nothing,
    ),
    "models.flow.bounded_log_scale": (
        lambda **o: flow.bounded_log_scale(FLAT, **o),
        {"max_log_scale": 2.0},
        finite,
    ),
    "models.flow.AffineCoupling": (
        lambda **o: flow.AffineCoupling(torch.ones(16), nn.Linear(16, 32), **o),
        {"max_log_scale": 2.0},
        nothing,
    ),
    "models.flow.MaskedAutoregressive": (
        flow.MaskedAutoregressive,
        {"x_dim": 16, "max_log_scale": 2.0},
        nothing,
    ),
    "models.flow.Logit": (flow.Logit, {"alpha": 0.05}, lambda t: finite(t(FLAT * 0.8 + 0.1))),
    "models.flow.perceptron": (
        lambda **o: flow.perceptron(hidden=(4,), **o),
        {"x_dim": 16},
        nothing,
    ),
    "models.flow.realnvp": (
        lambda **o: flow.realnvp(hidden=(4,), **o),
        {"x_dim": 16, "layers": 2, "max_log_scale": 2.0},
        nothing,
    ),
    "models.flow.maf": (
        lambda **o: flow.maf(hidden=(4,), **o),
        {"x_dim": 16, "layers": 2, "max_log_scale": 2.0},
        nothing,
    ),
    "models.flow.same_conv": (flow.same_conv, {"inputs": 1, "outputs": 2, "size": 3}, nothing),
    "models.flow.ResidualNet": (
        flow.ResidualNet,
        {"inputs": 1, "channels": 4, "blocks": 1},
        nothing,
    ),
    "models.flow.image_flow": (
        lambda **o: flow.image_flow((1, 4, 4), **o),
        {"scales": 1, "couplings": 1, "channels": 4, "blocks": 1, "max_log_scale": 2.0},
        image_prob,
    ),
    "models.gan.MLPGenerator": (lambda **o: gan.MLPGenerator(**GAN16, **o), {"z_dim": 3}, nothing),
    "models.gan.ConvGenerator": (
        lambda hidden=5, **o: gan.ConvGenerator((1, 8, 8), **o, hidden=(hidden,)),
        {"z_dim": 3, "width": 4, "hidden": 5},
        nothing,
    ),
    "models.gan.ConvDiscriminator": (
        lambda hidden=5, **o: gan.ConvDiscriminator((1, 8, 8), **o, hidden=(hidden,)),
        {"width": 4, "hidden": 5},
        nothing,
    ),
    "models.ladder.LadderEncoder": (
        lambda **o: ladder.LadderEncoder((16, 5, 3), **o),
        {"noise": 0.1, "decay": 0.9, "eps": 1e-6},
        call(FLAT),
    ),
    "models.pixels.PixelModel": (
        lambda **o: pixels.PixelModel((1, 4, 4), **o),
        {"levels": 2},
        nothing,
    ),
    "models.pixels.masked_perceptron": (
        lambda **o: pixels.masked_perceptron(hidden=(5,), **o),
        {"x_dim": 16, "outputs": 1, "dropout": 0.1},
        nothing,
    ),
    "models.pixels.MADE": (
        lambda **o: pixels.MADE((1, 4, 4), (5,), **o),
        {"levels": 2, "dropout": 0.1},
        log_prob,
    ),
    "models.pixels.PixelLSTM": (
        lambda **o: pixels.PixelLSTM((1, 4, 4), **o),
        {"hidden": 4, "layers": 1, "levels": 2},
        log_prob,
    ),
    "models.pixels.CausalLayer": (
        lambda **o: pixels.CausalLayer(first=True, **o),
        {"inputs": 1, "channels": 4, "radius": 1, "dilation": 1},
        nothing,
    ),
    "models.pixels.PixelCNN": (
        lambda **o: pixels.PixelCNN((1, 4, 4), **o),
        {"channels": 4, "layers": 2, "radius": 1, "levels": 2, "first_radius": 2},
        log_prob,
    ),
    **{
        f"models.schedules.{kind.__name__}": (kind, {"low": 0.1, "high": 3.0, **more}, draw_levels)
        for kind, more in (
            (schedules.LinearSchedule, {}),
            (schedules.CosineSchedule, {"offset": 0.008}),
            (schedules.StraightSchedule, {}),
            (schedules.LogNormalSchedule, {"mean": -1.0, "std": 1.2}),
            (schedules.PowerSchedule, {"rho": 7.0}),
        )
    },
    "models.schedules.Schedule.steps": (schedules.PowerSchedule().steps, {"n": 3}, finite),
    **{
        f"models.schedules.{name}_coefficients": (
            lambda f=getattr(schedules, f"{name}_coefficients"), **o: f(SIGMA, **o),
            {"std": 1.0},
            finite,
        )
        for name in schedules.TARGETS
    },
    "models.schedules.training_target": (
        lambda **o: schedules.training_target(X, X, SIGMA, "v", **o),
        {"std": 1.0},
        finite,
    ),
    "models.schedules.denoised_from_output": (
        lambda **o: schedules.denoised_from_output(X, X, SIGMA, "v", **o),
        {"std": 1.0},
        finite,
    ),
    "models.schedules.target_weight": (
        lambda **o: schedules.target_weight(SIGMA, "v", **o),
        {"std": 1.0},
        finite,
    ),
    "models.mixture.fit_mixture": (
        lambda **o: mixture.fit_mixture(torch.randn(9, 2), **o).means,
        {
            "components": 2,
            "steps": 1,
            "prior_count": 1.0,
            "prior_share": 0.5,
            "floor": 0.1,
            "seed": 1,
            "chunk": 4,
        },
        finite,
    ),
    "guidance.rules.NormalizedDPS": (rules.NormalizedDPS, {"step": 1.0}, nothing),
    "guidance.rules.PseudoInverse": (
        rules.PseudoInverse,
        {"std": 1.0, "steps": 3, "exact": 9},
        nothing,
    ),
    "guidance.rules.Moments": (rules.Moments, {"steps": 3}, nothing),
    "guidance.operators.Blur": (lambda **o: operators.Blur((1, 4, 4), **o), {"std": 1.0}, nothing),
    "guidance.operators.Downsample": (
        lambda **o: operators.Downsample((1, 4, 4), **o),
        {"factor": 2},
        nothing,
    ),
    "guidance.operators.RandomMeasurements": (
        lambda **o: operators.RandomMeasurements((1, 4, 4), **o),
        {"m": 3},
        nothing,
    ),
    "guidance.operators.observe": (
        lambda **o: operators.observe(IMAGES, SMALLER, **o).observed,
        {"noise": 0.1},
        finite,
    ),
    "guidance.restoration.restore": (
        lambda **o: restoration.restore(DIFFUSION, SMALLER.apply(IMAGES), SMALLER, **o).samples,
        {"noise": 0.5, "samples": 2, "steps": 2, "chunk": 3},
        finite,
    ),
    "guidance.restoration.latent_search": (
        lambda **o: restoration.latent_search(VAE16, SEEN, **o),
        {"weight": 1.0, "steps": 2, "lr": 0.1, "restarts": 2},
        nothing,
    ),
    "models.synthetic.SyntheticSequences": (
        synthetic.SyntheticSequences,
        {"seed": 1, "vocab": 5, "length": 3, "hidden": 4, "embed": 3, "z_scale": 2.0},
        lambda m: m.sample(2),
    ),
    "models.vae.perceptron": (
        lambda **o: vae.perceptron(*o.values()),
        {"sizes_0": 4, "sizes_1": 3},
        nothing,
    ),
    "models.vae.VAE": (vae.VAE, {"x_dim": 16, "h_dim1": 5, "h_dim2": 4, "z_dim": 2}, nothing),
    "models.vae.ConvVAE": (
        lambda **o: vae.ConvVAE((1, 4, 4), **o),
        {"z_dim": 2, "width": 4},
        mean_and_draw,
    ),
    "models.vae.vae_loss": (
        lambda **o: vae.vae_loss(FLAT, FLAT.clamp(0.1, 0.9), FLAT, FLAT, **o),
        {"kl_weight": 1.0},
        finite,
    ),
    "posthoc.posthoc_coefficients": (
        lambda **o: posthoc.posthoc_coefficients(
            [(averaging.Power(1.0), 3)], averaging.Power(2.0), **o
        ),
        {"at": 3},
        finite,
    ),
    "schemes.levels.min_snr_weight": (
        lambda **o: levels.min_snr_weight(SIGMA, **o),
        {"gamma": 5.0},
        finite,
    ),
    "schemes.levels.p2_weight": (
        lambda **o: levels.p2_weight(SIGMA, **o),
        {"k": 1.0, "gamma": 1.0},
        finite,
    ),
    "schemes.levels.Uncertainty": (levels.Uncertainty, {"waves": 4}, call(SIGMA)),
    "schemes.levels.stratified_uniform": (
        lambda **o: levels.stratified_uniform(like=SIGMA, **o),
        {"n": 4},
        finite,
    ),
    "schemes.levels.AdaptiveLevels": (
        levels.AdaptiveLevels,
        {"bins": 4, "decay": 0.9, "uniform_share": 0.1},
        levels_walk,
    ),
    # Of others' pages: rules, optimizers and games.
    "schemes.elbo.Aggressive": (Aggressive, {"check": 2, "most": 3, "window": 2}, nothing),
    "rules.Consensus": (Consensus, {"weight": 1.0}, nothing),
    "rules.Feedback": (lambda **o: Feedback("G", "D", "G", **o), {"weight": 1.0}, nothing),
    "rules.SymplecticAdjustment": (SymplecticAdjustment, {"weight": 1.0, "eps": 0.1}, nothing),
    "rules.Lookahead": (Lookahead, {"every": 2, "alpha": 0.5}, nothing),
    "rules.Clipped": (Clipped, {"max_norm": 1.0}, nothing),
    "opponents.Unrolled": (lambda **o: Unrolled("D", **o), {"steps": 2, "lr": 0.1}, nothing),
    "opponents.CompetitiveGradient": (CompetitiveGradient, {"lr": 0.1, "iterations": 2}, nothing),
    "search.ask_tell.RandomSearch": (
        lambda **o: ask_tell.RandomSearch(torch.ones(2), **o),
        {"sigma": 0.5, "population_size": 6, "seed": 0},
        search_walk,
    ),
    "search.covariances.cma_constants": (
        covariances.cma_constants,
        {"dim": 3, "population_size": 8},
        lambda k: finite(list(k.weights)),
    ),
    "search.diffusion_evolution.DiffusionEvolution": (
        lambda **o: diffusion_evolution.DiffusionEvolution(torch.ones(2), **o),
        {"sigma": 0.5, "steps": 3, "population_size": 6, "noise": 0.5, "seed": 0},
        search_walk,
    ),
    "search.distributions.Elites": (distributions.Elites, {"share": 0.5}, fitted_once),
    "search.distributions.Boltzmann": (distributions.Boltzmann, {"temperature": 0.5}, fitted_once),
    "search.distributions.Gaussian": (
        lambda **o: distributions.Gaussian(torch.ones(2), **o),
        {"sigma": 0.5},
        lambda model: search_walk(distributions.Search(model)),
    ),
    "search.distributions.Mixture": (
        lambda **o: distributions.Mixture(torch.eye(2), **o),
        {"sigma": 0.5, "floor": 0.1},
        lambda model: search_walk(distributions.Search(model)),
    ),
    "search.distributions.Categorical": (
        lambda **o: distributions.Categorical(torch.full((3, 2), 0.5), **o),
        {"floor": 0.1},
        lambda model: search_walk(distributions.Search(model)),
    ),
    "search.distributions.Search": (
        lambda **o: distributions.Search(distributions.Gaussian(torch.ones(2)), **o),
        {"population_size": 6, "rate": 1.0, "steps": 1, "seed": 0},
        search_walk,
    ),
    "search.learned.Learned": (
        learned_bits,
        {"steps": 2, "batch_size": 3, "seed": 0},
        lambda model: search_walk(distributions.Search(model)),
    ),
    "search.tuning.Interval": (
        tuning.Interval,
        {"lowest": 0.5, "highest": 2.0},
        lambda found: finite([found.at(0.5)]),
    ),
    "search.tuning.tune": (
        lambda **o: tuning.tune(lambda s: s["a"], {"a": tuning.Interval(0, 1)}, **o),
        {"budget": 5, "seed": 0},
        lambda trials: finite([trial.value for trial in trials]),
    ),
    "design.LatentSearch": (design.LatentSearch, {"sigma": 0.5, "quantile": 0.9}, designed_by),
    "design.Retraining": (
        design.Retraining,
        {"k": 0.1, "rounds": 2, "steps": 1, "batch_size": 3},
        designed_by,
    ),
    "design.CbAS": (
        design.CbAS,
        {"share": 0.3, "rounds": 2, "steps": 1, "batch_size": 3},
        designed_by,
    ),
    "design.bin_values": (
        lambda **o: design.bin_values(torch.rand(9), **o),
        {"bins": 3},
        lambda found: finite(found[1]),
    ),
    "design.design": (
        lambda **o: designed_by(design.LatentSearch(), **o),
        {"budget": 9, "seed": 0},
        nothing,
    ),
    "search.cma.CmaEs": (
        lambda **o: cma.CmaEs(torch.ones(2), **o),
        {"sigma": 0.5, "population_size": 6, "seed": 0},
        search_walk,
    ),
    "search.cma.Ipop": (
        lambda **o: cma.Ipop(torch.ones(2), **o),
        {"sigma": 0.5, "population_size": 6, "growth": 1.5, "seed": 0},
        search_walk,
    ),
    "search.cma.minimize": (
        minimized,
        {"sigma": 0.5, "budget": 50, "population_size": 6, "seed": 0},
        finite,
    ),
    "optim.SGD": (step(SGD), {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1}, finite),
    "optim.Momentum": (step(Momentum), {"lr": 0.1, "momentum": 0.5}, finite),
    "optim.RMSProp": (
        step(RMSProp),
        {"lr": 0.1, "alpha": 0.9, "eps": 1e-8, "weight_decay": 0.1, "momentum": 0.5},
        finite,
    ),
    "optim.Adam": (step(Adam), {"lr": 0.1, "eps": 1e-8, "weight_decay": 0.1}, finite),
    "optim.AdamW": (step(AdamW), {"lr": 0.1, "eps": 1e-8, "weight_decay": 0.1}, finite),
    "muon.Muon": (
        step(Muon),
        {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1, "ns_steps": 3},
        finite,
    ),
}


def outcome(case, argument, value):
    """Return what is wrong with an argument's value, or None."""
    make, good, use = CASES[case]
    name = "sizes" if argument.startswith("sizes") else argument
    try:
        result = make(**good | {argument: value})
    except (ValueError, TypeError) as error:
        named = re.search(rf"\b{name}\b", str(error))
        return None if named else f"does not name it: {type(error).__name__}: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:120]}"
    try:
        use(result)
    except Exception as error:
        return f"accepted, then {type(error).__name__}: {str(error)[:120]}"
    return None


def faults(case):
    """Return what is wrong with the values of every argument of a case."""
    found = []
    for argument in CASES[case][1]:
        for label, value in BAD.items():
            if case.startswith("optim.") and label.startswith("tensor"):
                continue  # a tensor may lie on a device, where it is not read
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                problem = outcome(case, argument, value)
            if problem:
                found.append(f"{argument}={label}: {problem}")
    return found


@pytest.mark.filterwarnings("ignore:Geco")
@pytest.mark.parametrize("case", CASES)
def test_an_argument_is_refused_by_name_or_works(case):
    make, good, use = CASES[case]
    use(make(**good))
    assert not faults(case)


# Public functions with numbers that are in no case, and why.
ELSEWHERE = {
    "search.ask_tell.AskTell": "a base class",
    "search.ask_tell.Found": "a result",
    "search.tuning.Trial": "a result",
    "search.tuning.default_search": "the search of tune",
    "search.ask_tell.as_point": "a check of vectors",
    "search.covariances.CmaConstants": "a result",
    "search.diffusion_evolution.denoise_by_population": "a step of DiffusionEvolution",
    "search.diffusion_evolution.evolution_step": "a step of DiffusionEvolution",
    "search.diffusion_evolution.mixture_log_density": "a step of DiffusionEvolution",
    "search.covariances.DiagonalCovariance": "a shape",
    "search.covariances.FullCovariance": "a shape, made by CmaEs",
    "search.covariances.rank_weights": "a step of cma_constants, which checks its arguments",
    "search.cma.is_flat": "a step of CmaEs",
    "search.cma.is_stagnant": "a step of CmaEs",
    "averaging.averages_of": "passes its profile to Average",
    "controllers.Controller": "a base class",
    "data.toy.stacked_digits": "in the tests of toy data",
    "estimators.bound_loss": "its beta may be a tensor or a function",
    "estimators.resolve_beta": "its beta may be a tensor or a function",
    "models.adaptive.solve": "its tolerances are checked through dopri5",
    "models.diffusion.check_density_arguments": "a check",
    "models.diffusion.curve_slope": "a step of ode_log_prob, which checks its arguments",
    "models.features.image_batches": "its batch size is checked by compare",
    "models.labels.check_labels_given": "a check",
    "sample_quality.check_feature_sets": "a check",
    "models.diffusion.ddim": "its levels are checked by level_pairs",
    "models.diffusion.heun": "its levels are checked by level_pairs",
    "models.diffusion.ancestral": "its levels are checked by level_pairs",
    "models.diffusion.level_pairs": "in the tests of samplers",
    "models.flow.ActNorm": "a shape",
    "models.flow.Flow": "a shape",
    "models.flow.alternating_couplings": "passes its numbers to AffineCoupling and ResidualNet",
    "models.gan.Discriminator": "a base class",
    "models.gan.Generator": "a base class",
    "models.gan.MLPDiscriminator": "a shape",
    "models.ladder.LadderActivations": "a result",
    "models.ladder.LadderDecoder": "in the tests of ladders",
    "models.schedules.Schedule": "a base class",
    "models.schedules.check_target": "a check",
    "models.mixture.maximize_mixture": "in fit_mixture",
    "guidance.rules.conjugate_gradients": "in the rules",
    "guidance.rules.LinearRule": "a base class",
    "guidance.operators.Linear": "takes a shape",
    "guidance.operators.Observation": "a result",
    "models.synthetic.synthetic_sequences": "passes its seed on",
    "posthoc.PostHocAverage": "a result",
    "posthoc.reconstruct": "passes its numbers to posthoc_coefficients",
    "sample_quality.FeatureStats": "a result",
    "metrics.Estimate": "a result",
}
MODULES = (
    "search",
    "averaging",
    "controllers",
    "data.toy",
    "estimators",
    "guidance",
    "metrics",
    "models",
    "multipliers",
    "named_controllers",
    "posthoc",
    "sample_quality",
    "schemes.levels",
)


def public_functions():
    """Return the names of the public functions and classes that take numbers."""
    names = []
    for info in pkgutil.walk_packages(optgen.__path__, "optgen."):
        short = info.name.removeprefix("optgen.")
        if not short.startswith(MODULES):
            continue
        module = importlib.import_module(info.name)
        for name in getattr(module, "__all__", ()):
            member = getattr(module, name)
            if not callable(member) or member.__module__ != info.name:
                continue
            kinds = [str(p.annotation) for p in inspect.signature(member).parameters.values()]
            if any(re.search(r"\b(int|float)\b", kind) for kind in kinds):
                names.append(f"{short}.{name}")
    return names


def test_every_public_function_with_numbers_is_in_the_table():
    missing = set(public_functions()) - CASES.keys() - ELSEWHERE.keys()
    assert not missing, sorted(missing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("high", [80.0, 190.0, 300.0])
def test_the_highest_levels_are_finite_in_every_precision(high, dtype):
    schedule = schedules.LogNormalSchedule(high=high)
    u = torch.tensor([0.0, 0.5, 1 - torch.finfo(dtype).eps / 2, 1.0], dtype=dtype)
    drawn = schedule(u)
    assert drawn.isfinite().all() and (drawn > 0).all() and (drawn < 1.1 * high).all()


def test_an_unknown_target_is_refused_with_the_known_ones():
    for bad in ("w", "", None, 3, ["v"]):
        for call in (
            lambda: schedules.training_target(X, X, SIGMA, bad),
            lambda: schedules.denoised_from_output(X, X, SIGMA, bad),
            lambda: schedules.target_weight(SIGMA, bad),
        ):
            with pytest.raises(ValueError, match="target must be one of .*; got "):
                call()
