"""Splits, labels, orders and toy data against their definitions, image by image."""

import hashlib
import math

import pytest
import torch
from PIL import Image

from optgen.data.folders import ImageFiles, image_folder, read_image
from optgen.data.images import Images
from optgen.data.loading import Loader, balanced_indices, binarize_pixels, split_holdout
from optgen.data.toy import (
    grid_centers,
    grid_mixture,
    ring_centers,
    ring_mixture,
    stacked_digits,
    two_moons,
)
from optgen.testing import generator


def numbered(n, classes=3, unknown=0):
    """Return images that are their own numbers, the last of unknown class."""
    pixels = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 1, 2, 2).clone()
    labels = torch.arange(n) % classes
    labels[n - unknown :] = -1
    return Images(pixels, labels, classes=tuple("abcdefghij"[:classes]))


def numbers(data):
    """Return which images a set has, in its order."""
    return data.images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("fraction, held_out", [(0.1, 6), (0.25, 14), (0.5, 28)])
def test_held_out_images_leave_the_training_set(fraction, held_out):
    data, chosen = numbered(55), set()
    for seed in range(4):
        train, valid = split_holdout(data, fraction, seed)
        assert len(valid) == held_out and not set(numbers(train)) & set(numbers(valid))
        assert sorted(numbers(train) + numbers(valid)) == list(range(55))
        for part in (train, valid):
            assert numbers(part) == sorted(numbers(part))
            assert part.labels.tolist() == [i % 3 for i in numbers(part)]
        chosen.add(tuple(numbers(valid)))
    assert len(chosen) == 4
    assert numbers(split_holdout(data, fraction, 1)[1]) == numbers(
        split_holdout(data, fraction, 1)[1]
    )


@pytest.mark.parametrize("n", [3, 9, 11])
def test_labels_are_chosen_class_by_class(n):
    data, chosen = numbered(60, unknown=15), set()
    for seed in range(5):
        found = balanced_indices(data, n, seed).tolist()
        assert found == sorted(set(found)) and len(found) == n and max(found) < 45
        counts = [sum(i % 3 == c for i in found) for c in range(3)]
        assert max(counts) - min(counts) == (n % 3 > 0) and sum(counts) == n
        chosen.add(tuple(found))
    assert len(chosen) == 5


def batches_of(loader):
    """Return the numbers and labels that an epoch serves."""
    found = [((255 * b.x[:, 0, 0, 0]).round().int().tolist(), b.y.tolist()) for b in loader]
    return [i for x, _ in found for i in x], [k for _, y in found for k in y]


def test_an_epoch_serves_every_image_with_its_label():
    data = numbered(23)
    loader = Loader(data, 5, seed=2)
    orders = []
    for _ in range(3):
        x, y = batches_of(loader)
        assert sorted(x) == list(range(23)) and y == [i % 3 for i in x]
        orders.append(x)
    assert len(set(map(tuple, orders))) == 3
    assert batches_of(Loader(data, 5, seed=2))[0] == orders[0]
    assert batches_of(Loader(data, 5, seed=3))[0] != orders[0]
    assert batches_of(Loader(data, 5, shuffle=False))[0] == list(range(23))
    assert len(batches_of(Loader(data, 5, drop_last=True))[0]) == 20


def test_pixels_are_black_with_their_probability():
    gray = torch.tensor([0, 1, 64, 200, 254, 255], dtype=torch.uint8).repeat(20_000, 1)
    found = binarize_pixels(gray, generator(0)).double().mean(0)
    p = gray[0] / 255
    assert ((found - p).abs() <= 5 * (p * (1 - p) / 20_000).sqrt()).all()


def pixels_of(data, **settings):
    """Return two epochs of a loader in the order of the images."""
    loader = Loader(data, 7, shuffle=False, **settings)
    return [torch.cat([batch.x for batch in loader]) for _ in range(2)]


def test_each_binarization_has_its_own_seed():
    pixels = torch.randint(256, (20, 1, 6, 6), dtype=torch.uint8, generator=generator(1))
    data = Images(pixels)
    first, second = pixels_of(data, binarize="static", seed=0)
    assert torch.equal(first, second)
    assert torch.equal(first, pixels_of(data, binarize="static", seed=9)[0])
    assert not torch.equal(first, pixels_of(data, binarize="static", static_seed=9)[0])
    first, second = pixels_of(data, binarize="dynamic", seed=0)
    assert not torch.equal(first, second)
    assert torch.equal(first, pixels_of(data, binarize="dynamic", seed=0, static_seed=9)[0])
    assert not torch.equal(first, pixels_of(data, binarize="dynamic", seed=9)[0])
    assert torch.equal(pixels_of(data)[0], pixels / 255)


def test_a_fingerprint_is_that_of_pixels_labels_and_shape():
    data = numbered(12)
    others = [
        Images(data.images, data.labels.roll(1)),
        Images(data.images, None),
        Images(data.images.flip(0), data.labels),
        Images(data.images.view(12, 1, 1, 4), data.labels),
    ]
    fingerprints = {other.fingerprint for other in others}
    assert len(fingerprints) == 4 and data.fingerprint not in fingerprints
    assert Images(data.images.clone(), data.labels.clone(), "name").fingerprint == data.fingerprint


def hashed(*key):
    """Return 32 bits of the SHA-256 of a key."""
    return int(hashlib.sha256("/".join(map(str, key)).encode()).hexdigest()[:8], 16)


