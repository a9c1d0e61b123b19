"""Trackers: what they log is read back from the files of the real packages, and nothing twice.

None of these tests has a network: TensorBoard, trackio, W&B (offline) and MLflow write files.
"""

import json
import socket
import time
import warnings

import pytest
import torch
from torch import nn

from cli_helpers import assert_one_line, run
from optgen.controllers import Geco
from optgen.data.images import Batch, Images, digits
from optgen.games import Game, Player
from optgen.models.vae import VAE
from optgen.schemes.elbo import BetaVAE
from optgen.training.trackers import (
    TRACKERS,
    MLflow,
    TensorBoard,
    Tracker,
    Trackio,
    WandB,
    build_trackers,
    controller_values,
    step_numbers,
)
from optgen.training.trainer import fit

FEW = Images(digits("train").images[:60])
HELD_OUT = Images(digits("test").images[:40])
OPTIONS = {"batch_size": 10, "valid": HELD_OUT, "samples": 4, "progress": "none", "clip": 5.0}


def new_scheme():
    """Return a small VAE with a controller."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return BetaVAE(VAE(784, 8, 6, 3), beta=Geco(150.0))


@pytest.fixture(scope="module", autouse=True)
def trackio_folder(tmp_path_factory):
    """Let trackio keep its data base in a temporary folder: it reads the variable once."""
    folder = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder))
        import trackio

        if trackio.TRACKIO_DIR != folder:
            pytest.skip("trackio was imported before")
        yield


@pytest.fixture(autouse=True)
def alone(monkeypatch, no_pictures):
    """Leave out pictures, and refuse every connection to another machine."""
    for name in ("WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    real = socket.socket.connect

    def connect(self, address):
        """Connect to this machine only."""
        host = address[0] if isinstance(address, tuple) else "localhost"
        assert host in ("localhost", "127.0.0.1", "::1"), f"connects to {address}"
        return real(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)


def read_tensorboard(folder):
    """Return the points (step, value) of each curve in TensorBoard's files, and of the images."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    curves = {k: [(e.step, e.value) for e in events.Scalars(k)] for k in tags["scalars"]}
    return curves, [e.step for e in events.Images("samples")]


def read_mlflow(folder):
    """Return the points of each curve in MLflow's store, and the steps of the images."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient((folder / "mlflow").resolve().as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("optgen").experiment_id])
    key = found.info.run_id
    assert found.info.status == "FINISHED" and found.info.run_name == folder.name
    curves = {
        k: [(m.step, m.value) for m in client.get_metric_history(key, k)]
        for k in found.data.metrics
    }
    images = [a.path for a in client.list_artifacts(key, "images") if a.path.endswith(".png")]
    steps = [int(name.split("step")[1].strip("%+").split("%")[0].split("+")[0]) for name in images]
    return curves, sorted(set(steps))


def read_trackio(folder):
    """Return the points of each curve in trackio's data base, and the steps of the images."""
    from trackio import SQLiteStorage

    key = json.loads((folder / "trackio.json").read_text())["key"]
    assert key.startswith(folder.name)
    curves, images = {}, []
    for row in SQLiteStorage.get_logs("optgen", key):
        for name, x in row.items():
            if isinstance(x, dict):
                images.append(row["step"])
            elif name not in ("step", "timestamp"):
                curves.setdefault(name, []).append((row["step"], x))
    return curves, images


def wandb_records(path):
    """Yield the records of a file of W&B: LevelDB's log of blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def finished_records(path):
    """Return the records of a file of W&B, once its process has written the last of them."""
    for _ in range(300):
        records = list(wandb_records(path))
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.1)
    raise AssertionError(f"{path.name} has no end")


def read_wandb(folder):
    """Return the points of each curve in W&B's files, and the steps of the images."""
    curves, images, keys = {}, [], set()
    for path in sorted((folder / "wandb").rglob("run-*.wandb")):
        keys.add(path.stem)
        for record in finished_records(path):
            if record.WhichOneof("record_type") != "history":
                continue
            row = {(i.key or ".".join(i.nested_key)): i.value_json for i in record.history.item}
            step = json.loads(row["_step"])
            images += [step] * any(name.startswith("samples") for name in row)
            for name, x in row.items():
                if not name.startswith(("_", "samples")):
                    curves.setdefault(name, []).append((step, float(json.loads(x))))
    assert len(keys) == 1
    return curves, images


READERS = {
    "tensorboard": (TensorBoard, read_tensorboard),
    "trackio": (Trackio, read_trackio),
    "wandb": (WandB, read_wandb),
    "mlflow": (MLflow, read_mlflow),
}


