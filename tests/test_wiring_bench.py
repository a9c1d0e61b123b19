"""What the evidence and the benchmarks report, from runs and times that are known."""

import copy
import json
import math

import pytest
import scipy.stats
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from optgen.averaging import Average
from optgen.bench import assisted as bench_assisted
from optgen.bench import elbo as bench_elbo
from optgen.bench import epochs as bench_epochs
from optgen.bench import generative as bench_generative
from optgen.bench import loops as bench_loops
from optgen.bench import optimizers as bench_optimizers
from optgen.bench import rules as bench_rules
from optgen.bench import scaling as bench_scaling
from optgen.data.images import Batch, Images, digits
from optgen.data.loading import Loader
from optgen.evidence import assisted, elbo, feedback, gans, likelihood
from optgen.evidence.classifier import train_classifier, warmup_linear_decay
from optgen.evidence.reproduce import (
    constant_then_linear_decay,
    format_interval,
    interval,
    total_hours,
    train_watched,
    write_json,
)
from optgen.games import Game, Player
from optgen.models.classifier import Classifier
from optgen.models.gan import (
    ConvDiscriminator,
    ConvGenerator,
    MLPDiscriminator,
    MLPGenerator,
)
from optgen.optim import Adam
from optgen.rules import Alternating
from optgen.sample_quality import feature_stats, fid
from optgen.schemes.assisted import Assisted
from optgen.schemes.feedback import FeedbackGAN
from optgen.testing import generator
from optgen.training.callbacks import Looks

# Tables


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_an_interval_is_students(n):
    xs = torch.randn(n, generator=generator(n), dtype=torch.float64)
    center, half = interval(xs.tolist())
    assert center == pytest.approx(xs.mean().item())
    quantile = scipy.stats.t.ppf(0.975, n - 1)
    assert half == pytest.approx(quantile * xs.std().item() / math.sqrt(n), rel=2e-4)


def test_hours_are_those_of_the_clock_asked_for(tmp_path):
    for name, seed, wall, cpu in (("a", 0, 1800, 900), ("a", 1, 5400, 900), ("b", 0, 3600, 7200)):
        record = {"variant": "x", "seed": seed, "wall_seconds": wall, "cpu_seconds": cpu}
        write_json(tmp_path / name / f"x-{seed}.json", record)
    assert total_hours(tmp_path, "a", "b") == 3.0
    assert total_hours(tmp_path, "a") == 2.0
    assert total_hours(tmp_path, "a", "b", clock="cpu") == 2.5
    assert format_interval((1.23456, 0.0123)) == "1.235 ± 0.012"


class NotingSGD(torch.optim.SGD):
    """Gradient descent that notes its learning rates."""

    def step(self, closure=None):
        """Take a step."""
        self.__dict__.setdefault("rates", []).append(self.param_groups[0]["lr"])
        return super().step(closure)


def test_a_watched_run_counts_epochs_and_shares():
    net = nn.Linear(1, 1)
    optimizer = NotingSGD(net.parameters(), lr=2.0)
    game = Game(net=Player(net, lambda x: 1e-6 * net(x).sum(), optimizer))
    batches = [torch.ones(2, 1)] * 5
    looks = train_watched(
        game, batches, 3, 0.4, lambda epoch: {"now": epoch}, constant_then_linear_decay
    )
    assert [r["epoch"] for r in looks] == [r["now"] for r in looks]
    assert [r["now"] for r in looks] == pytest.approx([t / 5 for t in (2, 4, 6, 8, 10, 12, 14, 15)])
    expected = [2.0 * (1.0 if t <= 7.5 else 2 * (1 - t / 15)) for t in range(15)]
    assert optimizer.rates == pytest.approx(expected)


# The classifier of the package


def digit_like(n, seed=0):
    """Return images of 8 x 8 of three classes."""
    pixels = torch.randint(256, (n, 1, 8, 8), dtype=torch.uint8, generator=generator(seed))
    return Images(pixels, torch.arange(n) % 3)


def test_the_loss_and_the_errors_of_a_trained_classifier(monkeypatch):
    # At a rate of next to nothing the weights stay, and the loss of every epoch is that of all.
    data, valid = digit_like(41), digit_like(31, seed=1)  # a last batch of one
    sizes = {"width": 2, "dim": 8, "dropout": 0.0}
    settings = {"epochs": 2, "batch_size": 10, "lr": 1e-12, "shift": 0, "seed": 3}
    model, records = train_classifier(data, valid, **settings, **sizes)
    torch.manual_seed(3)
    twin = Classifier((1, 8, 8), 3, **sizes)
    loss = cross_entropy(twin(data.images / 255), data.labels).item()
    errors = (twin(valid.images / 255).argmax(1) != valid.labels).sum().item()
    assert [r["epoch"] for r in records] == [1, 2]
    for record in records:
        assert record["loss"] == pytest.approx(loss, rel=1e-5) and record["errors"] == errors
    # With dropout: off where errors are counted, on where it trains.
    sizes["dropout"] = 0.9
    model, records = train_classifier(data, valid, **settings, **sizes)
    assert not model.training
    assert [r["errors"] for r in records] == [errors] * 2
    assert abs(records[0]["loss"] - loss) > 1e-3


