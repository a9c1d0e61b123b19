"""The options of the optimization: schedules, warm-up, clipping, and every optimizer.

Learning rates are compared with PyTorch's schedulers, and clipped gradients with `clip_grad_norm_`.
"""

import itertools
import json
import math
import os
import signal
from types import SimpleNamespace

import pytest
import schedulefree
import torch
from PIL import Image
from torch import nn
from torch.optim import lr_scheduler

from cli_helpers import assert_one_line, read_options, read_state, resume, run, train_args
from optgen.cli.runs import load_commands, open_run
from optgen.data.images import Images
from optgen.games import Game, Player
from optgen.models.gan import ConvGenerator
from optgen.muon import Muon
from optgen.optim import Adam
from optgen.rules import RULES, Extragradient
from optgen.schemes.command import OPTIMIZERS, build_optimizer
from optgen.testing import generator
from optgen.training.schedules import (
    WarmupError,
    check_schedule_free,
    check_warmup,
    find_schedule,
    learning_rate_factor,
)
from optgen.training.trainer import fit

COMMANDS = load_commands()
SMALL = {  # options of small models
    "beta-vae": "--hidden 8,6 --z-dim 3",
    "feedback-gan": "--model mlp --hidden 8,7 --z-dim 3",
    "lstm": "--hidden 4",
    "pixelcnn": "--channels 4 --layers 2",
    "made": "--hidden 8,7",
    "realnvp": "--model flat --layers 2 --hidden 8,7",
    "maf": "--layers 2 --hidden 8,7",
    "ddpm": "--channels 4 --multiples 1,1",
    "flow-matching": "--channels 4 --multiples 1,1 --uncertainty",
    "assisted": "--hidden 8,7 --z-dim 3 --method m1+m2 --labels 6",
}
ADAM_ALONE = {"lstm": {"model"}, "flow-matching": {"uncertainty"}}


def train(scheme, images, out, text=""):
    """Train a small model by a command and return its exit code."""
    words = f"{SMALL[scheme]} {text} --holdout 0.3 --out"
    return run(*train_args(scheme, images, words), out)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of forty gray images of 8 x 8, in two classes."""
    root, random = tmp_path_factory.mktemp("images") / "mine", generator(0)
    for i in range(40):
        folder = root / ("even", "odd")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (8, 8), dtype=torch.uint8, generator=random)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:02}.png")
    return root


@pytest.fixture(autouse=True)
def no_samples(monkeypatch, no_pictures):
    """Leave out samples and pictures, to save time."""
    for command in COMMANDS.values():
        monkeypatch.setattr(type(command), "grid_samples", 0)


def weights(folder):
    """Return the weights of the players in the checkpoint of a run, one after another."""
    parts = [part for part in read_state(folder)["scheme"].values() if isinstance(part, dict)]
    players = [part["weights"] for part in parts if isinstance(part.get("weights"), dict)]
    return [w for player in players for w in player.values()]


def test_every_scheme_has_a_small_model():
    assert SMALL.keys() == COMMANDS.keys()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scheme", SMALL)
def test_every_scheme_trains_by_every_optimizer(scheme, optimizer, images, tmp_path, capsys):
    out, text = tmp_path / "run", f"--optimizer {optimizer} --epochs 1"
    assert train(scheme, images, out, text) == 0
    assert read_state(out)["step"] >= 2
    assert all(w.isfinite().all() for w in weights(out) if w.is_floating_point())
    opened = open_run(out, "cpu").scheme
    adam_alone = set()
    for name, player in opened.players.items():
        parts = getattr(player.optimizer, "optimizers", [player.optimizer])
        if optimizer == "muon" and not isinstance(parts[0], Muon):
            adam_alone.add(name)
    said = capsys.readouterr().out
    assert said.count("has no hidden matrix") == len(adam_alone)
    assert not adam_alone or adam_alone <= ADAM_ALONE.get(scheme, set(opened.players))


def interrupt_after(step, monkeypatch):
    """Send this process SIGINT within a step of the next run."""
    real, seen = Game.step, iter(range(1, 100))

    def counted_step(game, batch):
        """Take a step, and interrupt the run in one of them."""
        if next(seen) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return real(game, batch)

    monkeypatch.setattr(Game, "step", counted_step)


@pytest.mark.parametrize(
    "scheme, optimizer", list(zip(SMALL, itertools.cycle(["muon", "schedule-free", "adam"])))
)
def test_a_schedule_resumes_to_the_bit(scheme, optimizer, images, tmp_path, monkeypatch):
    schedule = "" if optimizer == "schedule-free" else "--schedule cosine"
    text = f"--optimizer {optimizer} --warmup 2 --clip 0.5 {schedule} --epochs 2"
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train(scheme, images, whole, text) == 0
    with monkeypatch.context() as patch:
        interrupt_after(3, patch)
        assert train(scheme, images, stopped, text) == 130
    assert read_state(stopped)["step"] == 3
    assert run("train --resume", stopped, "--progress none") == 0
    assert all(map(torch.equal, weights(whole), weights(stopped)))


# clipping


def spiral(rule, make, clip=None):
    """Return a game of two players in float64 whose gradients are large, and its parameters."""
    nets = [nn.Linear(3, 2).double() for _ in range(2)]
    with torch.no_grad():
        for i, net in enumerate(nets):
            net.weight.copy_(torch.arange(6.0).view(2, 3) - 2 + i)
            net.bias.fill_(0.5)

    def first_loss(x):
        """Return the loss of the first player."""
        return (nets[0](x) * nets[1](x)).sum() + nets[0](x).square().mean()

    def second_loss(x):
        """Return the loss of the second player."""
        return -(nets[0](x) * nets[1](x)).sum() + nets[1](x).pow(4).mean()

    losses = first_loss, second_loss
    players = [
        Player(net, loss, make(net.parameters()), clip=clip) for net, loss in zip(nets, losses)
    ]
    return Game(rule=rule, G=players[0], D=players[1]), nets


class ClippedSGD(torch.optim.SGD):
    """Gradient descent that clips by PyTorch's function within its own step."""

    def step(self, closure=None):
        """Clip the gradients of all parameters together, and step."""
        nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 0.7)
        return super().step(closure)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", RULES)
