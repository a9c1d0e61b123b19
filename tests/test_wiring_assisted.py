"""Assisted against the papers' formulas in plain torch: every loss, step and number reported.

The references are written here, for one class at a time and with explicit densities. The networks
drop the same half of their features in training, so that the modes are seen.
"""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Normal
from torch.nn.functional import cross_entropy, one_hot

from optgen.controllers import Controller
from optgen.data.images import Batch, Images
from optgen.models.conditional import ConditionalVAE
from optgen.models.vae import VAE
from optgen.rules import Alternating, Extragradient
from optgen.schemes.assisted import Assisted, Balanced
from optgen.schemes.couplings import (
    Agreement,
    Coupling,
    Denoising,
    LossTerms,
    NoCoupling,
    Reconstruction,
)
from optgen.schemes.networks import METHODS, build_networks
from optgen.testing import generator

SHAPE, CLASSES, ALPHA, RATE = (1, 2, 3), 3, 1.3, 0.05
F64 = torch.float64


class HalfInTraining(nn.Module):
    """Dropout that drops every second number, in training only."""

    def forward(self, x):
        """Return the numbers, or twice every second one."""
        return 2 * x * (torch.arange(x.shape[-1]) % 2) if self.training else x


class Net(nn.Module):
    """A classifier with four features."""

    dim = 4

    def __init__(self, inputs=6):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), HalfInTraining())
        self.head = nn.Linear(4, CLASSES)

    def features(self, x):
        """Return the features."""
        return self.body(x.flatten(1))

    def forward(self, x):
        """Return the logits."""
        return self.head(self.features(x))


def half(h, training):
    """Return features as `HalfInTraining` leaves them."""
    return 2 * h * torch.tensor([0.0, 1.0, 0.0, 1.0]) if training else h


def features_by_hand(net, x, training=True):
    """Return the features of `Net`."""
    linear = net.body[0]
    return half(torch.tanh(x.flatten(1) @ linear.weight.T + linear.bias), training)


def logits_by_hand(net, x, training=True):
    """Return the logits of `Net`."""
    return features_by_hand(net, x, training) @ net.head.weight.T + net.head.bias


def joint_bound(vae, x, y, eps):
    """Return J(x, y) of Kingma et al. (2014), of each example with its own class, by one sample."""
    code = one_hot(y, CLASSES).to(x)

    def outputs(net, inputs):
        return net.out((net.x(inputs) + code @ net.y.weight.T).relu())

    mean, log_var = outputs(vae.q_net, x.flatten(1)).chunk(2, -1)
    q = Normal(mean, (log_var / 2).exp())
    z = mean + q.stddev * eps
    out = outputs(vae.p_net, z)
    if vae.likelihood == "bernoulli":
        p = Bernoulli(logits=out, validate_args=False)
    else:
        mean, log_var = out.chunk(2, -1)
        p = Normal(mean, (log_var / 2).exp())
    log_p = p.log_prob(x.flatten(1)) @ torch.ones(x[0].numel(), dtype=F64)
    return log_p + (Normal(0.0, 1.0).log_prob(z) - q.log_prob(z)).sum(-1) - math.log(CLASSES)


def all_bounds(vae, x, eps):
    """Return J(x, y) of every class, (B, K)."""
    columns = [joint_bound(vae, x, torch.full((len(x),), k), eps) for k in range(CLASSES)]
    return torch.stack(columns, 1)


def m2_loss(logits, unlabeled_bounds, labeled_bounds, weight):
    """Return the loss of M2 without its classification, Kingma et al. (2014), Eq. 6 to 8.

    Beside it stands the divergence of the classifier from the generator's posterior, weight - 1
    times: at weight 1 the loss is M2's own.
    """
    q, posterior = logits.softmax(-1), unlabeled_bounds.softmax(-1)
    U = (q * (unlabeled_bounds - q.log())).sum(-1)
    kl = (q * (q / posterior).log()).sum(-1)
    return -U.mean() - labeled_bounds.mean() + (weight - 1) * kl.mean()


