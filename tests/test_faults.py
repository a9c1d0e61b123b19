"What happens to runs: killed, interrupted, out of disk, damaged, attacked."

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, optgen

from cli_helpers import resume, run
from optgen.training import checkpoint

pytestmark = pytest.mark.skipif(
    os.name != "posix", reason="signals and file-size limits are POSIX's"
)


KILLER = Path(__file__).with_name("killer.py")


def weights(folder):
    """Return the weights in the checkpoint of a run folder."""
    return checkpoint.load(folder / "checkpoint.pt")["scheme"]["model"]["weights"]


def log(folder):
    """Return the records of a run folder, without what depends on the clock."""
    return [
        {k: v for k, v in json.loads(line).items() if "second" not in k}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def assert_same(a, b):
    """Assert that two run folders hold the same records and the same weights."""
    assert log(a) == log(b)
    assert all(
        torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values(), strict=True)
    )


def test_killed_twenty_times_it_is_the_run_that_was_not(tmp_path):
    seed = int.from_bytes(os.urandom(2), "big")
    killed = subprocess.run(
        [sys.executable, KILLER, tmp_path / "killed", str(seed), json.dumps(TINY)],
        capture_output=True,
        text=True,
    )
    assert killed.returncode == 0, f"seed {seed}: {killed.stderr}"
    found = json.loads(killed.stdout.splitlines()[-1])
    assert found["kills"] == 20 and found["inside"] >= 3, found
    epochs = found["step"] // 90 + 2
    assert resume(tmp_path / "killed", epochs) == 0
    assert run(*TINY, "--epochs", epochs, "--out", tmp_path / "whole") == 0
    assert_same(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, tiny_run, signum):
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "optgen",
        *TINY,
        "--epochs",
        "2",
        "--checkpoint-steps",
        "1",
        "--out",
        str(out),
    ]
    child = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    while not (out / "checkpoint.pt").exists():
        time.sleep(0.002)
    child.send_signal(signum)
    said = child.communicate()[1]
    assert child.returncode == 128 + signum and len(said.splitlines()) == 1
    command = said.split("go on with: optgen ")[1].split()
    assert run(*command, "--progress none") == 0
    assert_same(out, tiny_run)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, tiny_run):
    import resource

    run = shutil.copytree(tiny_run, tmp_path / "run")
    before = weights(run)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    full = optgen("train", "--resume", run, "--epochs", "4", "--progress", "none", preexec_fn=limit)
    assert full.returncode == 1 and len(full.stderr.splitlines()) == 1
    assert "cannot write" in full.stderr and "the one written before is whole" in full.stderr
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights(run).values()))
    assert not list(run.glob(".*.tmp"))
    assert resume(run, 4) == 0
    assert len(log(run)) == 4


def damage(run, how):
    """Damage the checkpoint of a run folder."""
    path = run / "checkpoint.pt"
    whole = path.read_bytes()
    if how == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    if how == "altered":
        at = len(whole) // 2
        path.write_bytes(
            whole[:at] + bytes(b ^ 0xFF for b in whole[at : at + 64]) + whole[at + 64 :]
        )
    if how == "empty":
        path.write_bytes(b"")
    if how == "foreign":
        torch.save({"weight": torch.ones(3)}, path)
    if how == "newer":
        torch.save(
            {"format": checkpoint.FORMAT, "version": checkpoint.VERSION + 1, "state": {}}, path
        )
    if how == "absent":
        path.unlink()


DAMAGE = {
    "truncated": "truncated",
    "altered": "altered",
    "empty": "truncated",
    "foreign": "not written by optgen",
    "newer": "upgrade",
    "absent": "no checkpoint",
}


@pytest.mark.parametrize(
    "command, how",
    [
        (c, h)
        for c in ("train", "sample", "evaluate")
        for h in DAMAGE
        if (c, h) != ("train", "absent")
    ],
)
def test_a_bad_checkpoint_is_refused_in_one_line(tmp_path, tiny_run, capsys, command, how):
    from optgen.cli.main import main

    run = shutil.copytree(tiny_run, tmp_path / "run")
    damage(run, how)
    kept = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as end:
        main(
            ["train", "--resume", str(run), "--epochs", "3"]
            if command == "train"
            else [command, str(run)]
        )
    said = capsys.readouterr().err
    assert (
        end.value.code == 2
        and len(said.splitlines()) == 1
        and DAMAGE[how] in said
        and "checkpoint.pt" in said
    )
    assert all(p.read_bytes() == content for p, content in kept.items())


class Bomb:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda bomb, path: pickle.dump(bomb, open(path, "wb")),
        torch.save,
        lambda bomb, path: torch.save(
            {"format": checkpoint.FORMAT, "version": 1, "state": {"scheme": bomb}}, path
        ),
    ],
)
def test_no_code_of_a_checkpoint_runs(tmp_path, tiny_run, capsys, wrap):
    from optgen.cli.main import main

    run = shutil.copytree(tiny_run, tmp_path / "run")
    wrap(Bomb(str(tmp_path / "exploded")), run / "checkpoint.pt")
    for command in (["sample", str(run)], ["evaluate", str(run)], ["train", "--resume", str(run)]):
        with pytest.raises(SystemExit) as end:
            main(command)
        assert end.value.code == 2 and not (tmp_path / "exploded").exists()
    capsys.readouterr()


def test_a_broken_run_is_named_and_its_last_checkpoint_kept(tmp_path, capfd):
    options = "--optimizer sgd --lr 1e30 --checkpoint-steps 1 --epochs 1 --out"
    assert run(*TINY, options, tmp_path / "run") == 1
    said = capfd.readouterr().err
    assert len(said.splitlines()) == 1
    assert "of player 'model' is not finite" in said.replace(" after its update", "")
    step = int(said.split("step ")[1].split(":")[0])
    state = checkpoint.load(tmp_path / "run/checkpoint.pt")
    assert state["step"] == step - 1 and all(
        w.isfinite().all() for w in state["scheme"]["model"]["weights"].values()
    )


def test_a_longer_run_that_is_stopped_again_knows_how_long(tmp_path, tiny_run):
    run = shutil.copytree(tiny_run, tmp_path / "a run")
    command = [
        sys.executable,
        "-m",
        "optgen",
        "train",
        "--resume",
        str(run),
        "--epochs",
        "300",
        "--progress",
        "none",
    ]
    child = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    while len(log(run)) < 3:
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    assert (
        f"--resume '{run}'" in child.communicate()[1] and child.returncode == 128 + signal.SIGTERM
    )
    assert json.loads((run / "config.json").read_text())["epochs"] == 300


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path, tiny_run):
    out = shutil.copytree(tiny_run, tmp_path / "run")
    (out / "checkpoint.pt").unlink()
    assert run("train --resume", out, "--progress none") == 0
    assert_same(out, tiny_run)
