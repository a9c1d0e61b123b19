"""An epoch is saved before it is measured, and measured before it is drawn; nothing else changes.

What fails while an epoch is measured costs no epoch, and what can be found before the first step is
found there. What `fit` changes besides what it trains is put back.
"""

import os
import signal
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from optgen.averaging import evaluating
from optgen.data.images import Images, digits
from optgen.data.loading import Loader
from optgen.games import Game, Player
from optgen.models.diffusion import Denoiser, UNet
from optgen.optim import Adam
from optgen.schemes.denoising import DenoisingDiffusion
from optgen.testing import flat_weights
from optgen.training import checkpoint
from optgen.training.guards import Interrupted
from optgen.training.trainer import fit
from optgen.viz import read_log

FEW = digits("train").subset(torch.arange(70))
VALID = digits("test").subset(torch.arange(30))
QUIET = {"progress": "none", "batch_size": 20}


class Autoencoder(Game):
    """A small autoencoder with dropout whose evaluation calls a hook.

    Args:
        before_evaluation: called with the number of the evaluation, 0 in the rehearsal.
        lr: learning rate.
    """

    def __init__(self, before_evaluation: Callable[[int], Any] = int, lr: Any = 0.01) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(784, 4), nn.Dropout(0.2), nn.Linear(4, 784))
        self.hook, self.evaluations = before_evaluation, [0]
        super().__init__(net=Player(self.net, self.loss, Adam(self.net.parameters(), lr=lr)))

    def loss(self, batch: Any) -> torch.Tensor:
        """Return the squared error of the reconstruction."""
        x = batch.x.flatten(1)
        return (self.net(x) - x).square().mean()

    @torch.no_grad()
    def evaluate(self, batches: Any) -> dict:
        """Return the loss over all images."""
        self.hook(self.evaluations[0])
        self.evaluations[0] += 1
        losses, counts = zip(*[(self.loss(b).item(), len(b.x)) for b in batches])
        return {"loss": float(np.average(losses, weights=counts))}

    def sample(self, n: int) -> torch.Tensor:
        """Return n images."""
        return torch.rand(n, 1, 28, 28)


def without_clock(records: list[dict]) -> list[dict]:
    """Return the records without what depends on the clock."""
    return [{k: v for k, v in record.items() if "second" not in k} for record in records]


def fail_at(number: int) -> Callable[[int], None]:
    """Return a hook that fails in one evaluation."""

    def hook(evaluation: int) -> None:
        if evaluation == number:
            raise ZeroDivisionError("a validation that fails")

    return hook


def signal_at(number: int, signum: int) -> Callable[[int], None]:
    """Return a hook during which the process receives a signal; it then waits for long."""

    def hook(evaluation: int) -> None:
        if evaluation == number:
            os.kill(os.getpid(), signum)
            for _ in range(1000):  # a validation of many operations, which the signal cuts short
                signal.sigtimedwait([], 0.01)

    return hook


