"""A run folder that was edited, damaged, shared or left half made: one sentence, nothing lost."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY

from cli_helpers import assert_one_line, run, train_args
from optgen.data.images import digits
from optgen.games import Game, Player
from optgen.models.vae import VAE
from optgen.optim import Adam
from optgen.schemes.elbo import BetaVAE
from optgen.testing import flat_weights
from optgen.training import checkpoint
from optgen.training.folder import RunFolder
from optgen.training.trainer import fit
from optgen.viz import read_log

pytestmark = pytest.mark.usefixtures("no_pictures")

FEW = digits("train").subset(torch.arange(40))
QUIET = {"progress": "none", "batch_size": 20, "binarize": "dynamic", "samples": 0, "ema": 0.9}


def new_scheme(seed: int = 0) -> BetaVAE:
    """Return a small scheme."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VAE(784, 6, 5, 2)
    return BetaVAE(model, optimizer=Adam(model.parameters(), lr=0.01))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of two epochs of `fit`; tests must not change it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    fit(new_scheme(), FEW, epochs=2, out=out, **QUIET)
    return out


# The configuration


@pytest.fixture(scope="module")
def small_run(tmp_path_factory, few_images) -> Path:
    """A run of `optgen train`; tests must not change it."""
    out = tmp_path_factory.mktemp("small") / "run"
    args = "--hidden 8,6 --z-dim 2 --epochs 1 --ema 0.5 --out"
    assert run(*train_args("beta-vae", few_images, args), out) == 0
    return out


WRONG: list[Any] = [[], {}, [1], "", "x", -1, 0.5, 1e400, float("nan"), 2**70, None, True]
ENTRIES = ["scheme", "options", "epochs", "shape"]
OPTIONS = ["batch_size", "lr", "hidden", "z_dim", "beta", "k", "estimator", "data", "holdout"]
OPTIONS += ["image_size", "ema", "seed", "precision", "patience", "optimizer", "compile", "model"]
OPTIONS += ["likelihood", "binarize", "steps", "epoch_steps", "checkpoint_steps", "inference"]


def write_config(folder: Path, config: Any) -> None:
    """Write a configuration."""
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("where", [*ENTRIES, *(f"options.{name}" for name in OPTIONS)])
def test_a_wrong_entry_of_a_configuration_is_one_sentence(small_run, tmp_path, capsys, where):
    """No entry makes a traceback: it is refused by one line, or the run is evaluated."""
    folder = shutil.copytree(small_run, tmp_path / "run")
    config = json.loads((small_run / "config.json").read_text())
    *parents, name = where.split(".")
    for value in WRONG:
        changed = copy.deepcopy(config)
        (changed[parents[0]] if parents else changed)[name] = value
        write_config(folder, changed)
        capsys.readouterr()
        code = run("evaluate", folder, "--limit 2 --k 2")
        said = capsys.readouterr().err
        assert code in (0, 2), (value, said)
        if code:
            assert_one_line(said, "optgen: ")
        if not parents and value != config[name]:
            assert code, (value, "was taken")


@pytest.mark.parametrize("where", [*ENTRIES, *(f"options.{name}" for name in OPTIONS)])
def test_a_missing_entry_of_a_configuration(small_run, tmp_path, capsys, where):
    folder = shutil.copytree(small_run, tmp_path / "run")
    config = json.loads((small_run / "config.json").read_text())
    *parents, name = where.split(".")
    (config[parents[0]] if parents else config).pop(name, None)
    write_config(folder, config)
    code = run("evaluate", folder, "--limit 2 --k 2")
    assert code in (0, 2) and (code or parents)
    if code:
        assert_one_line(capsys.readouterr().err, "optgen: ")


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", "3", '"x"', "\x00", '{"scheme": 1}', "[" * 9999, "{} {}"]
)
@pytest.mark.parametrize("command", ["evaluate", "sample", "train --resume"])
def test_a_configuration_that_is_none(small_run, tmp_path, capsys, text, command):
    folder = shutil.copytree(small_run, tmp_path / "run")
    (folder / "config.json").write_text(text)
    assert run(command, folder) == 2
    assert_one_line(capsys.readouterr().err, "optgen: ")