def sample_q(vae, x, eps):
    """Return mean, standard deviation and a sample of the latents of a VAE."""
    mean, log_var = vae.q_net(x.flatten(1)).chunk(2, -1)
    return mean, (log_var / 2).exp(), mean + (log_var / 2).exp() * eps


def labeled_images(n=5, seed=7):
    """Return labeled images, of which no two are alike."""
    pixels = torch.randint(256, (n, *SHAPE), dtype=torch.uint8, generator=generator(seed))
    return Images(pixels, torch.arange(n) % CLASSES)


def images(n, seed):
    """Return gray images in [0, 1]."""
    return torch.rand(n, *SHAPE, dtype=F64, generator=generator(seed))


class MovingWeight(Controller):
    """A weight that follows from both measurements, each in its own way; it keeps them."""

    def __init__(self):
        super().__init__(0.5)
        self.received = []

    def multiplier(self, rate, distortion):
        """Return the new weight."""
        self.received.append((rate.item(), distortion.item()))
        return 0.2 + 0.1 * rate + 0.4 * distortion


def make(seed=0, labeled=None, **parts):
    """Return a scheme in float64 whose players take plain gradient steps."""
    modules = {k: m.double() for k, m in parts.items() if isinstance(m, nn.Module)}
    trained = {k: [p for p in m.parameters() if p.requires_grad] for k, m in modules.items()}
    optimizers = {k: torch.optim.SGD(params, RATE) for k, params in trained.items() if params}
    return Assisted(labeled=labeled, alpha=ALPHA, optimizers=optimizers, **parts)


def assert_step(scheme, drawn, losses):
    """Assert that a step descends these losses, by player, and reports them.

    Args:
        scheme: the scheme.
        drawn: batch with its noise.
        losses: name -> function without arguments, the loss of the player.
    """
    scheme.draw = lambda batch: drawn
    expected, values = {}, {}
    for name, loss in losses.items():
        values[name], params = loss(), scheme.params(name)
        grads = torch.autograd.grad(values[name], params, allow_unused=True)
        moves = [0 if g is None else RATE * g for g in grads]
        expected[name] = [p.detach() - move for p, move in zip(params, moves)]
    found = scheme.step(None)
    assert found.keys() == losses.keys()
    for name in losses:
        assert found[name].item() == pytest.approx(values[name].item(), rel=1e-7), name
        for p, q in zip(scheme.params(name), expected[name], strict=True):
            assert torch.allclose(p, q, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("weight", [1.0, 0.4])
@pytest.mark.parametrize("seed", range(2))
def test_agreement_is_m2(seed, weight):
    torch.manual_seed(seed)
    net, vae = Net(), ConditionalVAE(6, CLASSES, 2, 5)
    parts = {"classifier": net, "generator": vae, "coupling": Agreement(), "weight": weight}
    scheme = make(labeled=labeled_images(), **parts)
    drawn = scheme.draw_noise(Batch(images(4, seed)))
    assert torch.equal(drawn.x, images(4, seed)) and drawn.eps.shape == (4, 2)

    def loss():
        bounds = all_bounds(vae, drawn.x, drawn.eps)
        labeled = joint_bound(vae, drawn.labeled, drawn.y, drawn.eps_labeled)
        own = cross_entropy(logits_by_hand(net, drawn.labeled), drawn.y)
        return ALPHA * own + m2_loss(logits_by_hand(net, drawn.x), bounds, labeled, weight)

    assert_step(scheme, drawn, {"classifier": loss, "generator": loss})


@pytest.mark.parametrize("receiver", ["both", "classifier", "generator"])
@pytest.mark.parametrize("kind", ["bernoulli", "squared"])
def test_reconstruction_goes_to_its_receivers(kind, receiver):
    torch.manual_seed(1)
    net, decoder, weight = Net(), nn.Linear(4, 6), 0.7
    coupling = Reconstruction(kind, receiver)
    parts = {"classifier": net, "generator": decoder, "coupling": coupling, "weight": weight}
    scheme = make(labeled=labeled_images(), **parts)
    drawn = scheme.draw_noise(Batch(images(4, 2)))

    def error():
        out, x = decoder(features_by_hand(net, drawn.x)), drawn.x.flatten(1)
        if kind == "squared":
            return ((out - x) ** 2).sum() / 2 / len(x)
        return -(x * out.sigmoid().log() + (1 - x) * (-out).sigmoid().log()).sum() / len(x)

    def loss(classifiers_share, generators_share):
        own = ALPHA * cross_entropy(logits_by_hand(net, drawn.labeled), drawn.y)
        reported = weight * error() + (error() if receiver == "classifier" else 0)
        shared = error()
        descended = (classifiers_share or 0) * shared + (generators_share or 0) * shared
        return own + descended + (reported - descended).detach()

    # Where the classifier alone receives the error, the decoder descends it at weight 1.
    of_classifier = 0.0 if receiver == "generator" else weight
    of_generator = 1.0 if receiver == "classifier" else weight
    assert_step(
        scheme,
        drawn,
        {"classifier": lambda: loss(of_classifier, 0), "generator": lambda: loss(0, of_generator)},
    )


def features_loss(vae, x, eps):
    """Return the negative bound of a VAE: Bernoulli pixels, and the KL of Gaussians in full."""
    mean, std, z = sample_q(vae, x, eps)
    p = Bernoulli(logits=vae.p_net(z), validate_args=False)
    kl = torch.distributions.kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).sum()
    return (kl - p.log_prob(x.flatten(1)).sum()) / len(x)


