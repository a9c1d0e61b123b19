"""The runs of the defaults: what is asked of the command line, and what is kept of its answers."""

import json

import click
import numpy as np
import pytest

from cli_helpers import read_options, run
from optgen.cli.options import train_params
from optgen.cli.runs import load_commands
from optgen.evidence import defaults


def test_a_run_is_training_measuring_and_sampling_by_name_alone(monkeypatch):
    pixels = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28, 1)
    asked, clock = [], iter([5.0, 17.26])

    def answer(folder, *arguments):
        asked.append(arguments)
        if arguments[0] == "train":
            run = defaults.Path(folder) / "run"
            run.mkdir()
            (run / "config.json").write_text('{"options": {"width": 4}}')
        if arguments[0] == "sample":
            np.savez(defaults.Path(folder) / "drawn.npz", pixels)
        return json.dumps({"fid": 3.5})

    monkeypatch.setattr(defaults, "run_command", answer)
    monkeypatch.setattr(defaults, "processor_seconds", lambda: next(clock))
    found = defaults.run_defaults({"scheme": "made", "samples": 40, "drawn": 3}, 7)
    assert asked == [
        ("train", "made", "--progress", "none", "--seed", 7, "--out", "run"),
        ("evaluate", "run", "--json", "--samples", 40),
        ("sample", "run", "--n", 3, "--out", "drawn.npz"),
    ]
    assert (found["seconds"], found["options"]) == (12.3, {"width": 4})
    assert found["measured"] == {"fid": 3.5} and bytes.fromhex(found["pixels"]) == pixels.tobytes()


def test_a_command_runs_and_says_why_it_fails(tmp_path):
    assert "optgen, version" in defaults.run_command(tmp_path, "--version")
    with pytest.raises(RuntimeError, match="optgen train failed: .*nothing"):
        defaults.run_command(tmp_path, "train", "nothing")


def test_every_scheme_of_the_package_has_a_run():
    experiment = defaults.experiment("digits", "")
    assert {*experiment.variants} == {*defaults.SCHEMES} == {*load_commands()}
    assert all(config["scheme"] == name for name, config in experiment.variants.items())


@pytest.mark.parametrize(
    "measured, words",
    [
        ({"error": 0.1234, "nll": 2.0}, "error 12.3 %"),
        ({"bound": 1400.0, "bound_bits_per_dim": 2.576}, "2.58 bits a pixel"),
        ({"nll": 91.37, "bits_per_dim": 0.168, "pixels": "binarized once"}, "91.4 nats"),
        ({"nll": 806.0, "bits_per_dim": 1.484, "pixels": "gray, dequantized"}, "1.48 bits a pixel"),
        ({"G": 1.4, "D": 0.5, "fid": 90.0}, ""),
    ],
)
def test_the_number_of_a_scheme_has_its_unit(measured, words):
    assert defaults.own_number(measured) == words


def test_table_and_samples_are_of_the_results_and_the_nearest_stands_first(tmp_path):
    (tmp_path / "digits").mkdir()
    for scheme, distance, shade in (("maf", 420.4, 7), ("made", 88.6, 9)):
        result = {"seconds": 61.4, "pixels": (bytes([shade]) * 2 * 784).hex()}
        result["measured"] = {"error": 0.5, "fid": distance, "fid_floor": 6.04}
        record = {"variant": scheme, "seed": 0, "result": result}
        (tmp_path / "digits" / f"{scheme}-0.json").write_text(json.dumps(record))
    found = defaults.load_defaults(tmp_path)
    _, _, first, second = defaults.table_of_defaults(found).splitlines()
    assert first == "| `made` | 61 | error 50.0 % | 89 | 6.0 |" and "`maf` | 61" in second
    drawn = [ax.images[0].get_array() for ax in defaults.draw_defaults(found).axes]
    assert [int(image[0, 0]) for image in drawn] == [9, 7]
    assert all(image.shape == (28, 56) for image in drawn)


OWN = {  # optimizer, rate, decay of the average, epochs
    "beta-vae": ("adam", None, None, 20),
    "assisted": ("adam", 2e-3, None, 20),
    "feedback-gan": ("adam", 4e-3, 0.999, 20),
    "made": ("adam", 3e-3, 0.999, 30),
    "pixelcnn": ("adam", 5e-3, 0.999, 3),
    "lstm": ("adam", 1e-2, 0.999, 5),
    "realnvp": ("muon", None, 0.999, 8),
    "maf": ("adam", None, None, 20),
    "ddpm": ("muon", None, 0.999, 8),
    "flow-matching": ("muon", None, 0.999, 8),
}


@pytest.mark.parametrize("scheme", OWN)
def test_the_defaults_of_a_scheme_are_those_that_were_measured(scheme):
    command = load_commands()[scheme]
    options = click.Command(scheme, params=train_params(command)).make_context("", []).params
    rate = command.adam_lr if options["optimizer"] == "adam" else None
    assert (options["optimizer"], rate, options["ema"], options["epochs"]) == OWN[scheme]


@pytest.mark.parametrize(
    "given, method",
    [
        ("", "m1+m2:labeled_weight=0.03"),
        ("--model conv", "agreement"),
        ("--method gamma", "gamma"),
    ],
)
def test_the_method_of_a_run_is_recorded(given, method, tmp_path, no_pictures):
    small = "--hidden 8 --z-dim 3 --labels 20 --batch-size 500 --epochs 1 --progress none"
    assert run("train assisted --data digits", small, given, "--out", tmp_path / "run") == 0
    assert read_options(tmp_path / "run")["method"] == method
