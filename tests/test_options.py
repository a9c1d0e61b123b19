"""Every option of `optgen train` reaches what it names: none is parsed and then forgotten.

A scheme is built with an option and without, and described as nested lists of its classes, numbers
and shapes. The two descriptions must differ.
"""

import functools
import json
import math
import types
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cli_helpers import run
from optgen.cli.options import optimizer_options, run_options
from optgen.cli.runs import load_commands
from optgen.data.images import digits
from optgen.games import Game
from optgen.muon import Muon
from optgen.optim import Adam

COMMANDS = load_commands()
SHAPE = (1, 8, 8)
# What is read where the data are split, and what `fit` binarizes.
NOT_THE_SCHEMES = {"assisted": {"labels"}} | dict.fromkeys(
    COMMANDS.keys() - {"assisted"}, {"binarize"}
)
NOT_THE_SCHEMES["lstm"] = {"binarize", *COMMANDS["lstm"].text_options}  # see test_text.py
SMALL = {
    "beta-vae": "--hidden 8,6 --z-dim 3",
    "feedback-gan": "--model mlp --hidden 8 --z-dim 3",
    "lstm": "--hidden 4",
    "pixelcnn": "--channels 4 --layers 2",
    "made": "--hidden 8",
    "realnvp": "--model image --channels 4 --scales 1 --couplings 1",
    "maf": "--layers 2 --hidden 8",
    "ddpm": "--channels 4 --multiples 1,1",
    "flow-matching": "--channels 4 --multiples 1,1",
    "assisted": "--hidden 8 --z-dim 3",
}
# By scheme and option: what is written, and where needed what it needs to matter.
GRAY, FLAT = "--binarize none", "--model flat"
OTHERS = {
    "beta-vae": {
        "beta": ("--beta 4",),
        "estimator": ("--estimator iwae",),
        "k": ("--k 5",),
        "sampled": ("--sampled", "--estimator dreg --k 3"),
        "inference": ("--inference aggressive",),
        "model": ("--model conv",),
        "likelihood": ("--likelihood gaussian", GRAY),
        "hidden": ("--hidden 9,6",),
        "z_dim": ("--z-dim 4",),
    },
    "feedback-gan": {
        "rule": ("--rule extragradient",),
        "weight": ("--weight 0.3", "--rule consensus"),
        "loss": ("--loss hinge",),
        "r1": ("--r1 0.5",),
        "r2": ("--r2 0.5",),
        "model": ("--model conv",),
        "width": ("--width 8", "--model conv"),
        "dense": ("--dense 5", "--model conv --width 8"),
        "hidden": ("--hidden 9",),
        "z_dim": ("--z-dim 4",),
        "conditional": ("--conditional",),
    },
    "lstm": {
        "hidden": ("--hidden 5",),
        "layers": ("--layers 2",),
        "levels": ("--levels 4", GRAY),
    },
    "pixelcnn": {
        "channels": ("--channels 5",),
        "layers": ("--layers 3",),
        "levels": ("--levels 4", GRAY),
    },
    "made": {
        "hidden": ("--hidden 9",),
        "dropout": ("--dropout 0.5",),
        "direct": ("--no-direct",),
        "levels": ("--levels 4", GRAY),
    },
    "realnvp": {
        "model": ("--model flat",),
        "scales": ("--scales 2",),
        "couplings": ("--couplings 2",),
        "channels": ("--channels 5",),
        "layers": ("--layers 4", FLAT),
        "hidden": ("--hidden 9,9", FLAT),
        "alpha": ("--alpha 0.01",),
        "conditional": ("--conditional",),
    },
    "maf": {"layers": ("--layers 3",), "hidden": ("--hidden 9",), "alpha": ("--alpha 0.01",)},
    "ddpm": {
        "channels": ("--channels 8",),
        "multiples": ("--multiples 1,2",),
        "blocks": ("--blocks 2",),
        "dropout": ("--dropout 0.5",),
        "target": ("--target x0",),
        "weight": ("--weight min-snr",),
        "noise_schedule": ("--noise-schedule linear",),
        "levels": ("--levels adaptive",),
        "coupling": ("--coupling optimal",),
        "uncertainty": ("--uncertainty",),
        "conditional": ("--conditional",),
        "label_dropout": ("--label-dropout 0.3", "--conditional"),
    },
    "assisted": {
        "method": ("--method reconstruction",),
        "weight": ("--weight 0.3",),
        "alpha": ("--alpha 2.5",),
        "model": ("--model conv",),
        "hidden": ("--hidden 9",),
        "dropout": ("--dropout 0.5",),
        "z_dim": ("--z-dim 4",),
        "binarize": ("--binarize dynamic",),
    },
}
OTHERS["flow-matching"] = OTHERS["ddpm"]
CASES = [(scheme, option) for scheme in OTHERS for option in OTHERS[scheme]]