def test_the_rates_of_a_trained_classifier(monkeypatch):
    rates = []

    class NotingAdam(Adam):
        """Adam that notes its learning rates."""

        def step(self, closure=None):
            """Take a step."""
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr("optgen.evidence.classifier.Adam", NotingAdam)
    train_classifier(digit_like(40), epochs=5, batch_size=10, lr=0.3, width=2, dim=4)
    # Twenty steps: two of them rise.
    expected = [0.3 * (0.5 if t == 0 else 1) * (20 - t) / 20 for t in range(20)]
    assert rates == pytest.approx(expected)


def test_the_rate_of_the_classifier_by_its_definition():
    # A tenth of the run rises linearly to the whole rate; all of it falls linearly to nothing.
    steps = 40
    for t in range(steps):
        rise = (t + 1) / 4 if t < 4 else 1.0
        assert warmup_linear_decay(t, steps) == pytest.approx(rise * (steps - t) / steps)


# Assisted classifiers


@pytest.fixture
def small_sets(monkeypatch):
    """Small data sets in the place of MNIST and Fashion-MNIST, of which no two images are alike."""

    def make(split):
        """Return a split of 300 images of ten classes."""
        n = 300
        pixels = torch.zeros(n, 1, 28, 28, dtype=torch.uint8)
        pixels[:, 0, 0, 0] = torch.arange(n) % 256
        pixels[:, 0, 0, 1] = torch.arange(n) // 256
        return Images(pixels, torch.arange(n) % 10, split=split)

    monkeypatch.setattr(assisted, "DATA", {"mnist": make, "fashion": make})


def numbers(data):
    """Return which images a set has."""
    first = data.images[:, 0, 0, :2].long()
    return set((first[:, 0] + 256 * first[:, 1]).tolist())


@pytest.mark.parametrize("seed", range(3))
def test_images_of_a_run_are_apart(small_sets, seed):
    config = {"data": "mnist", "labels": 100, "valid": 100}
    train, labeled, valid = assisted.split(config, seed)
    assert len(train) == 300 and labeled.labels.bincount().tolist() == [10] * 10
    assert valid.labels.bincount().tolist() == [10] * 10
    assert numbers(labeled).isdisjoint(numbers(valid))
    train, labeled, valid = assisted.split(config | {"labels": "all"}, seed)
    assert labeled is None and (len(train), len(valid)) == (200, 100)
    *_, other = assisted.split(config | {"labels": "all"}, seed + 1)
    assert numbers(valid) != numbers(other)
    assert numbers(train).isdisjoint(numbers(valid))


def test_an_early_stop_is_chosen_on_validation_images():
    rows = [(0.3, 1.0, 0.1, 0.2), (0.2, 0.9, 0.5, 0.9), (0.2, 0.8, 0.4, 0.8), (0.25, 0.1, 0.0, 0.0)]
    names = ("valid_error", "valid_nll", "test_error", "test_nll")
    curve = [dict(zip(names, row)) for row in rows]
    assert assisted.early_stopping_look(curve) is curve[2]


def test_trials_are_chosen_by_their_last_look(tmp_path):
    looks = {  # validation error and NLL, look by look
        "m1-1": [(0.1, 1.0), (0.4, 2.0)],
        "m1-2": [(0.3, 3.0), (0.2, 9.0)],
        "m1-3": [(0.5, 3.0), (0.2, 8.0)],
        "plain-1": [(0.9, 1.0), (0.9, 1.0)],
    }
    for name, curve in looks.items():
        curve = [{"valid_error": error, "valid_nll": nll} for error, nll in curve]
        record = {
            "variant": name,
            "seed": 100,
            "config": {"name": name},
            "result": {"curve": curve},
        }
        path = tmp_path / "tune" / f"{name}-100.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record))
    best = assisted.best_trials(tmp_path, "tune")
    assert best == {"m1": {"name": "m1-3"}, "plain": {"name": "plain-1"}}


