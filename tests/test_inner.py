"The inner optimizer against closed forms, central differences and the optimizers themselves; the refinement against the posterior it should find."

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import rng
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from optgen.games import Game, Player
from optgen.inner import DECODER_PASSES, Refinement, clip_rows, unroll
from optgen.metrics import evaluate_vae
from optgen.models.vae import VAE, ConvVAE, elbo_terms, gaussian_kl
from optgen.optim import SGD, Adam, AdamW, Momentum, RMSProp
from optgen.rules import Consensus, Unrolled
from optgen.testing import LinearGaussian, assert_mean, check_gradient

F64 = torch.float64
MODES = tuple(DECODER_PASSES)
REACHING = ("graph", "adjoint", "difference")
METHODS = {
    "sgd": partial(SGD, lr=0.05),
    "decay": partial(SGD, lr=0.05, weight_decay=0.3),
    "momentum": partial(Momentum, lr=0.05, momentum=0.5),
    "nesterov": partial(Momentum, lr=0.05, momentum=0.6, nesterov=True),
    "dampened": partial(Momentum, lr=0.05, momentum=0.5, dampening=0.3),
    "rmsprop": partial(RMSProp, lr=0.01),
    "centered": partial(RMSProp, lr=0.01, momentum=0.3, centered=True, eps=1e-3),
    "adam": partial(Adam, lr=0.02),
    "amsgrad": partial(Adam, lr=0.02, amsgrad=True),
    "adamw": partial(AdamW, lr=0.02, weight_decay=0.2),
    "uphill": partial(Adam, lr=0.001, maximize=True),
}
methods = pytest.mark.parametrize("optimizer", METHODS.values(), ids=METHODS)
modes = pytest.mark.parametrize("mode", MODES)
seeds = pytest.mark.parametrize("seed", range(2))


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=rng(seed), dtype=dtype)


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def off(found, true):
    return ((flat(found) - flat(true)).norm() / flat(true).norm()).item()


def curved(seed, steps=25):
    "Tensors of three shapes to move, one to reach, and a loss with noise of its own each step."
    a, b, c, w = (
        randn(*shape, seed=10 * seed + i).requires_grad_()
        for i, shape in enumerate([(2, 3), (3,), (), (3,)])
    )
    noise = randn(steps, 3, seed=seed + 100)
    return (
        [a, b, c],
        w,
        lambda p, i: (
            ((p[0] * w).sin() + (p[0] * p[1] - noise[i]) ** 2 + p[2] * w).sum()
            + (w * p[1]).cosh().sum()
            + (p[2] ** 4).sum()
        ),
    )


def smooth(seed, *sizes, act=nn.Tanh, scale=1.5):
    torch.manual_seed(seed)
    model = VAE(*sizes or (6, 4, 3, 2)).double()
    for net in (model.q_net, model.p_net):
        net[1] = net[3] = act()
    for p in model.parameters():
        p.data.mul_(scale)
    return model


def outer(refinement, model, x, eps):
    mean, log_var = refinement.refine(model, x, eps[1:])
    z = mean + (log_var / 2).exp() * eps[0]
    return (gaussian_kl(mean, log_var).sum(-1) - model.log_likelihood(x, z)).mean()


@methods
@seeds
def test_the_path_is_the_optimizers(optimizer, seed):
    params, w, loss = curved(seed)
    real = [p.detach().clone().requires_grad_() for p in params]
    opt = optimizer(real)
    for i in range(25):
        opt.zero_grad()
        loss(real, i).backward()
        opt.step()
    for mode in MODES:
        before = [p.detach().clone() for p in params]
        ends = unroll(loss, params, 25, optimizer, [w], mode)
        assert off(ends, [p.detach() for p in real]) < 1e-12
        assert all(map(torch.equal, params, before)) and all(p.grad is None for p in params)


@methods
def test_the_gradient_is_the_central_differences_and_the_same_three_ways(optimizer):
    params, w, loss = curved(1)

    def end(mode, **options):
        return sum(
            ((p - 0.3) ** 3).sum() for p in unroll(loss, params, 6, optimizer, [w], mode, **options)
        )

    def gradient(mode, **options):
        return torch.autograd.grad(end(mode, **options), [*params, w])

    check_gradient(lambda: end("graph"), [*params, w], tol=1e-5)
    exact = gradient("graph")
    assert off(gradient("adjoint"), exact) < 1e-12 and off(gradient("difference"), exact) < 1e-8
    ratio = off(gradient("difference", eps=3e-2), exact) / off(
        gradient("difference", eps=3e-3), exact
    )
    assert 70 < ratio < 140  # second order


