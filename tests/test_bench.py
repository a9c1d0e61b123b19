"""The benchmarks of the installed package: timers, counted work, programs, parts and tables."""

import io
import itertools
import json
import os
import random
import statistics
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from optgen.bench import against, report, timing
from optgen.bench.assisted import LOSSES
from optgen.bench.elbo import BENCHED_CONTROLLERS, BOUNDS
from optgen.bench.epochs import (
    TITLES,
    epoch_flops,
    plain_epoch,
    plain_networks,
    step_products,
    take_first,
)
from optgen.bench.generative import SCHEMES
from optgen.bench.growth import CURVES
from optgen.bench.loops import BATCH, COMPARISONS, make_epochs
from optgen.bench.optimizers import METHODS
from optgen.bench.report import StatusLine, format_bench, load_parts, run_bench, take_median
from optgen.bench.rules import BENCHED_RULES, make_game, make_optimizers
from optgen.bench.timing import Part, alternate, median_ms, run_module, step_flops, watcher
from optgen.bench.trainers import vae_scheme
from optgen.data.images import Batch, Images
from optgen.games import Game, Player
from optgen.testing import flat_weights

RESULTS = Path(__file__).resolve().parent.parent / "nbs" / "40_training" / "results"
COMMITTED = {
    name: result
    for path in sorted(RESULTS.glob("*.json"))
    for name, result in json.loads(path.read_text()).items()
    if name not in ("environment", "repeats")
}
# What a table of each part must contain: the names of its rows.
ROWS = {
    "epoch": TITLES.values(),
    "endurance": ["images/s of fit", "the trained model"],
    "loops": COMPARISONS,
    "optimizers": METHODS,
    "rules": BENCHED_RULES,
    "elbo": [*BENCHED_CONTROLLERS, *BOUNDS],
    "assisted": LOSSES,
    "generative": SCHEMES,
    "scaling": ["1", "2"],
    "growth": [curve.title for curve in CURVES.values()],
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


def test_the_watcher_receives_what_is_measured_and_takes_no_time(clock, program):
    seen = []

    def watch(what):
        """Take long."""
        seen.append(what)
        clock.now += 100.0

    token = watcher.set(watch)
    seconds = alternate({"a": clock.function("a", 1.0)}, rounds=2, warmup=1)
    run_module(program, 3, 4)
    run_module(program)
    watcher.reset(token)
    assert seconds == {"a": [1.0, 1.0]} and seen == ["a", "a", "a", "3", "echo_integers"]


# Parts and their repeats


class Sleeper:
    """A part whose repeats take known times on a clock of its own, and return known numbers."""

    def __init__(self, monkeypatch, *seconds):
        self.now, self.seconds, self.runs = 0.0, itertools.cycle(seconds), []
        monkeypatch.setattr(report.time, "monotonic", lambda: self.now)

    def run(self, data):
        """Take the time of the next repeat and return its number."""
        self.now += next(self.seconds)
        watcher.get()("a step")
        self.runs.append(data)
        return {"data": data, "ms": float(len(self.runs) ** 2), "sizes": (1, 2)}


def make_parts(monkeypatch, *parts):
    """Let the benchmark have these parts."""
    monkeypatch.setattr(report, "load_parts", lambda: {part.name: part for part in parts})


def return_data(name, data):
    """Return a result."""
    return {name: data, "ms": 1.5}


@pytest.fixture
def parts(monkeypatch):
    """Two parts that return their argument, and one that runs only if it is named."""
    shown = {"format": lambda result: [str(result)], "seconds": 60, "repeats": 2}
    names = ("one", "two", "rare")
    parts = [
        Part(n, lambda data, n=n: return_data(n, data), by_default=n != "rare", **shown)
        for n in names
    ]
    make_parts(monkeypatch, *parts)


@pytest.mark.parametrize(
    "only, names", [((), "one two"), (("two",), "two"), (["one"], "one"), (["rare"], "rare")]
)
def test_only_the_named_parts_run(parts, only, names):
    result = run_bench(data="digits", only=only)
    expected = {"optgen", "torch", "threads", "cpus", "processor"}
    assert result.pop("environment").keys() >= expected
    repeats = result.pop("repeats")
    assert result == {name: return_data(name, "digits") for name in names.split()}
    assert repeats == {name: 2 * [return_data(name, "digits")] for name in names.split()}


@pytest.mark.parametrize("only", [["three"], ["one", "three"]])
def test_an_unknown_part_is_refused_before_any_runs(parts, only):
    with pytest.raises(ValueError, match="no part 'three'; there are: one, two, rare"):
        run_bench(only=only)


def test_a_part_is_handed_on_when_it_is_done(parts):
    seen = []
    run_bench(on_part=lambda name, result: seen.append((name, sorted(result))))
    head = ["environment", "one", "repeats"]
    assert seen == [("one", head), ("two", [*head, "two"])]


@pytest.mark.parametrize(
    "seconds, budget, repeats, expected",
    [
        ([10.0], 60.0, None, 5),  # all repeats fit
        ([10.0], 35.0, None, 3),  # a fourth would end at 40
        ([10.0], 40.0, None, 4),
        ([30.0, 5.0], 60.0, None, 2),  # the longest repeat counts
        ([100.0], 60.0, None, 1),  # one is always made
        ([100.0], 60.0, 4, 4),  # what was asked for is done
        ([1.0], 60.0, 7, 7),
    ],
)
def test_repeats_fit_into_the_time_of_a_part(monkeypatch, seconds, budget, repeats, expected):
    sleeper = Sleeper(monkeypatch, *seconds)
    make_parts(monkeypatch, Part("p", sleeper.run, str, budget))
    result = run_bench(repeats, "digits")
    assert sleeper.runs == ["digits"] * expected == [r["data"] for r in result["repeats"]["p"]]
    times = [float(k**2) for k in range(1, expected + 1)]
    assert [r["ms"] for r in result["repeats"]["p"]] == times
    assert result["p"]["ms"] == statistics.median(times) and result["p"]["sizes"] == [1, 2]


def test_what_is_measured_is_shown_with_its_part_and_repeat(monkeypatch):
    seen, sleeper = [], Sleeper(monkeypatch, 1.0)
    make_parts(monkeypatch, Part("p", sleeper.run, str, 60.0, repeats=2))
    run_bench(watch=seen.append)
    assert seen == ["p 1/2: a step", "p 2/2: a step"]
    watcher.get()("nothing is shown any more")
    assert len(seen) == 2


def test_the_default_parts_end_within_ten_minutes():
    parts = [part for part in load_parts().values() if part.by_default]
    assert sum(part.seconds for part in parts) <= 600
    assert all(part.repeats >= 5 for part in parts if part.name in ("epoch", "loops"))


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self):
        """Return that it is."""
        return True


