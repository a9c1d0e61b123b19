"""Consoles, signals, launchers and names: what surrounds a run does not end or mislead it."""

import errno
import io
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, optgen

from cli_helpers import assert_one_line, read_options, run, train_args
from data_helpers import refuses, write_folder
from optgen.console import LastingStream
from optgen.data.images import DataWarning
from optgen.data.loading import load, resolve_data
from optgen.training.guards import END_SIGNALS, DeferredSignals
from optgen.training.parallel import RankError, init_ranks
from optgen.training.trainer import fit

SMALL = "--hidden 8,8 --z-dim 2 --epochs 2"


def epochs_logged(folder):
    "Return the epochs in the log of a run."
    return [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").open()]


def train_with_lines(data, out):
    "Train for two epochs in this process, with a line each, and return the exit code."
    return run(*train_args("beta-vae", data, SMALL), "--progress lines --out", out)


# consoles


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "cp437", "koi8-r", "utf-8"])
def test_a_run_ends_well_on_a_console_of_any_encoding(
    encoding, few_images, tmp_path, monkeypatch, no_pictures
):
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding=encoding))
    assert train_with_lines(few_images, tmp_path / "run") == 0
    assert epochs_logged(tmp_path / "run") == [1, 2]
    lines = content.getvalue().decode(encoding).splitlines()
    separator = " · ".encode(encoding, "replace").decode(encoding)
    assert sum(line.startswith(f"epoch 2/2{separator}step") for line in lines) == 1


class BrokenStream(io.StringIO):
    """A stream that fails with an error when it is written to or flushed."""

    encoding, errors = "utf-8", "strict"

    def __init__(self, error, on_flush):
        super().__init__()
        self.error, self.on_flush, self.calls = error, on_flush, 0

    def fail(self):
        """Raise the error."""
        self.calls += 1
        raise self.error

    def write(self, text):
        """Fail, or take the text until it is flushed."""
        return len(text) if self.on_flush else self.fail()

    def flush(self):
        """Fail."""
        self.fail()


FAILURES = {
    "closed pipe": BrokenPipeError(errno.EPIPE, "Broken pipe"),
    "lost terminal": OSError(errno.EIO, "Input/output error"),
    "full disk": OSError(errno.ENOSPC, "No space left on device"),
    "closed file": ValueError("I/O operation on closed file"),
}


@pytest.mark.parametrize("on_flush", [False, True])
@pytest.mark.parametrize("case", FAILURES)
def test_a_run_goes_on_when_nobody_reads(
    case, on_flush, few_images, tmp_path, monkeypatch, capsys, no_pictures
):
    stream = BrokenStream(FAILURES[case], on_flush)
    monkeypatch.setattr(sys, "stdout", stream)
    assert train_with_lines(few_images, tmp_path / "run") == 0
    assert epochs_logged(tmp_path / "run") == [1, 2] and stream.calls == 1
    assert_one_line(capsys.readouterr().err, "can't be written", "optgen train goes on")
    assert sys.stdout is stream


@pytest.mark.parametrize("stream", [None, BrokenStream(FAILURES["closed pipe"], False)])
def test_a_run_needs_no_streams(stream, few_images, tmp_path, monkeypatch, no_pictures):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream)
    assert train_with_lines(few_images, tmp_path / "run") == 0
    assert epochs_logged(tmp_path / "run") == [1, 2]
    assert run("train beta-vae --data nowhere") == 2


@pytest.mark.parametrize("case", FAILURES)
def test_lines_of_a_training_in_a_program_do_not_end_it(case, monkeypatch, no_pictures):
    from test_data_faults import BYTES, Images, vae

    monkeypatch.setattr(sys, "stdout", BrokenStream(FAILURES[case], False))
    records = fit(vae(), Images(BYTES), epochs=2, batch_size=3, progress="lines")
    assert len(records) == 2


def test_a_short_command_reports_a_full_disk_and_not_a_closed_pipe(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", BrokenStream(FAILURES["closed pipe"], False))
    assert run("list") == 0 and capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "stdout", BrokenStream(FAILURES["full disk"], False))
    assert run("list") == 1
    assert_one_line(capsys.readouterr().err, "No space left on device")


