"""FeedbackGAN and the rules of games against steps written by hand: moves and reported losses."""

import copy
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torch.nn.functional import softplus

from optgen.data.images import Batch
from optgen.games import Game, Player
from optgen.models.classifier import mnist_classifier
from optgen.models.features import default_features, downsampled_pixels
from optgen.models.gan import MLPDiscriminator, MLPGenerator
from optgen.optim import Adam
from optgen.rules import (
    RULES,
    Alternating,
    Clipped,
    Extragradient,
    Lookahead,
    Optimistic,
    Simultaneous,
    alternating_gan,
    build_rule,
)
from optgen.schemes.feedback import FeedbackGAN, GANBatch
from optgen.testing import generator

F64 = torch.float64
LR = {"G": 0.05, "D": 0.08}


class HalfInTraining(nn.Module):
    """Dropout that drops every second number, in training only."""

    def forward(self, x):
        """Return the numbers, or twice every second one."""
        return 2 * x * (torch.arange(x.shape[-1]) % 2) if self.training else x


def gan(seed=0, **more):
    """Return a GAN in float64 of two numbers, with plain gradient steps, and a batch."""
    torch.manual_seed(seed)
    G, D = MLPGenerator(3, (6,), (2,)).double(), MLPDiscriminator((2,), (6,)).double()
    for net in (G.net, D.net):
        net.insert(2, HalfInTraining())
    optimizers = [torch.optim.SGD(net.parameters(), LR[k]) for k, net in (("G", G), ("D", D))]
    scheme = FeedbackGAN(G, D, optimizers=optimizers, **more)
    x, z = (torch.randn(7, n, dtype=F64) for n in (2, 3))
    batch = GANBatch(2 * x + 1, z)
    scheme.draw = lambda _: batch
    return scheme, batch


def squared_slopes(D, x):
    """Return the mean over examples of the squared gradient of a logit by its example."""
    x = x.detach().requires_grad_() if not x.requires_grad else x
    total = 0.0
    for i in range(len(x)):
        (g,) = torch.autograd.grad(D(x)[i], x, create_graph=True)
        total = total + (g[i] ** 2).sum()
    return total / len(x)


LOSSES = {  # name -> (loss of D, loss of G) from the logits of real and generated examples
    "saturating": (lambda r, f: softplus(-r) + softplus(f), lambda r, f: -softplus(f)),
    "non-saturating": (lambda r, f: softplus(-r) + softplus(f), lambda r, f: softplus(-f)),
    "hinge": (lambda r, f: (1 - r).clamp(min=0) + (1 + f).clamp(min=0), lambda r, f: -f),
    "wasserstein": (lambda r, f: f - r, lambda r, f: -f),
    "relativistic": (lambda r, f: softplus(f - r), lambda r, f: softplus(r - f)),
}


def losses_by_hand(scheme, batch, name, r1, r2):
    """Return the losses of G and D, of Goodfellow et al. (2014) and Mescheder et al. (2018)."""
    G, D, (d_loss, g_loss) = scheme.generator, scheme.discriminator, LOSSES[name]
    fake = G(batch.z)
    real_logits, fake_logits = D(batch.x), D(fake)
    penalties = r1 / 2 * squared_slopes(D, batch.x) + r2 / 2 * squared_slopes(D, fake)
    own = d_loss(real_logits, fake_logits).mean() + penalties
    return {"G": g_loss(real_logits, fake_logits).mean(), "D": own}


def params_of(scheme):
    """Return the parameters by player."""
    return {name: scheme.params(name) for name in scheme.players}


def descend(params, loss, lr):
    """Take a step of gradient descent in place."""
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    with torch.no_grad():
        for p, g in zip(params, grads, strict=True):
            p -= 0 if g is None else lr * g


