"""Controllers of β against independent references.

The references are their equations in plain numbers, the closed-form optimum of a linear VAE,
autograd, torch.compile and another library's trainer.
"""

import math
import warnings

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
)
from optgen.games import Game, Player
from optgen.models.vae import VAE, GaussianVAE, gaussian_kl
from optgen.multipliers import AugmentedLagrangian, NuPI
from optgen.named_controllers import CONTROLLERS, build_controller
from optgen.optim import SGD
from optgen.rules import Alternating
from optgen.schemes.assisted import Assisted
from optgen.schemes.couplings import Reconstruction
from optgen.schemes.elbo import BetaVAE
from optgen.testing import check_gradient, generator, water_filling
from optgen.training import checkpoint

F64 = torch.float64


EVERYONE = {
    "constant": lambda: Constant(0.5),
    "warmup": lambda: LinearWarmup(7, 0.5, start=2.0),
    "cyclical": lambda: Cyclical(11, cycles=3, ramp=0.4, beta=0.5),
    "capacity": lambda: Capacity(3.0, 9, 2.0, start=1.0),
    "free-bits": lambda: FreeBits(0.5, beta=0.7),
    "free-bits-groups": lambda: FreeBits(1.0, groups=2),
    "geco": lambda: Geco(8.0, rate=0.03, smoothing=0.8, clip=0.04, low=0.7, high=1.2),
    "control": lambda: ControlVAE(2.0, kp=0.3, ki=0.05, low=0.1, high=0.4),
    "nu-pi": lambda: NuPI(2.0, ki=0.05, kp=0.3, smoothing=0.4, low=0.1, high=0.4),
    "augmented": lambda: AugmentedLagrangian(2.0, step=0.05, penalty=0.3, low=0.1, high=0.4),
    "sigma": lambda: SigmaVAE(7),
}
everyone = pytest.mark.parametrize("name", EVERYONE)


def measures(n, seed=0, dtype=torch.float32, device="cpu"):
    """Return `n` random pairs of a rate of four latents and a distortion."""
    g = generator(seed)
    return [
        (
            torch.rand(4, generator=g, dtype=F64).to(device, dtype),
            (5 + 6 * torch.rand((), generator=g, dtype=F64)).to(device, dtype),
        )
        for _ in range(n)
    ]


# Every equation once more, in plain Python: a function of the number of updates, the rate, the
# distortion and what is remembered.
def constant(t, R, D, m):
    """Return β of a constant."""
    return 0.5


def ramp(t, T, start, end):
    """Return Eq. (ramp)."""
    return end if t >= T else start + (end - start) * t / T


def warmup(t, R, D, m):
    """Return β of Eq. (ramp)."""
    return ramp(t, 7, 2.0, 0.5)


def cyclical(t, R, D, m):
    """Return β of Eq. (cyclical)."""
    return 0.5 if t >= 11 else 0.5 * min(1, (3 * t % 11) / 11 / 0.4)


def capacity(t, R, D, m):
    """Return β of Eq. (capacity)."""
    return math.copysign(2.0, sum(R) - ramp(t, 9, 1.0, 3.0))


def free_bits(t, R, D, m):
    """Return β of each latent, Eq. (free-bits)."""
    return [0.7 if r > 0.5 else 0.0 for r in R]


def free_groups(t, R, D, m):
    """Return β of two groups of latents, Eq. (free-bits)."""
    return [float(sum(pair) > 1.0) for pair in (R[:2], R[2:]) for _ in pair]


def geco(t, R, D, m):
    """Return β of Eq. (geco)."""
    m["C"] = D - 8.0 if t == 0 else 0.8 * m["C"] + 0.2 * (D - 8.0)
    m["lambda"] = m.get("lambda", 1.0) * math.exp(max(-0.04, min(0.04, 0.03 * m["C"])))
    m["lambda"] = max(1 / 1.2, min(1 / 0.7, m["lambda"]))
    return 1 / m["lambda"]


def control(t, R, D, m):
    """Return β of Eq. (pi), the integral reduced by the clipped part."""
    e = 2.0 - sum(R)
    P = 0.3 / (1 + math.exp(e))
    integral = m.get("integral", 0.0) - 0.05 * e
    beta = max(0.1, min(0.4, 0.1 + P + integral))
    m["integral"] = beta - 0.1 - P
    return beta


def box(x):
    """Return a number within [0.1, 0.4]."""
    return max(0.1, min(0.4, x))


def nu_pi(t, R, D, m):
    """Return β of Eq. (nu-pi)."""
    g, before = sum(R) - 2.0, m.get("mean", 0.0)
    m["mean"] = 0.4 * before + 0.6 * g
    m["beta"] = box(m.get("beta", 0.1) + 0.05 * g + 0.3 * (m["mean"] - before))
    return m["beta"]


def augmented(t, R, D, m):
    """Return β of Eq. (augmented)."""
    g = sum(R) - 2.0
    m["lambda"] = box(m.get("lambda", 0.1) + 0.05 * g)
    return box(m["lambda"] + 0.3 * g)