def test_a_stream_is_wrapped_as_it_is(capfd):
    stream = LastingStream(sys.stdout)
    print("β", 1, file=stream, flush=True)
    assert capfd.readouterr().out == "β 1\n"
    assert stream.isatty() == sys.stdout.isatty() and stream.fileno() == sys.stdout.fileno()
    assert not hasattr(stream, "buffer")


# signals


def take_hangups() -> None:
    """Let SIGHUP act in a child, though this process may have been started to ignore it."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP on this system")
def test_a_hangup_after_the_reader_has_gone_saves_the_run_and_names_it(tmp_path, few_images):
    out = tmp_path / "run"
    words = [*TINY[:-2], "--data", few_images, "--image-size", 8, "--batch-size", 5]
    words += ["--epochs", 3000, "--progress", "lines", "--out", out]
    process = subprocess.Popen(
        [sys.executable, "-m", "optgen", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=take_hangups,
    )
    try:
        assert "beta-vae" in process.stdout.readline()
        assert process.stdout.readline().startswith("epoch 1/")
        process.stdout.close()  # head -2
        assert "optgen train goes on" in process.stderr.readline()
        process.send_signal(signal.SIGHUP)
        said = process.stderr.read()
        assert process.wait(60) == 128 + signal.SIGHUP
        assert_one_line(said, "SIGHUP after step", f"optgen train --resume {out}")
    finally:
        process.kill()
    state = torch.load(out / "checkpoint.pt", weights_only=True)["state"]
    assert f"after step {state['step']}:" in said


@pytest.mark.parametrize("signum", END_SIGNALS)
def test_a_signal_is_noted_unless_it_is_ignored(signum):
    former = signal.signal(signum, signal.SIG_IGN)
    try:
        with DeferredSignals() as signals:
            signal.raise_signal(signum)  # as under nohup
            assert signals.received is None
        assert signal.getsignal(signum) is signal.SIG_IGN
        signal.signal(signum, signal.SIG_DFL)
        with DeferredSignals() as signals:
            signal.raise_signal(signum)
            assert signals.received == signum
        assert signal.getsignal(signum) is signal.SIG_DFL
    finally:
        signal.signal(signum, former)


# launchers

LAUNCHED = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29555"}


@pytest.fixture
def launcher(monkeypatch):
    "Return a function that sets the variables of a launcher; None takes one away."

    def set_variables(**changes):
        for name, value in (LAUNCHED | {"LOCAL_RANK": None} | changes).items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize("world", [None, "", " ", "1", " 1 ", "0"])
def test_a_process_without_launcher_is_alone(launcher, world, capsys):
    launcher(WORLD_SIZE=world, RANK="x", MASTER_PORT="")
    assert init_ranks() is None
    assert run("--version") == 0


@pytest.mark.parametrize("name", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
@pytest.mark.parametrize("value", [None, ""])
def test_an_incomplete_launcher_is_reported_and_the_process_is_alone(launcher, name, value):
    launcher(**{name: value})
    with pytest.warns(UserWarning, match=f"WORLD_SIZE is 2, but {name} not set"):
        assert init_ranks() is None


@pytest.mark.parametrize(
    "name, value",
    [
        ("WORLD_SIZE", "abc"),
        ("WORLD_SIZE", "-2"),
        ("WORLD_SIZE", "2.0"),
        ("WORLD_SIZE", "1e3"),
        ("WORLD_SIZE", "9" * 30),
        ("RANK", "x"),
        ("RANK", "-1"),
        ("RANK", "2"),
        ("MASTER_PORT", "http"),
        ("MASTER_PORT", "99999"),
        ("LOCAL_RANK", "x"),
        ("LOCAL_RANK", "7"),
    ],
)
def test_a_broken_variable_of_a_launcher_is_one_line(launcher, name, value, capsys):
    launcher(**{name: value})
    with pytest.raises(RankError, match=f"{name} must be a whole number, 0 to .* got '{value}'"):
        init_ranks()
    assert run("list") == 1
    assert_one_line(capsys.readouterr().err, name, repr(value), "torchrun")


def test_processes_that_do_not_find_one_another_are_one_line(launcher):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        launcher(MASTER_PORT=str(taken.getsockname()[1]))
        with pytest.raises(RankError, match="don't find one another: .*unset WORLD_SIZE"):
            init_ranks()


@pytest.mark.parametrize("backend", ["nope"])
def test_an_unknown_backend_of_pyplot_is_left_out_in_one_line(backend, tmp_path):
    out = tmp_path / "run"
    done = optgen(*TINY, "--epochs", 1, "--out", out, env={"MPLBACKEND": backend})
    assert done.returncode == 0 and (out / "curves.png").exists()
    assert_one_line(done.stderr, "MPLBACKEND='nope' is unknown to Matplotlib")


# names


@pytest.fixture
def hiding_folder(tmp_path, monkeypatch):
    "Enter a folder that has images in sub-folders called as data sets are."
    for name in ("digits", "mnist", "mine"):
        write_folder(tmp_path / name, [f"{i}.png" for i in range(20)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_name_wins_over_a_folder_of_that_name(hiding_folder):
    with pytest.warns(DataWarning, match=r"the folder beside it is \./digits"):
        assert len(load("digits", "test")) == 2000
    folder = str(hiding_folder / "digits")
    for name in ("./digits", "digits/", "digits/.", "../" + hiding_folder.name + "/digits", folder):
        assert resolve_data(name) == folder
        assert load(name, size=8, holdout=0.5).shape == (1, 8, 8)
    assert resolve_data(Path("digits")) == folder
    assert resolve_data("mine") == str(hiding_folder / "mine")


@pytest.mark.parametrize("name", ["", " ", "\t", "Digits", "digit", "nowhere/at/all", "a\0b"])
def test_what_is_no_name_and_no_folder_is_refused(hiding_folder, name, capsys):
    with refuses(repr(name), "pass one of digits, mnist, fashion-mnist"):
        load(name)
    if "\0" not in name:
        assert run("train beta-vae --epochs 1 --data", Path(name) if name.strip() else "''") == 2
        assert_one_line(capsys.readouterr().err, "pass one of digits")
        assert not (hiding_folder / "runs").exists()


def test_the_command_line_trains_and_measures_the_set_that_is_named(
    hiding_folder, capsys, no_pictures
):
    few = "--hidden 8,8 --z-dim 2 --epochs 1 --batch-size 1000 --progress none"
    assert run("train beta-vae --data digits --out named", few) == 0
    said = capsys.readouterr()
    assert "9000 images to train on" in said.out
    assert_one_line(said.err, "digits is the data set of that name", "./digits")
    assert read_options(hiding_folder / "named")["data"] == "digits"
    assert run("evaluate named --k 2 --limit 100 --json") == 0
    assert json.loads(capsys.readouterr().out)["data"] == "digits"
    assert run("train beta-vae --data ./digits --image-size 8 --out folder", few) == 0
    assert read_options(hiding_folder / "folder")["data"] == str(hiding_folder / "digits")
    assert "images to train on" in capsys.readouterr().out


def test_images_from_outside_are_those_of_the_name(hiding_folder):
    from optgen.cli.measure import RunData
    from optgen.cli.runs import OpenRun, load_commands

    config = {"options": {"image_size": 28, "resize": "crop"}, "shape": [1, 28, 28]}
    data = RunData(OpenRun(config, load_commands()["beta-vae"], None, {}), "cpu", None)
    with pytest.warns(DataWarning):
        assert len(data.load("digits", "test", 1.0)) == 2000
    assert len(data.load("./digits", "test", 1.0)) == 20


def test_names_of_files_in_any_bytes_are_hashed(tmp_path):
    write_folder(tmp_path / "mine", ["a.png", "b.png"])
    os.rename(tmp_path / "mine/b.png", os.fsencode(tmp_path / "mine") + b"/\xff\n.png")
    data = load(tmp_path / "mine", holdout=0.0, size=8)
    assert len(data) == 2 and isinstance(data.fingerprint, int)
