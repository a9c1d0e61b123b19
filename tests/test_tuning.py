"""Tuning: intervals, trials, and the command, against trainings and searches written here."""

import json
import math
import shlex
import signal
from types import SimpleNamespace

import click
import pytest
import torch

from cli_helpers import run
from optgen import viz
from optgen.cli import tune as command
from optgen.cli.options import image_options, train_params
from optgen.cli.runs import find_command, load_commands
from optgen.cli.train import train_command
from optgen.data.loading import load
from optgen.search import CmaEs, Interval, RandomSearch, Trial, best_trial, tune
from optgen.training.guards import Interrupted, NonFinite

FAST = "--epochs 2 --holdout 0.9 --hidden 16,8 --data digits"


def lines(path):
    "Return the trials of a folder."
    return [json.loads(line) for line in (path / "trials.jsonl").read_text().splitlines()]


def records(path):
    "Return the validation of each epoch of a run."
    return [json.loads(line)["valid"] for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("seed", [0, 5])
def test_settings_are_powers_on_a_logarithmic_scale_and_shares_of_whole_numbers(seed):
    rng = torch.Generator().manual_seed(seed)
    low, high = sorted(torch.rand(2, generator=rng).double().add(0.1).mul(50).tolist())
    u = torch.rand(20, generator=rng, dtype=torch.float64).tolist()
    log, linear = Interval(low, high, log=True), Interval(-low, high)
    assert [log.at(x) for x in u] == pytest.approx([low ** (1 - x) * high**x for x in u])
    assert [linear.at(x) for x in u] == pytest.approx([(1 - x) * -low + x * high for x in u])
    grid = [(i + 0.5) / 9000 for i in range(9000)]
    counts = torch.tensor([Interval(-1, 7, whole=True).at(x) + 1 for x in grid]).bincount()
    assert counts.tolist() == [1000] * 9
    found = torch.tensor([Interval(1, 20, log=True, whole=True).at(x) for x in grid]).bincount()
    edges = torch.arange(0.5, 21).log()
    share = (edges[1:] - edges[:-1]) / (edges[-1] - edges[0])
    assert torch.allclose(found[1:] / 9000, share, atol=3 / 9000)


@pytest.mark.parametrize("text, log", [("1..9", False), ("1..10", True), ("-1..10", False)])
def test_the_scale_follows_from_the_ends(text, log):
    assert Interval.parse(text).log is log
    assert Interval.parse(text + ":linear").log is False


@pytest.mark.parametrize("seed", [1, 2])
def test_tune_finds_the_minimum_and_goes_on_from_any_trial(seed):
    over = {"lr": Interval(1e-5, 1.0), "momentum": Interval(0, 0.99)}

    def loss(settings):
        "Return a loss with its minimum at 1e-3 and 0.4."
        return math.log10(settings["lr"] / 1e-3) ** 2 + 4 * (settings["momentum"] - 0.4) ** 2

    whole = tune(loss, over, 120, seed=seed)
    best = best_trial(whole)
    assert best.value == min(trial.value for trial in whole) < 0.01
    assert best.settings["lr"] == pytest.approx(1e-3, rel=0.3)
    for known in (1, 6, 17):
        assert tune(loss, over, 40, seed=seed, known=whole[:known]) == whole[:40]
    search = CmaEs([0.5, 0.5], 0.2, bounds=(0, 1), seed=seed)
    first = search.ask()
    assert [t.settings["momentum"] for t in whole[:6]] == pytest.approx(
        (0.99 * first[:, 1]).tolist()
    )
    search = RandomSearch([0.5, 0.5], population_size=4, bounds=(0, 1), seed=seed)
    exact = RandomSearch([0.5, 0.5], population_size=4, bounds=(0, 1), seed=seed).ask()
    random = tune(loss, over, 3, search)
    assert [t.settings["lr"] for t in random] == pytest.approx(
        [1e-5 ** (1 - u) for u in exact[:3, 0].tolist()]
    )


def test_a_trial_is_a_run_and_its_value_that_of_the_validation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    over = "--over lr=1e-3..1e-1 --over z-dim=2..9 --over beta=0.5..2"
    assert run("tune beta-vae", over, FAST, "--budget 3 --seed 4 --out a") == 0
    assert (
        run("tune beta-vae", over, FAST, "--budget 3 --seed 4 --metric elbo --maximize --out b")
        == 0
    )
    for i, (one, other) in enumerate(zip(lines(tmp_path / "a"), lines(tmp_path / "b"))):
        path = tmp_path / "a" / f"trial-{i:03d}"
        options = json.loads((path / "config.json").read_text())["options"]
        assert {name: options[name] for name in ("lr", "z_dim")} == {
            name: one["settings"][name] for name in ("lr", "z_dim")
        }
        assert float(options["beta"]) == one["settings"]["beta"] and options["seed"] == 4
        last = records(path)[-1]
        assert one["value"] == last["loss"] and len(records(path)) == 2
        assert one["settings"] == other["settings"] and other["value"] == last["elbo"]
        assert last["loss"] == pytest.approx(
            last["distortion"] + one["settings"]["beta"] * last["rate"], rel=1e-5
        )
    assert (tmp_path / "a" / "tune.png").exists()


@pytest.mark.parametrize(
    "options, value",
    [("", 2.0), ("--patience 2", 1.0), ("--metric elbo", 7.0), ("--patience 2 --metric elbo", 9.0)],
)
def test_the_last_epoch_counts_and_with_patience_the_best(options, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = [{"loss": 3.0, "elbo": 8.0}, {"loss": 1.0, "elbo": 9.0}, {"loss": 2.0, "elbo": 7.0}]
    scheme = SimpleNamespace(criterion="loss")

    def fitted(run, out, device, progress, resume, callbacks, on_built):
        "Return these validations."
        on_built(scheme, None)
        return scheme, [{"valid": valid} for valid in found]

    monkeypatch.setattr(command, "fit_run", fitted)
    assert run("tune beta-vae --over lr=0.05..0.3 --budget 2 --out a", options) == 0
    assert [line["value"] for line in lines(tmp_path / "a")] == [value] * 2


SCHEMES = {
    "made": "--hidden 16 --no-direct --over dropout=0..0.5",
    "assisted": "--method reconstruction --over weight=0.1..10",
    "maf": "--hidden 16 --over layers=1..2",
    "pixelcnn": "--channels 4 --over layers=1..2",
    "realnvp": "--model flat --hidden 16,16 --over couplings=2..3",
    "ddpm": "--multiples 1,2 --over channels=4..6",
    "flow-matching": "--multiples 1,2 --channels 4 --over lr=1e-3..1e-2",
    "feedback-gan": "--rule consensus --model mlp --hidden 16,16 --over weight=0.01..1",
    "lstm": "--hidden 8 --over dropout=0..0.5",
}


def test_no_scheme_is_forgotten():
    assert {*load_commands()} == {*SCHEMES, "beta-vae"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_options_of_every_scheme_reach_its_runs(scheme, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    fitted = SimpleNamespace(criterion="loss")

    def noted(run, out, device, progress, resume, callbacks, on_built):
        "Note the configuration, and build the scheme of it on few images."
        command_of = find_command(run["scheme"])
        options = run["options"] | {"epoch_steps": 1, "steps": 1}
        split = command_of.split(options, load(options["data"], "train", **image_options(options)))
        assert command_of.build(options, split.train.shape, **split.extra).players
        seen.append(run)
        on_built(fitted, split)
        return fitted, [{"valid": {"loss": 1.0}}]

    monkeypatch.setattr(command, "fit_run", noted)
    words = SCHEMES[scheme].split()
    assert run(f"tune {scheme} --budget 2 --seed 5 --out a", *words) == 0
    plain = [word for i, word in enumerate(words) if "--over" not in words[max(0, i - 1) : i + 1]]
    params = train_params(find_command(scheme))
    given = click.Command(scheme, params=params).make_context("", [*plain, "--seed", "5"]).params
    tuned = {w.partition("=")[0].replace("-", "_") for w in words if ".." in w}
    for one, trial in zip(seen, lines(tmp_path / "a"), strict=True):
        assert {*trial["settings"]} == tuned
        for name, value in one["options"].items():
            if name in tuned:
                assert float(value) == trial["settings"][name]
            elif f"--{name.replace('_', '-')}" in plain:
                assert value == given[name]


def test_a_scheme_with_an_option_of_the_tuning_is_refused_and_spoils_no_help(monkeypatch, capsys):
    known = load_commands()
    other = SimpleNamespace(
        name="mine",
        summary="mine",
        optimizer="adam",
        adam_lr=None,
        ema=0.0,
        epochs=1,
        train_options=lambda: [click.Option(["--budget"])],
    )
    for module in ("cli.train", "cli.runs"):
        monkeypatch.setattr(f"optgen.{module}.load_commands", lambda: {**known, "mine": other})
    assert run("tune --help") == 0 and "mine" in capsys.readouterr().out
    assert run("tune mine --over lr=0.1..0.2 --budget 2") == 2
    assert "mine has options budget of its own" in capsys.readouterr().err
    for scheme in known.values():
        command.check_no_clash(scheme)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--over lr=1..2 beta-vae", "options follow the scheme: optgen tune SCHEME --over"),
        ("--resume . --lr 1", "--lr can't be changed in a resumed tuning"),
    ],
)
def test_options_before_the_scheme_are_explained(words, message, capsys):
    assert run("tune", words) == 2
    assert message in capsys.readouterr().err


def test_epochs_can_be_tuned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = "--holdout 0.9 --hidden 16,8 --over epochs=1..3 --budget 3 --search random --out a"
    assert run("tune beta-vae", options) == 0
    for i, line in enumerate(lines(tmp_path / "a")):
        assert len(records(tmp_path / "a" / f"trial-{i:03d}")) == line["settings"]["epochs"]


def test_an_interrupted_tuning_goes_on_to_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = f"--over lr=1e-4..1e-2 {FAST} --seed 2"
    assert run("tune beta-vae", options, "--budget 6 --out whole") == 0
    fit_run, calls = command.fit_run, []

    def interrupted(*args, **kwargs):
        "Stop the third training."
        calls.append(args)
        if len(calls) == 3:
            raise Interrupted("stopped", signal.SIGINT)
        return fit_run(*args, **kwargs)

    monkeypatch.setattr(command, "fit_run", interrupted)
    assert run("tune beta-vae", options, "--budget 6 --out parts") == 130
    assert "go on with optgen tune --resume parts" in capsys.readouterr().out
    assert len(lines(tmp_path / "parts")) == 2
    assert run("tune --resume parts") == 0
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert run("tune --resume parts --budget 8") == 0
    assert lines(tmp_path / "parts")[:6] == lines(tmp_path / "whole")
    assert len(lines(tmp_path / "parts")) == 8


def test_divergence_is_a_failed_trial(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fit_run = command.fit_run

    def diverging(run, *args, **kwargs):
        "Diverge above a rate."
        if run["options"]["lr"] > 1e-3:
            args[-1](SimpleNamespace(criterion="loss"), None)
            raise NonFinite("a loss is not finite")
        return fit_run(run, *args, **kwargs)

    monkeypatch.setattr(command, "fit_run", diverging)
    assert run("tune beta-vae --over lr=1e-4..1e-2", FAST, "--budget 6 --out a") == 0
    for line in lines(tmp_path / "a"):
        assert (line["value"] is None) == (line["settings"]["lr"] > 1e-3)
    assert "diverged" in capsys.readouterr().out
    assert run("tune --resume a --budget 8") == 0
    assert run("tune beta-vae --over lr=1e-2..1e-1", FAST, "--budget 2 --out b") == 0
    assert "all 2 trainings diverged" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        ("--over lr=1..2..3 --budget 2", "expected LOW..HIGH"),
        ("--over model=1..2 --budget 2", "no option 'model' that takes a number"),
        ("--over data=1..2 --budget 2", "no option 'data'"),
        ("--over seed=1..2 --budget 2", "no option 'seed'"),
        ("--over holdout=0.1..0.2 --budget 2", "no option 'holdout'"),
        ("--over ema=0.5..2 --budget 2", "--over ema"),
        ("--over z-dim=0..4 --budget 2", "--over z-dim"),
        ("--over lr=1e-3..1e-2:square --budget 2", "log or linear"),
        ("--over lr=nan..1 --budget 2", "finite"),
        ("--over hidden=8..32 --budget 2", "no option 'hidden'"),
        ("--over lr=1e-3..1e-2 --lr 0.1 --budget 2", "fixed and tuned"),
        ("--over lr=1e-3..1e-2 --budget 2 --likelihood gaussian", "gaussian"),
        ("--over lr=1e-3..1e-2", "--budget"),
        ("--budget 2", "--over"),
    ],
)
def test_mistakes_end_with_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("tune beta-vae", words, "--out a") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "a").exists()


