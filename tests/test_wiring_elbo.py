"""Losses, gradients, controllers, inner steps and reported numbers of `BetaVAE`.

The references are plain torch in float64, with densities from `torch.distributions`.
"""

import copy
import math

import pytest
import torch
from vae_reference import (
    F64,
    DropoutVAE,
    Normal,
    Z,
    kl,
    log_likelihood,
    log_prior,
    make_batch,
    make_model,
    posterior,
    record_draws,
    reference_loss,
)

from optgen.controllers import (
    Capacity,
    Constant,
    Controller,
    ControlVAE,
    FreeBits,
    Geco,
    LinearWarmup,
    SigmaVAE,
)
from optgen.data.images import Batch
from optgen.inner import Refinement
from optgen.models.vae import GaussianVAE
from optgen.optim import SGD, Adam
from optgen.rules import Extragradient
from optgen.schemes.elbo import Aggressive, BetaVAE
from optgen.testing import generator, randn


def reference_gradients(model, x, eps, estimator, beta, chosen=None):
    """Return the estimator's gradients of encoder and decoder, from explicit derivatives in z.

    Args:
        model: the VAE.
        x: images.
        eps: noise (k, B, z_dim).
        estimator: its name.
        beta: weight of the rate.
        chosen: (B,) index of the one sample that is differentiated; None for all.
    """
    encoder, decoder = list(model.q_net.parameters()), list(model.p_net.parameters())
    q = posterior(model, x)
    z = q.loc + q.scale * eps
    log_p = log_likelihood(model, x, z)
    fixed = estimator in ("stl", "dreg")
    density = Normal(q.loc.detach(), q.scale.detach()) if fixed else q
    log_w = log_p + (beta * (log_prior(z) - density.log_prob(z))).sum(-1)
    if estimator == "stl":
        return torch.autograd.grad(-log_w.mean(), [*encoder, *decoder])
    w = log_w.detach().softmax(0)
    use, normalized = w, w
    if chosen is not None:
        use = torch.nn.functional.one_hot(chosen, len(eps)).T.to(w)
    if estimator == "iwae":
        return torch.autograd.grad(-(use * log_w).sum(0).mean(), [*encoder, *decoder])
    (dz,) = torch.autograd.grad(log_w.sum(), z, retain_graph=True)
    by_decoder = torch.autograd.grad(-(use * log_p).sum(0).mean(), decoder, retain_graph=True)
    # Tucker et al. (2019): w^2 dlog w/dz; where beta scales the ratio, w (1 - beta (1 - w)).
    factor = use.unsqueeze(-1) * (1 - beta * (1 - normalized.unsqueeze(-1)))
    by_encoder = torch.autograd.grad(-(factor * dz * z).sum() / len(x), encoder)
    return [*by_encoder, *by_decoder]


class Prescribed(Controller):
    """A controller with prescribed weights that records what it is given."""

    def __init__(self, *weights):
        super().__init__(1.0)
        self.weights, self.given = weights, []

    def multiplier(self, rate, distortion):
        """Return the next weight."""
        self.given.append((rate, distortion))
        return self.weights[len(self.given) - 1].to(rate)