def test_disturbances_are_the_same_at_every_call_and_differ_by_batch():
    x = torch.rand(2, 1, 6, 6, generator=generator(0)).repeat(3, 1, 1, 1)
    batches = [Batch(part, torch.arange(2)) for part in x.split(2)]
    for kind in assisted.DISTURBANCES:
        one, other = (list(assisted.disturb_batches(batches, kind)) for _ in range(2))
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a.x, b.x) and torch.equal(a.y, torch.arange(2))
        assert not torch.equal(one[0].x, one[1].x) and not torch.equal(one[0].x, x[:2])
    noise = assisted.add_noise(torch.full((20_000,), 0.5), generator(1))
    assert noise.min() == 0 and noise.max() == 1
    inside = ((noise > 0.2) & (noise < 0.8)).double().mean().item()  # one standard deviation
    assert abs(inside - 0.6827) < 5 * math.sqrt(0.6827 * 0.3173 / 20_000)


class Judge(nn.Module):
    """A classifier whose logits are the means of three rows."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, x):
        """Return the logits, (B, 3)."""
        return self.scale * x.mean(3)[:, 0, :3]


def test_a_final_measurement_is_on_each_kind_of_images():
    scheme, test, outside = Assisted(Judge()), digit_like(301, seed=2), digit_like(20, seed=3)
    found = assisted.measure_final(scheme, test, outside)
    x = test.images / 255
    errors = {"error": (Judge()(x).argmax(1) != test.labels).double().mean().item()}
    for kind, disturb in assisted.DISTURBANCES.items():
        y = Judge()(disturb(x, generator(0))).argmax(1)
        errors[kind] = (y != test.labels).double().mean().item()
    assert len(set(errors.values())) == 3
    for name, error in errors.items():
        assert found[name] == pytest.approx(error, abs=1e-5)
    assert found["n"] == 301 and found["n_outside"] == 20


def test_options_of_an_assisted_run():
    changed = {
        "method": "agreement",
        "hidden": [9, 7],
        "z_dim": 4,
        "units": 6,
        "dropout": 0.3,
        "alpha": 0.7,
        "lr": 0.02,
        "decay": 0.1,
        "weight": 0.6,
        "coupling": {"divergence": "generator", "to": "classifier"},
    }
    train = Images(torch.full((5, 1, 28, 28), 51, dtype=torch.uint8), torch.arange(5))
    scheme = assisted.make_scheme(assisted.ALWAYS | changed, train, train, 10)
    assert scheme.alpha == 0.7 and scheme.weight.value == 0.6 and scheme.labeled is train
    assert (scheme.coupling.kind, scheme.coupling.to) == ("generator", "classifier")
    groups = {k: p.optimizer.param_groups[0] for k, p in scheme.players.items()}
    assert {k: g["weight_decay"] for k, g in groups.items()} == {"classifier": 0.1, "generator": 0}
    assert all(g["lr"] == 0.02 and g["decoupled_weight_decay"] for g in groups.values())
    rates = {m.p for m in scheme.classifier.modules() if isinstance(m, nn.Dropout)}
    assert rates == {0.3} and scheme.generator.q_net.x.out_features == 6
    start = torch.tensor(0.2).logit()
    assert torch.allclose(scheme.generator.p_net.out.bias, start.expand(784), atol=1e-5)
    warm = {"set": "warm-up", "setting": 0.4}
    scheme = assisted.make_scheme(assisted.ALWAYS | changed | warm, train, None, 10)
    assert scheme.weight.steps == 4 and scheme.weight.beta == 0.6


# GANs


def looks_of(records, stopped_at=None):
    """Return looks with these records."""
    looks = Looks(lambda step: None, 1)
    looks.records, looks.stopped_at = records, stopped_at
    return looks


def test_the_result_of_a_mixture():
    keys = ("step", "cpu", "wall", "modes", "share")
    rows = [(100, 1.0, 2.0, 5, 0.4), (200, 2.0, 4.0, 8, 0.7), (300, 3.0, 6.0, 7, 0.9)]
    records = [dict(zip(keys, row)) for row in rows]
    counts, samples = torch.tensor([3.0, 4.0]), torch.tensor([[0.1234, -1.5]])
    found = gans.mixture_result(looks_of(records), 8, counts, samples)
    assert (found["modes"], found["share"], found["diverged"]) == (7, 0.9, None)
    assert found["all_modes"] == {"step": 200, "cpu": 2.0, "wall": 4.0}
    assert found["counts"] == [3, 4] and found["points"] == [[123, -1500]]
    found = gans.mixture_result(looks_of(records, 350), 9, counts, samples)
    assert (found["modes"], found["share"], found["diverged"]) == (0, 0.0, 350)
    assert found["all_modes"] is None and found["points"] is None


class Mean(nn.Module):
    """A generator of images that are one number each, and a judge that returns them."""

    z_dim = 3

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, z):
        """Return images."""
        return self.scale * z.mean(1)[:, None, None, None]

    def features(self, x):
        """Return features."""
        return x.flatten(1)


def test_samples_are_judged_by_their_distance():
    G, n = Mean(), 1200
    real = feature_stats([torch.randn(300, 1, generator=generator(1))])
    sampler = gans.ImageSampler(G, generator(2), G, real)
    rng = generator(2)
    x = torch.cat([G(torch.randn(m, 3, generator=rng)) for m in (500, 500, 200)]).flatten().double()
    expected = (x.mean() - real.mean) ** 2 + (x.std() - real.cov.sqrt()) ** 2
    assert sampler.measure(n) == {"fid": pytest.approx(expected.item(), abs=6e-4)}
    with torch.no_grad():
        G.scale.fill_(math.inf)
    assert sampler.measure(n) is None


class Averages(nn.Module):
    """A judge whose features are the means of the rows of an image."""

    def features(self, x):
        """Return features."""
        return x.mean(-1).flatten(1)


@pytest.mark.parametrize("seed", range(2))
def test_a_run_on_images_measures_the_averaged_generator(seed, monkeypatch):
    parts = {"train": digits("train").subset(torch.arange(300)), "test": digits("test")}
    monkeypatch.setattr(gans, "mnist", lambda split="train": parts[split])
    monkeypatch.setattr(gans, "mnist_classifier", Averages)
    config = {"problem": "mnist", "rule": "alternating", "weight": None, "loss": "hinge"}
    config |= {"lr": 3e-3, "betas": [0.4, 0.9], "batch": 30, "width": 4, "z_dim": 5, "looks": 2}
    config |= {"look": 100, "final": 700, "steps": 5, "decay": 0.6}
    found = gans.run_images(config, seed)

    torch.manual_seed(seed)
    G, D = ConvGenerator((1, 28, 28), 5, 4), ConvDiscriminator((1, 28, 28), 4)
    optimizers = [Adam(net.parameters(), 3e-3, betas=(0.4, 0.9)) for net in (G, D)]
    gan = FeedbackGAN(G, D, "hinge", Alternating(), optimizers)
    noise, mean = torch.Generator().manual_seed(seed + 2_000_000), copy.deepcopy(G)
    real = feature_stats(Loader(parts["test"], 500, shuffle=False), Averages().features)

    def distance(n):
        """Return the distance of samples of the averaged generator, 500 at a time."""
        with torch.no_grad():
            sizes = [min(500, n - i) for i in range(0, n, 500)]
            samples = [mean(torch.randn(size, 5, generator=noise)) for size in sizes]
        return fid(samples, real, Averages().features)

    distances = []
    for t, batch in zip(range(5), Loader(parts["train"], 30, seed=seed, drop_last=True)):
        for optimizer in optimizers:  # constant for half of the run, then linear to 0
            optimizer.param_groups[0]["lr"] = 3e-3 * min(1, 2 * (1 - t / 5))
        gan.step(batch)
        new = max(9 / (t + 1 + 9), 0.4) if t else 1.0
        for p, q in zip(mean.parameters(), G.parameters()):
            p.data.lerp_(q.data, new)
        if t + 1 in (3, 5):
            distances.append(distance(100))
    assert [row[0] for row in found["curve"]] == [3, 5] and found["steps"] == 5
    assert [row[3] for row in found["curve"]] == pytest.approx(distances, rel=1e-3, abs=2e-3)
    assert found["fid"] == pytest.approx(distance(700), rel=1e-3, abs=2e-3)


def test_the_result_of_a_run_on_images():
    records = [{"step": 5, "cpu": 1.0, "wall": 2.0, "fid": 3.0}]
    samples = torch.tensor([[0.0, 0.5, 1.0]])
    found = gans.images_result(looks_of(records), 9, {"fid": 1.5}, samples)
    assert found == {
        "fid": 1.5,
        "diverged": None,
        "steps": 9,
        "curve": [[5, 1.0, 2.0, 3.0]],
        "pixels": bytes([0, 128, 255]).hex(),
    }


# A step of extragradient evaluates both losses twice.
@pytest.mark.parametrize("rule, steps", [("simultaneous", 100), ("extragradient", 50)])
def test_steps_of_equal_cost(rule, steps):
    G, D = MLPGenerator(3, (8,), (1, 2, 2)), MLPDiscriminator((1, 2, 2), (8,))
    config = {"rule": rule, "weight": None, "lr": 1e-3, "betas": [0.5, 0.9], "batch": 4}
    config |= {"budget": 100, "loss": "non-saturating"}
    before = [p.clone() for p in [*G.parameters(), *D.parameters()]]
    assert gans.equal_cost_steps(config, G, D, (1, 2, 2)) == steps
    assert all(map(torch.equal, before, [*G.parameters(), *D.parameters()]))


def test_the_penalties_and_optimizers_of_a_gan():
    G, D = MLPGenerator(3, (8,), (2,)), MLPDiscriminator((2,), (8,))
    config = {"weight": 0.3, "lr": 0.02, "betas": [0.4, 0.8], "loss": "hinge"}
    scheme = gans.make_gan(G, D, config | {"rule": "r1+r2"})
    assert scheme.r1 == scheme.r2 == 0.3
    for player in scheme.players.values():
        (group,) = player.optimizer.param_groups
        assert group["lr"] == 0.02 and tuple(group["betas"]) == (0.4, 0.8)
    scheme = gans.make_gan(G, D, config | {"rule": "consensus"})
    assert scheme.r1 == scheme.r2 == 0 and scheme.rule.weight == 0.3
    scheme = gans.make_gan(G, D, config | {"rule": "negative-momentum", "weight": -0.3})
    assert {p.optimizer.param_groups[0]["momentum"] for p in scheme.players.values()} == {-0.3}


def test_the_best_settings_have_the_largest_score(tmp_path):
    tried = feedback.tried_settings("ring")
    chosen = {}
    for i, (name, setting) in enumerate(tried.items()):
        chosen.setdefault(setting["rule"], []).append(name)
        for seed in (100, 101):
            score = (7 * i % 11) + (0.5 if seed == 100 else 0.3)
            result = {"modes": int(score), "share": score - int(score)}
            record = {"variant": name, "seed": seed, "result": result}
            path = tmp_path / "tune" / f"{name}-{seed}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(record))
    best = feedback.best_settings(tmp_path, "tune")
    order = list(tried)
    for rule, names in chosen.items():
        score = {name: 7 * order.index(name) % 11 for name in names}
        first = next(name for name in names if score[name] == max(score.values()))
        assert best[rule] == tried[first]


# Likelihoods


def by_weight(self, batches, **more):
    """Report numbers that follow from a weight, the images and the options, as an evaluation."""
    x = torch.cat([batch.x for batch in batches])
    value = self.weight.item() + x.mean().item()
    options = {"k": more.get("k", 0), "ode_steps": more.get("ode_steps", 0)}
    return {"nll": value, "nll_se": value / 10, "loss": -1.0, "n": float(len(x)), **options}


class Weighted:
    """A scheme of one weight, evaluated by `by_weight`."""

    evaluate = by_weight

    def __init__(self, module):
        self.weight = module.weight


def test_likelihoods_of_the_weights_and_of_their_average():
    module = nn.Linear(1, 1, bias=False)
    average = Average(module, 0.5)
    with torch.no_grad():
        module.weight.fill_(3.0)
    average.update()  # the first step is the whole average
    with torch.no_grad():
        module.weight.fill_(7.0)
    valid, test = digit_like(600, seed=4), digit_like(20, seed=5)
    found = likelihood.measure(Weighted(module), average, valid, test, None)
    a, b = ((data.images / 255).mean().item() for data in (valid, test))
    expected = {
        "valid": 7 + a,
        "valid_averaged": 3 + a,
        "test": 3 + b,
        "test_se": (3 + b) / 10,
    }
    assert found == pytest.approx(expected, abs=1e-4) and module.weight.item() == 7.0
    black_and_white = likelihood.measure(Weighted(module), average, valid, test, "static")
    assert black_and_white["valid"] != pytest.approx(7 + a, abs=1e-4)
    curve = [{"valid": 1.0, "valid_averaged": 3.0}, {"valid": 5.0, "valid_averaged": 2.0}]
    assert likelihood.best_look(curve) is curve[1]


def test_numbers_of_the_first_examples():
    module = nn.Linear(1, 1, bias=False)
    data = digit_like(250, seed=6)
    found = elbo.measure_rounded(Weighted(module), data, 120, 9)
    mean = (data.images[:120] / 255).mean().item()
    nll = pytest.approx(module.weight.item() + mean, abs=1e-4)
    assert found.pop("nll") == nll and found.pop("nll_se") == pytest.approx(
        nll.expected / 10, abs=1e-4
    )
    assert found == {"n": 120.0, "k": 9, "ode_steps": 0}
    assert elbo.measure_rounded(Weighted(module), data, 900, 1)["n"] == 250


def test_the_samples_of_an_epoch():
    steps = [[0, 1], [2, 5], [4, 50]]
    found = [elbo.samples_in_epoch(epoch, steps) for epoch in (0, 1.9, 2, 3.5, 4, 9)]
    assert found == [1, 1, 5, 5, 50, 50] and elbo.samples_in_epoch(3, 8) == 8


def test_the_truth_and_its_error(monkeypatch):
    log_p = torch.randn(40, generator=generator(0), dtype=torch.float64)
    asked = []

    class Source:
        """A source whose likelihoods are known."""

        def __init__(self, **more):
            pass

        def log_marginal(self, x):
            """Return the likelihoods."""
            asked.append(x)
            return log_p[: len(x)]

    monkeypatch.setattr(elbo, "SyntheticSequences", Source)
    found = elbo.run_truth({"n": 30}, 0)
    assert torch.equal(asked[0], elbo.synthetic_sequences("test").images[:30])
    assert found["nll"] == pytest.approx(-log_p[:30].mean().item())
    assert found["se"] == pytest.approx(log_p[:30].std().item() / math.sqrt(30))


def test_the_likeliest_trial_of_each_variant(tmp_path):
    for i, (variant, nlls) in enumerate(
        [("a", (3.0, 9.0)), ("a", (8.0, 4.0)), ("b", (1.0, 7.0)), ("b", (2.0, 6.0))]
    ):
        record = {
            "variant": f"{variant}{i}",
            "seed": 100,
            "config": {"variant": variant, "trial": i},
            "result": {"curve": [{"nll": nll} for nll in nlls]},
        }
        write_json(tmp_path / "tune" / f"{i}-100.json", record)
    best = elbo.best_of_each(tmp_path, "tune")
    assert {variant: config["trial"] for variant, config in best.items()} == {"a": 1, "b": 3}


# Benchmarks


def known_times(monkeypatch, module, ms):
    """Replace the timer of a module by times that are known."""
    monkeypatch.setattr(module, "median_ms", lambda steps, *args, **more: {k: ms[k] for k in steps})


def test_speeds_of_ranks(monkeypatch):
    times = iter([100.0, 150.0, 260.0])
    monkeypatch.setattr(bench_scaling, "launch_steps", lambda *args: next(times))
    found = bench_scaling.bench_scaling(ranks=(1, 2, 4))
    assert found["images_per_second"] == {1: 100.0, 2: 150.0, 4: 260.0}
    assert found["speedup"] == pytest.approx({1: 1.0, 2: 1.5, 4: 2.6})


def test_ratios_of_optimizers_and_overheads(monkeypatch):
    ms = {"ours": 3.0, "torch": 4.0, "default": 1.0, "fused": 2.0}
    known_times(monkeypatch, bench_optimizers, ms)
    rows = bench_optimizers.bench_optimizers(1, elements=60, tensors=6)
    lists = {"ours_ms": 3.0, "torch_ms": 4.0, "ratio": 0.75}
    for name, row in rows.items():
        fused = (
            {} if "RMSProp" in name else {"default_ms": 1.0, "fused_ms": 2.0, "fused_ratio": 0.5}
        )
        assert row == lists | fused
    known_times(monkeypatch, bench_assisted, {"scheme": 6.0, "hand": 5.0})
    monkeypatch.setattr(bench_assisted, "LOSSES", {"plain": bench_assisted.LOSSES["plain"]})
    (row,) = bench_assisted.bench_assisted(1)["methods"].values()
    assert row["overhead"] == pytest.approx(0.2) and (row["ms"], row["passes_ms"]) == (6.0, 5.0)
    assert row["images_per_second"] == pytest.approx(bench_assisted.BATCH / 6e-3)


def known_epochs(monkeypatch, **seconds):
    """Replace the processes of the epochs by known times."""

    def run_module(module, variant, data):
        """Return a row whose time is known."""
        return {"seconds": seconds[variant], "images_per_second": 9.0, "share": 0.5}

    monkeypatch.setattr(bench_epochs, "run_module", run_module)
    monkeypatch.setattr(bench_epochs, "load", lambda name: digit_like(30))
    monkeypatch.setattr(bench_epochs, "relative_speed", lambda data: len(data) / 10)


def test_speed_ups_of_epochs(monkeypatch):
    seconds = {name: k + 1.0 for k, name in enumerate(VARIANTS)}
    known_epochs(monkeypatch, **seconds)
    monkeypatch.setattr(bench_epochs.importlib.util, "find_spec", lambda name: True)
    found = bench_epochs.bench_epochs("digits")
    assert found["variants"].keys() == seconds.keys() and found["images"] == 30
    for base in ("article", "pythae", "plain"):
        expected = {name: seconds[base] / s for name, s in seconds.items()}
        assert found[f"times_{base}"] == pytest.approx(expected)
    assert found["fit_of_plain"] == 1.0  # on a third of the images


def test_epochs_without_pythae(monkeypatch):
    known_epochs(monkeypatch, **dict.fromkeys(VARIANTS, 2.0))
    monkeypatch.setattr(bench_epochs.importlib.util, "find_spec", lambda name: None)
    found = bench_epochs.bench_epochs("digits")
    assert "pythae" not in found["variants"] and "times_pythae" not in found
    found["variants"] = {name: row | {"peak_mib": 1.0} for name, row in found["variants"].items()}
    assert not any("pythae" in line for line in bench_epochs.format_epochs(found))


@pytest.mark.parametrize("images", [2000, 1950])
def test_the_share_of_the_products_in_an_epoch(monkeypatch, images):
    """Twenty steps, of which two are products of 0.5 s before and 0.7 s after an epoch of 8 s."""
    products, data = [0.5, 0.7], digit_like(images)
    monkeypatch.setattr(bench_epochs, "take_products", lambda products, steps: steps)
    monkeypatch.setattr(bench_epochs, "take_first", lambda *args, **more: data)
    monkeypatch.setitem(bench_epochs.VARIANTS, "fit", lambda: lambda data: Nothing())

    def time_once(function):
        """Return the next time of the products, or that of the epoch."""
        if isinstance(function, Nothing):
            return 8.0
        assert function() == 2
        return products.pop(0)

    monkeypatch.setattr(bench_epochs, "time_once", time_once)
    found = bench_epochs.measure_epoch("fit", data)
    assert found["seconds"] == 8.0 and found["images_per_second"] == images / 8
    assert found["share"] == pytest.approx(0.6 * 10 / 8)


class Nothing:
    """An epoch that does nothing."""

    def __call__(self):
        """Do nothing."""


def test_speeds_over_many_epochs(monkeypatch):
    times = iter([3.0, 4.0, 6.0])
    monkeypatch.setattr(bench_epochs, "load", lambda name: digit_like(60))
    monkeypatch.setattr(bench_epochs, "fit_variant", lambda: lambda data: Nothing())
    monkeypatch.setattr(bench_epochs, "time_once", lambda function: next(times))
    turns = {"trained": [2.0, 4.0, 5.0], "new": [1.0, 4.0, 4.0]}
    monkeypatch.setattr(bench_epochs, "alternate", lambda steps, rounds, warmup: turns)
    found = bench_epochs.bench_endurance("digits", epochs=3)
    assert found["images_per_second"] == [20.0, 15.0, 10.0] and found["last_over_first"] == 0.5
    assert found["trained_over_new"] == pytest.approx(0.8)


def test_speeds_beside_bare_loops(monkeypatch):
    turns = {"fit": [2.0, 4.0, 5.0], "bare": [1.0, 4.0, 4.0]}
    monkeypatch.setattr(bench_loops, "alternate", lambda steps, rounds, warmup: turns)
    monkeypatch.setattr(bench_loops, "make_epochs", lambda name, data, images: name)
    found = bench_loops.compare_loops("gan", digit_like(30))
    assert found["fit_seconds"] == found["bare_seconds"] == 4.0 and found["images"] == 30
    assert found["speed"] == pytest.approx(0.8)


def test_steps_beside_another_library(monkeypatch):
    turns = {"fit": [2.0, 4.0, 6.0], "library": [3.0, 8.0, 9.0]}
    monkeypatch.setattr(bench_loops, "alternate", lambda steps, rounds, warmup: turns)
    for name in ("our_epoch", "library_epoch"):
        monkeypatch.setattr(bench_loops, name, lambda *args: args)
    found = bench_loops.compare_ddpm(digit_like(3), steps=4)
    assert found == {"fit_ms": 1000.0, "library_ms": 2000.0, "speedup": 1.5}


def test_overheads_of_rules_are_beside_their_passes(monkeypatch):
    names = ("simultaneous", "alternating", "consensus")
    ms = {"hand": 5.0, "simultaneous": 4.0, "alternating": 6.0, "consensus": 10.0}
    flops = {"simultaneous": 100, "alternating": 120, "consensus": 200}
    known_times(monkeypatch, bench_rules, ms)
    monkeypatch.setattr(bench_rules, "seeded_game", NamedGame)
    monkeypatch.setattr(bench_rules, "step_flops", lambda game, batch: flops[game.name])
    monkeypatch.setattr(bench_rules, "run_module", length_of_names)
    found = bench_rules.bench_rules(1, names)
    assert found["alternating_over_hand"] == pytest.approx(1.2) and found["hand_ms"] == 5.0
    rows = {
        "simultaneous": {"ms": 4.0, "passes": 1.0, "overhead": 0.0, "peak_mib": 12},
        "alternating": {"ms": 6.0, "passes": 1.2, "overhead": 0.25, "peak_mib": 11},
        "consensus": {"ms": 10.0, "passes": 2.0, "overhead": 0.25, "peak_mib": 9},
    }
    assert found["rules"].keys() == rows.keys()
    for name, row in rows.items():
        assert found["rules"][name] == pytest.approx(row), name


def length_of_names(module, *names):
    """Return the length of each name, for its memory."""
    return {name: len(name) for name in names}


class NamedGame:
    """A game that knows its rule's name and does nothing."""

    def __init__(self, name):
        self.name = name

    def step(self, batch):
        """Do nothing."""