def describe(x: Any, seen: tuple[int, ...] = ()) -> Any:
    """Return an object as nested lists of class names, numbers, words and shapes."""
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    if isinstance(x, (torch.dtype, torch.device, torch.Size)):
        return str(x)
    if isinstance(x, Tensor):
        return ["tensor", list(x.shape), x.item() if x.numel() == 1 and not x.is_meta else None]
    if id(x) in seen:
        return "seen"
    seen = (*seen, id(x))
    if isinstance(x, dict):
        return [[str(key), describe(value, seen)] for key, value in x.items()]
    if isinstance(x, (list, tuple, set, frozenset)):
        return [describe(value, seen) for value in x]
    if isinstance(x, functools.partial):
        return [describe(part, seen) for part in (x.func, x.args, x.keywords)]
    if isinstance(x, types.MethodType):
        return [x.__func__.__qualname__, describe(x.__self__, seen)]
    if isinstance(x, types.FunctionType):
        cells = [cell.cell_contents for cell in x.__closure__ or ()]
        return [x.__qualname__, describe(cells, seen)]
    if isinstance(x, Optimizer):
        groups = [{k: v for k, v in group.items() if k != "params"} for group in x.param_groups]
        return [type(x).__name__, describe(groups, seen)]
    if isinstance(x, nn.Module) or type(x).__module__.startswith("optgen"):
        hidden = ("_backward_", "_forward_", "_state_dict_", "_load_state_dict_", "_non_persistent")
        parts = {k: v for k, v in vars(x).items() if not k.startswith(hidden)}
        return [type(x).__name__, describe(parts, seen)]
    return type(x).__name__


def parse(scheme: str, *texts: str) -> dict[str, Any]:
    """Return the options of a scheme, those of a small model unless they are given."""
    command = COMMANDS[scheme]
    params = [*command.train_options(), *optimizer_options(command), *run_options(1)]
    words = " ".join((SMALL[scheme], *texts)).split()
    options = click.Command(scheme, params=params).make_context(scheme, words).params
    return options | ({"classes": ["a", "b", "c"]} if options.get("conditional") else {})


def build(scheme: str, *texts: str) -> Game:
    """Return the scheme that some options build, of a small model."""
    options = parse(scheme, *texts) | {"steps": 40, "epoch_steps": 10}
    extra = {}
    if scheme == "assisted":
        options["classes"] = [str(digit) for digit in range(10)]
        extra["labeled"] = digits("train").subset(torch.arange(20, device="cpu"))
    torch.manual_seed(0)
    return COMMANDS[scheme].build(options, SHAPE, **extra)


def built(scheme: str, *texts: str) -> str:
    """Return the description of the scheme that some options build."""
    return json.dumps(describe(build(scheme, *texts)))


def test_every_option_is_tried():
    for scheme, command in COMMANDS.items():
        names = {option.name for option in command.train_options()}
        assert names - NOT_THE_SCHEMES[scheme] == OTHERS[scheme].keys(), scheme


@pytest.mark.parametrize("scheme", sorted(OTHERS))
def test_a_description_is_a_function_of_the_options(scheme):
    assert built(scheme) == built(scheme)


@pytest.mark.parametrize("scheme, option", CASES)
def test_an_option_of_a_scheme_changes_it(scheme, option):
    text, *needs = OTHERS[scheme][option]
    assert built(scheme, *needs) != built(scheme, *needs, text)


@pytest.mark.parametrize("text", ["--lr 0.017", "--optimizer sgd"])
@pytest.mark.parametrize("scheme", sorted(OTHERS))
def test_the_optimizer_is_that_of_the_options(scheme, text):
    assert built(scheme) != built(scheme, text)


