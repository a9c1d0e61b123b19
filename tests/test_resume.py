"""A resumed run: each argument must agree, or changes on purpose and is recorded, or is free."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_options import CASES, OTHERS, build
from torch import nn

from cli_helpers import assert_one_line, edit_config, read_options, read_state, run, train_args
from optgen.averaging import Power
from optgen.controllers import Geco
from optgen.data.images import digits
from optgen.data.loading import Loader
from optgen.games import Game
from optgen.models.vae import VAE
from optgen.optim import Adam, Momentum
from optgen.rules import Consensus, Extragradient
from optgen.schemes.elbo import BetaVAE
from optgen.testing import flat_weights
from optgen.training import checkpoint
from optgen.training.resume import learning_rates, scheme_arguments
from optgen.training.trainer import fit

pytestmark = pytest.mark.usefixtures("no_pictures")

FEW = digits("train").subset(torch.arange(70))
OTHER = digits("train").subset(torch.arange(70, 140))
QUIET = {"progress": "none", "batch_size": 20, "binarize": "static", "samples": 0}


class NoisyVAE(VAE):
    """A VAE with dropout before its encoder."""

    def __init__(self, p: float) -> None:
        super().__init__(784, 8, 6, 2)
        self.q_net = nn.Sequential(nn.Dropout(p), self.q_net)


def new_scheme(
    model: nn.Module | None = None, make: Any = Adam, settings: dict | None = None, **arguments: Any
) -> BetaVAE:
    """Return a small scheme with the same first weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = NoisyVAE(0.1) if model is None else model
    optimizer = make(model.parameters(), **({"lr": 0.01} | (settings or {})))
    return BetaVAE(model, optimizer=optimizer, **arguments)


def resumed(folder: Path, scheme: Game, data: Any = FEW, **arguments: Any) -> list[dict]:
    """Go on with a run for one more epoch."""
    given = QUIET | {"epochs": 2, "valid": OTHER} | arguments
    return fit(scheme, data, out=folder, resume=True, **given)


@pytest.fixture
def one_epoch(tmp_path) -> Path:
    """A run of one epoch."""
    fit(new_scheme(), FEW, out=tmp_path / "run", valid=OTHER, **QUIET)
    return tmp_path / "run"