def test_m1_classifies_latents_and_leaves_them_to_their_bound():
    torch.manual_seed(2)
    net, vae = Net(2), VAE(6, 5, 4, 2, activation=nn.Tanh)
    scheme = make(labeled=labeled_images(), classifier=net, features=vae)
    drawn = scheme.draw_noise(Batch(images(4, 3)))

    def loss():
        z = sample_q(vae, drawn.labeled, drawn.eps_labeled[:, -2:])[2].detach()
        return ALPHA * cross_entropy(logits_by_hand(net, z), drawn.y)

    def bound():
        return features_loss(vae, drawn.x, drawn.eps[:, :2])

    assert drawn.eps.shape == (4, 4)
    assert_step(scheme, drawn, {"classifier": loss, "features": bound})


def m1_m2(**more):
    """Return M1+M2 and its networks."""
    net, vae = Net(2), VAE(6, 5, 4, 2, activation=nn.Tanh)
    joint = ConditionalVAE(2, CLASSES, 3, 5, "gaussian")
    parts = {"classifier": net, "generator": joint, "features": vae, "coupling": Agreement()}
    return make(labeled=labeled_images(), **parts, **more), net, joint, vae


@pytest.mark.parametrize("make_rule", [lambda: None, lambda: Balanced(norms=False)])
def test_m1_m2_is_m2_on_latents(make_rule):
    # Balanced without its norms is the plain gradient, and leaves the features to their own.
    torch.manual_seed(3)
    scheme, net, joint, vae = m1_m2(weight=0.6, rule=make_rule())
    drawn = scheme.draw_noise(Batch(images(4, 4)))

    def loss():
        z, of_labeled = (
            sample_q(vae, x, eps[:, -2:])[2].detach()
            for x, eps in ((drawn.x, drawn.eps), (drawn.labeled, drawn.eps_labeled))
        )
        bounds = all_bounds(joint, z, drawn.eps[:, :3])
        labeled = joint_bound(joint, of_labeled, drawn.y, drawn.eps_labeled[:, :3])
        own = cross_entropy(logits_by_hand(net, of_labeled), drawn.y)
        return ALPHA * own + m2_loss(logits_by_hand(net, z), bounds, labeled, 0.6)

    def bound():
        return features_loss(vae, drawn.x, drawn.eps[:, 3:5])

    losses = {"classifier": loss, "generator": loss, "features": bound}
    assert drawn.eps.shape == (4, 7)
    assert_step(scheme, drawn, losses)


