"""The inner optimizer against independent references.

The references are closed forms, central differences, the optimizers themselves and, for the
refinement, the known posterior.
"""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from optgen.games import Game, Player
from optgen.inner import DECODER_PASSES, Refinement, clip_rows, unroll
from optgen.metrics import evaluate_vae
from optgen.models.vae import VAE, ConvVAE, elbo_terms, gaussian_kl
from optgen.opponents import Unrolled
from optgen.optim import SGD, Adam, AdamW, Momentum, RMSProp
from optgen.rules import Consensus
from optgen.testing import LinearGaussian, assert_mean, check_gradient, generator, randn

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


def flat(tensors):
    """Return the tensors as one vector."""
    return torch.cat([t.flatten() for t in tensors])


def relative_error(found, true):
    """Return the norm of the error relative to that of the truth."""
    return ((flat(found) - flat(true)).norm() / flat(true).norm()).item()


def curved(seed, steps=25):
    """Return tensors to move, one to reach, and a loss with other noise each step."""
    shapes = [(2, 3), (3,), (), (3,)]
    a, b, c, w = (
        randn(*shape, seed=10 * seed + i).requires_grad_() for i, shape in enumerate(shapes)
    )
    noise = randn(steps, 3, seed=seed + 100)

    def loss(p, i):
        """Return the loss of step `i`."""
        first = ((p[0] * w).sin() + (p[0] * p[1] - noise[i]) ** 2 + p[2] * w).sum()
        return first + (w * p[1]).cosh().sum() + (p[2] ** 4).sum()

    return [a, b, c], w, loss


def smooth(seed, *sizes, activation=nn.Tanh, scale=1.5):
    """Return a VAE in float64 with other activations and larger weights."""
    torch.manual_seed(seed)
    model = VAE(*sizes or (6, 4, 3, 2)).double()
    for net in (model.q_net, model.p_net):
        net[1] = net[3] = activation()
    for p in model.parameters():
        p.data.mul_(scale)
    return model


def outer(refinement, model, x, eps):
    """Return the negative bound at the refined output, with its own noise."""
    mean, log_var = refinement.refine(model, x, eps[1:])
    z = mean + (log_var / 2).exp() * eps[0]
    return (gaussian_kl(mean, log_var).sum(-1) - model.log_likelihood(x, z)).mean()


def outer_gradient(refinement, model, x, eps):
    """Return its gradient by all parameters."""
    return torch.autograd.grad(outer(refinement, model, x, eps), list(model.parameters()))


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
        assert relative_error(ends, [p.detach() for p in real]) < 1e-12
        assert all(map(torch.equal, params, before)) and all(p.grad is None for p in params)


@methods
def test_the_gradient_is_the_central_differences_and_the_same_three_ways(optimizer):
    params, w, loss = curved(1)

    def end(mode, **options):
        """Return an outer loss of the end of the steps."""
        ends = unroll(loss, params, 6, optimizer, [w], mode, **options)
        return sum(((p - 0.3) ** 3).sum() for p in ends)

    def gradient(mode, **options):
        """Return its gradient by the start and by the tensor to reach."""
        return torch.autograd.grad(end(mode, **options), [*params, w])

    check_gradient(lambda: end("graph"), [*params, w], tol=1e-5)
    exact = gradient("graph")
    assert relative_error(gradient("adjoint"), exact) < 1e-12
    assert relative_error(gradient("difference"), exact) < 1e-8
    coarse, fine = (relative_error(gradient("difference", eps=h), exact) for h in (3e-2, 3e-3))
    assert 70 < coarse / fine < 140  # second order


@pytest.mark.parametrize("mu", [0.0, 0.6, -0.3])
@pytest.mark.parametrize("mode", REACHING)
@seeds
def test_a_quadratic_is_a_matrix_power(mode, mu, seed):
    n, eta, k, eye = 4, 0.1, 9, torch.eye(4, dtype=F64)
    Q, c = randn(n, n, seed=seed), randn(n, seed=seed + 9)
    A = Q @ Q.T / n
    b, start = (randn(n, seed=seed + i).requires_grad_() for i in (1, 2))
    M = torch.cat([torch.cat([eye - eta * A, -eta * mu * eye], 1), torch.cat([A, mu * eye], 1)])
    N = torch.cat([eta * eye, -eye])
    by_start = torch.linalg.matrix_power(M, k)[:n, :n]
    by_b = sum(torch.linalg.matrix_power(M, j) @ N for j in range(k))[:n]

    def quadratic(p, i):
        """Return the quadratic loss."""
        return p[0] @ A @ p[0] / 2 - b @ p[0]

    optimizer = partial(Momentum, lr=eta, momentum=mu)
    (end,) = unroll(quadratic, [start], k, optimizer, [b], mode)
    assert torch.allclose(end, by_start @ start + by_b @ b, rtol=0, atol=1e-12)
    tol = 1e-9 if mode == "difference" else 1e-12
    for found, true in zip(torch.autograd.grad(c @ end, [start, b]), (c @ by_start, c @ by_b)):
        assert torch.allclose(found, true, rtol=0, atol=tol)


