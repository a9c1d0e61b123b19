"""The benchmarks of the installed package: timers, counted work, programs, parts and tables."""

import itertools
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from optgen.bench import report, timing
from optgen.bench.assisted import LOSSES
from optgen.bench.elbo import BENCHED_CONTROLLERS, BOUNDS
from optgen.bench.epochs import VARIANTS, epoch_flops, summarize_runs, take_first
from optgen.bench.generative import SCHEMES
from optgen.bench.optimizers import METHODS
from optgen.bench.report import format_bench, load_parts, run_bench
from optgen.bench.rules import BENCHED_RULES, make_game, make_optimizers
from optgen.bench.timing import Part, alternate, median_ms, run_module, step_flops
from optgen.bench.trainers import TRAINERS
from optgen.data.images import Images
from optgen.games import Game, Player
from optgen.testing import flat_weights

RESULTS = Path(__file__).resolve().parent.parent / "nbs" / "40_training" / "results"
COMMITTED = {
    name: result
    for path in sorted(RESULTS.glob("*.json"))
    for name, result in json.loads(path.read_text()).items()
    if name != "environment"
}
# What a table of each part must contain: the names of its rows.
ROWS = {
    "epoch": [variant.title for variant in VARIANTS.values()],
    "optimizers": METHODS,
    "rules": BENCHED_RULES,
    "elbo": [*BENCHED_CONTROLLERS, *BOUNDS, *TRAINERS],
    "assisted": LOSSES,
    "generative": SCHEMES,
    "scaling": ["1", "2"],
}