def test_a_metric_that_does_not_exist_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("tune beta-vae --over lr=1e-3..1e-2", FAST, "--budget 2 --metric f1 --out a") == 2
    assert "the validation has loss" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[]", '{"scheme": "beta-vae"}', "{"])
def test_a_broken_folder_is_one_error(content, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "tune.json").write_text(content)
    assert run("tune --resume a") == 2
    assert "no tuning can be read" in capsys.readouterr().err


def test_trials_of_another_search_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("tune beta-vae --over lr=1e-3..1e-2", FAST, "--budget 2 --out a") == 0
    line = {"settings": {"lr": 0.5}, "value": 1.0}
    (tmp_path / "a" / "trials.jsonl").write_text(json.dumps(line) + "\n")
    assert run("tune --resume a") == 2
    assert "must be of this search" in capsys.readouterr().err


def test_a_folder_of_other_trials_is_not_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ("tune beta-vae", FAST, "--budget 2 --out a")
    assert run(*words, "--over lr=1e-3..1e-2") == 0
    assert run(*words, "--over lr=1e-2..1e-1") == 2
    assert "holds a tuning" in capsys.readouterr().err
    (tmp_path / "a" / "tune.json").unlink()
    assert run(*words, "--over lr=1e-2..1e-1") == 2
    (tmp_path / "a" / "trials.jsonl").unlink()
    assert run(*words, "--over lr=1e-2..1e-1") == 2
    assert "a run with other options" in capsys.readouterr().err
    assert run(*words, "--over lr=1e-3..1e-2") == 0


def test_a_wrong_metric_can_be_corrected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("tune beta-vae --over lr=1e-3..1e-2", FAST, "--budget 2 --out a")
    assert run(*words, "--metric elboo --maximize") == 2
    assert run(*words, "--metric elbo --maximize") == 0
    assert lines(tmp_path / "a")[0]["value"] == records(tmp_path / "a" / "trial-000")[-1]["elbo"]


def test_a_resumed_tuning_keeps_its_budget_and_metric(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("tune beta-vae --over lr=1e-3..1e-2", FAST, "--budget 2 --out a") == 0
    fit_run = command.fit_run

    def interrupted(*args, **kwargs):
        "Stop before a training."
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "fit_run", interrupted)
    assert run("tune --resume a --budget 4") == 130
    assert "go on with optgen tune --resume a" in capsys.readouterr().out
    monkeypatch.setattr(command, "fit_run", fit_run)
    assert run("tune --resume a") == 0 and len(lines(tmp_path / "a")) == 4
    assert run("tune --resume a --budget 3") == 2
    capsys.readouterr()
    assert run("tune --resume a") == 0
    assert "  loss " in capsys.readouterr().out


def test_the_picture_shows_the_numbers_as_they_were_measured(tmp_path, monkeypatch):
    figures, new_figure = [], viz.new_figure

    def noted(*size):
        "Return a new figure, and keep it."
        figures.append(new_figure(*size))
        return figures[-1]

    monkeypatch.setattr(viz, "new_figure", noted)
    trials = [Trial({"lr": 0.1, "k": 2}, -3.0), Trial({"lr": 0.01, "k": 4}, math.nan)]
    intervals = {"lr": Interval(1e-3, 1.0), "k": Interval(1, 4, whole=True)}
    config = {"maximize": True, "metric": "elbo"}
    command.draw_trials(tmp_path / "a.png", intervals, trials, config)
    axes = figures[0].axes[:2]
    found = [ax.collections[0].get_offsets().filled(math.nan).tolist() for ax in axes]
    assert found[0][0] == [0.1, 3.0] and found[1][0] == [2, 3.0]
    assert axes[0].get_ylabel() == "elbo" and axes[0].get_xscale() == "log"
    assert axes[0].get_xlim() == (1e-3, 1.0) and axes[1].get_xscale() == "linear"


def test_the_best_so_far_is_marked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    numbers = iter([3.0, 4.0, 2.0])
    scheme = SimpleNamespace(criterion="loss")

    def fitted(run, out, device, progress, resume, callbacks, on_built):
        "Return the next number."
        assert device == "meta"
        on_built(scheme, None)
        return scheme, [{"valid": {"loss": next(numbers)}}]

    monkeypatch.setattr(command, "fit_run", fitted)
    assert run("tune beta-vae --over lr=0.1..0.3 --budget 3 --device meta --out a") == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if "/3 " in line]
    assert ["best so far" in line for line in shown] == [True, False, True]
    numbers = iter([1.0])
    assert run("tune --resume a --budget 4 --device meta") == 0
    assert json.loads((tmp_path / "a" / "tune.json").read_text())["budget"] == 4


def test_the_command_of_a_configuration_is_read_back_as_it_was():
    words = "--no-direct --hidden 30,20 --lr 0.5 --track wandb --track mlflow --data 'a b' --seed 3"
    params = train_params(find_command("made"))
    options = click.Command("made", params=params).make_context("", shlex.split(words)).params
    config = {"scheme": "made", "epochs": options["epochs"], "options": options}
    printed = train_command(config)
    assert shlex.split(printed)[:3] == ["optgen", "train", "made"]
    again = click.Command("made", params=params).make_context("", shlex.split(printed)[3:]).params
    assert again == options and len(printed) < 130


def test_the_best_of_failures_is_none():
    assert best_trial([Trial({}, math.nan)]) is None
    assert best_trial([Trial({}, math.nan), Trial({"a": 1}, 2.0), Trial({}, 2.0)]).settings == {
        "a": 1
    }
