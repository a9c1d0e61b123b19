"""The commands of the schemes: every option trains, resumes, is sampled and measured."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from cli_helpers import (
    assert_one_line,
    edit_config,
    read_options,
    read_state,
    resume,
    run,
    train_args,
)
from optgen.cli.runs import open_run
from optgen.controllers import Controller
from optgen.data.images import Images
from optgen.data.loading import load
from optgen.models.gan import GAN_LOSSES, GANLoss
from optgen.named_controllers import CONTROLLERS
from optgen.registry import Entry
from optgen.rules import RULES
from optgen.schemes.assisted_command import split_labeled
from optgen.schemes.command import OPTIMIZERS, build_optimizer
from optgen.schemes.elbo import INFERENCE
from optgen.schemes.networks import METHODS

GRID_SIZE = (22, 22)  # pixels of a grid of four images of 8 x 8


def weights_are_equal(a: dict, b: dict) -> bool:
    """Return whether two states have the same weights, to the bit."""
    return all(torch.equal(a[k], b[k]) for k in a)


def evaluated(capsys, *args: object) -> dict:
    """Return what `optgen evaluate --json` measures."""
    capsys.readouterr()
    assert run("evaluate", *args, "--json") == 0
    return json.loads(capsys.readouterr().out)


def assert_refused(scheme, images, args, word, out, capsys, code=2):
    """Assert that a training is refused with one line that has a word, and leaves nothing."""
    assert run(*train_args(scheme, images, f"{args} --out"), out) == code
    assert_one_line(capsys.readouterr().err, word)
    assert not out.exists()


# feedback-gan

GAN = "--width 4 --hidden 8 --z-dim 3"
RULE_SPECS = (
    "simultaneous",
    "alternating:D=2",
    "alternating:inner=consensus",
    "extragradient:past=true",
    "optimistic",
    "consensus",
    "literal",
    "nagarajan-kolter",
    "smoothing",
    "symplectic:align=false",
    "lookahead:inner=extragradient,every=2",
    "unrolled:player=D,steps=2",
    "competitive:iterations=2",
)
WEIGHTED = ("consensus", "literal", "nagarajan", "smoothing", "symplectic")


def test_every_rule_is_tried():
    assert {spec.partition(":")[0] for spec in RULE_SPECS} == set(RULES)


@pytest.mark.parametrize("i, rule", list(enumerate(RULE_SPECS)))
def test_a_gan_by_every_rule(i, rule, few_images, tmp_path, capsys, no_pictures):
    out, losses = tmp_path / "run", list(GAN_LOSSES)
    weight = "--weight 0.02" if any(word in rule for word in WEIGHTED) else ""
    options = (
        f"{GAN} --rule {rule} {weight} --model {('mlp', 'conv')[i % 2]} "
        f"--loss {losses[i % len(losses)]} --epochs 2 --out"
    )
    assert run(*train_args("feedback-gan", few_images, options), out) == 0
    found = evaluated(capsys, out)
    assert found["scheme"] == "feedback-gan" and found["epoch"] == 2
    assert {"G", "D", "fid", "fid_floor"} <= found.keys() and found["fid"] >= 0
    assert run("sample", out, "--n 4") == 0
    assert Image.open(out / "samples.png").size == GRID_SIZE


def test_a_gan_resumes_and_averages(few_images, tmp_path, no_pictures):
    options = f"{GAN} --rule lookahead:inner=consensus,every=3 --weight 0.1 --ema 0.9 --r1 0.5"
    for name, epochs in (("whole", 4), ("half", 2)):
        args = train_args("feedback-gan", few_images, f"{options} --epochs {epochs} --out")
        assert run(*args, tmp_path / name) == 0
    assert resume(tmp_path / "half", 4) == 0
    whole, half = (read_state(tmp_path / name) for name in ("whole", "half"))
    weights = whole["scheme"]["G"]["weights"]
    assert weights_are_equal(weights, half["scheme"]["G"]["weights"])
    assert weights_are_equal(whole["ema"][0], half["ema"][0])
    averaged = whole["ema"][0]
    assert any(not torch.equal(w, averaged[f"module.{k}"]) for k, w in weights.items())
    edit_config(tmp_path / "half", rule="competitive", weight=None)
    assert resume(tmp_path / "half", 5) == 2 and run("evaluate", tmp_path / "half") == 2


@pytest.mark.parametrize(
    "args, word",
    [
        ("--compile --rule consensus --r1 0 --r2 0", "differentiates twice"),
        ("--compile", "R1 and R2"),
        ("--compile --r1 1", "R1 and R2"),
        ("--r1 nan", "finite"),
        ("--image-size 4", "at least 8 x 8"),
        ("--rule unrolled:player=E", "'E'"),
        ("""--rule 'unrolled:player="E"'""", "player"),
        ("""--rule 'competitive:lr="a"'""", "neither a number, true nor false"),
        ("--rule consensus:weights=1", "weights"),
        ("--rule alternating --weight 1", "inner=consensus"),
        ("--rule dance", "lookahead"),
        ("--rule lookahead:every=0", "every must be an integer"),
        ("--holdout 0.01", "needs two at least"),
        (f"--seed {2**70}", "--seed"),
        ("--rule consensus --weight nan", "finite"),
    ],
)
def test_mistakes_with_a_gan_are_one_line_and_leave_nothing(
    args, word, few_images, tmp_path, capsys
):
    assert_refused("feedback-gan", few_images, f"{GAN} {args}", word, tmp_path / "run", capsys)


# beta-vae

VAE = "--hidden 16,8 --z-dim 2 --epochs 1"
GRAY = "--likelihood gaussian --binarize none"
VAE_WAYS = {
    "0.5": "--beta 0.5",
    "warmup": "--beta warmup",
    "warmup in epochs": "--beta warmup:epochs=2,start=0.5",
    "cyclical": "--beta cyclical:cycles=2",
    "capacity": "--beta capacity:target=2",
    "free bits": "--beta free-bits",
    "free bits of a group": "--beta free-bits:minimum=0.5,groups=1",
    "geco": "--beta geco:target=40",
    "control": "--beta control:kl=1",
    "nu-pi": "--beta nu-pi:target=1,smoothing=0.5",
    "augmented": "--beta augmented:target=1",
    "sigma": f"--beta sigma {GRAY}",
    "gaussian": GRAY,
    "elbo 2": "--estimator elbo --k 2",
    "stl 1": "--estimator stl --k 1",
    "iwae 3": "--estimator iwae --k 3",
    "dreg 3": "--estimator dreg --k 3",
    "iwae sampled": "--estimator iwae --k 3 --sampled",
    "dreg sampled": "--estimator dreg --k 3 --sampled",
    "amortised": "--inference amortised",
    "aggressive": "--inference aggressive:check=1,most=2,window=1",
    "semi": "--inference semi",
    "semi by the adjoint": "--inference semi:steps=2,mode=adjoint,clip=null",
    "conv": "--model conv --beta geco:target=40",
    "autoregressive": "--model autoregressive --beta control:kl=1 --estimator iwae --k 2 "
    "--inference aggressive:check=1,most=2,window=2",
    "all": f"--beta sigma {GRAY} --inference semi:steps=1 --estimator dreg --k 2 --sampled "
    "--ema 0.9",
}


def test_every_name_is_tried():
    words = " ".join(VAE_WAYS.values()).replace(":", " ").split()
    assert {*CONTROLLERS, *INFERENCE, "conv", "autoregressive", "gaussian"} <= set(words)


@pytest.mark.parametrize("way", VAE_WAYS)
def test_a_vae_every_way(way, few_images, tmp_path, capsys, no_pictures):
    out = tmp_path / "run"
    assert run(*train_args("beta-vae", few_images, f"{VAE} {VAE_WAYS[way]} --out"), out) == 0
    before = read_state(out)["scheme"]["beta"]
    assert before["t"] == 6  # 54 images, ten a step
    assert resume(out, 2) == 0
    beta = read_state(out)["scheme"]["beta"]
    assert beta["t"] == 12 and beta["name"] == before["name"]
    found = evaluated(capsys, out, "--k 5")
    assert found["epoch"] == 2 and found["k"] == 5
    assert found["mutual_information"] <= found["mutual_information_ceiling"]
    gray = "gaussian" in VAE_WAYS[way]
    assert found["pixels"].startswith("gray" if gray else "binarized")
    assert abs(found["beta"] - beta["value"].mean()) < 1e-6
    assert run("evaluate", out, "--k 5") == 0
    assert "mutual information ceiling" in capsys.readouterr().out
    assert run("sample", out, "--n 4") == 0
    assert Image.open(out / "samples.png").size == GRID_SIZE


def test_a_schedule_is_as_long_as_the_run_was_when_it_began(few_images, tmp_path, no_pictures):
    specs = {
        "warmup": "warmup:epochs=2",
        "cyclical": "cyclical:cycles=1",
        "capacity": "capacity:target=1e6",
    }
    betas = {}
    for name, spec in specs.items():
        out = tmp_path / name
        args = f"--hidden 16,8 --z-dim 2 --beta {spec} --epochs 3 --out"
        assert run(*train_args("beta-vae", few_images, args), out) == 0
        assert read_options(out)["steps"] == 18
        assert resume(out, 4) == 0
        assert json.loads((out / "config.json").read_text())["epochs"] == 4
        options = read_options(out)
        assert options["steps"] == 18 and options["epoch_steps"] == 6
        betas[name] = open_run(out, "cpu").scheme.beta
    assert betas["warmup"].steps == 12
    assert betas["cyclical"].steps == betas["capacity"].steps == 18
    assert betas["warmup"].value == betas["cyclical"].value == 1 and betas["capacity"].value == -10


def test_a_run_of_02_still_opens(few_images, tmp_path, no_pictures):
    old, whole = tmp_path / "run", tmp_path / "whole"
    assert run(*train_args("beta-vae", few_images, f"{VAE} --out"), old) == 0
    args = train_args("beta-vae", few_images, "--hidden 16,8 --z-dim 2 --epochs 2 --out")
    assert run(*args, whole) == 0
    config = json.loads((old / "config.json").read_text())
    for key in ("estimator", "k", "sampled", "inference", "likelihood", "steps", "epoch_steps"):
        config["options"].pop(key)
    config["options"]["beta"] = 1.0
    (old / "config.json").write_text(json.dumps(config))
    content = torch.load(old / "checkpoint.pt", weights_only=True)
    content["state"]["scheme"].pop("beta")
    torch.save(content, old / "checkpoint.pt")
    assert run("evaluate", old, "--k 5") == run("sample", old) == 0
    assert resume(old, 2) == 0
    a, b = (read_state(folder)["scheme"]["model"]["weights"] for folder in (whole, old))
    assert weights_are_equal(a, b)


def test_another_controller_in_the_config_is_refused(few_images, tmp_path, capsys, no_pictures):
    out = tmp_path / "run"
    args = train_args("beta-vae", few_images, f"{VAE} --beta geco:target=40 --out")
    assert run(*args, out) == 0
    edit_config(out, beta="control:kl=2")
    for command in (("train --resume", out, "--epochs 2"), ("evaluate", out)):
        capsys.readouterr()
        assert run(*command) == 2
        assert_one_line(capsys.readouterr().err, "Geco", "ControlVAE")


@pytest.mark.parametrize(
    "args, word",
    [
        (
            "--beta dance",
            "warmup, cyclical, capacity, free-bits, geco, control, nu-pi, augmented, sigma",
        ),
        ("--beta geco", "needs target"),
        ("--beta control", "needs target"),
        ("--beta nan", "finite"),
        ("--beta -1", "at least 0"),
        ("--beta inf", "finite"),
        ("--beta geco:target=NaN", "got nan"),
        ("--beta geco:target=ten", "'ten' is neither a number"),
        ("--beta geco:90", "'90' has no value"),
        ("--beta geco:target=40,speed=1", "speed"),
        ("--beta geco:target=40,epochs=3", "epochs"),
        ("--beta warmup:epochs=0", "epochs"),
        ("--beta warmup:epochs=NaN", "got nan"),
        ("--beta cyclical:cycles=99", "99 cycles"),
        ("--beta free-bits:groups=3", "3 groups can't share 2 latents"),
        ("--beta control:kl=-1", "at least 0"),
        ("--beta sigma", "--likelihood gaussian --binarize none"),
        (f"{GRAY} --beta sigma:dim=3", "takes no dim"),
        ("--beta control:kl=1,target=2", "give one"),
        ("--likelihood gaussian", "--binarize none"),
        (f"{GRAY} --model conv", "--model mlp"),
        ("--estimator best", "'iwae'"),
        ("--sampled", "elbo"),
        ("--estimator stl --sampled", "stl"),
        ("--k 0", "from 1 to"),
        ("--inference dance", "amortised, aggressive, semi"),
        ("--inference amortised:steps=1", "takes no argument"),
        ("--inference semi:steps=0.5", "steps must be an integer"),
        ("--inference semi:mode=best", "'best' is neither"),
        ("--inference semi:optimizer=1", "takes no optimizer"),
        ("--inference aggressive:check=0", "check must be an integer"),
        ("--inference semi --compile", "without compile"),
        ("--model autoregressive --binarize none", "--binarize dynamic or static"),
        ("--hidden 512", "512,256"),
    ],
)
def test_mistakes_with_a_vae_are_one_line_and_leave_nothing(
    args, word, few_images, tmp_path, capsys
):
    assert_refused("beta-vae", few_images, f"{VAE} {args}", word, tmp_path / "run", capsys)


# lstm, pixelcnn, made, realnvp, maf

LIKELIHOODS = {  # scheme, arguments, part of what is shown of the pixels
    "lstm": ("lstm", "--hidden 6", "binarized once"),
    "lstm gray": (
        "lstm",
        "--hidden 6 --layers 2 --binarize none --levels 16",
        "gray, 16 levels rounded down from 256",
    ),
    "pixelcnn": ("pixelcnn", "--channels 4 --layers 2 --binarize static", "binarized once"),
    "made": ("made", "--hidden 12,8 --ema 0.9", "binarized once"),
    "made gray": ("made", "--hidden 8 --binarize none", "gray, 256 levels"),
    "realnvp": ("realnvp", "--couplings 1 --channels 4 --patience 2", "upper bound"),
    "realnvp flat": ("realnvp", "--scales 4 --layers 2 --hidden 8", "upper bound"),
    "maf": ("maf", "--layers 2 --hidden 8 --alpha 0.05", "upper bound"),
}
REALNVP_FORMS = {
    "realnvp": "images, since 8 x 8 can be halved 2 times",
    "realnvp flat": "flat vectors, since 8 x 8 cannot be halved 4 times",
}


@pytest.mark.parametrize("way", LIKELIHOODS)
def test_a_likelihood_every_way(way, few_images, tmp_path, capsys, no_pictures):
    (name, options, pixels), out = LIKELIHOODS[way], tmp_path / "run"
    assert run(*train_args(name, few_images, f"{options} --epochs 1 --out"), out) == 0
    assert REALNVP_FORMS.get(way, "") in capsys.readouterr().out
    assert resume(out, 2) == 0
    is_bound = pixels == "upper bound"
    found = evaluated(capsys, out, "--split train", "--k 3" if is_bound else "")
    assert found["scheme"] == name and found["epoch"] == 2 and pixels in found["pixels"]
    assert found["n"] > 50 and 0 < found["nll"] <= found["loss"]
    assert abs(found["bits_per_dim"] - found["nll"] / 64 / math.log(2)) < 1e-6
    assert found.get("k") == (3 if is_bound else None)
    assert (found["nll"] < found["loss"]) == is_bound
    assert run("evaluate", out) == 0 and "bits per dim" in capsys.readouterr().out
    assert run("sample", out, "--n 4") == 0
    assert Image.open(out / "samples.png").size == GRID_SIZE


def test_a_flow_resumes_bit_for_bit_with_the_statistics_of_its_first_batch(
    few_images, tmp_path, no_pictures
):
    for name, epochs in (("whole", 2), ("half", 1)):
        options = f"--couplings 1 --channels 4 --epochs {epochs} --out"
        assert run(*train_args("realnvp", few_images, options), tmp_path / name) == 0
    assert resume(tmp_path / "half", 2) == 0
    a, b = (read_state(tmp_path / name)["scheme"] for name in ("whole", "half"))
    assert a["begun"] and b["begun"]
    assert weights_are_equal(a["model"]["weights"], b["model"]["weights"])
    assert read_options(tmp_path / "half")["model"] == "image"


@pytest.mark.parametrize(
    "scheme, args, word",
    [
        ("lstm", "--levels 16", "--levels 16 is for gray pixels: add --binarize none"),
        ("made", "--levels 300", "--levels"),
        ("made", "--hidden 0", "--hidden"),
        ("pixelcnn", "--channels 0", "--channels"),
        ("realnvp", "--model image --scales 4", "divisible by 16"),
        ("maf", "--alpha 0.5", "--alpha"),
        ("maf", "--batch-size 1", "two images at least"),
        ("realnvp", "--binarize dynamic", "--binarize"),
        ("made", "--k 2", "--k"),
    ],
)
def test_mistakes_with_a_likelihood_are_one_line_and_leave_nothing(
    scheme, args, word, few_images, tmp_path, capsys
):
    assert_refused(scheme, few_images, f"--epochs 1 {args}", word, tmp_path / "run", capsys)


MADE_ONLY = {"binarize", "direct", "dropout", "levels"}


def test_options_and_states_of_other_schemes_are_refused(few_images, tmp_path, capsys, no_pictures):
    out = tmp_path / "run"
    assert run(*train_args("made", few_images, "--hidden 8 --epochs 1 --out"), out) == 0
    for command, name in (
        (("evaluate", out, "--k 2"), "--k"),
        (("evaluate", out, "--outside digits"), "--outside"),
        (("evaluate", out, "--fid-steps 2"), "--fid-steps"),
        (("sample", out, "--steps 2"), "--steps"),
    ):
        capsys.readouterr()
        assert run(*command) == 2
        assert_one_line(capsys.readouterr().err, f"{name} is not an option of made")
    edit_config(out, scheme="maf", layers=1, alpha=0.1)
    assert run("evaluate", out) == 2
    assert_one_line(capsys.readouterr().err, "maf takes no option")
    options = {k: v for k, v in read_options(out).items() if k not in MADE_ONLY}
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "options": options}))
    for command in (("evaluate", out), ("sample", out), ("train --resume", out, "--epochs 2")):
        capsys.readouterr()
        assert run(*command) == 2
        assert_one_line(capsys.readouterr().err, "scheme.model: saved 'MADE', here 'Flow'")


def test_colors_where_pixels_have_one_channel_are_refused(tmp_path, capsys, no_pictures):
    folder, out = tmp_path / "mine", tmp_path / "run"
    folder.mkdir()
    for i in range(20):
        Image.new("RGB", (8, 8), (i, 2 * i, 3 * i)).save(folder / f"{i:02}.png")
    for scheme, options in (("beta-vae", f"{VAE} --model autoregressive"), ("pixelcnn", "")):
        assert run(*train_args(scheme, folder, f"{options} --epochs 1 --out"), out) == 2
        assert_one_line(capsys.readouterr().err, "one channel", "3 channels")
        assert not out.exists()
    for scheme, options in (("lstm", "--hidden 4"), ("realnvp", "--channels 4")):
        args = train_args(scheme, folder, f"{options} --epochs 1 --out")
        assert run(*args, tmp_path / scheme) == 0


# ddpm, flow-matching

SMALL_UNET = "--channels 4 --multiples 1,2 --epochs 1"
DIFFUSIONS = {  # scheme, arguments of train, of sample
    "ddpm": ("ddpm", "", "--steps 2 --sampler ancestral"),
    "ddpm otherwise": (
        "ddpm",
        "--target v --weight min-snr --noise-schedule cosine --levels adaptive --uncertainty "
        "--dropout 0.1",
        "--steps 3",
    ),
    "flow-matching": ("flow-matching", "--coupling optimal --ema 0", "--steps 3"),
}


@pytest.mark.parametrize("way", DIFFUSIONS)
def test_a_diffusion_every_way(way, few_images, tmp_path, capsys, no_pictures):
    (scheme, options, sampling), out = DIFFUSIONS[way], tmp_path / "run"
    assert run(*train_args(scheme, few_images, f"{SMALL_UNET} {options} --out"), out) == 0
    assert resume(out, 2) == 0
    asked = "--split train --limit 100 --k 2 --fid-steps 1 --ode-steps 1"
    found = evaluated(capsys, out, asked)
    assert found["epoch"] == 2 and found["k"] == 2 and "upper bound" in found["pixels"]
    assert abs(found["bound_bits_per_dim"] - found["bound"] / 64 / math.log(2)) < 1e-6
    assert {"loss", "fid", "fid_floor", "nll"} <= found.keys()
    assert run("sample", out, "--n 4", sampling) == 0
    assert Image.open(out / "samples.png").size == GRID_SIZE


@pytest.mark.parametrize(
    "scheme, args, word",
    [
        ("ddpm", "--multiples 1,2,2,2,2", "divisible by 16"),
        ("ddpm", "--target score", "--target"),
        ("flow-matching", "--weight best", "'min-snr'"),
        ("flow-matching", "--multiples 0", "--multiples"),
        ("ddpm", "--dropout 1", "--dropout"),
    ],
)
def test_mistakes_with_a_diffusion_are_one_line_and_leave_nothing(
    scheme, args, word, few_images, tmp_path, capsys
):
    assert_refused(scheme, few_images, f"--epochs 1 {args}", word, tmp_path / "run", capsys)


def test_pairs_of_noise_and_image_forbid_the_ancestral_sampler(
    few_images, tmp_path, capsys, no_pictures
):
    out = tmp_path / "run"
    args = train_args("flow-matching", few_images, f"{SMALL_UNET} --coupling optimal --out")
    assert run(*args, out) == 0
    capsys.readouterr()
    assert run("sample", out, "--sampler ancestral") == 2
    assert_one_line(capsys.readouterr().err, "ddim or heun")


# assisted

ASSISTED = "--hidden 16,8 --z-dim 2 --epochs 1 --labels 12"
METHOD_WAYS = {
    "plain": "--method plain --dropout 0.2",
    "conv": "--method plain --model conv --labels all",
    "reconstruction": "--method reconstruction:loss=squared,to=classifier "
    "--weight control:target=3",
    "conv reconstruction": "--method reconstruction --model conv --weight balanced:project=true",
    "agreement": "--method agreement:divergence=jensen-shannon --weight warmup:epochs=1 "
    "--binarize dynamic",
    "geco": "--weight geco:target=0.5 --alpha 2",
    "m1": "--method m1 --ema 0.9",
    "m1+m2": "--method m1+m2 --weight cyclical:cycles=1",
    "ladder": "--method ladder:noise=0.2 --patience 3",
    "gamma": "--method gamma --weight 0.5",
}
WITH_SAMPLES = ("agreement", "geco", "m1", "m1+m2")
WITH_TYPICALITY = (*WITH_SAMPLES, "reconstruction", "conv reconstruction")


@pytest.fixture(scope="module")
def few_labeled(tmp_path_factory):
    """Gray images of 8 x 8, dark and light ones in a folder each, and as many without a class."""
    folder, generator = tmp_path_factory.mktemp("images") / "mine", torch.Generator().manual_seed(0)
    for i in range(90):
        kind = ("dark", "light", "unlabeled")[i % 3]
        (folder / kind).mkdir(parents=True, exist_ok=True)
        low = 0 if kind == "dark" or (kind == "unlabeled" and i % 2) else 120
        pixels = torch.randint(low, low + 130, (8, 8), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / kind / f"{i:02}.png")
    return folder


def test_every_method_is_tried():
    words = " ".join(METHOD_WAYS.values()).replace(":", " ").split()
    assert set(METHODS) <= set(words)


@pytest.mark.parametrize("way", METHOD_WAYS)
def test_a_classifier_every_way(way, few_labeled, few_images, tmp_path, capsys, no_pictures):
    out = tmp_path / "run"
    args = train_args("assisted", few_labeled, f"{ASSISTED} {METHOD_WAYS[way]} --out")
    assert run(*args, out) == 0 and resume(out, 2) == 0
    options = read_options(out)
    assert options["classes"] == ["dark", "light"]
    chosen = options["labelled"]
    assert chosen == "all" if way == "conv" else len(set(chosen)) == 12
    found = evaluated(capsys, out, "--outside", few_images)
    assert found["epoch"] == 2 and found["n_outside"] == 60 and found["n"] > 2
    assert found["error_low"] <= found["error"] <= found["error_high"]
    assert Image.open(found["diagram"]).size[0] > 200
    assert 0 <= found["auroc_confidence"] <= 1
    assert ("auroc" in found) == (way in WITH_TYPICALITY)
    draws = way in WITH_SAMPLES
    assert run("sample", out, "--n 4") == (0 if draws else 2)
    assert (out / "samples.png").exists() == draws


@pytest.mark.parametrize("way", ["agreement", "m1+m2"])
def test_a_classifier_with_a_generator_of_classes_draws_the_class_asked_for(
    way, few_labeled, tmp_path, capsys, no_pictures
):
    out, file = tmp_path / "run", tmp_path / "drawn.npz"
    args = f"{ASSISTED} {METHOD_WAYS[way]} --out"
    assert run(*train_args("assisted", few_labeled, args), out) == 0
    scheme = open_run(out, "cpu").scheme
    torch.manual_seed(3)
    noise = torch.randn(64, 2)  # of the first block
    net = scheme.generator.p_net
    for more, classes in (("", [0, 1]), ("--class light", [1]), ("--class 0", [0])):
        drawn = f"sample {out} --n 70 --seed 3 --device cpu --overwrite {more} --out {file}"
        assert run(*drawn.split()) == 0, capsys.readouterr().err
        with np.load(file) as found:
            images, labels = torch.from_numpy(found["arr_0"]).flatten(1), found["arr_1"].tolist()
        assert labels == (classes * 70)[:70]
        given = torch.nn.functional.one_hot(torch.tensor(labels[:64]), 2).float()
        with torch.no_grad():
            outputs = net.out((net.x(noise) + net.y(given)).relu())
            if way == "m1+m2":  # the mean, the first half, is that of latents
                outputs = scheme.features.p_net(outputs[:, :2])
        assert (255 * outputs.sigmoid() - images[:64]).abs().max() < 0.501
    assert run("sample", out, "--class cow") == 2
    assert_one_line(capsys.readouterr().err, "no class 'cow'; there are: dark, light")
    if way == "m1+m2":  # the latents of its features are of all classes
        assert run("traverse", out, "--class light") == 2
        assert_one_line(capsys.readouterr().err, "--class", "belong to no class")
        assert run("traverse", out, "--data", few_labeled / "unlabeled", "--split train") == 0


@pytest.mark.parametrize("way", ["m1", "plain"])
def test_a_classifier_without_a_generator_of_classes_names_its_method(
    way, few_labeled, tmp_path, capsys, no_pictures
):
    out = tmp_path / "run"
    args = f"{ASSISTED} {METHOD_WAYS[way]} --out"
    assert run(*train_args("assisted", few_labeled, args), out) == 0
    assert run("sample", out, "--class light") == 2
    summary = METHODS[way].summary
    assert_one_line(capsys.readouterr().err, f"--method {way} ({summary})", "agreement and m1+m2")
    assert not (out / "samples.png").exists()


def pixel_set(images: Images) -> set[bytes]:
    """Return the images as a set of bytes."""
    return {x.numpy().tobytes() for x in images.images}


def split_options(**changes) -> dict:
    """Return the options that a split reads."""
    return {"labels": "12", "seed": 0, "holdout": 0.1} | changes


def test_the_labeled_images_are_balanced_seeded_and_apart_from_the_validation(
    few_labeled, tmp_path, no_pictures
):
    images = load(str(few_labeled), size=8)
    places = {}
    for seed in (0, 1, 2):
        options, again = split_options(seed=seed), split_options(seed=seed)
        train, valid, extra = split_labeled(options, images)
        places[seed] = options["labelled"]
        assert images.labels[places[seed]].bincount().tolist() == [6, 6]
        assert torch.equal(extra["labeled"].images, images.images[places[seed]])
        assert 2 <= len(valid) <= 12 and (valid.labels >= 0).all()
        assert not pixel_set(valid) & pixel_set(train)
        assert pixel_set(extra["labeled"]) < pixel_set(train)
        assert len(train) + len(valid) == len(images)
        split_labeled(again, images)
        assert again == options
    assert places[0] != places[1] != places[2]
    known = images.subset((images.labels >= 0).nonzero().flatten())
    train, valid, extra = split_labeled(split_options(labels="all"), known)
    assert extra == {}  # every batch brings its own classes
    assert (train.labels.bincount() >= 9 * valid.labels.bincount() - 10).all()
    out = tmp_path / "run"
    assert run(*train_args("assisted", few_labeled, f"{ASSISTED} --out"), out) == 0
    assert read_options(out)["labelled"] == places[0]


def test_rare_classes_are_not_lost_to_validation():
    labels = torch.cat([torch.zeros(1000), torch.ones(5), -torch.ones(7)]).long()
    rare = Images(torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8), labels)
    train, valid, extra = split_labeled(split_options(labels="all"), rare)
    assert valid.labels.bincount().tolist() == [100, 1] and len(train) == 911
    assert extra["labeled"].labels.bincount().tolist() == [900, 4]
    train, valid, extra = split_labeled(split_options(labels="10"), rare)
    assert extra["labeled"].labels.bincount().tolist() == [5, 5] and len(valid) == 10
    places = [0, 1, 2, 3, 1000, 1001, 1002, 1003, *range(1005, 1012)]
    few = rare.subset(torch.tensor(places))
    _, valid, extra = split_labeled(split_options(labels="all"), few)
    assert valid.labels.tolist() == [0, 1]
    assert extra["labeled"].labels.bincount().tolist() == [3, 3]


@pytest.mark.parametrize(
    "args, code, word",
    [
        ("--method dance", 2, "'plain', 'reconstruction', 'agreement'"),
        ("--method plain:to=both", 2, "takes no arguments"),
        ("--method ladder --model conv", 2, "leave out --model conv"),
        ("--method m1 --weight balanced", 2, "no assistance"),
        ("--method reconstruction:loss=hinge", 2, "'bernoulli'"),
        ("--method agreement:to=everyone", 2, "'everyone'"),
        ("--weight dance", 2, "geco"),
        ("--weight sigma", 2, "warmup, cyclical, geco, control, balanced"),
        ("--weight -1", 2, "at least 0"),
        ("--weight geco", 2, "needs target"),
        ("--labels some", 2, "a whole number or all"),
        ("--labels 1", 2, "one label"),
        ("--labels 1000", 2, "fewer"),
        ("--labels 20 --holdout 0.01", 2, "for validation"),
        ("--method plain --weight 1", 2, "no assistance"),
        ("--method gamma --dropout 0.1", 2, "noise=…"),
        ("--method ladder:noise=-1", 2, "at least 0"),
        ("--method ladder:noise=high", 2, "at least 0"),
        ("--alpha -1", 2, "--alpha"),
        ("--hidden 0", 2, "--hidden"),
    ],
)
def test_mistakes_with_a_classifier_are_one_line_and_leave_nothing(
    args, code, word, few_labeled, tmp_path, capsys
):
    args = f"{ASSISTED} {args}"
    assert_refused("assisted", few_labeled, args, word, tmp_path / "run", capsys, code)


def test_images_without_classes_and_of_other_shapes_or_classes_are_refused(
    few_images, few_labeled, tmp_path, capsys, no_pictures
):
    out = tmp_path / "run"
    assert run(*train_args("assisted", few_images, f"{ASSISTED} --out"), out) == 2
    assert_one_line(capsys.readouterr().err, "labels")
    args = train_args("assisted", few_labeled, f"{ASSISTED} --method plain --out")
    assert run(*args, out) == 0
    assert run("evaluate", out, "--outside digits") == 2
    assert "the run's are (1, 8, 8)" in capsys.readouterr().err
    edit_config(out, classes=["dark", "bright"])
    assert run("evaluate", out) == 2
    assert "the run learned dark, bright" in capsys.readouterr().err


# extension: what is registered in one place is offered everywhere


class Halving(Controller):
    """A controller of a user's own: β is halved at every update."""

    def __init__(self, beta: float = 1.0):
        super().__init__(beta)

    def multiplier(self, rate, distortion):
        """Return half of β."""
        return self.value / 2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_built_with_its_rate_and_adam_with_its_betas(name):
    weight = torch.nn.Parameter(torch.zeros(3))
    options = {"optimizer": name, "lr": 0.02}
    (group,) = build_optimizer(options, [weight], betas=(0.5, 0.99)).param_groups
    # A vector is not for Muon: Adam steps it, at a twentieth of the rate.
    assert group["lr"] == (0.001 if name == "muon" else 0.02) and group["params"] == [weight]
    if name.startswith("adam") or name == "muon":
        assert tuple(group["betas"]) == (0.5, 0.99)
    assert build_optimizer(options | {"lr": None}, [weight]).param_groups[0]["lr"] <= 0.01


def test_a_registered_controller_and_loss_are_offered(
    few_images, tmp_path, capsys, monkeypatch, no_pictures
):
    monkeypatch.setitem(CONTROLLERS, "halving", Entry(Halving, "beta is halved"))
    squares = GANLoss(
        discriminator=lambda real, fake: ((real - 1) ** 2 + fake**2).mean(),
        generator=lambda real, fake: ((fake - 1) ** 2).mean(),
        sees_real=False,
        summary="least squares",
    )
    monkeypatch.setitem(GAN_LOSSES, "least-squares", squares)
    for scheme, options in (
        ("beta-vae", f"{VAE} --beta halving:beta=8"),
        ("feedback-gan", f"{GAN} --loss least-squares --epochs 1"),
    ):
        out = tmp_path / scheme
        assert run(*train_args(scheme, few_images, f"{options} --out"), out) == 0
        assert resume(out, 2) == 0
    assert read_state(tmp_path / "beta-vae")["scheme"]["beta"]["value"] == 8 / 2**12
    capsys.readouterr()
    assert run("list") == 0
    shown = capsys.readouterr().out
    assert "beta is halved" in shown and "least squares" in shown