def assert_same_weights(one, other):
    """Assert that two games have the same weights, up to rounding."""
    for name, params in params_of(one).items():
        for p, q in zip(params, other.params(name), strict=True):
            assert torch.allclose(p, q, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("r1, r2", [(0.7, 0.0), (0.0, 0.9), (0.4, 1.3)])
@pytest.mark.parametrize("name", LOSSES)
def test_a_simultaneous_step_with_penalties(name, r1, r2):
    scheme, batch = gan(loss=name, r1=r1, r2=r2)
    twin, _ = gan()
    for _ in range(2):
        expected = losses_by_hand(twin, batch, name, r1, r2)
        found = scheme.step(None)
        for player in ("G", "D"):
            assert found[player].item() == pytest.approx(expected[player].item(), rel=1e-9)
        grads = {
            k: torch.autograd.grad(expected[k], twin.params(k), retain_graph=True) for k in "GD"
        }
        with torch.no_grad():
            for k in "GD":
                for p, g in zip(twin.params(k), grads[k]):
                    p -= LR[k] * g
        assert_same_weights(scheme, twin)


@pytest.mark.parametrize("repeats, order", [({"D": 3}, None), ({"G": 2}, ["D", "G"])])
def test_alternating_reports_the_loss_before_the_first_move_of_each(repeats, order):
    scheme, batch = gan(rule=Alternating(repeats=repeats, order=order), r1=0.3)
    twin, _ = gan()
    expected = {}
    for name in order or ["G", "D"]:
        for _ in range(repeats.get(name, 1)):
            loss = losses_by_hand(twin, batch, "non-saturating", 0.3, 0)[name]
            expected.setdefault(name, loss.item())
            descend(twin.params(name), loss, LR[name])
    found = {name: loss.item() for name, loss in scheme.step(None).items()}
    assert found == pytest.approx(expected, rel=1e-9)
    assert_same_weights(scheme, twin)


def field_by_hand(game, batch):
    """Return the losses and each player's own gradient at the present weights."""
    losses = losses_by_hand(game, batch, "non-saturating", 0.2, 0)
    grads = {k: torch.autograd.grad(losses[k], game.params(k), retain_graph=True) for k in losses}
    return {k: loss.item() for k, loss in losses.items()}, grads


def move(game, start, grads):
    """Set the weights of a game to a gradient step away from others."""
    with torch.no_grad():
        for k, params in params_of(game).items():
            for p, s, g in zip(params, start[k], grads[k], strict=True):
                p.copy_(s - LR[k] * g)


def snapshot(game):
    """Return copies of all weights by player."""
    return {k: [p.detach().clone() for p in params] for k, params in params_of(game).items()}


@pytest.mark.parametrize("past", [False, True])
def test_extragradient_moves_and_reports(past):
    scheme, batch = gan(rule=Extragradient(past=past), r1=0.2)
    twin, _ = gan()
    last = None
    for _ in range(3):
        start = snapshot(twin)
        losses, here = field_by_hand(twin, batch)
        move(twin, start, last if past and last else here)
        losses_ahead, ahead = field_by_hand(twin, batch)
        move(twin, start, ahead)
        # Korpelevich's step evaluates both points; Popov's, from its second step, only the second.
        expected = losses_ahead if past and last else losses
        last = ahead
        found = {name: loss.item() for name, loss in scheme.step(None).items()}
        assert found == pytest.approx(expected, rel=1e-9)
        assert_same_weights(scheme, twin)


def test_optimistic_moves_and_reports():
    scheme, batch = gan(rule=Optimistic(), r1=0.2)
    twin, _ = gan()
    last = None
    for _ in range(3):
        losses, here = field_by_hand(twin, batch)
        twice = here
        if last:
            twice = {k: [2 * a - b for a, b in zip(here[k], last[k])] for k in here}
        move(twin, snapshot(twin), twice)
        last = here
        found = {name: loss.item() for name, loss in scheme.step(None).items()}
        assert found == pytest.approx(losses, rel=1e-9)
        assert_same_weights(scheme, twin)


def test_lookahead_returns_its_share_of_the_way():
    scheme, batch = gan(rule=Lookahead(Simultaneous(), every=3, alpha=0.3), r1=0.2)
    twin, _ = gan()
    slow = snapshot(twin)
    for t in range(1, 8):
        losses, here = field_by_hand(twin, batch)
        move(twin, snapshot(twin), here)
        if t % 3 == 0:
            with torch.no_grad():
                for k, params in params_of(twin).items():
                    for p, s in zip(params, slow[k], strict=True):
                        p.copy_(s + 0.3 * (p - s))
            slow = snapshot(twin)
        found = {name: loss.item() for name, loss in scheme.step(None).items()}
        assert found == pytest.approx(losses, rel=1e-9)
        assert_same_weights(scheme, twin)


def test_clipped_shortens_each_player_alone():
    scheme, batch = gan(rule=Clipped(0.3), r1=0.2)
    twin, _ = gan()
    _, here = field_by_hand(twin, batch)
    lengths = {k: math.sqrt(sum(g.square().sum() for g in grads)) for k, grads in here.items()}
    assert min(lengths.values()) > 0.3
    short = {k: [0.3 / lengths[k] * g for g in grads] for k, grads in here.items()}
    move(twin, snapshot(twin), short)
    scheme.step(None)
    for name, params in params_of(scheme).items():
        for p, q in zip(params, twin.params(name), strict=True):
            assert torch.allclose(p, q, rtol=1e-5, atol=1e-7)


FEEDBACKS = {  # name: penalized player, loss differentiated, by whose weights, default weight
    "literal": ("G", "D", "G", 0.1),
    "nagarajan-kolter": ("G", "D", "D", 0.005),
    "smoothing": ("D", "D", "G", 0.5),
}


@pytest.mark.parametrize("weight", [None, 0.3])
@pytest.mark.parametrize("name", FEEDBACKS)
def test_the_named_feedbacks(name, weight):
    to, loss, wrt, default = FEEDBACKS[name]
    scheme, batch = gan(rule=build_rule(name, weight))
    twin, _ = gan()
    losses = losses_by_hand(twin, batch, "non-saturating", 0, 0)
    grads = torch.autograd.grad(losses[loss], twin.params(wrt), create_graph=True)
    penalty = (default if weight is None else weight) * sum(g.square().sum() for g in grads)
    expected = {k: losses[k] + (penalty if k == to else 0) for k in losses}
    moves = {
        k: torch.autograd.grad(v, twin.params(k), retain_graph=True) for k, v in expected.items()
    }
    found = scheme.step(None)
    move(twin, snapshot(twin), moves)
    assert_same_weights(scheme, twin)
    for k in losses:
        assert found[k].item() == pytest.approx(losses[k].item(), rel=1e-9)


def test_the_named_rules_have_their_arguments():
    inner = Optimistic  # a way to step
    rule = build_rule("alternating:D=3,inner=consensus", 0.4)
    assert rule.repeats == {"D": 3} and rule.inner.weight == 0.4
    assert alternating_gan(G=2).repeats == {"G": 2}
    looking = build_rule("lookahead:inner=optimistic,every=4,alpha=0.25")
    assert isinstance(looking.inner, inner) and (looking.every, looking.alpha) == (4, 0.25)
    assert build_rule("extragradient:past=true").past is True
    assert build_rule("symplectic:align=false", 0.7).weight == 0.7
    unrolled = build_rule("unrolled")
    assert (unrolled.player, unrolled.steps) == ("D", 5)
    assert build_rule("consensus").weight == 0.05
    assert set(RULES) >= set(FEEDBACKS)


def distance(a, b):
    """Return the squared Fréchet distance of two sets, by SciPy."""
    a, b = np.asarray(a), np.asarray(b)
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)


