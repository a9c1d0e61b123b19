"""Controllers of beta against their equations in plain numbers, the closed-form optimum of a linear VAE, autograd, torch.compile and another library's trainer."""

import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from optgen.controllers import (
    Capacity,
    Constant,
    Controller,
    ControlVAE,
    Cyclical,
    FreeBits,
    Geco,
    LinearWarmup,
    SigmaVAE,
    calibrated_nll,
    linear_ramp,
    water_filling,
)
from optgen.games import Game, Player
from optgen.models.vae import VAE, gaussian_kl
from optgen.optim import SGD
from optgen.rules import Alternating
from optgen.testing import check_gradient
from optgen.training import checkpoint

F64 = torch.float64


def rng(seed):
    return torch.Generator().manual_seed(seed)


EVERYONE = {
    "constant": lambda: Constant(0.5),
    "warmup": lambda: LinearWarmup(7, 0.5, start=2.0),
    "cyclical": lambda: Cyclical(11, cycles=3, ramp=0.4, beta=0.5),
    "capacity": lambda: Capacity(3.0, 9, 2.0, start=1.0),
    "free-bits": lambda: FreeBits(0.5, beta=0.7),
    "free-bits-groups": lambda: FreeBits(1.0, groups=2),
    "geco": lambda: Geco(8.0, rate=0.03, smoothing=0.8, clip=0.04, low=0.7, high=1.2),
    "control": lambda: ControlVAE(2.0, kp=0.3, ki=0.05, low=0.1, high=0.4),
    "sigma": lambda: SigmaVAE(7),
}
everyone = pytest.mark.parametrize("name", EVERYONE)


def measures(n, seed=0, dtype=torch.float32, device="cpu"):
    g = rng(seed)
    return [
        (
            torch.rand(4, generator=g, dtype=F64).to(device, dtype),
            (5 + 6 * torch.rand((), generator=g, dtype=F64)).to(device, dtype),
        )
        for _ in range(n)
    ]


# Every equation once more, in Python's own numbers.
def constant(t, R, D, m):
    return 0.5


def ramp(t, T, start, end):
    return end if t >= T else start + (end - start) * t / T


def warmup(t, R, D, m):
    return ramp(t, 7, 2.0, 0.5)


def cyclical(t, R, D, m):
    return 0.5 if t >= 11 else 0.5 * min(1, (3 * t % 11) / 11 / 0.4)


def capacity(t, R, D, m):
    return math.copysign(2.0, sum(R) - ramp(t, 9, 1.0, 3.0))


def free_bits(t, R, D, m):
    return [0.7 if r > 0.5 else 0.0 for r in R]


def free_groups(t, R, D, m):
    return [float(sum(pair) > 1.0) for pair in (R[:2], R[2:]) for _ in pair]


def geco(t, R, D, m):
    m["C"] = D - 8.0 if t == 0 else 0.8 * m["C"] + 0.2 * (D - 8.0)
    m["lambda"] = m.get("lambda", 1.0) * math.exp(max(-0.04, min(0.04, 0.03 * m["C"])))
    m["lambda"] = max(1 / 1.2, min(1 / 0.7, m["lambda"]))
    return 1 / m["lambda"]


def control(t, R, D, m):  # the position form, its integral set back by what was clipped
    e = 2.0 - sum(R)
    P = 0.3 / (1 + math.exp(e))
    I = m.get("I", 0.0) - 0.05 * e
    beta = max(0.1, min(0.4, 0.1 + P + I))
    m["I"] = beta - 0.1 - P
    return beta


def sigma(t, R, D, m):
    return 2 * D / 7


EQUATIONS = dict(
    zip(
        EVERYONE,
        (constant, warmup, cyclical, capacity, free_bits, free_groups, geco, control, sigma),
    )
)


