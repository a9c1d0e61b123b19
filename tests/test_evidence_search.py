"""The evidence of searches: targets, budgets and weights, against formulas written here."""

import numpy as np
import pytest
import torch

from optgen.evidence import search as page
from optgen.testing import generator

ioh = pytest.importorskip("ioh")
pytest.importorskip("cma")


def exact_share(precision):
    "Return the share of 51 targets from 1e2 to 1e-8 that a precision has reached."
    return sum(precision <= 10 ** (2 - 0.2 * k) * (1 + 1e-12) for k in range(51)) / 51


@pytest.mark.parametrize("function", [1, 8, 21])
def test_a_problem_keeps_the_best_precision_after_each_evaluation(function):
    problem = page.CountedProblem(function, 3, 4)
    direct = ioh.get_problem(function, instance=3, dimension=4, problem_class=ioh.ProblemClass.BBOB)
    batches = [torch.rand(n, 4, generator=generator(n), dtype=torch.float64) for n in (5, 1, 8)]
    values = []
    for x in batches:
        found = problem(x)
        values += [direct(row.numpy()) for row in x]
        assert np.allclose(found, values[-len(x) :])
    assert problem.of_one(batches[0][0].numpy()) == pytest.approx(values[0])
    assert problem.evaluations == 15
    best = [min(values[: n + 1]) - direct.optimum.y for n in range(14)]
    assert np.allclose(np.concatenate(problem.precisions)[:14], best)
    assert problem.shares((1, 6, 99)) == pytest.approx(
        [exact_share(best[0]), exact_share(best[5]), exact_share(best[-1])]
    )
    assert not problem.is_solved()
    problem(torch.tensor(direct.optimum.x)[None])
    assert problem.is_solved() is True and problem.shares((99,)) == [1.0]


@pytest.mark.parametrize("method", page.METHODS)
def test_no_method_exceeds_its_budget_or_leaves_the_box_of_the_plan(method, monkeypatch):
    seen = []

    class Spy(page.CountedProblem):
        "A problem that notes itself and its points."

        def __init__(self, *args):
            super().__init__(*args)
            self.points = []
            seen.append(self)

        def __call__(self, x):
            "Return the values, and note the points."
            self.points.append(x)
            return super().__call__(x)

    monkeypatch.setattr(page, "CountedProblem", Spy)
    row = page.run_method(method, 3, 22, 2)
    limits = (150, 300, 3000) if method.startswith("evolution") else (3000,)
    assert len(seen) == len(limits) and len(row) == 3
    for problem, limit in zip(seen, limits):
        most = 1.1 * limit if method == "cma" else limit  # It completes its last batch.
        assert 0.8 * limit < problem.evaluations <= most or problem.is_solved()
        if method not in ("cma", "cem", "ours-open"):
            assert torch.cat(problem.points).abs().max() <= 5
    if len(limits) == 1:
        assert row == seen[0].shares((150, 300, 3000))
    else:
        assert row == [problem.shares((limit,))[0] for problem, limit in zip(seen, limits)]


def test_weights_are_those_of_the_plan():
    values = torch.tensor([1.0, 2.0, 4.0, torch.inf], dtype=torch.float64)
    T = 0.5 * values[:3].std()
    expected = (-values[:3] / T).exp()
    found = page.weights_by_deviation(0.5)(values)
    assert torch.allclose(found[:3], expected / expected.sum()) and found[3] == 0
    assert torch.allclose(found, page.weights_by_deviation(0.5)(3 * values + 100))


def test_a_run_has_a_row_for_each_function_and_depends_on_its_instance():
    config = {"method": "ours", "dim": 2, "functions": [1, 5]}
    one, again, other = (page.run_search(config, seed)["shares"] for seed in (1, 1, 2))
    assert one == again != other and [len(row) for row in one] == [3, 3]
    assert one == [
        [round(s, 4) for s in page.run_method("ours", 2, f, 1)] for f in config["functions"]
    ]


def test_the_plan_is_that_of_the_page():
    assert set(page.STAGES) == {"d2", "d5", "d10", "d20"}
    for name in page.STAGES:
        runs = page.experiment(name, "nowhere")
        assert runs.seeds == tuple(range(1, 16)) and set(runs.variants) == set(page.METHODS)
        for method, config in runs.variants.items():
            assert config == {"method": method, "dim": int(name[1:]), "functions": [*range(1, 25)]}


def test_shares_are_those_after_so_many_evaluations():
    problem = page.CountedProblem(1, 1, 2)
    problem.precisions = [np.array([50.0, 1.0, 1e-3]), np.array([1e-9])]
    exact = [exact_share(p) for p in (50.0, 1.0, 1e-3, 1e-9, 1e-9)]
    assert problem.shares((1, 2, 3, 4, 9)) == pytest.approx(exact)


def test_runs_without_bounds_start_anew_with_twice_the_population(monkeypatch):
    made = []

    class Short(page.CmaEs):
        "A search that ends after two batches."

        def __init__(self, x0, sigma, size, seed):
            super().__init__(x0, sigma, size, seed=seed)
            made.append((x0, sigma, size, seed))

        def stop_reason(self):
            "Return a reason after two batches."
            return "short" if self.generation == 2 else None

    monkeypatch.setattr(page, "CmaEs", Short)
    problem = page.CountedProblem(22, 1, 3)
    page.run_open(problem, 3, 500, seed=9)
    starts, sigmas, sizes, seeds = zip(*made)
    assert sizes == (7, 14, 28, 56, 112) and set(sigmas) == {2.0}
    assert len(set(seeds)) == 5 and problem.evaluations <= 500
    assert len({tuple(x.tolist()) for x in starts}) == 5
    assert torch.stack(starts).abs().max() <= 5


@pytest.mark.parametrize(
    "kind, noise, temperature, corrected",
    [("own", 0.1, 1.0, False), ("published", 1.0, 0.05, False), ("corrected", 1.0, 0.05, True)],
)
def test_diffusion_evolution_has_the_settings_of_the_plan(kind, noise, temperature, corrected):
    values = torch.tensor([0.0, 0.1, 0.4], dtype=torch.float64)
    for budget, steps in ((150, 25), (300, 25), (3000, 100)):
        search = page.search_once(f"evolution-{kind}", 3, budget, 1)
        assert (search.noise, search.corrected, search.steps) == (noise, corrected, steps)
        assert search.population_size == budget // steps
        expected = page.weights_by_deviation(temperature)(values)
        assert torch.equal(search.weights(values), expected)