def sigma(t, R, D, m):
    """Return β of Eq. (sigma-nll)."""
    return 2 * D / 7


EQUATIONS = {
    "constant": constant,
    "warmup": warmup,
    "cyclical": cyclical,
    "capacity": capacity,
    "free-bits": free_bits,
    "free-bits-groups": free_groups,
    "geco": geco,
    "control": control,
    "nu-pi": nu_pi,
    "augmented": augmented,
    "sigma": sigma,
}


@pytest.mark.parametrize("seed", range(3))
@everyone
def test_follows_its_equation(name, seed):
    controller, memory, seen = EVERYONE[name](), {}, set()
    for t, (R, D) in enumerate(measures(60, seed, F64)):
        beta = controller.update(R, D)
        expected = torch.tensor(EQUATIONS[name](t, R.tolist(), D.item(), memory), dtype=F64)
        assert beta.shape == expected.shape, t
        assert (beta - expected).abs().max() < 1e-12, t
        assert beta is controller.value and controller.t == t + 1
        seen.add(beta.mean().item())
    if name != "constant":
        assert len(seen) > 1
    if name in ("geco", "control"):
        low = {"geco": 0.7, "control": 0.1}[name]
        assert low - 1e-12 < min(seen) and len(seen) > 20


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
    kl = (2 * torch.rand(6, generator=generator(seed), dtype=F64)).requires_grad_()

    def gradient(loss):
        """Return the gradient of a loss by the KL of each latent."""
        return torch.autograd.grad(loss, kl)[0]

    def D():
        """Return a distortion that depends on `kl`."""
        return (kl - 3).square().sum() / 2

    def R():
        """Return a rate that depends on `kl`."""
        return kl.square().sum() / 2

    def nll(variance):
        """Return the Gaussian negative log-likelihood at a variance."""
        return D() / variance + 3 * math.log(2 * math.pi * variance)

    for groups in (None, 1, 2, 3, 6):
        for beta in (1.0, 0.3):
            loss = beta * kl.reshape(groups or 6, -1).sum(1).clamp(min=0.9).sum()
            assert torch.equal(gradient(loss), FreeBits(0.9, groups, beta).update(kl))
    for C in (1.0, 11.0):
        c = Capacity(C, 1, 2.5)
        c.update(kl)
        assert torch.equal(gradient(2.5 * (kl.sum() - C).abs()), c.update(kl).expand(6))
    check_gradient(lambda: calibrated_nll(D(), 6), kl)
    beta = SigmaVAE(6).update(R(), D())
    assert not beta.requires_grad
    calibrated = beta * gradient(calibrated_nll(D(), 6) + R())
    assert (calibrated - gradient(D() + beta * R())).abs().max() < 1e-13
    best = calibrated_nll(D(), 6)
    assert abs(nll(beta.item()) - best) < 1e-12
    assert min(nll(beta.item() * factor) for factor in (0.99, 1.01)) > best


# The closed form, by searching.
@pytest.mark.parametrize("seed", range(4))
def test_water_filling_is_the_least_loss(seed):
    g = generator(seed)
    s = 4 * torch.rand(5, generator=g, dtype=F64) + 0.05
    sd = 0.5 + torch.rand((), generator=g, dtype=F64).item()
    a = s.sort(descending=True).values / sd**2

    def distortion_of(R):
        """Return the distortion where each latent takes one eigenvector and has rate R_j."""
        explained = (a[: len(R)] * (-2 * R).exp()).sum()
        return (explained + a[len(R) :].sum() + 5 * math.log(2 * math.pi * sd**2)) / 2

    for z_dim in (1, 3, 5):
        for beta in (0.1, 0.8, 2.5):
            o = water_filling(s, beta=beta, sigma=sd, z_dim=z_dim)
            assert abs(distortion_of(o.rate) - o.distortion) < 1e-12
            best = o.distortion + beta * o.rate.sum()
            for _ in range(50):
                R = (o.rate + 0.3 * torch.randn(z_dim, generator=g, dtype=F64)).clamp(min=0)
                assert distortion_of(R) + beta * R.sum() >= best - 1e-12
        for C in (0.05, 1.0, 4.0):
            o = water_filling(s, rate=C, sigma=sd, z_dim=z_dim)
            again = water_filling(s, distortion=o.distortion, sigma=sd, z_dim=z_dim)
            assert (
                abs(o.rate.sum() - C) < 1e-12 and abs(distortion_of(o.rate) - o.distortion) < 1e-12
            )
            assert all((x - y).abs().max() < 1e-11 for x, y in zip(o, again))
    unused = water_filling(s, rate=0.0)
    assert unused.rate.sum() < 1e-12 and abs(unused.beta - s.max()) < 1e-12