@pytest.mark.parametrize("seed", range(3))
@everyone
def test_follows_its_equation(name, seed):
    controller, memory, seen = EVERYONE[name](), {}, set()
    for t, (R, D) in enumerate(measures(60, seed, F64)):
        beta, expected = controller.update(R, D), EQUATIONS[name](t, R.tolist(), D.item(), memory)
        assert (
            beta.shape == torch.tensor(expected).shape
            and (beta - torch.tensor(expected, dtype=F64)).abs().max() < 1e-12
        ), t
        assert beta is controller.value and controller.t == t + 1
        seen.add(beta.mean().item())
    if name != "constant":
        assert len(seen) > 1
    if name in ("geco", "control"):
        assert {"geco": (0.7, 1.2), "control": (0.1, 0.4)}[name][0] - 1e-12 < min(seen) and len(
            seen
        ) > 20


@everyone
def test_takes_the_sum_or_each_latent(name):
    whole, each = EVERYONE[name](), EVERYONE[name]()
    for R, D in measures(9, dtype=F64):
        if name == "free-bits":
            with pytest.raises(ValueError, match="each latent"):
                whole.update(R.sum(), D)
            return
        if name == "free-bits-groups":
            whole = FreeBits(1.0, groups=1)
            each = FreeBits(1.0, groups=1)
        assert torch.equal(whole.update(R.sum(), D), each.update(R, D).mean())


# The loss is differentiated with beta held, which is the gradient of what the equation names.
@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_the_named_losses(seed):
    kl = (2 * torch.rand(6, generator=rng(seed), dtype=F64)).requires_grad_()
    grad = lambda loss: torch.autograd.grad(loss, kl)[0]
    for groups in (None, 1, 2, 3, 6):
        for beta in (1.0, 0.3):
            loss = beta * kl.reshape(groups or 6, -1).sum(1).clamp(min=0.9).sum()
            assert torch.equal(grad(loss), FreeBits(0.9, groups, beta).update(kl))
    for C in (1.0, 11.0):
        c = Capacity(C, 1, 2.5)
        c.update(kl)
        assert torch.equal(grad(2.5 * (kl.sum() - C).abs()), c.update(kl).expand(6))
    D = lambda: (kl - 3).square().sum() / 2
    R = lambda: kl.square().sum() / 2
    check_gradient(lambda: calibrated_nll(D(), 6), kl)
    beta = SigmaVAE(6).update(R(), D())
    assert not beta.requires_grad
    assert (beta * grad(calibrated_nll(D(), 6) + R()) - grad(D() + beta * R())).abs().max() < 1e-13
    nll = lambda var: D() / var + 3 * math.log(2 * math.pi * var)
    assert abs(nll(beta.item()) - calibrated_nll(D(), 6)) < 1e-12 and min(
        nll(beta.item() * f) for f in (0.99, 1.01)
    ) > calibrated_nll(D(), 6)


# The closed form, by searching.
@pytest.mark.parametrize("seed", range(4))
def test_water_filling_is_the_least_loss(seed):
    g = rng(seed)
    s = 4 * torch.rand(5, generator=g, dtype=F64) + 0.05
    sd = 0.5 + torch.rand((), generator=g, dtype=F64).item()
    a = s.sort(descending=True).values / sd**2
    for z_dim in (1, 3, 5):
        used = lambda R: (
            (
                (a[:z_dim] * (-2 * R).exp()).sum()
                + a[z_dim:].sum()
                + 5 * math.log(2 * math.pi * sd**2)
            )
            / 2
        )  # D where each takes an eigenvector
        for beta in (0.1, 0.8, 2.5):
            o = water_filling(s, beta=beta, sigma=sd, z_dim=z_dim)
            assert abs(used(o.rate) - o.distortion) < 1e-12
            best = o.distortion + beta * o.rate.sum()
            for _ in range(50):
                R = (o.rate + 0.3 * torch.randn(z_dim, generator=g, dtype=F64)).clamp(min=0)
                assert used(R) + beta * R.sum() >= best - 1e-12
        for C in (0.05, 1.0, 4.0):
            o = water_filling(s, rate=C, sigma=sd, z_dim=z_dim)
            again = water_filling(s, distortion=o.distortion, sigma=sd, z_dim=z_dim)
            assert abs(o.rate.sum() - C) < 1e-12 and abs(used(o.rate) - o.distortion) < 1e-12
            assert all((x - y).abs().max() < 1e-11 for x, y in zip(o, again))
    assert (
        water_filling(s, rate=0.0).rate.sum() < 1e-12
        and abs(water_filling(s, rate=0.0).beta - s.max()) < 1e-12
    )


