"""The options of images: sizes, resizing and flips, by every scheme, recorded and used again."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cli_helpers import assert_one_line, edit_config, read_options, run
from data_helpers import refuses
from optgen.cli.measure import RunData
from optgen.cli.runs import load_commands, open_run
from optgen.data.folders import image_folder
from optgen.data.images import DataError, DataWarning, Images
from optgen.data.loading import Loader, load, split_holdout
from optgen.data.sequences import Sequences
from optgen.models.vae import VAE
from optgen.optim import Adam
from optgen.schemes.elbo import BetaVAE
from optgen.training.trainer import fit

# By scheme: its tiny networks. `gray` marks those of images of one channel.
TINY_NETWORKS = {
    "beta-vae": ("--hidden 8,6 --z-dim 3", "--model conv --z-dim 3"),
    "feedback-gan": ("--model mlp --hidden 8 --z-dim 3", "--width 4 --z-dim 3"),
    "assisted": ("--hidden 8 --labels 6", "--model conv --labels 6"),
    "lstm": ("--hidden 4",),
    "pixelcnn": ("--channels 4 --layers 2",),
    "made": ("--hidden 8",),
    "realnvp": ("--channels 4 --couplings 1", "--model flat --hidden 8"),
    "maf": ("--layers 2 --hidden 8",),
    "ddpm": ("--channels 4",),
    "flow-matching": ("--channels 4 --multiples 1,1",),
}
GRAY_ONLY = {"pixelcnn"}
WAYS = [(scheme, network) for scheme, networks in TINY_NETWORKS.items() for network in networks]


def write_images(root: Path, n: int, size: tuple[int, int, int], seed: int = 0) -> Path:
    """Write random pictures of (height, width, channels) in two classes, and return the folder."""
    random = np.random.default_rng(seed)
    for i in range(n):
        path = root / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, size).astype(np.uint8)
        Image.fromarray(pixels.squeeze()).save(path)
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of color and of gray images, 40 pixels wide and 30 high, by number of channels."""
    root = tmp_path_factory.mktemp("sizes")
    return {c: write_images(root / f"mine{c}", 24, (30, 40, c)) for c in (1, 3)}


def test_every_scheme_is_tried():
    assert TINY_NETWORKS.keys() >= load_commands().keys()


@pytest.mark.parametrize("scheme, network", WAYS)
def test_a_scheme_takes_images_that_are_no_squares(
    scheme, network, folders, tmp_path, capsys, no_pictures
):
    channels, out = 1 if scheme in GRAY_ONLY else 3, tmp_path / "run"
    words = f"--image-size 20x12 --batch-size 6 --epochs 1 --progress none {network} --flip --out"
    assert run(f"train {scheme} --data", folders[channels], words, out) == 0
    assert json.loads((out / "config.json").read_text())["shape"] == [channels, 12, 20]
    opened = open_run(out, "cpu")
    assert opened.command.sample(opened.scheme, 2).shape[1:] in ((channels, 12, 20), (720,), (240,))
    assert run("sample", out, "--n 2") == 0
    assert run("evaluate", out, "--limit 1 --json") == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert measured["data"] == f"mine{channels}"


@pytest.mark.parametrize(
    "args, words",
    [
        ("ddpm --channels 4 --image-size 21x13", ("--image-size 21x13: ", "divisible by 4")),
        ("flow-matching --image-size 22x12", ("--image-size 22x12: ", "divisible by 4")),
        ("realnvp --model image --image-size 20x14", ("--image-size 20x14: ", "divisible by 4")),
        ("feedback-gan --image-size 40x4", ("--image-size 40x4: ", "at least 8 x 8")),
        ("maf --image-size 64:48", ("--image-size", "WIDTHxHEIGHT", "'64:48'")),
        ("maf --image-size 64x3", ("--image-size", "at least 4", "'64x3'")),
        ("maf --image-size 4x2147483648", ("--image-size", "got '4x2147483648'")),
        ("maf --resize fill", ("--resize", "'crop', 'pad', 'stretch'")),
    ],
)
def test_a_size_that_cannot_be_is_one_line_and_leaves_nothing(
    args, words, folders, tmp_path, capsys
):
    out = tmp_path / "run"
    assert run("train", args, "--progress none --data", folders[3], "--out", out) == 2
    assert_one_line(capsys.readouterr().err, "optgen: ", *words)
    assert not out.exists()