# Set-points: a linear VAE trained to its end, in other units and sizes than the notebook's.
class LinearVAE(nn.Module):
    """Linear VAE that returns D and (R_j) of Eq. (linear-vae), exact over the data."""

    def __init__(self, s, z_dim, sigma, seed, dtype=F64, device="cpu"):
        super().__init__()
        g, n = generator(seed), len(s)
        Q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=F64)).Q
        W = 0.3 * torch.randn(n, z_dim, generator=g, dtype=F64)
        V = 0.3 * torch.randn(z_dim, n, generator=g, dtype=F64)
        self.S = (Q * s @ Q.T).to(device, dtype)
        self.eye = torch.eye(n, dtype=dtype, device=device)
        self.sigma = sigma
        self.W, self.V = nn.Parameter(W.to(device, dtype)), nn.Parameter(V.to(device, dtype))
        self.log_t = nn.Parameter(torch.zeros(z_dim).to(device, dtype))

    def forward(self):
        """Return the distortion, 0-dim, and the rate of each latent."""
        W, V, t, variance = self.W, self.V, self.log_t.exp(), self.sigma**2
        E = self.eye - W @ V
        error = (E @ self.S * E).sum() + (t * W.square().sum(0)).sum()
        D = error / (2 * variance) + len(W) / 2 * math.log(2 * math.pi * variance)
        return D, ((V @ self.S * V).sum(1) + t - 1 - self.log_t) / 2


S = torch.tensor([0.6, 5.0, 1.5, 0.2], dtype=F64)


def train(controller, steps=1000, z_dim=3, sigma=0.8, seed=5, shift=0.0):
    """Return D and (R_j) at the end of a run, and its history of (beta, R, D)."""
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


def optimum(**coordinate):
    """Return the closed-form optimum of the model above."""
    return water_filling(S, sigma=0.8, z_dim=3, **coordinate)