def test_ratios_of_a_vae(monkeypatch):
    batch = Batch(torch.zeros(4, 1, 28, 28))
    ms = dict.fromkeys(bench_elbo.BENCHED_CONTROLLERS, 6.0) | {"hand": 2.0, "plain": 4.0}
    known_times(monkeypatch, bench_elbo, ms)
    found = bench_elbo.bench_controllers(batch, 1)
    assert found["plain_ms"] == 4.0 and found["plain_over_hand"] == 2.0
    assert set(found["controllers"].values()) == {1.5}
    known_times(monkeypatch, bench_elbo, dict.fromkeys(bench_elbo.BOUNDS, 6.0) | {"hand": 4.0})
    found = bench_elbo.bench_bounds(batch, 1)
    assert found["passes_ms"] == 4.0 and set(found["bounds"].values()) == {1.5}
    modes = dict.fromkeys(bench_elbo.DECODER_PASSES, 13.0) | {"plain": 5.0, "optimizer": 1.0}
    known_times(monkeypatch, bench_elbo, modes)
    monkeypatch.setattr(bench_elbo, "vae_scheme", PricedScheme)
    monkeypatch.setattr(bench_elbo, "step_flops", lambda scheme, batch: scheme.flops)
    found = bench_elbo.bench_inner(batch, 1)
    assert found["optimizer_ms"] == 1.0
    for row in found["semi"].values():  # three times the time beside the optimizer's, two passes
        assert row == pytest.approx({"ms": 13.0, "passes": 2.0, "overhead": 0.5})