# Set-points: a linear VAE trained to its end, in other units and sizes than the notebook's.
class LinearVAE(nn.Module):
    def __init__(self, s, z_dim, sigma, seed, dtype=F64, device="cpu"):
        super().__init__()
        g, n = rng(seed), len(s)
        normal = lambda *shape: torch.randn(*shape, generator=g, dtype=F64)
        Q = torch.linalg.qr(normal(n, n)).Q
        self.S, self.eye, self.sigma = (
            (Q * s @ Q.T).to(device, dtype),
            torch.eye(n, dtype=dtype, device=device),
            sigma,
        )
        self.W, self.V, self.log_t = (
            nn.Parameter(w.to(device, dtype))
            for w in (0.3 * normal(n, z_dim), 0.3 * normal(z_dim, n), torch.zeros(z_dim))
        )

    def forward(self):
        W, V, t, v = self.W, self.V, self.log_t.exp(), self.sigma**2
        E = self.eye - W @ V
        D = ((E @ self.S * E).sum() + (t * W.square().sum(0)).sum()) / (2 * v) + len(
            W
        ) / 2 * math.log(2 * math.pi * v)
        return D, ((V @ self.S * V).sum(1) + t - 1 - self.log_t) / 2


S = torch.tensor([0.6, 5.0, 1.5, 0.2], dtype=F64)


def train(controller, steps=1000, z_dim=3, sigma=0.8, seed=5, shift=0.0):
    model, log = LinearVAE(S, z_dim, sigma, seed), []
    optimizer = torch.optim.Adam(model.parameters(), 1.0, betas=(0.9, 0.99))
    for t in range(steps):
        optimizer.param_groups[0]["lr"] = 0.06 * min(1, 2 * (1 - t / steps)) ** 2
        D, R = model()
        beta = controller.update(R, D - shift)
        optimizer.zero_grad()
        (D + (beta * R).sum()).backward()
        optimizer.step()
        log.append((beta.flatten()[0].item(), R.detach().sum().item(), D.item()))
    with torch.no_grad():
        return *model(), torch.tensor(log, dtype=F64)


def optimum(**k):
    return water_filling(S, sigma=0.8, z_dim=3, **k)


SET_POINTS = {  # controller, where it ends, how near D and each rate come, how near beta
    "constant": (lambda: Constant(0.4), dict(beta=0.4), 1e-4, 0),
    "warmup": (lambda: LinearWarmup(200, 0.4), dict(beta=0.4), 1e-4, 0),
    "warmup-down": (lambda: LinearWarmup(200, 0.4, start=3.0), dict(beta=0.4), 1e-4, 0),
    "cyclical": (lambda: Cyclical(300, beta=0.4), dict(beta=0.4), 1e-4, 0),
    "geco": (lambda: Geco(5.5, rate=0.05, smoothing=0.9), dict(distortion=5.5), 1e-5, 1e-5),
    "geco-low": (lambda: Geco(4.7, rate=0.05, smoothing=0.5), dict(distortion=4.7), 1e-5, 1e-5),
    "control": (lambda: ControlVAE(2.0, kp=0.1, ki=0.03, high=8.0), dict(rate=2.0), 1e-4, 1e-4),
    "control-bound": (
        lambda: ControlVAE(2.0, kp=0.1, ki=0.03, high=0.4),
        dict(beta=0.4),
        1e-4,
        1e-6,
    ),  # out of reach of the box: a beta-VAE at its end
    "capacity": (lambda: Capacity(2.0, 200, 2.0), dict(rate=2.0), 2e-2, None),
    "capacity-weak": (lambda: Capacity(1.0, 200, 0.4), dict(beta=0.4), 1e-4, 0),
    "free-bits": (lambda: FreeBits(2.5, groups=1, beta=1.5), dict(rate=2.5), 2e-2, None),
    "free-bits-above": (lambda: FreeBits(0.1, beta=0.4), dict(beta=0.4), 1e-4, None),
}