@pytest.mark.parametrize("mu", [0.0, 0.6, -0.3])
@pytest.mark.parametrize("mode", REACHING)
@seeds
def test_a_quadratic_is_a_matrix_power(mode, mu, seed):
    n, eta, k, eye = 4, 0.1, 9, torch.eye(4, dtype=F64)
    Q, c = randn(n, n, seed=seed), randn(n, seed=seed + 9)
    A, b, start = (
        Q @ Q.T / n,
        randn(n, seed=seed + 1).requires_grad_(),
        randn(n, seed=seed + 2).requires_grad_(),
    )
    M = torch.cat([torch.cat([eye - eta * A, -eta * mu * eye], 1), torch.cat([A, mu * eye], 1)])
    power = torch.linalg.matrix_power
    by_start, by_b = (
        power(M, k)[:n, :n],
        sum(power(M, j) @ torch.cat([eta * eye, -eye]) for j in range(k))[:n],
    )
    optimizer = partial(Momentum, lr=eta, momentum=mu)
    (end,) = unroll(lambda p, i: p[0] @ A @ p[0] / 2 - b @ p[0], [start], k, optimizer, [b], mode)
    assert torch.allclose(end, by_start @ start + by_b @ b, rtol=0, atol=1e-12)
    tol = 1e-9 if mode == "difference" else 1e-12
    for found, true in zip(torch.autograd.grad(c @ end, [start, b]), (c @ by_start, c @ by_b)):
        assert torch.allclose(found, true, rtol=0, atol=tol)


def test_the_graph_can_be_differentiated_again_and_the_adjoint_refuses():
    params, w, loss = curved(0)

    def slope(mode):
        end = sum(p.pow(2).sum() for p in unroll(loss, params, 3, METHODS["momentum"], [w], mode))
        return torch.autograd.grad(end, w, create_graph=True)[0].pow(2).sum()

    check_gradient(lambda: slope("graph"), [w], tol=1e-5)
    with pytest.raises(RuntimeError, match="needs mode='graph'"):
        slope("adjoint")


@pytest.mark.parametrize("mode", REACHING)
def test_hyper_parameters_can_be_reached(mode):
    params, w, loss = curved(2)
    lr, mu = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (0.04, 0.5))

    def end():
        return sum(
            (p**2).sum()
            for p in unroll(loss, params, 5, partial(SGD, lr=lr, momentum=mu), [lr, mu], mode)
        )

    check_gradient(end, [lr, mu], tol=1e-5)


@pytest.mark.parametrize("mode", REACHING)
def test_corners(mode):
    w, one = randn(3).requires_grad_(), randn(3, seed=1).requires_grad_()
    for optimizer in (METHODS["sgd"], METHODS["momentum"], METHODS["adam"]):
        straight = unroll(lambda p, i: w @ p[0], [one], 3, optimizer, [w], mode)[
            0
        ]  # a slope that does not depend on the point
        assert torch.allclose(
            torch.autograd.grad(straight.sum(), one)[0], torch.ones(3, dtype=F64), rtol=1e-9
        )
        other, alone = unroll(
            lambda p, i: (w * p[0] ** 2).sum(),
            [one, w.detach().clone().requires_grad_()],
            3,
            optimizer,
            [w],
            mode,
        )  # a tensor the loss leaves out
        assert torch.equal(alone, w) and torch.autograd.grad(other.sum(), w)[0].isfinite().all()
    assert unroll(lambda p, i: 1 / 0, [one], 0, mode=mode)[0] is one
    flat_start = torch.zeros(3, dtype=F64, requires_grad=True)
    (end,) = unroll(
        lambda p, i: (w.detach() * p[0] ** 2).sum(),
        [flat_start],
        4,
        partial(Adam, lr=0.01),
        (),
        mode,
    )  # no slope at the start
    assert torch.autograd.grad(end.sum(), flat_start)[0].isfinite().all()


def test_the_first_order_mode_is_a_constant_shift():
    params, w, loss = curved(3)
    ends = unroll(loss, params, 5, METHODS["adam"], [w], "first-order")
    found = torch.autograd.grad(sum((p**3).sum() for p in ends), [*params, w], allow_unused=True)
    assert found[-1] is None and all(
        torch.equal(g, 3 * p.detach() ** 2) for g, p in zip(found, ends)
    )