def test_features_trained_before_stay_as_they_are():
    torch.manual_seed(3)
    _, net, joint, vae = m1_m2()
    vae.requires_grad_(False)
    before = [p.clone() for p in vae.parameters()]
    scheme = make(
        labeled=labeled_images(),
        classifier=net,
        generator=joint,
        features=vae,
        coupling=Agreement(labeled_weight=0.1),
        weight=0.6,
    )
    drawn = scheme.draw_noise(Batch(images(4, 4)))

    def loss():
        z, of_labeled = (
            sample_q(vae, x, eps[:, -2:])[2]
            for x, eps in ((drawn.x, drawn.eps), (drawn.labeled, drawn.eps_labeled))
        )
        bounds = all_bounds(joint, z, drawn.eps[:, :3])
        labeled = joint_bound(joint, of_labeled, drawn.y, drawn.eps_labeled[:, :3])
        own = cross_entropy(logits_by_hand(net, of_labeled), drawn.y)
        return ALPHA * own + m2_loss(logits_by_hand(net, z), bounds, 0.1 * labeled, 0.6)

    assert_step(scheme, drawn, {"classifier": loss, "generator": loss})
    assert all(torch.equal(a, b) for a, b in zip(before, vae.parameters(), strict=True))
    assert scheme.modules[-1] is vae
    scheme.to(torch.float32)
    assert {p.dtype for p in vae.parameters()} == {torch.float32}


@pytest.mark.parametrize("make_rule", [lambda: None, Alternating, Extragradient])
def test_a_controller_sees_each_batch_once(make_rule):
    torch.manual_seed(4)
    net, decoder, weight = Net(), nn.Linear(4, 6), MovingWeight()
    parts = {"classifier": net, "generator": decoder, "coupling": Reconstruction("squared")}
    scheme = make(labeled=labeled_images(), weight=weight, rule=make_rule(), **parts)
    for t in range(3):
        x = images(4, t)
        torch.manual_seed(t)
        drawn = scheme.draw_noise(Batch(x))
        error = ((decoder(features_by_hand(net, x)) - x.flatten(1)) ** 2).sum().item() / 8
        nll = cross_entropy(logits_by_hand(net, drawn.labeled), drawn.y).item()
        torch.manual_seed(t)
        losses = scheme.step(Batch(x))
        assert len(weight.received) == t + 1
        assert weight.received[t] == pytest.approx((error, nll), rel=1e-9)
        lam = 0.2 + 0.1 * error + 0.4 * nll
        assert losses["classifier"].item() == pytest.approx(ALPHA * nll + lam * error, rel=1e-9)
    assert scheme.evaluate([Batch(x, torch.arange(4) % 3)])["weight"] == pytest.approx(lam)


class Conflict(Coupling):
    """Terms whose gradients by the classifier agree or conflict, as asked for."""

    def __init__(self, sign):
        super().__init__()
        self.sign = sign

    def terms(self, classifier, generator, batch):
        """Return the terms: the coupling is the classification and a bit more, times a number."""
        nll = cross_entropy(classifier(batch.labeled), batch.y)
        (g,) = generator.parameters()
        more = sum((p.flatten() @ tilt(p)) for p in classifier.parameters())
        return LossTerms(nll, (self.sign * nll + more + 3) * g.sum() ** 2, (g - 1).square().sum())


def tilt(p):
    """Return a small constant gradient."""
    return torch.linspace(-0.01, 0.02, p.numel(), dtype=p.dtype)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("norms, project", [(True, False), (False, True), (True, True)])
