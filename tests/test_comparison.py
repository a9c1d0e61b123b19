"""Samples against data: the measures, their floors, features from a file and the command line.

Oracles are torchmetrics, clean-fid, and formulas written here with NumPy.
"""

import json
import warnings

import click
import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torch import nn

import optgen
from cli_helpers import assert_one_line, run, train_args
from optgen.cli.compare import (
    as_images,
    format_comparison,
    measure_samples,
    read_array,
)
from optgen.data.images import Batch
from optgen.kernel_distance import kid, kid_over_subsets
from optgen.models.features import (
    MEASURES,
    compare,
    compare_features,
    default_features,
    downsampled_pixels,
    image_batches,
    load_features,
)
from optgen.models.gan import MLPDiscriminator, MLPGenerator
from optgen.neighbors import (
    NeighborBalls,
    coverage_floor,
    density_coverage,
    precision_floor,
    precision_recall,
    recall_floor,
)
from optgen.sample_quality import collect_features
from optgen.schemes.density_commands import MADECommand
from optgen.schemes.elbo import BetaVAECommand
from optgen.schemes.feedback import FeedbackGAN
from optgen.testing import generator

F64 = torch.float64


def scripted(network, path):
    """Save a network as TorchScript, without the warning that torch.jit will end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(network).save(str(path))
    return path


class Convolution(nn.Module):
    """Sixteen features of images (B, 1, 8, 8)."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 4, 4, stride=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the features, (B, 16)."""
        return self.layer(x).relu().flatten(1)


class Bytes(nn.Module):
    """The same features of bytes, as torchmetrics passes them on."""

    num_features = 16

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        """Return the features, (B, 16)."""
        return self.network(x / 255)