def floor(x, n, m):
    """Return the expected distance of samples of n and of m from the Gaussian of a set."""
    values = np.linalg.eigvalsh(np.cov(np.asarray(x).T))
    pairs = sum(
        a * b * (1 + (i == j)) / (a + b) for i, a in enumerate(values) for j, b in enumerate(values)
    )
    return (1 / n + 1 / m) * (values.sum() + pairs / 2)


@pytest.mark.parametrize("seed", [0, 4])
def test_every_number_of_the_evaluation(seed):
    def features(x):
        """Return features in which examples are compared."""
        return torch.cat([x, x**2], 1)

    scheme, _ = gan(r1=0.5, features=features)
    del scheme.draw
    scheme.draw = scheme.draw_noise
    x = torch.randn(23, 2, generator=generator(1), dtype=F64)
    found = scheme.evaluate([Batch(part) for part in x.split(9)], seed=seed)
    rng = generator(seed)
    z = torch.cat([torch.randn(len(p), 3, generator=rng, dtype=F64) for p in x.split(9)])
    assert scheme.generator.training and scheme.discriminator.training
    G, D = copy.deepcopy(scheme.generator).eval(), copy.deepcopy(scheme.discriminator).eval()
    fake = G(z)
    slopes = squared_slopes(D, x).item()
    expected = {
        "G": softplus(-D(fake)).mean().item(),
        "D": (softplus(-D(x)).mean() + softplus(D(fake)).mean()).item() + 0.25 * slopes,
        "fid": distance(features(x).detach(), features(fake).detach()),
        "fid_floor": floor(features(x), 23, 23),
    }
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-6)