def test_the_graph_can_be_differentiated_again_and_the_adjoint_refuses():
    params, w, loss = curved(0)

    def slope(mode):
        """Return the squared norm of the gradient of an outer loss."""
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
        """Return an outer loss of the end of the steps."""
        optimizer = partial(SGD, lr=lr, momentum=mu)
        return sum((p**2).sum() for p in unroll(loss, params, 5, optimizer, [lr, mu], mode))

    check_gradient(end, [lr, mu], tol=1e-5)


@pytest.mark.parametrize("mode", REACHING)
@pytest.mark.parametrize("method", ["sgd", "momentum", "adam"])
def test_a_slope_that_does_not_depend_on_the_point(mode, method):
    w, one = randn(3).requires_grad_(), randn(3, seed=1).requires_grad_()
    (end,) = unroll(lambda p, i: w @ p[0], [one], 3, METHODS[method], [w], mode)
    (found,) = torch.autograd.grad(end.sum(), one)
    assert torch.allclose(found, torch.ones(3, dtype=F64), rtol=1e-9)


@pytest.mark.parametrize("mode", REACHING)
@pytest.mark.parametrize("method", ["sgd", "momentum", "adam"])
def test_a_tensor_that_the_loss_does_not_depend_on(mode, method):
    w, one = randn(3).requires_grad_(), randn(3, seed=1).requires_grad_()
    params = [one, w.detach().clone().requires_grad_()]
    moved, still = unroll(lambda p, i: (w * p[0] ** 2).sum(), params, 3, METHODS[method], [w], mode)
    assert torch.equal(still, w)
    assert torch.autograd.grad(moved.sum(), w)[0].isfinite().all()


@pytest.mark.parametrize("mode", REACHING)
def test_no_steps_are_the_start(mode):
    one = randn(3, seed=1).requires_grad_()
    assert unroll(lambda p, i: 1 / 0, [one], 0, mode=mode)[0] is one


@pytest.mark.parametrize("mode", REACHING)
def test_a_start_without_slope(mode):
    w, start = randn(3), torch.zeros(3, dtype=F64, requires_grad=True)
    (end,) = unroll(
        lambda p, i: (w * p[0] ** 2).sum(), [start], 4, partial(Adam, lr=0.01), (), mode
    )
    assert torch.autograd.grad(end.sum(), start)[0].isfinite().all()


def test_the_first_order_mode_is_a_constant_shift():
    params, w, loss = curved(3)
    ends = unroll(loss, params, 5, METHODS["adam"], [w], "first-order")
    found = torch.autograd.grad(sum((p**3).sum() for p in ends), [*params, w], allow_unused=True)
    assert found[-1] is None
    assert all(torch.equal(g, 3 * p.detach() ** 2) for g, p in zip(found, ends))


@seeds
def test_the_unrolled_rule_is_the_same_recursion(seed):
    x, y = randn(3, seed=seed).requires_grad_(), randn(2, seed=seed + 1).requires_grad_()
    B = randn(3, 2, seed=seed + 2)

    def value(x, y):
        """Return the loss of x, and minus that of y."""
        return (x @ B @ y).sin() + (x**2).sum() / 4 - (y**4).sum() / 8

    game = Game(
        x=Player([x], lambda batch: value(x, y), SGD([x], 0.1)),
        y=Player([y], lambda batch: -value(x, y), SGD([y], 0.1)),
        rule=Unrolled("y", 5),
    )
    u = game.rule.direction(game.at(None, graph=True))["x"][0]
    for mode in ("graph", "adjoint"):
        (ahead,) = unroll(
            lambda p, i: -value(x, p[0]), [y.detach()], 5, partial(SGD, lr=0.1), [x], mode
        )
        assert torch.allclose(torch.autograd.grad(value(x, ahead), x)[0], u, rtol=0, atol=1e-12)


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
    """Return a linear-Gaussian model and three images."""
    model = LinearGaussian(randn(5, 2, seed=seed), randn(5, seed=seed + 1), **options)
    return model, randn(3, 5, seed=seed + 2)


