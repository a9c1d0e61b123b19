"Many ranks against one: every rule, uneven batches, faults, signals, resumption, the command line."

import inspect
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, optgen

from cli_helpers import resume
from optgen import rules
from optgen.accumulation import slice_batch
from optgen.games import Rule
from optgen.training import checkpoint
from optgen.training.parallel import Ranks, init_ranks
from optgen.training.sharding import rank_slice
from spread import ASSISTED, ELBOS, FAULTS, LIKELIHOODS, RULES, gan

pytestmark = pytest.mark.skipif(
    os.name != "posix", reason="ranks are forked and killed as POSIX does"
)
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def job(tmp_path_factory):
    "What spread.py left."
    out = tmp_path_factory.mktemp("spread")
    done = subprocess.run(
        [sys.executable, os.path.join(os.path.dirname(__file__), "spread.py"), out],
        capture_output=True,
        text=True,
        env=ENV,
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def outcomes(job):
    """Exit codes and output of every launch."""
    return json.loads((job / "outcomes.json").read_text())


def result(job, rank, world):
    """Return what one of `world` ranks left."""
    return torch.load(job / f"{rank}-of-{world}.pt")


def test_every_rule_is_tried():
    "All classes of rules that `optgen.rules` offers, without the abstract ones."
    made = [make() for make in RULES.values()]
    kinds = {type(r) for m in made for r in (m if isinstance(m, list) else [m])}
    offered = {
        c
        for _, c in inspect.getmembers(rules, inspect.isclass)
        if issubclass(c, Rule) and c.__module__ == rules.__name__
    }
    assert offered - kinds <= {rules.DirectionWrapper, rules.Correction}


def test_two_ranks_do_all_and_three_a_third(job, outcomes):
    for world in (1, 2, 3):
        launched = outcomes[f"rules {world}"]
        assert launched["codes"] == [0] * world, launched["said"]
    for half in ("every", "elbos"):
        one, two, three = (result(job, 0, world)[half] for world in (1, 2, 3))
        assert two.keys() == one.keys() and len(three) == math.ceil(len(one) / 3)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_follows_one_process(job, rule, world):
    start = torch.cat([p.flatten() for ps in gan().weights().values() for p in ps])
    one, ranks = result(job, 0, 1)["every"], [result(job, r, world)["every"] for r in range(world)]
    cases = [case for case in one if case[0] == rule]
    assert cases
    for case in (case for case in cases if case in ranks[0]):
        weights, losses = one[case]
        tol = 1e-6 if case[2] == "float32" else 1e-12
        for w, values in (rank[case] for rank in ranks):
            assert torch.equal(w, ranks[0][case][0])
            assert (w - weights).abs().max() < tol and all(
                abs(values[k] - losses[k]) < tol for k in losses
            )
        assert (weights - start).abs().max() > 0.05


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", ELBOS)
def test_a_vae_follows_one_process(job, name, world):
    one, ranks = result(job, 0, 1)["elbos"], [result(job, r, world)["elbos"] for r in range(world)]
    for dtype, tol in (("float32", 1e-6), ("float64", 1e-12)):
        if (name, dtype) not in ranks[0]:
            continue
        weights, numbers, start, waiting = one[name, dtype]
        for w, values, _, theirs in (rank[name, dtype] for rank in ranks):
            assert (
                torch.equal(w, ranks[0][name, dtype][0])
                and torch.equal(values, ranks[0][name, dtype][1])
                and theirs == ranks[0][name, dtype][3]
            )
            if name != "aggressive to its end":
                assert (
                    (w - weights).abs().max() < tol
                    and (values - numbers).abs().max() < 10 * tol
                    and theirs == waiting
                )
            else:
                assert theirs is False
        assert (weights - start).abs().max() > 0.02 and weights.isfinite().all()


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    "part, name",
    [*(("assisted", name) for name in ASSISTED), *(("likelihoods", name) for name in LIKELIHOODS)],
)
def test_a_scheme_follows_one_process(job, part, name, world):
    (weights, numbers, start), ranks = (
        result(job, 0, 1)[part][name],
        [result(job, r, world)[part][name] for r in range(world)],
    )
    for w, values, _ in ranks:
        assert torch.equal(w, ranks[0][0]) and torch.equal(values, ranks[0][1])
        assert (w - weights).abs().max() < 1e-12 and (values - numbers).abs().max() < 1e-11
    assert (weights - start).abs().max() > 0.02 and weights.isfinite().all()


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("loop", ["begun_apart", "routed"])
def test_a_loop_of_ones_own_follows_one_process(job, loop, world):
    "Begun with other weights, averages and moments; with tensors that some ranks do not reach."
    one, ranks = (
        result(job, 0, 1)["loops"][loop],
        [result(job, r, world)["loops"][loop] for r in range(world)],
    )
    for weights in ranks:
        assert torch.equal(weights, ranks[0]) and (weights - one).abs().max() < 1e-11


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_that_are_forgotten_or_not_served_are_named(job, world):
    for rank in range(world):
        loops = result(job, rank, world)["loops"]
        assert len(loops["lone_warnings"]) == (world > 1)
        assert all(f"one of {world} processes" in text for text in loops["lone_warnings"])
        assert ("uses DistributedDataParallel" in loops["parallel_error"]) == (world > 1)
        assert ("sparse: build its layer with sparse=False" in loops["sparse_error"]) == (world > 1)


