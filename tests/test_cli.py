"""The command line, as its user meets it: folders, resumption, mistakes, and what is found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, optgen
from PIL import Image

from cli_helpers import assert_one_line, edit_config, read_state, resume, run, train_args
from optgen import __version__, viz
from optgen.cli.main import main
from optgen.cli.runs import load_claims, load_commands


def test_a_run_folder_holds_the_whole_run(tiny_run):
    files = {str(p.relative_to(tiny_run)) for p in tiny_run.rglob("*") if p.is_file()}
    samples = {"samples/epoch-0001.png", "samples/epoch-0002.png"}
    assert files == {"config.json", "metrics.jsonl", "checkpoint.pt", "curves.png"} | samples
    config = json.loads((tiny_run / "config.json").read_text())
    assert config["scheme"] == "beta-vae" and config["options"]["hidden"] == "16,8"
    assert config["environment"]["torch"] == torch.__version__
    records = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [1, 2]
    assert records[1]["valid"]["loss"] < records[0]["valid"]["loss"]


def test_sample(tiny_run, tmp_path, capsys):
    png = tmp_path / "x.png"
    for n, side in ((1, 28), (9, 92), (64, 242)):
        assert run("sample", tiny_run, "--n", n, "--out", png) == 0
        assert Image.open(png).size == (side, side)
    first = png.read_bytes()
    run("sample", tiny_run, "--n 64 --out", png)
    assert first == png.read_bytes()
    run("sample", tiny_run, "--n 64 --seed 1 --out", png)
    assert first != png.read_bytes()
    assert run("sample", tiny_run, "--out", tmp_path / "x.jpg") == 2


def test_evaluate(tiny_run, capsys):
    assert run("evaluate", tiny_run, "--k 20 --limit 300 --json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n"] == 300 and found["k"] == 20 and found["split"] == "test"
    assert found["nll"] < -found["elbo"] and 0 <= found["active_units"] <= 2
    assert abs(found["loss"] - (found["rate"] + found["distortion"])) < 1e-9
    assert run("evaluate", tiny_run, "--k 20 --limit 300") == 0
    table = capsys.readouterr().out
    assert "\x1b" not in table and f"{found['nll']:.4f}" in table


def test_help_of_a_run_shows_only_what_its_scheme_takes(tiny_run, capsys):
    for args, shown, hidden in (
        (("evaluate --help",), "--limit", "--k "),
        (("evaluate", tiny_run, "--help"), "--k ", "--outside"),
        (("sample", tiny_run, "--help"), "--n ", "--sampler"),
    ):
        assert run(*args) == 0
        text = capsys.readouterr().out
        assert shown in text and hidden not in text


def test_resume_goes_on_with_the_run(tiny_run, tmp_path):
    out = tmp_path / "run"
    assert run(*TINY, "--epochs 1 --out", out) == 0 and resume(out, 2) == 0
    a, b = (read_state(folder)["scheme"]["model"]["weights"] for folder in (out, tiny_run))
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_the_default_folder_is_never_one_that_is_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run(*TINY, "--epochs 1") == 0
    names = sorted(p.name for p in (tmp_path / "runs").iterdir())
    assert names == ["beta-vae-digits", "beta-vae-digits-2"]
    assert "optgen evaluate runs/beta-vae-digits-2" in capsys.readouterr().out


def write_color_images(folder: Path, n: int) -> None:
    """Write `n` images of one color each into two folders of classes."""
    generator = torch.Generator().manual_seed(0)
    for i in range(n):
        color = torch.randint(256, (3,), generator=generator).tolist()
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 30), tuple(color)).save(path)


@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_your_own_color_images_with_averaging_and_early_stopping(tmp_path, model, capsys):
    write_color_images(tmp_path / "mine", 60)
    out = tmp_path / "run"
    options = (
        f"--image-size 16 --model {model} --hidden 32,16 --z-dim 2 --batch-size 10 --epochs 3 "
        "--ema 0.9 --patience 2 --optimizer adamw --progress none"
    )
    assert run("train beta-vae --data", tmp_path / "mine", options, "--out", out) == 0
    assert (out / "best.pt").exists()
    assert run("sample", out, "--n 4") == 0 and Image.open(out / "samples.png").size == (38, 38)
    assert run("evaluate", out, "--k 5") == 0


def test_list_and_version(capsys):
    assert run("list") == 0
    shown = capsys.readouterr().out
    words = ("beta-vae", "fashion-mnist", "rmsprop", "geco", "lookahead", "ladder", "hinge")
    assert all(word in shown for word in (*words, *load_commands(), *load_claims()))
    assert run("--version") == 0 and __version__ in capsys.readouterr().out


def test_a_mistake_of_ours_keeps_its_traceback(tiny_run, monkeypatch):
    def broken(*_):
        raise RuntimeError("our mistake")

    monkeypatch.setattr(viz, "save_image_grid", broken)
    with pytest.raises(RuntimeError, match="our mistake"):
        main(["sample", str(tiny_run)])


def test_help_does_not_wait_for_torch():
    program = Path(__file__).with_name("help_without_torch.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


COMPILER = "torch._dynamo,torch._inductor,sympy,torchvision"


@pytest.mark.skipif(os.name != "posix", reason="processes are forked as POSIX does")
def test_commands_start_without_what_they_do_not_use(tmp_path):
    "The compiler is a quarter of the start of a training, figures a third of an evaluation's."
    out = tmp_path / "run"
    commands = (
        (COMPILER, f"train beta-vae --hidden 16,8 --epochs 1 --out {out}"),
        (f"{COMPILER},matplotlib,scipy", f"evaluate {out}"),
        (f"{COMPILER},matplotlib,scipy", f"sample {out}"),
    )
    program = Path(__file__).with_name("imports_of_command.py")
    command = [sys.executable, program, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    assert (out / "samples.png").exists()


def test_an_unknown_scheme_in_a_run_folder_is_reported(tmp_path, few_images, capsys, no_pictures):
    out = tmp_path / "run"
    assert run(*train_args("made", few_images, "--hidden 8 --epochs 1 --out"), out) == 0
    edit_config(out, scheme="mine")
    for args in (("evaluate", out), ("sample", out), ("train --resume", out)):
        capsys.readouterr()
        assert run(*args) == 2
        assert_one_line(capsys.readouterr().err, "no scheme 'mine'", "beta-vae")


PLUGIN = '''"""A scheme of another package."""

import math

from optgen.models.vae import VAE
from optgen.schemes.command import SchemeCommand, build_optimizer, count_option
from optgen.schemes.elbo import BetaVAE


class TinyCommand(SchemeCommand):
    """The command `optgen train tiny-vae`."""

    name, summary = "tiny-vae", "a VAE of another package"

    def train_options(self):
        return [count_option("--units", 4, "Units.")]

    def sample_options(self):
        return [count_option("--repeat", 1, "How often each image is drawn.")]

    def evaluate_options(self):
        return [count_option("--k", 3, "Samples.")]

    def build(self, options, shape):
        model = VAE(math.prod(shape), options["units"], options["units"], 2)
        return BetaVAE(model, optimizer=build_optimizer(options, model.parameters()))

    def sample(self, scheme, n, repeat):
        return scheme.sample(n // repeat).repeat_interleave(repeat, 0)
'''
PLUGIN_SETUP = """from setuptools import setup