def test_a_clip_is_that_of_torch_by_every_rule(name, seed):
    def make_rule():
        """Return the rule, for players G and D."""
        return RULES[name].build(name, {})

    game, nets = spiral(make_rule(), lambda params: torch.optim.SGD(params, 0.1), clip=0.7)
    expected, others = spiral(make_rule(), lambda params: ClippedSGD(params, 0.1))
    free, _ = spiral(make_rule(), lambda params: torch.optim.SGD(params, 0.1))
    for i in range(4):
        x = torch.randn(5, 3, dtype=torch.float64, generator=generator(10 * seed + i))
        for walk in (game, expected, free):
            walk.step(x)
    for net, other in zip(nets, others):
        for p, q in zip(net.parameters(), other.parameters()):
            assert torch.equal(p, q)
    assert any(not torch.equal(p, q) for p, q in zip(game.params("G"), free.params("G")))


def test_the_norm_is_that_of_the_direction_before_the_clip():
    game, nets = spiral(None, lambda params: torch.optim.SGD(params, 0.0), clip=0.7)
    x = torch.randn(5, 3, dtype=torch.float64, generator=generator(1))
    game.step(x)
    for player in game.players.values():
        grads = torch.autograd.grad(player.loss(x), list(player.params.values()))
        norm = torch.cat([g.flatten() for g in grads]).norm()
        assert torch.allclose(player.gradient_norm(), norm, rtol=1e-12) and norm > 0.7
        clipped = torch.cat([p.grad.flatten() for p in player.params.values()]).norm()
        assert clipped.item() == pytest.approx(0.7, rel=1e-5)
        player.clip = None
    game.step(x)
    for player in game.players.values():
        grads = torch.cat([p.grad.flatten() for p in player.params.values()])
        assert torch.allclose(player.gradient_norm(), grads.norm(), rtol=1e-12)


def test_what_a_rule_remembers_is_not_clipped():
    """Past extragradient looks ahead along the last direction itself, which is clipped then."""
    game, _ = spiral(Extragradient(past=True), lambda p: torch.optim.SGD(p, 0.1), clip=0.01)
    game.step(torch.ones(2, 3, dtype=torch.float64))
    remembered = torch.cat([t.flatten() for t in game.rule.memory["u"]["G"]])
    assert remembered.norm() > 1


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf, "1"])
def test_a_clip_is_a_positive_number(bad, tmp_path):
    game, _ = spiral(None, lambda params: torch.optim.SGD(params, 0.1))
    with pytest.raises(ValueError, match="clip must be"):
        spiral(None, lambda params: torch.optim.SGD(params, 0.1), clip=bad)
    with pytest.raises(ValueError, match="clip must be"):
        fit(game, Images(torch.zeros(9, 1, 1, 3, dtype=torch.uint8)), clip=bad, out=tmp_path / "r")
    assert not (tmp_path / "r").exists()


# the factor of a step, by torch's own schedulers


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_factors_are_those_of_torch(name, warmup):
    steps = 11
    rest = steps - warmup
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    after = {
        "constant": lambda: lr_scheduler.ConstantLR(optimizer, 1.0),
        "linear": lambda: lr_scheduler.PolynomialLR(optimizer, rest, power=1.0),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, rest),
    }[name]()
    expected = []
    for _ in range(rest):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        after.step()
    expected = [(i + 1) / warmup for i in range(warmup)] + expected
    schedule = find_schedule(name)
    found = [learning_rate_factor(step, steps, schedule, warmup) for step in range(steps)]
    assert found == pytest.approx(expected, abs=1e-12)


