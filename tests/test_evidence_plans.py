"""Plans, corrected comparisons, and runs that go on after an interruption."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from scipy import stats

from optgen.averaging import averages_of
from optgen.data.images import Batch, digits
from optgen.data.loading import Loader
from optgen.evidence import denoising, formula
from optgen.evidence.plans import holm, paired_p, plan_table, read_plan
from optgen.evidence.reproduce import Experiment, ReproduceError, perform, reproduce, tasks_of
from optgen.evidence.saved import SavedRun, Spent, spent_before
from optgen.models.diffusion import ddim
from optgen.models.gan import MLPDiscriminator, MLPGenerator
from optgen.models.schedules import CosineSchedule, LogNormalSchedule
from optgen.schemes.feedback import FeedbackGAN
from optgen.testing import generator
from optgen.training import checkpoint
from optgen.training.callbacks import watch_training

RESULTS = Path(__file__).resolve().parent.parent / "nbs" / "90_evidence" / "results"


@pytest.mark.parametrize("seed", range(3))
def test_the_p_value_is_scipys_of_two_paired_samples(seed):
    a, b = torch.randn(2, 7, generator=generator(seed), dtype=torch.float64).tolist()
    found = paired_p([x - y for x, y in zip(a, b)])
    assert abs(found - stats.ttest_rel(a, b).pvalue) < 1e-12
    assert paired_p([1.0, 1.0]) == 0 and paired_p([0.0, 0.0, 0.0]) == 1


@pytest.mark.parametrize("seed", range(3))
def test_holms_correction_is_the_closed_test(seed):
    p = dict(enumerate((0.2 * torch.rand(5, generator=generator(seed))).tolist()))
    corrected = holm(p)
    assert list(corrected) == list(p)
    for name in p:
        sets = [s for n in range(1, 6) for s in itertools.combinations(p, n) if name in s]
        closed = max(min(p[i] for i in s) * len(s) for s in sets)
        assert abs(corrected[name] - min(1, closed)) < 1e-6


def test_a_plan_beside_what_was_done(tmp_path):
    planned = {"runs": 4, "seeds": [0, 1], "budget": "b", "core_hours": 2}
    plan = {"experiments": {"a": planned, "later": {**planned, "budget": "c"}}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "a").mkdir()
    for seed, outcome in enumerate(({"result": {}}, {"error": {}})):
        record = {"variant": "v", "seed": seed, "cpu_seconds": 900} | outcome
        (tmp_path / "a" / f"v-{seed}.json").write_text(json.dumps(record))
    *_, begun, later = plan_table(read_plan(tmp_path / "plan.json"), tmp_path).splitlines()
    assert begun == "| a | b | 1 of 4 | 1 of 2 | 2 | 0.25 |"
    assert later == "| later | c | 0 of 4 | 0 of 2 | 2 | 0.00 |"
    with pytest.raises(FileNotFoundError, match="no results in .*elsewhere: run an experiment"):
        plan_table(plan, tmp_path / "elsewhere")


class Killed(Exception):
    """The end of a process."""


def train(path, seed, kill_at=None, config=None, start=None):
    """Return the looks, the weights and averages of a small GAN, and how often it was looked at."""
    start = seed if start is None else start
    torch.manual_seed(start)
    G = MLPGenerator(4, (8,), (1, 28, 28), "sigmoid")
    gan = FeedbackGAN(G, MLPDiscriminator((1, 28, 28), (8,)))
    gan.averages = averages_of(gan)
    noise, loader = generator(start), Loader(digits().subset(torch.arange(70)), 20, seed=seed)
    looked = []

    def look(step):
        looked.append(step)
        if step == kill_at:
            raise Killed
        return {"mean": G(torch.randn(5, 4, generator=noise)).mean().item()}

    saved = SavedRun(path, config or {"a": 1}, seed, loader, {"noise": noise}, every=0.0)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    factor = lambda step: 1 / (1 + step)  # noqa: E731
    options = dict(steps=11, every=2, lr_factor=factor, callbacks=[saved])
    looks = watch_training(gan, batches, look, **options)
    shown = [(record["step"], record["mean"]) for record in looks.records]
    weights = [p.detach() for player in gan.players.values() for p in player.params.values()]
    averages = [mean for average in gan.averages for mean in average.means]
    return shown, weights + averages, looked


@pytest.mark.parametrize("seed, kill_at", [(0, 8), (1, 2), (2, 11)])
def test_an_interrupted_run_is_the_run(seed, kill_at, tmp_path):
    shown, weights, _ = train(tmp_path / "whole.pt", seed)
    assert [step for step, _ in shown] == [2, 4, 6, 8, 10, 11]
    with pytest.raises(Killed):
        train(tmp_path / "killed.pt", seed, kill_at)
    first = spent_before(tmp_path / "killed.pt")
    again, weights_again, looked = train(tmp_path / "killed.pt", seed, start=99)
    assert looked == [step for step, _ in shown if step >= kill_at]
    assert again == shown and all(map(torch.equal, weights_again, weights))
    both = spent_before(tmp_path / "killed.pt")
    assert (first.processes, both.processes) == (1, 2) and both.cpu > first.cpu > 0


def test_a_run_that_was_killed_after_its_last_step_takes_none(tmp_path):
    shown, weights, _ = train(tmp_path / "state.pt", 0)
    again, weights_again, looked = train(tmp_path / "state.pt", 0, start=99)
    assert again == shown and looked == [] and all(map(torch.equal, weights_again, weights))


def test_a_run_that_has_diverged_stays_so(tmp_path):
    game = FeedbackGAN(MLPGenerator(2, (3,)), MLPDiscriminator((2,), (3,)))
    loader = Loader(digits().subset(torch.arange(40)), 20)

    def train_once(found):
        saved = SavedRun(tmp_path / "state.pt", {}, 0, loader, {}, every=0.0)
        batches = itertools.repeat(Batch(torch.zeros(3, 2)))
        look = lambda step: found  # noqa: E731
        return watch_training(game, batches, look, steps=5, every=2, callbacks=[saved])

    assert train_once(None).stopped_at == 2
    again = train_once({"a": 1})
    assert again.stopped_at == 2 and again.records == []


def test_the_state_of_another_run_is_refused(tmp_path):
    train(tmp_path / "state.pt", 0)
    for seed, config in ((1, None), (0, {"a": 2})):
        with pytest.raises(checkpoint.CheckpointError, match="delete the file"):
            train(tmp_path / "state.pt", seed, config=config)


def resumable(config, seed, state):
    """Return how often it was begun; fail the first time."""
    begun = spent_before(state)
    checkpoint.save(state, {"spent": [5.0, 7.0, begun.processes + 1]})
    if not begun.processes:
        raise RuntimeError("killed")
    return {"begun": begun.processes + 1}


def test_reproduce_passes_the_state_and_deletes_it_with_the_result(tmp_path):
    experiment = Experiment("x", resumable, {"v": {}}, (3,), resumable=True)
    (task,) = tasks_of(experiment, tmp_path)
    assert tasks_of(experiment._replace(resumable=False), tmp_path)[0].state is None
    with pytest.raises(ReproduceError, match="1 of 1 runs failed"):
        reproduce([experiment], tmp_path, jobs=1, progress=False)
    assert task.state.exists() and task.state.name.startswith(".")
    assert reproduce([experiment], tmp_path, jobs=1, progress=False) == {"done": 1, "skipped": 0}
    record = json.loads(task.path.read_text())
    assert record["result"] == {"begun": 2} and record["parts"] == 2
    assert record["cpu_seconds"] >= 5 and record["wall_seconds"] >= 7
    assert not task.state.exists()


def test_a_run_without_a_state_is_given_none():
    found = perform(lambda config, seed: {"sum": config["a"] + seed}, {"a": 2}, 3)
    assert found["result"] == {"sum": 5} and found["parts"] == 1
    assert spent_before(None) == Spent(0.0, 0.0, 0)


def test_the_formula_and_its_baseline_differ_in_the_weight_alone():
    for problem, losses in formula.LOSSES.items():
        experiment = formula.experiment(f"pairs-{problem}", "")
        assert len(experiment.variants) == 5 * len(losses)
        for loss in losses:
            group = [c for c in experiment.variants.values() if c["loss"] == loss]
            assert [c["weight"] for c in group] == [None, 1e-4, 1e-3, 0.01, 0.1]
            rest = [{k: v for k, v in c.items() if k not in ("weight", "rule")} for c in group]
            assert all(c == rest[0] for c in rest) and rest[0]["lr"] == 4e-3
            assert [c["rule"] for c in group] == ["simultaneous"] + 4 * ["literal"]


def test_the_best_denoiser_of_some_images_is_their_posterior_mean():
    images = torch.randn(6, 1, 2, 3, generator=generator(0), dtype=torch.float64)
    denoise = denoising.EmpiricalDenoiser(images)
    y = images[:4] + 0.7 * torch.randn(4, 1, 2, 3, generator=generator(1), dtype=torch.float64)
    sigma = torch.tensor([0.3, 0.7, 1.5, 9.0], dtype=torch.float64)
    for x, s, found in zip(y, sigma, denoise(y, sigma)):
        density = [torch.distributions.Normal(m, s).log_prob(x).sum().exp() for m in images]
        expected = sum(p * m for p, m in zip(density, images)) / sum(density)
        assert (found - expected).abs().max() < 1e-10
    near = ddim(denoise, images + 1e-3, [1e-3, 0.0])
    assert (near - images).abs().max() < 1e-9


def test_min_snr_at_cosine_levels_differs_from_its_baseline_in_the_weight_alone():
    runs = denoising.cosine_runs(RESULTS / "denoising")
    plain, weighted = runs.variants["plain"], runs.variants["min-snr"]
    changed = {key for key in plain if plain[key] != weighted[key]}
    assert changed == {"weight"} and weighted["weight"] == "min-snr"
    assert plain["schedule"] == "cosine" and (plain["epochs"], runs.seeds) == (3, (0, 1, 2))
    images = denoising.halve_images(digits("test").subset(torch.arange(20)))
    config = {**plain, "channels": 4}
    assert isinstance(denoising.make_scheme(config, images).schedule, CosineSchedule)
    del config["schedule"]
    assert isinstance(denoising.make_scheme(config, images).schedule, LogNormalSchedule)
