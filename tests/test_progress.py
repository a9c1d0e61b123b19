"""Bars of the command line: who sees them, what they count, and that a pipe sees nothing."""

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
import types

import pytest
import torch
from conftest import optgen

from optgen import console
from optgen.console import progress_bar, progress_shown, track
from optgen.data.folders import image_folder
from optgen.models.vae import VAE
from optgen.schemes.elbo import BetaVAE
from optgen.training.drawing import draw_images
from optgen.training.trainer import fit

# Every bar is shown after a hundredth of a second, so that quick commands are slow ones.
AT_ONCE = """
import sys
from optgen import console
from optgen.cli.main import main
console.SECOND = 0.01
main(sys.argv[1:])
"""


class Terminal(io.StringIO):
    """An error stream that claims to be a terminal."""

    def isatty(self):
        """Return True."""
        return True


def run_on_terminal(*words, **env):
    """Return what a command writes to a terminal of 80 columns, and to its standard output.

    Args:
        *words: the command.
        **env: environment variables to add.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    settings = {"stdout": subprocess.PIPE, "stderr": theirs, "stdin": subprocess.DEVNULL}
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | env
    process = subprocess.Popen([*map(str, words)], env=environment, **settings)
    os.close(theirs)
    written = b""
    with contextlib.suppress(OSError):  # with which Linux ends the reading
        while chunk := os.read(ours, 65536):
            written += chunk
    os.close(ours)
    output = process.stdout.read().decode()
    assert process.wait() == 0, written
    return written.decode(), output


def lines_of(written):
    """Return what a terminal was shown, redrawing after redrawing, without codes."""
    return [re.sub("\x1b\\[.", "", line).strip() for line in re.split("[\r\n]", written)]


def set_error_stream(monkeypatch, stream):
    """Replace the error stream of bars; pytest replaces `sys.stderr` itself."""
    streams = types.SimpleNamespace(stderr=stream, stdout=sys.stdout)
    monkeypatch.setattr(console, "sys", streams)


@pytest.fixture
def terminal(monkeypatch):
    """Make the error stream a terminal on which bars are shown at once, and return it."""
    monkeypatch.setattr(console, "SECOND", 0.01)
    stream = Terminal()
    set_error_stream(monkeypatch, stream)
    return stream


def wait_for(stream, text):
    """Wait until a text was written."""
    for _ in range(2000):
        if text in stream.getvalue():
            return
        time.sleep(0.005)
    raise AssertionError(f"{text!r} was not written: {stream.getvalue()!r}")


def test_an_evaluation_shows_a_bar_on_a_terminal_and_nothing_in_a_pipe(tiny_run):
    command = (sys.executable, "-c", AT_ONCE, "evaluate", tiny_run, "--k", 50, "--json")
    written, output = run_on_terminal(*command)
    shown = lines_of(written)
    counts = [int(n) for line in shown for n in re.findall(r"^measuring: .* (\d+)/2000 ", line)]
    assert counts == sorted(counts) and len(set(counts)) > 2 and counts[-1] <= 2000
    assert any(re.fullmatch(r"starting \[\d\d:\d\d\]", line) for line in shown)
    assert shown[-1] == "" and all(len(line) < 80 for line in shown)
    piped = optgen("evaluate", tiny_run, "--k", 50, "--json")
    assert piped.stderr == "" and piped.stdout == output and output.count("\n") == 1


def test_a_bar_ticks_while_one_item_takes_long(terminal):
    with progress_shown():
        for i in track(range(2), "thinking", 2):
            wait_for(terminal, f"| {i}/2 [")
            drawn = terminal.getvalue().count("thinking")
            while terminal.getvalue().count("thinking") < drawn + 3:
                time.sleep(0.005)
    assert lines_of(terminal.getvalue())[-1] == ""


def test_what_is_done_before_the_bar_appears_is_counted(terminal, monkeypatch):
    monkeypatch.setattr(console, "SECOND", 0.3)
    with progress_shown(), progress_bar("counting", 10) as advance:
        advance(4)
        advance(3)
        wait_for(terminal, "counting:  70%")
        assert "7/10" in terminal.getvalue() and "0%|" not in terminal.getvalue().split("70%")[0]
        advance(3)
    assert lines_of(terminal.getvalue())[-1] == ""


def test_short_work_shows_nothing(terminal, monkeypatch):
    monkeypatch.setattr(console, "SECOND", 60.0)
    with progress_shown():
        assert [*track("abc", "spelling", 3)] == ["a", "b", "c"]
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("of", [["a"], ["bb", "a"], []])
def test_items_are_yielded_as_they_are(of, terminal):
    with progress_shown():
        assert [*track(iter(of), "reading", 3, "letter", len)] == of


@pytest.mark.parametrize("why", ["not asked for", "asked not to", "no terminal", "second rank"])
def test_nothing_is_shown(why, terminal, monkeypatch):
    stream = io.StringIO() if why == "no terminal" else terminal
    set_error_stream(monkeypatch, stream)
    monkeypatch.setenv("RANK", "1" if why == "second rank" else "0")
    threads = threading.active_count()
    with contextlib.ExitStack() as stack:
        if why != "not asked for":
            stack.enter_context(progress_shown())
        if why == "asked not to":
            stack.enter_context(progress_shown(False))
        with progress_bar("hiding"):
            assert threading.active_count() == threads
            time.sleep(0.05)
    assert stream.getvalue() == ""


def test_a_bar_is_removed_and_its_thread_ends_where_the_work_fails(terminal):
    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError), progress_shown(), progress_bar("failing"):
        wait_for(terminal, "failing [")
        raise ZeroDivisionError
    assert lines_of(terminal.getvalue())[-1] == "" and threading.active_count() == threads
    with progress_shown():
        items = track(range(9), "leaving", 9)
        next(items)
        wait_for(terminal, "leaving: ")
        items.close()
    assert lines_of(terminal.getvalue())[-1] == "" and threading.active_count() == threads


def draw_late(terminal, what):
    """Return a function that draws 64 images, the bar of which is waited for."""

    def draw(n):
        """Draw as many."""
        wait_for(terminal, what)
        return torch.zeros(n, 4)

    return draw


def test_drawing_counts_every_block_and_no_image_too_many(terminal):
    with progress_shown():
        chunks = draw_images(draw_late(terminal, "drawing: "), 150, chunk=100)
        for size, shown in ((128, "128/150"), (22, "150/150")):
            assert len(next(chunks)) == size
            wait_for(terminal, f"| {shown} [")
        assert next(chunks, None) is None


def test_a_folder_of_images_is_counted(few_images, terminal, monkeypatch):
    read = image_folder.__globals__["read_image"]

    def read_late(*args):
        """Read an image when the bar is there."""
        if threading.current_thread() is not threading.main_thread():
            wait_for(terminal, "reading: ")
        return read(*args)

    monkeypatch.setattr("optgen.data.folders.read_image", read_late)
    with progress_shown():
        images = image_folder(few_images, "train", size=8)
    totals = re.findall(r"reading: .*?/(\d+) \[", terminal.getvalue())
    assert set(totals) == {str(len(images))}


def test_fit_lets_a_validation_be_seen(terminal, monkeypatch):
    def evaluate_late(self, batches, **settings):
        """Return a number when the bar is there."""
        if how == "bar":
            wait_for(terminal, "validating [")
        return {"loss": 1.0}

    monkeypatch.setattr(BetaVAE, "evaluate", evaluate_late)
    x = torch.zeros(20, 1, 4, 4)
    for how in ("none", "bar"):
        fit(BetaVAE(VAE(16, 4, 4, 2)), x, valid=x, batch_size=10, samples=0, progress=how)
        assert ("validating" in terminal.getvalue()) == (how == "bar")