def test_the_players_of_a_gan_have_the_momenta_of_the_literature():
    options = parse("feedback-gan")
    scheme = COMMANDS["feedback-gan"].build(options, SHAPE)
    for player in scheme.players.values():
        assert player.optimizer.param_groups[0]["betas"] == (0.5, 0.99)  # Mescheder et al. (2018)


@pytest.mark.parametrize(
    "text, kind, lr",
    [
        ("--optimizer adam", "Adam", 1e-2),
        ("--optimizer adam --lr 0.017", "Adam", 0.017),
        ("--optimizer sgd", "SGD", 1e-2),
        ("--optimizer rmsprop --lr 0.5", "RMSProp", 0.5),
    ],
)
def test_the_second_player_of_a_diffusion_model_has_the_optimizer_of_the_options(text, kind, lr):
    scheme = COMMANDS["ddpm"].build(parse("ddpm", "--uncertainty", text), SHAPE)
    optimizer = scheme.players["uncertainty"].optimizer
    assert type(optimizer).__name__ == kind and optimizer.param_groups[0]["lr"] == lr
    model = scheme.players["model"].optimizer
    assert type(model) is type(optimizer)


@pytest.mark.parametrize("scheme", ["ddpm", "flow-matching"])
def test_the_second_player_of_a_diffusion_model_by_muon_has_adam(scheme):
    built = COMMANDS[scheme].build(parse(scheme, "--uncertainty"), SHAPE)
    optimizer, model = (built.players[name].optimizer for name in ("uncertainty", "model"))
    assert type(optimizer) is Adam and optimizer.param_groups[0]["lr"] == 1e-2
    assert isinstance(model.optimizers[0], Muon) and model.param_groups[0]["lr"] == 0.02


# Options that `fit` receives: what is written, and what it receives then.
GIVEN_TO_FIT = {
    "--epochs 3": {"epochs": 3},
    "--batch-size 7": {"batch_size": 7},
    "--seed 5": {"seed": 5},
    "--ema 0.75": {"ema": 0.75},
    "--ema 0": {"ema": None},
    "--patience 2": {"patience": 2},
    "--checkpoint-steps 11": {"checkpoint_steps": 11},
    "--precision bfloat16": {"precision": "bfloat16"},
    "--progress none": {"progress": "none"},
    "--binarize static": {"binarize": "static"},
    "--binarize none": {"binarize": None},
    "--device cpu": {"device": torch.device("cpu")},
}


@pytest.fixture
def received(monkeypatch) -> dict[str, Any]:
    """What `fit` receives from the command line; it trains nothing."""
    found = {}

    def record(scheme: Any, data: Any, **options: Any) -> list[dict[str, Any]]:
        found.update(options, scheme=scheme, data=data)
        return [{"epoch": 1, "valid": {"loss": 0.0, "bits_per_dim": 0.0}}]

    monkeypatch.setattr("optgen.training.trainer.fit", record)
    return found


@pytest.mark.parametrize("text", GIVEN_TO_FIT)
def test_fit_receives_the_options_of_a_run(text, received, tmp_path):
    assert run("train beta-vae --hidden 8,6 --out", tmp_path / "run", text) == 0
    for name, value in GIVEN_TO_FIT[text].items():
        assert received[name] == value or str(received[name]) == str(value), name
    assert Path(received["out"]) == tmp_path / "run" and not received["resume"]


def test_the_data_of_a_run_are_those_of_the_options(received, tmp_path, few_images):
    args = ("train beta-vae --hidden 8,6 --out", tmp_path / "run", "--data", few_images)
    assert run(*args, "--image-size 8 --holdout 0.25") == 0
    train, valid = received["data"], received["valid"]
    assert train.shape == (1, 8, 8)
    assert len(valid) == math.ceil(0.25 * (len(train) + len(valid)))


def test_compiled_losses_are_those_of_the_scheme(received, tmp_path):
    assert run("train beta-vae --hidden 8,6 --compile --out", tmp_path / "run") == 0
    (player,) = received["scheme"].players.values()
    assert hasattr(player.loss, "_torchdynamo_orig_callable")