def test_a_terminal_shows_the_last_of_what_is_measured(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        line = StatusLine(stream)
        for seconds, what in ((0.0, "first"), (0.1, "too soon"), (0.3, "x" * 200)):
            now[0] = seconds
            line.show(what)
        line.clear()
    erase = "\r\x1b[K"
    assert terminal.getvalue() == f"{erase}first{erase}{'x' * 79}{erase}" and not pipe.getvalue()


def test_medians_are_taken_number_by_number():
    rng = random.Random(3)
    trees = [{"a": {"b": rng.random(), "n": 3}, "c": [rng.random(), "x", None]} for _ in range(4)]
    found = take_median(trees)
    assert found["a"] == {"b": statistics.median(t["a"]["b"] for t in trees), "n": 3}
    assert found["c"] == [statistics.median(t["c"][0] for t in trees), "x", None]


def test_a_result_is_json():
    assert json.loads(json.dumps(COMMITTED)) == COMMITTED


def test_the_products_of_a_step_are_those_of_the_model():
    scheme = vae_scheme()
    flops = step_flops(scheme, Batch(torch.rand(100, 1, 28, 28)))
    assert epoch_flops(100) == flops
    shapes = [tuple(product().shape) for product in step_products()]
    weights = [tuple(p.shape) for p in scheme.model.parameters() if p.ndim == 2]
    assert len(shapes) == 3 * len(weights) - 1
    assert all(shapes.count(weight) == 1 for weight in weights)


def test_the_plain_loop_takes_the_steps_of_the_scheme(monkeypatch):
    """The networks, the loss and Adam of the plain loop are those of `fit`, in float64."""
    torch.manual_seed(0)
    x, noise = torch.rand(100, 784).double(), torch.randn(100, 20).double()
    monkeypatch.setattr(torch, "randn_like", lambda like: noise)
    scheme, nets = vae_scheme(), [net.double() for net in plain_networks()]
    scheme.model.double()
    parameters = [p for net in nets for p in net.parameters()]
    scheme.players["model"].optimizer = torch.optim.Adam(scheme.model.parameters(), lr=1e-3)
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)
    noisy = scheme.draw_noise(Batch(x))._replace(eps=noise[:, None])
    monkeypatch.setattr(scheme, "draw", lambda batch: noisy)
    monkeypatch.setattr(torch, "randperm", torch.arange)
    for _ in range(3):
        plain_epoch(*nets, optimizer, x)
        scheme.step(Batch(x))
    for ours, plain in zip(scheme.model.parameters(), parameters, strict=True):
        assert (ours - plain).abs().max() < 1e-12


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_bare_loop_starts_at_the_weights_and_the_loss_of_fit(name):
    """Loss of the first batch, before any step, up to its random numbers."""
    torch.manual_seed(0)
    images = torch.randint(256, (1000, 1, 28, 28), dtype=torch.uint8)
    data = Images(images, torch.arange(1000) % 10)
    epochs = make_epochs(name, data, images=BATCH)
    assert epochs["fit"]() == pytest.approx(epochs["bare"](), rel=0.02)


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


