"""Couplings, the ladder and the conditional VAE against the papers' equations, in plain torch."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from optgen.models.classifier import Classifier, Perceptron, predict_classes, predict_stacks
from optgen.models.conditional import ConditionalVAE
from optgen.models.ladder import LadderDecoder, LadderEncoder
from optgen.schemes.couplings import (
    DIVERGENCES,
    RECEIVERS,
    Agreement,
    AssistedBatch,
    Denoising,
    NoCoupling,
    Reconstruction,
)
from optgen.testing import generator, randn

F64 = torch.float64
D, K, Z = 6, 3, 2
Normal, Bernoulli = torch.distributions.Normal, torch.distributions.Bernoulli


def randomized(module, seed=0, scale=0.6):
    """Return a module in float64 with random weights, those that start at 0 or 1 too."""
    module = module.to(F64)
    for i, p in enumerate(module.parameters()):
        p.data.copy_(scale * randn(*p.shape, seed=100 * seed + i))
    return module


class Net(nn.Module):
    """A small classifier with features."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(D, 4), nn.Linear(4, K)

    def features(self, x):
        """Return the features of images."""
        return self.body(x.flatten(1)).tanh()

    def forward(self, x):
        """Return the logits of images."""
        return self.head(self.features(x))


def make_batch(width, n=8, seed=0):
    """Return images, as many labeled ones, and noise of a width for both."""
    x, labeled = torch.rand(2, n, 1, 2, 3, generator=generator(seed), dtype=F64).round()
    y = torch.randint(K, (n,), generator=generator(seed + 1))
    return AssistedBatch(x, labeled, y, *randn(2, n, width, seed=seed + 2))


def gradients(loss, modules):
    """Return the gradient of a loss by all parameters, zeros where there is none."""
    params = [p for module in modules for p in module.parameters()]
    return torch.autograd.grad(loss, params, retain_graph=True, materialize_grads=True)


def assert_gradients(found, expected, modules):
    """Assert that two losses have one gradient; an expected number has none."""
    if not torch.is_tensor(expected) or not expected.requires_grad:
        params = [p for module in modules for p in module.parameters()]
        wanted = [torch.zeros_like(p) for p in params]
    else:
        wanted = gradients(expected, modules)
    got = wanted if not found.requires_grad else gradients(found, modules)
    if not found.requires_grad:
        assert all(not g.any() for g in wanted)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b)


# The conditional VAE


def reference_bound(vae, x, y, eps):
    """Return J(x, y) of one class for each image, from the densities."""
    one_hot, images = F.one_hot(y, K).to(F64), x.flatten(1)

    def network(net, inputs):
        """Return the output of a network of inputs and class."""
        return net.out(net.act(net.x(inputs) + one_hot @ net.y.weight.T))

    mean, log_var = network(vae.q_net, images).chunk(2, 1)
    q = Normal(mean, (log_var / 2).exp())
    z = mean + q.scale * eps
    out = network(vae.p_net, z)
    if vae.likelihood == "gaussian":
        location, spread = out.chunk(2, 1)
        likelihood = Normal(location, (spread / 2).exp()).log_prob(images)
    else:
        likelihood = Bernoulli(logits=out).log_prob(images)
    ratio = Normal(torch.zeros_like(z), 1.0).log_prob(z) - q.log_prob(z)
    return likelihood.sum(1) + ratio.sum(1) + math.log(1 / K)


def all_bounds(vae, x, eps):
    """Return J(x, y) of every class with shared noise, (B, K)."""
    each = [reference_bound(vae, x, torch.full((len(x),), y), eps) for y in range(K)]
    return torch.stack(each, 1)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_the_bound_of_a_class_is_the_sum_of_its_densities(likelihood):
    vae = randomized(ConditionalVAE(D, K, Z, 5, likelihood, activation=nn.Softplus))
    b = make_batch(Z)
    expected = reference_bound(vae, b.labeled, b.y, b.eps_labeled)
    torch.testing.assert_close(vae.bound(b.labeled, b.y, b.eps_labeled), expected)
    torch.testing.assert_close(vae(b.x, b.eps), all_bounds(vae, b.x, b.eps))
    own = randn(len(b.x), K, Z, seed=9)
    by_class = [reference_bound(vae, b.x, torch.full((len(b.x),), y), own[:, y]) for y in range(K)]
    torch.testing.assert_close(vae.bound(b.x, eps=own), torch.stack(by_class, 1))
    z = randn(4, Z, seed=3)
    out = vae.p_net.out(
        F.softplus(vae.p_net.x(z) + vae.p_net.y.weight.T[torch.tensor([0, 2, 1, 1])])
    )
    image = out[:, :D] if likelihood == "gaussian" else 1 / (1 + (-out).exp())
    torch.testing.assert_close(vae.decoder(z, torch.tensor([0, 2, 1, 1])), image)
    torch.manual_seed(4)
    drawn = vae.bound(b.x)
    torch.manual_seed(4)
    shared = torch.randn(len(b.x), Z, dtype=F64)
    torch.testing.assert_close(drawn, all_bounds(vae, b.x, shared))