def test_a_configuration_of_fit_that_cannot_be_read(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "config.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(checkpoint.CheckpointError, match="config.json can't be read"):
        fit(new_scheme(), FEW, epochs=3, out=folder, resume=True, **QUIET)


@pytest.mark.parametrize("resumed", [3, "x", {}, None])
def test_a_list_of_resumptions_that_is_none(finished, tmp_path, resumed):
    folder = shutil.copytree(finished, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    write_config(folder, config | {"resumed": resumed})
    with pytest.raises(checkpoint.CheckpointError, match="'resumed' of config.json must be a list"):
        fit(new_scheme(), FEW, epochs=3, out=folder, resume=True, **QUIET)


@pytest.mark.parametrize("value", [Path("x"), {1, 2}, torch.ones(1), [b"x"]])
def test_a_configuration_that_json_cannot_hold_is_found_before_the_first_step(tmp_path, value):
    with pytest.raises(ValueError, match=r"config\['mine'\] cannot be recorded"):
        fit(new_scheme(), FEW, out=tmp_path / "run", config={"mine": value}, **QUIET)
    assert not (tmp_path / "run").exists()


# The log


@pytest.mark.parametrize("at", [0, 1, 2, 4])
@pytest.mark.parametrize(
    "line", ["", "{", "null", "[1]", '{"epoch": "two"}', '{"epoch": 3, "train": 1}']
)
def test_a_bad_line_loses_no_other_line(tmp_path, at, line):
    lines = [json.dumps({"epoch": e, "train": {"loss": float(e)}}) for e in (1, 2, 3, 4)]
    damaged = [*lines[:at], line, *lines[at:]]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(damaged) + "\n")
    if line:
        with pytest.warns(UserWarning, match=rf"1 of 5 lines hold no record.*: line {at + 1}$"):
            records = read_log(path)
    else:
        records = read_log(path)
    assert records == [json.loads(text) for text in lines]


def test_a_line_that_a_crash_cut_off_is_left_out_without_a_word(tmp_path, recwarn):
    (tmp_path / "log").write_text('{"epoch": 1}\n{"epoch": 2, "tra')
    assert read_log(tmp_path / "log") == [{"epoch": 1}]
    assert not recwarn.list and read_log(tmp_path / "none") == []


def test_bytes_that_are_no_text_and_records_twice(tmp_path):
    (tmp_path / "log").write_bytes(
        b'{"epoch": 2}\n\xff\xfe\n{"epoch": 1}\n{"epoch": 2, "step": 9}\n'
    )
    with pytest.warns(UserWarning, match="1 of 4 lines"):
        assert read_log(tmp_path / "log") == [{"epoch": 1}, {"epoch": 2, "step": 9}]


def test_a_resumed_run_keeps_the_readable_lines(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    first, second = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text(f"oops\n{first}\n{second}\n")
    with pytest.warns(UserWarning, match="line 1"):
        records = fit(new_scheme(), FEW, epochs=3, out=folder, resume=True, **QUIET)
    assert [r["epoch"] for r in records] == [1, 2, 3]
    assert read_log(folder / "metrics.jsonl") == records
    assert records[:2] == [json.loads(first), json.loads(second)]


# The lock


HOLDER = """
import sys, time
from optgen.training.folder import RunFolder
folder = RunFolder(sys.argv[1], {})
folder.begin()
print("locked", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path) -> Iterator[subprocess.Popen]:
    """A process that holds a run folder."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "locked\n"
    yield child
    child.kill()
    child.wait()


def test_one_process_at_a_time_and_a_crash_releases(tmp_path, holder):
    with pytest.raises(FileExistsError, match=f"is being trained in by process {holder.pid}"):
        RunFolder(tmp_path / "run", {}, resume=True)
    holder.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
    holder.wait()
    folder = RunFolder(tmp_path / "run", {}, resume=True)
    folder.close()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.json"]


def test_two_fits_in_one_folder(tmp_path):
    class Nested:
        """Callback that begins a run in the folder of the run that calls it."""

        def on_step(self, run: Any, batch: Any, losses: Any) -> None:
            """Begin it."""
            for resume in (True, False):
                with pytest.raises(OSError, match="holds a run|no run to|is being trained in"):
                    fit(new_scheme(1), FEW, out=tmp_path, resume=resume, **QUIET)

    fit(new_scheme(), FEW, epochs=2, out=tmp_path, callbacks=[Nested()], **QUIET)
    assert [r["epoch"] for r in read_log(tmp_path / "metrics.jsonl")] == [1, 2]


# A start that fails


def test_a_start_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    scheme = new_scheme()
    monkeypatch.setattr(scheme, "draw", lambda batch: 1 / 0)
    for _ in range(2):  # the second one isn't blocked by the first
        with pytest.raises(ZeroDivisionError):
            fit(scheme, FEW, out=tmp_path / "a/b", **QUIET)
        assert not (tmp_path / "a").exists()
    fit(new_scheme(), FEW, out=tmp_path / "a/b", **QUIET)
    assert (tmp_path / "a/b/checkpoint.pt").exists()


def test_a_start_that_fails_leaves_the_files_of_others(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    scheme = new_scheme()
    monkeypatch.setattr(scheme, "draw", lambda batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(scheme, FEW, out=tmp_path, **QUIET)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_the_configuration_is_there_after_the_first_step(tmp_path):
    seen = []

    class Look:
        """Callback that notes which files are there."""

        def on_step(self, run: Any, batch: Any, losses: Any) -> None:
            """Note them before the run writes its own."""
            seen.append(sorted(p.name for p in tmp_path.iterdir() if p.name[0] != "."))

    fit(new_scheme(), FEW, out=tmp_path, callbacks=[Look()], **QUIET)
    assert seen == [[], ["checkpoint.pt", "config.json"]]


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_a_run_that_is_killed_at_its_start_blocks_nothing(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "optgen", *TINY, "--epochs", "300", "--out", str(out)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (out / ".lock").exists():
        time.sleep(0.002)
    child.kill()
    child.wait()
    begun = (out / "config.json").exists()
    folder = RunFolder(out, {}, resume=begun)
    folder.close()


# Checkpoints whose checksums hold and whose content is wrong


def paths_of(state: Any, depth: int) -> Iterator[tuple]:
    """Yield the keys that lead to each entry of nested containers, to a depth."""
    if depth and isinstance(state, (dict, list)):
        for key in state if isinstance(state, dict) else range(len(state)):
            yield (key,)
            yield from ((key, *rest) for rest in paths_of(state[key], depth - 1))


def replaced(state: dict, path: tuple, value: Any) -> dict:
    """Return a copy of a state with one entry replaced, or removed where the value is `...`."""
    new = copy.deepcopy(state)
    inner = new
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return new


TOP = ["scheme", "loader", "rng", "total", "ema", "step", "epoch", "seconds", "best", "best_epoch"]
TOP += ["trained", "images", "arguments"]
BAD_VALUES = [..., "x", None, [], {}, -1, torch.zeros(3, 5)]


def assert_refused_or_sound(folder: Path, state: dict) -> bool:
    """Assert that a state is refused by a `CheckpointError` and changes nothing, or can be used.

    Returns:
        Whether it was refused.
    """
    checkpoint.save(folder / "checkpoint.pt", state)
    scheme = new_scheme(seed=1)
    before = flat_weights(scheme.model).clone()
    try:
        fit(scheme, FEW, epochs=3, out=folder, resume=True, **QUIET)
    except checkpoint.CheckpointError as error:
        assert "\n" not in str(error) and str(folder) in str(error)
        assert torch.equal(flat_weights(scheme.model), before)
        return True
    except ValueError as error:  # the loader's own words
        assert "loader state" in str(error)
        assert torch.equal(flat_weights(scheme.model), before)
        return True
    return False


@pytest.mark.parametrize("name", TOP)
def test_a_wrong_entry_of_a_checkpoint(finished, tmp_path, name):
    state = checkpoint.load(finished / "checkpoint.pt")
    refused = 0
    for i, value in enumerate(BAD_VALUES):
        folder = shutil.copytree(finished, tmp_path / str(i))
        refused += assert_refused_or_sound(folder, replaced(state, (name,), value))
    assert refused >= 4


@pytest.mark.parametrize("part", ["scheme", "loader", "rng", "ema"])
def test_a_wrong_entry_inside_a_checkpoint(finished, tmp_path, part):
    """Every entry three levels down, removed and replaced."""
    state = checkpoint.load(finished / "checkpoint.pt")
    tried = refused = 0
    for path in paths_of(state[part], 2 if part in ("ema", "rng") else 3):
        for value in (..., "x", torch.zeros(3, 5)):
            folder = shutil.copytree(finished, tmp_path / "run", dirs_exist_ok=True)
            refused += assert_refused_or_sound(folder, replaced(state, (part, *path), value))
            tried += 1
    assert refused > tried / 2, (refused, tried)


@pytest.mark.parametrize(
    "path, value",
    [
        (("model", "optimizer", "state", 0, "m"), ...),
        (("model", "optimizer", "state", 0, "m"), torch.zeros(2, 784)),
        (("model", "optimizer", "param_groups", 0, "lr"), "fast"),
        (("model", "optimizer", "param_groups", 0, "lr"), ...),
        (("model", "optimizer", "param_groups", 0, "betas"), 3),
        (("model", "optimizer", "param_groups", 0, "params"), [0, 1]),
        (("model", "optimizer", "param_groups"), []),
        (("model", "optimizer"), {}),
        (("model", "weights", "p_net.0.weight"), torch.zeros(2, 2)),
        (("rule", "name"), "Nobody"),
        (("beta",), {"x": 1}),
    ],
)
def test_states_of_optimizers_and_parts_are_checked(finished, tmp_path, path, value):
    folder = shutil.copytree(finished, tmp_path / "run")
    state = checkpoint.load(folder / "checkpoint.pt")
    keys = state["scheme"]["model"]["optimizer"]["state"][0]
    path = tuple(next(iter(keys)) if key == "m" else key for key in path)
    assert assert_refused_or_sound(folder, replaced(state, ("scheme", *path), value))


@pytest.mark.parametrize("content", [None, 3, "x", [], {}, torch.zeros(2), {"scheme": 1}])
@pytest.mark.parametrize("command", ["evaluate", "sample", "train --resume"])
def test_a_checkpoint_that_is_no_state(small_run, tmp_path, capsys, content, command):
    folder = shutil.copytree(small_run, tmp_path / "run")
    checkpoint.save(folder / "checkpoint.pt", content)
    assert run(command, folder) == 2
    assert_one_line(capsys.readouterr().err, "checkpoint.pt", "restore the file from a copy")


@pytest.mark.parametrize("name", ["scheme", "ema", "epoch", "step", "best", "arguments"])
@pytest.mark.parametrize("value", [..., "x", [], {}, -1])
def test_a_wrong_entry_of_a_checkpoint_that_is_evaluated(small_run, tmp_path, capsys, name, value):
    folder = shutil.copytree(small_run, tmp_path / "run")
    state = checkpoint.load(folder / "checkpoint.pt")
    checkpoint.save(folder / "checkpoint.pt", replaced(state, (name,), value))
    code = run("evaluate", folder, "--limit 2 --k 2")
    assert code in (0, 2)
    if code:
        assert_one_line(capsys.readouterr().err, "checkpoint.pt")


def test_the_state_of_another_scheme_is_named(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(checkpoint.CheckpointError, match="scheme"):
        linear = torch.nn.Linear(784, 1)
        game = Game(
            net=Player(linear, lambda b: linear(b.x.flatten(1)).sum(), Adam(linear.parameters()))
        )
        fit(game, FEW, epochs=3, out=folder, resume=True, **QUIET)