@seeds
def test_the_unrolled_rule_is_the_same_recursion(seed):
    x, y, B = (
        randn(3, seed=seed).requires_grad_(),
        randn(2, seed=seed + 1).requires_grad_(),
        randn(3, 2, seed=seed + 2),
    )
    V = lambda x, y: (x @ B @ y).sin() + (x**2).sum() / 4 - (y**4).sum() / 8
    game = Game(
        x=Player([x], lambda b: V(x, y), SGD([x], 0.1)),
        y=Player([y], lambda b: -V(x, y), SGD([y], 0.1)),
        rule=Unrolled("y", 5),
    )
    u = game.rule.direction(game.at(None, graph=True))["x"][0]
    for mode in ("graph", "adjoint"):
        (ahead,) = unroll(
            lambda p, i: -V(x, p[0]), [y.detach()], 5, partial(SGD, lr=0.1), [x], mode
        )
        assert torch.allclose(torch.autograd.grad(V(x, ahead), x)[0], u, rtol=0, atol=1e-12)


def test_weights_that_moved_before_the_way_back_are_noticed():
    w = randn(3).requires_grad_()
    (end,) = unroll(
        lambda p, i: (p[0] * w).pow(2).sum(), [randn(3, seed=1)], 2, through=[w], mode="adjoint"
    )
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        end.sum().backward()


# The refinement


def linear(seed, **options):
    return LinearGaussian(randn(5, 2, seed=seed), randn(5, seed=seed + 1), **options), randn(
        3, 5, seed=seed + 2
    )


def bound(model, x, mean, log_var):
    error = x - mean @ model.W.T - model.b
    fit = -((error**2).sum(-1) + (log_var.exp() @ (model.W**2).T).sum(-1)) / (
        2 * model.sigma**2
    ) - x.shape[-1] * math.log(model.sigma * math.sqrt(2 * math.pi))
    return fit - gaussian_kl(mean, log_var).sum(-1)


@pytest.mark.parametrize("seed", range(4))
def test_the_best_diagonal_gaussian_is_reached(seed):
    model, x = linear(seed, sigma=1.2, shift=1.0, stretch=2.0)
    P = model.precision
    best = model.marginal.log_prob(x) - (P.diagonal().log().sum() - P.logdet()) / 2
    mean, log_var = unroll(
        lambda q, i: -bound(model, x, *q),
        model.encoder(x),
        500,
        partial(Momentum, lr=0.1, momentum=0.5),
        mode="first-order",
    )
    assert torch.allclose(mean, model.posterior_mean(x), atol=1e-9) and torch.allclose(
        log_var, -P.diagonal().log().expand(3, 2), atol=1e-9
    )
    assert torch.allclose(bound(model, x, mean, log_var), best, rtol=0, atol=1e-11)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_the_mean_of_the_refined_mean_is_a_matrix_power(seed, beta):
    model, x = linear(seed, sigma=1.2, shift=1.0, stretch=2.0)
    x = x[:1].expand(3000, -1)
    P = model.precision + (beta - 1) * torch.eye(
        2, dtype=F64
    )  # of the likelihood, and beta times the prior's
    there = torch.linalg.solve(P, model.W.T @ (x[0] - model.b) / model.sigma**2)
    start = model.encoder(x)[0]
    for k in (1, 7, 30):
        found = Refinement(k, partial(SGD, lr=0.05), beta, clip=None, mode="first-order").refine(
            model, x, randn(k, 3000, 2, seed=seed + k)
        )
        assert_mean(
            found[0],
            there
            + torch.linalg.matrix_power(torch.eye(2, dtype=F64) - 0.05 * P, k) @ (start[0] - there),
        )


@pytest.mark.parametrize(
    "optimizer, clip",
    [
        (partial(Momentum, lr=0.1, momentum=0.5), 0.8),
        (partial(Adam, lr=0.05), None),
        (partial(SGD, lr=0.1), 5.0),
    ],
    ids=["momentum", "adam", "sgd"],
)
def test_the_gradient_reaches_encoder_and_decoder(optimizer, clip):
    model, x, eps = smooth(5), (randn(4, 6, seed=5) > 0).double(), randn(4, 4, 2, seed=6)
    weights = list(model.parameters())
    make = lambda mode: Refinement(3, optimizer, 0.7, clip, mode)
    check_gradient(lambda: outer(make("graph"), model, x, eps), weights, tol=1e-5)
    exact, adjoint, difference = (
        torch.autograd.grad(outer(make(mode), model, x, eps), weights) for mode in REACHING
    )
    assert off(adjoint, exact) < 1e-12 and off(difference, exact) < 1e-7
    shift = torch.autograd.grad(outer(make("first-order"), model, x, eps), weights)
    assert off(shift, exact) > 1e-2


