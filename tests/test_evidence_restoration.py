"""The evidence of restoration: tasks, measures and wiring, against formulas written here."""

from types import SimpleNamespace

import pytest
import torch

from optgen.data.images import DataError
from optgen.data.loading import split_holdout
from optgen.evidence import restoration as page
from optgen.evidence.reproduce import tasks_of
from optgen.guidance.operators import Downsample, Observation
from optgen.guidance.restoration import Restored
from optgen.guidance.rules import Moments
from optgen.models.mixture import GaussianMixture
from optgen.models.vae import VAE
from optgen.testing import generator


@pytest.fixture(autouse=True)
def _needs_mnist():
    """Skip where MNIST is missing."""
    try:
        page.mnist("test")
    except DataError:
        pytest.skip("MNIST is not here: set OPTGEN_DATA to where it is")


@pytest.mark.parametrize("seed", [1, 3])
def test_tasks_observe_what_the_plan_says(seed):
    x = torch.rand(2, 1, 28, 28, generator=generator(seed))
    observed = {task: page.build_task(task, seed)[0].apply(x) for task in page.TASKS}
    rows, columns = torch.meshgrid(torch.arange(28), torch.arange(28), indexing="ij")
    center = (rows >= 7) & (rows < 21) & (columns >= 7) & (columns < 21)
    assert torch.equal(observed["center"], x[:, 0][:, ~center])
    assert torch.equal(observed["half"], x[:, 0, :14].flatten(1))
    assert observed["pixels"].shape == (2, 78)
    known = page.build_task("pixels", seed)[0].index
    assert len(known.unique()) == 78 and torch.equal(observed["pixels"], x.flatten(1)[:, known])
    assert not torch.equal(known, page.build_task("pixels", seed + 1)[0].index)
    assert observed["smaller"].shape == (2, 1, 7, 7) and observed["blur"].shape == x.shape
    for task in page.TASKS:
        operator, noise = page.build_task(task, seed)
        if not task.startswith("sums"):
            assert noise == 0.05
            continue
        count = int(task[4:])
        assert noise == pytest.approx(0.1 / count**0.5) and observed[task].shape == (2, count)
        weights = operator.matrix(x)
        assert weights.std().item() == pytest.approx(count**-0.5, rel=0.05)


def test_seeds_have_their_own_test_images(monkeypatch):
    seen = [page.held_out_images("mnist", seed, 5) for seed in (1, 2, 3)]
    assert len(torch.cat(seen).flatten(1).unique(dim=0)) == 15
    order = torch.randperm(10_000, generator=torch.Generator().manual_seed(0))
    test = page.mnist("test").images
    assert torch.equal(seen[1][0, 0], test[order[5]].view(28, 28).float() / 255)


def test_the_error_of_the_mean_is_unbiased():
    rng, n = generator(1), 4000
    x = torch.randn(n, 6, generator=rng, dtype=torch.float64)
    mean = torch.randn(n, 6, generator=rng, dtype=torch.float64)
    samples = mean + 2 * torch.randn(3, n, 6, generator=rng, dtype=torch.float64)
    exact = (x - mean).square().mean(1)
    found = page.mean_square_errors(x, page.RestoredImages(samples=samples))
    excess = found - exact
    assert excess.mean().abs() < 4 * excess.std() / n**0.5
    assert ((x - samples.mean(0)).square().mean(1) - exact).mean() > 1  # The naive one is not.
    direct = page.mean_square_errors(x, page.RestoredImages(mean, samples))
    assert torch.allclose(direct, exact)


def test_ranks_count_what_lies_below_the_truth():
    x = torch.tensor([[0.5, 0.0, 1.0]])
    samples = torch.tensor([[[0.0, 0.25, 0.0]], [[0.25, 0.5, 0.5]], [[1.0, 1.0, 0.25]]])
    assert page.rank_counts(x, samples, generator(1)) == [1, 0, 1, 1]
    same = torch.full((3, 1, 8000), 0.5)
    counts = torch.tensor(page.rank_counts(same[0], same, generator(2)), dtype=torch.float64)
    assert ((counts - 2000).abs() < 4 * (8000 * 3 / 16) ** 0.5).all()
    near = torch.full((2, 1, 50), 0.01)  # Less than a sixteenth apart is equal.
    counts = page.rank_counts(torch.zeros(1, 50), near, generator(3))
    assert min(counts) > 0