class Expected:
    """A callback of the test's own: what a tracker should have logged, from plain PyTorch."""

    def __init__(self, every):
        self.every, self.curves = every, {}

    def add(self, name, step, value):
        """Add a point; a step that is repeated after a resumption replaces its own."""
        self.curves.setdefault(name, {})[step] = value

    def on_step(self, run, batch, losses):
        """Note the numbers of a step."""
        if run.step % self.every == 0:
            player = run.scheme.players["model"]
            self.add("step/loss", run.step, losses["model"].item())
            self.add("step/beta", run.step, run.scheme.beta.value.item())
            rate = player.optimizer.param_groups[0]["lr"]
            self.add("step/learning_rate/model", run.step, rate)
            self.add("step/gradient_norm/model", run.step, player.norm_before_clip.item())

    def on_epoch(self, run, record):
        """Note the numbers of an epoch."""
        for name in ("seconds", "images_per_second"):
            self.add(f"time/{name}", record["step"], record[name])
        for part in ("train", "valid"):
            for name, x in record[part].items():
                self.add(f"{part}/{name}", record["step"], x)


def assert_logged(found, expected):
    """Assert that curves have these points, each once."""
    assert found.keys() == expected.keys()
    for name, points in expected.items():
        assert [step for step, _ in found[name]] == sorted(points), name
        for step, x in found[name]:
            assert x == pytest.approx(points[step], rel=1e-6), name


def test_every_tracker_is_tried():
    assert TRACKERS.keys() == READERS.keys()


@pytest.mark.parametrize("name", READERS)
def test_a_stopped_run_goes_on_in_the_same_curves(name, tmp_path):
    """Killed after step 10 and taken up at the checkpoint of step 6, it repeats four steps."""
    kind, read = READERS[name]
    out, expected = tmp_path / "vae", Expected(2)
    scheme, other = new_scheme(), new_scheme()
    options = OPTIONS | {"out": out, "epochs": 3, "schedule": "linear", "warmup": 3}

    class Killed(Exception):
        """The end of a process."""

    class Killer:
        """A callback that ends the run, after the trackers have logged the step."""

        def on_step(self, run, batch, losses):
            """Raise after step 10."""
            if run.step == 10:
                raise Killed

    with pytest.raises(Killed):
        fit(scheme, FEW, callbacks=[expected, kind(every=2), Killer()], **options)
    fit(other, FEW, callbacks=[expected, kind(every=2)], resume=True, **options)
    curves, images = read(out)
    assert_logged(curves, expected.curves)
    assert max(expected.curves["step/loss"]) == 18 and len(expected.curves["step/loss"]) == 9
    assert images == [6, 12, 18]


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_an_epoch_that_was_saved_and_not_logged_is_logged_later(name, tmp_path):
    kind, read = READERS[name]

    class Killed(Exception):
        """The end of a process."""

    class Killer:
        """A callback that ends the run before the trackers log the second epoch."""

        def on_epoch(self, run, record):
            """Raise after the second epoch was saved."""
            if record["epoch"] == 2:
                raise Killed

    options = OPTIONS | {"out": tmp_path / "vae", "epochs": 3}
    with pytest.raises(Killed):
        fit(new_scheme(), FEW, callbacks=[Killer(), kind()], **options)
    fit(new_scheme(), FEW, callbacks=[kind()], resume=True, **options)
    curves, _ = read(tmp_path / "vae")
    assert [step for step, _ in curves["valid/elbo"]] == [6, 12, 18]


class Memory(Tracker):
    """A tracker that keeps what it is given, and fails when it is asked to."""

    name, package = "memory", "json"

    def __init__(self, fails_at=None, where="log_numbers", **settings):
        super().__init__(**settings)
        self.fails_at, self.where, self.points = fails_at, where, []

    def fail(self, where, step):
        """Raise if it is time to."""
        if where == self.where and self.fails_at is not None and step >= self.fails_at:
            raise ConnectionError("the server is gone")

    def open(self, folder, key, title, settings):
        """Open it."""
        self.fail("open", 99)
        return key

    def log_numbers(self, numbers, step):
        """Keep the numbers."""
        self.fail("log_numbers", step)
        self.points.append((step, numbers))

    def log_image(self, name, image, step):
        """Keep the image."""
        self.fail("log_image", step)
        assert image.ndim == 3 and image.shape[0] == 3 and 0 <= image.min() <= image.max() <= 1

    def close(self):
        """Close it."""
        self.fail("close", 99)