@pytest.mark.parametrize("epoch", [1, 2, 3])
@pytest.mark.parametrize("ema", [None, 0.8])
def test_an_epoch_whose_validation_fails_is_not_lost(tmp_path, epoch, ema):
    options = QUIET | {"epochs": 3, "valid": VALID, "ema": ema}
    whole, broken, mended = Autoencoder(), Autoencoder(fail_at(epoch)), Autoencoder()
    expected = fit(whole, FEW, out=tmp_path / "whole", **options)
    with pytest.raises(ZeroDivisionError):
        fit(broken, FEW, out=tmp_path / "run", **options)
    state = checkpoint.load(tmp_path / "run/checkpoint.pt")
    assert (state["step"], state["trained"], state["epoch"]) == (4 * epoch, epoch, epoch - 1)
    records = fit(mended, FEW, out=tmp_path / "run", resume=True, **options)
    assert without_clock(records) == without_clock(expected)
    assert without_clock(read_log(tmp_path / "run/metrics.jsonl")) == without_clock(expected)
    assert torch.equal(flat_weights(mended.net), flat_weights(whole.net))


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_an_epoch_is_measured_acts_at_once(tmp_path, epoch, signum):
    options = QUIET | {"epochs": 2, "valid": VALID}
    whole, mended = Autoencoder(), Autoencoder()
    fit(whole, FEW, out=tmp_path / "whole", **options)
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Interrupted, match=f"after step {4 * epoch}: saved; go on with") as caught:
        fit(Autoencoder(signal_at(epoch, signum)), FEW, out=tmp_path / "run", **options)
    assert caught.value.signum == signum
    assert handlers == [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    assert len(read_log(tmp_path / "run/metrics.jsonl")) == epoch - 1
    fit(mended, FEW, out=tmp_path / "run", resume=True, **options)
    assert torch.equal(flat_weights(mended.net), flat_weights(whole.net))


class SignalAfterEpoch:
    """Callback that sends a signal once the record of an epoch is complete."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_epoch(self, run: Any, record: dict) -> None:
        """Send the signal."""
        if record["epoch"] == self.epoch:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_signal_between_epochs_and_after_the_last_is_not_swallowed(tmp_path, epoch):
    with pytest.raises(Interrupted, match="SIGTERM"):
        callbacks = [SignalAfterEpoch(epoch)]
        fit(Autoencoder(), FEW, epochs=2, out=tmp_path, callbacks=callbacks, **QUIET)
    assert checkpoint.load(tmp_path / "checkpoint.pt")["epoch"] == epoch


def test_what_cannot_be_evaluated_is_found_before_the_first_step(tmp_path):
    scheme = Autoencoder(fail_at(0))
    before = flat_weights(scheme.net)
    with pytest.raises(ZeroDivisionError) as caught:
        fit(scheme, FEW, valid=VALID, out=tmp_path / "run", **QUIET)
    assert "before the first step" in caught.value.__notes__[0]
    assert torch.equal(flat_weights(scheme.net), before) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "result, kind, message",
    [
        (None, TypeError, "a dict of numbers by name, got a NoneType"),
        ({"loss": "low", "n": [1]}, TypeError, "got a list for 'n'"),
        ({"loss": torch.ones(2)}, TypeError, "got a Tensor for 'loss'"),
        ({"nll": 1.0}, ValueError, "criterion 'loss', and its evaluate gives only nll"),
        ({"loss": "low"}, ValueError, "criterion 'loss'"),
    ],
)
def test_an_evaluation_that_no_log_can_hold(tmp_path, monkeypatch, result, kind, message):
    scheme = Autoencoder()
    monkeypatch.setattr(scheme, "evaluate", lambda batches: result, raising=False)
    with pytest.raises(kind, match=message):
        fit(scheme, FEW, valid=VALID, patience=1, out=tmp_path / "run", **QUIET)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "value", [np.float32(2.5), np.float64(2.5), torch.tensor(2.5), torch.tensor([2.5]), 2.5]
)
def test_numbers_of_numpy_and_of_tensors_are_numbers(tmp_path, monkeypatch, value):
    scheme = Autoencoder()
    monkeypatch.setattr(scheme, "evaluate", lambda batches: {"loss": value, "n": np.int64(3)})
    fit(scheme, FEW, valid=VALID, patience=1, out=tmp_path, **QUIET)
    (record,) = read_log(tmp_path / "metrics.jsonl")
    assert record["valid"] == {"loss": 2.5, "n": 3}


def test_what_cannot_be_saved_is_found_before_the_first_step(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="'lr'.* is a float64"):
        fit(Autoencoder(lr=np.float64(0.01)), FEW, out=tmp_path / "run", **QUIET)
    assert not (tmp_path / "run").exists()


def test_a_schedule_of_numpy_numbers_is_that_of_floats(tmp_path):
    a, b = Autoencoder(), Autoencoder()
    fit(a, FEW, epochs=2, schedule=lambda t: 1 - t**2, out=tmp_path / "a", **QUIET)
    fit(b, FEW, epochs=2, schedule=lambda t: np.float64(1 - t**2), out=tmp_path / "b", **QUIET)
    assert torch.equal(flat_weights(a.net), flat_weights(b.net))


@pytest.mark.parametrize(
    "schedule",
    [
        lambda t: float("nan") if t > 0.5 else 1.0,
        lambda t: 0.9 - t,
        lambda t: None,
        lambda t: torch.ones(2),
        lambda t: "1e" if t > 0.9 else 1,
        lambda t: np.inf,
    ],
)
def test_a_schedule_that_gives_no_factor_is_found_before_the_first_step(tmp_path, schedule):
    scheme = Autoencoder()
    with pytest.raises(ValueError, match=r"schedule\(.*must be a finite number, at least 0"):
        fit(scheme, FEW, schedule=schedule, out=tmp_path / "run", **QUIET)
    assert not (tmp_path / "run").exists()
    assert scheme.players["net"].optimizer.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_samples_that_fail_are_a_warning(tmp_path, monkeypatch, failing):
    scheme, drawn = Autoencoder(), []

    def sample(n: int) -> torch.Tensor:
        """Return images, unless it is the call that fails."""
        drawn.append(n)
        if len(drawn) - 1 == failing:
            raise RuntimeError("no samples today")
        return torch.rand(n, 1, 28, 28)

    monkeypatch.setattr(scheme, "sample", sample)
    with pytest.warns(UserWarning, match="no pictures of samples: .*no samples today.*samples=0"):
        records = fit(scheme, FEW, epochs=3, samples=4, out=tmp_path, **QUIET)
    assert len(records) == 3 and drawn == [1, 4, 4][: failing + 1]
    assert len(list(tmp_path.glob("samples/*.png"))) == max(0, failing - 1)


def test_a_conditional_model_draws_its_classes_in_turn(tmp_path):
    network = UNet((1, 8, 8), 4, [1], 1, classes=10)
    model = Denoiser(network, (1, 8, 8), "v")
    scheme = DenoisingDiffusion(model, conditional=True)
    images = Images(FEW.images[:, :, 10:18, 10:18].contiguous(), FEW.labels)
    asked, draw = [], scheme.sample
    scheme.sample = lambda n: asked.append(n) or draw(n)
    fit(scheme, images, out=tmp_path, samples=20, **QUIET)
    assert (tmp_path / "samples/epoch-0001.png").exists() and asked[-1] == 20


def test_a_picture_that_cannot_be_drawn_is_a_warning(tmp_path, monkeypatch):
    four = Images(FEW.images.expand(-1, 4, -1, -1).contiguous())
    net = nn.Conv2d(4, 4, 1)
    player = Player(net, lambda b: net(b.x).square().mean(), torch.optim.SGD(net.parameters(), 0.1))
    game = Game(net=player)
    game.sample = lambda n: torch.rand(n, 4, 28, 28)
    with pytest.warns(UserWarning, match=r"epoch-0001.png was not drawn .*1 or 3 channels"):
        fit(game, four, out=tmp_path / "a", **QUIET)
    monkeypatch.setattr("optgen.training.callbacks.plot_curves", fail_at(0))
    with pytest.warns(UserWarning, match="curves.png was not drawn"):
        fit(Autoencoder(), FEW, out=tmp_path / "b", epochs=2, **QUIET)
    assert len(read_log(tmp_path / "b/metrics.jsonl")) == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_criterion_that_is_not_finite_is_never_the_best(tmp_path, monkeypatch, bad):
    values = iter([bad, bad, 3.0, bad, 2.0, bad, bad, bad])
    scheme = Autoencoder()
    monkeypatch.setattr(scheme, "evaluate", lambda batches: {"loss": next(values)})
    records = fit(scheme, FEW, epochs=9, valid=VALID, patience=3, out=tmp_path, **QUIET)
    state = checkpoint.load(tmp_path / "best.pt")  # the first value is the rehearsal's
    assert (state["best"], state["best_epoch"], len(records)) == (2.0, 4, 7)


def test_a_run_without_a_finite_criterion_keeps_its_last_weights(tmp_path, monkeypatch):
    a, b = Autoencoder(), Autoencoder()
    monkeypatch.setattr(a, "evaluate", lambda batches: {"loss": float("nan")})
    records = fit(a, FEW, epochs=9, valid=VALID, patience=2, out=tmp_path, **QUIET)
    fit(b, FEW, epochs=2, **QUIET)
    assert len(records) == 2 and not (tmp_path / "best.pt").exists()
    assert torch.equal(flat_weights(a.net), flat_weights(b.net))


def test_the_train_loss_is_the_mean_over_images():
    class Brightness(Game):
        """A game whose loss is the mean of the pixels."""

        def __init__(self) -> None:
            self.w = torch.ones((), requires_grad=True)
            optimizer = torch.optim.SGD([self.w], lr=0.0)
            super().__init__(net=Player([self.w], lambda b: self.w * b.x.mean(), optimizer))

    images = torch.zeros(71, 1, 28, 28, dtype=torch.uint8)
    images[-1] = 255  # in a batch by itself
    loader = Loader(Images(images), 10, shuffle=False)
    (record,) = fit(Brightness(), loader, progress="none")
    assert record["train"]["loss"] == pytest.approx(1 / 71, rel=1e-6)


def test_what_is_not_trained_is_put_back(tmp_path, monkeypatch):
    scheme = Autoencoder(fail_at(2))
    scheme.net[1].eval()
    monkeypatch.setattr(torch, "compile", lambda f, **options: lambda batch: f(batch))
    valid = Loader(VALID, 10)
    (group,) = scheme.players["net"].optimizer.param_groups
    loss, generator, position = (
        scheme.players["net"].loss,
        torch.get_rng_state(),
        valid.state_dict(),
    )
    options = QUIET | {"valid": valid, "schedule": lambda t: 1 - t, "compile": True, "epochs": 3}
    for error in (True, False):
        if error:
            with pytest.raises(ZeroDivisionError):
                fit(scheme, FEW, out=tmp_path, **options)
        else:
            scheme.hook = int
            fit(scheme, FEW, out=tmp_path, resume=True, **options)
        (group,) = scheme.players["net"].optimizer.param_groups
        assert group["lr"] == 0.01 and "initial_lr" not in group
        assert [m.training for m in scheme.net] == [True, False, True] and scheme.net.training
        assert scheme.players["net"].loss == loss and scheme.ranks is None
        assert torch.equal(torch.get_rng_state(), generator)
        now = valid.state_dict()
        assert all(str(now[k]) == str(v) for k, v in position.items())


def test_the_second_fit_trains_at_the_rate_of_the_first(tmp_path):
    once, twice = Autoencoder(), Autoencoder()
    fit(twice, FEW, epochs=2, schedule=lambda t: 1 - t, seed=1, **QUIET)
    fit(twice, FEW, epochs=1, seed=2, **QUIET)
    optimizer = once.players["net"].optimizer
    for seed, epochs in ((1, 2), (2, 1)):
        loader = Loader(FEW, 20, seed=seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for step, batch in enumerate(b for _ in range(epochs) for b in loader):
                factor = 1 - step / 8 if seed == 1 else 1.0
                optimizer.param_groups[0]["lr"] = 0.01 * factor
                once.step(batch)
    assert torch.equal(flat_weights(once.net), flat_weights(twice.net))


def test_averages_stay_and_are_gone_on_with():
    scheme, other = Autoencoder(), Autoencoder()
    fit(scheme, FEW, ema=0.9, **QUIET)
    assert scheme.averages[0].step == 4
    fit(scheme, FEW, seed=1, **QUIET)
    assert scheme.averages[0].step == 8
    fit(other, FEW, **QUIET)
    assert other.averages == ()
    trained = flat_weights(scheme.net)
    with evaluating(scheme):
        assert not torch.equal(flat_weights(scheme.net), trained)
    assert torch.equal(flat_weights(scheme.net), trained)


def test_the_best_epoch_comes_back_with_its_average(tmp_path, monkeypatch):
    shorter, longer = Autoencoder(), Autoencoder()
    fit(shorter, FEW, epochs=2, ema=0.9, **QUIET)
    values = iter([9.0, 5.0, 4.0, 6.0, 7.0])
    monkeypatch.setattr(longer, "evaluate", lambda batches: {"loss": next(values)})
    fit(longer, FEW, epochs=9, ema=0.9, valid=VALID, patience=2, out=tmp_path, **QUIET)
    with evaluating(shorter), evaluating(longer):
        assert torch.equal(flat_weights(shorter.net), flat_weights(longer.net))


def test_a_step_of_ones_own_after_fit_has_dropout_on():
    scheme = Autoencoder()
    fit(scheme, FEW, valid=VALID, **QUIET)
    batch = next(iter(Loader(FEW, 20)))
    with torch.no_grad():
        assert scheme.loss(batch) != scheme.loss(batch)


def test_the_rehearsal_changes_nothing(tmp_path):
    """A run that is rehearsed is the loop by hand, though its evaluation draws random numbers."""
    rehearsed, by_hand = Autoencoder(lambda n: torch.rand(100)), Autoencoder()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(rehearsed, FEW, epochs=2, valid=VALID, samples=4, out=tmp_path, seed=5, **QUIET)
    loader = Loader(FEW, 20, seed=5)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for _ in range(2):
            for batch in loader:
                by_hand.step(batch)
    assert torch.equal(flat_weights(rehearsed.net), flat_weights(by_hand.net))
