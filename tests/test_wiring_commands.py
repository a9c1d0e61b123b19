"""Every option of a generative scheme's command is found in the scheme that the command builds."""

import math
from types import SimpleNamespace

import click
import pytest
import torch
from torch import nn

from optgen.cli.options import optimizer_options
from optgen.controllers import Capacity, ControlVAE, Cyclical, FreeBits, Geco, LinearWarmup
from optgen.data.images import Batch, Images
from optgen.inner import Refinement
from optgen.models.autoregressive import AutoregressiveVAE
from optgen.models.diffusion import UNet
from optgen.models.flow import AffineCoupling, Logit, MaskedAutoregressive, Split
from optgen.models.pixels import PixelCNN, PixelLSTM
from optgen.models.schedules import (
    CosineSchedule,
    LinearSchedule,
    LogNormalSchedule,
    StraightSchedule,
)
from optgen.models.vae import VAE, ConvVAE, GaussianVAE
from optgen.optim import SGD, Adam, Momentum
from optgen.schemes import density_commands, diffusion_command, elbo, lstm_command
from optgen.schemes.elbo import Aggressive
from optgen.schemes.levels import AdaptiveLevels, UniformLevels
from optgen.testing import generator

COMMANDS = {
    command.name: command
    for module in (elbo, lstm_command, density_commands, diffusion_command)
    for command in module.COMMANDS
}
SHAPE = (1, 8, 8)


def read(name, words=""):
    """Return the options of a command that a text sets, with those of the optimizer."""
    command = COMMANDS[name]
    params = [*command.train_options(), *optimizer_options(command)]
    more = {"batch_size": 10, "steps": 18, "epoch_steps": 6, "holdout": 0.1}
    return more | click.Command(name, params=params).make_context(name, words.split()).params


def build(name, words="", shape=SHAPE):
    """Return the scheme that a command builds."""
    return COMMANDS[name].build(read(name, words), shape)


def modules(scheme, kind):
    """Return the modules of a kind in the model."""
    return [module for module in scheme.model.modules() if isinstance(module, kind)]


def dropouts(scheme):
    """Return the different shares of the model's dropout."""
    return {module.p for module in modules(scheme, nn.Dropout)}


def widths(scheme, kind=nn.Linear):
    """Return the outputs of the linear layers."""
    return [module.out_features for module in modules(scheme, kind)]


UNET = "--channels 4 --multiples 1,2"
DIFFUSION = {  # words, (what is read of the scheme, its value)
    "--channels 6 --multiples 1,3": (lambda s: s.model.net.up[1][0].skip.out_channels, 18),
    "--blocks 2": (lambda s: [len(level) for level in s.model.net.down], [2, 2]),
    "--dropout 0.3": (dropouts, {0.3}),
    "": (dropouts, {0.0}),
    "--target eps": (lambda s: (s.model.target, s.weight), ("eps", None)),
    "--target x0 --weight min-snr": (lambda s: (s.model.target, s.weight), ("x0", "min-snr")),
    "--weight elbo": (lambda s: s.weight, "elbo"),
    "--noise-schedule cosine": (lambda s: type(s.schedule), CosineSchedule),
    "--noise-schedule linear": (lambda s: type(s.schedule), LinearSchedule),
    "--noise-schedule straight": (lambda s: type(s.schedule), StraightSchedule),
    "--noise-schedule log-normal": (lambda s: type(s.schedule), LogNormalSchedule),
    "--levels adaptive": (lambda s: type(s.levels), AdaptiveLevels),
    "--levels uniform": (lambda s: type(s.levels), UniformLevels),
    "--coupling optimal": (lambda s: s.coupling, True),
    "--coupling random": (lambda s: s.coupling, False),
    "--uncertainty": (lambda s: list(s.players), ["model", "uncertainty"]),
    " ": (lambda s: list(s.players), ["model"]),
}
DEFAULTS = {
    "ddpm": ("v", "v", CosineSchedule),
    "flow-matching": ("flow", "flow", StraightSchedule),
}


@pytest.mark.parametrize("words", DIFFUSION)
@pytest.mark.parametrize("name", DEFAULTS)
def test_options_of_a_diffusion_model(name, words):
    scheme = build(name, f"{UNET} {words}")
    look, expected = DIFFUSION[words]
    target, weight, schedule = DEFAULTS[name]
    if isinstance(expected, tuple):
        expected = tuple(weight if value is None else value for value in expected)
    assert look(scheme) == expected
    if "schedule" not in words:
        assert type(scheme.schedule) is schedule
    if "target" not in words:
        assert scheme.model.target == target
    if "weight" not in words:
        assert scheme.weight == weight
    assert isinstance(scheme.model.net, UNet) and scheme.model.shape == SHAPE


def layers(scheme):
    """Return the sizes of the linear layers of a masked perceptron."""
    return [module.out_features for module in scheme.model.net if hasattr(module, "mask")]


def alphas(scheme):
    """Return the margins of the flow's logits."""
    return [module.alpha for module in modules(scheme, Logit)]