def test_clipping_shortens_only_what_is_long():
    g = [randn(6, 2, seed=1), randn(6, 3, 2, seed=2)]
    whole = torch.cat([t.flatten(1) for t in g], 1)
    size = whole.norm(dim=1)
    most = size.median().item() * 1.001
    found = torch.cat([t.flatten(1) for t in clip_rows(g, most)], 1)
    assert torch.allclose(found.norm(dim=1), size.clamp(max=most), rtol=1e-12)
    assert torch.allclose(
        found / found.norm(dim=1, keepdim=True), whole / size[:, None], rtol=1e-12
    )
    zero = torch.zeros(2, 3, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(clip_rows([zero], 1.0)[0].sum(), zero)
    assert torch.equal(slope, torch.ones_like(slope))


@modes
def test_a_refinement_clips_each_image(mode):
    model, x, eps = smooth(2), (randn(6, 6) > 0).double(), randn(1, 6, 2, seed=1)

    def moved(clip):
        ends = Refinement(1, partial(SGD, lr=0.1), clip=clip, mode=mode).refine(model, x, eps)
        return torch.cat([a - b for a, b in zip(ends, model.encoder(x))], 1).norm(dim=1) / 0.1

    free = moved(None)
    most = free.median().item() * 1.001
    assert torch.allclose(moved(most), free.clamp(max=most), rtol=1e-10) and (free > most).any()


@modes
def test_images_do_not_mix_and_no_steps_are_the_model(mode):
    model, x, eps = smooth(0), (randn(4, 6) > 0).double(), randn(6, 4, 2, seed=1)
    refinement = Refinement(5, partial(Adam, lr=0.1), mode=mode)
    whole, alone = (
        refinement.refine(model, x, eps[1:]),
        refinement.refine(model, x[1:2], eps[1:, 1:2]),
    )
    assert all(torch.allclose(w[1:2], a, rtol=1e-12, atol=1e-14) for w, a in zip(whole, alone))
    assert torch.allclose(
        outer(Refinement(0, mode=mode), model, x, eps[:1]),
        sum(elbo_terms(model, x, eps[0])).mean(),
        rtol=1e-14,
    )


def test_the_view_is_the_model_but_for_its_encoder():
    model, x = smooth(0), (randn(8, 6) > 0).double()
    refinement = Refinement(4, partial(Adam, lr=0.1), mode="adjoint")
    view = refinement.refined_model(model, seed=3)
    expected = refinement.refine(model, x, randn(4, 8, 2, seed=3))
    state = torch.get_rng_state()
    with torch.no_grad():
        first, again = view.encoder(x), view.encoder(x)
    assert all(
        torch.equal(a, b) and torch.equal(a, c) and not a.requires_grad
        for a, b, c in zip(first, again, expected)
    )
    assert (
        view.z_dim == 2
        and view.p_net is model.p_net
        and isinstance(view, VAE)
        and all(a is b for a, b in zip(view.parameters(), model.parameters()))
    )
    result = evaluate_vae(view, [x], k=20)
    assert result == evaluate_vae(view, [x], k=20) and torch.equal(state, torch.get_rng_state())
    plain = sum(evaluate_vae(model, [x], k=300)[name] for name in ("rate", "distortion"))
    assert (
        sum(
            evaluate_vae(Refinement(60, partial(SGD, lr=0.05)).refined_model(model), [x], k=300)[
                name
            ]
            for name in ("rate", "distortion")
        )
        < plain
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.encoder(x), Refinement(0).refined_model(model).encoder(x))
    )


