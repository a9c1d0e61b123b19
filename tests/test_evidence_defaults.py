"""The runs of the defaults: what is asked of the command line, and what is kept of its answers."""

import json

import numpy as np
import pytest

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
    monkeypatch.setattr(defaults, "children_seconds", lambda: next(clock))
    found = defaults.run_defaults({"scheme": "made", "samples": 40, "drawn": 3}, 7)
    assert asked == [
        ("train", "made", "--progress", "none", "--seed", 7, "--out", "run"),
        ("evaluate", "run", "--json", "--samples", 40),
        ("sample", "run", "--n", 3, "--out", "drawn.npz"),
    ]
    assert (found["seconds"], found["options"]) == (12.3, {"width": 4})
    assert found["measured"] == {"fid": 3.5} and bytes.fromhex(found["pixels"]) == pixels.tobytes()


def test_a_command_runs_with_one_thread_counts_its_time_and_says_why_it_fails(tmp_path):
    before = defaults.children_seconds()
    assert "optgen, version" in defaults.run_command(tmp_path, "--version")
    assert defaults.children_seconds() > before
    with pytest.raises(RuntimeError, match="optgen train failed: .*nothing"):
        defaults.run_command(tmp_path, "train", "nothing")


def test_every_scheme_of_the_package_has_a_run():
    experiment = defaults.experiment("digits", "")
    assert {*experiment.variants} == {*defaults.SCHEMES} == {*load_commands()}
    assert all(config["scheme"] == name for name, config in experiment.variants.items())