def write(path, pixels):
    """Write a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.numpy()).save(path)


@pytest.mark.parametrize("seed, holdout", [(0, 0.3), (5, 0.3), (0, 0.6)])
def test_a_folder_is_split_by_the_hash_of_its_names(seed, holdout, tmp_path):
    names = [f"{c}/{i:02}.png" for c in "ab" for i in range(20)]
    for i, name in enumerate(names):
        write(tmp_path / name, torch.full((4, 4), i, dtype=torch.uint8))
    in_test = [i for i, name in enumerate(names) if hashed(seed, name) < holdout * 2**32]
    assert 0 < len(in_test) < 40
    for split, expected in (
        ("test", in_test),
        ("train", [i for i in range(40) if i not in in_test]),
    ):
        data = image_folder(tmp_path, split, 4, holdout=holdout, seed=seed)
        assert numbers(data) == expected and data.classes == ("a", "b")
        assert data.labels.tolist() == [int(i >= 20) for i in expected]
        streamed = image_folder(tmp_path, split, 4, holdout=holdout, seed=seed, memory_limit=0)
        assert isinstance(streamed, ImageFiles)
        assert torch.equal(streamed.to_memory().images, data.images)


@pytest.mark.parametrize("channels", [None, 1, 3])
def test_the_channels_of_a_folder(channels, tmp_path):
    color = torch.tensor([200, 100, 50], dtype=torch.uint8).expand(4, 4, 3).clone()
    for i in range(6):
        write(tmp_path / "train" / f"{i}.png", color)
    data = image_folder(tmp_path, "train", 4, channels)
    luma = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)  # ITU-R 601
    expected = [luma] if channels == 1 else [200, 100, 50]
    assert data.images[0, :, 0, 0].tolist() == pytest.approx(expected, abs=1)


def test_a_picture_is_cropped_at_its_center_and_scaled(tmp_path):
    wide = torch.zeros(4, 12, dtype=torch.uint8)
    wide[:, 4:6], wide[:, 6:8], wide[:, 8:] = 40, 200, 255  # the square is columns 4 to 7
    write(tmp_path / "wide.png", wide)
    assert read_image(tmp_path / "wide.png", 4)[0].tolist() == [[40, 40, 200, 200]] * 4
    write(tmp_path / "tall.png", wide.T.contiguous())
    assert read_image(tmp_path / "tall.png", 4)[0].T.tolist() == [[40, 40, 200, 200]] * 4
    small = read_image(tmp_path / "wide.png", 2)[0]
    assert small.shape == (2, 2) and (small[:, 0] < small[:, 1]).all()


def test_stacked_digits_are_read_channel_by_channel():
    data = numbered(50, classes=10)
    stacks = stacked_digits(data, 200, 3, seed=4)
    assert stacks.shape == (3, 2, 2) and len(stacks) == 200
    digits = stacks.images[:, :, 0, 0].long() % 10
    assert stacks.labels.tolist() == [100 * a + 10 * b + c for a, b, c in digits.tolist()]
    used = stacks.images[:, :, 0, 0].flatten().bincount(minlength=50)
    assert (used > 0).all() and len(stacked_digits(data)) == 50
    other = stacked_digits(data, 200, 3, seed=5)
    assert not torch.equal(stacks.images, other.images)


@pytest.mark.parametrize("modes, radius", [(8, 1.0), (5, 2.5)])
def test_points_of_a_ring(modes, radius):
    expected = [
        (radius * math.cos(2 * math.pi * k / modes), radius * math.sin(2 * math.pi * k / modes))
        for k in range(modes)
    ]
    assert torch.allclose(ring_centers(modes, radius), torch.tensor(expected), atol=1e-6)
    x, y = ring_mixture(4000, modes, radius, 0.05, generator(0))
    check_mixture(x, y, torch.tensor(expected), 0.05)


@pytest.mark.parametrize("side, spacing", [(5, 2.0), (3, 0.7)])
def test_points_of_a_grid(side, spacing):
    line = [spacing * (i - (side - 1) / 2) for i in range(side)]
    expected = torch.tensor([(a, b) for a in line for b in line])
    assert torch.allclose(grid_centers(side, spacing), expected, atol=1e-6)
    x, y = grid_mixture(4000, side, spacing, 0.03, generator(1))
    check_mixture(x, y, expected, 0.03)


def check_mixture(x, y, centers, std):
    """Assert that points lie about the center of their mode, and modes are equally likely."""
    n, k = len(x), len(centers)
    noise = (x - centers[y]) / std
    assert (noise.mean(0).abs() < 5 / math.sqrt(n)).all()
    assert ((noise.var(0) - 1).abs() < 5 * math.sqrt(2 / n)).all()
    counts = y.bincount(minlength=k)
    assert ((counts / n - 1 / k).abs() < 5 * math.sqrt((1 - 1 / k) / (k * n))).all()


def test_points_of_two_moons():
    x, y = two_moons(3000, 0.0, generator(2))
    upper, lower = x[y == 0], x[y == 1]
    assert abs(len(upper) / 3000 - 0.5) < 5 * math.sqrt(0.25 / 3000)
    # Half circles of radius 1, about (0, 0) upwards and about (1, 1/2) downwards.
    assert torch.allclose(upper.norm(dim=1), torch.ones(len(upper))) and (upper[:, 1] >= 0).all()
    shifted = lower - torch.tensor([1.0, 0.5])
    assert torch.allclose(shifted.norm(dim=1), torch.ones(len(lower)), atol=1e-6)
    assert (shifted[:, 1] <= 1e-6).all()
    for half in (upper, shifted):  # uniform in the angle: its cosine has mean 0, variance 1/2
        assert abs(half[:, 0].mean()) < 5 * math.sqrt(0.5 / len(half))
        assert abs(half[:, 0].square().mean() - 0.5) < 5 * math.sqrt(0.125 / len(half))
    noisy, _ = two_moons(3000, 0.2, generator(2))
    assert not torch.equal(noisy, x)
