"Callbacks of a training: what they see, in which order, on which rank, and at which cost."

import traceback

import pytest
import torch

from optgen.data.images import Images, digits
from optgen.data.loading import Loader
from optgen.models.vae import VAE
from optgen.schemes.elbo import BetaVAE
from optgen.training import checkpoint
from optgen.training.loop import TrainingLoop
from optgen.training.trainer import build_callbacks, fit

METHODS = ("on_train_begin", "on_step", "on_epoch", "on_checkpoint", "on_train_end")


def few(n=200):
    """Return the first digits."""
    return Images(digits("train").images[:n])


def scheme(device="cpu"):
    """Return a small VAE; its weights are the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VAE(784, 16, 8, 2).to(device)
    return BetaVAE(model, optimizer=torch.optim.Adam(model.parameters(), lr=1e-3))


class Recorder:
    """Callback that notes every call."""

    def __init__(self, calls, name=""):
        for method in METHODS:
            setattr(self, method, self.noting(method, calls, name))

    def noting(self, method, calls, name):
        """Return a method that notes its call."""

        def note(run, *args):
            calls.append((name + method, run.epoch, run.step))

        return note


class TensorBoardLike:
    """A logger of scalars."""

    def __init__(self):
        self.scalars = []

    def on_epoch(self, run, record):
        """Log the losses and the validation."""
        for split in ("train", "valid"):
            for name, value in record.get(split, {}).items():
                self.scalars.append((f"{split}/{name}", value, run.step))

    def on_train_end(self, run):
        """Close the log."""
        self.closed = True


def test_a_logger_takes_few_lines():
    logger = TensorBoardLike()
    records = fit(scheme(), few(), valid=few(50), epochs=2, progress="none", callbacks=[logger])
    losses = [(value, step) for name, value, step in logger.scalars if name == "train/loss"]
    assert losses == [(r["train"]["loss"], r["step"]) for r in records] and logger.closed
    assert len({name for name, _, _ in logger.scalars if name.startswith("valid/")}) > 1


def test_the_order_of_calls(tmp_path):
    calls = []
    fit(
        scheme(),
        few(),
        epochs=1,
        out=tmp_path / "run",
        progress="none",
        callbacks=[Recorder(calls)],
    )
    assert calls == [
        ("on_train_begin", 0, 0),
        ("on_step", 0, 1),
        ("on_checkpoint", 0, 1),  # with the configuration, once a step was taken
        ("on_step", 0, 2),
        ("on_checkpoint", 0, 2),  # before the epoch is measured
        ("on_checkpoint", 1, 2),
        ("on_epoch", 1, 2),
        ("on_train_end", 1, 2),
    ]


def test_callbacks_are_called_in_their_order():
    calls = []
    both = [Recorder(calls, "a "), Recorder(calls, "b ")]
    fit(scheme(), few(100), progress="none", callbacks=both)
    assert [name for name, _, _ in calls] == [
        f"{who} {method}" for method in METHODS if method != "on_checkpoint" for who in "ab"
    ]


def test_a_resumed_run_goes_on_counting(tmp_path):
    calls = []
    for epochs in (1, 2):
        fit(
            scheme(),
            few(),
            epochs=epochs,
            out=tmp_path / "run",
            resume=epochs > 1,
            progress="none",
            callbacks=[Recorder(calls)],
        )
    steps = [(epoch, step) for name, epoch, step in calls if name == "on_step"]
    assert steps == [(0, 1), (0, 2), (1, 3), (1, 4)]


def test_a_checkpoint_is_whole_when_it_is_announced(tmp_path):
    class Loading:
        """Callback that loads every checkpoint."""

        steps = []

        def on_checkpoint(self, run, path):
            """Load the file."""
            self.steps.append((path.name, checkpoint.load(path)["step"], run.step))

    options = dict(valid=few(50), patience=3, checkpoint_steps=1, progress="none")
    fit(scheme(), few(), out=tmp_path / "run", callbacks=[Loading()], **options)
    names = ["checkpoint.pt", "checkpoint.pt", "checkpoint.pt", "best.pt", "checkpoint.pt"]
    assert Loading.steps == [(name, s, s) for name, s in zip(names, (1, 2, 2, 2, 2))]


@pytest.mark.parametrize(
    "callbacks, words",
    [
        ([3], "3 has none of the methods on_train_begin, on_step"),
        ([TensorBoardLike], r"TensorBoardLike is a class. Fix: .*TensorBoardLike\(\)"),
        (TensorBoardLike(), "must be a list of callbacks"),
    ],
)
def test_what_is_no_callback_is_refused_before_the_run(callbacks, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        fit(scheme(), few(), out=tmp_path / "run", progress="none", callbacks=callbacks)
    assert not (tmp_path / "run").exists()


def test_an_iterator_of_callbacks_is_read_once():
    calls = []
    fit(scheme(), few(100), progress="none", callbacks=(Recorder(c) for c in [calls]))
    assert [name for name, *_ in calls].count("on_epoch") == 1


def test_only_the_first_rank_calls():
    class Rank:
        """Stand-in for the processes of a run."""

        def __init__(self, rank):
            self.rank = rank

    mine = object()
    assert build_callbacks(None, "none", [mine], Rank(0)) == [mine]
    assert build_callbacks(None, "lines", [mine], Rank(1)) == []


def test_an_error_in_a_callback_keeps_its_traceback():
    class Broken:
        """Callback that fails at its second step."""

        ended = False

        def on_step(self, run, batch, losses):
            """Fail."""
            if run.step == 2:
                raise LookupError("my mistake")

        def on_train_end(self, run):
            """Note the end."""
            self.ended = True

    broken = Broken()
    with pytest.raises(LookupError, match="my mistake") as error:
        fit(scheme(), few(), progress="none", callbacks=[broken])
    last = traceback.extract_tb(error.value.__traceback__)[-1]
    assert last.filename == __file__ and last.name == "on_step" and broken.ended


def test_a_stop_saves_and_can_be_resumed(tmp_path):
    class Stop:
        """Callback that ends the run after the first epoch."""

        def on_epoch(self, run, record):
            """Stop."""
            run.stop()

    whole, resumed = scheme(), scheme()
    fit(whole, few(), epochs=3, progress="none")
    options = dict(epochs=3, out=tmp_path / "run", progress="none")
    assert len(fit(scheme(), few(), callbacks=[Stop()], **options)) == 1
    assert len(fit(resumed, few(), resume=True, **options)) == 3
    for p, q in zip(whole.model.parameters(), resumed.model.parameters()):
        assert torch.equal(p, q)


def test_no_step_waits_for_the_device():
    "On the meta device every transfer raises."

    class Steps:
        """Callback that keeps the losses as they come."""

        losses = []

        def on_step(self, run, batch, losses):
            """Keep them."""
            self.losses.append(losses["model"])

    game = scheme("meta")
    batch = next(iter(Loader(few(10), 10)))
    batch = batch._replace(x=torch.ones(10, 1, 28, 28, device="meta"))
    TrainingLoop(game, callbacks=[Steps()], lr_factor=lambda t: 1 / (1 + t)).run([batch] * 3)
    assert [(loss.device.type, loss.ndim) for loss in Steps.losses] == [("meta", 0)] * 3


def test_the_losses_of_a_step_are_tensors_of_the_device():
    class Kinds:
        """Callback that notes what the losses are."""

        seen = set()

        def on_step(self, run, batch, losses):
            """Note their types."""
            self.seen |= {(type(loss), loss.ndim) for loss in losses.values()}

    fit(scheme(), few(), progress="none", callbacks=[Kinds()])
    assert Kinds.seen == {(torch.Tensor, 0)}