def bound(model, x, mean, log_var):
    """Return the exact ELBO of a linear-Gaussian model, (B,)."""
    error = x - mean @ model.W.T - model.b
    square = (error**2).sum(-1) + (log_var.exp() @ (model.W**2).T).sum(-1)
    constant = x.shape[-1] * math.log(model.sigma * math.sqrt(2 * math.pi))
    return -square / (2 * model.sigma**2) - constant - gaussian_kl(mean, log_var).sum(-1)


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
    assert torch.allclose(mean, model.posterior_mean(x), atol=1e-9)
    assert torch.allclose(log_var, -P.diagonal().log().expand(3, 2), atol=1e-9)
    assert torch.allclose(bound(model, x, mean, log_var), best, rtol=0, atol=1e-11)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_the_mean_of_the_refined_mean_is_a_matrix_power(seed, beta):
    model, x = linear(seed, sigma=1.2, shift=1.0, stretch=2.0)
    x = x[:1].expand(3000, -1)
    # The precision of the likelihood, and beta times the prior's.
    P = model.precision + (beta - 1) * torch.eye(2, dtype=F64)
    target = torch.linalg.solve(P, model.W.T @ (x[0] - model.b) / model.sigma**2)
    distance = model.encoder(x)[0][0] - target
    for k in (1, 7, 30):
        refinement = Refinement(k, partial(SGD, lr=0.05), beta, clip=None, mode="first-order")
        mean, _ = refinement.refine(model, x, randn(k, 3000, 2, seed=seed + k))
        contraction = torch.linalg.matrix_power(torch.eye(2, dtype=F64) - 0.05 * P, k)
        assert_mean(mean, target + contraction @ distance)


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
    by_mode = {mode: Refinement(3, optimizer, 0.7, clip, mode) for mode in MODES}
    weights = list(model.parameters())
    check_gradient(lambda: outer(by_mode["graph"], model, x, eps), weights, tol=1e-5)
    exact = outer_gradient(by_mode["graph"], model, x, eps)
    assert relative_error(outer_gradient(by_mode["adjoint"], model, x, eps), exact) < 1e-12
    assert relative_error(outer_gradient(by_mode["difference"], model, x, eps), exact) < 1e-7
    assert relative_error(outer_gradient(by_mode["first-order"], model, x, eps), exact) > 1e-2