@pytest.mark.parametrize("where", ["open", "log_numbers", "log_image", "close"])
def test_a_tracker_that_fails_warns_once_and_the_run_goes_on(where, tmp_path):
    plain, scheme, tracker = new_scheme(), new_scheme(), Memory(4, where, every=1)
    options = OPTIONS | {"epochs": 2}
    fit(plain, FEW, out=tmp_path / "a", **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        records = fit(scheme, FEW, out=tmp_path / "b", callbacks=[tracker], **options)
    messages = [str(w.message) for w in caught if "Memory" in str(w.message)]
    assert messages == [
        "Memory failed and logs no more (ConnectionError: the server is gone); the run goes on"
    ]
    assert len(records) == 2
    for p, q in zip(plain.model.parameters(), scheme.model.parameters()):
        assert torch.equal(p, q)
    if where == "log_numbers":
        assert [step for step, _ in tracker.points] == [1, 2, 3]


def test_between_two_points_nothing_is_read(tmp_path, monkeypatch):
    reads = []
    real = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda x: reads.append(1) or real(x))

    class Run:
        """What a tracker sees of a run."""

        folder, scheme, records, samples = None, new_scheme(), [], None

    tracker, losses = Memory(every=5), {"model": torch.zeros(())}
    tracker.on_train_begin(Run)
    Run.scheme.step(Batch(torch.rand(4, 1, 28, 28)))
    counts = []
    for step in range(1, 11):
        Run.step, before = step, len(reads)
        tracker.on_step(Run, None, losses)
        counts.append(len(reads) - before)
    assert [step for step, count in enumerate(counts, 1) if count] == [5, 10]


def test_controllers_of_every_scheme_have_their_value():
    scheme = new_scheme()
    assert controller_values(scheme)["beta"].item() == scheme.beta.value.item()

    class Vector:
        """A controller with a multiplier of each dimension."""

        value = torch.tensor([1.0, 3.0])

    scheme.beta = Vector()
    assert controller_values(scheme)["beta"].item() == 2
    scheme.stateful_parts = ("levels",)
    scheme.levels = object()
    assert controller_values(scheme) == {}


def test_players_and_groups_have_curves_of_their_own():
    net, other = nn.Linear(2, 1), nn.Linear(2, 1)
    groups = [{"params": [net.weight], "lr": 0.1}, {"params": [net.bias], "lr": 0.2}]
    game = Game(
        G=Player(net, lambda x: net(x).mean(), torch.optim.SGD(groups)),
        D=Player(other, lambda x: other(x).mean(), torch.optim.SGD(other.parameters(), 0.3)),
    )
    numbers = step_numbers(game, game.step(torch.ones(3, 2)))
    assert numbers["step/learning_rate/G"] == 0.1 and numbers["step/learning_rate/G/1"] == 0.2
    assert numbers["step/learning_rate/D"] == 0.3
    # the gradient of the mean of w x + b at x = (1, 1) is (1, 1, 1)
    assert numbers["step/gradient_norm/G"] == pytest.approx(3**0.5)
    assert {"step/G", "step/D"} < numbers.keys()


# the command line

TRAIN = "train beta-vae --hidden 8,6 --z-dim 3 --epochs 1 --image-size 8 --progress none --data"


def test_a_missing_package_is_one_line(few_images, tmp_path, capsys, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "mlflow" else real(name)
    )
    assert run(TRAIN, few_images, "--track mlflow --out", tmp_path / "run") == 2
    assert_one_line(capsys.readouterr().err, "pip install 'optgen[mlflow]'")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ImportError, match="optgen\\[mlflow\\]"):
        build_trackers(["tensorboard", "mlflow"])


def test_an_unknown_tracker_is_one_line(few_images, tmp_path, capsys):
    assert run(TRAIN, few_images, "--track neptune --out", tmp_path / "run") == 2
    assert_one_line(capsys.readouterr().err, "neptune", "mlflow")


def test_the_command_tracks_and_its_resumption_too(few_images, tmp_path):
    out = tmp_path / "run"
    words = "--batch-size 1 --track tensorboard --track mlflow --out"
    assert run(TRAIN, few_images, words, out) == 0
    assert run("train --resume", out, "--epochs 2 --progress none") == 0
    options = json.loads((out / "config.json").read_text())["options"]
    assert options["track"] == ["tensorboard", "mlflow"]
    for read in (read_tensorboard, read_mlflow):
        curves, images = read(out)
        assert [step for step, _ in curves["step/loss"]] == [50, 100]
        assert [step for step, _ in curves["valid/loss"]] == images == [51, 102]


def test_a_run_before_the_trackers_resumes(few_images, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(TRAIN, few_images, "--out", out) == 0
    config = json.loads((out / "config.json").read_text())
    del config["options"]["track"]
    (out / "config.json").write_text(json.dumps(config))
    assert run("train --resume", out, "--epochs 2 --progress none") == 0
    for bad in ("tensorboard", ["neptune"], [3], {"a": 1}):
        config["options"]["track"] = bad
        (out / "config.json").write_text(json.dumps(config))
        capsys.readouterr()
        assert run("train --resume", out, "--epochs 3 --progress none") == 2
        assert_one_line(capsys.readouterr().err, "track")