class PricedScheme:
    """A scheme that costs twice as much with inner steps."""

    def __init__(self, inner=None):
        self.flops = 200 if inner else 100
        self.players = {"model": self}
        self.optimizer = self

    def step(self, batch=None):
        """Do nothing."""


def test_times_of_generative_models(monkeypatch):
    assert bench_generative.add_speeds({"a": 20.0}, 50) == {
        "a": {"ms": 20.0, "images_per_second": 2500.0}
    }
    known_times(monkeypatch, bench_generative, {"step": 8.0, "update": 2.0})
    found = bench_generative.bench_averaging(1, shape=(1, 8, 8))
    assert found == {"step_ms": 8.0, "update_ms": 2.0, "share": 0.25}
    times = {"kept 2": 4.0, "kept 4": 8.0, "not kept 2": 12.0}
    known_times(monkeypatch, bench_generative, times)
    found = bench_generative.bench_pixel(1, sides=(2, 4), n=2)
    assert found == {"kept": {2: 1000.0, 4: 500.0}, "not kept": {2: 3000.0}}
    names = bench_generative.PIXEL_MODELS
    times = {f"{name} cached": 2.0 + k for k, name in enumerate(names)}
    known_times(monkeypatch, bench_generative, times | {f"{name} passes": 12.0 for name in names})
    found = bench_generative.bench_caches(1, n=2, shape=(1, 4, 4))
    rows = [tuple(row.values()) for row in found.values()]
    assert rows == [(2.0, 12.0, 6.0), (3.0, 12.0, 4.0), (4.0, 12.0, 3.0)]
    assert [line.split()[-2:] for line in bench_generative.format_caches(found)[1:]] == [
        ["6.0", "x"],
        ["4.0", "x"],
        ["3.0", "x"],
    ]


def test_without_its_cache_a_model_passes_over_the_image_at_each_pixel(monkeypatch):
    model = bench_generative.seeded_scheme("pixelcnn", (1, 2, 3)).model
    passes, logits = [], model.logits
    monkeypatch.setattr(model, "logits", lambda x: passes.append(len(x)) or logits(x))
    model.sample(4)
    assert not passes
    forgetful = bench_generative.without_cache(model)
    forgetful.sample(4)
    assert passes == [4] * 6


VARIANTS = list(bench_epochs.VARIANTS)


def test_the_speed_of_fit_over_the_plain_loop(monkeypatch):
    times = {"plain": [2.0, 4.0, 5.0], "fit": [3.0, 5.0, 5.0]}
    monkeypatch.setattr(bench_epochs, "alternate", lambda steps, rounds, warmup: times)
    assert bench_epochs.relative_speed(digit_like(30), 3) == pytest.approx(0.8)