def test_balanced_gradients(norms, project, sign):
    torch.manual_seed(5)
    net, number, weight = Net(), nn.Linear(1, 1, bias=False), 0.6
    parts = {"classifier": net, "generator": number, "coupling": Conflict(sign), "weight": weight}
    scheme = make(labeled=labeled_images(), rule=Balanced(norms, project), **parts)
    with torch.no_grad():
        number.weight.fill_(1.7)
    drawn, params = scheme.draw_noise(Batch(images(4, 5))), scheme.params("classifier")
    terms = scheme.coupling.terms(net, number, drawn)
    flat = [
        torch.cat([g.flatten() for g in torch.autograd.grad(term, params, retain_graph=True)])
        for term in terms[:2]
    ]
    a, r = flat
    assert (a @ r > 0) == (sign > 0)
    if norms:
        r = r * a.norm() / r.norm()
    if project and a @ r < 0:
        r = r - (a @ r) / (a @ a) * a
    before = torch.cat([p.detach().flatten() for p in params])
    w = number.weight.item()
    dw = weight * 2 * (terms.coupling / w).item() + 2 * (w - 1)
    scheme.draw = lambda batch: drawn
    losses = scheme.step(None)
    after = torch.cat([p.detach().flatten() for p in params])
    assert torch.allclose(after, before - RATE * (ALPHA * a + weight * r), rtol=1e-9, atol=1e-12)
    assert number.weight.item() == pytest.approx(w - RATE * dw)
    value = ALPHA * terms.classification + weight * terms.coupling + terms.generation
    assert losses["classifier"].item() == losses["generator"].item() == pytest.approx(value.item())


@pytest.mark.parametrize("n", [3, 5, 12])
def test_labeled_images_come_with_their_labels(n):
    labeled = labeled_images()
    scheme = make(labeled=labeled, classifier=Net())
    for seed in range(3):
        torch.manual_seed(seed)
        x, y = scheme.draw_labeled(images(n, 0))
        same = (x[:, None] == labeled.images[None] / 255.0).flatten(2).all(2)
        assert same.shape == (n, 5) and (same.sum(1) == 1).all()
        assert torch.equal(labeled.labels[same.int().argmax(1)], y)


def test_labeled_images_are_drawn_black_and_white_where_the_batches_are():
    gray = Images(torch.full((4, 1, 30, 30), 64, dtype=torch.uint8), torch.arange(4) % CLASSES)
    gray.images[:, :, 0] = 0
    gray.images[:, :, 1] = 255
    net = Net(900).double()
    x, _ = Assisted(net, labeled=gray, binarize=True).draw_labeled(torch.zeros(40, 1, 30, 30))
    assert set(x.unique().tolist()) == {0.0, 1.0}
    assert (x[:, :, 0] == 0).all() and (x[:, :, 1] == 1).all()
    drawn, p = x[:, :, 2:], 64 / 255
    assert abs(drawn.mean() - p) < 5 * math.sqrt(p * (1 - p) / drawn.numel())


def test_predictions_are_without_dropout_and_leave_the_modes():
    torch.manual_seed(6)
    scheme, net, _, vae = m1_m2()
    x = images(9, 6)
    mean = vae.q_net(x.flatten(1)).chunk(2, -1)[0]
    expected = logits_by_hand(net, mean, training=False).softmax(-1)
    assert torch.allclose(scheme.predict(x), expected)
    assert net.training and vae.training


def pairs_in_order(inside, outside):
    """Return the share of pairs in which the score inside is larger, ties counted half."""
    larger = (inside[:, None] > outside).double() + 0.5 * (inside[:, None] == outside).double()
    return larger.mean().item()


