"""The command line: every option reaches what it names, and every number is of what it says.

Training is replaced by a stand-in that keeps the arguments of `fit`, so that only the wiring runs.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cli_helpers import run
from optgen.bench.timing import Part
from optgen.cli.runs import open_run
from optgen.controllers import ControlVAE, Cyclical, LinearWarmup
from optgen.data.images import Images
from optgen.models.gan import GAN_LOSSES, ConvDiscriminator, ConvGenerator, MLPGenerator
from optgen.optim import Adam, Momentum
from optgen.rules import Consensus
from optgen.schemes.assisted import Balanced
from optgen.schemes.assisted_command import split_labeled
from optgen.schemes.command import build_optimizer
from optgen.schemes.couplings import Agreement, Reconstruction
from optgen.schemes.elbo import BetaVAE
from optgen.schemes.feedback import FeedbackGANCommand
from optgen.testing import generator
from optgen.training import checkpoint

CLASSES = ("a", "b", "c")
PER_CLASS = {"train": 20, "test": 75}
RECORDS = [
    {"epoch": e, "step": e, "train": {"loss": 1.0}, "valid": {"loss": v, "nll": v, "fid": v}}
    for e, v in ((1, 3.0), (2, 1.0), (3, 2.0))
]


def write_images(root, n, seed):
    """Write gray images of 8 x 8 into a folder."""
    root.mkdir(parents=True)
    pixels = torch.randint(256, (n, 8, 8), dtype=torch.uint8, generator=generator(seed))
    for i, image in enumerate(pixels):
        Image.fromarray(image.numpy()).save(root / f"{i:03}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of images of three classes, with two splits."""
    root = tmp_path_factory.mktemp("wiring") / "mine"
    for split, n in PER_CLASS.items():
        for k, name in enumerate(CLASSES):
            write_images(root / split / name, n, 10 * k + (split == "test"))
    return root


@pytest.fixture
def fitted(monkeypatch):
    """The schemes and arguments that `fit` receives, which trains nothing."""
    calls = []

    def fit(scheme, data, **settings):
        """Keep the call."""
        calls.append((scheme, data, settings))
        return RECORDS

    monkeypatch.setattr("optgen.training.trainer.fit", fit)
    return calls


@pytest.fixture
def train(fitted, folder, tmp_path):
    """A function that runs `optgen train` and returns the scheme, the images and the settings."""

    def start(scheme, *args):
        """Run the command on the folder."""
        out = tmp_path / f"run{len(fitted)}"
        common = "--image-size 8 --progress none --device cpu --out"
        assert run("train", scheme, "--data", folder, *args, common, out) == 0
        return fitted[-1]

    return start


def pixels_of(data):
    """Return the images of a set as a set of bytes."""
    return {image.numpy().tobytes() for image in data.images}


def test_options_of_a_run_reach_fit(train, capsys):
    given = (
        "--batch-size 7 --ema 0.5 --epochs 3 --patience 2 --checkpoint-steps 4 --seed 5 "
        "--precision bfloat16 --holdout 0.3 --binarize dynamic --hidden 6,5 --z-dim 2"
    )
    _, data, settings = train("beta-vae", given)
    expected = {
        "batch_size": 7,
        "ema": 0.5,
        "epochs": 3,
        "patience": 2,
        "checkpoint_steps": 4,
        "seed": 5,
        "precision": "bfloat16",
        "binarize": "dynamic",
        "resume": False,
        "progress": "none",
    }
    assert {name: settings[name] for name in expected} == expected
    assert len(data) == 42 and len(settings["valid"]) == 18
    assert settings["config"]["shape"] == [1, 8, 8]
    assert settings["config"]["options"]["holdout"] == 0.3
    assert pixels_of(data).isdisjoint(pixels_of(settings["valid"]))
    assert "done: best epoch 2, loss 1" in capsys.readouterr().out
    *_, settings = train("beta-vae", "--hidden 6,5 --z-dim 2 --binarize none")
    assert settings["ema"] is settings["patience"] is settings["binarize"] is None
    assert "done: last epoch 3, loss 2" in capsys.readouterr().out
    assert len(settings["valid"]) == 6


def test_held_out_images_are_not_trained_on(train, capsys):
    for scheme, more, said in (
        ("beta-vae", "--hidden 6,5 --epochs 4", "54 images to train on, 6 to validate, 4 epochs"),
        ("assisted", "--labels 12 --hidden 6,5", "54 images to train on (12 labeled), 6 to"),
    ):
        _, data, settings = train(scheme, more)
        assert f"{scheme} on mine: {said}" in capsys.readouterr().out
        assert len(data) == 54 and len(settings["valid"]) == 6
        assert len(pixels_of(data) | pixels_of(settings["valid"])) == 60