@pytest.mark.parametrize("name", SET_POINTS)
def test_reaches_its_set_point(name):
    make, point, tol, tol_beta = SET_POINTS[name]
    o = optimum(**point)
    D, R, log = train(make())
    assert (
        abs(D - o.distortion) < tol and (R.sort(descending=True).values - o.rate).abs().max() < tol
    )
    if tol_beta is not None:
        assert abs(log[-1, 0] - o.beta) <= tol_beta
    if name == "capacity":
        assert (
            set(log[300:, 0].tolist()) == {2.0, -2.0}
            and abs(R.sum() - 2) < 3e-3
            and abs(log[400:800, 0].mean() - o.beta) < 0.1
        )


def test_sigma_vae_finds_the_variance_of_probabilistic_pca():
    D, R, log = train(SigmaVAE(4), z_dim=2, sigma=1.0, shift=2 * math.log(2 * math.pi))
    var = S.sort().values[:2].mean()
    o = water_filling(S, beta=var, z_dim=2)
    assert (
        abs(log[-1, 0] - var) < 1e-5
        and abs(D - o.distortion) < 1e-5
        and (R.sort(descending=True).values - o.rate).abs().max() < 1e-5
    )


def test_one_latent_rests_at_its_floor():
    for minimum, R in ((1.4, 1.4), (0.3, math.log(5 / 0.64) / 2)):
        assert abs(train(FreeBits(minimum), z_dim=1)[1].sum() - R) < 5e-3


@pytest.mark.parametrize(
    "make, beta",
    [
        (lambda: LinearWarmup(1, 0.7, start=0.7), 0.7),
        (lambda: Cyclical(1, 1, ramp=1e-9, beta=0.0), 0.0),
        (lambda: Capacity(0.0, 5, 0.7), 0.7),
        (lambda: Capacity(90.0, 1, 0.7, start=90.0), -0.7),
        (lambda: FreeBits(0.0, beta=0.7), 0.7),
        (lambda: FreeBits(0.0, 1, beta=0.7), 0.7),
        (lambda: FreeBits(90.0), 0.0),
        (lambda: Geco(9.0, rate=0.0), 1.0),
        (lambda: Geco(9.0, clip=0.0), 1.0),
        (lambda: Geco(9.0, low=1.0, high=1.0), 1.0),
        (lambda: ControlVAE(2.0, low=0.7, high=0.7), 0.7),
        (lambda: ControlVAE(2.0, kp=0.0, ki=0.0, low=0.7), 0.7),
    ],
)
def test_limits_are_the_beta_vae(make, beta):
    class Fixed(Controller):
        def multiplier(self, rate, distortion):
            return rate.new_tensor(beta)

    assert torch.equal(train(make(), 40)[2], train(Fixed(0.0), 40)[2])


@pytest.mark.parametrize(
    "c, t, beta", [(LinearWarmup(10, 0.3), 10, 0.3), (Cyclical(10, beta=0.3), 10, 0.3)]
)
def test_schedules_end_exactly(c, t, beta):
    for _ in range(t):
        before = c.update(torch.ones(3)).item()
    assert all(c.update(torch.ones(3)) == torch.tensor(beta) for _ in range(3)) and (
        before != beta or isinstance(c, Cyclical)
    )