class Clock:
    """A clock that stands still but for the functions that it makes."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, []

    def function(self, name, *seconds):
        """Return a function that takes these seconds, one call after the other."""
        times = itertools.cycle(seconds)

        def run():
            """Take the time of the next call."""
            self.calls.append(name)
            self.now += next(times)

        return run


@pytest.fixture
def clock(monkeypatch):
    """A clock that the timers read."""
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    return clock


def linear_game(inputs, outputs, seed=0):
    """Return a game of one linear layer without bias, on the mean square of its outputs."""
    torch.manual_seed(seed)
    layer = nn.Linear(inputs, outputs, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    return Game(model=Player(layer, lambda x: layer(x).square().mean(), optimizer))


@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_functions_take_turns_and_the_warmup_is_not_counted(clock, warmup):
    steps = {"b": clock.function("b", 1.0), "a": clock.function("a", 2.0)}
    seconds = alternate(steps, rounds=3, warmup=warmup)
    assert "".join(clock.calls) == "abbaabbaab"[: 2 * (3 + warmup)]
    assert seconds == {"b": [1.0] * 3, "a": [2.0] * 3}


def test_the_median_is_in_milliseconds(clock):
    steps = {"even": clock.function("even", 0.5), "odd": clock.function("odd", 9.0, 1.0, 2.0, 3.0)}
    assert median_ms(steps, rounds=3, warmup=1) == {"even": 500.0, "odd": 2000.0}


@pytest.mark.parametrize("inputs, outputs, rows", [(5, 7, 11), (1, 1, 1), (3, 64, 2)])
def test_the_work_of_a_linear_layer(inputs, outputs, rows):
    game = linear_game(inputs, outputs)
    forward = 2 * inputs * outputs * rows
    assert step_flops(game, torch.ones(rows, inputs)) == 2 * forward  # and the weights' gradient


def test_counting_takes_two_steps_of_the_game():
    counted, stepped = linear_game(3, 2), linear_game(3, 2)
    x = torch.ones(4, 3)
    step_flops(counted, x)
    for _ in range(2):
        stepped.step(x)
    weights = [flat_weights(game.players["model"].module) for game in (counted, stepped)]
    assert torch.equal(*weights)


def test_the_work_of_an_epoch_is_proportional_to_its_images():
    assert epoch_flops(200) == 2 * epoch_flops(100) > 0


@pytest.fixture
def program(tmp_path, monkeypatch):
    """The name of a module that prints its arguments as JSON, after a line that is none."""
    code = "import json, sys\nprint('loading')\nprint(json.dumps([int(a) for a in sys.argv[1:]]))"
    (tmp_path / "echo_integers.py").write_text(code)
    known = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), known])))
    return "echo_integers"


def test_a_program_prints_its_result_last(program):
    assert run_module(program, 3, "4") == [3, 4]
    assert run_module(program) == []


@pytest.mark.parametrize("args", [("three",), (1, "x")])
def test_a_program_that_fails_raises(program, args):
    with pytest.raises(subprocess.CalledProcessError):
        run_module(program, *args)


def test_a_missing_program_raises():
    with pytest.raises(subprocess.CalledProcessError):
        run_module("no_such_module")


def test_there_is_a_committed_result_of_every_part():
    assert load_parts().keys() == COMMITTED.keys() == ROWS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_every_format_reads_the_committed_result(name):
    lines = load_parts()[name].format(COMMITTED[name])
    assert all(isinstance(line, str) and "\n" not in line for line in lines)
    assert max(map(len, lines)) <= 130
    firsts = [line.split("  ")[0] for line in lines]
    for row in ROWS[name]:
        assert any(first.startswith(row) for first in firsts), f"no line for {row}"
    assert format_bench({"environment": {}, name: COMMITTED[name]}) == "\n".join(lines)


def test_tables_are_separated_by_a_blank_line():
    tables = [format_bench({name: COMMITTED[name]}) for name in ("optimizers", "rules")]
    both = {name: COMMITTED[name] for name in ("rules", "optimizers")}
    assert format_bench(both) == "\n\n".join(tables)
    assert format_bench({"environment": {}}) == ""


@pytest.fixture
def parts(monkeypatch):
    """Two parts that return their arguments."""
    parts = {
        name: Part(name, lambda repeats, data, name=name: {name: [repeats, data]}, str)
        for name in ("one", "two")
    }
    monkeypatch.setattr(report, "load_parts", lambda: parts)
    return parts


@pytest.mark.parametrize("only, names", [((), "one two"), (("two",), "two"), (["one"], "one")])
def test_only_the_named_parts_run(parts, only, names):
    result = run_bench(repeats=4, data="digits", only=only)
    assert result.pop("environment").keys() >= {"optgen", "torch", "threads", "cpus"}
    assert result == {name: {name: [4, "digits"]} for name in names.split()}


@pytest.mark.parametrize("only", [["three"], ["one", "three"]])
def test_an_unknown_part_is_refused_before_any_runs(parts, only):
    with pytest.raises(ValueError, match="no part 'three'; there are: one, two"):
        run_bench(only=only)


def test_a_result_is_json():
    assert json.loads(json.dumps(COMMITTED)) == COMMITTED


def test_the_summary_of_runs_is_made_of_medians():
    runs = [{"seconds": [1.0, 4.0], "peak_mib": 10}, {"seconds": [2.0, 2.0], "peak_mib": 30}]
    row = summarize_runs(runs, images=100, gflops=epoch_flops(100) / 1e9)
    assert row["seconds"] == 2.0 and row["images_per_second"] == 50.0 and row["peak_mib"] == 20
    assert row["share"] == pytest.approx(0.5)
    assert row["runs"] == [[1.0, 4.0], [2.0, 2.0]]


def test_the_warmup_takes_every_so_many_images():
    images = torch.arange(40, dtype=torch.uint8).reshape(40, 1, 1, 1)
    some = take_first(Images(images, torch.arange(40)), 4, every=10)
    assert some.labels.tolist() == some.images.flatten().tolist() == [0, 10, 20, 30]


@pytest.mark.parametrize("rule", BENCHED_RULES)
def test_every_rule_of_the_benchmark_can_be_made(rule):
    networks = [nn.Linear(2, 2), nn.Linear(2, 1)]
    networks[0].z_dim = 2
    game = make_game(rule, *networks)
    assert list(game.players) == ["G", "D"]
    defaults = [optimizer.defaults for optimizer in make_optimizers(*networks)]
    assert [player.optimizer.defaults for player in game.players.values()] == defaults