def test_a_view_evaluates_in_evaluation_mode_and_takes_an_encoder_that_is_a_module():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.z_dim = 2
            self.net = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5))
            self.p = nn.Linear(2, 6)
            self.encoder = Pair(self.net)

        def log_likelihood(self, x, z):
            return -((x - self.p(z)) ** 2).sum(-1)

    class Pair(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            seen.append(self.training)
            return self.net(x).chunk(2, -1)

    class Plain(Net):
        def __init__(self):
            super().__init__()
            self.pair = self._modules.pop("encoder")

        def encoder(self, x):
            seen.append(self.training)
            return self.pair(x)

    seen = []
    torch.manual_seed(0)
    plain, model = Plain().double(), Net().double()
    evaluate_vae(Refinement(2).refined_model(plain), [randn(3, 6)], k=2)
    view = Refinement(2).refined_model(model)
    evaluate_vae(view, [randn(3, 6)], k=2)
    assert (
        seen
        and not any(seen)
        and model.training
        and view.training
        and model.encoder.training
        and model.encoder is not view.encoder
    )


def test_a_model_need_not_be_a_module():
    W, scale = randn(3, 2).requires_grad_(), randn(2).requires_grad_()
    model = SimpleNamespace(
        z_dim=2,
        encoder=lambda x: (x @ W * scale, x @ W * 0),
        log_likelihood=lambda x, z: -((x - z @ W.T) ** 2).sum(-1),
        parameters=lambda: [W, scale],
    )
    x, eps = randn(4, 3, seed=3), randn(3, 4, 2, seed=4)
    for mode in ("graph", "adjoint"):
        check_gradient(
            lambda: sum(
                t.pow(2).sum()
                for t in Refinement(3, partial(SGD, lr=0.05), mode=mode).refine(model, x, eps)
            ),
            [W, scale],
            tol=1e-5,
        )
    assert Refinement(3).refined_model(model).encoder(x)[0].shape == (4, 2)


@modes
def test_a_game_trains_through_it(mode):
    torch.manual_seed(0)
    model, x = VAE(36, 16, 8, 3).double(), (torch.rand(64, 36) < torch.rand(36)).double()
    refinement = Refinement(3, mode=mode)
    game = Game(
        model=Player(
            model, lambda b: outer(refinement, model, *b), Adam(model.parameters(), lr=5e-3)
        ),
        draw=lambda b: (b, torch.randn(4, 64, 3, dtype=F64)),
    )
    losses = [game.step(x)["model"].item() for _ in range(40)]
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize(
    "build",
    [lambda: VAE(64, 12, 8, 3), lambda: ConvVAE((1, 8, 8), 3, width=2)],
    ids=["perceptron", "convolutional"],
)
@modes
def test_the_passes_are_counted_to_the_last_operation(build, mode):
    model, x = build(), torch.rand(5, 1, 8, 8)

    def counted(work):
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    def step(k):
        torch.autograd.grad(
            outer(Refinement(k, mode=mode), model, x, torch.randn(k + 1, 5, 3)),
            list(model.parameters()),
        )

    one, plain = counted(lambda: model.logits(torch.zeros(5, 3))), counted(lambda: step(0))
    for k in (1, 3):
        assert counted(lambda: step(k)) == plain + DECODER_PASSES[mode] * k * one
        assert Refinement(k, mode=mode).passes == 3 + DECODER_PASSES[mode] * k
    with torch.no_grad():
        assert counted(
            lambda: Refinement(3, mode=mode).refined_model(model).encoder(x)
        ) == 6 * one + counted(lambda: model.encoder(x))


def same_in(model, device, low, tol):
    weights, x, eps = (
        list(model.parameters()),
        (torch.rand(8, 49, generator=rng()) < 0.3).float(),
        randn(4, 8, 3, dtype=torch.float32),
    )
    for mode in MODES:
        model.to("cpu")
        refinement = Refinement(3, partial(SGD, lr=0.1), clip=None, mode=mode)
        exact = torch.autograd.grad(outer(refinement, model, x, eps), weights)
        model.to(device)
        loss = lambda: outer(refinement, model, x.to(device), eps.to(device))
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=low):
            inside, later = torch.autograd.grad(loss(), weights), loss()
        outside = torch.autograd.grad(later, weights)
        assert (
            off([g.cpu() for g in outside], exact) < tol
            and off(inside, outside) < 1e-4
            and all(g.dtype == torch.float32 for g in inside)
        )


def test_autocast():
    same_in(smooth(0, 49, 12, 8, 3).float(), "cpu", True, 5e-2)