@pytest.mark.parametrize("seed", [0, 6])
def test_the_seed_sets_the_first_weights(train, seed):
    scheme, *_ = train("feedback-gan", f"--seed {seed} --width 4 --z-dim 3 --dense 7")
    torch.manual_seed(seed)
    expected = [*ConvGenerator((1, 8, 8), 3, width=4, hidden=[7]).parameters()]
    expected += ConvDiscriminator((1, 8, 8), width=4, hidden=[7]).parameters()
    for p, q in zip([*scheme.params("G"), *scheme.params("D")], expected, strict=True):
        assert torch.equal(p, q)


OPTIMIZERS = {
    "": (Adam, {"lr": 1e-3, "weight_decay": 0}),
    "--optimizer adamw": (Adam, {"weight_decay": 1e-2, "decoupled_weight_decay": True}),
    "--optimizer momentum --lr 0.03": (Momentum, {"lr": 0.03, "momentum": 0.9}),
    "--optimizer sgd": (torch.optim.Optimizer, {"lr": 1e-2}),
    "--lr 0.007": (Adam, {"lr": 0.007}),
}


@pytest.mark.parametrize("given", OPTIMIZERS)
@pytest.mark.parametrize(
    "name, betas",
    [
        ("feedback-gan --width 4", (0.5, 0.99)),
        ("assisted --labels 12 --hidden 6,5 --method m1+m2", (0.9, 0.999)),
        ("made --hidden 6", (0.9, 0.999)),
    ],
)
def test_optimizers_of_every_player(train, name, betas, given):
    scheme, *_ = train(name, given)
    kind, expected = OPTIMIZERS[given]
    assert len(scheme.players) == {"feedback-gan": 2, "assisted": 3, "made": 1}[name.split()[0]]
    for player in scheme.players.values():
        assert isinstance(player.optimizer, kind)
        (group,) = player.optimizer.param_groups
        own = {"feedback-gan": 4e-3, "assisted": 2e-3, "made": 3e-3}.get(name.split()[0])
        if own and given in ("", "--optimizer adamw"):
            expected = {**expected, "lr": own}
        assert {k: group[k] for k in expected} == expected
        if kind is Adam:
            assert tuple(group["betas"]) == betas


def test_a_decoupled_decay_leaves_the_gradient_alone():
    # AdamW: the weight shrinks by lr * decay whatever the gradient, then Adam's first step is lr.
    p = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = build_optimizer({"optimizer": "adamw", "lr": 0.1}, [p])
    p.grad = torch.tensor([1e-3])
    optimizer.step()
    assert p.item() == pytest.approx(2.0 * (1 - 0.1 * 0.01) - 0.1, rel=1e-4)


def test_options_of_a_gan(train):
    given = "--loss hinge --r1 0.3 --r2 0.8 --width 6 --z-dim 5 --rule consensus --weight 0.07"
    scheme, _, settings = train("feedback-gan", given)
    assert scheme.loss is GAN_LOSSES["hinge"] and (scheme.r1, scheme.r2) == (0.3, 0.8)
    assert isinstance(scheme.rule, Consensus) and scheme.rule.weight == 0.07
    assert settings["ema"] == 0.999 and scheme.generator.z_dim == 5
    for dense in ([256], [11], []):
        asked = {256: "", 11: "--dense 11", 0: "--dense 0"}[sum(dense)]
        scheme, *_ = train("feedback-gan", f"{given} {asked}")
        like = ConvGenerator((1, 8, 8), 5, 6, 0, dense), ConvDiscriminator((1, 8, 8), 6, 0, dense)
        for net, other in zip((scheme.generator, scheme.discriminator), like):
            assert [p.shape for p in net.parameters()] == [p.shape for p in other.parameters()]
    scheme, *_ = train("feedback-gan", "--model mlp --hidden 9,7 --z-dim 4")
    G, D = scheme.generator, scheme.discriminator
    assert isinstance(G, MLPGenerator) and G.out == "sigmoid"
    widths = [[m.out_features for m in n.modules() if isinstance(m, nn.Linear)] for n in (G, D)]
    assert widths == [[9, 7, 64], [9, 7, 1]]
    assert scheme.loss is GAN_LOSSES["relativistic"] and (scheme.r1, scheme.r2) == (0.01, 0.01)