ESTIMATORS = [("elbo", 1), ("elbo", 3), ("stl", 3), ("iwae", 4), ("dreg", 4)]
BETAS = torch.tensor([0.3, 1.7], dtype=F64), torch.tensor(2.5, dtype=F64)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("estimator, k", ESTIMATORS)
def test_a_step_descends_the_estimators_gradient_at_the_controllers_weight(estimator, k, sampled):
    if sampled and estimator in ("elbo", "stl"):
        return
    model, controller = make_model(), Prescribed(*BETAS)
    scheme = BetaVAE(model, controller, SGD(model.parameters(), lr=0.3), estimator, k, sampled)
    drawn = record_draws(scheme)
    torch.manual_seed(4)
    for t, beta in enumerate(BETAS):
        batch = make_batch(t)
        before = [p.detach().clone() for p in model.parameters()]
        loss = scheme.step(batch)["model"]
        after = [p.detach().clone() for p in model.parameters()]
        for p, old in zip(model.parameters(), before):
            p.data.copy_(old)
        noisy = drawn[-1]
        assert noisy.eps.shape == (7, k, Z)
        eps = noisy.eps.transpose(0, 1)
        q = posterior(model, batch.x)
        rate, distortion = controller.given[-1]
        torch.testing.assert_close(rate, kl(q).mean(0).detach())
        z = q.loc + q.scale * eps
        expected = -log_likelihood(model, batch.x, z).mean()
        torch.testing.assert_close(distortion, expected.detach())
        values = reference_loss(model, batch.x, eps, estimator, beta)
        torch.testing.assert_close(loss, values.mean().detach())
        if estimator == "elbo":
            gradients = torch.autograd.grad(values.mean(), list(model.parameters()))
        else:
            chosen = None
            if sampled:  # the inverse of the weights' distribution function at 1 - u
                log_w = log_likelihood(model, batch.x, z)
                log_w = log_w + (beta * (log_prior(z) - q.log_prob(z))).sum(-1)
                upto = log_w.softmax(0).cumsum(0)
                chosen = (upto < 1 - noisy.u.flatten()).sum(0)
                assert len(chosen.unique()) > 1
            gradients = reference_gradients(model, batch.x, eps, estimator, beta, chosen)
        for old, new, g in zip(before, after, gradients):
            torch.testing.assert_close(new, old - 0.3 * g)
        for p, new in zip(model.parameters(), after):
            p.data.copy_(new)
    assert len(controller.given) == 2 and controller.t == 2


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_noise_of_a_step_is_normal_and_of_every_image_and_sample(seed):
    scheme = BetaVAE(make_model(), estimator="iwae", k=3, sampled=True, inner=Refinement(2))
    n = 2000
    torch.manual_seed(seed)
    noisy = scheme.draw(Batch(torch.zeros(n, 1, 2, 3, dtype=F64)))
    columns = torch.cat([noisy.eps.flatten(1), noisy.inner.flatten(1)], 1)
    assert columns.shape == (n, 3 * Z + 2 * Z) and noisy.u.shape == (n, 1)
    assert (columns.mean(0).abs() < 5 / n**0.5).all()
    covariance = torch.cov(columns.T) - torch.eye(5 * Z, dtype=F64)
    assert covariance.abs().max() < 6 * (2 / n) ** 0.5
    ends = noisy.u.sort(0).values[:, 0] - (torch.arange(n) + 0.5) / n
    assert ends.abs().max() < 2 / n**0.5


def test_the_information_is_that_of_the_batch_and_its_posteriors():
    model, x = make_model(), make_batch(3, 9).x
    scheme = BetaVAE(model)
    q = posterior(model, x)
    z = q.loc + q.scale * torch.randn(9, Z, generator=generator(0), dtype=F64)
    log_q = q.log_prob(z[:, None]).sum(2)  # of z_i under each image j
    mixture = log_q.logsumexp(1) - math.log(9)
    expected = (log_q.diagonal() - mixture).mean()
    torch.testing.assert_close(scheme.information(scheme.draw(Batch(x))), expected.detach())


def test_one_of_k_samples_is_drawn_by_its_weight():
    model, x = make_model(), make_batch(n=1).x
    scheme = BetaVAE(model, 0.8, estimator="iwae", k=3, sampled=True)
    eps = randn(1, 3, Z, seed=2)
    q = posterior(model, x)
    z = q.loc + q.scale * eps.transpose(0, 1)
    log_w = log_likelihood(model, x, z) + 0.8 * (log_prior(z) - q.log_prob(z)).sum(-1)
    w = log_w.softmax(0)[:, 0].tolist()
    params = list(model.parameters())
    candidates = [torch.autograd.grad(-log_w[i, 0], params, retain_graph=True) for i in range(3)]
    counts, n = [0, 0, 0], 60
    noisy = scheme.draw(Batch(x))
    for i in range(n):
        u = torch.full((1, 1), (i + 0.5) / n, dtype=F64)
        g = torch.autograd.grad(scheme.loss(noisy._replace(x=x, eps=eps, u=u)), params)
        distances = [(g[0] - c[0]).abs().max().item() for c in candidates]
        assert min(distances) < 1e-9
        counts[distances.index(min(distances))] += 1
    assert min(w) > 0.02 and max(w) - min(w) > 0.1
    assert [count / n for count in counts] == pytest.approx(w, abs=1.5 / n)