@pytest.mark.cuda
@pytest.mark.parametrize("low, tol", [(False, 1e-3), (True, 5e-2)])
def test_cuda(low, tol):
    model = smooth(0, 49, 12, 8, 3).float()
    same_in(model, "cuda", low, tol)
    view = Refinement(2).refined_model(model)
    assert view.encoder(torch.rand(2, 49, device="cuda"))[0].is_cuda


@modes
def test_meta(mode):
    with torch.device("meta"):
        model, x, eps = VAE(49, 12, 8, 3), torch.rand(4, 49), torch.randn(3, 4, 3)
    for optimizer in METHODS.values():
        answer = Refinement(3, optimizer, mode=mode).refine(model, x, eps)
        assert all(
            g.is_meta
            for g in torch.autograd.grad(
                sum(map(torch.sum, answer)), list(model.q_net.parameters())
            )
        )
    assert Refinement(3, mode=mode).refined_model(model).encoder(x)[0].is_meta


@pytest.mark.parametrize("mode", ["difference", "first-order"])
def test_a_compiled_decoder_where_it_is_legal(mode):
    eager, compiled = smooth(0, 49, 12, 8, 3), smooth(0, 49, 12, 8, 3)
    compiled.p_net.compile(backend="aot_eager")
    x, eps = (randn(4, 49) > 0).double(), randn(3, 4, 3, seed=1)
    a, b = (
        torch.autograd.grad(outer(Refinement(2, mode=mode), m, x, eps), list(m.parameters()))
        for m in (eager, compiled)
    )
    assert off(b, a) < 1e-9


@pytest.mark.parametrize("mode", ["graph", "adjoint"])
def test_a_compiled_decoder_is_refused_where_it_is_not(mode):
    model = smooth(0, 49, 12, 8, 3)
    model.p_net.compile(backend="aot_eager")
    with pytest.raises(RuntimeError, match="double backward|create_graph"):
        torch.autograd.grad(
            outer(Refinement(2, mode=mode), model, (randn(4, 49) > 0).double(), randn(3, 4, 3)),
            list(model.parameters()),
        )


square = lambda p, i: (p[0] ** 2).sum()


@pytest.mark.parametrize(
    "call, kind, words",
    [
        (
            lambda: unroll(square, [randn(3)], -1),
            ValueError,
            "steps must be an integer, at least 0; got -1",
        ),
        (lambda: Refinement(1.5), ValueError, "steps must be an integer"),
        (
            lambda: unroll(square, [randn(3)], 1, mode="exact"),
            ValueError,
            "mode must be one of graph",
        ),
        (lambda: Refinement(1, mode=True), ValueError, "mode must be one of graph"),
        (lambda: unroll(square, randn(3), 1), TypeError, "for a single one"),
        (
            lambda: unroll(square, [randn(3)], 1, torch.optim.Adam),
            TypeError,
            "use an optimizer of optgen.optim",
        ),
        (
            lambda: unroll(lambda p, i: randn(3).sum(), [randn(3)], 1),
            ValueError,
            "does not depend on the tensors",
        ),
        (
            lambda: unroll(square, [randn(3)], 1, mode="difference", eps=-1.0),
            ValueError,
            "eps must be above 0",
        ),
        (lambda: Refinement(1, beta=math.nan), ValueError, "beta must be a finite number"),
        (lambda: Refinement(1, clip=0.0), ValueError, "clip must be above 0"),
        (
            lambda: Refinement(3).refine(smooth(0), randn(4, 6), randn(3, 2)),
            ValueError,
            "eps must be",
        ),
    ],
)
def test_bad_input(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


def test_a_rule_of_second_order_takes_the_graph_and_no_silent_zero():
    def game(mode):
        model = smooth(1)
        return Game(
            model=Player(
                model,
                lambda b: outer(Refinement(2, mode=mode), model, *b),
                SGD(model.parameters(), lr=0.1),
            ),
            rule=Consensus(0.1),
        ), list(model.parameters())

    batch = (randn(4, 6) > 0).double(), randn(3, 4, 2, seed=1)
    whole, weights = game("graph")
    at = whole.at(batch, graph=True)
    check_gradient(
        lambda: (
            whole.at(batch, graph=True).differentiate("model", ["model"])["model"][0].pow(2).sum()
            / 2
        ),
        weights[:1],
        tol=1e-5,
    )
    assert at.vjp(at.field())["model"][0].abs().max() > 0
    with pytest.raises(RuntimeError, match="needs mode='graph'"):
        game("adjoint")[0].step(batch)