def dropout_rates(module):
    """Return the rates of all dropout layers."""
    return {m.p for m in module.modules() if isinstance(m, nn.Dropout)}


def test_options_of_assisted(train):
    given = "--labels 12 --hidden 9,7 --z-dim 5 --alpha 0.3 --dropout 0.4 --binarize dynamic"
    scheme, data, settings = train("assisted", given)
    assert scheme.alpha == 0.3 and scheme.binarize and settings["binarize"] == "dynamic"
    assert len(scheme.labeled) == 12 and scheme.labeled.labels.bincount().tolist() == [4, 4, 4]
    assert dropout_rates(scheme.classifier) == {0.4}
    assert scheme.generator.z_dim == 5 and isinstance(scheme.coupling, Agreement)
    assert scheme.weight.value == 1 and pixels_of(scheme.labeled) <= pixels_of(data)
    scheme, *_ = train("assisted", "--labels 12 --hidden 9,7 --model conv --dropout 0.6")
    assert dropout_rates(scheme.classifier) == {0.6} and not scheme.binarize
    scheme, *_ = train("assisted", "--labels 12 --hidden 9,7 --method ladder:noise=0.8")
    assert scheme.classifier.noise == 0.8 and scheme.classifier.sizes == (64, 9, 7, 3)
    method = "reconstruction:loss=squared,to=classifier"
    scheme, *_ = train("assisted", "--labels 12 --hidden 9,7 --method", method)
    assert isinstance(scheme.coupling, Reconstruction) and scheme.weight.value == 0.03
    assert (scheme.coupling.kind, scheme.coupling.to) == ("squared", "classifier")
    scheme, *_ = train("assisted", "--labels all --hidden 9,7 --method plain")
    assert scheme.labeled is None


def test_weights_of_assisted(train):
    base = "--labels 12 --hidden 9,7 --batch-size 10 --epochs 5 --weight"
    scheme, *_ = train("assisted", base, "0.25")
    assert scheme.weight.value == 0.25
    scheme, *_ = train("assisted", base, "warmup:epochs=2")  # 54 images, six steps an epoch
    assert isinstance(scheme.weight, LinearWarmup) and scheme.weight.steps == 12
    scheme, *_ = train("assisted", base, "cyclical:cycles=1")
    assert isinstance(scheme.weight, Cyclical) and scheme.weight.steps == 30
    scheme, *_ = train("assisted", base, "control:target=2")
    assert isinstance(scheme.weight, ControlVAE)
    scheme, *_ = train("assisted", base, "balanced:norms=false,project=true")
    assert isinstance(scheme.rule, Balanced)
    assert (scheme.rule.norms, scheme.rule.project) == (False, True)


# The labels of a data set


def labeled_set(known=40, unknown=15):
    """Return images of which no two are alike, of four classes and of none, in mixed order."""
    n = known + unknown
    pixels = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 1, 2, 2).clone()
    labels = torch.cat([torch.arange(known) % 4, torch.full((unknown,), -1)])
    order = torch.randperm(n, generator=generator(0))
    return Images(pixels, labels[order], classes=tuple("wxyz"))


def numbers(data):
    """Return which images a set has."""
    return set(data.images[:, 0, 0, 0].tolist())


@pytest.mark.parametrize("seed", range(3))
def test_few_labels_split(seed):
    data = labeled_set()
    options = {"labels": "8", "seed": seed, "holdout": 0.1}
    split = split_labeled(options, data)
    labeled = split.extra["labeled"]
    assert labeled.labels.bincount().tolist() == [2, 2, 2, 2]
    train, valid, chosen = map(numbers, (split.train, split.valid, labeled))
    assert train.isdisjoint(valid) and train | valid == set(range(55))
    assert len(valid) == 4 and chosen <= train  # a tenth of those with labels
    assert (split.valid.labels >= 0).all()
    assert options["labelled"] == sorted(chosen) and options["classes"] == list("wxyz")
    for part in (split.valid, labeled):
        assert all(data.labels[i] == y for i, y in zip(numbers_in_order(part), part.labels))


def numbers_in_order(data):
    """Return which images a set has, in its order."""
    return data.images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("seed", range(3))