def test_a_named_set_keeps_its_size_and_says_so():
    for settings in ({"size": (12, 20)}, {"size": 14}, {"resize": "pad"}):
        with pytest.warns(DataWarning, match="digits: a size .* its images keep their own"):
            assert load("digits", "test", **settings).shape == (1, 28, 28)


@pytest.fixture(scope="module")
def white_folder(tmp_path_factory):
    """A folder of white pictures, 40 pixels wide and 30 high."""
    root = tmp_path_factory.mktemp("white") / "mine"
    root.mkdir()
    for i in range(20):
        Image.new("L", (40, 30), 255).save(root / f"{i:02}.png")
    return root


MAF = "maf --layers 2 --hidden 8 --batch-size 6 --epochs 1 --progress none --image-size 20x12"


def test_options_of_images_are_recorded_and_used_again(white_folder, tmp_path, no_pictures):
    out = tmp_path / "run"
    words = ("train", MAF, "--resize pad --flip --data", white_folder, "--out", out)
    assert run(*words) == 0
    recorded = {"image_size": "20x12", "resize": "pad", "flip": True}
    assert read_options(out) == read_options(out) | recorded
    assert run("train --resume", out, "--epochs 2 --progress none") == 0
    assert read_options(out) == read_options(out) | recorded
    state = torch.load(out / "checkpoint.pt", weights_only=True)["state"]
    assert state["loader"]["flip"] is True and state["epoch"] == 2
    data = RunData(open_run(out, "cpu"), "cpu", None)
    expected = torch.zeros(12, 20)
    expected[:, 2:18] = 1  # 40 x 30 becomes 16 x 12, between bars
    for name in (str(white_folder), os.path.relpath(white_folder)):
        for batch in data.batches(data.load(name, "train")):
            assert torch.equal(batch.x, expected.expand_as(batch.x))


