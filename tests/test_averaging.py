"""Averages of the installed package: dtypes, files, foreign loops, schemes, schedules, errors."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from optgen.averaging import (
    Average,
    Exponential,
    Power,
    Profile,
    averages_of,
    collect_evaluation_weights,
    evaluating,
)
from optgen.combined import CombinedOptimizer
from optgen.data.images import Batch, Images, digits
from optgen.data.loading import Loader
from optgen.games import Game, Player
from optgen.muon import Muon, muon_groups
from optgen.optim import Adam
from optgen.posthoc import posthoc_coefficients, reconstruct
from optgen.rules import Alternating, Clipped, Consensus, Extragradient, Lookahead, Optimistic
from optgen.testing import flat_weights, generator
from optgen.training import checkpoint
from optgen.training.trainer import fit

FEW = Images(digits("train").images[:300], digits("train").labels[:300])
KINDS = [
    Power(0.0),
    Power.of_width(0.05),
    Power(float("inf")),
    Exponential(0.9),
    Exponential(0.5, warmup=0.0),
]


class Scheme(Game):
    """Classifier of digits; its evaluation returns the norm of the weights."""

    def __init__(
        self, make=lambda net: Adam(net.parameters(), 0.01), seed=0, rule=None, device="cpu"
    ):
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(seed)
            self.net = nn.Sequential(
                nn.Linear(784, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10)
            )
        super().__init__(
            net=Player(
                self.net,
                lambda b: nn.functional.cross_entropy(self.net(b.x.flatten(1)), b.y),
                make(self.net),
            ),
            rule=rule,
        )

    def evaluate(self, batches):
        """Return the norm of the weights."""
        return {"loss": flat_weights(self.net).double().norm().item()}


def equal(a, b):
    """Return whether two states are equal to the bit."""
    return all(torch.equal(a[k], b[k]) for k in a)


def walked(kind, dtype=torch.float64, seed=0, steps=25, device="cpu"):
    """Return a layer on a random walk, its average, and the points visited."""
    net = nn.Linear(4, 3, dtype=dtype, device=device)
    average, path, noise = Average(net, kind), [], generator(seed)
    for _ in range(steps):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn(p.shape, generator=noise).to(p))
        path.append(flat_weights(net).cpu().double())
        average.update()
    return net, average, torch.stack(path)


def flat_means(average):
    """Return the averages as one float64 vector."""
    return flat_weights(average.means).cpu().double()


@pytest.mark.parametrize(
    "dtype, error", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_it_is_the_weighted_sum_in_every_dtype(kind, dtype, error):
    for seed in (0, 1, 2):
        net, average, path = walked(kind, dtype, seed)
        assert (flat_means(average) - kind.weights(25) @ path).abs().max() < error * 10
        assert all(p.dtype == dtype for p in net.parameters())
        own = flat_weights(net)
        with evaluating(average):
            assert torch.equal(flat_weights(net), flat_means(average).to(dtype))
        assert torch.equal(flat_weights(net), own)


@pytest.mark.parametrize("kind", KINDS[:4], ids=str)
def test_resumed_from_a_file_it_is_the_average_that_went_on(kind, tmp_path):
    net, average, _ = walked(kind, torch.float32)
    checkpoint.save(
        tmp_path / "a.pt", {"average": average.state_dict(), "snapshot": average.snapshot()}
    )
    state = checkpoint.load(tmp_path / "a.pt")
    other = Average(net, kind)
    other.load_state_dict(state["average"])
    with torch.no_grad():
        net.weight.add_(1)
    average.update()
    other.update()
    assert torch.equal(flat_means(average), flat_means(other))
    assert other.step == 26
    assert state["snapshot"]["step"] == 25


def test_foreign_snapshots_and_targets_out_of_reach():
    _, average, _ = walked(Power(3.0))
    snapshot = average.snapshot()
    for bad, word in (
        ([{k: v for k, v in snapshot.items() if k != "weights"}], "no weights"),
        (
            [snapshot, {**snapshot, "weights": {"weight": torch.ones(2)}}],
            "snapshot 1 has other weights: 'weight' has shape (2,)",
        ),
        (None, "a list"),
        ({}, "a list"),
    ):
        with pytest.raises(ValueError) as e:
            reconstruct(bad, Power(1.0))
        assert word in str(e.value)
    assert reconstruct([snapshot], lambda s: s == 3).residual > 0.9
    assert reconstruct([snapshot], Power(3.0)).residual < 1e-12
    state = average.state_dict()
    wrong = Average(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="other weights"):
        wrong.load_state_dict(state)
    assert wrong.step == 0


@pytest.mark.parametrize("seed", range(3))
def test_any_profile_of_a_run_is_near_what_was_averaged_alongside(seed):
    class Odd(Profile):
        def update_weight(self, t):
            return 1 / t**0.8

    w = torch.zeros(2000, dtype=torch.float64, requires_grad=True)
    noise = generator(seed)
    pair = [Average([w], Power.of_width(width)) for width in (0.05, 0.1)]
    targets = (Power.of_width(0.06), Power.of_width(0.12), Exponential(0.97), Odd())
    wanted = [Average([w], target) for target in targets]
    snapshots = []
    for t in range(1, 201):
        with torch.no_grad():
            w.copy_(torch.randn(2000, generator=noise, dtype=torch.float64))
        for a in (*pair, *wanted):
            a.update()
        if t % 20 == 0:
            snapshots += [a.snapshot() for a in pair]
    for a in wanted:
        found = reconstruct(snapshots, a.profile)
        p = a.profile.weights(200).norm().item()
        error = (found.state["0"] - a.means[0]).square().mean() ** 0.5
        # 2,000 numbers: five standard errors are 8 %.
        assert (error / (found.residual * p) - 1).abs() < 0.12


def test_a_long_run_is_cheap():
    steps, widths = range(50_000, 1_000_001, 50_000), (0.05, 0.1)
    marks = [(Power.of_width(width), t) for t in steps for width in widths]
    c, residual = posthoc_coefficients(marks, Power.of_width(0.08), 1_000_000)
    assert residual < 0.01 and abs(c.sum() - 1) < 1e-9


def test_a_scheme_is_averaged_resumed_and_evaluated_at_its_first_average(tmp_path):
    def new(seed=0):
        """Return a scheme with two averages of its weights."""
        scheme = Scheme(seed=seed)
        scheme.averages = averages_of(scheme, Power.of_width(0.1)) + averages_of(scheme, 0.9)
        return scheme

    whole, first, second = new(), new(), new(5)
    options = dict(valid=FEW, batch_size=50, progress="none")
    records = fit(whole, FEW, epochs=2, **options)
    fit(first, FEW, epochs=1, out=tmp_path / "b", **options)
    fit(second, FEW, epochs=2, out=tmp_path / "b", resume=True, **options)
    for a, b in zip(whole.averages, second.averages):
        assert equal(a.state_dict(), b.state_dict()) and a.step == 12
    assert records[-1]["valid"]["loss"] == pytest.approx(
        flat_means(whole.averages[0]).norm().item(), rel=1e-6
    )
    with evaluating(whole):
        assert torch.equal(flat_weights(whole.net).double(), flat_means(whole.averages[0]))
    with pytest.raises(checkpoint.CheckpointError, match="2 averages"):
        fit(Scheme(), FEW, epochs=3, out=tmp_path / "b", resume=True, **options)


def test_a_checkpoint_of_pytorchs_average_goes_on(tmp_path):
    """As optgen 0.3 wrote it."""
    scheme, options = Scheme(), dict(batch_size=50, progress="none", ema=0.9)
    fit(scheme, FEW, epochs=1, out=tmp_path / "a", **options)
    state = checkpoint.load(tmp_path / "a/checkpoint.pt")
    old = AveragedModel(scheme.net)
    old.load_state_dict(state["ema"][0])
    checkpoint.save(tmp_path / "a/checkpoint.pt", {**state, "ema": [old.state_dict()]})
    fit(Scheme(seed=1), FEW, epochs=2, out=tmp_path / "a", resume=True, **options)
    fit(Scheme(), FEW, epochs=2, out=tmp_path / "b", **options)
    a, b = (checkpoint.load(tmp_path / f"{k}/checkpoint.pt")["ema"][0] for k in "ab")
    assert equal(a, b)


def free(name):
    """Return a function that makes a schedule-free optimizer of a network."""
    schedulefree = pytest.importorskip("schedulefree")
    return {
        "adamw": lambda net: schedulefree.AdamWScheduleFree(
            net.parameters(), lr=0.01, warmup_steps=3
        ),
        "sgd": lambda net: schedulefree.SGDScheduleFree(net.parameters(), lr=0.5),
        "radam": lambda net: schedulefree.RAdamScheduleFree(net.parameters(), lr=0.01),
        "wrapped": lambda net: schedulefree.ScheduleFreeWrapper(
            torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.5), momentum=0.9
        ),
        "beside": lambda net: CombinedOptimizer(
            Muon([net[3].weight], 0.01),
            schedulefree.AdamWScheduleFree(
                [p for k, p in net.named_parameters() if k != "3.weight"], lr=0.01
            ),
        ),
    }[name]


@pytest.mark.parametrize("name", ["adamw", "sgd", "radam", "wrapped", "beside"])
def test_schedule_free_players_resume_and_come_back_to_the_bit(name, tmp_path):
    make = free(name)
    whole, first, second = Scheme(make), Scheme(make), Scheme(make, seed=4)
    options = dict(valid=FEW, batch_size=50, progress="none")
    records = fit(whole, FEW, epochs=2, **options)
    fit(first, FEW, epochs=1, out=tmp_path / "b", **options)
    fit(second, FEW, epochs=2, out=tmp_path / "b", resume=True, **options)
    assert equal(whole.net.state_dict(), second.net.state_dict())
    assert all(p.isfinite().all() for p in whole.net.parameters())
    y = flat_weights(whole.net)
    with evaluating(whole):
        x = flat_weights(whole.net)
        assert not torch.equal(x, y)
        assert x.double().norm().item() == records[-1]["valid"]["loss"]
    assert torch.equal(flat_weights(whole.net), y)
    whole.step(first_batch())  # ready to train


def first_batch():
    """Return a batch of fifty digits."""
    return next(iter(Loader(FEW, 50)))


def test_a_player_made_or_loaded_in_evaluation_is_put_to_train():
    make = free("adamw")
    scheme = Scheme(make)
    opt = scheme.players["net"].optimizer
    scheme.step(first_batch())
    opt.eval()
    state = copy.deepcopy(scheme.state_dict())
    x = flat_weights(scheme.net)
    other = Scheme(make, seed=2)
    other.load_state_dict(state)
    assert other.players["net"].optimizer.param_groups[0]["train_mode"]
    with evaluating(other):
        assert (flat_weights(other.net) - x).abs().max() < 1e-6
    other.step(first_batch())


@pytest.mark.parametrize(
    "rule", [Extragradient, Optimistic, Lookahead, lambda: Lookahead(Alternating())]
)
def test_rules_that_put_weights_back_are_refused(rule):
    with pytest.raises(ValueError, match="schedule-free"):
        Scheme(free("adamw"), rule=rule())


def test_an_average_of_schedule_free_weights_is_refused_before_the_run(tmp_path):
    with pytest.raises(ValueError, match="two values"):
        fit(Scheme(free("sgd")), FEW, ema=0.9, out=tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert collect_evaluation_weights(Scheme(free("sgd")))[1]


@pytest.mark.parametrize(
    "make",
    [
        lambda net: Adam(net.parameters(), 0.01),
        lambda net: torch.optim.Adam(net.parameters(), torch.tensor(0.01)),
        lambda net: CombinedOptimizer(
            Muon([net[3].weight], 0.02),
            Adam([p for k, p in net.named_parameters() if k != "3.weight"], 0.01),
        ),
    ],
)
def test_a_schedule_resumes_to_the_bit_and_puts_the_rates_back(make, tmp_path):
    options = dict(batch_size=50, progress="none", ema=Power(2.0))
    options["schedule"] = lambda t: min(1, 4 * t) * (1 - t)
    whole, first, second = Scheme(make), Scheme(make), Scheme(make, seed=3)
    fit(whole, FEW, epochs=2, **options)
    first.draw = lambda batch, seen=iter(range(99)): batch if next(seen) < 4 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        fit(first, FEW, epochs=2, out=tmp_path / "b", checkpoint_steps=2, **options)
    fit(second, FEW, epochs=2, out=tmp_path / "b", resume=True, **options)
    assert equal(whole.net.state_dict(), second.net.state_dict())
    group = whole.players["net"].optimizer.param_groups[0]
    assert float(group["lr"]) in (pytest.approx(0.01), pytest.approx(0.02))
    assert "initial_lr" not in group
    saved = checkpoint.load(tmp_path / "b/checkpoint.pt")["scheme"]["net"]["optimizer"]
    (*_, saved) = saved.get("optimizers", [saved])
    saved = saved["param_groups"][0]
    assert float(saved["lr"]) == pytest.approx(float(saved["initial_lr"]) / 12)


def test_a_schedule_needs_rates_and_says_so_before_the_run(tmp_path):
    class Bare(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

    with pytest.raises(ValueError, match="player 'net' has no lr"):
        fit(
            Scheme(lambda net: Bare(net.parameters())),
            FEW,
            schedule=lambda t: 1.0,
            out=tmp_path / "a",
            progress="none",
        )
    assert not (tmp_path / "a").exists()


def test_a_folder_that_is_refused_leaves_the_learning_rates(tmp_path):
    scheme = Scheme()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileExistsError):
        fit(scheme, FEW, schedule=lambda t: t, out=tmp_path, progress="none")
    (group,) = scheme.players["net"].optimizer.param_groups
    assert group["lr"] > 0 and "initial_lr" not in group


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner", [None, lambda: Consensus(0.1)])
def test_clipped(dtype, inner):
    def new(rule):
        """Return a game of two players with long gradients."""
        a, b = (torch.full((3,), x, dtype=dtype, requires_grad=True) for x in (2.0, 30.0))
        return Game(
            a=Player([a], lambda _: (a * b).sum() + (a**2).sum(), torch.optim.SGD([a], 0.1)),
            b=Player([b], lambda _: (b**2).sum() - (a * b).sum(), torch.optim.SGD([b], 0.1)),
            rule=rule,
        )

    plain, clipped = new(inner and inner()), new(Clipped(20.0, inner and inner()))
    u = {}
    for game in (plain, clipped):
        at = game.at(None, graph=game.rule.second_order)
        u[game] = game.rule.direction(at)
    for name in ("a", "b"):
        x, y = u[plain][name][0], u[clipped][name][0]
        assert (
            torch.allclose(
                y,
                x * min(1, 20 / (x.norm().item() + 1e-6)),
                rtol=0.02 if dtype == torch.bfloat16 else 1e-6,
            )
            and y.dtype == dtype
        )
    assert u[plain]["b"][0].norm() > 20
    Alternating(Clipped(1.0))
    clipped.step(None)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="max_norm must be a finite number, above 0"):
            Clipped(bad)


def test_on_meta_and_under_autocast():
    scheme = Scheme(rule=Clipped(1.0), device="meta")
    scheme.averages = averages_of(scheme, Power(3.0))
    scheme.step(
        Batch(
            torch.empty(5, 1, 28, 28, device="meta"),
            torch.empty(5, dtype=torch.long, device="meta"),
        )
    )
    scheme.averages[0].update()
    with evaluating(scheme):
        assert flat_weights(scheme.net).is_meta
    half = Scheme(rule=Clipped(1.0))
    fit(half, FEW, precision="bfloat16", ema=Power(3.0), valid=FEW, progress="none")
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in half.net.parameters())


def test_an_lstm_and_a_module_that_moves():
    net = nn.LSTM(3, 4)
    average = Average(net, 0.5)
    average.update()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    x = torch.randn(5, 2, 3)
    own = net(x)[0]
    with evaluating(average):
        assert not torch.equal(net(x)[0], own)
    assert torch.equal(net(x)[0], own)
    net.to(torch.float64)
    average.update()
    assert average.means[0].dtype == torch.float32


def test_in_a_foreign_loop():
    ddp = pytest.importorskip("denoising_diffusion_pytorch")
    torch.manual_seed(1)
    unet = ddp.Unet(dim=8, dim_mults=(1,), channels=1, flash_attn=False)
    diffusion = ddp.GaussianDiffusion(unet, image_size=8, timesteps=10, auto_normalize=False)
    matrices, rest = muon_groups(unet)
    opt = CombinedOptimizer(Muon(matrices, 0.02), Adam(rest, 1e-3))
    warm = torch.optim.lr_scheduler.LinearLR(opt, 0.1, total_iters=3)
    averages, snapshots, path = [Average(diffusion, Power.of_width(w)) for w in (0.05, 0.1)], [], []
    alongside = Average(diffusion, Power.of_width(0.08))
    x = torch.rand(4, 1, 8, 8)
    for t in range(8):
        opt.zero_grad()
        diffusion(x).backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        opt.step()
        warm.step()
        path.append(flat_weights(unet))
        for a in (*averages, alongside):
            a.update()
        snapshots += [a.snapshot() for a in averages] if t % 2 else []
    own = copy.deepcopy(diffusion.state_dict())
    found = reconstruct(snapshots, Power.of_width(0.08))
    scatter = (torch.stack(path) - path[-1]).norm()
    off = torch.stack(
        [(found.state[k] - a).norm() for k, a in zip(alongside.params, alongside.means)]
    ).norm()
    assert off < found.residual * Power.of_width(0.08).weights(8).norm() * scatter + 1e-3
    with evaluating(averages[0]):
        assert diffusion.sample(batch_size=2).isfinite().all()
        assert not equal(own, diffusion.state_dict())
    assert equal(own, diffusion.state_dict())
    diffusion.load_state_dict(found.state)


@pytest.mark.cuda
def test_cuda_as_on_the_cpu():
    for dtype in (torch.float32, torch.bfloat16):
        _, here, _ = walked(Power(5.0), dtype)
        net, there, _ = walked(Power(5.0), dtype, device="cuda")
        assert there.means[0].is_cuda and there.state_dict()["n_averaged"].device.type == "cpu"
    net = nn.Linear(3, 3)
    average = Average(net)
    net.cuda()
    average.update()
    assert average.means[0].is_cuda
    with evaluating(average):
        assert net.weight.is_cuda


def test_a_reconstruction_has_the_buffers_of_the_last_snapshot_up_to_its_step():
    net = nn.BatchNorm1d(2)
    averages, snapshots = [Average(net, Power(gamma)) for gamma in (1.0, 5.0)], []
    for step in range(1, 7):
        net.running_mean.fill_(step)
        for average in averages:
            average.update()
        if step % 2 == 0:
            snapshots += [average.snapshot() for average in averages]
    for at, step in ((2, 2), (3, 2), (5, 4), (6, 6), (None, 6)):
        found = reconstruct(snapshots, Power(2.0), at=at).state
        assert found["running_mean"].tolist() == [step, step]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_that_are_not_finite_are_skipped_and_counted(bad, dtype):
    weights = [torch.zeros(3, dtype=dtype), torch.zeros(2, 2, dtype=dtype)]
    average, expected = Average(weights, Power(3.0)), [torch.zeros(3), torch.zeros(2, 2)]
    expected = [x.to(average.means[0]) for x in expected]
    rng = generator(1)
    for t in range(1, 13):
        for w in weights:
            w.copy_(torch.randn(w.shape, generator=rng))
        if t in (1, 4, 5, 11):
            weights[t % 2].view(-1)[t % 3] = bad
        else:
            share = average.profile.update_weight(t)
            expected = [e + share * (w.to(e) - e) for e, w in zip(expected, weights)]
        average.update()
    assert average.step == 12 and average.skipped == 4
    for mean, e in zip(average.means, expected):
        assert torch.allclose(mean, e, rtol=1e-5 if mean.dtype == torch.float32 else 1e-12)


def test_skipping_is_on_the_device():
    average = Average([torch.zeros(2, device="meta")], 0.9)
    average.update()
    assert average.skipped.is_meta


def test_a_target_that_is_neither_profile_nor_function_is_refused():
    average = Average([torch.zeros(2)], Power(3.0))
    average.update()
    for bad in (0.07, "0.07", None, torch.tensor(0.1)):
        with pytest.raises(ValueError, match="target must be a profile or a function of the steps"):
            reconstruct([average.snapshot()], bad)


def decay_of(kind, t):
    """Return the weight that the average before step t keeps, from its definition."""
    if t == 1:
        return 0.0
    if isinstance(kind, Power):
        return (1 - 1 / t) ** (kind.gamma + 1) if kind.gamma < float("inf") else 0.0
    return min(t / (t + kind.warmup), kind.decay) if kind.warmup else kind.decay


@pytest.mark.parametrize("kind", [*KINDS, Exponential(0.97, warmup=4.0)], ids=str)
def test_it_is_the_recursion_of_its_profile(kind):
    _, average, path = walked(kind, seed=4, steps=60)
    mean = torch.zeros_like(path[0])
    shares = torch.zeros(60, dtype=torch.float64)
    for t, point in enumerate(path, 1):
        d = decay_of(kind, t)
        mean, shares = d * mean + (1 - d) * point, d * shares
        shares[t - 1] += 1 - d
    torch.testing.assert_close(flat_means(average), mean)
    torch.testing.assert_close(kind.weights(60), shares)
    torch.testing.assert_close(kind.weights(60, 40), shares[40:])
    kept = torch.tensor([decay_of(kind, t) for t in range(21, 61)]).prod().item()
    assert kind.retained_weight(60, 20) == pytest.approx(kept)


@pytest.mark.parametrize("width", [0.03, 0.1, 0.25, 12**-0.5])
def test_a_width_is_the_deviation_of_the_steps_of_a_long_run(width):
    kind, n = Power.of_width(width), 100_000
    t = torch.arange(1, n + 1, dtype=torch.float64)
    p = t**kind.gamma  # the weights of a long run, up to a factor
    p = p / p.sum()
    mean = (p * t).sum()
    deviation = (p * (t - mean) ** 2).sum().sqrt().item() / n
    assert deviation == pytest.approx(width, rel=1e-3)
    assert kind.width == pytest.approx(width)


def test_averages_of_a_scheme_have_the_profile_that_is_asked_for():
    scheme = Scheme()
    for profile in (Power(2.5), Exponential(0.7, 3.0)):
        (average,) = averages_of(scheme, profile)
        assert average.profile is profile and average.module is scheme.net
    (average,) = averages_of(scheme, 0.6)
    assert average.profile == Exponential(0.6, 9.0)
    (average,) = averages_of(scheme)
    assert average.profile == Exponential(0.999, 9.0)


@pytest.mark.parametrize("of_scheme", [False, True])
def test_buffers_that_change_in_evaluation_are_put_back(of_scheme):
    scheme = Scheme()
    scheme.averages = averages_of(scheme, 0.9)
    scheme.averages[0].update()
    before = {name: buffer.clone() for name, buffer in scheme.net.named_buffers()}
    with evaluating(scheme if of_scheme else scheme.averages[0]):
        scheme.net.train()
        scheme.net(torch.rand(20, 784, generator=generator(1)))
        assert not equal(before, dict(scheme.net.named_buffers()))
    assert equal(before, dict(scheme.net.named_buffers()))


def test_a_target_is_a_combination_whatever_the_unit_of_its_weights():
    net, first, path = walked(Power(1.0), steps=1)
    averages = [first, Average(net, Power(4.0)), Average(net, Exponential(0.8))]
    averages[1].update()
    averages[2].update()
    noise, points, snapshots = generator(9), [path[0]], []
    for t in range(2, 31):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn(p.shape, generator=noise, dtype=torch.float64))
        points.append(flat_weights(net))
        for average in averages:
            average.update()
        if t % 5 == 0:
            snapshots += [average.snapshot() for average in averages]
    points = torch.stack(points)
    # A target of unit 7 is the target; what is out of reach is the nearest, by least squares.
    steps = torch.arange(1, 26, dtype=torch.float64)
    for relative in (lambda s: 7 * s, lambda s: 0.01 * (s > 12)):
        found = reconstruct(snapshots, relative, at=25)
        p = torch.cat([relative(steps) / relative(steps).sum(), torch.zeros(5)])
        rows = []
        for t in range(5, 31, 5):
            for average in averages:
                shares = torch.zeros(30, dtype=torch.float64)
                for s in range(1, t + 1):
                    d = decay_of(average.profile, s)
                    shares[: s - 1] *= d
                    shares[s - 1] = 1 - d
                rows.append(shares)
        A = torch.stack(rows)
        others, c = A[:-1] - A[-1], None
        solution = torch.linalg.lstsq(
            others.T, (p - A[-1])[:, None], rcond=1e-12, driver="gelsd"
        ).solution[:, 0]
        c = torch.cat([solution, 1 - solution.sum(0, keepdim=True)])
        best = ((c @ A - p).norm() / p.norm()).item()
        assert found.residual == pytest.approx(best, abs=1e-6)
        assert found.coefficients.sum().item() == pytest.approx(1.0)
        made = torch.cat([found.state[name].flatten() for name in ("weight", "bias")])
        torch.testing.assert_close(made, (c @ A) @ points, rtol=1e-5, atol=1e-5)