@pytest.fixture(scope="module")
def convolution(tmp_path_factory):
    """A file of a small random convolution."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return scripted(Convolution(), tmp_path_factory.mktemp("features") / "conv.pt")


def gray(n, seed, power=1.0):
    """Return n images of 256 gray levels, (n, 1, 8, 8) bytes."""
    u = torch.rand(n, 1, 8, 8, generator=generator(seed))
    return (256 * u**power).clamp(max=255).to(torch.uint8)


@pytest.mark.parametrize("seed", range(3))
def test_figures_are_those_of_torchmetrics_and_clean_fid(convolution, seed):
    fid = pytest.importorskip("torchmetrics.image.fid")
    kernel = pytest.importorskip("torchmetrics.image.kid")
    clean = pytest.importorskip("cleanfid.fid")
    features = load_features(convolution)
    samples, images = gray(200, seed, 1.3), gray(260, seed + 10)
    found = compare(samples, images, features)
    theirs = fid.FrechetInceptionDistance(feature=Bytes(features.network))
    theirs.update(images, real=True)
    theirs.update(samples, real=False)
    assert found["fid"] == pytest.approx(theirs.compute().item(), rel=1e-4)

    made, real = features(samples / 255), features(images / 255)
    same = kid(made, real[:200], block=64).value
    both = [x.double().numpy() for x in (real[:200], made)]
    np.random.seed(0)
    assert same == pytest.approx(clean.kernel_distance(*both, 1, 200), rel=1e-9)
    assert same == pytest.approx(kernel.poly_mmd(real[:200].double(), made.double()).item())

    metric = kernel.KernelInceptionDistance(
        feature=Bytes(features.network), subsets=7, subset_size=60
    )
    metric.update(images, real=True)
    metric.update(samples, real=False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mean, std = metric.compute()
    ours = kid_over_subsets(made, real, 7, 60, torch.Generator().manual_seed(seed))
    assert ours.mean == pytest.approx(mean.item(), rel=1e-3)
    assert ours.std == pytest.approx(std.item(), rel=1e-3)


def moments_distance(a, b):
    """Return the squared Fréchet distance of two sets of features, by SciPy."""
    a, b = (np.asarray(x, dtype=float) for x in (a, b))
    roots = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    mean = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return mean + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * roots)


def neighbor_measures(y, x, k):
    """Return precision, recall, density and coverage as the papers define them, by NumPy."""
    x, y = (np.asarray(z, dtype=float) for z in (x, y))

    def distances(a, b):
        """Return the distance of each pair."""
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(2))

    radius_x, radius_y = (np.sort(distances(z, z), 1)[:, k] for z in (x, y))
    between = distances(x, y)
    inside = between <= radius_x[:, None]
    precision, recall = inside.any(0).mean(), (between <= radius_y[None]).any(1).mean()
    return precision, recall, inside.sum(0).mean() / k, inside.any(1).mean()


@pytest.mark.parametrize("seed", range(3))
def test_precision_and_coverage_are_those_of_numpy(seed):
    x = torch.randn(83, 6, generator=generator(seed))
    y = 0.2 + 0.9 * torch.randn(61, 6, generator=generator(seed + 5))
    for k in (2, 3, 5):
        expected = neighbor_measures(y, x, k)
        made, real = NeighborBalls(y, k, block=17), NeighborBalls(x, k, block=30)
        found = precision_recall(made, real, k)[:2] + density_coverage(made, real, k)[:2]
        assert found == pytest.approx(expected)
        assert precision_recall(y, x, k)[:2] == pytest.approx(expected[:2])
    found = compare_features([y[:40], y[40:]], [x])
    assert found["fid"] == pytest.approx(moments_distance(y, x), rel=1e-6)
    assert found["precision"], found["recall"] == pytest.approx(neighbor_measures(y, x, 3)[:2])
    assert found["density"], found["coverage"] == pytest.approx(neighbor_measures(y, x, 5)[2:])


@pytest.mark.parametrize("seed", range(3))
def test_the_error_of_the_kernel_distance_is_its_scatter(seed):
    rng = generator(seed)
    for shift in (0.0, 1.0):
        found = []
        for _ in range(300):
            x = torch.randn(40, 4, generator=rng) + shift
            found.append(kid(x, torch.randn(60, 4, generator=rng)))
        values, errors, nulls = (torch.tensor(column) for column in zip(*found))
        scatter = values.std()
        if shift:
            assert errors.square().mean().sqrt() == pytest.approx(scatter.item(), rel=0.2)
            assert nulls.mean() < 0.5 * scatter
        else:
            assert nulls.square().mean().sqrt() == pytest.approx(scatter.item(), rel=0.2)
            assert abs(values.mean()) < 5 * scatter / 300**0.5


def test_floors_are_means_over_samples_of_one_distribution():
    rng = generator(2)

    def draw(n):
        """Return points of a crescent in five dimensions."""
        z = torch.randn(n, 5, generator=rng, dtype=F64)
        return torch.cat([z[:, :1], z[:, 1:] * 0.3 + z[:, :1] ** 2], 1)

    rows = []
    for _ in range(200):
        y, x = draw(40), draw(70)
        values = neighbor_measures(y, x, 3)[:2] + neighbor_measures(y, x, 5)[2:]
        floors = (precision_floor(x), recall_floor(x, 40), 1.0, coverage_floor(40, 70))
        rows.append([a - b for a, b in zip(values, floors)])
    errors = torch.tensor(rows, dtype=F64)
    bound = 5 * errors.std(0) / 200**0.5
    assert (errors.mean(0).abs() < bound + torch.tensor([0.01, 0.0, 0.0, 0.0])).all()
    assert coverage_floor(40, 70) == pytest.approx(
        1 - np.prod([(69 - i) / (109 - i) for i in range(5)])
    )


def test_copies_and_collapse():
    x = torch.randn(200, 3, generator=generator(0)) + 1000
    copies = compare_features([x.clone()], [x])
    assert copies["precision"] == copies["recall"] == copies["coverage"] == 1
    assert copies["density"] == pytest.approx(1.2) and abs(copies["fid"]) < 1e-4
    collapsed = compare_features([x[:1].expand(50, 3)], [x])
    assert collapsed["precision"] == 1 and collapsed["recall"] == 1 / 200


@pytest.mark.parametrize("seed", [0, 3])
def test_all_measures_of_a_gan_are_of_the_samples_of_its_distance(seed):
    shape = (1, 8, 8)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        G, D = MLPGenerator(3, [8], shape, out="sigmoid"), MLPDiscriminator(shape, [8])
    scheme = FeedbackGAN(G, D, features=downsampled_pixels)
    batches = [Batch(gray(n, n) / 255) for n in (7, 12)]
    few = scheme.evaluate(batches, seed=4)
    found = scheme.evaluate(batches, seed=4, all_measures=True)
    assert set(few) == {"G", "D", "fid", "fid_floor"} and few.items() <= found.items()
    drawn, draw = [], scheme.generator.forward
    scheme.generator.forward = lambda z: drawn.append(draw(z)) or drawn[-1]
    scheme.evaluate(batches, seed=4)
    last = [x.detach() for x in drawn if len(x) in (7, 12)]
    expected = compare(torch.cat([last[2], last[-1]]), torch.cat([b.x for b in batches]))
    for name in MEASURES:
        assert found[name] == pytest.approx(expected[name], rel=1e-5)


def test_real_images_are_given_the_levels_of_the_samples():
    x = torch.rand(400, 1, 8, 8, generator=generator(1))
    options = {"binarize": "dynamic", "levels": None}
    binary = MADECommand().at_sample_levels(options, x, generator(2))
    assert set(binary.unique().tolist()) == {0.0, 1.0}
    assert ((binary - x).mean() / (1 / 12 / x.numel()) ** 0.5).abs() < 6
    few = MADECommand().at_sample_levels({"binarize": "none", "levels": 4}, x, generator(2))
    expected = np.floor(np.round(255 * x.numpy()) / 64) / 3
    assert np.allclose(few, expected)
    assert BetaVAECommand().at_sample_levels(options, x, generator(2)) is x


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs of a VAE, a GAN, a diffusion model and a pixel model, on a small folder."""
    root = tmp_path_factory.mktemp("runs")
    folder = root / "images"
    for split, n in (("train", 90), ("test", 130)):
        (folder / split).mkdir(parents=True)
        for i, image in enumerate(gray(n, n)):
            Image.fromarray(image[0].numpy()).save(folder / split / f"{i:03}.png")
    small = {
        "beta-vae": "--hidden 16,8 --z-dim 2",
        "feedback-gan": "--model mlp --hidden 16,8 --z-dim 4",
        "ddpm": "--channels 8 --multiples 1,1",
        "made": "--hidden 16",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optgen.training.callbacks.Pictures.on_epoch", lambda *args: None)
        for name, options in small.items():
            args = train_args(name, folder, f"{options} --epochs 1 --device cpu --out")
            assert run(*args, root / name) == 0
    return root


def evaluated(capsys, *args):
    """Return what `optgen evaluate ... --json` prints."""
    capsys.readouterr()
    assert run("evaluate", *args, "--json --device cpu") == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "name, options", [("beta-vae", "--k 2"), ("ddpm", "--k 1 --steps 2"), ("made", "")]
)
def test_samples_of_a_run_are_compared(runs, capsys, name, options):
    found = evaluated(capsys, runs / name, options, "--samples 120 --seed 3")
    assert found["samples"] == 120 and found["images"] == 130
    features = "pixels, averaged down to 8 x 8"
    for measure in MEASURES:
        assert np.isfinite([found[measure], found[f"{measure}_floor"]]).all()
        assert found[f"{measure}_features"] == features
    assert found["coverage_floor"] == pytest.approx(coverage_floor(120, 130))
    again = evaluated(capsys, runs / name, options, "--samples 120 --seed 3")
    assert again == found
    other = evaluated(capsys, runs / name, options, "--samples 120 --seed 4")
    assert other["fid"] != found["fid"]
    if name == "ddpm":
        fine = evaluated(capsys, runs / name, "--k 1 --steps 3 --samples 120 --seed 3")
        assert fine["fid"] != found["fid"] and fine["bound"] == found["bound"]


