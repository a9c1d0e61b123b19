"What several test files share."

import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

TINY = [
    "train",
    "beta-vae",
    "--hidden",
    "16,8",
    "--z-dim",
    "2",
    "--binarize",
    "static",
    "--progress",
    "none",
]


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "cuda: needs a CUDA device; skipped, saying so, where there is none"
    )


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


def optgen(*args, **kwargs):
    "Run the command line in a process of its own, on one thread."
    env = os.environ | {"OMP_NUM_THREADS": "1"} | kwargs.pop("env", {})
    return subprocess.run(
        [sys.executable, "-c", "from optgen.cli.main import main; main()", *map(str, args)],
        capture_output=True,
        text=True,
        env=env,
        **kwargs,
    )


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def own_seed():
    "Every test draws as if it were alone."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    "The folder of a small finished run of two epochs on the digits; not to be changed."
    out = tmp_path_factory.mktemp("runs") / "tiny"
    done = optgen(*TINY, "--epochs", "2", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def few_images(tmp_path_factory):
    """Sixty grey images of 8 x 8 in a folder; not to be changed."""
    folder, generator = tmp_path_factory.mktemp("images") / "mine", rng()
    folder.mkdir()
    for i in range(60):
        pixels = torch.randint(256, (8, 8), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture
def no_pictures(monkeypatch):
    """To save time, a run leaves no pictures."""
    monkeypatch.setattr("optgen.training.callbacks.Pictures.on_epoch", lambda *args: None)