def test_a_conditional_vae_starts_at_the_mean_image():
    mean = torch.tensor([0.1, 0.5, 0.9, 0.3, 0.7, 0.2])
    vae = ConditionalVAE(D, K, Z, 5, x_mean=mean)
    nn.init.zeros_(vae.p_net.out.weight)
    image = vae.decoder(torch.randn(2, Z), torch.tensor([0, 1]))
    torch.testing.assert_close(image, mean.expand(2, D))


# Agreement and reconstruction


def reference_divergence(kind, d, g):
    """Return the divergence of two distributions, summed class by class."""
    p, q = d.softmax(1), g.softmax(1)
    if kind == "jensen-shannon":
        m = (p + q) / 2
        return ((p * (p / m).log()).sum(1) + (q * (q / m).log()).sum(1)) / 2
    if kind == "generator":
        p, q = q, p
    return (p * (p / q).log()).sum(1)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("to", RECEIVERS)
@pytest.mark.parametrize("labeled_weight", [1.0, 0.03])
def test_agreement_is_the_divergence_of_classifier_and_generator(to, kind, labeled_weight):
    coupling = Agreement(kind, to, labeled_weight)
    net, vae = randomized(Net()), randomized(ConditionalVAE(D, K, Z, 5), 1)
    assert coupling.noise_width(net, vae) == Z
    b = make_batch(Z)
    found = coupling.terms(net, vae, b)
    bounds = all_bounds(vae, b.x, b.eps)
    labeled_bound = reference_bound(vae, b.labeled, b.y, b.eps_labeled).mean()
    own = -bounds.logsumexp(1).mean() - labeled_weight * labeled_bound
    classification = -net(b.labeled).log_softmax(1)[torch.arange(8), b.y].mean()
    d = net(b.x) if to != "generator" else net(b.x).detach()
    g = bounds if to != "classifier" else bounds.detach()
    expected = (classification, reference_divergence(kind, d, g).mean(), own)
    for a, e in zip(found, expected):
        torch.testing.assert_close(a, e)
        assert_gradients(a, e, [net, vae])
    typical = coupling.typicality(net, vae, b.x, b.eps)
    torch.testing.assert_close(typical, bounds.exp().sum(1).log())


def test_samples_of_agreement_are_of_the_classes_asked_for():
    vae = randomized(ConditionalVAE(D, K, Z, 5))
    classes = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    torch.manual_seed(3)
    drawn = Agreement().sample(vae, 7, classes)
    torch.manual_seed(3)
    z = torch.randn(7, Z, dtype=F64)
    torch.testing.assert_close(drawn, vae.decoder(z, classes))


@pytest.mark.parametrize("loss", ["bernoulli", "squared"])
@pytest.mark.parametrize("to", RECEIVERS)
def test_reconstruction_trains_its_decoder_whatever_the_receiver(to, loss):
    coupling = Reconstruction(loss, to)
    net, decoder, b = randomized(Net()), randomized(nn.Linear(4, D), 1), make_batch(0)
    assert coupling.noise_width(net, decoder) == 0
    found = coupling.terms(net, decoder, b)

    def error(features, weight, bias):
        """Return the nats, or half the squared error, of each image."""
        out = features @ weight.T + bias
        if loss == "squared":
            return (out - b.x.flatten(1)).square().sum(1) / 2
        return -Bernoulli(logits=out).log_prob(b.x.flatten(1)).sum(1)

    W, c, h = decoder.weight, decoder.bias, net.features(b.x)
    whole = error(h, W, c).mean()
    by_decoder = error(h.detach(), W, c).mean()
    by_classifier = error(h, W.detach(), c.detach()).mean()
    # Receiver, then what the decoder learns by itself.
    coupled, own = {
        "both": (whole, torch.zeros((), dtype=F64)),
        "generator": (by_decoder, torch.zeros((), dtype=F64)),
        "classifier": (by_classifier, by_decoder),
    }[to]
    for a, e in zip(found[1:], (coupled, own)):
        torch.testing.assert_close(a, e)
        assert_gradients(a, e, [net, decoder])
    classification = -net(b.labeled).log_softmax(1)[torch.arange(8), b.y].mean()
    torch.testing.assert_close(found.classification, classification)
    typical = coupling.typicality(net, decoder, b.x, b.eps)
    torch.testing.assert_close(typical, -error(h, W, c))
    alone = NoCoupling().terms(net, None, b)
    torch.testing.assert_close(alone.classification, classification)
    assert alone.coupling == alone.generation == 0