def test_samples_are_those_of_optgen_sample_whatever_the_chunk(runs, capsys, monkeypatch):
    asked = (runs / "ddpm", "--k 1 --steps 2 --samples 150 --seed 3")
    found = evaluated(capsys, *asked)
    monkeypatch.setattr("optgen.cli.measure.CHUNK", 20)
    again = evaluated(capsys, *asked)
    samples = optgen.load(runs / "ddpm", device="cpu").sample(150, seed=3, steps=2)
    expected = compare(samples.clamp(0, 1), gray(130, 130))
    for name in MEASURES:
        assert again[name] == pytest.approx(found[name], rel=1e-12)
        assert found[name] == pytest.approx(expected[name], rel=1e-5)


def test_samples_beyond_black_and_white_are_compared_as_they_are_shown(runs, capsys, monkeypatch):
    noise = 1.5 * torch.randn(150, 64, generator=generator(0)) + 0.5

    def draw_images(draw, n, seed, labels, chunk):
        """Yield numbers of which most are out of [0, 1]."""
        yield from noise[:n].split(40)

    monkeypatch.setattr("optgen.training.drawing.draw_images", draw_images)
    found = evaluated(capsys, runs / "ddpm", "--k 1 --samples 150")
    expected = compare(noise.clamp(0, 1).view(-1, 1, 8, 8), gray(130, 130))
    assert found["fid"] == pytest.approx(expected["fid"], rel=1e-5)