def test_samples_are_drawn_in_evaluation_mode():
    scheme, _ = gan()
    torch.manual_seed(3)
    found = scheme.sample(5)
    torch.manual_seed(3)
    z = torch.randn(5, 3, dtype=F64)
    assert scheme.generator.training
    assert torch.allclose(found, copy.deepcopy(scheme.generator).eval()(z))
    assert not torch.allclose(found, scheme.generator(z))


def test_simple_features_are_means_of_squares():
    x = torch.rand(3, 2, 16, 24, generator=generator(0))
    by_hand = x.unflatten(2, (8, 2)).unflatten(4, (8, 3)).mean((3, 5)).flatten(1)
    assert torch.allclose(downsampled_pixels(x), by_hand)
    assert torch.equal(downsampled_pixels(x[:, 0]), x[:, 0].flatten(1))
    assert default_features(x) is downsampled_pixels
    digits = torch.rand(3, 1, 28, 28, generator=generator(1))
    assert torch.equal(default_features(digits)(digits), mnist_classifier().features(digits))


def test_noise_is_drawn_for_each_real_example():
    scheme, _ = gan()
    x = torch.randn(4, 2, dtype=F64)
    batch = scheme.draw_noise(Batch(x), generator(5))
    assert torch.equal(batch.x, x)
    assert torch.equal(batch.z, torch.randn(4, 3, generator=generator(5), dtype=F64))


def test_a_mode_is_that_of_all_players_and_a_state_is_that_of_all_parts():
    nets = {"a": nn.Sequential(nn.Linear(2, 2), nn.Dropout()), "b": nn.Linear(2, 1)}
    players = {
        k: Player(net, lambda x, net=net: net(x).square().mean(), Adam(net.parameters()))
        for k, net in nets.items()
    }
    game = Game(**players)
    for mode in (False, True, False):
        assert game.train(mode) is game
        assert all(m.training == mode for net in nets.values() for m in net.modules())

    class Counter:
        """A part with a state of one number."""

        def __init__(self, n):
            self.n = n

        def state_dict(self):
            """Return the number."""
            return {"n": self.n}

        def check_state(self, state):
            """Accept every state."""

        def load_state_dict(self, state):
            """Take the number."""
            self.n = state["n"]

    class Counting(Game):
        """A game with such a part."""

        stateful_parts = ("counter",)

    def counting(n):
        net = nn.Linear(1, 1)
        player = Player(net, lambda x: net(x).sum(), Adam(net.parameters()))
        game = Counting(net=player)
        game.counter = Counter(n)
        return game

    one, other = counting(3), counting(8)
    other.load_state_dict(one.state_dict())
    assert other.counter.n == 3
    for p, q in zip(one.params("net"), other.params("net")):
        assert torch.equal(p, q)