def test_all_labels_split(seed):
    data = labeled_set()
    options = {"labels": "all", "seed": seed, "holdout": 0.25}
    split = split_labeled(options, data)
    labeled = split.extra["labeled"]
    train, valid, chosen = map(numbers, (split.train, split.valid, labeled))
    assert split.valid.labels.bincount().tolist() == [3, 3, 3, 3]  # of ten of each class
    assert train.isdisjoint(valid) and train | valid == set(range(55))
    assert chosen == {i for i in train if data.labels[i] >= 0} and len(chosen) == 28
    assert options["labelled"] == "all"
    known = data.subset((data.labels >= 0).nonzero().flatten())
    assert split_labeled(options | {"labels": "all"}, known).extra == {}


@pytest.mark.parametrize("labels", ["8", "all"])
def test_a_split_follows_from_its_seed(labels):
    def parts(seed):
        """Return the validation and labeled images."""
        options = {"labels": labels, "seed": seed, "holdout": 0.1}
        split = split_labeled(options, labeled_set())
        return numbers(split.valid), numbers(split.extra["labeled"])

    assert parts(1) == parts(1)
    for one, other in zip(parts(1), parts(2)):
        assert one != other


def test_validation_images_depend_on_the_seed_alone_of_the_labels(monkeypatch):
    # The same labeled images at every seed: those held out are still drawn by the seed.
    fixed = torch.tensor([i for i, y in enumerate(labeled_set().labels.tolist()) if y >= 0][:8])
    monkeypatch.setattr("optgen.schemes.assisted_command.balanced_indices", lambda *args: fixed)
    options = {"labels": "8", "holdout": 0.2}
    valid = {
        tuple(sorted(numbers(split_labeled(options | {"seed": seed}, labeled_set()).valid)))
        for seed in range(5)
    }
    assert len(valid) == 5


# A run, opened, measured and sampled


@pytest.fixture(scope="module")
def vae_run(folder, tmp_path_factory):
    """A finished run of a VAE with averages and a best epoch; tests must not change it."""
    out = tmp_path_factory.mktemp("runs") / "vae"
    args = "--image-size 8 --hidden 6,5 --z-dim 2 --epochs 2 --patience 5 --ema 0.6 --seed 3"
    more = "--binarize static --progress none --device cpu --batch-size 20 --out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optgen.training.callbacks.Pictures.on_epoch", lambda *args: None)
        assert run("train beta-vae --data", folder, args, more, out) == 0
    return out


def copied_run(source, target):
    """Copy the files of a run."""
    target.mkdir()
    for name in ("config.json", "metrics.jsonl", "checkpoint.pt", "best.pt"):
        (target / name).write_bytes((source / name).read_bytes())
    return target


def test_an_open_run_has_the_best_averaged_weights(vae_run, tmp_path):
    out = copied_run(vae_run, tmp_path / "run")
    for name, shift in (("best.pt", 1.0), ("checkpoint.pt", 2.0)):
        state = checkpoint.load(out / name)
        for key, x in state["ema"][0].items():
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                state["ema"][0][key] = torch.full_like(x, shift)
        checkpoint.save(out / name, state)
    opened = open_run(out, "cpu")
    assert all((p == 1.0).all() for p in opened.scheme.model.parameters())
    assert not any(m.training for m in opened.scheme.model.modules())
    (out / "best.pt").unlink()
    assert all((p == 2.0).all() for p in open_run(out, "cpu").scheme.model.parameters())


@pytest.fixture
def measured(monkeypatch):
    """What `BetaVAE.evaluate` receives."""
    calls = []

    def evaluate(self, batches, *args, **settings):
        """Keep the batches and the settings."""
        calls.append((list(batches), settings))
        return {"elbo": -1.5}

    monkeypatch.setattr(BetaVAE, "evaluate", evaluate)
    return calls


def split_pixels(folder, split):
    """Return the images of a split in the order of the names, (N, 1, 8, 8) bytes."""
    paths = sorted((folder / split).rglob("*.png"))
    return torch.stack([torch.tensor(np.array(Image.open(path))) for path in paths])[:, None]