def test_a_gan_is_compared_by_default_and_the_others_are_not(runs, capsys):
    found = evaluated(capsys, runs / "feedback-gan")
    assert {*MEASURES, "G", "D"} <= found.keys()
    assert found["samples"] == found["images"] == 130
    assert not set(MEASURES) & evaluated(capsys, runs / "made").keys()
    more = evaluated(capsys, runs / "feedback-gan", "--samples 64")
    assert more["samples"] == 64 and more["G"] == found["G"] and more["fid"] != found["fid"]


def test_samples_of_a_file_or_a_folder_are_compared(runs, capsys, tmp_path, convolution):
    samples = gray(40, 9, 2.0)
    np.savez(tmp_path / "s.npz", samples[:, 0].numpy(), np.arange(40))
    np.save(tmp_path / "s.npy", samples.permute(0, 2, 3, 1).numpy() / np.float32(255))
    (tmp_path / "s").mkdir()
    for i, image in enumerate(samples):
        Image.fromarray(image[0].numpy()).save(tmp_path / "s" / f"{i}.png")
    asked = (runs / "beta-vae", "--k 1 --features", convolution, "--samples-from")
    found = [evaluated(capsys, *asked, tmp_path / name) for name in ("s.npz", "s.npy", "s")]
    limited = evaluated(capsys, *asked, tmp_path / "s", "--limit 100")
    assert limited["samples"] == 40 and limited["images"] == 100
    for one in found:
        assert one["fid_features"] == load_features(convolution).features_name
        assert one["samples"] == 40 and one["images"] == 130
        assert one["precision_features"].startswith("conv.pt, sha256 ")
        assert one["kid"] == pytest.approx(found[0]["kid"], rel=1e-5)
        assert one["fid"] == pytest.approx(found[0]["fid"], rel=1e-4)
    expected = compare(samples, gray(130, 130), load_features(convolution))
    for name in ("fid", "fid_floor", "kid", "kid_se", "precision", "recall", "coverage"):
        assert found[0][name] == pytest.approx(expected[name], rel=1e-4)


def test_the_table_names_features_and_floors(runs, capsys, convolution):
    assert run("evaluate", runs / "made", "--samples 20 --device cpu --features", convolution) == 0
    lines = capsys.readouterr().out.splitlines()
    table = {line.split()[0]: line for line in lines if line.split()[:1]}
    assert set(MEASURES) <= table.keys()
    for name in MEASURES:
        assert "conv.pt, sha256 " in table[name] and "20 / 130" in table[name]
    assert not any(line.startswith(("fid floor", "samples")) for line in lines)
    assert max(map(len, lines)) <= 100