# The ladder, Rasmus et al. (2015), Algorithm 1

SIZES, S = (D, 5, 4, K), 0.7


def standardize(a, mean, var):
    """Return pre-activations with a mean and a variance taken away."""
    return (a - mean) / (var + 1e-10).sqrt()


def ladder_path(encoder, x, noise):
    """Return z, logits, means and variances of one group on the path with a noise per layer."""
    h = x.flatten(1) + S * noise[0]
    z, means, variances = [h], [0.0], [1.0]
    for i, W in enumerate((layer.weight for layer in encoder.maps), 1):
        a = h @ W.T
        mean = a.mean(0)
        var = (a - mean).square().mean(0)
        z.append(standardize(a, mean, var) + S * noise[i])
        means.append(mean)
        variances.append(var)
        h = z[i] + encoder.shifts[i - 1]
        h = h.clamp(min=0) if i < len(SIZES) - 1 else encoder.scale * h
    return z, h, means, variances


def ladder_costs(decoder, noisy, clean, weights):
    """Return the weighted cost of all layers of the decoder."""
    z, logits = noisy[:2]
    clean_z, _, means, variances = clean
    u, total = logits.softmax(1), 0.0
    for i in reversed(range(len(SIZES))):
        signal = standardize(u, u.mean(0), (u - u.mean(0)).square().mean(0))
        a = decoder.curves[str(i)]
        mu, v = (c[0] / (1 + (-(c[1] * signal + c[2])).exp()) + c[3] * signal + c[4] for c in a)
        denoised = (z[i] - mu) * v + mu
        centered = denoised if not i else standardize(denoised, means[i], variances[i])
        total = total + weights[i] * (clean_z[i] - centered).square().mean()
        if i:
            u = denoised @ decoder.maps[str(i - 1)].weight.T
    return total


def make_ladder(weights=(5.0, 0.0, 1.0, 0.3), decay=0.7):
    """Return an encoder and a decoder with random weights."""
    encoder = randomized(LadderEncoder(SIZES, S, decay))
    return encoder, randomized(LadderDecoder(SIZES, weights).to(F64), 1)


@pytest.mark.parametrize("to", RECEIVERS)
def test_the_ladder_classifies_the_noisy_half_and_denoises_the_other(to):
    weights = (5.0, 0.0, 1.0, 0.3)
    encoder, decoder = make_ladder(weights)
    coupling, b = Denoising(to), make_batch(sum(SIZES))
    assert coupling.noise_width(encoder, decoder) == sum(SIZES)
    found = coupling.terms(encoder, decoder, b)
    zeros = [torch.zeros(8, n, dtype=F64) for n in SIZES]
    labeled = ladder_path(encoder, b.labeled, b.eps_labeled.split(SIZES, 1))
    noisy = ladder_path(encoder, b.x, b.eps.split(SIZES, 1))
    clean = ladder_path(encoder, b.x, zeros)
    classification = -labeled[1].log_softmax(1)[torch.arange(8), b.y].mean()
    torch.testing.assert_close(found.classification, classification)
    assert_gradients(found.classification, classification, [encoder])
    cost = ladder_costs(decoder, noisy, clean, weights)
    value = found.generation if to == "classifier" else found.coupling
    torch.testing.assert_close(value, cost)
    torch.testing.assert_close(found.coupling, cost)
    total = found.coupling + found.generation
    if to == "both":
        assert_gradients(total, cost, [encoder, decoder])
    else:
        assert_gradients(total if to == "classifier" else value, cost, [decoder])
        moved = gradients(found.coupling, [encoder])
        wanted = gradients(cost, [encoder])
        for a, e in zip(moved, wanted):
            torch.testing.assert_close(a, e if to == "classifier" else torch.zeros_like(e))


