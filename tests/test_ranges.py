"""Numbers out of range: every option and argument refuses them in one sentence that names it.

Tried are NaN, infinities, and numbers beyond int64, float32 or the memory of the machine.
"""

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cli_helpers import assert_one_line, run
from optgen.checks import check_count, check_number
from optgen.data.images import Batch, Images
from optgen.games import Game, Player
from optgen.optim import SGD
from optgen.options import limited_memory, name_largest_option, total_memory
from optgen.schemes.command import count_option, option
from optgen.training.trainer import fit

SMALL = {
    "beta-vae": "--hidden 8,6 --z-dim 3",
    "feedback-gan": "--model mlp --hidden 8 --z-dim 3",
    "assisted": "--hidden 8 --z-dim 3 --labels 20 --data digits",
    "lstm": "--hidden 4",
    "pixelcnn": "--channels 4 --layers 2",
    "made": "--hidden 8",
    "realnvp": "--model image --channels 4 --scales 1 --couplings 1",
    "maf": "--layers 2 --hidden 8",
    "ddpm": "--channels 4 --multiples 1,1",
}
BIG = str(10**30)
WHOLE = ("0", "-1", "1e3", "1.5", "nan", "inf", "2147483648", BIG, "9" * 5000)
REAL = ("nan", "-inf", "inf", "1e999", "1e39", "1e-60", "-1")
# By scheme and option: the values that are refused.
REFUSED = {
    "beta-vae": {
        "--holdout": (*REAL, "0", "1"),
        "--lr": (*REAL, "0"),
        "--ema": (*REAL, "1"),
        "--batch-size": WHOLE,
        "--epochs": WHOLE,
        "--patience": WHOLE,
        "--checkpoint-steps": WHOLE,
        "--image-size": (*WHOLE, "3"),
        "--seed": ("-1", "nan", "1.5", str(2**32), str(2**64)),
        "--z-dim": WHOLE,
        "--k": WHOLE,
        "--hidden": ("nan,4", "0,4", "1e3,4", "2147483648,4", f"4,{BIG}", "4,inf"),
        "--beta": (
            *REAL,
            "geco:target=nan",
            "geco:target=1e999",
            "geco:target=-Infinity",
            "geco:target=null",
            "geco:target=[1]",
            "geco:target=1,rate=1e300",
            "geco:target=1,smoothing=nan",
            "control:kl=NaN",
            "control:kl=1e39",
            "warmup:epochs=1e39",
            "warmup:steps=1e30",
            f"cyclical:cycles={BIG}",
            "free-bits:nats=nan",
            f"free-bits:groups={BIG}",
        ),
        "--inference": (
            "semi:steps=1e30",
            f"semi:steps={BIG}",
            "semi:clip=nan",
            f"aggressive:check={BIG}",
            "aggressive:window=nan",
        ),
    },
    "feedback-gan": {
        "--weight": REAL,
        "--r1": REAL,
        "--r2": REAL,
        "--width": WHOLE,
        "--dense": ("-1", "nan", "2.5", BIG),
        "--z-dim": WHOLE,
        "--hidden": ("nan", "0", BIG),
        "--rule": (
            "consensus:weight=nan",
            "consensus:weight=1e999",
            "consensus:weight=1e39",
            "lookahead:every=1e30",
            f"lookahead:every={BIG}",
            "lookahead:alpha=nan",
        ),
    },
    "assisted": {
        "--alpha": REAL,
        "--weight": (*REAL, "geco:target=nan", "geco:target=1e39", "balanced:norms=nan"),
        "--dropout": (*REAL, "1"),
        "--labels": ("nan", "-5", "1e3", BIG, "9" * 5000),
        "--method": ("ladder:noise=nan", "ladder:noise=1e999", "ladder:noise=1e39"),
    },
    "lstm": {
        "--layers": (*WHOLE, "1001"),
        "--levels": ("1", "257", "nan", BIG),
        "--hidden": WHOLE,
        "--length": WHOLE,
        "--dropout": (*REAL, "1"),
    },
    "pixelcnn": {"--channels": WHOLE, "--layers": (*WHOLE, "1001")},
    "made": {"--dropout": (*REAL, "1")},
    "realnvp": {
        "--alpha": (*REAL, "0", "0.5"),
        "--scales": (*WHOLE, "31"),
        "--couplings": (*WHOLE, "1001"),
    },
    "maf": {"--alpha": REAL, "--layers": (*WHOLE, "1001")},
    "ddpm": {
        "--dropout": (*REAL, "1"),
        "--multiples": ("nan", "0", "1e3", BIG),
        "--blocks": (*WHOLE, "1001"),
    },
}
CASES = [(scheme, flag) for scheme, flags in REFUSED.items() for flag in flags]


def refuse(capsys: pytest.CaptureFixture, code: int, *args: object) -> str:
    """Run a command that ends with an exit code and one line, and return the line."""
    assert run(*args) == code, args
    message = capsys.readouterr().err
    assert_one_line(message, "optgen: ")
    return message


def test_most_numbers_out_of_range_are_tried():
    assert sum(len(values) for flags in REFUSED.values() for values in flags.values()) > 250


