"Helpers and fixtures that several test files share."

import math
import os
import subprocess
import sys

import pytest
import torch
from fastcore.basics import num_cpus
from PIL import Image

from cli_helpers import run
from optgen.testing import generator, use_one_core
from optgen.training import callbacks

# Arguments of the command that trains the smallest VAE.
TINY = "train beta-vae --hidden 16,8 --z-dim 2 --binarize static --progress none".split()

use_one_core()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    "Run the whole suite on every core, unless the command names tests or a number of workers."
    option, worker = config.option, hasattr(config, "workerinput")
    if (
        worker
        or option.file_or_dir
        or option.usepdb
        or getattr(option, "numprocesses", 0) is not None
    ):
        return
    option.numprocesses = min(num_cpus(), 8)
    option.dist, option.loadscopereorder = "loadfile", False


def pytest_configure(config):
    "Register the marker of tests that need a CUDA device."
    config.addinivalue_line(
        "markers", "cuda: needs a CUDA device; skipped with this reason where there is none"
    )


def pytest_collection_modifyitems(items):
    "Skip the tests that need a CUDA device where there is none."
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


def optgen(*args, env=None, **kwargs):
    """Run the command line in a process of its own.

    Args:
        *args: arguments of the command.
        env: environment variables to add.
        **kwargs: further arguments of `subprocess.run`.

    Returns:
        The finished process, with its output as text.
    """
    return subprocess.run(
        [sys.executable, "-m", "optgen", *map(str, args)],
        capture_output=True,
        text=True,
        env=os.environ | (env or {}),
        **kwargs,
    )


def rng(seed=0):
    "Return a random generator with the given seed."
    return generator(seed)


@pytest.fixture(scope="session", autouse=True)
def curves_drawn_once():
    """Draw the curves of each kind of run once, and give runs of the same kind a copy.

    A quarter of the tests' time would be these figures, whose lines tests/test_viz.py looks at.
    """
    draw, drawn = callbacks.Pictures.draw_curves, {}

    def draw_once(self, records, path):
        parts = [record.get(part, {}) for record in records for part in ("train", "valid")]
        numbers = [number for part in parts for number in part.values()]
        finite = all(map(math.isfinite, numbers))
        # A test may put another function in the place of `plot_curves`.
        kind = (callbacks.plot_curves, len(records) > 1, finite, *dict.fromkeys(map(tuple, parts)))
        if kind not in drawn:
            draw(self, records, path)
            drawn[kind] = path.read_bytes()
        path.write_bytes(drawn[kind])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks.Pictures, "draw_curves", draw_once)
        yield


@pytest.fixture(autouse=True)
def own_seed():
    "Seed every test alike, and restore the random state after it."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    "Return the folder of a finished run of two epochs on the digits; tests must not change it."
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert run(*TINY, "--epochs 2 --out", out) == 0
    return out


@pytest.fixture(scope="session")
def few_images(tmp_path_factory):
    "Return a folder of sixty gray images of 8 x 8; tests must not change it."
    folder, random = tmp_path_factory.mktemp("images") / "mine", rng()
    folder.mkdir()
    for i in range(60):
        pixels = torch.randint(256, (8, 8), dtype=torch.uint8, generator=random)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture
def no_pictures(monkeypatch):
    "Leave out the pictures of runs, to save time."
    monkeypatch.setattr("optgen.training.callbacks.Pictures.on_epoch", lambda *args: None)