def test_measures_are_those_of_the_samples():
    rng = generator(4)
    operator = Downsample((1, 28, 28), 4)
    x = torch.rand(3, 1, 28, 28, generator=rng)
    seen = Observation(operator, torch.rand(3, 1, 7, 7, generator=rng), 0.2)
    samples = 2 * torch.rand(2, 3, 1, 28, 28, generator=rng) - 0.5
    found = page.measure(x, seen, page.RestoredImages(samples.mean(0).clamp(0, 1), samples), 1)
    inside = samples.clamp(0, 1)
    assert found["single"] == pytest.approx((inside - x).square().mean().item(), abs=1e-6)
    squares = (operator.apply(samples.flatten(0, 1)) - seen.observed.repeat(2, 1, 1, 1)).square()
    assert found["residual"] == pytest.approx(squares.mean().sqrt().item() / 0.2, abs=1e-3)
    assert sum(found["ranks"]) == 3 * 784
    exact = (samples.mean(0).clamp(0, 1) - x).square().mean((1, 2, 3))
    assert found["errors"] == pytest.approx(exact.tolist(), abs=1e-6)
    assert page.measure(x, seen, page.RestoredImages(x), 1) == {"errors": [0.0, 0.0, 0.0]}


def test_an_exact_posterior_is_that_of_the_gaussian():
    rng = generator(5)
    root = torch.randn(784, 784, generator=rng, dtype=torch.float64) / 28
    C = 0.05 * root @ root.T + 0.01 * torch.eye(784).double()
    prior = GaussianMixture(torch.ones(1).double(), torch.full((1, 784), 0.4).double(), C[None])
    operator, noise = page.build_task("sums25", 1)
    A = operator.weights.double()
    seen = Observation(operator, torch.randn(2, 25, generator=rng, dtype=torch.float64), noise)
    found = page.restore_exactly(prior, seen, 400, generator(6))
    S = A @ C @ A.T + noise**2 * torch.eye(25).double()
    mean = 0.4 + (seen.observed - 0.4 * A.sum(1)) @ torch.linalg.solve(S, A @ C)
    assert torch.allclose(found.mean.flatten(1), mean.clamp(0, 1), atol=1e-6)
    error = found.samples.mean(0).flatten(1) - mean
    assert (error.abs() < 6 * (C.diagonal() / 400).sqrt()).all()
    assert found.samples.min() < 0  # They are not limited.


def test_the_weight_of_the_latent_search_is_the_best_on_held_out_training_images(monkeypatch):
    asked = []

    def search(model, seen, weight, generator):
        "Return images that are best at a weight of 3."
        asked.append((weight, seen.observed))
        valid = split_holdout(page.mnist("train"))[1]
        return page.as_pixels(valid, torch.arange(4)) + abs(weight - 3)

    monkeypatch.setattr(page, "latent_search", search)
    assert page.best_weight(VAE(784, 4, 4, 2), "mnist", "half", 1, 4) == 3.0
    assert [weight for weight, _ in asked] == list(page.WEIGHTS)
    assert all(torch.equal(seen, asked[0][1]) for _, seen in asked)


def test_a_run_restores_its_images_and_notes_what_it_should(monkeypatch):
    calls = []

    def estimate(config, task, observation, seed):
        "Return the truth, and samples around it."
        calls.append((task, observation))
        x = page.held_out_images("mnist", seed, 4)
        noisy = x + 0.1 * torch.randn(3, *x.shape, generator=generator(1))
        return page.RestoredImages(samples=noisy), {"note": 1}

    monkeypatch.setattr(page, "estimate", estimate)
    config = {"data": "mnist", "images": 4, "samples": 3, "prior": "x", "tasks": ["half", "sums50"]}
    found = page.run_restoration(config, 2)
    assert list(found) == ["half", "sums50"] == [task for task, _ in calls]
    x = page.held_out_images("mnist", 2, 4)
    for task, seen in calls:
        operator, noise = page.build_task(task, 2)
        rest = (seen.observed - operator.apply(x)) / noise
        assert rest.std().item() == pytest.approx(1, abs=0.2) and seen.noise == noise
        measured = found[task]
        assert {"errors", "single", "residual", "ranks", "note", "seconds"} <= set(measured)
        assert measured["single"] == pytest.approx(0.007, abs=0.003)  # Half of it is limited.
        assert measured["class_of_mean"] == measured["class_of_sample"] == 1.0