REFUSED = {  # what changes, and the name in the message
    "beta": ({"beta": 4.0}, {}, "scheme.beta.beta: saved 1.0, here 4.0"),
    "controller": ({"beta": Geco(90.0)}, {}, "scheme.beta: saved 'Constant', here 'Geco'"),
    "estimator": ({"estimator": "iwae", "k": 3}, {}, "scheme.estimator: saved 'elbo', here 'iwae'"),
    "samples of the estimator": ({"k": 3}, {}, "scheme.k: saved 1, here 3"),
    "rule": ({"rule": Consensus(0.1)}, {}, "scheme.rule: saved 'Simultaneous', here 'Consensus'"),
    "another rule": ({"rule": Extragradient()}, {}, "scheme.rule: saved"),
    "dropout": ({"model": NoisyVAE(0.5)}, {}, ".p: saved 0.1, here 0.5"),
    "weights": ({"model": VAE(784, 9, 6, 2)}, {}, "scheme.model: saved 'NoisyVAE', here 'VAE'"),
    "optimizer": ({"make": Momentum}, {}, "optimizer of model: saved 'Adam', here 'Momentum'"),
    "torch's": ({"make": torch.optim.SGD}, {}, "optimizer of model: saved 'Adam', here 'SGD'"),
    "betas": ({"settings": {"betas": (0.5, 0.9)}}, {}, "betas[0]: saved 0.9, here 0.5"),
    "decay": ({"settings": {"weight_decay": 0.1}}, {}, "weight_decay: saved 0.0, here 0.1"),
    "eps": ({"settings": {"eps": 1e-3}}, {}, "eps: saved 1e-08, here 0.001"),
    "seed": ({}, {"seed": 1}, "seed: saved 0, here 1"),
    "precision": ({}, {"precision": "bfloat16"}, "precision: saved 'float32', here 'bfloat16'"),
    "schedule": ({}, {"schedule": lambda t: 1 - t}, "schedule: saved None"),
    "average": ({}, {"ema": 0.9}, "averages of the weights"),
    "batch size": ({}, {"batch_size": 10}, "batch_size: saved 20, here 10"),
    "binarization": ({}, {"binarize": "dynamic"}, "static: saved True, here False"),
    "data": ({}, {"data": OTHER}, "data: saved"),
    "last batch": ({}, {"data": Loader(FEW, 20, drop_last=True)}, "drop_last: saved False"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_argument_that_must_agree_is_refused_by_name(one_epoch, name):
    of_scheme, of_fit, message = REFUSED[name]
    scheme = new_scheme(**copy.deepcopy(of_scheme))
    files = {path.name: path.read_bytes() for path in one_epoch.iterdir()}
    before = copy.deepcopy(scheme.state_dict())
    with pytest.raises(ValueError) as caught:
        resumed(one_epoch, scheme, **of_fit)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert files == {path.name: path.read_bytes() for path in one_epoch.iterdir()}
    assert str(before) == str(scheme.state_dict())


@pytest.mark.parametrize(
    "began, goes_on",
    [
        ({"ema": 0.9}, {"ema": 0.99}),
        ({"ema": 0.9}, {"ema": Power(3.0)}),
        ({"schedule": lambda t: 1 - t}, {}),
        ({"schedule": lambda t: 1 - t}, {"schedule": lambda t: 1 - t**2}),
    ],
)
def test_what_a_run_began_with_must_be_there(tmp_path, began, goes_on):
    fit(new_scheme(), FEW, out=tmp_path, valid=OTHER, **QUIET, **began)
    with pytest.raises(ValueError, match="saved"):
        resumed(tmp_path, new_scheme(), **goes_on)


FREE = {
    "device": {"device": "cpu"},
    "samples": {"samples": 4},
    "checkpoints": {"checkpoint_steps": 1, "checkpoint_seconds": 0.1},
    "progress": {"progress": "lines"},
    "callbacks": {"callbacks": [SimpleNamespace(on_epoch=lambda run, record: None)]},
}


@pytest.mark.parametrize("name", FREE)
def test_an_argument_that_is_free_changes_no_weight(tmp_path, one_epoch, name):
    a, b = new_scheme(), new_scheme()
    fit(a, FEW, epochs=2, out=tmp_path / "whole", valid=OTHER, **QUIET)
    resumed(one_epoch, b, **FREE[name])
    assert torch.equal(flat_weights(a.model), flat_weights(b.model))
    (entry,) = json.loads((one_epoch / "config.json").read_text())["resumed"]
    assert entry["changed"] == {"epochs": [1, 2]}


CHANGED = {  # arguments of the scheme, of fit; what is recorded
    "lr": ({"settings": {"lr": 0.001}}, {}, {"lr of model": [[0.01], [0.001]]}),
    "epochs": ({}, {"epochs": 3}, {"epochs": [1, 3]}),
    "patience": ({}, {"epochs": 1, "patience": 4}, {"patience": [None, 4]}),
    "no validation": ({}, {"epochs": 1, "valid": None}, {"valid": [OTHER.fingerprint, None]}),
    "validation": (
        {},
        {"epochs": 1, "valid": FEW},
        {"valid": [OTHER.fingerprint, FEW.fingerprint]},
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_changes_on_purpose_is_recorded(one_epoch, name):
    of_scheme, of_fit, recorded = CHANGED[name]
    resumed(one_epoch, new_scheme(**of_scheme), **of_fit)
    (entry,) = json.loads((one_epoch / "config.json").read_text())["resumed"]
    assert (entry["epoch"], entry["step"]) == (1, 4)
    epochs = {} if of_fit.get("epochs") == 1 else {"epochs": [1, 2]}
    assert entry["changed"] == epochs | recorded


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("schedule", [None, lambda t: 1 - t / 2])
def test_a_learning_rate_that_changes_is_that_of_the_next_steps(tmp_path, tensor, schedule):
    """The run goes on with the old moments at the new rate, as a loop by hand does."""
    make, first, later = torch.optim.Adam, 0.01, 0.002
    if tensor:
        first, later = torch.tensor(first), torch.tensor(later)
    options = QUIET | {"epochs": 2, "schedule": schedule}
    scheme = new_scheme(make=make, settings={"lr": first})
    scheme.draw_or_stop, steps = scheme.draw, iter(range(99))
    scheme.draw = lambda b: scheme.draw_or_stop(b) if next(steps) < 4 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        fit(scheme, FEW, out=tmp_path, checkpoint_steps=4, **options)
    going_on = new_scheme(make=make, settings={"lr": later})
    fit(going_on, FEW, out=tmp_path, resume=True, **options)
    rate = going_on.players["model"].optimizer.param_groups[0]["lr"]
    assert float(rate) == pytest.approx(0.002)

    by_hand = new_scheme(make=torch.optim.Adam, settings={"lr": 0.01})
    (group,) = by_hand.players["model"].optimizer.param_groups
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loader = Loader(FEW, 20, binarize="static")
        for step, batch in enumerate(b for _ in range(2) for b in loader):
            factor = schedule(step / 8) if schedule else 1
            group["lr"] = (0.01 if step < 4 else 0.002) * factor
            by_hand.step(batch)
    a, b = flat_weights(going_on.model), flat_weights(by_hand.model)
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_patience_that_begins_on_resumption_counts_from_there(tmp_path, monkeypatch):
    fit(new_scheme(), FEW, epochs=4, out=tmp_path, valid=OTHER, **QUIET)
    scheme, values = new_scheme(), iter([9.0, 5.0, 6.0, 7.0, 1.0])
    monkeypatch.setattr(scheme, "evaluate", lambda batches: {"loss": next(values)})
    records = resumed(tmp_path, scheme, epochs=20, patience=2)
    assert [r["valid"]["loss"] for r in records[4:]] == [5.0, 6.0, 7.0]
    state = checkpoint.load(tmp_path / "best.pt")
    assert (state["best"], state["best_epoch"]) == (5.0, 5)


def test_a_best_value_on_other_validation_data_does_not_count(tmp_path, monkeypatch):
    for valid, numbers, epochs in ((OTHER, [9.0, 1.0], 1), (FEW, [9.0, 5.0, 4.0], 3)):
        scheme, values = new_scheme(), iter(numbers)
        monkeypatch.setattr(
            scheme, "evaluate", lambda batches, values=values: {"loss": next(values)}
        )
        more = {"epochs": epochs, "patience": 5, "valid": valid}
        fit(scheme, FEW, out=tmp_path, resume=epochs > 1, **QUIET, **more)
    assert checkpoint.load(tmp_path / "best.pt")["best"] == 4.0


def test_the_best_epoch_leaves_the_learning_rates(tmp_path):
    scheme = new_scheme()
    more = {"valid": OTHER, "patience": 5, "schedule": lambda t: 1 - t}
    fit(scheme, FEW, epochs=3, out=tmp_path, **QUIET, **more)
    (group,) = scheme.players["model"].optimizer.param_groups
    assert group["lr"] == 0.01 and "initial_lr" not in group


@pytest.mark.parametrize("make", [torch.optim.Adafactor, torch.optim.RMSprop])
def test_an_optimizer_with_other_entries_for_vectors_resumes(tmp_path, make):
    whole, first, second = (new_scheme(make=make) for _ in range(3))
    fit(whole, FEW, epochs=2, out=tmp_path / "a", **QUIET)
    fit(first, FEW, epochs=1, out=tmp_path / "b", **QUIET)
    fit(second, FEW, epochs=2, out=tmp_path / "b", resume=True, **QUIET)
    assert torch.equal(flat_weights(whole.model), flat_weights(second.model))


def test_changes_are_recorded_once_though_a_resumption_failed(one_epoch, monkeypatch):
    broken = new_scheme(settings={"lr": 0.002})
    monkeypatch.setattr(broken, "evaluate", lambda batches: 1 / 0)
    before = (one_epoch / "config.json").read_bytes()
    with pytest.raises(ZeroDivisionError):
        resumed(one_epoch, broken)
    assert before == (one_epoch / "config.json").read_bytes()
    resumed(one_epoch, new_scheme(settings={"lr": 0.002}))
    assert len(json.loads((one_epoch / "config.json").read_text())["resumed"]) == 1


def test_texts_among_the_numbers_of_an_evaluation_are_printed(tmp_path, monkeypatch, capsys):
    scheme = new_scheme()
    monkeypatch.setattr(scheme, "evaluate", lambda batches: {"loss": 2.0, "what": "low", "n": None})
    fit(scheme, FEW, valid=OTHER, **QUIET | {"progress": "lines"})
    assert "valid loss 2 what low n None" in capsys.readouterr().out


def test_a_number_of_numpy_is_an_argument_too():
    class Weighted(BetaVAE):
        """A VAE whose loss has a factor."""

        def __init__(self, factor: Any) -> None:
            super().__init__(NoisyVAE(0.1))
            self.factor = factor

    same, other = (scheme_arguments(Weighted(np.float32(x))) for x in (0.5, 2.0))
    assert same == scheme_arguments(Weighted(0.5)) and same != other


def test_fewer_epochs_than_are_done_are_refused_and_nothing_is_written(one_epoch):
    resumed(one_epoch, new_scheme(), epochs=3)
    files = {path.name: path.read_bytes() for path in one_epoch.iterdir()}
    with pytest.raises(checkpoint.CheckpointError, match="epochs=2 is fewer than the 3"):
        resumed(one_epoch, new_scheme(), epochs=2)
    assert files == {path.name: path.read_bytes() for path in one_epoch.iterdir()}


def test_a_scheme_that_was_trained_before_resumes_too(one_epoch, tmp_path):
    """What a scheme remembers from another run is no argument."""
    used, new = new_scheme(), new_scheme()
    fit(used, OTHER, **QUIET)
    shutil.copytree(one_epoch, tmp_path / "copy")
    resumed(one_epoch, used)
    resumed(tmp_path / "copy", new)
    assert torch.equal(flat_weights(used.model), flat_weights(new.model))


@pytest.mark.parametrize("scheme, option", CASES)
def test_an_option_of_a_scheme_is_an_argument_that_must_agree(scheme, option):
    """A run that began with one value of an option refuses to go on with another."""
    text, *needs = OTHERS[scheme][option]
    a, b = (build(scheme, *needs, *more) for more in ([], [text]))
    mine, other = scheme_arguments(a), scheme_arguments(b)
    differ = any(mine[name] != other[name] for name in mine.keys() & other.keys())
    if not differ:
        with pytest.raises(ValueError):
            b.load_state_dict(a.state_dict())


@pytest.mark.parametrize("scheme", sorted(OTHERS))
def test_the_optimizer_is_an_argument_and_its_rate_may_change(scheme):
    a, b, c = (build(scheme, *more) for more in ([], ["--optimizer sgd"], ["--lr 0.017"]))
    assert scheme_arguments(a) != scheme_arguments(b)
    assert scheme_arguments(a) == scheme_arguments(c)
    assert learning_rates(a) != learning_rates(c)


# The command line


@pytest.fixture
def vae_run(few_images, tmp_path, no_pictures) -> Path:
    """A run of one epoch on small images."""
    out = tmp_path / "run"
    args = "--hidden 8,6 --z-dim 2 --epochs 1 --out"
    assert run(*train_args("beta-vae", few_images, args), out) == 0
    return out


def test_the_command_line_changes_the_learning_rate_and_records_it(vae_run, capsys):
    assert run("train --resume", vae_run, "--epochs 2 --lr 1e-4 --progress none") == 0
    said = capsys.readouterr().out
    assert "changed after step 6: lr of model was [0.001], is [0.0001]" in said
    assert read_options(vae_run)["lr"] == 1e-4
    (entry,) = json.loads((vae_run / "config.json").read_text())["resumed"]
    assert entry["changed"]["lr of model"] == [[1e-3], [1e-4]]
    group = read_state(vae_run)["scheme"]["model"]["optimizer"]["param_groups"][0]
    assert group["lr"] == 1e-4


def test_a_finished_run_has_nothing_to_train(vae_run, capsys):
    before = (vae_run / "checkpoint.pt").read_bytes()
    assert run("train --resume", vae_run, "--progress none") == 0
    assert "nothing to train: 1 epochs are done; for more: --epochs N" in capsys.readouterr().out
    assert before == (vae_run / "checkpoint.pt").read_bytes()


def test_fewer_epochs_are_refused_by_the_command_line(vae_run, capsys):
    assert run("train --resume", vae_run, "--epochs 3 --progress none") == 0
    before = (vae_run / "config.json").read_bytes()
    capsys.readouterr()
    assert run("train --resume", vae_run, "--epochs 2 --progress none") == 2
    assert_one_line(capsys.readouterr().err, "epochs=2 is fewer than the 3 that are done")
    assert before == (vae_run / "config.json").read_bytes()


@pytest.mark.parametrize(
    "entry, words",
    [
        ({"optimizer": "momentum"}, "optimizer of model: saved 'Adam', here 'Momentum'"),
        ({"beta": "4"}, "scheme.beta.beta: saved 1.0, here 4.0"),
        ({"precision": "bfloat16"}, "precision: saved 'float32', here 'bfloat16'"),
        ({"seed": 7}, "seed"),
        ({"batch_size": 7}, "batch_size: saved 10, here 7"),
        ({"holdout": 0.5}, "data: saved"),
        ({"binarize": "static"}, "static: saved False, here True"),
        ({"ema": 0.5}, "averages"),
    ],
)
def test_a_configuration_that_was_edited_is_refused_by_name(vae_run, capsys, entry, words):
    edit_config(vae_run, **entry)
    capsys.readouterr()
    assert run("train --resume", vae_run, "--epochs 2 --progress none") == 2
    assert_one_line(capsys.readouterr().err, words)


def test_an_edited_learning_rate_is_used_and_recorded(vae_run):
    edit_config(vae_run, lr=0.5)
    assert run("train --resume", vae_run, "--epochs 2 --progress none") == 0
    group = read_state(vae_run)["scheme"]["model"]["optimizer"]["param_groups"][0]
    (entry,) = json.loads((vae_run / "config.json").read_text())["resumed"]
    assert group["lr"] == 0.5 and entry["changed"]["lr of model"] == [[0.001], [0.5]]