def test_runs_before_there_were_such_options_stay_as_they_were(
    white_folder, tmp_path, capsys, no_pictures
):
    out = tmp_path / "run"
    assert run("train", MAF.replace("20x12", "8"), "--data", white_folder, "--out", out) == 0
    path = out / "config.json"
    config = json.loads(path.read_text())
    assert config["options"]["image_size"] == 8
    for name in ("resize", "flip"):
        del config["options"][name]
    path.write_text(json.dumps(config))
    file = torch.load(out / "checkpoint.pt", weights_only=True)
    del file["state"]["loader"]["flip"]
    torch.save(file, out / "checkpoint.pt")
    assert run("evaluate", out) == 0
    assert run("train --resume", out, "--epochs 2 --progress none") == 0
    whole = tmp_path / "whole"
    words = MAF.replace("20x12", "8").replace("epochs 1", "epochs 2")
    assert run("train", words, "--data", white_folder, "--out", whole) == 0
    weights = [torch.load(f / "checkpoint.pt", weights_only=True)["state"] for f in (out, whole)]
    for a, b in zip(*(w["scheme"]["model"]["weights"].values() for w in weights), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("change", [{"image_size": "8 by 8"}, {"resize": 1}, {"flip": "yes"}])
def test_a_changed_record_is_refused_by_name(change, white_folder, tmp_path, capsys, no_pictures):
    out = tmp_path / "run"
    assert run("train", MAF, "--data", white_folder, "--out", out) == 0
    edit_config(out, **change)
    capsys.readouterr()
    for command in ("evaluate", "sample", "train --resume"):
        assert run(command, out) == 2
        assert_one_line(capsys.readouterr().err, repr(next(iter(change))))


# flips in training


class Recorder:
    """Callback that keeps the batches of a training, and may end it after some steps."""

    def __init__(self, scheme, last=None):
        """Keep also what the scheme is validated on."""
        self.train, self.labels, self.valid, self.last = [], [], [], last
        evaluate = scheme.evaluate

        def record(batches, **settings):
            """Keep the batches of a validation."""
            batches = list(batches)
            self.valid.append(torch.cat([batch.x for batch in batches]))
            return evaluate(batches, **settings)

        scheme.evaluate = record

    def on_step(self, loop, batch, losses):
        """Keep a batch."""
        self.train.append(batch.x.clone())
        self.labels.append(batch.y)
        if loop.step == self.last:
            raise ZeroDivisionError


def train(data, valid, epochs=3, last=None, seed=0, **settings):
    """Train a small model with flips, and return its weights and what it saw."""
    torch.manual_seed(0)
    model = VAE(data.shape[1] * data.shape[2] * data.shape[0], 8, 6, 2)
    scheme = BetaVAE(model, optimizer=Adam(model.parameters(), lr=1e-3))
    seen = Recorder(scheme, last)
    given = {"batch_size": 7, "seed": seed, "binarize": "dynamic", "flip": True, "samples": 0}
    given |= {"progress": "none", "callbacks": [seen], "epochs": epochs} | settings
    try:
        fit(scheme, data, valid=valid, **given)
    except ZeroDivisionError:
        pass
    return [p.detach().clone() for p in model.parameters()], seen


@pytest.mark.parametrize("memory_limit", [2**31, 0])
def test_a_run_with_flips_goes_on_in_mid_epoch_bit_for_bit(tmp_path, memory_limit, no_pictures):
    root = write_images(tmp_path / "mine", 40, (6, 10, 1))
    data = image_folder(root, holdout=0.0, size=(6, 10), memory_limit=memory_limit)
    rest, valid = split_holdout(data, 0.25)
    whole, seen = train(rest, valid)
    train(rest, valid, out=tmp_path / "run", checkpoint_steps=1, last=7)
    step = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["state"]["step"]
    assert step in (6, 7) and len(seen.train) == 15  # of three epochs of five batches
    resumed, then = train(rest, valid, out=tmp_path / "run", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(then.train, seen.train[step:], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(resumed, whole, strict=True))
    with pytest.raises(DataError, match="flip: saved True, here False"):
        train(rest, valid, out=tmp_path / "run", resume=True, flip=False)


@pytest.mark.parametrize("seed", [0, 3])
def test_training_images_are_mirrored_and_validation_images_never(seed):
    pixels = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (50, 3, 6, 10)))
    data, valid = Images(pixels[:30].byte(), torch.arange(30)), Images(pixels[30:].byte())
    _, seen = train(data, valid, seed=seed, binarize=None)
    for x in seen.valid:
        assert torch.equal(x, pixels[30:] / 255)
    mirrored = torch.zeros(3, 30, dtype=torch.bool)
    batches = zip(seen.train, seen.labels, strict=True)
    for i, (x, y) in enumerate(batches):
        for image, number in zip(x, y.tolist(), strict=True):
            whole = pixels[number] / 255
            mirrored[i // 5, number] = torch.equal(image, torch.flip(whole, [2]))
            assert mirrored[i // 5, number] or torch.equal(image, whole)
    # The rule is that of the image's number, the epoch and the seed, so that runs go on for years.
    for epoch in range(3):
        key = hashlib.sha256(f"flips/{seed}/{epoch}".encode()).hexdigest()[:8]
        draw = torch.Generator().manual_seed(int(key, 16))
        expected = torch.empty(30, dtype=torch.uint8).random_(0, 2, generator=draw)
        assert mirrored[epoch].tolist() == expected.bool().tolist()


def test_flips_of_what_has_no_left_and_right_are_refused():
    data = Sequences(torch.zeros(9, 4, dtype=torch.int64))
    with refuses("flip=True", "have no left and right"):
        Loader(data, 3, flip=True)
    images = Images(torch.zeros(9, 1, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="Loader\\(..., flip=True\\)"):
        fit(BetaVAE(VAE(16, 8, 6, 2)), Loader(images, 3), flip=True)