@pytest.mark.parametrize("world", [2, 3])
def test_the_mean_of_the_ranks_own_penalties_is_another_rule(job, world):
    one = result(job, 0, 1)
    plain, consensus = (
        one["every"][rule, "momentum", "float64"][0] for rule in ("simultaneous", "consensus")
    )
    assert torch.equal(one["own"][0], consensus)
    wrong = (result(job, 0, world)["own"][0] - consensus).norm() / (consensus - plain).norm()
    assert wrong > 0.01


def test_fit_follows_one_process(job, outcomes):
    assert outcomes["whole"]["codes"] == [0] and outcomes["spread"]["codes"] == [0] * 3
    one, ranks = (
        torch.load(job / "whole-0.pt"),
        [torch.load(job / f"spread-{r}.pt") for r in range(3)],
    )
    assert_same_run(one, ranks[0])
    for other in ranks[1:]:
        assert other["records"] == ranks[0]["records"]
        assert all(torch.equal(a, b) for a, b in zip(flat(other), flat(ranks[0])))
    assert {p.name for p in (job / "spread").iterdir()} == {
        p.name for p in (job / "whole").iterdir()
    }
    assert len(outcomes["spread"]["said"][0].splitlines()) == 3 and outcomes["spread"]["said"][
        1:
    ] == [
        "",
        "",
    ]


def test_only_the_first_rank_calls_callbacks(job, outcomes):
    assert outcomes["whole"]["codes"] == [0] and outcomes["spread"]["codes"] == [0] * 3
    whole = json.loads((job / "whole-0-calls.json").read_text())
    ranks = [json.loads((job / f"spread-{rank}-calls.json").read_text()) for rank in range(3)]
    assert ranks == [whole, [], []]
    names = [name for name, _, _ in whole]
    assert names[0] == "on_train_begin" and names[-1] == "on_train_end"
    assert names.count("on_step") == 30 and names.count("on_epoch") == 3


def flat(run):
    """Return the weights of a run."""
    return list(run["state"]["model"]["weights"].values())


def assert_same_run(a, b):
    """Assert that two runs agree to rounding."""
    assert all(
        torch.allclose(x, y, rtol=1e-5, atol=2e-6) for x, y in zip(flat(a), flat(b), strict=True)
    )
    assert [r["step"] for r in a["records"]] == [r["step"] for r in b["records"]]
    for x, y in zip(a["records"], b["records"]):
        for split in ("train", "valid"):
            assert x[split] == pytest.approx(y[split], rel=1e-4)


