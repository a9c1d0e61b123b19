"""What `fit` does and records, against runs written by hand from the batches that a game saw.

The game is a regression of one number on the mean pixel, with noise from torch's own generator in
its loss. It notes every batch, mode and learning rate, so that a run can be repeated by hand.
"""

import json
import math

import pytest
import torch
from torch import nn

from optgen.averaging import averages_of
from optgen.data.images import Images
from optgen.data.loading import Loader
from optgen.games import Game, Player
from optgen.testing import generator
from optgen.training.callbacks import watch_training
from optgen.training.loop import TrainingLoop
from optgen.training.parallel import ShardAveraging
from optgen.training.trainer import fit
from optgen.viz import image_grid, plot_curves, reliability_diagram, save_image_grid

LR = 0.4


class NotingSGD(torch.optim.SGD):
    """Gradient descent that notes its learning rates."""

    def step(self, closure=None):
        """Take a step."""
        self.__dict__.setdefault("rates", []).append([g["lr"] for g in self.param_groups])
        return super().step(closure)


class Line(nn.Module):
    """A slope and an intercept, with a dropout that changes nothing but has a mode."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.shift = nn.Parameter(torch.tensor(-0.2, dtype=torch.float64))
        self.mode = nn.Dropout(0.0)


class Regression(Game):
    """The label of an image, by its mean pixel: the squared error, with noise in the slope."""

    criterion = "error"

    def __init__(self, noise=0.1, normalizes_batch=False):
        self.line, self.noise = Line(), noise
        self.line.normalizes_batch = normalizes_batch
        self.seen, self.validated, self.sampled = [], [], []
        groups = [{"params": [self.line.slope]}, {"params": [self.line.shift], "lr": LR / 2}]
        self.optimizer = NotingSGD(groups, lr=LR)
        player = Player(self.line, self.squared_error, self.optimizer)
        super().__init__(self.draw_noise, line=player)

    def draw_noise(self, batch):
        """Return the mean pixels, the labels and the noise of a batch."""
        noise = torch.randn((), dtype=torch.float64)
        return batch.x.double().flatten(1).mean(1), batch.y.double(), noise

    def squared_error(self, batch):
        """Return the mean squared error, and note the batch."""
        x, y, noise = batch
        autocast = torch.is_autocast_enabled("cpu")
        self.seen.append((x, y, noise, self.line.mode.training, autocast))
        return (((self.line.slope + self.noise * noise) * x + self.line.shift - y) ** 2).mean()

    def evaluate(self, batches):
        """Return the mean absolute error and others, and note what was seen."""
        whole = [(b.x.double(), b.y.double()) for b in batches]
        x, y = (torch.cat(part) for part in zip(*whole))
        self.validated.append((x, y, self.line.mode.training, self.weights_now()))
        error = (self.line.slope * x.flatten(1).mean(1) + self.line.shift - y).abs().mean()
        return {"noise": torch.rand(()).item(), "error": error.item(), "tiny": -1e9}

    def sample(self, n):
        """Return noise, and note the number asked for."""
        self.sampled.append((n, self.line.mode.training, self.weights_now()))
        return torch.rand(n, 1, 2, 2)

    def weights_now(self):
        """Return slope and intercept."""
        return self.line.slope.item(), self.line.shift.item()


def images(n=23, seed=0):
    """Return images with labels, of which no two are alike."""
    pixels = torch.randint(256, (n, 1, 2, 2), dtype=torch.uint8, generator=generator(seed))
    return Images(pixels, torch.arange(n) % 5)


def pairs(data):
    """Return the mean pixel and the label of each image, sorted."""
    means = (data.images.double() / 255).flatten(1).mean(1)
    return sorted(zip(means.tolist(), data.labels.tolist()))


def run_by_hand(seen, rates, noise=0.1):
    """Repeat a run: return the losses, the numbers of images and the weights after each step.

    Args:
        seen: batches that the loss saw, in their order.
        rates: learning rates of slope and intercept at each step.
        noise: standard deviation of the slope's noise.
    """
    slope, shift, losses, sizes, weights = 0.5, -0.2, [], [], []
    for (x, y, eps, *_), (lr_slope, lr_shift) in zip(seen, rates, strict=True):
        residual = (slope + noise * eps) * x + shift - y
        losses.append((residual**2).mean().item())
        sizes.append(len(x))
        slope -= lr_slope * (2 * residual * x).mean().item()
        shift -= lr_shift * (2 * residual).mean().item()
        weights.append((slope, shift))
    return losses, sizes, weights


def quick(game, data, **settings):
    """Run `fit` without progress."""
    return fit(game, data, progress="none", **({"batch_size": 10, "epochs": 3} | settings))


def test_a_run_is_that_of_the_loop_by_hand():
    game, data = Regression(), images(20)
    torch.manual_seed(9)
    state = torch.get_rng_state()
    records = quick(game, data, seed=4)
    assert torch.equal(state, torch.get_rng_state())
    rates = [[LR, LR / 2]] * 6
    assert game.optimizer.rates == rates
    losses, sizes, weights = run_by_hand(game.seen, rates)
    assert sizes == [10] * 6
    assert game.weights_now() == pytest.approx(weights[-1], rel=1e-9)
    for epoch, record in enumerate(records):
        own = losses[2 * epoch : 2 * epoch + 2]
        assert record["train"] == pytest.approx({"loss": sum(own) / 2}, rel=1e-5)
        assert (record["epoch"], record["step"]) == (epoch + 1, 2 * epoch + 2)
        assert record["images_per_second"] * record["seconds"] == pytest.approx(20)


def test_the_train_loss_of_an_epoch_is_a_mean_over_images():
    game, data = Regression(), images(23)
    records = quick(game, data, batch_size=11)
    losses, sizes, _ = run_by_hand(game.seen, [[LR, LR / 2]] * 9)
    assert sizes == [11, 11, 1] * 3
    for epoch, record in enumerate(records):
        own = slice(3 * epoch, 3 * epoch + 3)
        mean = sum(n * loss for n, loss in zip(sizes[own], losses[own])) / 23
        assert record["train"]["loss"] == pytest.approx(mean, rel=1e-5)


def test_every_image_is_seen_once_an_epoch_with_its_label():
    game, data = Regression(), images(23)
    records = quick(game, data)
    assert [len(x) for x, *_ in game.seen] == [10, 10, 3] * 3
    orders = []
    for epoch in range(3):
        x, y = (torch.cat([s[i] for s in game.seen[3 * epoch :][:3]]).tolist() for i in (0, 1))
        found, labels = zip(*sorted(zip(x, y)))
        assert found == pytest.approx([m for m, _ in pairs(data)], rel=1e-6)
        assert labels == tuple(k for _, k in pairs(data))
        orders.append(x)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert all(r["images_per_second"] * r["seconds"] == pytest.approx(23) for r in records)


@pytest.mark.parametrize("seed", [0, 3])
def test_the_seed_sets_order_and_noise(seed):
    def order(data_seed):
        """Return the images of the first epoch in the order of a loader."""
        batches = Loader(images(23), 10, seed=data_seed)
        return torch.cat([b.x.double().flatten(1).mean(1) for b in batches])

    one, again = Regression(), Regression()
    quick(one, images(23), seed=seed)
    quick(again, images(23), seed=seed)
    assert one.weights_now() == again.weights_now()
    first = torch.cat([x for x, *_ in one.seen[:3]])
    assert torch.equal(first, order(seed)) and not torch.equal(first, order(seed + 1))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        expected = [torch.randn((), dtype=torch.float64).item() for _ in range(9)]
    assert [noise.item() for _, _, noise, *_ in one.seen] == expected


def test_a_smaller_last_batch_is_dropped_where_a_batch_is_normalized():
    game = Regression(normalizes_batch=True)
    records = quick(game, images(23))
    assert [len(x) for x, *_ in game.seen] == [10] * 6
    assert all(r["images_per_second"] * r["seconds"] == pytest.approx(20) for r in records)


def schedule(share):
    """Return a factor on the rates that differs at every step."""
    return 1 - 0.7 * share**2


@pytest.mark.parametrize("stop_after", [None, 1])
def test_the_schedule_of_each_step(stop_after, tmp_path, no_pictures):
    game = Regression()
    settings = {"schedule": schedule, "out": tmp_path / "run", "samples": 0}
    if stop_after:

        class Stop:
            """Callback that ends the run after an epoch."""

            def on_epoch(self, run, record):
                """Stop."""
                run.stop()

        first = Regression()
        quick(first, images(23), callbacks=[Stop()], **settings)
        quick(game, images(23), resume=True, **settings)
        game.seen, game.optimizer.rates = (
            first.seen + game.seen,
            first.optimizer.rates + game.optimizer.rates,
        )
    else:
        quick(game, images(23), **settings)
    expected = [[LR * schedule(t / 9), LR / 2 * schedule(t / 9)] for t in range(9)]
    assert [x for pair in game.optimizer.rates for x in pair] == pytest.approx(
        [x for pair in expected for x in pair]
    )
    *_, weights = run_by_hand(game.seen, expected)
    assert game.weights_now() == pytest.approx(weights[-1], rel=1e-9)


def test_averages_are_validated_and_sampled_and_put_back(tmp_path, no_pictures):
    game, decay = Regression(), 0.6
    quick(game, images(23), ema=decay, valid=images(7, 1), out=tmp_path / "run", samples=5)
    *_, weights = run_by_hand(game.seen, [[LR, LR / 2]] * 9)
    average, kept = (0.0, 0.0), []
    for t, now in enumerate(weights, 1):
        new = 1.0 if t == 1 else max(9 / (t + 9), 1 - decay)
        average = tuple(a + new * (b - a) for a, b in zip(average, now))
        if t % 3 == 0:
            kept.append(average)
    for epoch in range(3):
        assert game.validated[-3:][epoch][3] == pytest.approx(kept[epoch], rel=1e-6)
        assert game.sampled[-3:][epoch][2] == pytest.approx(kept[epoch], rel=1e-6)
        assert abs(kept[epoch][0] - weights[3 * epoch + 2][0]) > 1e-4
    assert game.weights_now() == pytest.approx(weights[-1], rel=1e-9)


def test_modes_in_training_validation_and_sampling(tmp_path, no_pictures):
    game = Regression()
    quick(game, images(23), valid=images(7, 1), out=tmp_path / "run", samples=5)
    assert [training for _, _, _, training, _ in game.seen] == [True] * 9
    assert [training for _, _, training, _ in game.validated][-3:] == [False] * 3
    assert [(n, training) for n, training, _ in game.sampled][-3:] == [(5, False)] * 3


def test_validation_sees_the_same_and_draws_its_own_numbers():
    with_valid, without = Regression(), Regression()
    valid = Loader(images(9, 1), 4, shuffle=True, binarize="dynamic", seed=2)
    records = quick(with_valid, images(23), valid=valid, binarize="dynamic")
    quick(without, images(23), binarize="dynamic")
    assert with_valid.weights_now() == without.weights_now()
    rehearsed, first, *others = with_valid.validated
    assert torch.equal(rehearsed[0], first[0][:4])  # the first batch
    assert all(torch.equal(first[0], x) and torch.equal(first[1], y) for x, y, *_ in others)
    assert len(first[0]) == 9 and {r["valid"]["noise"] for r in records} == {
        torch.rand((), generator=generator(0)).item()
    }
    for record, (x, y, _, (slope, shift)) in zip(records, with_valid.validated[-3:], strict=True):
        error = (slope * x.flatten(1).mean(1) + shift - y).abs().mean().item()
        assert record["valid"]["error"] == pytest.approx(error)


@pytest.mark.parametrize("how", ["static", "dynamic"])
def test_validation_images_are_black_and_white_and_stay(how):
    game, other, valid = Regression(), Regression(), images(30, 1)
    quick(game, images(23), valid=valid, binarize=how)
    quick(other, images(23), valid=valid, binarize=how, seed=5)
    first, *others = (x for g in (game, other) for x, *_ in g.validated)
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert all(torch.equal(first, x) for x in others)
    p = valid.images.double() / 255
    error = math.sqrt((p * (1 - p)).sum()) / p.numel()
    assert abs(first.mean() - p.mean()) < 5 * error
    trained = {round(4 * m) - 4 * m for x, *_ in game.seen for m in x.tolist()}
    assert trained == {0.0}  # mean of four pixels that are 0 or 1


def test_gray_images_stay_gray():
    game, valid = Regression(), images(30, 1)
    quick(game, images(23), valid=valid)
    assert torch.allclose(game.validated[0][0], valid.images.double() / 255)


@pytest.mark.parametrize("precision, autocast", [("float32", False), ("bfloat16", True)])
def test_the_precision_reaches_the_losses(precision, autocast):
    game = Regression()
    quick(game, images(23), precision=precision)
    assert {seen[4] for seen in game.seen} == {autocast}


def scripted(game, numbers):
    """Let the validation of a game return numbers by the script."""
    numbers = iter(numbers)

    def evaluate(batches):
        return {"noise": next(numbers) - 50.0, "error": game.script.pop(0), "tiny": -1e9}

    game.evaluate = evaluate
    return game


@pytest.mark.parametrize(
    "errors, best, epochs",
    [([3.0, 2.0, 2.5, 2.0, 1.0], 2, 4), ([1.0, 3.0, 2.0, 0.5], 1, 3), ([4.0, 3.0, 2.0], 3, 3)],
)
def test_patience_waits_for_the_criterion_and_keeps_the_best(
    errors, best, epochs, tmp_path, no_pictures
):
    game = scripted(Regression(), range(9))
    game.script = [9.0, *errors]  # the first one is the rehearsal's
    settings = {"valid": images(7, 1), "out": tmp_path / "run", "samples": 0, "patience": 2}
    records = quick(game, images(20), epochs=len(errors), **settings)
    assert [r["valid"]["error"] for r in records] == errors[:epochs]
    _, _, weights = run_by_hand(game.seen, [[LR, LR / 2]] * 2 * epochs)
    assert game.weights_now() == pytest.approx(weights[2 * best - 1], rel=1e-9)
    logged = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in logged] == records


def test_a_resumed_run_is_the_whole_run(tmp_path, no_pictures):
    whole, first, rest = Regression(), Regression(), Regression()
    settings = {"binarize": "dynamic", "ema": 0.7, "valid": images(7, 1), "samples": 0}
    records = quick(whole, images(23), epochs=3, **settings)
    quick(first, images(23), epochs=1, out=tmp_path / "run", **settings)
    torch.rand(3)
    resumed = quick(rest, images(23), epochs=3, out=tmp_path / "run", resume=True, **settings)
    assert whole.weights_now() == rest.weights_now()
    assert [r["train"] for r in records] == [r["train"] for r in resumed]
    assert [r["valid"] for r in records] == [r["valid"] for r in resumed]
    for a, b in zip(whole.seen, first.seen + rest.seen, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[2], b[2])


def test_printed_lines_are_the_records(capsys):
    records = fit(
        Regression(), images(23), batch_size=10, epochs=2, valid=images(7, 1), progress="lines"
    )
    lines = capsys.readouterr().out.splitlines()
    for line, record in zip(lines, records, strict=True):
        words = line.replace(" · ", " ").split()
        assert words[:4] == ["epoch", f"{record['epoch']}/2", "step", str(record["step"])]
        for split in ("train", "valid"):
            numbers = words[words.index(split) + 1 :]
            for i, (name, value) in enumerate(record[split].items()):
                assert numbers[2 * i : 2 * i + 2] == [name, f"{value:.4g}"]


class Bar:
    """A stand-in for tqdm that keeps what it is given."""

    made = []

    def __init__(self, total, initial, **more):
        self.total, self.at, self.start = total, initial, initial
        self.made.append(self)

    def update(self, n):
        """Advance."""
        self.at += n

    def set_description(self, *args, **more):
        """Do nothing."""

    set_postfix = close = set_description


def test_the_bar_counts_images(tmp_path, monkeypatch, no_pictures):
    monkeypatch.setattr("optgen.training.callbacks.tqdm", Bar)
    monkeypatch.setattr(Bar, "made", [])
    settings = {"batch_size": 10, "out": tmp_path / "run", "progress": "bar", "samples": 0}
    fit(Regression(), images(23), epochs=1, **settings)
    fit(Regression(), images(23), epochs=3, resume=True, **settings)
    assert [(bar.total, bar.start, bar.at) for bar in Bar.made] == [(23, 0, 23), (69, 23, 69)]


class TwoPlayers(Game):
    """Two regressions beside one another, whose losses are recorded by player."""

    def __init__(self):
        self.nets = {"a": Line(), "b": Line()}
        players = {
            name: Player(
                net,
                lambda batch, net=net, k=k: k * (net.slope * batch.x.double().mean() - 1) ** 2,
                torch.optim.SGD(net.parameters(), 0.0),
            )
            for k, (name, net) in enumerate(self.nets.items(), 1)
        }
        super().__init__(**players)


def test_losses_are_recorded_by_player():
    data = images(20)
    (record,) = quick(TwoPlayers(), data, epochs=1)
    loader = Loader(data, 10)
    losses = [(0.5 * b.x.double().mean().item() - 1) ** 2 for b in loader]
    assert record["train"] == pytest.approx({"a": sum(losses) / 2, "b": sum(losses)}, rel=1e-5)


def test_a_watched_training_by_hand():
    game = Regression(noise=0.0)
    game.averages = averages_of(game, 0.5)
    beside = averages_of(game, 0.2)
    batches = list(Loader(images(20), 5, shuffle=False)) * 2
    looks = watch_training(
        game,
        batches,
        lambda step: {"weights": game.weights_now()},
        steps=7,
        every=3,
        lr_factor=lambda t: 1 / (1 + t),
        averages=beside,
    )
    rates = [[LR / (1 + t), LR / 2 / (1 + t)] for t in range(7)]
    _, _, weights = run_by_hand(game.seen, rates, noise=0.0)
    average = other = (0.0, 0.0)
    at = {}
    for t, now in enumerate(weights, 1):
        new, more = (1.0 if t == 1 else max(9 / (t + 9), 1 - d) for d in (0.5, 0.2))
        average = tuple(a + new * (b - a) for a, b in zip(average, now))
        other = tuple(a + more * (b - a) for a, b in zip(other, now))
        at[t] = average
    assert [r["step"] for r in looks.records] == [3, 6, 7]
    for record in looks.records:
        assert record["weights"] == pytest.approx(at[record["step"]], rel=1e-6)
    assert game.weights_now() == pytest.approx(weights[-1], rel=1e-9)
    beside[0].copy_to_params()
    assert game.weights_now() == pytest.approx(other, rel=1e-6)


def test_a_loop_counts_steps_and_stops_by_request():
    class Stop:
        """Callback that stops at the second step."""

        def on_step(self, run, batch, losses):
            """Stop."""
            if run.step == 2:
                run.stop()

    game = Regression()
    loop = TrainingLoop(game, callbacks=[Stop()])
    loop.run(Loader(images(20), 5))
    assert loop.step == 2 and len(game.seen) == 2


class Alone(ShardAveraging):
    """A rank whose sums over the ranks are its own terms."""

    def __init__(self, rank, world):
        self.rank, self.world = rank, world

    def reduce(self, x, op):
        """Leave the terms as they are."""


@pytest.mark.parametrize("n, world", [(7, 3), (2, 3), (10, 4), (9, 3)])
def test_means_over_ranks_are_means_over_rows(n, world):
    x = torch.randn(n, 2, generator=generator(n), dtype=torch.float64)
    total, rows = 0.0, []
    for rank in range(world):
        one = Alone(rank, world)
        part = one.shard((x, 3 * x[:, 0]))
        assert torch.equal(part[1], 3 * part[0][:, 0])
        total = total + torch.stack(one.mean([part[0].mean(), part[1].square().mean()]))
        rows += part[0].tolist() if one.share else []
    assert torch.allclose(total, torch.stack([x.mean(), (9 * x[:, 0] ** 2).mean()]))
    assert rows == x.tolist()


# Pictures of a run

RECORDS = [
    {"epoch": e, "train": {"loss": 3.0 - e, "G": 1.0 * e}, "valid": {"loss": 5.0 - e, "fid": 7.0}}
    for e in (1, 2)
]


def test_curves_are_those_of_the_records():
    panels = {ax.get_title(): ax for ax in plot_curves(RECORDS).axes}
    lines = {
        name: {line.get_label(): line.get_ydata() for line in ax.lines}
        for name, ax in panels.items()
    }
    lines = {name: {k: list(v) for k, v in of.items()} for name, of in lines.items()}
    assert lines == {
        "loss": {"train": [2.0, 1.0], "valid": [4.0, 3.0]},
        "G": {"train": [1.0, 2.0]},
        "fid": {"valid": [7.0, 7.0]},
    }
    assert all(list(line.get_xdata()) == [1, 2] for ax in panels.values() for line in ax.lines)


def test_a_grid_has_its_columns(tmp_path):
    from PIL import Image

    pictures = torch.rand(6, 1, 4, 5, generator=generator(0))
    save_image_grid(pictures, tmp_path / "grid.png", columns=2)
    assert Image.open(tmp_path / "grid.png").size == (2 * 7 + 2, 3 * 6 + 2)
    grid = image_grid(pictures, columns=2)
    assert torch.equal(grid[0, 2:6, 9:14], pictures[1, 0])


def test_a_reliability_diagram_shows_accuracy_and_shares():
    from optgen.metrics import measure_calibration

    p = torch.tensor([0.55, 0.58, 0.9, 0.95, 0.97, 0.92, 0.6, 0.91])
    labels = torch.tensor([0, 1, 0, 0, 1, 0, 0, 0])
    calibration = measure_calibration(torch.stack([p, 1 - p], 1), labels, bins=5)
    top, below = reliability_diagram(calibration, 0.25).axes
    bars = [bar.get_height() for bar in top.patches]
    assert bars == pytest.approx([0, 0, 0.5, 1.0, 0.8])  # 0.55, 0.58 | 0.6 | five from 0.9
    shares = [bar.get_height() for bar in below.patches]
    assert shares == pytest.approx([0, 0, 2 / 8, 1 / 8, 5 / 8])
    assert "error 25.00%" in top.get_title()