def test_geco_is_a_game():
    make = lambda: LinearVAE(S, 3, 0.8, 1)
    model, l = make(), torch.zeros((), dtype=F64, requires_grad=True)

    def priced(batch):
        D, R = model()
        return D + (-l).exp() * R.sum()

    game = Game(
        model=Player(model, priced, SGD(model.parameters(), lr=0.02)),
        multiplier=Player([l], lambda b: -l * (model()[0] - 5.0), SGD([l], lr=0.05)),
        rule=Alternating(order=["multiplier", "model"]),
    )
    other, c = make(), Geco(5.0, rate=0.05, smoothing=0.0, clip=1e9)
    optimizer = SGD(other.parameters(), lr=0.02)
    for _ in range(200):
        game.step(None)
        D, R = other()
        optimizer.zero_grad()
        (D + c.update(R, D) * R.sum()).backward()
        optimizer.step()
        assert (
            all((a - b).abs().max() < 1e-12 for a, b in zip(model.parameters(), other.parameters()))
            and abs(c.log_lambda - l) < 1e-12
        )
    assert c.log_lambda.abs() > 0.1


@pytest.mark.parametrize("low, high, R", [(0.0, 1.0, 0.0), (0.2, 1.0, 0.0), (0.0, 0.5, 40.0)])
def test_control_does_not_wind_up(low, high, R):
    "However long it was held at an end, it leaves the end within the steps that its gains need."
    steps = []
    for held in (10, 10_000):
        c = ControlVAE(5.0, kp=0.01, ki=0.01, low=low, high=high)
        for _ in range(held):
            c.update(torch.tensor(R))
        assert abs(c.value - (low if R < 5 else high)) < 1e-3
        for t in range(100):
            c.update(torch.tensor(10.0 - R))
            if abs(c.value - (low if R < 5 else high)) > 0.03:
                break
        steps.append(t)
    assert steps[0] == steps[1] < 5


# State
@everyone
def test_resumes_bit_for_bit_through_a_file(name, tmp_path):
    first, second, third = (EVERYONE[name]() for _ in range(3))
    data = measures(20)
    for batch in data[:4]:
        first.update(*batch)
    state = first.state_dict()
    checkpoint.save(tmp_path / "x.pt", state)
    path = [first.update(*batch) for batch in data[4:]]
    second.load_state_dict(checkpoint.load(tmp_path / "x.pt"))
    third.load_state_dict(state)
    for other in (second, third):
        assert all(
            torch.equal(beta, other.update(*batch)) for beta, batch in zip(path, data[4:])
        ) and torch.equal(other.value, first.value)
    assert all(
        isinstance(x, torch.Tensor) and (x.dim() == 0 or name.startswith("free"))
        for k, x in state.items()
        if k != "name"
    )


def test_another_controllers_state_is_refused_and_nothing_loaded():
    for a in EVERYONE.values():
        for b in EVERYONE.values():
            if type(a()) is type(b()):
                a().check_state(b().state_dict())
                continue
            c = a()
            before = c.state_dict()
            with pytest.raises(
                ValueError,
                match=f"the controller {type(b()).__name__} .* this is {type(c).__name__}",
            ):
                c.load_state_dict(b().state_dict())
            assert c.state_dict() == before
    for state in ({}, {"name": "Geco"}, Geco(1.0).state_dict() | {"more": 1}):
        with pytest.raises(ValueError, match="go on with the same controller"):
            Geco(1.0).load_state_dict(state)


def test_one_of_your_own_is_one_method():
    class Half(Controller):
        "The rate's half, averaged with the last."

        def __init__(self):
            super().__init__(0.0, last=0.0)

        def multiplier(self, rate, distortion):
            last, self.last = self.last, rate.sum() / 2
            return (last + self.last) / 2

    c = Half()
    c.update(torch.tensor(4.0))
    assert c.update(torch.tensor(2.0)) == 1.5
    assert sorted(c.state_dict()) == ["last", "name", "t", "value"]
    with pytest.raises(NotImplementedError, match="Controller is a controller without"):
        Controller(1.0).update(torch.ones(2))


# Devices, dtypes, compilers
class Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@everyone
def test_few_small_operations_and_no_look_at_a_value(name):
    c = EVERYONE[name]()
    c.update(*measures(1)[0])
    with Ops() as ops:
        c.update(*measures(1)[0])
    assert "_local_scalar_dense" not in ops.seen and not any(
        op.startswith("equal") for op in ops.seen
    )
    assert len(ops.seen) <= 24, ops.seen