def test_clipping_shortens_only_what_is_long():
    g = [randn(6, 2, seed=1), randn(6, 3, 2, seed=2)]
    whole = torch.cat([t.flatten(1) for t in g], 1)
    size = whole.norm(dim=1)
    max_norm = size.median().item() * 1.001
    found = torch.cat([t.flatten(1) for t in clip_rows(g, max_norm)], 1)
    assert torch.allclose(found.norm(dim=1), size.clamp(max=max_norm), rtol=1e-12)
    directions = found / found.norm(dim=1, keepdim=True)
    assert torch.allclose(directions, whole / size[:, None], rtol=1e-12)
    zero = torch.zeros(2, 3, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(clip_rows([zero], 1.0)[0].sum(), zero)
    assert torch.equal(slope, torch.ones_like(slope))


@modes
def test_a_refinement_clips_each_image(mode):
    model, x, eps = smooth(2), (randn(6, 6) > 0).double(), randn(1, 6, 2, seed=1)

    def distances(clip):
        """Return the length of each image's step over the learning rate."""
        ends = Refinement(1, partial(SGD, lr=0.1), clip=clip, mode=mode).refine(model, x, eps)
        return torch.cat([a - b for a, b in zip(ends, model.encoder(x))], 1).norm(dim=1) / 0.1

    free = distances(None)
    max_norm = free.median().item() * 1.001
    assert torch.allclose(distances(max_norm), free.clamp(max=max_norm), rtol=1e-10)
    assert (free > max_norm).any()


@modes
def test_images_do_not_mix_and_no_steps_are_the_model(mode):
    model, x, eps = smooth(0), (randn(4, 6) > 0).double(), randn(6, 4, 2, seed=1)
    refinement = Refinement(5, partial(Adam, lr=0.1), mode=mode)
    whole = refinement.refine(model, x, eps[1:])
    alone = refinement.refine(model, x[1:2], eps[1:, 1:2])
    assert all(torch.allclose(w[1:2], a, rtol=1e-12, atol=1e-14) for w, a in zip(whole, alone))
    loss = outer(Refinement(0, mode=mode), model, x, eps[:1])
    assert torch.allclose(loss, sum(elbo_terms(model, x, eps[0])).mean(), rtol=1e-14)


def test_the_view_is_the_model_but_for_its_encoder():
    model, x = smooth(0), (randn(8, 6) > 0).double()
    refinement = Refinement(4, partial(Adam, lr=0.1), mode="adjoint")
    view = refinement.refined_model(model, seed=3)
    expected = refinement.refine(model, x, randn(4, 8, 2, seed=3))
    state = torch.get_rng_state()
    with torch.no_grad():
        first, again = view.encoder(x), view.encoder(x)
    for a, b, c in zip(first, again, expected):
        assert torch.equal(a, b) and torch.equal(a, c) and not a.requires_grad
    assert isinstance(view, VAE) and view.z_dim == 2 and view.p_net is model.p_net
    assert all(a is b for a, b in zip(view.parameters(), model.parameters()))
    result = evaluate_vae(view, [x], k=20)
    assert result == evaluate_vae(view, [x], k=20) and torch.equal(state, torch.get_rng_state())


def test_more_steps_improve_the_bound_and_no_steps_change_nothing():
    model, x = smooth(0), (randn(8, 6) > 0).double()

    def loss(model):
        """Return the negative bound of many samples."""
        result = evaluate_vae(model, [x], k=300)
        return result["rate"] + result["distortion"]

    assert loss(Refinement(60, partial(SGD, lr=0.05)).refined_model(model)) < loss(model)
    same = Refinement(0).refined_model(model).encoder(x)
    assert all(torch.equal(a, b) for a, b in zip(model.encoder(x), same))


def test_a_view_evaluates_in_evaluation_mode_and_takes_an_encoder_that_is_a_module():
    class Net(nn.Module):
        """Model whose encoder is a module, with dropout."""

        def __init__(self):
            super().__init__()
            self.z_dim = 2
            self.net = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5))
            self.p = nn.Linear(2, 6)
            self.encoder = Pair(self.net)

        def log_likelihood(self, x, z):
            """Return minus the squared error."""
            return -((x - self.p(z)) ** 2).sum(-1)

    class Pair(nn.Module):
        """Encoder that records its mode."""

        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            """Return mean and log-variance."""
            seen.append(self.training)
            return self.net(x).chunk(2, -1)

    class Plain(Net):
        """Model whose encoder is a method."""

        def __init__(self):
            super().__init__()
            self.pair = self._modules.pop("encoder")

        def encoder(self, x):
            """Return mean and log-variance."""
            seen.append(self.training)
            return self.pair(x)

    seen = []
    torch.manual_seed(0)
    plain, model = Plain().double(), Net().double()
    evaluate_vae(Refinement(2).refined_model(plain), [randn(3, 6)], k=2)
    view = Refinement(2).refined_model(model)
    evaluate_vae(view, [randn(3, 6)], k=2)
    assert seen and not any(seen)
    assert model.training and view.training and model.encoder.training
    assert model.encoder is not view.encoder


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
        refinement = Refinement(3, partial(SGD, lr=0.05), mode=mode)
        check_gradient(
            lambda: sum(t.pow(2).sum() for t in refinement.refine(model, x, eps)),
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

    def count_operations(work):
        """Return the floating-point operations of a function."""
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    def training_step(k):
        """Compute the gradient of a training step with `k` inner steps."""
        outer_gradient(Refinement(k, mode=mode), model, x, torch.randn(k + 1, 5, 3))

    def encode():
        """Encode with three inner steps, without a gradient."""
        Refinement(3, mode=mode).refined_model(model).encoder(x)

    one = count_operations(lambda: model.logits(torch.zeros(5, 3)))
    plain = count_operations(lambda: training_step(0))
    for k in (1, 3):
        added = DECODER_PASSES[mode] * k
        assert count_operations(lambda: training_step(k)) == plain + added * one
        assert Refinement(k, mode=mode).decoder_passes == 3 + added
    with torch.no_grad():
        assert count_operations(encode) == 6 * one + count_operations(lambda: model.encoder(x))


def assert_same_on(model, device, mixed, tol):
    """Assert that the gradient on a device, perhaps under autocast, is the CPU's in float32."""
    weights = list(model.parameters())
    x = (torch.rand(8, 49, generator=generator()) < 0.3).float()
    eps = randn(4, 8, 3, dtype=torch.float32)
    for mode in MODES:
        model.to("cpu")
        refinement = Refinement(3, partial(SGD, lr=0.1), clip=None, mode=mode)
        exact = outer_gradient(refinement, model, x, eps)
        model.to(device)
        batch = x.to(device), eps.to(device)
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=mixed):
            inside = outer_gradient(refinement, model, *batch)
            loss = outer(refinement, model, *batch)
        outside = torch.autograd.grad(loss, weights)
        assert relative_error([g.cpu() for g in outside], exact) < tol
        assert relative_error(inside, outside) < 1e-4
        assert all(g.dtype == torch.float32 for g in inside)


