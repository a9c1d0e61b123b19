"""Update rules against explicit matrices, the rates of the bilinear game, and themselves.

Rules are resumed, taken to their limits, run on other devices and precisions, and built by name.
"""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from optgen import optim
from optgen.fields import Field
from optgen.games import Corrections, Game, Player, Rule
from optgen.opponents import CompetitiveGradient, Unrolled
from optgen.rules import (
    RULES,
    Alternating,
    Clipped,
    Consensus,
    Extragradient,
    Feedback,
    Lookahead,
    Optimistic,
    Simultaneous,
    SymplecticAdjustment,
    build_rule,
    input_gradient_penalty,
)
from optgen.testing import flat_weights, generator, raises, spectral_radius
from optgen.training import checkpoint

F64 = torch.float64


def normal(*shape, g):
    """Return the next standard normal numbers of a generator."""
    return torch.randn(*shape, generator=g, dtype=F64)


class Quadratic:
    """A random quadratic game, L_i = w'A_i w / 2 + b_i'w, as matrices.

    Player x has two tensors, in two groups of different learning rate.
    """

    SHAPES = {"x": ((2,), (1, 2)), "y": ((3,),), "z": ((2, 2),)}

    def __init__(self, seed, players, lr=0.02):
        g = generator(seed)
        self.tensors = {
            name: [normal(*s, g=g).requires_grad_() for s in self.SHAPES[name]] for name in players
        }
        sizes = [p.numel() for ps in self.tensors.values() for p in ps]
        self.n, ends = sum(sizes), torch.tensor(sizes).cumsum(0).tolist()
        self.eta = torch.cat([torch.full((k,), lr * (1 + i)) for i, k in enumerate(sizes)]).to(F64)
        self.at, start = {}, 0
        for name, ps in self.tensors.items():
            self.at[name] = slice(start, start := start + sum(p.numel() for p in ps))
        A = [normal(self.n, self.n, g=g) for _ in players]
        self.A, self.b = (
            {k: (a + a.T) / 2 for k, a in zip(players, A)},
            {k: normal(self.n, g=g) for k in players},
        )
        rates, edges = self.eta[[e - 1 for e in ends]].tolist(), iter(range(len(sizes)))
        groups = {
            name: [dict(params=[p], lr=rates[next(edges)]) for p in ps]
            for name, ps in self.tensors.items()
        }
        self.groups = groups
        self.J = torch.cat([self.A[k][self.at[k]] for k in players])
        self.off = self.J.clone()
        for s in self.at.values():
            self.off[s, s] = 0

    def weights(self):
        """Return all weights as one vector, with its graph."""
        return torch.cat([p.flatten() for ps in self.tensors.values() for p in ps])

    def loss(self, name):
        """Return the loss of a player, a function of the batch."""

        def loss(batch):
            w = self.weights()
            return w @ self.A[name] @ w / 2 + self.b[name] @ w

        return loss

    def game(self, rule):
        """Return the game with a rule, and a function that returns its weights."""
        players = {
            k: Player(ps, self.loss(k), torch.optim.SGD(self.groups[k]))
            for k, ps in self.tensors.items()
        }
        return Game(rule=rule, **players), lambda: self.weights().detach()

    def grad(self, w, loss):
        """Return the gradient of a player's loss by all weights."""
        return self.A[loss] @ w + self.b[loss]

    def v(self, w):
        """Return the field."""
        return torch.cat([self.grad(w, k)[s] for k, s in self.at.items()])


# Each rule, written with these matrices: a direction u(w), or a path of weights.
def plain(q):
    """Return the direction of the plain field."""
    return q.v


def feedback(to, loss, wrt, weight):
    """Return the direction of Eq. (feedback), a function of the game and of the weights."""

    def make(q):
        def u(w):
            i, j, out = q.at[to], q.at[wrt], q.v(w)
            out[i] += 2 * weight * q.A[loss][i, j] @ q.grad(w, loss)[j]
            return out

        return u

    return make


def consensus(weight):
    """Return the direction of Eq. (consensus)."""
    return lambda q: lambda w: q.v(w) + weight * q.J.T @ q.v(w)


def symplectic(weight, align, eps=0.1):
    """Return the direction of Eq. (symplectic)."""

    def make(q):
        A = (q.J - q.J.T) / 2

        def u(w):
            v = q.v(w)
            dH, Av = q.J.T @ v, A.T @ v
            sign = 1 if not align or (v @ dH) * (Av @ dH) / q.n + eps >= 0 else -1
            return v + weight * sign * Av

        return u

    return make


def unrolled(player, steps, lr=None):
    """Return the direction of Eq. (unrolled), by powers of the matrix of a step."""

    def make(q):
        p = q.at[player]
        D = torch.diag(q.eta[p] if lr is None else torch.full_like(q.eta[p], lr))
        H = q.A[player]

        def u(w):
            end, out, T = w.clone(), q.v(w), torch.eye(len(D), dtype=F64) - D @ H[p, p]
            for _ in range(steps):
                end[p] = end[p] - D @ q.grad(end, player)[p]
            reach = (
                sum((torch.linalg.matrix_power(T, k) for k in range(steps)), torch.zeros_like(T))
                @ -D
                @ H[p]
            )  # d end / d w
            for i, s in q.at.items():
                if i != player:
                    g = q.grad(end, i)
                    out[s] = g[s] + reach[:, s].T @ g[p]
            return out

        return u

    return make


def competitive(lr=None):
    """Return the direction of Eq. (competitive), solved."""
    return lambda q: (
        lambda w: torch.linalg.solve(
            torch.eye(q.n, dtype=F64) + q.off * (q.eta if lr is None else lr), q.v(w)
        )
    )


def summed(*directions):
    """Return the field plus the corrections of several directions."""
    return lambda q: lambda w: sum(u(q)(w) - q.v(w) for u in directions) + q.v(w)


def simultaneous(q, u, w, steps):
    """Yield the weights after each step of all players at once."""
    for _ in range(steps):
        w = w - q.eta * u(w)
        yield w