# The controller, its end, the tolerance of D and of each rate, and the tolerance of beta.
SET_POINTS = {
    "constant": (lambda: Constant(0.4), dict(beta=0.4), 1e-4, 0),
    "warmup": (lambda: LinearWarmup(200, 0.4), dict(beta=0.4), 1e-4, 0),
    "warmup-down": (lambda: LinearWarmup(200, 0.4, start=3.0), dict(beta=0.4), 1e-4, 0),
    "cyclical": (lambda: Cyclical(300, beta=0.4), dict(beta=0.4), 1e-4, 0),
    "geco": (lambda: Geco(5.5, rate=0.05, smoothing=0.9), dict(distortion=5.5), 1e-5, 1e-5),
    "geco-low": (lambda: Geco(4.7, rate=0.05, smoothing=0.5), dict(distortion=4.7), 1e-5, 1e-5),
    "control": (lambda: ControlVAE(2.0, kp=0.1, ki=0.03, high=8.0), dict(rate=2.0), 1e-4, 1e-4),
    # The set-point is out of reach within the box: a β-VAE at an end of the box.
    "control-bound": (
        lambda: ControlVAE(2.0, kp=0.1, ki=0.03, high=0.4),
        dict(beta=0.4),
        1e-4,
        1e-6,
    ),
    "nu-pi": (lambda: NuPI(2.0, ki=0.03, kp=0.1, smoothing=0.5), dict(rate=2.0), 1e-4, 1e-4),
    "augmented": (lambda: AugmentedLagrangian(2.0, 0.03, 0.1), dict(rate=2.0), 1e-4, 1e-4),
    "augmented-bound": (
        lambda: AugmentedLagrangian(2.0, 0.03, 0.1, high=0.4),
        dict(beta=0.4),
        1e-4,
        1e-6,
    ),
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
    assert abs(D - o.distortion) < tol
    assert (R.sort(descending=True).values - o.rate).abs().max() < tol
    if tol_beta is not None:
        assert abs(log[-1, 0] - o.beta) <= tol_beta
    if name == "capacity":
        assert set(log[300:, 0].tolist()) == {2.0, -2.0}
        assert abs(R.sum() - 2) < 3e-3
        assert abs(log[400:800, 0].mean() - o.beta) < 0.1


def test_sigma_vae_finds_the_variance_of_probabilistic_pca():
    D, R, log = train(SigmaVAE(4), z_dim=2, sigma=1.0, shift=2 * math.log(2 * math.pi))
    var = S.sort().values[:2].mean()
    o = water_filling(S, beta=var, z_dim=2)
    assert abs(log[-1, 0] - var) < 1e-5
    assert abs(D - o.distortion) < 1e-5
    assert (R.sort(descending=True).values - o.rate).abs().max() < 1e-5


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
        """The number that the limit should be."""

        def multiplier(self, rate, distortion):
            return rate.new_tensor(beta)

    assert torch.equal(train(make(), 40)[2], train(Fixed(0.0), 40)[2])


@pytest.mark.parametrize(
    "c, t, beta", [(LinearWarmup(10, 0.3), 10, 0.3), (Cyclical(10, beta=0.3), 10, 0.3)]
)
def test_schedules_end_exactly(c, t, beta):
    for _ in range(t):
        before = c.update(torch.ones(3)).item()
    assert all(c.update(torch.ones(3)) == torch.tensor(beta) for _ in range(3))
    assert before != beta or isinstance(c, Cyclical)


def test_geco_is_a_game():
    model, other = LinearVAE(S, 3, 0.8, 1), LinearVAE(S, 3, 0.8, 1)
    log_lambda = torch.zeros((), dtype=F64, requires_grad=True)

    def model_loss(batch):
        """Return the distortion plus the weighted rate."""
        D, R = model()
        return D + (-log_lambda).exp() * R.sum()

    def multiplier_loss(batch):
        """Return the negative constraint, times the multiplier's logarithm."""
        return -log_lambda * (model()[0] - 5.0)

    game = Game(
        model=Player(model, model_loss, SGD(model.parameters(), lr=0.02)),
        multiplier=Player([log_lambda], multiplier_loss, SGD([log_lambda], lr=0.05)),
        rule=Alternating(order=["multiplier", "model"]),
    )
    c = Geco(5.0, rate=0.05, smoothing=0.0, clip=1e9)
    optimizer = SGD(other.parameters(), lr=0.02)
    for _ in range(200):
        game.step(None)
        D, R = other()
        optimizer.zero_grad()
        (D + c.update(R, D) * R.sum()).backward()
        optimizer.step()
        for a, b in zip(model.parameters(), other.parameters()):
            assert (a - b).abs().max() < 1e-12
        assert abs(c.log_lambda - log_lambda) < 1e-12
    assert c.log_lambda.abs() > 0.1


@pytest.mark.parametrize("low, high, R", [(0.0, 1.0, 0.0), (0.2, 1.0, 0.0), (0.0, 0.5, 40.0)])
def test_control_does_not_wind_up(low, high, R):
    # However long it was at an end, it leaves the end within the steps that its gains need.
    steps = []
    end = low if R < 5 else high
    for held in (10, 10_000):
        c = ControlVAE(5.0, kp=0.01, ki=0.01, low=low, high=high)
        for _ in range(held):
            c.update(torch.tensor(R))
        assert abs(c.value - end) < 1e-3
        for t in range(100):
            c.update(torch.tensor(10.0 - R))
            if abs(c.value - end) > 0.03:
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
        for beta, batch in zip(path, data[4:]):
            assert torch.equal(beta, other.update(*batch))
        assert torch.equal(other.value, first.value)
    for key, x in state.items():
        if key != "name":
            assert isinstance(x, torch.Tensor) and (x.dim() == 0 or name.startswith("free"))


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
        """Half of the rate, averaged with the last one."""

        def __init__(self):
            super().__init__(0.0, last=0.0)

        def multiplier(self, rate, distortion):
            last, self.last = self.last, rate.sum() / 2
            return (last + self.last) / 2

    c = Half()
    c.update(torch.tensor(4.0))
    assert c.update(torch.tensor(2.0)) == 1.5
    assert sorted(c.state_dict()) == ["last", "name", "skipped", "t", "value"]
    with pytest.raises(NotImplementedError, match="Controller is a controller without"):
        Controller(1.0).update(torch.ones(2))


# Measurements that are not finite
BAD = (math.inf, -math.inf, math.nan)
# Which measurement each controller uses.
USES = {
    **dict.fromkeys(("constant", "warmup", "cyclical"), ()),
    **dict.fromkeys(
        ("capacity", "free-bits", "free-bits-groups", "control", "nu-pi", "augmented"), ("rate",)
    ),
    **dict.fromkeys(("geco", "sigma"), ("distortion",)),
}


@everyone
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("bad_at", [(0,), (5,), (0, 1, 2), (3, 4, 9)])
def test_a_measurement_that_is_not_finite_is_skipped_and_counted(name, bad, bad_at):
    data = measures(14)
    for which in ("rate", "distortion"):
        used = which in USES[name]
        c, clean = EVERYONE[name](), EVERYONE[name]()
        last = c.value
        for t, (R, D) in enumerate(data):
            if t not in bad_at:
                assert torch.equal(c.update(R, D), clean.update(R, D))
            elif which == "rate":
                wrong = torch.where(torch.arange(4) == t % 4, bad, R)
                beta = c.update(wrong, D)
            else:
                beta = c.update(R, torch.full_like(D, bad))
            if t in bad_at:
                # What remembers no measurement counts on; the rest stays where it was.
                if used:
                    assert (beta == last.to(beta)).all()
                    clean.t = clean.t + 1
                    clean.skipped = clean.skipped + 1
                else:
                    assert torch.equal(beta, clean.update(R, D))
            last = c.value
        assert c.skipped == (len(bad_at) if used else 0) and c.t == len(data)
        assert c.value.isfinite().all()


def test_it_recovers_to_where_a_clean_run_goes():
    # A model at its optimum; every tenth measurement is bad, one at the beginning too.
    s = torch.tensor([8.0, 4.0, 2.0, 0.5], dtype=F64)
    aims = {
        "geco": (lambda: Geco(5.5, rate=0.2, smoothing=0.5), {"distortion": 5.5}),
        "control": (lambda: ControlVAE(2.0, kp=0.1, ki=0.05, high=9.0), {"rate": 2.0}),
    }
    for make, aim in aims.values():
        optimum = water_filling(s, z_dim=3, **aim)
        c, beta = make(), torch.ones((), dtype=F64)
        for t in range(600):
            at = water_filling(s, z_dim=3, beta=beta)
            bad = BAD[t % 3] if t % 10 == 0 else 0.0
            beta = c.update(at.rate + bad, at.distortion + bad)
            beta = beta.clamp(min=1e-3)
        assert abs(beta - optimum.beta) < 1e-6 and c.skipped == 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sum_that_overflows_is_not_finite(dtype):
    c = ControlVAE(2.0, ki=0.01, high=3.0)
    c.update(torch.tensor([1.0, 2.0], dtype=dtype))
    before = c.value
    largest = torch.finfo(dtype).max
    assert torch.equal(c.update(torch.tensor([largest, largest], dtype=dtype)), before)
    assert c.skipped == 1


def test_the_variance_survives_a_perfect_reconstruction():
    model, c = GaussianVAE(6, 4, 3, 2), SigmaVAE(6)
    x, z = torch.randn(2, 6, generator=generator()), torch.zeros(2, 2)
    for squared_error in (0.0, -1e-9, math.nan, math.inf, 3e38):
        c.update(torch.ones(2), torch.tensor(squared_error))
        c.attach(model)
        nll = -model.log_likelihood(x, z).mean()
        assert model.variance > 0 and nll.isfinite()
        # The next good batch is measured right, whatever the variance was.
        truth = (x - model.decoder(z)).square().sum(1).mean() / 2
        found = c.distortion(model, nll)
        if model.variance < 1e6:  # beyond, the error is rounded away beside the logarithm
            assert abs(found - truth) < 1e-3 * truth
    c.update(torch.ones(2), torch.tensor(1.5))
    assert c.value == 0.5


@everyone
def test_a_state_of_release_0_4_loads(name, tmp_path):
    # It has no count of what was skipped.
    data, c, other = measures(9), EVERYONE[name](), EVERYONE[name]()
    for batch in data[:4]:
        c.update(*batch)
    state = {key: x for key, x in c.state_dict().items() if key != "skipped"}
    checkpoint.save(tmp_path / "old.pt", state)
    other.load_state_dict(checkpoint.load(tmp_path / "old.pt"))
    for batch in data[4:]:
        assert torch.equal(other.update(*batch), c.update(*batch))
    assert other.skipped == 0 and other.t == 9
    other.update(*(torch.full_like(x, math.nan) for x in data[0]))
    again = EVERYONE[name]()
    again.load_state_dict(other.state_dict())
    assert again.skipped == other.skipped == bool(USES[name])


# The stable range of GECO
def largest_root(rate, alpha, kappa, h):
    """Return the largest modulus of a root, from the matrix of one update of (D, mean, log λ)."""
    # The mean of D, then log λ, then D's own step towards -h log λ.
    mean = torch.tensor([1 - alpha, alpha, 0.0], dtype=F64)
    ell = rate * mean + torch.tensor([0.0, 0.0, 1.0], dtype=F64)
    D = torch.tensor([1 - kappa, 0.0, 0.0], dtype=F64) - kappa * h * ell
    return torch.linalg.eigvals(torch.stack([D, mean, ell])).abs().max().item()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("kappa", [0.001, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("h", [0.5, 10.0])
def test_the_stable_range_of_geco(alpha, kappa, h):
    slow = alpha * (1 - kappa)
    limits = [2 * (1 + alpha) * (2 - kappa) / ((1 - alpha) * kappa)]
    limits += [(1 - slow) / slow] if slow else []
    limit = min(limits) / h
    assert (
        largest_root(0.99 * limit, alpha, kappa, h)
        < 1
        < largest_root(1.01 * limit, alpha, kappa, h)
    )


def test_the_matrix_is_gecos_own_update():
    rate, alpha, kappa, h = 0.02, 0.9, 0.1, 4.0
    c = Geco(0.0, rate, alpha, clip=1e6, low=1e-9, high=1e9)
    D, mean, ell = torch.tensor(0.1, dtype=F64), 0.0, 0.0
    c.t = torch.tensor(1)
    theirs = D
    for _ in range(50):
        beta = c.update(torch.ones(1, dtype=F64), theirs)
        theirs = (1 - kappa) * theirs + kappa * h * beta.log()
        mean = (1 - alpha) * D + alpha * mean
        ell = ell + rate * mean
        D = (1 - kappa) * D - kappa * h * ell
        assert abs(theirs - D) < 1e-12 and abs(c.log_lambda - ell) < 1e-12


@pytest.mark.parametrize(
    "rate, smoothing, warns",
    [
        (1e-3, 0.99, False),  # the default
        (5e-3, 0.99, False),
        (1e-2, 0.99, True),
        (5e-2, 0.9, False),
        (6e-2, 0.9, True),
        (1e-3, 0.999, True),
        (10.0, 0.0, False),
        (0.0, 0.9999, False),
    ],
)
def test_geco_warns_of_a_cycle(rate, smoothing, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Geco(1.0, rate=rate, smoothing=smoothing)
    assert len(caught) == warns
    if warns:
        latents = 2 * (1 - smoothing) / (rate * smoothing)
        assert f"cycles where over {latents:.2g} / beta latents" in str(caught[0].message)


def test_the_warning_is_about_a_real_cycle():
    # A slow model with ten latents in use: at the rate warned of it cycles, below it settles.
    spread = {}
    for rate in (1e-2, 1e-3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            c = Geco(5.0, rate=rate, smoothing=0.99)
        D, seen = torch.tensor(8.0, dtype=F64), []
        for _ in range(6000):
            beta = c.update(D, D)
            D = D + 0.005 * (10 * beta / 2 - D)  # Eq. (water-filling): ten times min(beta, a) / 2
            seen.append(D)
        spread[rate] = torch.stack(seen[-2000:]).std()
    assert spread[1e-3] < 0.02 and spread[1e-2] > 0.5


# One controller, one scheme
@everyone
def test_a_controller_belongs_to_one_scheme(name):
    c = EVERYONE[name]()
    model = GaussianVAE(6, 4, 3, 2)
    BetaVAE(model, c)
    message = f"this {type(c).__name__} is already used by another scheme: make one for each scheme"
    with pytest.raises(ValueError, match=message):
        BetaVAE(model, c)
    if not c.only_for_vae:
        classifier = nn.Linear(6, 3)
        classifier.features = nn.Identity()
        with pytest.raises(ValueError, match=message):
            Assisted(classifier, nn.Linear(3, 6), Reconstruction(), weight=c)
    BetaVAE(model, EVERYONE[name]())


# Devices, dtypes, compilers
class Ops(TorchDispatchMode):
    """Names of the operations that run inside the block."""

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
    assert "_local_scalar_dense" not in ops.seen
    assert not any(op.startswith("equal") for op in ops.seen)
    assert len(ops.seen) <= 30, ops.seen


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
            assert (c.update(R.to(dtype), D.to(dtype)) - beta).abs().max() < 1e-5
            assert c.value.dtype == torch.float32


def vae_step(c, dtype, device="cpu", autocast=False, seed=0, steps=6):
    """Train a small VAE for some steps and return β of each."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VAE(16, 12, 8, 4)
    model = model.to(device, dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    g = generator(seed)
    betas = []
    for _ in range(steps):
        x = (torch.rand(32, 16, generator=g) > 0.5).to(device, dtype)
        eps = torch.randn(32, 4, generator=g).to(device, dtype)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            mean, log_var = model.encoder(x)
            D = -model.log_likelihood(x, model.reparameterize(mean, log_var, eps)).mean()
            R = gaussian_kl(mean, log_var).mean(0)
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
    low = vae_step(EVERYONE[name](), torch.float32, autocast=True)
    exact = vae_step(EVERYONE[name](), F64)
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
        """Return a distortion plus the weighted rate."""
        R = model(x).square().mean(0)
        D = 8 + (model(x) - x.sum(1, keepdim=True)).square().mean()
        return D + (c.update(R, D) * R).sum()

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    g = generator(0)
    counts = []
    for _ in range(14):
        x = torch.randn(8, 3, generator=g)
        ends = []
        for f, model, c in zip((loss, compiled), models, cs):
            value = f(model, c, x)
            value.backward()
            ends.append(value.detach())
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(0.05 * p.grad)
                model.zero_grad()
        counts.append(counter.frame_count)
        assert torch.allclose(*ends, rtol=1e-5)
        assert torch.allclose(cs[0].value, cs[1].value, rtol=1e-5)
        assert cs[0].t == cs[1].t
    # It may be compiled a second time, for a value of another shape or a memory of another dtype.
    assert counts[1] <= 2 and counts[-1] == counts[1]


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
        (
            lambda: Cyclical(9, ramp=1.5),
            "ramp must be a finite number, above 0, at most 1; got 1.5",
        ),
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
        (
            lambda: Geco(1.0, smoothing=-0.1),
            "smoothing must be a finite number, at least 0, below 1",
        ),
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
    values = [linear_ramp(torch.tensor(float(t)), 4, 1.0, 0.3).item() for t in (0, 4, 9)]
    assert values == [1.0, torch.tensor(0.3).item(), torch.tensor(0.3).item()]


# What a scheme asks of a controller.
PLAIN = tuple(name for name in EVERYONE if name != "sigma")


@pytest.mark.parametrize("name", PLAIN)
def test_most_controllers_ask_nothing_of_the_model(name):
    c, model = EVERYONE[name](), VAE(6, 4, 3, 4)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    for R, D in measures(5):
        c.check_model(model)
        c.update(R, D)
        c.attach(model)
        assert c.distortion(model, D) is D
        assert c.kl_weight(model) is c.value
    assert all(torch.equal(before[key], x) for key, x in model.state_dict().items())


@everyone
def test_the_reported_weight_is_a_constant_beta_or_one(name):
    c = EVERYONE[name]()
    c.update(*measures(1)[0])
    assert c.reported_weight == (0.5 if name == "constant" else 1.0)
    assert isinstance(c.reported_weight, float)


def test_controllers_of_a_vae_alone_say_so():
    own = {name for name, make in EVERYONE.items() if make().only_for_vae}
    assert own == {"free-bits", "free-bits-groups", "sigma"}


def test_sigma_vae_owns_the_variance_of_the_decoder():
    model, c = GaussianVAE(6, 4, 3, 2).double(), SigmaVAE(6)
    x, z = torch.rand(8, 6, dtype=F64), torch.randn(8, 2, dtype=F64)
    squared_error = (x - model.decoder(z)).square().sum(1).mean() / 2
    c.check_model(model)
    for _ in range(3):
        c.attach(model)
        assert torch.equal(model.variance, c.value.to(model.variance))
        nll = -model.log_likelihood(x, z).mean()
        D = c.distortion(model, nll)
        assert abs(D - squared_error) < 1e-12
        c.update(torch.rand(2, dtype=F64), D)
        assert torch.equal(c.kl_weight(model), c.value / model.variance)
    assert abs(c.value - squared_error / 3) < 1e-12
    assert c.kl_weight(model).allclose(torch.ones((), dtype=F64))


def test_sigma_vae_refuses_a_model_without_a_variance():
    with pytest.raises(ValueError, match="a Gaussian decoder, and VAE has none: take a Gaussian"):
        SigmaVAE(6).check_model(VAE(6, 4, 3, 2))


@pytest.mark.parametrize("old, kind", [("ControlVae", ControlVAE), ("SigmaVae", SigmaVAE)])
def test_a_state_of_release_0_3_loads(old, kind):
    state = kind(3).state_dict() | {"name": old, "value": torch.tensor(0.25)}
    c = kind(3)
    c.load_state_dict(state)
    assert c.value == 0.25


# Controllers by name.
def build(text, **options):
    """Return the controller of a run of 100 steps, 10 an epoch."""
    return build_controller(text, steps=100, epoch_steps=10, **options)


SPECS = {
    "warmup": (LinearWarmup, {"steps": 50, "beta": 1.0, "start": 0.0}),
    "cyclical": (Cyclical, {"steps": 100, "cycles": 4}),
    "capacity:target=3": (Capacity, {"target": 3, "steps": 100, "weight": 10.0}),
    "free-bits": (FreeBits, {"minimum": 0.1, "groups": None}),
    "geco:target=90": (
        Geco,
        {"target": 90, "rate": 2e-3, "smoothing": 0.9, "clip": 0.02, "low": 0.01, "high": 1e4},
    ),
    "control:target=3": (ControlVAE, {"target": 3, "kp": 0.01, "ki": 1e-3}),
    "nu-pi:target=3,smoothing=0.5": (NuPI, {"target": 3, "ki": 1e-3, "kp": 0.01, "smoothing": 0.5}),
    "augmented:target=3": (AugmentedLagrangian, {"target": 3, "step": 1e-3, "penalty": 0.01}),
    "sigma:dim=784": (SigmaVAE, {"dim": 784}),
    "warmup:beta=0.5,epochs=2": (LinearWarmup, {"steps": 20, "beta": 0.5}),
    "warmup:epochs=0.01": (LinearWarmup, {"steps": 1}),
    "warmup:epochs=null": (LinearWarmup, {"steps": 100}),
    "warmup:steps=7": (LinearWarmup, {"steps": 7}),
    "capacity:target=3,epochs=2.5,weight=1": (Capacity, {"steps": 25, "weight": 1}),
    "free-bits:minimum=2,groups=1": (FreeBits, {"minimum": 2, "groups": 1}),
    "geco:target=90,rate=0.1": (Geco, {"rate": 0.1, "smoothing": 0.9}),
    "0.5": (Constant, {"beta": 0.5}),
    "1e-3": (Constant, {"beta": 1e-3}),
    2.0: (Constant, {"beta": 2.0}),
}


@pytest.mark.parametrize("text", SPECS)
def test_a_specification_builds_the_controller(text):
    kind, expected = SPECS[text]
    c = build(text)
    assert type(c) is kind
    assert {key: getattr(c, key) for key in expected} == expected
    c.update(*measures(1)[0])


def test_every_registered_controller_is_built_above():
    assert set(CONTROLLERS) <= {str(text).partition(":")[0] for text in SPECS}


def test_the_given_arguments_can_be_amended():
    def rename(name, given):
        """Rename kl to target."""
        seen.append((name, dict(given)))
        given["target"] = given.pop("kl")

    seen = []
    assert build("control:kl=3", amend=rename).target == 3
    assert build("0.5", amend=rename).beta == 0.5
    assert seen == [("control", {"kl": 3})]


def test_an_amendment_can_refuse():
    def refuse(name, given):
        """Refuse everything."""
        raise ValueError(f"{name} is not offered here")

    with pytest.raises(ValueError, match="geco is not offered here"):
        build("geco:target=1", amend=refuse)


@pytest.mark.parametrize(
    "text, words",
    [
        ("dance", "no controller 'dance'; there are: warmup, cyclical, capacity, free-bits, geco"),
        ("geco", "geco needs target, as in geco:target=..."),
        ("control", "control needs target"),
        ("sigma", "sigma needs dim"),
        ("nan", "Constant: beta must be a finite number, at least 0; got nan"),
        ("inf", "finite number"),
        ("-1", "at least 0; got -1"),
        ("geco:target=NaN", "target must be a finite number in the range of float32; got nan"),
        ("geco:target=ten", "'ten' is neither a number"),
        ("geco:90", "'90' has no value"),
        (
            "geco:target=40,speed=1",
            "geco takes no argument 'speed'; its arguments are: target, rate",
        ),
        ("geco:target=40,epochs=3", "geco takes no argument 'epochs'"),
        ("warmup:epochs=0", "warmup: epochs must be a finite number, above 0; got 0"),
        ("warmup:epochs=NaN", "epochs must be a finite number in the range of float32; got nan"),
        ("warmup:beta=-1", "beta must be a finite number, at least 0; got -1"),
        ("warmup:steps=2.5", "steps must be an integer, at least 1; got 2.5"),
        ("cyclical:cycles=101", "100 steps can't hold 101 cycles"),
        ("capacity", "capacity needs target"),
        ("free-bits:groups=0", "groups must be an integer, at least 1; got 0"),
    ],
)
def test_a_wrong_specification_is_refused(text, words):
    with pytest.raises(ValueError) as raised:
        build(text)
    assert words in str(raised.value)


# In another library, unchanged: pythae's BetaVAE computes its loss inside `forward` and returns its
# two terms. Linear maps on Gaussian data, so that the curve is known.
@pytest.fixture(scope="module")
def pythae():
    pytest.importorskip("pythae")
    from pythae.models import BetaVAE, BetaVAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):
        """Linear mean, one log-variance for each latent."""

        def __init__(self):
            super().__init__()
            self.mean, self.log_var = nn.Linear(4, 2), nn.Parameter(torch.zeros(2))

        def forward(self, x):
            mean = self.mean(x)
            return ModelOutput(embedding=mean, log_covariance=self.log_var.expand_as(mean))

    class Decoder(BaseDecoder):
        """Linear map."""

        def __init__(self):
            super().__init__()
            self.map = nn.Linear(2, 4)

        def forward(self, z):
            return ModelOutput(reconstruction=self.map(z))

    def make():
        """Return a new model, the same each time."""
        torch.manual_seed(0)
        config = BetaVAEConfig(input_dim=(4,), latent_dim=2, reconstruction_loss="mse")
        return BetaVAE(config, Encoder(), Decoder())

    x = torch.randn(2048, 4, generator=generator(0))
    white = torch.linalg.svd(x - x.mean(0), full_matrices=False).U
    x = white * (2048 * S.float()).sqrt()  # variances S but for rounding
    with torch.random.fork_rng(devices=[]):
        yield make, x


CONSTANT = 2 * math.log(2 * math.pi)  # pythae's distortion lacks it
DROP_IN = {
    "geco": (lambda: Geco(1.9, rate=0.05, smoothing=0.9), dict(distortion=1.9 + CONSTANT)),
    "control": (lambda: ControlVAE(1.2, kp=0.05, ki=0.01, high=5.0), dict(rate=1.2)),
    # 0.4 is the mean of the two least variances.
    "sigma": (lambda: SigmaVAE(4), dict(beta=0.4)),
}


def assert_on_curve(model, x, point, betas):
    """Assert that a run ended at a point of the curve."""
    with torch.no_grad():
        outs = [model.eval()({"data": x}) for _ in range(20)]
    o = water_filling(S, z_dim=2, **point)
    D, R = (torch.stack([out[k] for out in outs]).mean().item() for k in ("recon_loss", "reg_loss"))
    beta = torch.stack(betas[-100:]).mean().item()
    assert abs(R - o.rate.sum()) < 0.05, (R, o)
    assert abs(D + CONSTANT - o.distortion) < 0.03, (D + CONSTANT, o)
    assert abs(beta / o.beta - 1) < 0.05, (beta, o)


@pytest.mark.parametrize(
    "name, delay", [("geco", 0), ("geco", 1), ("control", 0), ("control", 1), ("sigma", 0)]
)
def test_pythae_model_in_ones_own_loop(pythae, name, delay):
    # Without delay the loss is computed from the returned terms; with it, `model.beta` is set for
    # the next batch.
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
    assert_on_curve(model, x, point, betas)


@pytest.mark.parametrize("name, delay", [("geco", 1), ("control", 0), ("control", 1)])
def test_pythae_trainer_with_a_callback(pythae, name, delay, tmp_path):
    # Its callbacks do not receive what the model returned, but a forward hook does. The hook weighs
    # the terms of this batch; or it measures them, and the callback sets `model.beta` for the next.
    from pythae.data.datasets import BaseDataset
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from pythae.trainers.training_callbacks import TrainingCallback

    make, x = pythae
    controller, point = DROP_IN[name][0](), DROP_IN[name][1]
    betas = []

    class Control(TrainingCallback):
        """The controller as a forward hook during training."""

        def on_train_begin(self, training_config, **kwargs):
            # Not before: the trainer calls the model once when it is built.
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
    assert_on_curve(model, x, point, betas)