class Rank(nn.Module):
    """A network that returns the image as it is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the image."""
        return x


class Nan(nn.Module):
    """A network whose features are not finite."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return no numbers."""
        return x.flatten(1) / 0.0


class Color(nn.Module):
    """A network for images of three channels."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return features of color images."""
        return self.layer(x).flatten(1)


def test_wrong_features_are_one_line(runs, capsys, tmp_path):
    torch.save(Convolution().state_dict(), tmp_path / "weights.pt")
    torch.save({"a": 1}, tmp_path / "pickle.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "text.pt").write_text("no network")
    (tmp_path / "empty.pt").touch()
    content = scripted(Convolution(), tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    for network in (Rank(), Nan(), Color()):
        scripted(network, tmp_path / f"{type(network).__name__.lower()}.pt")
    cases = {
        "weights.pt": "a file of weights",
        "pickle.pt": "no TorchScript file",
        "text.pt": "no TorchScript file",
        "empty.pt": "no TorchScript file",
        "cut.pt": "no TorchScript file",
        "missing.pt": "does not exist",
        "rank.pt": "must map images (2, 1, 8, 8) to features (2, d), got a tensor (2, 1, 8, 8)",
        "nan.pt": "not finite",
        "color.pt": "fails on images of shape (2, 1, 8, 8)",
    }
    for name, words in cases.items():
        capsys.readouterr()
        assert run("evaluate", runs / "made", "--features", tmp_path / name) == 2, name
        printed = capsys.readouterr()
        assert_one_line(printed.err, "--features", words)
        assert not printed.out


def test_exported_programs_are_features(tmp_path):
    network, x = Convolution().eval(), gray(9, 4) / 255
    batch = {0: torch.export.Dim("batch", max=1000)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(network, (x,), dynamic_shapes=(batch,))
        torch.export.save(program, tmp_path / "conv.pt2")
        fixed = torch.export.export(network, (x,))
        torch.export.save(fixed, tmp_path / "fixed.pt2")
    with torch.no_grad():
        assert torch.allclose(load_features(tmp_path / "conv.pt2")(x[:4]), network(x[:4]))
    with pytest.raises(ValueError, match=r"fixed.pt2 fails on images of shape \(4, 1, 8, 8\)"):
        load_features(tmp_path / "fixed.pt2")(x[:4])


@pytest.mark.parametrize(
    "args, words",
    [
        ("--samples 5", "from 6 to"),
        ("--samples 10 --samples-from {}/s.npz", "give one of them"),
        ("--steps 4", "--steps is for drawn samples: add --samples N"),
        ("--samples-from {}/missing.npz", "does not exist"),
        ("--samples-from {}/text.npz", "can't be read as .npz or .npy"),
        ("--samples-from {}/objects.npz", "can't be read as .npz or .npy"),
        ("--samples-from {}/large.npz", "has samples of shape (9, 9)"),
        ("--samples-from {}/signed.npz", "from -0.99"),
        ("--samples-from {}/labels.npz", "must hold one array of images"),
        ("--samples-from {}/nan.npz", "expected whole numbers"),
        ("--samples-from {}/one.npz", "at least two images"),
    ],
)
def test_wrong_samples_are_one_line(runs, capsys, tmp_path, args, words):
    good = gray(10, 1)[:, 0].numpy()
    (tmp_path / "text.npz").write_text("no array")
    files = {
        "s": good,
        "objects": np.array([{}, 1], dtype=object),
        "large": np.zeros((7, 9, 9)),
        "signed": good / 127.5 - 1,
        "labels": np.arange(9),
        "nan": good * np.float32("nan"),
        "one": good[:1],
    }
    for name, array in files.items():
        np.savez(tmp_path / f"{name}.npz", array)
    capsys.readouterr()
    assert run("evaluate", runs / "ddpm", "--k 1", args.format(tmp_path)) == 2
    printed = capsys.readouterr()
    assert_one_line(printed.err, words)
    assert not printed.out


def test_arrays_of_one_size_and_three_channels_keep_their_layout():
    square = torch.arange(2 * 27).reshape(2, 3, 3, 3) / 54
    assert torch.equal(as_images(square.double().numpy(), (3, 3, 3), "x"), square)


def test_features_are_collected_from_batches():
    x = torch.rand(10, 1, 8, 8, generator=generator(0))
    batches = [Batch(x[:4]), (x[4:9], None), x[9:]]
    assert torch.equal(collect_features(batches, downsampled_pixels), x.flatten(1))
    assert default_features(x) is downsampled_pixels


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.float32, np.float64])
def test_arrays_of_every_type_and_layout_are_the_same_images(kind, channels):
    random = np.random.default_rng(channels)
    pixels = random.integers(0, 256, (4, 5, 6, channels))
    array = pixels.astype(kind) / kind(255 if kind in (np.float32, np.float64) else 1)
    array = array.astype(kind)
    expected = torch.from_numpy(pixels / 255).permute(0, 3, 1, 2)
    last, first = array, np.moveaxis(array, 3, 1)
    for given in (last, first, *([array[..., 0]] if channels == 1 else [])):
        images = as_images(given, (channels, 5, 6), "x")
        found = torch.cat([*image_batches(images, 3)])
        assert found.dtype == torch.float32 and images.is_contiguous()
        assert torch.allclose(found.double(), expected, atol=1e-7)


@pytest.mark.parametrize(
    "array",
    [
        np.full((2, 4, 4), 1.5),
        np.full((2, 4, 4), -0.1),
        np.full((2, 4, 4), np.nan),
        np.full((2, 4, 4), 256),
        np.full((2, 4, 4), -1),
    ],
)
def test_numbers_out_of_range_are_no_images(array):
    with pytest.raises(click.UsageError, match="rescale them"):
        as_images(array, (1, 4, 4), "x")


def test_a_file_holds_one_array_of_images(tmp_path):
    images, labels = np.zeros((3, 4, 5), np.uint8), np.arange(3)
    np.savez(tmp_path / "one.npz", pictures=images, labels=labels)
    assert read_array(tmp_path / "one.npz").shape == (3, 4, 5)
    np.savez(tmp_path / "two.npz", images + 7, other=images)
    assert (read_array(tmp_path / "two.npz") == 7).all()
    np.savez(tmp_path / "many.npz", a=images, b=images)
    with pytest.raises(click.UsageError, match="must hold one array of images"):
        read_array(tmp_path / "many.npz")


def test_as_many_samples_as_images_by_default():
    g = generator(0)
    real = [torch.rand(n, 1, 8, 8, generator=g) for n in (6, 6, 4)]
    asked = []

    def draw(n):
        """Return samples in two batches."""
        asked.append(n)
        return torch.rand(n, 1, 8, 8, generator=g).split(7)

    for n, expected in ((None, 16), (9, 9)):
        found = measure_samples(real, draw, n, downsampled_pixels)
        assert asked.pop() == found["samples"] == expected and found["images"] == 16


def test_each_number_of_the_table_is_in_its_column():
    names = [name for name in MEASURES]
    result = {"samples": 20, "images": 30, "kid_se": 0.5, "kid_floor_se": 0.25}
    for i, name in enumerate(names):
        result |= {name: i + 0.125, f"{name}_floor": i + 0.0625, f"{name}_features": f"f{i}"}
    rows = [[word for word in line.split("  ") if word] for line in format_comparison(result)[2:]]
    assert len(rows) == len(names) == 6
    for i, (name, row) in enumerate(zip(names, rows)):
        more = (" ± 0.5000", " ± 0.2500") if name == "kid" else ("", "")
        numbers = [f"{i + 0.125:.4f}{more[0]}", f"{i + 0.0625:.4f}{more[1]}"]
        assert [word.strip() for word in row] == [name, *numbers, "20 / 30", f"f{i}"]