@pytest.mark.parametrize(
    "split, limit, n", [("test", None, 225), ("test", 130, 200), ("train", None, 60)]
)
def test_what_an_evaluation_sees(split, limit, n, vae_run, folder, measured, capsys):
    more = f"--split {split} --seed 9 --k 3 --json" + (f" --limit {limit}" if limit else "")
    capsys.readouterr()
    assert run("evaluate", vae_run, more) == 0
    shown = json.loads(capsys.readouterr().out)
    ((batches, settings),) = measured
    assert settings["seed"] == 9 and settings["k"] == 3
    x = torch.cat([batch.x for batch in batches])
    assert len(x) == n and {len(batch.x) for batch in batches[:-1]} <= {100}
    assert set(x.unique().tolist()) == {0.0, 1.0}
    p = split_pixels(folder, split)[:n] / 255
    assert ((p > 0) | (x == 0)).all() and ((p < 1) | (x == 1)).all()
    # Drawn from these gray levels in this order, and from no other: the correlation is theirs.
    fit = (x * p.logit(eps=1e-3)).sum(), (x.flip(0) * p.logit(eps=1e-3)).sum()
    assert fit[0] > 2 * fit[1].abs()
    assert shown["elbo"] == -1.5 and shown["split"] == split and shown["scheme"] == "beta-vae"
    assert shown["data"] == "mine" and "binarized once" in shown["pixels"]