setup(
    name="optgen-tiny",
    version="0.1",
    py_modules=["optgen_tiny"],
    entry_points={
        "optgen.schemes": ["tiny-vae = optgen_tiny:TinyCommand", "broken = optgen_tiny:Missing"]
    },
)
"""


def install_plugin(folder: Path) -> Path:
    """Install a package that registers a scheme, and one that is broken; return where it lies."""
    source, target = folder / "source", folder / "site"
    source.mkdir()
    (source / "optgen_tiny.py").write_text(PLUGIN)
    (source / "setup.py").write_text(PLUGIN_SETUP)
    flags = "--quiet --no-deps --no-build-isolation --disable-pip-version-check --target".split()
    command = [sys.executable, "-m", "pip", "install", *flags, target, source]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def test_another_package_registers_a_scheme(tmp_path, few_images, capfd, monkeypatch, no_pictures):
    monkeypatch.syspath_prepend(install_plugin(tmp_path))
    load_commands.cache_clear()
    out = tmp_path / "run"
    try:
        assert run(*train_args("tiny-vae", few_images, "--units 5 --epochs 2 --out"), out) == 0
        shown = capfd.readouterr()
        assert "tiny-vae on mine" in shown.out and "the scheme broken" in shown.err
        assert run("sample", out, "--n 4 --repeat 2") == 0
        assert run("sample", out, "--sampler heun") == 2
        assert run("evaluate", out, "--k 2 --json") == 0
        found = json.loads(capfd.readouterr().out.splitlines()[-1])
        assert found["scheme"] == "tiny-vae" and found["elbo"] < 0
        assert run("train --help") == 0 and "A VAE of another package" in capfd.readouterr().out
        assert resume(out, 3) == 0
    finally:
        load_commands.cache_clear()


def test_the_entry_in_a_process_of_its_own(tmp_path):
    done = optgen("train", "nothing")
    assert done.returncode == 2 and "Traceback" not in done.stderr