def test_the_running_statistics_are_those_of_the_clean_path():
    encoder, decoder = make_ladder(decay=0.7)
    mean, var = [None] * 4, [None] * 4
    for t in range(1, 7):
        b = make_batch(sum(SIZES), seed=10 * t)
        zeros = [torch.zeros(8, n, dtype=F64) for n in SIZES]
        _, _, means, variances = ladder_path(encoder, b.x, zeros)
        # The plain mean of the first batches, then a moving average.
        step = max(1 / t, 0.3)
        for i in range(1, 4):
            mean[i] = means[i] if t == 1 else mean[i] + step * (means[i] - mean[i])
            var[i] = variances[i] if t == 1 else var[i] + step * (variances[i] - var[i])
        Denoising().terms(encoder, decoder, b)
        for i in range(1, 4):
            torch.testing.assert_close(getattr(encoder, f"mean{i}"), mean[i].detach())
            torch.testing.assert_close(getattr(encoder, f"var{i}"), var[i].detach())
    encoder.eval()
    Denoising().terms(encoder, decoder, make_batch(sum(SIZES), seed=99))
    assert encoder.followed == 6
    x = make_batch(0, seed=5).x
    h = x.flatten(1)
    for i, layer in enumerate(encoder.maps, 1):
        h = standardize(h @ layer.weight.T, mean[i], var[i]) + encoder.shifts[i - 1]
        h = h.clamp(min=0) if i < 3 else encoder.scale * h
    torch.testing.assert_close(encoder(x), h)
    torch.testing.assert_close(encoder(x[:1]), h[:1])
    encoder.train()
    zeros = [torch.zeros(8, n, dtype=F64) for n in SIZES]
    torch.testing.assert_close(encoder(x), ladder_path(encoder, x, zeros)[1])


def test_a_new_ladder_decoder_returns_what_it_gets():
    decoder = LadderDecoder(SIZES, (0.0, 1.0, 1.0, 1.0))
    z, u = torch.randn(2, 4, 5, generator=generator(1))
    torch.testing.assert_close(decoder.combine(1, z, u), z)
    assert decoder.lowest_layer == 1 and set(decoder.curves) == {"1", "2", "3"}


# The classifiers


def test_a_classifier_drops_features_before_its_head():
    torch.manual_seed(2)
    model = Classifier((2, 5, 6), 4, 3, 7, dropout=0.5)
    x = torch.rand(300, 2, 5, 6, generator=generator(1))
    h = x
    for i, stride in ((0, 1), (2, 2), (4, 1), (6, 2)):
        layer = model.body[i]
        h = F.conv2d(h, layer.weight, layer.bias, stride, 1).clamp(min=0)
    linear = model.body[9]
    features = (h.flatten(1) @ linear.weight.T + linear.bias).clamp(min=0)
    torch.testing.assert_close(model.features(x), features)
    torch.manual_seed(5)
    dropped = model(x)
    torch.manual_seed(5)
    expected = F.dropout(features, 0.5) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(dropped, expected)
    model.eval()
    logits = features @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x), logits)
    model.train()
    found = predict_classes(model, x, 70)
    assert found.tolist() == logits.argmax(1).tolist() and model.training
    assert (dropped.argmax(1) != logits.argmax(1)).any()
    levels = (255 * x).round()
    model.eval()
    by_levels = model(levels / 255).argmax(1).tolist()
    assert predict_classes(model, levels.byte()).tolist() == by_levels


def test_a_perceptron_drops_units_of_every_layer():
    model = randomized(Perceptron(D, K, (5, 4), 0.5))
    x = torch.rand(6, D, generator=generator(1), dtype=F64)
    torch.manual_seed(5)
    dropped = model(x)
    torch.manual_seed(5)
    h = x
    for i in (0, 3):
        layer = model.body[i]
        h = F.dropout((h @ layer.weight.T + layer.bias).clamp(min=0), 0.5)
    torch.testing.assert_close(dropped, h @ model.head.weight.T + model.head.bias)


def test_stacked_digits_are_read_from_the_first_channel_on():
    class Brightness(nn.Module):
        """Reads the digit that is painted on an image."""

        def forward(self, x):
            """Return logits that are largest at ten times the mean."""
            at = (10 * x.flatten(1).mean(1)).round().long()
            return F.one_hot(at, 10).float()

    digits = torch.tensor([[3, 0, 7], [1, 9, 2]])
    images = (digits / 10)[:, :, None, None].expand(2, 3, 4, 4).contiguous()
    assert predict_stacks(Brightness(), images).tolist() == [307, 192]