@everyone
def test_runs_on_meta(name):
    c = EVERYONE[name]()
    for batch in measures(3, device="meta"):
        assert c.update(*batch).is_meta
    assert all(x.is_meta for k, x in c.state_dict().items() if k != "name")


@everyone
def test_precision(name):
    exact, single, half = (EVERYONE[name]() for _ in range(3))
    for R, D in measures(30):
        R, D = (x.bfloat16() for x in (R, D))  # the same numbers to all three
        beta = exact.update(R.double(), D.double())
        assert beta.dtype == F64
        for c, dtype in ((single, torch.float32), (half, torch.bfloat16)):
            assert (
                c.update(R.to(dtype), D.to(dtype)) - beta
            ).abs().max() < 1e-5 and c.value.dtype == torch.float32


def vae_step(c, dtype, device="cpu", autocast=False, seed=0, steps=6):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VAE(16, 12, 8, 4)
    model = model.to(device, dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    g = rng(seed)
    betas = []
    for _ in range(steps):
        x = (torch.rand(32, 16, generator=g) > 0.5).to(device, dtype)
        eps = torch.randn(32, 4, generator=g).to(device, dtype)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            mean, log_var = model.encoder(x)
            D, R = (
                -model.log_likelihood(x, model.reparameterize(mean, log_var, eps)).mean(),
                gaussian_kl(mean, log_var).mean(0),
            )
            loss = D + (c.update(R, D) * R).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        betas.append(c.value)
    assert all(p.isfinite().all() for p in model.parameters())
    return torch.stack([b.expand(4) for b in betas])


@everyone
def test_trains_under_autocast(name):
    if name.startswith("free"):  # a threshold: rounding may tip it
        vae_step(EVERYONE[name](), torch.float32, autocast=True)
        return
    low, exact = (
        vae_step(EVERYONE[name](), torch.float32, autocast=True),
        vae_step(EVERYONE[name](), F64),
    )
    assert low.dtype == torch.float32 and (low - exact).abs().max() < 0.05


@pytest.mark.cuda
@everyone
def test_cuda_without_a_sync(name):
    c, host = EVERYONE[name](), EVERYONE[name]()
    data = measures(20)
    there = [(R.cuda(), D.cuda()) for R, D in data]
    c.update(*there[0])
    host.update(*data[0])  # brings the memory over
    torch.cuda.set_sync_debug_mode("error")
    try:
        betas = [c.update(*batch) for batch in there[1:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for beta, batch in zip(betas, data[1:]):
        assert beta.is_cuda and (beta.cpu() - host.update(*batch)).abs().max() < 1e-5
    assert all(x.is_cuda for k, x in c.state_dict().items() if k != "name")
    vae_step(EVERYONE[name](), torch.float32, "cuda", autocast=True)


@everyone
def test_compiled_step_is_eager_and_compiles_once(name):
    torch._dynamo.reset()
    models = [nn.Linear(3, 4) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    cs = [EVERYONE[name]() for _ in range(2)]
    counter = CompileCounter()

    def loss(model, c, x):
        R = model(x).square().mean(0)
        D = 8 + (model(x) - x.sum(1, keepdim=True)).square().mean()
        return D + (c.update(R, D) * R).sum()

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    g = rng(0)
    counts = []
    for _ in range(14):
        x = torch.randn(8, 3, generator=g)
        ends = []
        for f, model, c in zip((loss, compiled), models, cs):
            value = f(model, c, x)
            value.backward()
            ends.append(value.detach())
            with torch.no_grad():
                [p.sub_(0.05 * p.grad) for p in model.parameters()]
                model.zero_grad()
        counts.append(counter.frame_count)
        assert (
            torch.allclose(*ends, rtol=1e-5)
            and torch.allclose(cs[0].value, cs[1].value, rtol=1e-5)
            and cs[0].t == cs[1].t
        )
    assert (
        counts[1] <= 2 and counts[-1] == counts[1]
    )  # a value of another shape or a memory brought to the rate's dtype: once more


# Faults
@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Constant(math.inf), "Constant: beta must be a finite number, at least 0; got inf"),
        (lambda: Constant("1"), "finite number"),
        (lambda: LinearWarmup(2.5), "steps must be an integer, at least 1; got 2.5"),
        (lambda: LinearWarmup(5, start=-1.0), "start must be a finite number"),
        (lambda: Cyclical(5, cycles=0), "cycles must be an integer"),
        (lambda: Cyclical(3), "3 steps can't hold 4 cycles"),
        (lambda: Cyclical(9, ramp=1.5), "ramp must lie in"),
        (lambda: Capacity(-1.0, 5, 1.0), "target must be a finite number, at least 0"),
        (lambda: Capacity(1.0, 0, 1.0), "steps must be"),
        (lambda: Capacity(1.0, 5, -1.0), "weight"),
        (lambda: FreeBits(-0.1), "minimum"),
        (lambda: FreeBits(0.1, groups=0), "groups must be an integer"),
        (lambda: FreeBits(0.1, 3).update(torch.ones(4)), "groups divide"),
        (lambda: FreeBits(0.1).update(torch.ones(())), "groups=1 where there is only the sum"),
        (lambda: Geco(math.nan), "target"),
        (lambda: Geco(1.0, rate=-1.0), "rate"),
        (lambda: Geco(1.0, clip=-1.0), "clip"),
        (lambda: Geco(1.0, smoothing=-0.1), "smoothing must lie in"),
        (lambda: Geco(1.0, low=0.0), "0 < low <= 1"),
        (lambda: Geco(1.0, low=2.0), "beta starts at 1"),
        (lambda: Geco(1.0, high=math.inf), "high inf"),
        (lambda: Geco(1.0).update(torch.ones(3)), r"call update\(rate, distortion\)"),
        (lambda: SigmaVAE(3).update(torch.ones(3)), "set from the distortion"),
        (lambda: ControlVAE(-1.0), "target"),
        (lambda: ControlVAE(1.0, kp=-1.0), "kp"),
        (lambda: ControlVAE(1.0, ki=math.nan), "ki"),
        (lambda: ControlVAE(1.0, low=-1.0), "0 <= low"),
        (lambda: ControlVAE(1.0, low=2.0, high=1.0), "low 2.0, high 1.0"),
        (lambda: SigmaVAE(0), "dim must be"),
        (lambda: water_filling(S, beta=1.0, rate=1.0), "one of beta"),
        (lambda: water_filling(S), "one of beta"),
        (lambda: water_filling(S, beta=0.0), "out of reach"),
        (lambda: water_filling(S, rate=-0.1), "out of reach"),
        (lambda: water_filling(S, distortion=1.0), "out of reach"),
        (lambda: water_filling(S, distortion=90.0), "out of reach"),
    ],
)
def test_says_what_is_wrong(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_ramp_ends():
    assert [linear_ramp(torch.tensor(float(t)), 4, 1.0, 0.3).item() for t in (0, 4, 9)] == [
        1.0,
        *2 * [torch.tensor(0.3).item()],
    ]


# In another library, unchanged: pythae's BetaVAE computes its loss inside `forward`, and returns its two terms. Linear maps on Gaussian data, so that the curve is known.
@pytest.fixture(scope="module")
def pythae():
    pytest.importorskip("pythae")
    from pythae.models import BetaVAE, BetaVAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.mean, self.log_var = nn.Linear(4, 2), nn.Parameter(torch.zeros(2))

        def forward(self, x):
            mean = self.mean(x)
            return ModelOutput(embedding=mean, log_covariance=self.log_var.expand_as(mean))

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.map = nn.Linear(2, 4)

        def forward(self, z):
            return ModelOutput(reconstruction=self.map(z))

    def make():
        torch.manual_seed(0)
        return BetaVAE(
            BetaVAEConfig(input_dim=(4,), latent_dim=2, reconstruction_loss="mse"),
            Encoder(),
            Decoder(),
        )

    x = torch.randn(2048, 4, generator=rng(0))
    x = (
        torch.linalg.svd(x - x.mean(0), full_matrices=False).U * (2048 * S.float()).sqrt()
    )  # variances S to rounding
    with torch.random.fork_rng(devices=[]):
        yield make, x


CONSTANT = 2 * math.log(2 * math.pi)  # pythae's distortion goes without it
DROP_IN = {
    "geco": (lambda: Geco(1.9, rate=0.05, smoothing=0.9), dict(distortion=1.9 + CONSTANT)),
    "control": (lambda: ControlVAE(1.2, kp=0.05, ki=0.01, high=5.0), dict(rate=1.2)),
    "sigma": (lambda: SigmaVAE(4), dict(beta=0.4)),
}  # .4: the mean of the two least variances


def ends_on_the_curve(model, x, controller, point, betas):
    with torch.no_grad():
        outs = [model.eval()({"data": x}) for _ in range(20)]
    o = water_filling(S, z_dim=2, **point)
    D, R = (torch.stack([out[k] for out in outs]).mean().item() for k in ("recon_loss", "reg_loss"))
    beta = torch.stack(betas[-100:]).mean().item()
    assert (
        abs(R - o.rate.sum()) < 0.05
        and abs(D + CONSTANT - o.distortion) < 0.03
        and abs(beta / o.beta - 1) < 0.05
    ), (D + CONSTANT, R, beta, o)


@pytest.mark.parametrize(
    "name, delay", [("geco", 0), ("geco", 1), ("control", 0), ("control", 1), ("sigma", 0)]
)
def test_pythae_model_in_ones_own_loop(pythae, name, delay):
    "Without delay the loss is put together from the returned terms; or `model.beta` is set for the next batch."
    make, x = pythae
    controller, point = DROP_IN[name][0](), DROP_IN[name][1]
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    betas = []
    model.beta = 1.0
    for t in range(600):
        optimizer.param_groups[0]["lr"] = 0.02 * min(1, 2 * (1 - t / 600))
        out = model({"data": x[torch.randint(len(x), (256,))]})
        beta = controller.update(out.reg_loss, out.recon_loss)
        betas.append(beta)
        loss = out.loss if delay else out.recon_loss + beta * out.reg_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if delay:
            model.beta = beta
    ends_on_the_curve(model, x, controller, point, betas)


@pytest.mark.parametrize("name, delay", [("geco", 1), ("control", 0), ("control", 1)])
def test_pythae_trainer_with_a_callback(pythae, name, delay, tmp_path):
    "Its callbacks don't see what the model returned, a forward hook does: it reprices this batch, or measures it, and the callback sets `model.beta` for the next."
    from pythae.data.datasets import BaseDataset
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from pythae.trainers.training_callbacks import TrainingCallback

    make, x = pythae
    controller, point = DROP_IN[name][0](), DROP_IN[name][1]
    betas = []

    class Control(TrainingCallback):
        def on_train_begin(
            self, training_config, **kwargs
        ):  # not before: the trainer tries the model once when it is made
            self.hook = kwargs["model"].register_forward_hook(self.measure)

        def measure(self, model, args, out):
            if not model.training:
                return
            betas.append(controller.update(out.reg_loss, out.recon_loss))
            if not delay:
                out.loss = out.recon_loss + betas[-1] * out.reg_loss

        def on_train_step_end(self, training_config, **kwargs):
            if delay:
                kwargs["model"].beta = controller.value

        def on_train_end(self, training_config, **kwargs):
            self.hook.remove()

    model = make()
    config = BaseTrainerConfig(
        output_dir=str(tmp_path),
        num_epochs=75,
        learning_rate=0.02,
        per_device_train_batch_size=256,
        no_cuda=True,
        keep_best_on_train=True,
        scheduler_cls="MultiStepLR",
        scheduler_params=dict(milestones=[40, 55, 65], gamma=0.3),
    )
    rows = BaseDataset(x, torch.zeros(len(x)))
    BaseTrainer(model, train_dataset=rows, training_config=config, callbacks=[Control()]).train()
    assert len(betas) == 75 * 8 == controller.t and not model._forward_hooks
    ends_on_the_curve(model, x, controller, point, betas)