def test_autocast():
    assert_same_on(smooth(0, 49, 12, 8, 3).float(), "cpu", True, 5e-2)


@pytest.mark.cuda
@pytest.mark.parametrize("mixed, tol", [(False, 1e-3), (True, 5e-2)])
def test_cuda(mixed, tol):
    model = smooth(0, 49, 12, 8, 3).float()
    assert_same_on(model, "cuda", mixed, tol)
    view = Refinement(2).refined_model(model)
    assert view.encoder(torch.rand(2, 49, device="cuda"))[0].is_cuda


@modes
def test_meta(mode):
    with torch.device("meta"):
        model, x, eps = VAE(49, 12, 8, 3), torch.rand(4, 49), torch.randn(3, 4, 3)
    for optimizer in METHODS.values():
        q = Refinement(3, optimizer, mode=mode).refine(model, x, eps)
        grads = torch.autograd.grad(sum(map(torch.sum, q)), list(model.q_net.parameters()))
        assert all(g.is_meta for g in grads)
    assert Refinement(3, mode=mode).refined_model(model).encoder(x)[0].is_meta


@pytest.mark.parametrize("mode", ["difference", "first-order"])
def test_a_compiled_decoder_where_it_is_legal(mode):
    eager, compiled = smooth(0, 49, 12, 8, 3), smooth(0, 49, 12, 8, 3)
    compiled.p_net.compile(backend="aot_eager")
    x, eps = (randn(4, 49) > 0).double(), randn(3, 4, 3, seed=1)
    refinement = Refinement(2, mode=mode)
    a, b = (outer_gradient(refinement, model, x, eps) for model in (eager, compiled))
    assert relative_error(b, a) < 1e-9


@pytest.mark.parametrize("mode", ["graph", "adjoint"])
def test_a_compiled_decoder_is_refused_where_it_is_not(mode):
    model = smooth(0, 49, 12, 8, 3)
    model.p_net.compile(backend="aot_eager")
    x, eps = (randn(4, 49) > 0).double(), randn(3, 4, 3)
    with pytest.raises(RuntimeError, match="double backward|create_graph"):
        outer_gradient(Refinement(2, mode=mode), model, x, eps)


def square(p, i):
    """Return the squared norm of the first tensor."""
    return (p[0] ** 2).sum()


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
            "mode must be one of 'graph', 'adjoint', 'difference', 'first-order'",
        ),
        (
            lambda: Refinement(1, mode=True),
            ValueError,
            "mode must be one of 'graph', 'adjoint', 'difference', 'first-order'",
        ),
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
            "eps must be a finite number, above 0; got -1.0",
        ),
        (lambda: Refinement(1, beta=math.nan), ValueError, "beta must be a finite number"),
        (
            lambda: Refinement(1, clip=0.0),
            ValueError,
            "clip must be a finite number, above 0; got 0.0",
        ),
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
    def make_game(mode):
        """Return a game whose loss refines, and its parameters."""
        model = smooth(1)
        refinement, optimizer = Refinement(2, mode=mode), SGD(model.parameters(), lr=0.1)
        player = Player(model, lambda batch: outer(refinement, model, *batch), optimizer)
        return Game(model=player, rule=Consensus(0.1)), list(model.parameters())

    batch = (randn(4, 6) > 0).double(), randn(3, 4, 2, seed=1)
    game, weights = make_game("graph")

    def half_squared_gradient():
        """Return half the squared norm of the gradient by the first tensor."""
        at = game.at(batch, graph=True)
        (point,) = at._points(graph=True)
        return point.local_grads("model", ["model"])["model"][0].pow(2).sum() / 2

    check_gradient(half_squared_gradient, weights[:1], tol=1e-5)
    at = game.at(batch, graph=True)
    assert at.vjp(at.field())["model"][0].abs().max() > 0
    with pytest.raises(RuntimeError, match="needs mode='graph'"):
        make_game("adjoint")[0].step(batch)