@pytest.mark.parametrize("scheme, flag", CASES)
def test_an_option_of_training_refuses_what_is_out_of_range(
    scheme, flag, capsys, few_images, tmp_path
):
    out = tmp_path / "run"
    data = "" if scheme == "assisted" else f"--image-size 8 --data {few_images}"
    for value in REFUSED[scheme][flag]:
        words = (f"train {scheme} {SMALL[scheme]} {data} --progress none --out", out)
        message = refuse(capsys, 2, *words, f"{flag} {value}")
        assert flag in message and ("got" in message or "neither a number" in message), message
    assert not out.exists()


@pytest.fixture(scope="module")
def small_run(few_images, tmp_path_factory):
    """Return the folder of a finished run of one epoch; tests must not change it."""
    out = tmp_path_factory.mktemp("small") / "run"
    words = f"train beta-vae {SMALL['beta-vae']} --image-size 8 --epochs 1 --progress none --data"
    assert run(words, few_images, "--out", out) == 0
    return out


# Options of the other commands, without the run folder.
OF_A_RUN = {
    "sample": {"--n": WHOLE, "--seed": ("-1", "nan", "1.5", str(2**63), str(2**64))},
    "evaluate": {
        "--k": WHOLE,
        "--limit": WHOLE,
        "--seed": ("-1", "nan", "1.5", str(2**63), str(2**64)),
    },
    "train --resume": {"--epochs": WHOLE},
}


@pytest.mark.parametrize("command", OF_A_RUN)
def test_an_option_of_a_run_refuses_what_is_out_of_range(command, capsys, small_run):
    for flag, values in OF_A_RUN[command].items():
        for value in values:
            assert flag in refuse(capsys, 2, command, small_run, f"{flag} {value}")


@pytest.mark.parametrize("command, flag", [("bench", "--repeats"), ("reproduce elbo", "--jobs")])
def test_an_option_of_a_measurement_refuses_what_is_out_of_range(command, flag, capsys):
    for value in WHOLE:
        assert flag in refuse(capsys, 2, f"{command} {flag} {value}")


@pytest.fixture
def small_machine(monkeypatch):
    """Let the command line believe that the machine has 256 MiB more than the bytes returned."""
    if total_memory() is None or torch.accelerator.is_available():
        pytest.skip("only on Linux, and only on the CPU, memory is limited")
    status = Path("/proc/self/status").read_text()
    used = 1024 * int(re.search(r"VmData:\s+(\d+) kB", status)[1])
    monkeypatch.setattr("optgen.options.total_memory", lambda: used + 2**28)
    return used


LARGE = "2147483647"
# What no machine has the memory for, and the option that the message names.
TOO_LARGE = {
    "beta-vae": (
        f"--hidden {LARGE},{LARGE}",
        f"--k {LARGE}",
        "--z-dim 1000000000",
        f"--model conv --z-dim {LARGE}",
        "--model autoregressive --z-dim 100000000",
        f"--inference semi:steps={LARGE}",
    ),
    "feedback-gan": (f"--hidden {LARGE},{LARGE}", f"--model conv --width {LARGE}"),
    "assisted": (f"--hidden {LARGE},{LARGE}", f"--method ladder --hidden {LARGE},{LARGE}"),
    "lstm": (f"--hidden {LARGE}",),
    "pixelcnn": (f"--channels {LARGE}",),
    "made": ("--hidden 100000000,100000000",),
    "realnvp": (f"--channels {LARGE}", f"--model flat --hidden {LARGE},{LARGE}"),
    "maf": ("--hidden 100000000,100000000",),
    "ddpm": ("--channels 100000000", "--multiples 100000000,100000000"),
}


@pytest.mark.parametrize("scheme, text", [(s, text) for s in TOO_LARGE for text in TOO_LARGE[s]])
def test_memory_that_cannot_be_had_is_one_line_with_the_option(
    scheme, text, capsys, few_images, tmp_path, small_machine
):
    data = "--data digits" if scheme == "assisted" else f"--image-size 8 --data {few_images}"
    words = (f"train {scheme} {SMALL[scheme]} {data} --progress none --out", tmp_path / "run")
    message = refuse(capsys, 1, *words, text)
    assert "not enough memory" in message
    assert f"{' '.join(text.split()[-2:])} is too large" in message


ON_A_SMALL_MACHINE = """
import re
from pathlib import Path
import torch
from optgen import options
from optgen.cli.main import main
used = 1024 * int(re.search(r"VmData:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
options.total_memory = lambda: used + 2**27
main()
"""