def test_a_checkpoint_moves_from_two_to_three_to_one(job, outcomes):
    assert [outcomes[f"moved {w}"]["codes"] for w in (2, 3, 1)] == [[0] * 2, [0] * 3, [0]]
    assert_same_run(torch.load(job / "whole-0.pt"), torch.load(job / "moved-0.pt"))


SIGNALS = {"signal", "measured"}


@pytest.mark.parametrize("how", [how for how in FAULTS if how not in SIGNALS])
def test_one_ranks_fault_ends_all_and_is_reported_once(outcomes, how):
    said = "".join(outcomes[how]["said"])
    assert said.count("Traceback (most recent call last)") == 1
    assert outcomes[how]["codes"] == {
        "kill 1": [1, -signal.SIGKILL],
        "kill 0": [-signal.SIGKILL, 1],
    }.get(how, [1, 1])
    last = next(s for s in outcomes[how]["said"] if "Traceback" in s)
    word = {
        "raise": "ZeroDivisionError",
        "kill 1": "RankError: another rank",
        "kill 0": "RankError: another rank",
        "weights": "different weights",
        "nan": "step 7: the loss of player 'model' is not finite",
        "evaluate": "ZeroDivisionError",
        "model": "has shape (16, 784) there and (17, 784) here",
        "noise": "different random numbers",
        "data": "belongs to another loader",
    }[how]
    assert word in last[last.index("Traceback") :]


def test_a_signal_while_rank_0_measures_stops_all_at_once(job, outcomes):
    assert outcomes["measured"]["codes"] == [143, 143]
    first, second = outcomes["measured"]["said"]
    assert "stopped: SIGTERM after step" in first and "resume=True" in first and second == ""
    state = checkpoint.load(job / "measured/checkpoint.pt")
    assert (state["epoch"], state["trained"]) == (0, 1)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(job, outcomes):
    assert outcomes["signal"]["codes"] == [143, 143]
    first, second = outcomes["signal"]["said"]
    assert "stopped: SIGTERM after step" in first and "resume=True" in first and second == ""
    step = int(first.split("after step ")[1].split(":")[0])
    assert 13 <= step < 30


@pytest.mark.parametrize("how", ["signal", "kill 1"])
def test_what_was_stopped_goes_on(job, outcomes, how):
    assert set(outcomes[f"{how} resumed"]["codes"]) == {0}
    assert_same_run(torch.load(job / "whole-0.pt"), torch.load(job / f"{how}-0.pt"))


def test_patience_ends_all_ranks_and_gives_all_the_best(job, outcomes):
    assert outcomes["early"]["codes"] == [0, 0]
    ranks = [torch.load(job / f"early-{r}.pt") for r in range(2)]
    best = checkpoint.load(job / "early/best.pt")
    assert [[r["valid"]["bits"] for r in rank["records"]] for rank in ranks] == [
        [3.0, 2.0, 4.0, 5.0]
    ] * 2 and best["epoch"] == 2
    for rank in ranks:
        assert all(
            torch.equal(a, b)
            for a, b in zip(flat(rank), best["scheme"]["model"]["weights"].values())
        )


@pytest.mark.parametrize("n, world", [(12, 3), (7, 3), (2, 3), (1, 4), (100, 7)])
def test_the_parts_are_the_batch(n, world):
    parts = [rank_slice(n, r, world) for r in range(world)]
    assert sum(share for _, share in parts) == pytest.approx(1)
    assert torch.equal(
        torch.cat([torch.arange(n)[rows] for rows, share in parts if share]), torch.arange(n)
    )
    assert all(len(torch.arange(n)[rows]) >= 1 for rows, _ in parts)
    assert max(s for _, s in parts) - min(s for _, s in parts) < 1 / n + 1e-9