def alternating(repeats, order=None):
    """Return the path of Eq. (alternating)."""

    def path(q, u, w, steps):
        for _ in range(steps):
            for name in order or q.at:
                for _ in range(repeats.get(name, 1)):
                    s, w = q.at[name], w.clone()
                    w[s] -= (q.eta * u(w))[s]
            yield w

    return path


def extragradient(q, u, w, steps):
    """Yield the weights after each step of Eq. (extragradient)."""
    for _ in range(steps):
        w = w - q.eta * u(w - q.eta * u(w))
        yield w


def past(q, u, w, steps):
    """Yield the weights after each step of extragradient from the past."""
    last = u(w)
    for _ in range(steps):
        last = u(w - q.eta * last)
        w = w - q.eta * last
        yield w


def optimistic(q, u, w, steps):
    """Yield the weights after each step of Eq. (optimistic)."""
    last = u(w)
    for _ in range(steps):
        new = u(w)
        w = w - q.eta * (2 * new - last)
        last = new
        yield w


def lookahead(inner, every, alpha):
    """Return the path of Eq. (lookahead) around another path."""

    def path(q, u, w, steps):
        slow = w
        for t, fast in enumerate(range(steps), 1):
            w = next(inner(q, u, w, 1))
            if t % every == 0:
                w = slow = slow + alpha * (w - slow)
            yield w

    return path