@pytest.mark.parametrize("seed", [0, 4])
def test_samples_are_of_the_seed(seed, vae_run, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr("optgen.viz.save_image_grid", lambda x, path, *a: saved.append((x, path)))
    assert run("sample", vae_run, f"--n 3 --seed {seed} --out", tmp_path / "x.png") == 0
    ((images, path),) = saved
    model = open_run(vae_run, "cpu").scheme.model
    torch.manual_seed(seed)
    expected = model.p_net(torch.randn(64, 2)).sigmoid()[:3].view(3, 1, 8, 8)
    assert path == tmp_path / "x.png" and torch.allclose(images, expected)


def test_options_of_samples_reach_the_scheme(vae_run, tmp_path, monkeypatch):
    import click

    from optgen.cli.runs import find_command

    command, given = find_command("beta-vae"), []
    option = click.Option(["--warmth"], type=float, default=1.0)
    monkeypatch.setattr(type(command), "sample_options", lambda self: [option])

    def sample(self, scheme, n, **more):
        """Keep the options."""
        given.append((n, more))
        return torch.zeros(n, 1, 8, 8)

    monkeypatch.setattr(type(command), "sample", sample)
    out = tmp_path / "x.png"
    assert run("sample", vae_run, "--n 2 --warmth 0.5 --out", out) == 0
    assert given == [(64, {"warmth": 0.5})]


class Keeping:
    """A scheme that returns what it receives."""

    features = None

    def evaluate(self, batches, **given):
        """Return the arguments, and a distance."""
        return {"batches": batches, "fid": 1.0, **given}

    def sample(self, n, **given):
        """Return the arguments."""
        return {"n": n, **given}


def test_a_command_passes_everything_on_by_default():
    command, scheme = FeedbackGANCommand(), Keeping()
    images, options = SimpleNamespace(shape=(1, 8, 8)), {"conditional": False}
    context = SimpleNamespace(images=images, options=options)
    found = command.evaluate(scheme, context, [1, 2], 4, k=3, class_samples=9)
    assert found.pop("fid_features") == "pixels, averaged down to 8 x 8"
    assert found == {"batches": [1, 2], "fid": 1.0, "seed": 4, "k": 3, "all_measures": True}
    assert command.sample(scheme, 5, steps=6) == {"n": 5, "steps": 6}


@pytest.fixture(scope="module")
def assisted_run(folder, tmp_path_factory):
    """A finished run of a classifier with few labels."""
    out = tmp_path_factory.mktemp("runs") / "assisted"
    args = "--image-size 8 --labels 12 --hidden 6,5 --z-dim 2 --epochs 1 --batch-size 20"
    args += " --method agreement"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optgen.training.callbacks.Pictures.on_epoch", lambda *args: None)
        command = ("train assisted --data", folder, args, "--progress none --device cpu --out", out)
        assert run(*command) == 0
    return out


def test_an_evaluation_with_images_from_outside(assisted_run, folder, tmp_path, capsys):
    write_images(tmp_path / "loose", 30, 77)
    for split, n in (("train", 11), ("test", 17)):
        write_images(tmp_path / "split" / split, n, n)
    found = {}
    for name, n in (("loose", 30), ("split", 17)):
        for seed in (0, 8):
            capsys.readouterr()
            more = f"--seed {seed} --json --outside"
            assert run("evaluate", assisted_run, more, tmp_path / name) == 0
            found[name, seed] = json.loads(capsys.readouterr().out)
            assert found[name, seed]["n_outside"] == n and found[name, seed]["n"] == 225
    assert found["loose", 0]["auroc"] != found["loose", 8]["auroc"]
    for key in ("error", "nll", "auroc_confidence"):
        assert found["loose", 0][key] == found["loose", 8][key]
    scheme = open_run(assisted_run, "cpu").scheme
    x, y = split_pixels(folder, "test") / 255, torch.arange(3).repeat_interleave(75)
    log_p = scheme.classifier(x).log_softmax(1)
    assert found["loose", 0]["error"] == pytest.approx(
        (log_p.argmax(1) != y).double().mean().item()
    )
    assert found["loose", 0]["nll"] == pytest.approx(-log_p[range(225), y].mean().item(), rel=1e-5)
    assert math.isclose(found["loose", 0]["weight"], 1.0)
    assert found["loose", 0]["diagram"] == str(assisted_run / "reliability-test.png")


# Benchmarks and claims


MEASURED = {"environment": {"optgen": "0.6.0"}, "rules": {"ms": 2.0}}


@pytest.fixture
def benched(monkeypatch):
    """The settings of the benchmarks that were run; each measures the part "rules" in 1 ms."""
    given = []
    part = Part("rules", lambda data: {}, lambda result: ["a table"], seconds=1)
    monkeypatch.setattr("optgen.bench.report.load_parts", lambda: {"rules": part, "elbo": part})

    def run_bench(*, on_part, watch, **settings):
        """Keep the settings, and hand on a result."""
        given.append(settings)
        watch("rules 1/2: a step")
        on_part("rules", {"environment": {"optgen": "0.7.0"}, "rules": {"ms": 1.0}})

    monkeypatch.setattr("optgen.bench.report.run_bench", run_bench)
    return given


def test_options_of_a_benchmark(benched, tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert run("bench --repeats 7 --data mnist --only rules --only elbo --out", out) == 0
    assert benched == [{"repeats": 7, "data": "mnist", "only": ("rules", "elbo")}]
    said = capsys.readouterr()
    assert said.out == "a table\n\n" and not said.err  # no terminal, no line of progress
    assert json.loads(out.read_text())["rules"] == {"ms": 1.0}
    assert run("bench") == 0
    assert benched[1] == {"repeats": None, "data": None, "only": ()}


def test_a_benchmark_is_compared_with_an_earlier_one(benched, tmp_path, capsys):
    before = tmp_path / "before.json"
    before.write_text(json.dumps(MEASURED))
    assert run("bench --against", before, "--out", before) == 0
    said = capsys.readouterr().out
    assert "optgen 0.6.0, now" in said and "a table" in said
    assert json.loads(before.read_text())["rules"] == {"ms": 1.0}  # read before it is written


def test_a_stopped_benchmark_keeps_what_it_has_measured(benched, tmp_path, monkeypatch, capsys):
    from optgen.bench import report

    measure = report.run_bench

    def stop(**settings):
        """Measure a part, and be stopped in the next one."""
        measure(**settings)
        raise KeyboardInterrupt

    monkeypatch.setattr("optgen.bench.report.run_bench", stop)
    out = tmp_path / "bench.json"
    assert run("bench --out", out) == 130
    assert json.loads(out.read_text())["rules"] == {"ms": 1.0}
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


@pytest.mark.parametrize(
    "words, content, said",
    [
        ("--only dance", None, "no part 'dance'"),
        ("--out missing/bench.json", None, "there is no folder missing"),
        ("--against missing.json", None, "missing.json"),
        ("--against before.json", "{", "can't be read as JSON"),
        ("--against before.json", "[1]", "holds no result of optgen bench"),
        ("--against before.json", '{"environment": {}, "epoch": {}}', "has none of the parts"),
    ],
)
def test_a_mistake_is_found_before_anything_is_measured(
    words, content, said, benched, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    if content:
        Path("before.json").write_text(content)
    assert run(f"bench {words}") == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert not benched


def test_options_of_a_claim(monkeypatch, tmp_path, capsys):
    from optgen.evidence import likelihood

    given = []

    def reproduce_stages(*args, **more):
        """Keep the arguments."""
        given.append((args, more))
        return {"done": 3, "skipped": 2}

    monkeypatch.setattr("optgen.evidence.reproduce.reproduce_stages", reproduce_stages)
    stage = next(iter(likelihood.STAGES))
    assert run("reproduce likelihood --jobs 5 --only", stage, "--out", tmp_path) == 0
    (args, more) = given[0]
    assert args == (likelihood.STAGES, likelihood.experiment, (stage,), str(tmp_path), 5)
    assert "3 runs done, 2 were there" in capsys.readouterr().out