def test_the_controller_moves_once_where_a_rule_evaluates_the_loss_twice():
    model, betas = make_model(), Prescribed(*(torch.tensor(b, dtype=F64) for b in (0.5, 3.0)))
    scheme = BetaVAE(model, betas, SGD(model.parameters(), lr=0.1), rule=Extragradient())
    drawn = record_draws(scheme)
    for t, beta in enumerate((0.5, 3.0)):
        start = [p.detach().clone() for p in model.parameters()]
        scheme.step(make_batch(t))
        after = [p.detach().clone() for p in model.parameters()]
        eps, x = drawn[-1].eps.transpose(0, 1), make_batch(t).x
        params = list(model.parameters())
        for p, old in zip(params, start):
            p.data.copy_(old)
        first = torch.autograd.grad(reference_loss(model, x, eps, "elbo", beta).mean(), params)
        for p, old, g in zip(params, start, first):
            p.data.copy_(old - 0.1 * g)
        second = torch.autograd.grad(reference_loss(model, x, eps, "elbo", beta).mean(), params)
        for p, old, new, g in zip(params, start, after, second):
            torch.testing.assert_close(new, old - 0.1 * g)
            p.data.copy_(new)
    assert len(betas.given) == 2


def moving_weights(name, measurements):
    """Return the weights that a controller's paper prescribes for (rate, distortion) pairs."""
    weights, log_lambda, mean, beta, damping = [], 0.0, None, 0.0, 0.0
    for t, (rate, distortion) in enumerate(measurements):
        total = sum(rate)
        if name == "warmup":
            weights.append(min(1.0, t / 3) * 0.8)
        elif name == "capacity":
            weights.append(2.0 * math.copysign(1, total - min(1.0, t / 3) * 4))
        elif name == "free bits":
            weights.append([0.7 if r > 0.94 else 0.0 for r in rate])
        elif name == "geco":
            C = distortion - 3.5
            mean = C if mean is None else 0.8 * mean + 0.2 * C
            log_lambda += min(max(0.2 * mean, -0.05), 0.05)
            weights.append(math.exp(-log_lambda))
        elif name == "control":
            error = 4.5 - total
            p = 0.1 / (1 + math.exp(error))
            beta = min(max(beta + (p - damping) - 0.05 * error, 0.0), 1.0)
            damping = p
            weights.append(beta)
    return weights


MOVING = {
    "warmup": lambda: LinearWarmup(3, 0.8),
    "capacity": lambda: Capacity(4.0, 3, 2.0),
    "free bits": lambda: FreeBits(0.94, beta=0.7),
    "geco": lambda: Geco(3.5, rate=0.2, smoothing=0.8),
    "control": lambda: ControlVAE(4.5, kp=0.1, ki=0.05),
}


@pytest.mark.parametrize("name", MOVING)
def test_every_controller_weighs_the_rate_of_the_batch_that_it_measures(name):
    model = make_model()
    scheme = BetaVAE(model, MOVING[name](), SGD(model.parameters(), lr=0.05), k=2)
    drawn, measured, losses = record_draws(scheme), [], []
    for t in range(6):
        start = [p.detach().clone() for p in model.parameters()]
        losses.append(scheme.step(make_batch(t))["model"].item())
        after = [p.detach().clone() for p in model.parameters()]
        with torch.no_grad():
            for p, old in zip(model.parameters(), start):
                p.copy_(old)
            x, eps = make_batch(t).x, drawn[-1].eps.transpose(0, 1)
            q = posterior(model, x)
            z = q.loc + q.scale * eps
            distortion = -log_likelihood(model, x, z).mean().item()
            measured.append((kl(q).mean(0).tolist(), distortion))
            for p, new in zip(model.parameters(), after):
                p.copy_(new)
    weights = moving_weights(name, measured)
    assert len({str(w) for w in weights}) > 1
    for loss, weight, (rate, distortion) in zip(losses, weights, measured):
        each = weight if isinstance(weight, list) else [weight] * Z
        expected = distortion + sum(w * r for w, r in zip(each, rate))
        assert loss == pytest.approx(expected, rel=1e-6)
    last = weights[-1]
    mean = sum(last) / len(last) if isinstance(last, list) else last
    assert scheme.evaluate([make_batch(9)])["beta"] == pytest.approx(mean, rel=1e-6)