def agreement_typicality(joint, x, eps):
    """Return log p(x) under a conditional VAE, by its bound, (B,)."""
    return all_bounds(joint, x, eps).exp().sum(1).log()


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("method", ["m2", "m1", "m1+m2"])
def test_every_number_of_the_evaluation(method, seed):
    torch.manual_seed(7)
    joint = vae = None
    if method == "m1+m2":
        scheme, net, joint, vae = m1_m2()
    elif method == "m1":
        net, vae = Net(2), VAE(6, 5, 4, 2, activation=nn.Tanh)
        scheme = make(classifier=net, features=vae, labeled=labeled_images())
    else:
        net, joint = Net(), ConditionalVAE(6, CLASSES, 2, 5)
        scheme = make(classifier=net, generator=joint, labeled=labeled_images())
    with torch.no_grad():
        net.head.weight.mul_(6)
    y = torch.randint(-1, CLASSES, (16,), generator=generator(8))
    inside, outside = images(16, 8), images(9, 9) ** 4
    batches = [Batch(x, labels) for x, labels in zip(inside.split(7), y.split(7))]
    others = [Batch(x) for x in outside.split(6)]
    found = scheme.evaluate(batches, others, seed=seed)
    scores, logits = [], []
    for parts in (batches, others):
        rng, own_scores, own_logits = generator(seed), [], []
        for batch in parts:
            x = batch.x
            if vae is None:
                eps = torch.randn(len(x), 2, generator=rng, dtype=F64)
                own_scores.append(agreement_typicality(joint, x, eps))
                own_logits.append(logits_by_hand(net, x, training=False))
                continue
            eps = torch.randn(len(x), 2, generator=rng, dtype=F64)
            mean, std, z = sample_q(vae, x, eps)
            p = Bernoulli(logits=vae.p_net(z), validate_args=False).log_prob(x.flatten(1)).sum(1)
            p = p - Normal(mean, std).log_prob(z).sum(1)
            if joint is None:
                own_scores.append(p + Normal(0.0, 1.0).log_prob(z).sum(1))
            else:
                inner = torch.randn(len(x), 3, generator=rng, dtype=F64)
                own_scores.append(p + agreement_typicality(joint, z, inner))
            own_logits.append(logits_by_hand(net, mean, training=False))
        scores.append(torch.cat(own_scores))
        logits.append(torch.cat(own_logits))
    p, q = (x.softmax(1).amax(1) for x in logits)
    assert found["n_outside"] == 9
    assert found["auroc"] == pytest.approx(pairs_in_order(*scores))
    assert found["auroc_confidence"] == pytest.approx(pairs_in_order(p, q))
    for name in ("auroc", "auroc_confidence"):
        assert abs(found[name] - 0.5) > 0.02, (name, "a test at one half would see no swap")
    known = y >= 0
    claimed = logits[0].softmax(1)[known]
    wrong = int((claimed.argmax(1) != y[known]).sum())
    assert 0 < wrong < known.sum() / 2 or wrong > known.sum() / 2
    assert found["n"] == int(known.sum()) and found["error"] == wrong / int(known.sum())
    nll = -claimed.gather(1, y[known][:, None]).log().mean().item()
    assert found["nll"] == pytest.approx(nll) and found["weight"] == 1.0
    low, high = found["error_low"], found["error_high"]
    for end in (low, high):  # Wilson's interval solves this equation
        spread = 1.96 * math.sqrt(end * (1 - end) / found["n"])
        assert abs(end - found["error"]) == pytest.approx(spread)
    assert low < found["error"] < high


def test_the_typicality_of_latents_is_a_bound_in_nats():
    torch.manual_seed(8)
    scheme, _, joint, vae = m1_m2()
    x, rng = images(6, 3), generator(4)
    found = scheme.typicality(x, generator(4))
    eps, inner = (torch.randn(6, n, generator=rng, dtype=F64) for n in (2, 3))
    mean, std, z = sample_q(vae, x, eps)
    p = Bernoulli(logits=vae.p_net(z), validate_args=False).log_prob(x.flatten(1)).sum(1)
    bound = p - Normal(mean, std).log_prob(z).sum(1) + agreement_typicality(joint, z, inner)
    assert torch.allclose(found, bound, rtol=1e-7)