def test_the_share_of_a_run_is_that_after_the_warmup():
    seen = []
    for step in range(10):
        learning_rate_factor(step, 10, lambda share: seen.append(share) or 1.0, 2)
    assert seen == pytest.approx([i / 8 for i in range(8)])


def test_a_warmup_ends_before_the_run():
    check_warmup(0, 0)
    check_warmup(4, 5)
    for steps in (5, 4):
        with pytest.raises(WarmupError, match=f"5 steps is as long as the run of {steps}"):
            check_warmup(5, steps)


@pytest.mark.parametrize("schedule, warmup", [("linear", 0), (None, 3), ("cosine", 3)])
def test_schedule_free_optimizers_have_no_schedule_of_the_run(schedule, warmup):
    net = nn.Linear(1, 1)
    free = schedulefree.AdamWScheduleFree(net.parameters())
    plain = torch.optim.SGD(net.parameters(), lr=0.1)
    scheme, other = (
        SimpleNamespace(players={"model": SimpleNamespace(optimizer=o)}) for o in (free, plain)
    )
    asked = f"schedule={schedule!r}" if schedule else "warmup=3"
    with pytest.raises(WarmupError, match=f"'model' is schedule-free and takes no {asked}:"):
        check_schedule_free(scheme, find_schedule(schedule), warmup)
    check_schedule_free(other, find_schedule(schedule), warmup)
    check_schedule_free(scheme, None, 0)
    check_schedule_free(scheme, lambda share: share, 0)  # a function of one's own


# the command line

BAD = {  # options, words of the message
    "--schedule straight": ("noise schedule", "--noise-schedule straight"),
    "--schedule step": ("'step'", "constant"),
    "--warmup -1": ("--warmup",),
    "--warmup 1.5": ("--warmup",),
    "--warmup 999": ("warm-up of 999 steps is as long as the run of 3", "more epochs"),
    "--clip 0": ("--clip",),
    "--clip nan": ("--clip", "finite"),
    "--optimizer adagrad": ("adagrad", "schedule-free"),
    "--optimizer schedule-free --schedule cosine": ("--schedule cosine", "leave it out"),
    "--optimizer schedule-free --ema 0.9": ("--ema 0.9", "average of its own"),
}


@pytest.mark.parametrize("text", BAD)
@pytest.mark.parametrize("scheme", ["ddpm", "made"])
def test_a_mistake_is_one_line(scheme, text, images, tmp_path, capsys):
    assert train(scheme, images, tmp_path / "run", f"{text} --epochs 1") == 2
    assert_one_line(capsys.readouterr().err, *BAD[text])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rule", ["extragradient", "optimistic", "lookahead"])
def test_rules_that_put_weights_back_refuse_schedule_free(rule, images, tmp_path, capsys):
    text = f"--optimizer schedule-free --rule {rule}"
    assert train("feedback-gan", images, tmp_path / "run", text) == 2
    assert_one_line(capsys.readouterr().err, "schedule-free", "another rule")
    assert not (tmp_path / "run").exists()


def test_a_schedule_free_run_is_that_of_its_authors(images, tmp_path):
    out = tmp_path / "run"
    assert train("ddpm", images, out, "--optimizer schedule-free --warmup 2 --epochs 1") == 0
    assert read_options(out)["ema"] == 0  # the default of the scheme is left out
    optimizer = open_run(out, "cpu").scheme.players["model"].optimizer
    assert type(optimizer) is schedulefree.AdamWScheduleFree
    (group,) = optimizer.param_groups
    assert (group["warmup_steps"], group["lr"], group["k"]) == (2, 2.5e-3, read_state(out)["step"])


def test_a_schedule_free_run_is_opened_at_its_average(images, tmp_path):
    """The weights are x, and the checkpoint holds y = x + (1 - beta)(z - x), its authors' form."""
    out = tmp_path / "run"
    assert train("made", images, out, "--optimizer schedule-free --lr 0.05 --epochs 2") == 0
    saved = read_state(out)["scheme"]["model"]
    model = open_run(out, "cpu").scheme.players["model"].module
    states = saved["optimizer"]["state"]
    moved = 0
    for i, (name, p) in enumerate(model.named_parameters()):
        y, z = saved["weights"][name], states[i]["z"]
        assert torch.allclose(p, (y - 0.1 * z) / 0.9, atol=1e-6)
        moved += not torch.equal(p, y)
    assert moved