def test_batches_that_cannot_be_spread_say_so():
    ranks = Ranks.__new__(Ranks)
    ranks.rank, ranks.world = 1, 2
    for batch in ((torch.ones(3), torch.ones(2)), {"x": torch.ones(0)}):
        with pytest.raises(ValueError, match="rows"):
            ranks.shard(batch)
    batch = {
        "x": torch.arange(4),
        "pair": [torch.arange(4), None],
        "scale": torch.tensor(2.0),
        "name": "a",
    }
    got = ranks.shard(batch)
    assert (
        got["x"].tolist() == got["pair"][0].tolist() == [2, 3]
        and got["pair"][1] is None
        and got["scale"] == 2
        and got["name"] == "a"
    )
    assert (
        ranks.shard(None) is None
        and ranks.share == 0.5
        and slice_batch(torch.tensor(1.0), slice(0, 1)) == 1
    )


def torchrun(world, *args, program=("-m", "optgen"), **kwargs):
    """Start the command line, or another program, on so many ranks."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(world),
        *map(str, (*program, *args)),
    ]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV, **kwargs
    )


NAMES_THREADS = """
import atexit
import os
from pathlib import Path

def name_threads():
    names = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
    os.write(1, f"threads at the end: {sorted(names)}\\n".encode())

atexit.register(name_threads)
from optgen.cli.main import main
main()
"""


def log(run):
    """Return the records of a run folder."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    "The folder of a run of two ranks, started by torchrun, and what they said."
    folder = tmp_path_factory.mktemp("torchrun")
    script = folder / "named.py"
    script.write_text(NAMES_THREADS)
    args = [*TINY[:-1], "lines", "--epochs", 2, "--out", folder / "run"]
    ranks = torchrun(2, *args, program=[script])
    said, errors = ranks.communicate()
    assert ranks.returncode == 0, errors
    return folder / "run", said


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are named by Linux")
def test_the_threads_of_the_ranks_end_before_the_interpreter(launched):
    "One of gloo's that frees a tensor later ends the process with SIGABRT, now and then."
    threads = [line for line in launched[1].splitlines() if line.startswith("threads at the end:")]
    assert len(threads) == 2 and "gloo" not in " ".join(threads), threads


def test_torchrun_on_the_command_line(launched, tiny_run):
    "Two epochs are those of one process; a third is stopped by a signal and finished alone."
    run, said = launched
    assert said.count("beta-vae on digits") == said.count("epoch 2/2") == said.count("done:") == 1
    for a, b in zip(log(run), log(tiny_run), strict=True):
        for split in ("train", "valid"):
            assert a[split] == pytest.approx(b[split], rel=1e-4)
    second = torchrun(2, "train", "--resume", run, "--epochs", 400, "--progress", "none")
    while len(log(run)) < 3:
        time.sleep(0.05)
    second.send_signal(signal.SIGTERM)
    said = second.communicate()[1]
    assert (
        second.returncode
        and said.count("optgen: SIGTERM after step") == 1
        and "torchrun --nproc-per-node 2 -m optgen train --resume" in said
    )
    step = int(said.split("SIGTERM after step ")[1].split(":")[0])
    assert checkpoint.load(run / "checkpoint.pt")["step"] == step
    assert resume(run, step // 90 + 1) == 0


@pytest.mark.parametrize(
    "what, code, word", [("usage", 2, "'--epochs'"), ("missing", 2, "nowhere")]
)
def test_a_mistake_on_the_command_line_is_reported_once(outcomes, what, code, word):
    said = "".join(outcomes[what]["said"])
    assert len(said.splitlines()) == 1 and said.startswith("optgen: ") and word in said
    assert sorted(outcomes[what]["codes"]) == sorted([1, code])


def test_a_lone_process_has_no_ranks(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for world in ("1", "2"):  # a cluster may set WORLD_SIZE for something else
        monkeypatch.setenv("WORLD_SIZE", world)
        assert init_ranks() is None


@pytest.mark.cuda
def test_on_two_gpus(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    args = [*TINY, "--epochs", 2, "--device", "cuda"]
    assert optgen(*args, "--out", tmp_path / "one").returncode == 0
    two = torchrun(2, *args, "--out", tmp_path / "two")
    assert two.wait() == 0, two.stderr.read()
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert a["valid"] == pytest.approx(b["valid"], rel=1e-3)