DENSITIES = {  # scheme, words, (what is read of the scheme, its value)
    ("lstm", "--hidden 5"): (lambda s: (s.model.lstm.hidden_size, s.model.lstm.num_layers), (5, 1)),
    ("lstm", "--layers 3"): (lambda s: s.model.lstm.num_layers, 3),
    ("lstm", ""): (lambda s: (s.data, s.levels, s.model.levels), ("binary", 2, 2)),
    ("lstm", "--binarize static"): (lambda s: (s.data, s.levels), ("binary", 2)),
    ("lstm", "--binarize none"): (lambda s: (s.data, s.levels), ("levels", 256)),
    ("lstm", "--binarize none --levels 16"): (lambda s: (s.data, s.model.levels), ("levels", 16)),
    ("pixelcnn", "--channels 6"): (lambda s: s.model.layers[0].out.out_channels, 6),
    ("pixelcnn", "--layers 4"): (lambda s: len(s.model.layers), 4),
    ("pixelcnn", "--binarize none --levels 3"): (lambda s: s.model.levels, 3),
    ("made", "--hidden 7,6"): (layers, [7, 6, 64]),
    ("made", "--hidden 7 --dropout 0.4"): (dropouts, {0.4}),
    ("made", "--hidden 7"): (lambda s: (dropouts(s), s.model.direct is None), (set(), False)),
    ("made", "--hidden 7 --no-direct"): (lambda s: s.model.direct, None),
    ("made", "--hidden 7 --binarize none --levels 4"): (layers, [7, 256]),
    ("realnvp", "--model image --scales 1"): (lambda s: len(modules(s, Split)), 0),
    ("realnvp", "--model image --scales 3"): (lambda s: len(modules(s, Split)), 2),
    ("realnvp", "--model image --couplings 3"): (lambda s: len(modules(s, AffineCoupling)), 12),
    ("realnvp", "--model image --channels 5"): (
        lambda s: {c.net.start.out_channels for c in modules(s, AffineCoupling)},
        {5},
    ),
    ("realnvp", "--model image --alpha 0.03"): (alphas, [0.03]),
    ("realnvp", "--model flat --layers 3"): (lambda s: len(modules(s, AffineCoupling)), 3),
    ("realnvp", "--model flat --layers 1 --hidden 9,8"): (widths, [9, 8, 128]),
    ("realnvp", "--model flat --alpha 0.03"): (alphas, [0.03]),
    ("maf", "--layers 3"): (lambda s: len(modules(s, MaskedAutoregressive)), 3),
    ("maf", "--layers 1 --hidden 9,8"): (widths, [9, 8, 128]),
    ("maf", "--alpha 0.03"): (alphas, [0.03]),
}


@pytest.mark.parametrize("name, words", DENSITIES)
def test_options_of_a_likelihood(name, words):
    scheme = build(name, words)
    look, expected = DENSITIES[name, words]
    assert look(scheme) == expected
    if name in ("realnvp", "maf"):
        assert scheme.data == "dequantized"
    assert tuple(scheme.shape) == SHAPE
    if name == "lstm":
        assert isinstance(scheme.model, PixelLSTM)
    if name == "pixelcnn":
        assert isinstance(scheme.model, PixelCNN)


@pytest.mark.parametrize("shape, model", [((8, 8), "image"), ((8, 6), "flat"), ((6, 8), "flat")])
def test_a_flow_is_of_images_where_both_sides_can_be_halved(shape, model, capsys):
    options = read("realnvp", "--scales 2")
    pixels = torch.zeros(20, 1, *shape, dtype=torch.uint8)
    COMMANDS["realnvp"].split(options, Images(pixels))
    assert options["model"] == model
    words = "images" if model == "image" else "flat vectors"
    assert f"couplings of {words}" in capsys.readouterr().out


def attributes(kind, **values):
    """Return a check that a controller is of a kind and has these values."""

    def check(scheme):
        """Assert it of the scheme's controller."""
        assert type(scheme.beta) is kind
        for name, value in values.items():
            assert getattr(scheme.beta, name) == value, name

    return check


BETAS = {  # the run has 18 steps, six an epoch
    "0.5": lambda s: s.beta.reported_weight == 0.5 or pytest.fail("beta"),
    "warmup": attributes(LinearWarmup, steps=30, beta=1.0, start=0.0),
    "warmup:epochs=2,start=0.5,beta=3": attributes(LinearWarmup, steps=12, beta=3, start=0.5),
    "warmup:steps=7": attributes(LinearWarmup, steps=7),
    "cyclical": attributes(Cyclical, steps=18, cycles=4),
    "cyclical:cycles=2,epochs=1": attributes(Cyclical, steps=6, cycles=2),
    "capacity:target=3": attributes(Capacity, steps=18, target=3, weight=10.0),
    "free-bits": attributes(FreeBits, minimum=0.1, groups=None),
    "free-bits:minimum=0.4,groups=2": attributes(FreeBits, minimum=0.4, groups=2),
    "geco:target=40": attributes(Geco, target=40, rate=2e-3, smoothing=0.9, clip=0.02, low=0.01),
    "control:kl=2": attributes(ControlVAE, target=2, ki=1e-3, kp=0.01),
}