def test_muon_steps_the_hidden_matrices_and_adam_the_rest():
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    options = {"optimizer": "muon", "lr": 0.4}
    muon, adam = build_optimizer(options, net, betas=(0.5, 0.9)).optimizers
    assert [p for g in muon.param_groups for p in g["params"]] == [net[1].weight]
    assert muon.param_groups[0]["lr"] == 0.4
    assert isinstance(adam, Adam) and adam.param_groups[0]["lr"] == pytest.approx(0.02)
    assert adam.param_groups[0]["betas"] == (0.5, 0.9)
    assert len(adam.param_groups[0]["params"]) == 5
    for params in (nn.Linear(2, 1), [net[1].weight]):
        assert isinstance(build_optimizer(options, params), Adam)


def test_a_unet_leaves_its_second_inputs_to_adam(images, tmp_path):
    assert train("ddpm", images, tmp_path / "run", "--optimizer muon --epochs 1") == 0
    player = open_run(tmp_path / "run", "cpu").scheme.players["model"]
    muon, _ = player.optimizer.optimizers
    names = {id(p): name for name, p in player.module.named_parameters()}
    stepped = [names[id(p)] for g in muon.param_groups for p in g["params"]]
    assert stepped and not [n for n in stepped if n.startswith(("net.embed", "net.start"))]


@pytest.mark.parametrize("noise", ["cosine", "straight"])
def test_a_diffusion_run_of_an_older_version_keeps_its_noise(noise, images, tmp_path):
    out = tmp_path / "run"
    assert train("ddpm", images, out, f"--noise-schedule {noise} --epochs 1") == 0
    expected = type(open_run(out, "cpu").scheme.schedule)
    config = json.loads((out / "config.json").read_text())
    options = config["options"]
    options["schedule"] = options.pop("noise_schedule")  # as optgen 0.5 wrote them
    for name in ("warmup", "clip"):
        del options[name]
    (out / "config.json").write_text(json.dumps(config))
    assert type(open_run(out, "cpu").scheme.schedule) is expected
    assert resume(out, 2) == 0
    again = read_options(out)
    assert again["noise_schedule"] == noise and again["schedule"] == "constant"
    assert type(open_run(out, "cpu").scheme.schedule) is expected


def test_a_gan_of_an_older_version_has_no_further_layers(images, tmp_path):
    out = tmp_path / "run"
    text = "--model conv --width 4 --z-dim 3 --dense 0 --epochs 1"
    assert train("feedback-gan", images, out, text) == 0
    config = json.loads((out / "config.json").read_text())
    del config["options"]["dense"]  # as optgen 0.7 wrote them
    (out / "config.json").write_text(json.dumps(config))
    G = open_run(out, "cpu").scheme.generator
    assert [p.shape for p in G.parameters()] == [
        p.shape for p in ConvGenerator(G.shape, 3, width=4).parameters()
    ]
    assert resume(out, 2) == 0
    assert read_options(out)["dense"] == 0


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_a_run_keeps_its_rate_when_that_of_its_scheme_changes(optimizer, images, tmp_path):
    out = tmp_path / "run"
    assert train("made", images, out, f"--optimizer {optimizer} --epochs 1") == 0
    assert read_options(out)["lr"] == 3e-3
    config = json.loads((out / "config.json").read_text())
    config["options"]["lr"] = None  # as optgen 0.7 wrote it, for the optimizer's own rate
    (player,) = load_commands()["made"].build(config["options"], (1, 8, 8)).players.values()
    assert player.optimizer.param_groups[0]["lr"] == 1e-3
    (out / "config.json").write_text(json.dumps(config))
    assert resume(out, 2) == 0
    assert read_options(out)["lr"] is None


def test_a_rate_of_the_scheme_is_for_adam_and_images(images, tmp_path):
    assert train("made", images, tmp_path / "a", "--optimizer momentum --epochs 1") == 0
    assert read_options(tmp_path / "a")["lr"] is None
    assert train("made", images, tmp_path / "b", "--lr 0.07 --epochs 1") == 0
    assert read_options(tmp_path / "b")["lr"] == 0.07
    words = "the quick brown fox jumps over the lazy dog. " * 40
    (tmp_path / "text.txt").write_text(words)
    small = "--optimizer adamw --hidden 4 --length 8 --batch-size 4 --epochs 1 --progress none"
    assert run("train lstm --data", tmp_path / "text.txt", small, "--out", tmp_path / "c") == 0
    assert read_options(tmp_path / "c")["lr"] is None


def test_a_clip_of_another_size_is_another_run(images, tmp_path, capsys):
    out = tmp_path / "run"
    assert train("made", images, out, "--clip 0.5 --epochs 1") == 0
    config = json.loads((out / "config.json").read_text())
    config["options"]["clip"] = 0.25
    (out / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert resume(out, 2) == 2
    assert_one_line(capsys.readouterr().err, "clip of model: saved 0.5, here 0.25")