@pytest.mark.usefixtures("small_machine")  # which skips it where memory is not limited
def test_samples_that_do_not_fit_into_memory_name_their_number(small_run):
    "In a process of its own, since the memory that other tests have freed would be filled first."
    command = [sys.executable, "-c", ON_A_SMALL_MACHINE, "sample", small_run, "--n", "100000000"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert_one_line(done.stderr, "not enough memory", "--n 100000000 is too large")


def test_images_that_do_not_fit_into_memory_name_their_side(
    capsys, few_images, tmp_path, small_machine
):
    words = ("train beta-vae --image-size 100000 --data", few_images, "--out", tmp_path / "run")
    message = refuse(capsys, 1, *words)
    assert "not enough memory" in message and "--image-size 100000 is too large" in message


@pytest.mark.parametrize(
    "error, words",
    [
        (MemoryError(), "not enough memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 3.00 GiB."), "3.00 GiB were asked"),
        (torch.OutOfMemoryError("CUDA out of memory."), "not enough memory"),
        (RuntimeError("Storage size calculation overflowed with sizes=[9]"), "not enough memory"),
    ],
)
def test_a_memory_error_of_any_command_is_one_line(error, words, capsys, monkeypatch):
    def fail(**settings: Any) -> None:
        raise error

    monkeypatch.setattr("optgen.bench.report.run_bench", fail)
    assert words in refuse(capsys, 1, "bench --only epoch")


def test_other_errors_of_a_command_keep_their_traceback(monkeypatch):
    def fail(**settings: Any) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr("optgen.bench.report.run_bench", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        run("bench --only epoch")


def test_the_option_named_is_the_largest_multiple_of_its_default():
    params = [
        count_option("--units", 1000, ""),
        count_option("--k", 1, ""),
        count_option("--steps", None, ""),
        option("--hidden", default="500,250"),
        option("--spec", default="a"),
        count_option("--seed", 1, ""),
    ]
    usual = {"units": 1000, "k": 1, "steps": None, "hidden": "500,250", "spec": "a", "seed": 10**9}
    assert name_largest_option(params, usual) == ""
    for name, value, expected in (
        ("units", 5000, "--units 5000"),
        ("k", 6, "--k 6"),
        ("steps", 7, "--steps 7"),
        ("hidden", "10,4000", "--hidden 10,4000"),
        ("spec", "semi:steps=9", "--spec semi:steps=9"),
    ):
        assert name_largest_option(params, usual | {"units": 2000, name: value}) == expected


@pytest.mark.skipif(total_memory() is None, reason="the machine does not say its memory")
@pytest.mark.skipif(torch.accelerator.is_available(), reason="only on the CPU")
def test_more_than_the_memory_of_the_machine_is_refused_in_the_block_only():
    half = total_memory() // 2 + 2**20
    with limited_memory(), pytest.raises((MemoryError, RuntimeError)):
        parts = [torch.empty(half, dtype=torch.uint8) for _ in range(2)]
    parts = [torch.empty(half, dtype=torch.uint8) for _ in range(2)]  # never touched
    assert len(parts) == 2


def game() -> Game:
    """Return a game of one weight."""
    net = nn.Linear(1, 1)

    def loss(batch: Batch) -> torch.Tensor:
        return net(batch.x.flatten(1)).mean()

    return Game(model=Player(net, loss, SGD(net.parameters())))


DATA = Images(torch.zeros(6, 1, 1, 1, dtype=torch.uint8))
COUNT = (0, -1, 1.0, math.nan, math.inf, "3", True, 2**63, 10**30, None)
OPTIONAL = tuple(value for value in COUNT if value is not None)
# Arguments of `fit`, and values that it refuses.
OF_FIT = {
    "epochs": COUNT,
    "batch_size": COUNT,
    "samples": (-1, 1.0, math.nan, "3", True, 2**63, None),
    "seed": (-1, 0.5, math.nan, "3", True, 2**63, 2**64, None),
    "patience": OPTIONAL,
    "checkpoint_steps": OPTIONAL,
    "checkpoint_seconds": (-1, -1e-9, math.nan, -math.inf, "3", True, 10**400, None),
    "ema": (1.0, 1.5, -0.1, math.nan, math.inf, True, 1, 2**64),
}


@pytest.mark.parametrize("name", OF_FIT)
def test_fit_refuses_a_number_out_of_range_before_the_first_step(name, tmp_path):
    for value in OF_FIT[name]:
        words = "Average: profile must be" if name == "ema" else f"fit: {name} must be"
        with pytest.raises(ValueError, match=words) as raised:
            fit(game(), DATA, out=tmp_path / "run", progress="none", **{name: value})
        assert "\n" not in str(raised.value) and "got" in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_fit_takes_the_ends_of_its_ranges():
    ends = {"epochs": 1, "batch_size": 1, "samples": 0, "seed": 0, "ema": 0.0}
    for name, value in (ends | {"checkpoint_seconds": math.inf, "seed": 2**63 - 1}).items():
        assert len(fit(game(), DATA, progress="none", **{name: value})) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, True, "1", None, 1j])
def test_a_number_is_finite_and_no_truth_value(value):
    with pytest.raises(ValueError, match="f: x must be a finite number(, in float32)?; got"):
        check_number("f", x=value)


@pytest.mark.parametrize("value", [2**31, 2**63, 10**30, -1, 1.0, True, math.nan])
def test_a_count_fits_into_32_bits(value):
    with pytest.raises(ValueError, match="f: n must be an integer, at least 1"):
        check_count("f", n=value)
    check_count("f", n=2**31 - 1)