def test_the_plan_has_all_priors_tasks_and_seeds(tmp_path):
    for name in page.STAGES:
        tasks = tasks_of(page.experiment(name, tmp_path), tmp_path)
        done = {(t.config["prior"], task, t.seed) for t in tasks for task in t.config["tasks"]}
        assert done == {(p, t, s) for p in page.PRIORS for t in page.TASKS for s in page.SEEDS}
        assert {t.config["data"] for t in tasks} == {name}
        assert {t.config["images"] for t in tasks} == {100}


def test_a_missing_prior_is_named_with_its_command(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    page.open_prior.cache_clear()
    with pytest.raises(FileNotFoundError, match="optgen train ddpm --data mnist"):
        page.open_prior("mnist")


def test_each_prior_restores_as_the_plan_says(monkeypatch):
    operator, noise = page.build_task("half", 1)
    seen = Observation(operator, torch.rand(2, 392, generator=generator(7)), noise)
    calls = {}

    def restored(scheme, observed, operator, noise, **options):
        "Note the call of `restore`, and whether it is under autocast."
        calls["restore"] = (scheme, observed, operator, noise, options)
        calls["autocast"] = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        return Restored(torch.ones(3, 2, 1, 28, 28), torch.ones(3, 2))

    def searched(model, observation, weight, generator):
        "Note the call of `latent_search`."
        calls["search"] = (model, observation, weight)
        return torch.zeros(2, 1, 28, 28)

    records = [
        {"valid": {"loss": 0.5}, "seconds": 1800.0},
        {"valid": {"loss": 0.25}, "seconds": 1800.0},
    ]
    run = SimpleNamespace(scheme="scheme", records=records)
    monkeypatch.setattr(page, "open_prior", lambda data: run)
    monkeypatch.setattr(page, "restore", restored)
    monkeypatch.setattr(page, "latent_search", searched)
    monkeypatch.setattr(page, "train_vae", lambda data, seed: (data, seed))
    monkeypatch.setattr(
        page, "best_weight", lambda model, data, task, seed, count: (task, seed, count)
    )
    variants = page.experiment("mnist", ".").variants
    found, notes = page.estimate(variants["diffusion-half"], "half", seen, 2)
    scheme, observed, used, deviation, options = calls["restore"]
    assert (scheme, used, deviation) == ("scheme", operator, noise)
    assert torch.equal(observed, seen.observed) and calls["autocast"] == (True, torch.bfloat16)
    assert options["sampler"] == "ancestral" and options["steps"] == 30
    assert options["samples"] == 3 and type(options["rule"]) is Moments
    assert options["rule"].steps == 3 and found.mean is None and len(found.samples) == 3
    assert notes == {"trained": {"epochs": 2, "loss": 0.25, "hours": 1.0}}
    found, notes = page.estimate(variants["vae"], "half", seen, 3)
    assert calls["search"] == (("mnist", 3), seen, ("half", 3, 100))
    assert notes == {"weight": ("half", 3, 100)} and found.samples is None
    exact = []
    monkeypatch.setattr(page, "fit_exact", lambda *given: exact.append(given) or "prior")
    monkeypatch.setattr(page, "restore_exactly", lambda *given: given[:3])
    assert page.estimate(variants["mixture"], "half", seen, 2)[0] == ("prior", seen, 3)
    assert exact == [("mnist", "mixture", 2)]


def test_exact_priors_learn_from_training_images_alone(monkeypatch):
    fits = []
    monkeypatch.setattr(page, "fit_mixture", lambda x, k, seed: fits.append((x, k, seed)))
    page.fit_exact.__wrapped__("mnist", "mixture", 2)
    page.fit_exact.__wrapped__("mnist", "gaussian", 3)
    (x, k, seed), (other, one, _) = fits
    assert (k, one, seed) == (30, 1, 2) and x.shape == (20_000, 1, 28, 28)
    assert not torch.equal(x, other)
    valid = page.as_pixels(split_holdout(page.mnist("train"))[1], torch.arange(200)).flatten(1)
    assert torch.cdist(valid, x[:4000].flatten(1)).min() > 0