# Two runs


HERE = {"optgen": "0.6.0", "torch": "2.14.1", "threads": 2}


def two_rows(scale, seed, repeats=5, images=100, environment=HERE, noise=0.02):
    """Return a result of one part, whose times of the row "changed" are scaled."""
    rng = random.Random(seed)
    trees = []
    for _ in range(repeats):
        same, changed = (8.0 * s * (1 + noise * rng.uniform(-1, 1)) for s in (1, scale))
        rows = {"same": {"ms": same}, "changed": {"ms": changed, "overhead": changed / same - 1}}
        trees.append({"images": images, "rows": rows})
    result = {"environment": environment, "p": take_median(trees), "repeats": {"p": trees}}
    return json.loads(json.dumps(result))


def lines_of(before, now):
    """Return the lines of a comparison by the name of their row."""
    lines = against.format_changes("p", before, now).splitlines()
    return {line.split("  ")[0].strip(): line for line in lines}


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_not_marked_and_a_change_is(seed):
    lines = lines_of(two_rows(1.0, seed), two_rows(0.7, seed + 50))
    assert not lines["rows / same / ms"].endswith(("*", "?"))
    assert lines["rows / changed / ms"].endswith("*")
    assert lines["rows / changed / overhead"].endswith("*")
    noise = lines_of(two_rows(1.0, seed), two_rows(1.0, seed + 50))
    assert not any(line.endswith(("*", "?")) for line in noise.values())


def test_a_row_has_both_medians_and_their_ratio():
    before, now = two_rows(1.0, 1, noise=0.0), two_rows(0.5, 1, noise=0.0)
    lines = lines_of(before, now)
    assert lines["rows / changed / ms"].split()[-4:] == ["8", "4", "0.50", "*"]
    # An overhead of -50 % is half the time.
    assert lines["rows / changed / overhead"].split()[-4:] == ["1", "0.5", "0.50", "*"]
    assert lines["rows / same / ms"].split()[-3:] == ["8", "8", "1.00"]


@pytest.mark.parametrize("repeats", [(1, 5), (5, 2), (1, 1)])
def test_the_spread_of_few_repeats_is_unknown(repeats):
    before, now = (two_rows(s, 2, repeats=n) for s, n in zip((1.0, 0.5), repeats))
    assert lines_of(before, now)["rows / changed / ms"].endswith("?")
    del before["repeats"]
    assert lines_of(before, now)["rows / changed / ms"].endswith("?")


