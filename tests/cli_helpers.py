"""What the tests of the command line share: commands run in this process, and small data."""

import json
import shlex
from pathlib import Path
from typing import Any

import torch

from optgen.cli.main import main


def run(*args: object) -> int:
    """Run a command in this process and return its exit code; strings are split as a shell does."""
    words = []
    for arg in args:
        words += shlex.split(arg) if isinstance(arg, str) else [str(arg)]
    try:
        main(words)
    except SystemExit as error:
        return error.code
    return 0


def resume(folder: Path, epochs: int) -> int:
    """Go on with a run in this process and return the exit code."""
    return run("train --resume", folder, "--epochs", epochs, "--progress none")


def train_args(scheme: str, data: Path, text: str = "") -> tuple[object, ...]:
    """Return the arguments of a short training on small images of a folder."""
    return (f"train {scheme} --data", data, "--image-size 8 --batch-size 10 --progress none", text)


def read_options(folder: Path) -> dict[str, Any]:
    """Return the options of a run."""
    return json.loads((folder / "config.json").read_text())["options"]


def edit_config(folder: Path, scheme: str | None = None, **options: Any) -> None:
    """Change the scheme or options in the config.json of a run."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["scheme"] = scheme or config["scheme"]
    config["options"] |= options
    path.write_text(json.dumps(config))


def read_state(folder: Path) -> dict[str, Any]:
    """Return the training state in the checkpoint of a run."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)["state"]


def assert_one_line(message: str, *words: str) -> None:
    """Assert that an error is one line that contains all words."""
    assert message.count("\n") == 1, message
    for word in words:
        assert word in message, message