def test_what_is_left_out_has_its_default():
    net, joint = Net(), ConditionalVAE(6, CLASSES, 2, 5)
    scheme = Assisted(net, joint)
    assert isinstance(scheme.coupling, Agreement) and scheme.coupling.kind == "classifier"
    assert (scheme.weight.value, scheme.alpha, scheme.binarize) == (1, 1, False)
    for player in scheme.players.values():
        (group,) = player.optimizer.param_groups
        assert group["lr"] == 1e-3 and tuple(group["betas"]) == (0.9, 0.999)
    plain = Assisted(Net())
    assert list(plain.players) == ["classifier"]
    y = torch.arange(4) % 3
    found = plain.evaluate([Batch(images(4, 0).float(), y)], [Batch(images(5, 1).float())])
    assert "auroc" not in found and found["n_outside"] == 5
    # Without labeled images the labels are the batch's own.
    x = images(4, 0).float()
    batch = plain.draw_noise(Batch(x, y))
    assert torch.equal(batch.labeled, x) and torch.equal(batch.y, y)
    loss = cross_entropy(logits_by_hand(plain.classifier, x), y)
    assert plain.step(Batch(x, y))["classifier"].item() == pytest.approx(loss.item())


def test_samples_come_from_the_generative_half():
    torch.manual_seed(9)
    joint = ConditionalVAE(6, CLASSES, 2, 5)
    scheme = make(classifier=Net(), generator=joint)

    def decoded(net, z, y):
        return net.out((net.x(z) + net.y.weight.T[y]).relu())

    y = torch.tensor([0, 1, 2, 0, 1])
    torch.manual_seed(1)
    found = scheme.sample(5)
    torch.manual_seed(1)
    z = torch.randn(5, 2, dtype=F64)
    assert torch.allclose(found, decoded(joint.p_net, z, y).sigmoid())
    scheme, _, joint, vae = m1_m2()
    torch.manual_seed(1)
    found = scheme.sample(5)
    torch.manual_seed(1)
    mean = decoded(joint.p_net, torch.randn(5, 3, dtype=F64), y).chunk(2, -1)[0]
    assert torch.allclose(found, vae.p_net(mean).sigmoid())
    scheme = make(classifier=Net(2), features=vae)
    torch.manual_seed(1)
    found = scheme.sample(5)
    torch.manual_seed(1)
    assert torch.allclose(found, vae.p_net(torch.randn(5, 2, dtype=F64)).sigmoid())
    assert make(classifier=Net()).sample(5) is None


@pytest.mark.parametrize("with_features", [False, True])
def test_samples_are_of_the_classes_asked_for(with_features):
    torch.manual_seed(10)
    if with_features:
        scheme, _, joint, vae = m1_m2()
    else:
        joint = ConditionalVAE(6, CLASSES, 3, 5)
        scheme = make(classifier=Net(), generator=joint)
    assert scheme.conditional and scheme.n_classes == CLASSES
    asked = torch.tensor([2, 2, 0, 1, 2, 0])
    torch.manual_seed(4)
    found = scheme.sample(6, labels=asked)
    torch.manual_seed(4)
    hidden = joint.p_net.x(torch.randn(6, 3, dtype=F64)) + joint.p_net.y(one_hot(asked, 3).double())
    out = joint.p_net.out(hidden.relu())
    expected = vae.p_net(out[:, :2]).sigmoid() if with_features else out.sigmoid()
    assert torch.allclose(found, expected, rtol=1e-12)
    with pytest.raises(ValueError, match="Assisted"):
        scheme.sample(2, labels=torch.tensor([0, CLASSES]))