def test_the_spread_is_the_range_of_the_repeats():
    assert against.measure_spread([3.0, 1.0, 9.0, 2.0]) == (2.5, 1.0, 9.0, 4)
    assert against.measure_spread([2.0]) == (2.0, 2.0, 2.0, 1)


@pytest.mark.parametrize("move, mark", [(2.9, ""), (3.1, "*"), (-2.9, ""), (-3.1, "*")])
def test_a_change_is_larger_than_both_ranges_together(move, mark):
    before, now = [10.0, 10.5, 11.0], [9.5 + move, 10.5 + move, 11.5 + move]
    assert against.mark_change(*map(against.measure_spread, (before, now))) == mark


@pytest.mark.parametrize("repeats, share", [(3, 0.03), (5, 0.003)])
def test_few_rows_are_marked_by_noise(repeats, share):
    rng, marked = random.Random(repeats), 0
    for _ in range(3000):
        runs = [[rng.gauss(1, 0.1) for _ in range(repeats)] for _ in range(2)]
        marked += against.mark_change(*map(against.measure_spread, runs)) == "*"
    assert marked / 3000 <= share


@pytest.mark.parametrize(
    "other, words",
    [
        ({"environment": HERE | {"torch": "2.0"}}, "torch: 2.0, now 2.14.1"),
        ({"environment": {"optgen": "0.1.0", "torch": "2.14.1"}}, "threads: not recorded, now 2"),
        ({"images": 60}, "images: 60, now 100"),
    ],
)
def test_seconds_of_another_machine_or_configuration_are_not_compared(other, words):
    before, now = two_rows(1.0, 3, **other), two_rows(0.5, 4)
    lines = lines_of(before, now)
    assert "rows / changed / ms" not in lines and "rows / same / ms" not in lines
    assert lines["rows / changed / overhead"].endswith("*")
    head = against.format_environments(before["environment"], now["environment"])
    assert words in head + "\n".join(lines.values())


def test_another_version_of_optgen_is_compared():
    before = two_rows(1.0, 3, environment=HERE | {"optgen": "0.5.0"})
    assert "rows / changed / ms" in lines_of(before, two_rows(0.5, 4))
    head = against.format_environments(before["environment"], HERE)
    assert "optgen 0.5.0, now 0.6.0" in head and "differs" not in head


def test_rows_of_one_run_are_listed():
    before, now = two_rows(1.0, 3), two_rows(1.0, 4)
    for tree in before["repeats"]["p"]:
        tree["rows"]["old"] = {"ms": 1.0}
    for tree in now["repeats"]["p"]:
        tree["rows"]["new"] = {"ms": 1.0}
    lines = lines_of(before, now)
    assert "only before: rows / old / ms" in lines and "only now: rows / new / ms" in lines
    del before["p"]
    assert against.format_changes("p", before, now) == "p: only now"


@pytest.mark.parametrize("name", ROWS)
def test_every_committed_result_equals_itself(name):
    result = {"environment": HERE, name: COMMITTED[name]}
    lines = against.format_changes(name, result, result).splitlines()
    assert len(lines) > 1
    assert all(line.endswith(("1.00", "nan")) for line in lines[1:]), lines


@pytest.mark.parametrize(
    "name, absolute",
    [
        ("variants / fit / seconds", True),
        ("images_per_second / 2", True),
        ("pixel_us / kept / 7", True),
        ("rules / consensus / peak_mib", True),
        ("SGD / ours_ms", True),
        ("SGD / ratio", False),
        ("times_article / fit", False),
        ("controllers / items", False),
    ],
)
def test_times_and_memory_are_absolute(name, absolute):
    assert against.is_absolute(name) is absolute


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        "{}",
        '{"environment": {}}',
        '{"epoch": {}}',
        '{"environment": {}, "repeats": {}}',
        '{"environment": {}, "epoch": 3}',
        '{"environment": {}, "epoch": {}, "repeats": {"epoch": 3}}',
        '{"environment": {}, "epoch": {}, "repeats": 3}',
    ],
)
def test_what_is_no_result_is_refused(text, tmp_path):
    path = tmp_path / "before.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="before.json"):
        against.read_result(path)
