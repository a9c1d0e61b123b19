"""The command that searches: its folder, its interruption and resumption, its mistakes."""

import json
import signal
import sys

import pytest
import torch

from cli_helpers import run
from optgen.cli.optimize import optimize
from optgen.search import CmaEs, Gaussian, Search
from optgen.search.covariances import FullCovariance
from optgen.search.distributions import Elites

CODE = """
def bowl(x):
    return ((x - 1) ** 2).sum(1)

def of_one(x):
    assert x.dim() == 1
    return float(((x - 1) ** 2).sum())

def half(x):
    values = bowl(x)
    values[x[:, 0] < 0] = float("nan")
    return values

def never(x):
    return x[:, 0] * float("nan")

def wrong(x):
    return bowl(x)[:2]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "Work in a folder with a module of objectives."
    (tmp_path / "bowls.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "bowls", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def best(path):
    "Return the best point of a folder."
    return json.loads((path / "best.json").read_text())


def test_a_search_is_that_of_the_library(folder):
    options = "--dim 3 --budget 300 --sigma 0.7 --start 0.2 --low -1 --high 4 --seed 3"
    assert run("optimize bowls:bowl --method cma --population 9", options, "--out a") == 0
    x0 = torch.full((3,), 0.2, dtype=torch.float64)
    exact = CmaEs(x0, 0.7, 9, (-1, 4), seed=3).run(lambda x: ((x - 1) ** 2).sum(1), 300)
    found = best(folder / "a")
    assert found["x"] == exact.x.tolist() and found["value"] == exact.value
    assert found["evaluations"] == exact.evaluations == 297
    assert run("optimize bowls:bowl --method cem", options, "--out b") == 0
    search = Search(Gaussian(x0, 0.7), Elites(0.25), 30, bounds=(-1, 4), seed=3)
    assert best(folder / "b")["x"] == search.run(lambda x: ((x - 1) ** 2).sum(1), 300).x.tolist()
    assert (folder / "b" / "search.png").exists()


def test_points_one_by_one_and_failures(folder):
    options = "--dim 4 --budget 200 --method cma"
    assert run("optimize bowls:bowl", options, "--out a") == 0
    assert run("optimize bowls:of_one --one-by-one", options, "--out b") == 0
    assert best(folder / "a")["x"] == best(folder / "b")["x"]
    assert run("optimize bowls:half", options, "--out c") == 0
    found = best(folder / "c")
    assert found["x"][0] >= 0 and found["evaluations"] == best(folder / "a")["evaluations"]
    assert run("optimize bowls:never", options, "--out d") == 0
    assert best(folder / "d")["x"] is None and best(folder / "d")["value"] is None


@pytest.mark.parametrize("method", ["ipop", "cem", "random", "diagonal"])
def test_a_longer_budget_goes_on_to_the_same_numbers(folder, method):
    command = ("optimize bowls:bowl --dim 3 --method", method)
    assert run(*command, "--budget 400 --out whole") == 0
    assert run(*command, "--budget 130 --out parts") == 0
    assert run(*command, "--budget 400 --resume parts") == 0
    assert best(folder / "whole") == best(folder / "parts")
    histories = [(folder / name / "history.csv").read_text() for name in ("whole", "parts")]
    assert histories[0] == histories[1]


def test_an_interrupted_search_is_saved_and_goes_on(folder, capsys, monkeypatch):
    command = "optimize bowls:bowl --dim 3 --method cma"
    assert run(command, "--budget 490 --out whole") == 0
    import bowls

    quiet, calls = bowls.bowl, []

    def interrupted(x):
        "Press Ctrl-C in the eleventh batch."
        calls.append(x)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return quiet(x)

    monkeypatch.setattr(bowls, "bowl", interrupted)
    assert run(command, "--budget 490 --out parts") == 130
    assert "stopped after 70 evaluations; go on with --resume parts" in capsys.readouterr().out
    assert best(folder / "parts")["evaluations"] == 70
    monkeypatch.setattr(bowls, "bowl", quiet)
    assert run(command, "--budget 490 --resume parts") == 0
    assert best(folder / "whole") == best(folder / "parts")


def test_ctrl_c_waits_until_the_search_has_moved(folder, capsys, monkeypatch):
    "The signal comes while the covariance is updated."
    command = "optimize bowls:bowl --dim 3 --method cma"
    assert run(command, "--budget 490 --out whole") == 0
    update, calls = FullCovariance.update, []

    def interrupted(self, *args):
        "Send the signal in the tenth update, before it is done."
        calls.append(args)
        if len(calls) == 10:
            signal.raise_signal(signal.SIGINT)
        update(self, *args)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(FullCovariance, "update", interrupted)
            assert run(command, "--budget 490 --out parts") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "stopped after 70 evaluations" in capsys.readouterr().out
    assert run(command, "--budget 490 --resume parts") == 0
    assert best(folder / "whole") == best(folder / "parts")


def test_a_first_batch_that_is_interrupted_leaves_nothing(folder, capsys, monkeypatch):
    import bowls

    def interrupted(x):
        raise KeyboardInterrupt

    monkeypatch.setattr(bowls, "bowl", interrupted)
    assert run("optimize bowls:bowl --dim 3 --budget 70 --out a") == 130
    assert "nothing is saved" in capsys.readouterr().out


def test_an_error_of_the_objective_is_its_own(folder, monkeypatch):
    import bowls

    monkeypatch.setattr(bowls, "bowl", lambda x: int("abc"))
    with pytest.raises(ValueError, match="invalid literal"):
        optimize.main("bowls:bowl --dim 3 --budget 70 --out a".split(), standalone_mode=False)


def test_a_search_is_saved_now_and_then(folder, monkeypatch):
    monkeypatch.setattr("optgen.cli.optimize.SAVE_SECONDS", -1.0)
    import bowls

    seen = []

    def looks(x):
        "Note how far the folder is."
        path = folder / "a" / "best.json"
        seen.append(best(folder / "a")["evaluations"] if path.exists() else 0)
        return ((x - 1) ** 2).sum(1)

    monkeypatch.setattr(bowls, "bowl", looks)
    assert run("optimize bowls:bowl --dim 3 --method cma --budget 70 --out a") == 0
    assert seen == [0, 7, 14, 21, 28, 35, 42, 49, 56, 63]


def test_mistakes_are_refused_in_one_line(folder, capsys):
    assert run("optimize bowls:bowl --dim 3 --budget 70 --out a") == 0
    for words, expected in (
        ("bowls:bowl --dim 3", "--budget"),
        ("bowl --dim 3 --budget 70", "module:function"),
        ("absent:f --dim 3 --budget 70", "cannot be imported"),
        ("bowls:absent --dim 3 --budget 70", "no function absent"),
        ("bowls:bowl --dim 3 --budget 3", "budget"),
        ("bowls:bowl --dim 3 --budget 70 --low 1", "--low and --high"),
        ("bowls:bowl --dim 3 --budget 70 --low 1 --high 2", "between --low 1 and --high 2"),
        ("bowls:bowl --dim 3 --budget 70 --sigma nan", "--sigma"),
        ("bowls:bowl --dim 3 --budget 70 --population 2", "population_size"),
        ("bowls:wrong --dim 3 --budget 70", "7 real numbers"),
        ("bowls:bowl --dim 3 --budget 70 --out a", "holds a search"),
        ("bowls:bowl --dim 4 --budget 70 --resume a", "--dim 3, here it is 4"),
        ("bowls:half --dim 3 --budget 70 --resume a", "OBJECTIVE bowls:bowl"),
        ("bowls:bowl --dim 3 --budget 70 --resume a --out b", "leave out --out"),
        ("bowls:bowl --dim 3 --budget 70 --resume a", "evaluations are spent"),
        ("rosenbrock --dim 1 --budget 70", "--dim 2"),
        (".bowls:bowl --dim 3 --budget 70", "cannot be imported"),
    ):
        capsys.readouterr()
        assert run("optimize", words) == 2, words
        shown = capsys.readouterr().err.strip().splitlines()[-1]
        assert expected in shown, shown
    (folder / "a" / "search.pt").write_bytes(b"damaged")
    assert run("optimize bowls:bowl --dim 3 --budget 140 --resume a") == 2