def test_a_method_without_a_generator_of_classes_takes_no_labels():
    for scheme in (make(classifier=Net(2), features=VAE(6, 5, 4, 2)), make(classifier=Net())):
        assert not scheme.conditional and scheme.n_classes == 0
        with pytest.raises(ValueError, match="labels go with a conditional model"):
            scheme.sample(2, labels=torch.tensor([0, 1]))


# The networks of each method

PLAN = {"z_dim": 4, "units": 9, "dropout": 0.25, "noise": 0.7, "x_mean": torch.full((6,), 0.2)}
SIZES = (6, 8, 7, CLASSES)


def built(method, **more):
    """Return the networks of a method."""
    return build_networks(method, SIZES, **(PLAN | more))


def dropout_rates(module):
    """Return the rates of all dropout layers."""
    return {m.p for m in module.modules() if isinstance(m, nn.Dropout)}


@pytest.mark.parametrize("method", ["plain", "reconstruction", "agreement", "m1", "m1+m2"])
def test_dropout_and_sizes_reach_every_classifier(method):
    classifier = built(method)["classifier"]
    assert dropout_rates(classifier) == {0.25}
    inputs = 4 if method.startswith("m1") else 6
    widths = [m.in_features for m in classifier.modules() if isinstance(m, nn.Linear)]
    assert widths == [inputs, 8, 7] and classifier.head.out_features == CLASSES


def test_generators_have_their_units_their_likelihood_and_their_start():
    pixels, latents = built("agreement")["generator"], built("m1+m2")["generator"]
    assert (pixels.x_dim, pixels.z_dim, pixels.likelihood) == (6, 4, "bernoulli")
    assert (latents.x_dim, latents.z_dim, latents.likelihood) == (4, 4, "gaussian")
    for net in (pixels, latents):
        assert net.classes == CLASSES and net.q_net.x.out_features == 9
    default = built("agreement", units=None)["generator"]
    assert default.q_net.x.out_features == 8
    decoder = built("reconstruction")["generator"]
    assert [(m.in_features, m.out_features) for m in decoder if isinstance(m, nn.Linear)] == [
        (7, 8),
        (8, 6),
    ]
    start = torch.tensor(0.2).logit()
    starts = [pixels.p_net.out.bias]
    starts += [built(method)["features"].p_net[-1].bias for method in ("m1", "m1+m2")]
    for bias in starts:
        assert torch.allclose(bias, start.expand(6))
    features = built("m1")["features"]
    widths = [m.out_features for m in features.q_net if isinstance(m, nn.Linear)]
    assert widths == [8, 7, 8]


COUPLINGS = {
    "plain": NoCoupling,
    "reconstruction": Reconstruction,
    "agreement": Agreement,
    "m1": NoCoupling,
    "m1+m2": Agreement,
    "ladder": Denoising,
    "gamma": Denoising,
}


@pytest.mark.parametrize("method", METHODS)
def test_the_coupling_of_each_method(method):
    assert type(built(method)["coupling"]) is COUPLINGS[method]


@pytest.mark.parametrize(
    "method, weights", [("ladder", [1000, 10, 0.1, 0.1]), ("gamma", [0, 0, 0, 1])]
)
def test_layers_of_the_ladder(method, weights):
    networks = built(method)
    assert networks["classifier"].noise == 0.7 and networks["classifier"].sizes == SIZES
    assert networks["generator"].layer_weights.tolist() == pytest.approx(weights)
    given = built(method, layer_weights=(1.0, 2.0, 3.0, 4.0))["generator"]
    assert given.layer_weights.tolist() == [1, 2, 3, 4]


def test_the_default_weights_of_the_methods():
    weights = {name: method.weight for name, method in METHODS.items()}
    one = dict.fromkeys(("agreement", "m1+m2", "ladder", "gamma"), 1.0)
    assert weights == one | {"reconstruction": 0.03, "plain": None, "m1": None}