@pytest.mark.parametrize("spec", BETAS)
def test_specifications_of_beta(spec):
    BETAS[spec](build("beta-vae", f"--hidden 6,5 --z-dim 4 --beta {spec}"))


def test_the_sigma_vae_knows_its_pixels():
    words = "--hidden 6,5 --beta sigma --likelihood gaussian --binarize none"
    scheme = build("beta-vae", words, (3, 8, 8))
    assert type(scheme.model) is GaussianVAE and scheme.beta.dim == 192


VAES = {
    "--hidden 7,6 --z-dim 3": (widths, [7, 6, 6, 6, 7, 64]),
    "--hidden 7,6": (lambda s: (type(s.model), s.model.z_dim), (VAE, 20)),
    "--model conv --z-dim 3": (lambda s: (type(s.model), s.model.z_dim), (ConvVAE, 3)),
    "--model autoregressive --z-dim 3": (
        lambda s: (type(s.model), s.model.z_dim),
        (AutoregressiveVAE, 3),
    ),
    "--likelihood gaussian --binarize none": (lambda s: type(s.model), GaussianVAE),
    "--estimator dreg --k 4": (lambda s: (s.estimator, s.k, s.sampled), ("dreg", 4, False)),
    "--estimator iwae --k 3 --sampled": (
        lambda s: (s.estimator, s.k, s.sampled),
        ("iwae", 3, True),
    ),
    "": (lambda s: (s.estimator, s.k, s.sampled, s.inner), ("elbo", 1, False, None)),
    "--inference semi": (
        lambda s: (type(s.inner), s.inner.steps, s.inner.beta, s.inner.clip, s.inner.mode),
        (Refinement, 5, 1.0, 5.0, "graph"),
    ),
    "--inference semi:steps=2,beta=0.5,clip=null,mode=adjoint": (
        lambda s: (s.inner.steps, s.inner.beta, s.inner.clip, s.inner.mode),
        (2, 0.5, None, "adjoint"),
    ),
    "--inference aggressive:check=3,most=5,window=7": (
        lambda s: (type(s.rule), s.rule.every, s.rule.most, s.rule.window, list(s.players)),
        (Aggressive, 3, 5, 7, ["encoder", "decoder"]),
    ),
}


@pytest.mark.parametrize("words", VAES)
def test_options_of_a_vae(words):
    look, expected = VAES[words]
    assert look(build("beta-vae", words)) == expected


SMALL = {
    "beta-vae": "--hidden 6,5 --z-dim 2",
    "lstm": "--hidden 4",
    "pixelcnn": "--channels 3 --layers 2",
    "made": "--hidden 5",
    "realnvp": "--model flat --layers 2 --hidden 5",
    "maf": "--layers 2 --hidden 5",
    "ddpm": UNET,
    "flow-matching": f"{UNET} --uncertainty",
}


def test_every_command_is_tried():
    assert SMALL.keys() == COMMANDS.keys()


@pytest.mark.parametrize("name", SMALL)
def test_every_command_builds_the_optimizer_that_is_asked_for(name):
    kinds = (("momentum", Momentum, 0.02), ("sgd", SGD, 0.5), ("adam", Adam, 3e-4))
    for word, kind, lr in kinds:
        scheme = build(name, f"{SMALL[name]} --optimizer {word} --lr {lr}")
        optimizer = scheme.players["model"].optimizer
        assert type(optimizer) is kind and optimizer.param_groups[0]["lr"] == lr
        steps = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert steps == {id(p) for p in scheme.model.parameters()}


@pytest.mark.parametrize("name", SMALL)
def test_every_command_measures_with_the_seed_and_the_numbers_that_are_asked_for(name):
    command, options = COMMANDS[name], read(name, SMALL[name])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        scheme = command.build(options, SHAPE)
    x = torch.randint(256, (6, *SHAPE), generator=generator(1)) / 255
    binary = "binary" in getattr(scheme, "data", "binary") and name not in ("ddpm", "flow-matching")
    batches = [Batch(x.round() if binary else x)]
    of_classes = {"class_samples": 3, "bayes": False, "guidance": 1.0}  # of a run without classes
    names = {p.name for p in command.evaluate_options()}
    asked = dict.fromkeys(names - of_classes.keys(), 3)
    others = {name: of_classes[name] for name in names & of_classes.keys()}
    images, run_options = SimpleNamespace(shape=SHAPE), {"conditional": False}
    context = SimpleNamespace(images=images, options=run_options)
    for seed in (0, 5):
        found = command.evaluate(scheme, context, batches, seed, **asked, **others)
        assert found == {**scheme.evaluate(batches, seed=seed, **asked)} | {
            key: value for key, value in found.items() if key == "k" or key.endswith("_features")
        }
        if asked:
            assert found["k"] == 3
    if asked:
        other = command.evaluate(scheme, context, batches, 6, **asked, **others)
        assert other["loss"] != found["loss"] or other["nll"] != found["nll"]
    bits = "nll_bits_per_dim" if "nll_bits_per_dim" in found else "bits_per_dim"
    assert found[bits] == pytest.approx(found["nll"] / 64 / math.log(2))