EXPLICIT = {  # the rule, its path, its direction
    "simultaneous": (lambda: Simultaneous(), simultaneous, plain),
    "alternating": (lambda: Alternating(), alternating({}), plain),
    "alternating-repeats": (lambda: Alternating(repeats={"y": 3}), alternating({"y": 3}), plain),
    "alternating-order": (
        lambda: Alternating(order=["y", "x", "z"][:2], repeats={"x": 2}),
        alternating({"x": 2}, ["y", "x"]),
        plain,
    ),
    "extragradient": (lambda: Extragradient(), extragradient, plain),
    "past": (lambda: Extragradient(past=True), past, plain),
    "optimistic": (lambda: Optimistic(), optimistic, plain),
    "literal": (lambda: Feedback("x", "y", "x", 0.3), simultaneous, feedback("x", "y", "x", 0.3)),
    "nagarajan-kolter": (
        lambda: Feedback(to="x", loss="y", wrt="y", weight=0.7),
        simultaneous,
        feedback("x", "y", "y", 0.7),
    ),
    "smoothing": (lambda: Feedback("y", "y", "x", 0.5), simultaneous, feedback("y", "y", "x", 0.5)),
    "feedback-list": (
        lambda: [Feedback("x", "y", "y", 0.2), Feedback("y", "x", "x", 0.4), Consensus(0.1)],
        simultaneous,
        summed(feedback("x", "y", "y", 0.2), feedback("y", "x", "x", 0.4), consensus(0.1)),
    ),
    "consensus": (lambda: Consensus(0.6), simultaneous, consensus(0.6)),
    "symplectic": (
        lambda: SymplecticAdjustment(0.8, align=False),
        simultaneous,
        symplectic(0.8, False),
    ),
    "symplectic-aligned": (lambda: SymplecticAdjustment(0.8), simultaneous, symplectic(0.8, True)),
    "lookahead": (lambda: Lookahead(every=3, alpha=0.4), lookahead(simultaneous, 3, 0.4), plain),
    "lookahead-extragradient": (
        lambda: Lookahead(Extragradient(Consensus(0.3)), every=2, alpha=0.7),
        lookahead(extragradient, 2, 0.7),
        consensus(0.3),
    ),
    "unrolled": (lambda: Unrolled("y", 3), simultaneous, unrolled("y", 3)),
    "unrolled-first": (lambda: Unrolled("x", 2, lr=0.1), simultaneous, unrolled("x", 2, 0.1)),
    "competitive": (lambda: CompetitiveGradient(iterations=16), simultaneous, competitive()),
    "competitive-lr": (
        lambda: CompetitiveGradient(lr=0.2, iterations=24),
        simultaneous,
        competitive(0.2),
    ),
    "alternating-feedback": (
        lambda: Alternating(Feedback("x", "y", "y", 0.7), repeats={"y": 2}),
        alternating({"y": 2}),
        feedback("x", "y", "y", 0.7),
    ),
    "alternating-consensus": (lambda: Alternating(Consensus(0.4)), alternating({}), consensus(0.4)),
    "alternating-symplectic": (
        lambda: Alternating(SymplecticAdjustment(0.5)),
        alternating({}),
        symplectic(0.5, True),
    ),
    "alternating-unrolled": (
        lambda: Alternating(Unrolled("y", 2)),
        alternating({}),
        unrolled("y", 2),
    ),
    "alternating-competitive": (
        lambda: Alternating(CompetitiveGradient(iterations=16)),
        alternating({}),
        competitive(),
    ),
    "alternating-list": (
        lambda: Alternating([Feedback("x", "y", "y", 0.2), Consensus(0.1)]),
        alternating({}),
        summed(feedback("x", "y", "y", 0.2), consensus(0.1)),
    ),
    "extragradient-symplectic": (
        lambda: Extragradient(SymplecticAdjustment(0.5)),
        extragradient,
        symplectic(0.5, True),
    ),
    "past-consensus": (lambda: Extragradient(Consensus(0.4), past=True), past, consensus(0.4)),
    "past-unrolled": (lambda: Extragradient(Unrolled("y", 2), past=True), past, unrolled("y", 2)),
    "optimistic-feedback": (
        lambda: Optimistic(Feedback("x", "y", "y", 0.7)),
        optimistic,
        feedback("x", "y", "y", 0.7),
    ),
    "optimistic-competitive": (
        lambda: Optimistic(CompetitiveGradient(iterations=16)),
        optimistic,
        competitive(),
    ),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("players", ("xy", "xyz"))
@pytest.mark.parametrize("name", EXPLICIT)
def test_follows_the_explicit_matrix(name, players, seed):
    make, path, direction = EXPLICIT[name]
    if name == "alternating-order" and players == "xyz":
        make, path = lambda: Alternating(order=["y", "z", "x"]), alternating({}, ["y", "z", "x"])
    q = Quadratic(seed, players)
    game, weights = q.game(make())
    w = weights()
    for expected in path(q, direction(q), w, 6):
        losses = game.step(None)
        assert (weights() - expected).abs().max() <= 1e-10 * expected.abs().max()
        assert losses.keys() >= set(players) and all(
            not x.requires_grad and x.ndim == 0 for x in losses.values()
        )


# The losses that a step returns: at which weights each is evaluated, by plain PyTorch.
class PlainGan:
    """A small GAN as two vectors and two functions, without the package."""

    names = ("G", "D")

    def __init__(self, seed):
        g = generator(seed)
        self.A, self.b = normal(3, 3, g=g), normal(2, 3, g=g)
        self.start = {name: normal(3, g=g) for name in self.names}

    def loss(self, name, w, batch):
        """Return the loss of a player at weights by name."""
        played = (w["G"] @ self.A @ w["D"].tanh()) * batch
        own = (w[name] ** 2 @ self.b[self.names.index(name)].abs()) + (w[name] ** 4).sum() / 9
        return (played if name == "G" else -played) + own

    def losses(self, w, batch):
        """Return the losses of both players at the same weights."""
        return {name: self.loss(name, w, batch).item() for name in self.names}

    def descended(self, w, batch, lr, movers=names):
        """Return the weights after a plain step of some players."""
        w = {name: x.detach().requires_grad_() for name, x in w.items()}
        grads = {k: torch.autograd.grad(self.loss(k, w, batch), w[k])[0] for k in movers}
        return {k: (x - lr * grads[k] if k in grads else x).detach() for k, x in w.items()}

    def game(self, rule, lr):
        """Return the game of the package, with its weights."""
        w = {name: x.clone().requires_grad_() for name, x in self.start.items()}
        players = {
            name: Player([w[name]], partial(self.loss, name, w), torch.optim.SGD([w[name]], lr))
            for name in self.names
        }
        return Game(rule=rule, **players), w


def at_the_start(gan, w, batch, lr, past):
    """Return the losses at the weights from which the step leaves."""
    return gan.losses(w, batch)


def each_before_its_move(gan, w, batch, lr, past):
    """Return G's loss at the start, and D's after G has moved."""
    after = gan.descended(w, batch, lr, ["G"])
    return {"G": gan.losses(w, batch)["G"], "D": gan.losses(after, batch)["D"]}


def each_before_its_move_by_order(gan, w, batch, lr, past):
    """Return D's loss at the start, and G's after D has moved twice."""
    after = gan.descended(gan.descended(w, batch, lr, ["D"]), batch, lr, ["D"])
    return {"G": gan.losses(after, batch)["G"], "D": gan.losses(w, batch)["D"]}


def one_step_ahead(gan, w, batch, lr, past):
    """Return the losses along the last direction, from the second step on; before, at the start."""
    if past is None:
        return gan.losses(w, batch)
    return gan.losses({k: w[k] - lr * past[k] for k in w}, batch)


def where_the_other_will_be(gan, w, batch, lr, past):
    """Return D's loss at the start, and G's after five steps of D."""
    end = w
    for _ in range(5):
        end = gan.descended(end, batch, lr, ["D"])
    return {"G": gan.losses(end, batch)["G"], "D": gan.losses(w, batch)["D"]}


REPORTED = dict.fromkeys(RULES, at_the_start) | {
    "alternating": each_before_its_move,
    "alternating_order": each_before_its_move_by_order,
    "extragradient:past=true": one_step_ahead,
    "lookahead:every=2,inner=extragradient": at_the_start,
    "lookahead:every=2,inner=alternating": each_before_its_move,
    "unrolled": where_the_other_will_be,
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", REPORTED)
def test_the_losses_that_a_step_returns(name, seed):
    "Five steps, each on another batch; the weights before each are the game's own."
    lr, gan, past = 0.02, PlainGan(seed), None
    if name == "alternating_order":
        rule = Alternating(order=["D", "G"], repeats={"D": 2})
    else:
        rule = build_rule(name)
    game, weights = gan.game(rule, lr)
    for t in range(5):
        w, batch = {k: x.detach().clone() for k, x in weights.items()}, 1.0 + 0.3 * t
        losses = game.step(batch)
        expected = REPORTED[name](gan, w, batch, lr, past)
        assert losses.keys() == expected.keys()
        for player, value in expected.items():
            assert losses[player].item() == pytest.approx(value, rel=1e-12)
            assert not losses[player].requires_grad and losses[player].ndim == 0
        if name == "extragradient:past=true":  # the move is along the direction one step ahead
            past = {k: (w[k] - weights[k].detach()) / lr for k in w}


def test_the_places_of_the_losses_differ():
    "At these steps, another place would be seen."
    gan = PlainGan(0)
    past = {k: torch.ones(3, dtype=F64) for k in gan.names}
    found = [place(gan, gan.start, 1.0, 0.02, past) for place in dict.fromkeys(REPORTED.values())]
    for name in gan.names:
        values = [losses[name] for losses in found]
        assert max(values) - min(values) > 1e-3
    assert len({tuple(losses.values()) for losses in found}) == len(found) == 5


# Two-player, zero-sum: Schaefer and Anandkumar's own formula.
@pytest.mark.parametrize("seed", range(4))
def test_competitive_is_the_published_formula(seed):
    g = generator(seed)
    A, eta = normal(5, 5, g=g), 0.3
    A = A + A.T
    b = normal(5, g=g)
    x, y = normal(2, g=g).requires_grad_(), normal(3, g=g).requires_grad_()

    def f(batch):
        w = torch.cat([x, y])
        return w @ A @ w / 2 + b @ w

    w = torch.cat([x, y]).detach()
    d = A @ w + b
    Dxy = A[:2, 2:]
    dx = -eta * torch.linalg.solve(
        torch.eye(2, dtype=F64) + eta**2 * Dxy @ Dxy.T, d[:2] + eta * Dxy @ d[2:]
    )
    dy = eta * torch.linalg.solve(
        torch.eye(3, dtype=F64) + eta**2 * Dxy.T @ Dxy, d[2:] - eta * Dxy.T @ d[:2]
    )
    game = Game(
        x=Player([x], f, optim.SGD([x], lr=eta)),
        y=Player([y], lambda b: -f(b), optim.SGD([y], lr=eta)),
        rule=CompetitiveGradient(iterations=6),
    )
    game.step(None)
    assert (torch.cat([x, y]).detach() - w - torch.cat([dx, dy])).abs().max() < 1e-12


def test_conjugate_gradient_starts_from_the_last_solution():
    q = Quadratic(0, "xyz", lr=0.1)
    game, weights = q.game(CompetitiveGradient(iterations=3))

    def error():
        u = game.rule.direction(game.at(None, graph=True))
        exact = competitive()(q)(weights())
        return (
            torch.cat([t.flatten() for ts in u.values() for t in ts]) - exact
        ).norm() / exact.norm()

    errors = [error().item() for _ in range(12)]
    assert errors[-1] < 0.01 * errors[0] and all(
        b <= a * 1.0001 for a, b in zip(errors, errors[1:])
    )


def gan(rule, make, dtype=torch.float32, device="cpu", seed=0):
    """Return a small GAN of modules; a batch is data and noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        G, D = (nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, k)) for k in (2, 1))
    G, D = G.to(device=device, dtype=dtype), D.to(device=device, dtype=dtype)

    def g_loss(b):
        return F.softplus(-D(G(b[1]))).mean()

    def d_loss(b):
        return (F.softplus(-D(b[0])) + F.softplus(D(G(b[1])))).mean()

    return Game(
        G=Player(G, g_loss, make(G.parameters())),
        D=Player(D, d_loss, make(D.parameters())),
        rule=rule,
    )


def batches(n, dtype=torch.float32, device="cpu", seed=1):
    """Return batches of data and noise."""
    g = generator(seed)
    return [
        tuple(torch.randn(16, 2, generator=g).to(device=device, dtype=dtype) for _ in range(2))
        for _ in range(n)
    ]


GAN_RULES = {
    "simultaneous": lambda: Simultaneous(),
    "alternating": lambda: Alternating(repeats={"D": 2}),
    "extragradient": lambda: Extragradient(),
    "past": lambda: Extragradient(past=True),
    "optimistic": lambda: Optimistic(),
    "literal": lambda: Feedback("G", "D", "G", 0.5),
    "nagarajan-kolter": lambda: Feedback("G", "D", "D", 0.5),
    "list": lambda: [Feedback("G", "D", "D", 0.5), Feedback("D", "D", "G", 0.5)],
    "consensus": lambda: Consensus(0.5),
    "symplectic": lambda: SymplecticAdjustment(),
    "lookahead": lambda: Lookahead(every=3),
    "unrolled": lambda: Unrolled("D", 3),
    "competitive": lambda: CompetitiveGradient(),
    "lookahead-past": lambda: Lookahead(
        Extragradient([Consensus(0.2), Feedback("G", "D", "D", 0.5)], past=True), every=3
    ),
    "optimistic-competitive": lambda: Optimistic(CompetitiveGradient(lr=0.01)),
    "alternating-symplectic": lambda: Alternating(SymplecticAdjustment()),
    "clipped": lambda: Clipped(0.1),
    "alternating-clipped": lambda: Alternating(Clipped(0.1, Consensus(0.2))),
}
OPTIMIZERS = {
    "momentum": lambda p: optim.Momentum(p, lr=0.02, momentum=-0.3),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True, foreach=True),
    "rmsprop": lambda p: optim.RMSProp(p, lr=0.01),
    "adam": lambda p: optim.Adam(p, lr=0.01),
    "torch-adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "torch-adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "torch-nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
}


def weights_of(game):
    """Return the trainable tensors of all players."""
    return [w for name in game.players for w in game.params(name)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rule", GAN_RULES)
def test_resumes_bit_for_bit(rule, optimizer, tmp_path):
    "Through a file, and with a memory shared with the first game, which goes on; on a schedule."

    def new():
        game = gan(GAN_RULES[rule](), OPTIMIZERS[optimizer])
        return game, [
            torch.optim.lr_scheduler.ExponentialLR(p.optimizer, 0.9) for p in game.players.values()
        ]

    def run(game, schedules, data):
        for b in data:
            game.step(b)
            for schedule in schedules:
                schedule.step()

    data = batches(7)
    whole, first, second, third = new(), new(), new(), new()
    run(*whole, data)
    run(*first, data[:4])
    checkpoint.save(tmp_path / "x.pt", first[0].state_dict())
    second[0].load_state_dict(checkpoint.load(tmp_path / "x.pt"))
    # Torch's optimizers share the tensors of a state that they load, so theirs are copied.
    state = first[0].state_dict()
    third[0].load_state_dict({k: x if k == "rule" else copy.deepcopy(x) for k, x in state.items()})
    for game, schedules in (second, third):
        for schedule, other in zip(schedules, first[1]):
            schedule.load_state_dict(copy.deepcopy(other.state_dict()))
    run(*first, data[4:])
    run(*second, data[4:])
    run(*third, data[4:])
    for other in (first, second, third):
        for a, b in zip(weights_of(whole[0]), weights_of(other[0])):
            assert torch.equal(a, b)
    assert all(w.isfinite().all() for w in weights_of(whole[0]))


@pytest.mark.parametrize(
    "rule", ("past", "optimistic", "competitive", "lookahead-past", "optimistic-competitive")
)
def test_memory_is_out_of_the_optimizers_reach(rule):
    "Torch's Nesterov writes into the gradients in its foreach form only: both paths are the same."
    ends = []
    for foreach in (False, True):
        game = gan(
            GAN_RULES[rule](),
            lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, foreach=foreach),
            dtype=F64,
        )
        for b in batches(6, dtype=F64):
            game.step(b)
        ends.append(flat_weights(weights_of(game)))
    assert (ends[0] - ends[1]).abs().max() < 1e-12


def test_starting_afresh_forgets():
    "A state without a rule's memory clears the memory of a game that has run."
    data, make = batches(4), OPTIMIZERS["adam"]
    used, fresh = gan(Optimistic(), make), gan(Optimistic(), make)
    start = copy.deepcopy(used.state_dict())
    for b in data:
        used.step(b)
    used.load_state_dict(start)
    for b in data:
        used.step(b)
        fresh.step(b)
    for a, b in zip(weights_of(used), weights_of(fresh)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", GAN_RULES)
def test_never_looks_at_values(rule):
    "On the meta device there are none: a Python branch on a value would raise."
    game = gan(GAN_RULES[rule](), lambda p: torch.optim.SGD(p, lr=0.1), device="meta")
    for b in batches(4, device="meta"):
        losses = game.step(b)
    assert all(x.device.type == "meta" for x in losses.values())


@pytest.mark.parametrize("dtype", (F64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("rule", GAN_RULES)
def test_keeps_the_precision(rule, dtype):
    game = gan(GAN_RULES[rule](), lambda p: torch.optim.SGD(p, lr=0.05), dtype=dtype)
    for b in batches(4, dtype=dtype):
        losses = game.step(b)
    assert all(x.dtype == dtype for x in [*losses.values(), *weights_of(game)])
    assert all(w.isfinite().all() for w in weights_of(game))
    for m in game.rule.memory.values() if hasattr(game.rule, "memory") else ():
        if isinstance(m, Field):
            assert all(x.dtype == dtype for xs in m.values() for x in xs)


@pytest.mark.parametrize("rule", GAN_RULES)
def test_bfloat16_autocast(rule):
    "Weights and gradients stay float32, and the path stays near the one without autocast."

    def run(autocast):
        game = gan(GAN_RULES[rule](), lambda p: torch.optim.SGD(p, lr=0.05))
        start = [w.detach().clone() for w in weights_of(game)]
        if autocast:
            game.autocast = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
        for b in batches(5):
            game.step(b)
        assert all(w.dtype == w.grad.dtype == torch.float32 for w in weights_of(game))
        return torch.cat([(w.detach() - s).flatten() for w, s in zip(weights_of(game), start)])

    exact, rounded = run(False), run(True)
    assert 0 < (exact - rounded).norm() < 0.1 * exact.norm()


@pytest.mark.cuda
@pytest.mark.parametrize("rule", GAN_RULES)
def test_on_cuda(rule):
    paths = []
    for device in ("cpu", "cuda"):
        game = gan(
            GAN_RULES[rule](), lambda p: torch.optim.SGD(p, lr=0.05), dtype=F64, device=device
        )
        data = batches(5, dtype=F64, device=device)
        game.step(data[0])
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            for b in data[1:]:
                game.step(b)
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        paths.append(flat_weights(weights_of(game)).cpu())
    assert (paths[0] - paths[1]).abs().max() < 1e-9


# Limits: a rule whose argument turns it off, and the rule that it becomes. Same bits.
LIMITS = {
    "feedback 0": (lambda: Feedback("G", "D", "D", 0.0), lambda: None),
    "consensus 0": (lambda: Consensus(0.0), lambda: None),
    "symplectic 0": (lambda: SymplecticAdjustment(0.0), lambda: None),
    "unrolled 0": (lambda: Unrolled("D", 0), lambda: None),
    "empty list": (lambda: [], lambda: None),
    "lookahead 1 1": (lambda: Lookahead(every=1, alpha=1.0), lambda: None),
    "extragradient inner": (lambda: Extragradient(Consensus(0.0)), lambda: Extragradient()),
    "repeats 1": (lambda: Alternating(repeats={"D": 1}), lambda: Alternating()),
    "order": (lambda: Alternating(order=["G", "D"]), lambda: Alternating()),
    "list of one": (lambda: [Consensus(0.4)], lambda: Consensus(0.4)),
    "clipped far": (lambda: Clipped(1e9, Consensus(0.4)), lambda: Consensus(0.4)),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_limits(limit):
    a, b = (gan(rule(), OPTIMIZERS["torch-adam"], dtype=F64) for rule in LIMITS[limit])
    for batch in batches(6, dtype=F64):
        a.step(batch)
        b.step(batch)
    for x, y in zip(weights_of(a), weights_of(b)):
        assert (x - y).abs().max() <= (1e-12 if "lookahead" in limit else 0)


@pytest.mark.parametrize(
    "rule",
    (
        SymplecticAdjustment(),
        CompetitiveGradient(),
        Alternating(),
        Alternating(CompetitiveGradient()),
    ),
)
def test_one_player_just_descends(rule):
    "It has no other player to rotate with or to answer."
    ends = []
    for r in (rule, None):
        w = torch.linspace(-1, 1, 5, dtype=F64).requires_grad_()
        game = Game(
            x=Player([w], lambda b: (w.sin() * b).sum(), torch.optim.Adam([w], lr=0.1)), rule=r
        )
        for t in range(6):
            game.step(torch.arange(5.0) + t)
        ends.append(w.detach())
    assert torch.allclose(*ends, rtol=1e-12, atol=0)


def test_one_short_unrolled_step_is_nagarajan_and_kolters_feedback():
    "In a zero-sum game L + eta |grad L|^2 to first order in eta; the error is of second."

    def direction(rule):
        game = gan(rule, lambda p: torch.optim.SGD(p, lr=0.1), dtype=F64)
        loss = game.players["G"].loss
        game.players["D"].loss = lambda b: -loss(b)
        (b,) = batches(1, dtype=F64)
        return flat_weights(rule.direction(game.at(b, graph=True))["G"])

    plain = direction(Feedback("G", "D", "D", 0.0))
    for eta in (1e-3, 1e-4):
        a, b = (
            direction(Unrolled("D", 1, lr=eta)) - plain,
            direction(Feedback("G", "D", "D", eta)) - plain,
        )
        assert (a - b).norm() < 3 * eta * b.norm()


@pytest.mark.parametrize(
    "rule", (lambda: Alternating(), lambda: Alternating(repeats={"D": 3}), lambda: None)
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_is_the_hand_written_loop(rule, optimizer):
    rule = rule()
    make = OPTIMIZERS[optimizer]
    game, hand = gan(rule, make), gan(None, make)
    for b in batches(8):
        game.step(b)
        if rule is None:
            grads = {
                k: torch.autograd.grad(p.loss(b), hand.params(k)) for k, p in hand.players.items()
            }
            for k, p in hand.players.items():
                for w, g in zip(hand.params(k), grads[k]):
                    w.grad = g
                p.optimizer.step()
        else:
            for k, p in hand.players.items():
                for _ in range(rule.repeats.get(k, 1)):
                    p.optimizer.zero_grad()
                    p.loss(b).backward(inputs=hand.params(k))
                    p.optimizer.step()
    for x, y in zip(weights_of(game), weights_of(hand)):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    "make",
    (
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.5, 0.9)),
        lambda p: optim.Adam(p, lr=0.01, betas=(0.5, 0.9)),
    ),
)
def test_extragradient_is_extra_adam(make):
    """Gidel et al. 2019, Alg. 4.

    Both gradients enter the moments, each with its own bias correction, and the step leaves from
    the saved weights.
    """
    game = gan(Extragradient(), make, dtype=F64)
    twin = gan(None, make, dtype=F64)
    w = [p.detach().clone() for p in weights_of(twin)]
    m, s, t = [torch.zeros_like(p) for p in w], [torch.zeros_like(p) for p in w], 0

    def moved(by):
        nonlocal t
        t += 1
        for i, g in enumerate(by):
            m[i] = 0.5 * m[i] + 0.5 * g
            s[i] = 0.9 * s[i] + 0.1 * g**2
        return [
            p - 0.01 * (a / (1 - 0.5**t)) / ((b / (1 - 0.9**t)).sqrt() + 1e-8)
            for p, a, b in zip(w, m, s)
        ]

    def field(at, b):
        twin.set_weights(Field(G=at[:4], D=at[4:]))
        return [
            g for k in "GD" for g in torch.autograd.grad(twin.players[k].loss(b), twin.params(k))
        ]

    for b in batches(12, dtype=F64):
        game.step(b)
        w = moved(field(moved(field(w, b)), b))
        for x, y in zip(weights_of(game), w):
            assert (x - y).abs().max() < 1e-11


def test_optimistic_is_optimistic_adam():
    """Daskalakis et al. 2018: w - 2 eta m_t/sqrt(s_t) + eta m_{t-1}/sqrt(s_{t-1}).

    The moments are of the gradients at the iterates themselves.
    """

    def adam(params):
        return torch.optim.Adam(params, lr=0.01, betas=(0.5, 0.9))

    game, twin = gan(Optimistic(), adam, dtype=F64), gan(None, torch.optim.SGD, dtype=F64)
    w = [p.detach().clone() for p in weights_of(twin)]
    m = [torch.zeros_like(p) for p in w]
    s = [torch.zeros_like(p) for p in w]
    last = None
    for t, b in enumerate(batches(12, dtype=F64), 1):
        game.step(b)
        twin.set_weights(Field(G=w[:4], D=w[4:]))
        for i, g in enumerate(
            g for k in "GD" for g in torch.autograd.grad(twin.players[k].loss(b), twin.params(k))
        ):
            m[i] = 0.5 * m[i] + 0.5 * g
            s[i] = 0.9 * s[i] + 0.1 * g**2
        step = [
            0.01 * (a / (1 - 0.5**t)) / ((c / (1 - 0.9**t)).sqrt() + 1e-8) for a, c in zip(m, s)
        ]
        w = [p - 2 * d + e for p, d, e in zip(w, step, last or step)]
        last = step
        for x, y in zip(weights_of(game), w):
            assert (x - y).abs().max() < 1e-11


def test_past_extrapolations_are_optimistic_iterates():
    "With plain descent, extragradient from the past evaluates along the optimistic rule's path."
    seen = []

    def sgd(params):
        return optim.SGD(params, lr=0.05)

    past = gan(Extragradient(past=True), sgd, dtype=F64)
    optimistic = gan(Optimistic(), sgd, dtype=F64)
    (b,) = batches(1, dtype=F64)
    loss = past.players["G"].loss

    def remember_weights(b):
        seen.append([w.detach().clone() for w in weights_of(past)])
        return loss(b)

    past.players["G"].loss = remember_weights
    for _ in range(10):
        past.step(b)
    # One step out, as `past` is when it first evaluates there.
    optimistic.set_weights(Field(G=seen[1][:4], D=seen[1][4:]))
    start = gan(None, sgd, dtype=F64)
    optimistic.rule.memory = {
        "move": Field({k: [-0.05 * g for g in gs] for k, gs in start.at(b).v.items()})
    }
    for points in seen[2:]:
        optimistic.step(b)
        for x, y in zip(weights_of(optimistic), points):
            assert (x - y).abs().max() < 1e-13


@pytest.mark.parametrize("steps,groups", ((1, False), (3, False), (5, True)))
def test_unrolled_is_the_gradient_through_the_steps(steps, groups):
    "Autograd through the unrolled graph, in float64; and the weights come back to the bit."

    def make(p):
        p = list(p)
        if groups:
            p = [dict(params=p[:1], lr=0.3), dict(params=p[1:], lr=0.1)]
        return torch.optim.SGD(p, lr=0.2)

    game = gan(Unrolled("D", steps), make, dtype=F64, seed=3)
    (b,) = batches(1, dtype=F64)
    G, D = (game.players[k].module for k in "GD")
    rate = {id(p): g["lr"] for g in game.players["D"].optimizer.param_groups for p in g["params"]}
    weights = dict(D.named_parameters())

    def call(w, x):
        return torch.func.functional_call(D, w, (x,))

    moved = dict(weights)
    for _ in range(steps):
        loss = (F.softplus(-call(moved, b[0])) + F.softplus(call(moved, G(b[1])))).mean()
        grads = torch.autograd.grad(loss, list(moved.values()), create_graph=True)
        moved = {k: w - rate[id(weights[k])] * g for (k, w), g in zip(moved.items(), grads)}
    expected = torch.autograd.grad(F.softplus(-call(moved, G(b[1]))).mean(), list(G.parameters()))
    before = game.weights()
    u = game.rule.direction(game.at(b, graph=True))
    for x, y in zip(u["G"], expected):
        assert (x - y).abs().max() < 1e-12
    for x, y in zip(u["D"], game.at(b).v["D"]):
        assert torch.equal(x, y)
    for k in "GD":
        for x, y in zip(game.weights()[k], before[k]):
            assert torch.equal(x, y)


# Rates of L_x = s x y, L_y = -s x y, from the update as a map of all its state.
S, ETA = 0.7, 0.2
s = ETA * S
ROOT = math.sqrt(1 - 4 * s * s)
RATES = {
    "simultaneous": (None, math.sqrt(1 + s * s)),
    "alternating": (Alternating(), 1.0),
    "extragradient": (Extragradient(), math.sqrt(1 - s * s + s**4)),
    "consensus": (Consensus(1.3), math.sqrt((1 - 1.3 * ETA * S * S) ** 2 + s * s)),
    "symplectic": (SymplecticAdjustment(1.3), math.sqrt((1 - 1.3 * ETA * S * S) ** 2 + s * s)),
    "nagarajan-kolter": (Feedback("x", "y", "y", 0.1), math.sqrt(1 - 0.2 * ETA * S * S + s * s)),
    "literal": (Feedback("x", "y", "x", 3.0), math.sqrt(1 + s * s)),
    "unrolled": (Unrolled("y", 1, lr=0.1), math.sqrt(1 - 0.2 * ETA * S * S + s * s)),
    "competitive": (CompetitiveGradient(), 1 / math.sqrt(1 + s * s)),
    "optimistic": (Optimistic(), math.sqrt((1 + ROOT) / 2)),
    "past": (Extragradient(past=True), math.sqrt((1 + ROOT) / 2)),
    "lookahead": (Lookahead(every=5, alpha=0.4), abs(0.6 + 0.4 * (1 + 1j * s) ** 5) ** (1 / 5)),
}


@pytest.mark.parametrize("name", RATES)
def test_rate_on_the_bilinear_game(name):
    rule, expected = RATES[name]
    every = 5 if name == "lookahead" else 1
    x, y = (torch.ones(1, dtype=F64, requires_grad=True) for _ in range(2))
    game = Game(
        x=Player([x], lambda b: S * (x * y).sum(), optim.SGD([x], lr=ETA)),
        y=Player([y], lambda b: -S * (x * y).sum(), optim.SGD([y], lr=ETA)),
        rule=rule,
    )
    key = {"optimistic": "move", "past": "u"}.get(name)

    def step(state):
        game.set_weights(Field(x=[state[:1]], y=[state[1:2]]))
        game.rule.memory = {key: Field(x=[state[2:3]], y=[state[3:]])} if key else {}
        for _ in range(every):
            game.step(None)
        memory = game.rule.memory[key] if key else {}
        return torch.cat([t.detach() for t in (x, y, *(m for ts in memory.values() for m in ts))])

    assert abs(spectral_radius(step, 4 if key else 2) ** (1 / every) - expected) < 1e-7


@pytest.mark.parametrize("kind", ("smooth", "detached"))
def test_input_gradient_penalty(kind):
    "Against the derivative of a network known in closed form, and its gradient by the weights."
    g = generator(0)
    w, a, x = normal(5, 3, g=g).requires_grad_(), normal(5, g=g).requires_grad_(), normal(7, 3, g=g)

    def net(x):
        return torch.tanh(x @ w.T) @ a

    def slope(x):
        return ((1 - torch.tanh(x @ w.T) ** 2) * a) @ w

    x = x.requires_grad_(kind == "smooth") * 1
    got, expected = input_gradient_penalty(net, x), slope(x).square().sum(1).mean()
    assert (got - expected).abs() < 1e-12
    for p, q in zip(
        torch.autograd.grad(got, (w, a), retain_graph=True),
        torch.autograd.grad(expected, (w, a), retain_graph=True),
    ):
        assert (p - q).abs().max() < 1e-12
    with torch.no_grad():
        assert (input_gradient_penalty(net, x) - expected).abs() < 1e-12
    images = normal(4, 1, 2, 2, g=g)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, dtype=F64))
    assert (input_gradient_penalty(flat, images) - flat[1].weight.square().sum()).abs() < 1e-12


MISTAKES = [
    (lambda: Feedback("G", "D", "E", 1.0), "'E'"),
    (lambda: Feedback("F", "D", "D", 1.0), "'F'"),
    (lambda: Feedback("G", "D", "D", -1.0), "at least 0"),
    (lambda: Feedback("G", "D", "D", math.nan), "finite"),
    (lambda: Consensus(math.inf), "finite"),
    (lambda: Consensus(-1.0), "at least 0"),
    (lambda: SymplecticAdjustment(math.nan), "finite"),
    (lambda: Alternating(repeats={"E": 2}), "'E'"),
    (lambda: Alternating(repeats={"D": 0}), "at least 1"),
    (lambda: Alternating(repeats={"D": 1.5}), "integer"),
    (lambda: Alternating(order=["G"]), "leaves out ['D']"),
    (lambda: Alternating(order=["G", "D", "E"]), "'E'"),
    (lambda: Alternating(Extragradient()), "itself a way to step"),
    (lambda: Optimistic(Lookahead()), "itself a way to step"),
    (lambda: Extragradient(Feedback("G", "D", "E", 1.0)), "'E'"),
    (lambda: Lookahead(Alternating(Unrolled("E", 1))), "'E'"),
    (lambda: Lookahead(every=0), "at least 1"),
    (lambda: Lookahead(alpha=0.0), "alpha"),
    (lambda: Lookahead(alpha=1.5), "alpha"),
    (lambda: Unrolled("E", 2), "'E'"),
    (lambda: Unrolled("D", -1), "at least 0"),
    (lambda: Unrolled("D", 1, lr=math.nan), "finite"),
    (lambda: CompetitiveGradient(iterations=0), "at least 1"),
    (lambda: CompetitiveGradient(lr=-1.0), "at least 0"),
    (lambda: [Consensus(1.0), Feedback("G", "D", "E", 1.0)], "'E'"),
]


@pytest.mark.parametrize(
    "make,word", MISTAKES, ids=[word + str(i) for i, (_, word) in enumerate(MISTAKES)]
)
def test_mistakes_raise_at_construction(make, word):
    with raises(ValueError, word):
        gan(make(), OPTIMIZERS["adam"])


@pytest.mark.parametrize(
    "rule", (Simultaneous(), Alternating(), Optimistic(), Lookahead(), CompetitiveGradient())
)
def test_only_corrections_add_up(rule):
    with pytest.raises(TypeError, match="not a correction"):
        Corrections([Consensus(1.0), rule])


def test_an_optimizer_without_a_learning_rate():
    class Fixed(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self):
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.sub_(0.1 * p.grad)

    for rule in (Unrolled("D", 2), CompetitiveGradient()):
        with pytest.raises(ValueError, match="give the rule its lr"):
            gan(rule, Fixed)
    gan(Unrolled("D", 2, lr=0.1), Fixed).step(batches(1)[0])


def test_rules_of_second_order_refuse_compilation():
    for rule in (
        Consensus(0.1),
        Extragradient(Consensus(0.1)),
        Lookahead(Alternating([Feedback("G", "D", "D", 1.0)])),
        Unrolled("D", 1),
        CompetitiveGradient(),
    ):
        with pytest.raises(ValueError, match="differentiates twice"):
            gan(rule, OPTIMIZERS["adam"]).compile()
    assert not any(
        rule.second_order
        for rule in (
            Simultaneous(),
            Alternating(),
            Extragradient(),
            Optimistic(),
            Lookahead(),
            Rule(),
        )
    )


# Rules by name.
DEFAULTS = {  # the class of each name, and arguments that its defaults set
    "simultaneous": (Simultaneous, {}),
    "alternating": (Alternating, {"repeats": {}, "order": None}),
    "extragradient": (Extragradient, {"past": False}),
    "optimistic": (Optimistic, {}),
    "consensus": (Consensus, {"weight": 0.05}),
    "literal": (Feedback, {"to_player": "G", "loss": "D", "wrt": "G", "weight": 0.1}),
    "nagarajan-kolter": (Feedback, {"to_player": "G", "loss": "D", "wrt": "D", "weight": 0.005}),
    "smoothing": (Feedback, {"to_player": "D", "loss": "D", "wrt": "G", "weight": 0.5}),
    "symplectic": (SymplecticAdjustment, {"weight": 0.1, "align": True, "eps": 0.1}),
    "lookahead": (Lookahead, {"every": 5, "alpha": 0.5}),
    "unrolled": (Unrolled, {"player": "D", "steps": 5, "lr": None}),
    "competitive": (CompetitiveGradient, {"lr": None, "iterations": 5}),
}


def test_the_defaults_of_all_names_are_listed():
    assert list(RULES) == list(DEFAULTS)


@pytest.mark.parametrize("name", DEFAULTS)
def test_every_name_builds_with_its_defaults(name):
    kind, arguments = DEFAULTS[name]
    rule = build_rule(name)
    assert type(rule) is kind
    assert {key: getattr(rule, key) for key in arguments} == arguments
    losses = gan(rule, OPTIMIZERS["adam"]).step(batches(1)[0])
    assert all(loss.isfinite() for loss in losses.values())


def test_rules_inside_rules_by_name():
    rule = build_rule("alternating:D=2,inner=consensus")
    assert type(rule) is Alternating and rule.repeats == {"D": 2}
    assert type(rule.inner) is Consensus and rule.inner.weight == 0.05
    rule = build_rule("lookahead:inner=extragradient,every=3")
    assert type(rule.inner) is Extragradient and rule.every == 3 and rule.alpha == 0.5
    assert build_rule("extragradient:past=true").past
    assert build_rule("alternating:G=3").repeats == {"G": 3}
    assert not build_rule("symplectic:weight=0.5,align=false").align


def test_players_by_name():
    rule = build_rule("unrolled:player=G,steps=2,lr=0.1")
    assert (rule.player, rule.steps, rule.lr) == ("G", 2, 0.1)
    rule = build_rule("literal:to=D,wrt=D")
    assert (rule.to_player, rule.loss, rule.wrt, rule.weight) == ("D", "D", "D", 0.1)


def test_the_weight_goes_to_the_rule_that_takes_one():
    assert build_rule("consensus", 0.25).weight == 0.25
    assert build_rule("consensus:weight=1", 0.25).weight == 0.25
    assert build_rule("nagarajan-kolter", 2).weight == 2
    assert build_rule("alternating:inner=literal", 0.25).inner.weight == 0.25
    assert build_rule("lookahead:every=2,inner=symplectic", 0.25).inner.weight == 0.25


@pytest.mark.parametrize(
    "text, weight, message",
    (
        ("dance", None, "no rule 'dance'; there are: simultaneous, alternating"),
        ("consensus:weight=heavy", None, "'heavy' is neither a number, true nor false"),
        ("consensus:weight=heavy", None, "nor a player (G, D), nor the name of a rule"),
        ("consensus:speed=1", None, "consensus takes no argument 'speed'"),
        ("consensus:weight", None, "'weight' has no value"),
        ("consensus:weight=-1", None, "weight must be a finite number, at least 0"),
        ("consensus", -1.0, "weight must be a finite number, at least 0"),
        ("lookahead:every=0", None, "every must be an integer, at least 1"),
        ("alternating:D=0", None, "D must be an integer, at least 1"),
        ("alternating:inner=alternating", None, "Alternating is itself a way to step"),
        ("alternating:inner=3", None, "alternating cannot be built with inner=3"),
        ("optimistic", 0.1, "the rule optimistic takes no weight, got 0.1"),
        ("lookahead:inner=extragradient", 0.1, "the rule extragradient takes no weight, got 0.1"),
        ("lookahead:inner=dance", None, "'dance' is neither a number"),
    ),
)
def test_a_wrong_name_or_argument_raises(text, weight, message):
    with raises(ValueError, message):
        build_rule(text, weight)


def test_an_unknown_player_raises_when_the_rule_meets_its_game():
    with raises(ValueError, "names a player 'E'"):
        gan(Unrolled("E", 2, 0.1), OPTIMIZERS["adam"])
    with raises(ValueError, "nor a player (G, D)"):
        build_rule('unrolled:player="E"')