def test_the_sigma_vae_weighs_by_the_variance_of_the_step_and_passes_it_to_the_next():
    model = make_model(kind=GaussianVAE)
    scheme = BetaVAE(model, SigmaVAE(6), SGD(model.parameters(), lr=0.02))
    drawn, variance = record_draws(scheme), 1.0
    for t in range(4):
        x = torch.rand(7, 1, 2, 3, generator=generator(t), dtype=F64)
        start = [p.detach().clone() for p in model.parameters()]
        loss = scheme.step(Batch(x))["model"].item()
        after = [p.detach().clone() for p in model.parameters()]
        assert model.variance.item() == pytest.approx(variance)
        for p, old in zip(model.parameters(), start):
            p.data.copy_(old)
        q = posterior(model, x)
        decoded = model.p_net(q.loc + q.scale * drawn[-1].eps[:, 0]).sigmoid()
        squares = (x.flatten(1) - decoded).square().sum(1)
        found = squares.mean().item() / 6  # the most likely variance of this batch
        nll = (squares / variance + 6 * math.log(2 * math.pi * variance)) / 2
        objective = (nll + found / variance * kl(q).sum(1)).mean()
        assert loss == pytest.approx(objective.item())
        gradients = torch.autograd.grad(objective, list(model.parameters()))
        for p, old, new, g in zip(model.parameters(), start, after, gradients):
            torch.testing.assert_close(new, old - 0.02 * g)
            p.data.copy_(new)
        variance = found
    assert 0 < variance < 0.5
    x = torch.rand(9, 1, 2, 3, generator=generator(50), dtype=F64)
    found = scheme.evaluate([Batch(x)], seed=3)
    assert model.variance.item() == pytest.approx(variance) == pytest.approx(found["beta"])
    q = posterior(model, x)
    z = q.loc + q.scale * torch.randn(9, Z, generator=generator(3), dtype=F64)
    assert found["distortion"] == pytest.approx(-log_likelihood(model, x, z).mean().item())
    assert found["loss"] == pytest.approx(found["distortion"] + kl(q).sum(1).mean().item())


@pytest.mark.parametrize("beta, weight", [(Constant(2.5), 2.5), (LinearWarmup(9, 0.8, 0.3), 1.0)])
@pytest.mark.parametrize("k", [1, 6])
def test_an_evaluation_is_seeded_without_dropout_and_of_all_batches(k, beta, weight):
    model = make_model(kind=DropoutVAE)
    scheme = BetaVAE(model, copy.deepcopy(beta), estimator="iwae", k=2)
    batches, rng = [make_batch(1, 7), make_batch(2, 4)], generator(11)
    found = scheme.evaluate(batches, k=k, seed=11)
    assert model.training and scheme.evaluate(batches, k=k, seed=12) != found
    model.eval()
    rates, distortions, nlls = [], [], []
    for x, _ in batches:
        q = posterior(model, x)
        z = q.loc + q.scale * torch.randn(k, len(x), Z, generator=rng, dtype=F64)
        log_p = log_likelihood(model, x, z)
        rates.append(kl(q).sum(1))
        distortions.append(-log_p.mean(0))
        log_w = log_p + (log_prior(z) - q.log_prob(z)).sum(-1)
        nlls.append(math.log(k) - log_w.logsumexp(0))
    rate, distortion, nll = (torch.cat(t).detach() for t in (rates, distortions, nlls))
    expected = {
        "loss": (distortion + weight * rate).mean(),
        "beta": beta.value,
        "elbo": -(distortion + rate).mean(),
        "rate": rate.mean(),
        "distortion": distortion.mean(),
    }
    if k > 1:
        expected |= {
            "elbo_se": (distortion + rate).std() / 11**0.5,
            "nll": nll.mean(),
            "nll_se": nll.std() / 11**0.5,
            "bits_per_dim": nll.mean() / 6 / math.log(2),
            "n": torch.tensor(11),
            "k": torch.tensor(k),
        }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.item()), name
    assert ("nll" in found) == (k > 1)


def test_samples_are_decoded_from_the_prior_and_reconstructions_from_the_posteriors_mean():
    model = make_model()
    scheme, n = BetaVAE(model, 0.5), 20_000
    x = make_batch(3).x
    mean = posterior(model, x).loc
    pictures = model.p_net(mean).sigmoid().view_as(x).detach()
    torch.testing.assert_close(scheme.reconstruct(x), pictures)
    torch.manual_seed(5)
    drawn = scheme.sample(n)
    z = torch.randn(n, Z, generator=generator(77), dtype=F64)
    reference = model.p_net(z).sigmoid().detach()
    for power in (1, 2):
        a, b = drawn.view(n, -1) ** power, reference**power
        error = ((a.var(0) + b.var(0)) / n).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() < 5 * error).all()
    assert (reference.std(0) > 0.01).all()


def test_encoder_and_decoder_are_players_with_optimizers_of_their_own():
    model = make_model()
    optimizers = SGD(model.q_net.parameters(), lr=0.2), SGD(model.p_net.parameters(), lr=0.05)
    scheme = BetaVAE(model, 0.5, optimizers)
    drawn, x = record_draws(scheme), make_batch(1).x
    parts = {"encoder": model.q_net, "decoder": model.p_net}
    for name, part in parts.items():
        assert [id(p) for p in scheme.params(name)] == [id(p) for p in part.parameters()]
    start = [p.detach().clone() for p in model.parameters()]
    scheme.step(Batch(x))
    after = [p.detach().clone() for p in model.parameters()]
    for p, old in zip(model.parameters(), start):
        p.data.copy_(old)
    loss = reference_loss(model, x, drawn[0].eps.transpose(0, 1), "elbo", 0.5).mean()
    rates = [0.2] * len(list(model.q_net.parameters())) + [0.05] * 99
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for old, new, g, lr in zip(start, after, gradients, rates):
        torch.testing.assert_close(new, old - lr * g)


def reference_movers(losses, information, check, most, window):
    """Return who moves where the decoder waits, He et al. (2019), from given measurements."""
    losses, information, movers = iter(losses), iter(information), []
    best, group = -math.inf, []
    while True:
        last, moves, done, block = math.inf, 0, False, []
        while not done:
            movers.append("encoder")
            block.append(next(losses))
            moves += 1
            if moves % check == 0:
                total = sum(block)
                done = total >= last or moves >= most
                last, block = total, []
        movers.append("decoder")
        next(losses)
        group.append(next(information))
        if len(group) == window:
            mean, group = sum(group) / window, []
            if mean <= best:
                return movers
            best = max(best, mean)


@pytest.mark.parametrize("seed", range(4))
def test_aggressive_inference_waits_and_stops_as_its_paper_says(seed, monkeypatch):
    rng = generator(seed)
    losses = (10 - torch.arange(400) / 90 + torch.randn(400, generator=rng)).tolist()
    t = torch.arange(400)
    # It rises by little more than its noise, and falls after ten steps of the decoder or later.
    information = 3 + 0.02 * t + 0.01 * torch.randn(400, generator=rng) - 1.0 * (t > 10 + 3 * seed)
    information = information.tolist()
    expected = reference_movers(losses, information, 3, 8, 4)
    model = make_model()
    optimizers = [SGD(net.parameters(), lr=0.0) for net in (model.q_net, model.p_net)]
    scheme = BetaVAE(model, optimizer=tuple(optimizers), rule=Aggressive(3, 8, 4))
    values, facts, movers = iter(losses), iter(information), []
    scheme.information = lambda batch: torch.tensor(next(facts), dtype=F64)
    step_optimizers, at = scheme.step_optimizers, scheme.at

    def recorded_step(v):
        """Record who moves."""
        movers.append("+".join(v))
        step_optimizers(v)

    def prescribed(batch, movers):
        """Return the point with the next prescribed loss."""
        point = at(batch, movers=movers)
        assert list(point.v) == list(movers)  # evaluates the losses
        value = torch.tensor(next(values), dtype=F64)
        monkeypatch.setitem(point.losses, movers[0], value)
        return point

    scheme.step_optimizers, scheme.at = recorded_step, prescribed
    for _ in expected:
        scheme.step(make_batch(1))
    assert movers == expected and len(expected) > 20
    scheme.at = at
    scheme.step(make_batch(1))
    assert movers[-1] == "encoder+decoder"


def test_the_default_optimizer_is_adam_of_all_parameters():
    model = make_model()
    (player,) = BetaVAE(model).players.values()
    assert isinstance(player.optimizer, Adam)
    assert player.optimizer.param_groups[0]["lr"] == 1e-3
    assert len(player.optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
