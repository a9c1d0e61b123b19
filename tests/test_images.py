"Image sets of the installed package: what is read, and what is refused."

import gzip
import hashlib
import lzma
from importlib.resources import files

import pytest
import torch
from torchvision import datasets

from data_helpers import refuses
from optgen.data import images as image_sets
from optgen.data.images import DATASETS, DataError, digits, fashion_mnist, mnist
from optgen.data.text import alice
from optgen.testing import generator

SETS = {"MNIST": mnist, "FashionMNIST": fashion_mnist}


@pytest.fixture(autouse=True)
def no_other_data(monkeypatch, tmp_path):
    "No data but what a test makes."
    monkeypatch.delenv("OPTGEN_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_set(root, kind="MNIST", seed=0):
    "Write random files of the size of a test split under `root`, and return their SHA-256."
    raw, sums = root / kind / "raw", []
    raw.mkdir(parents=True, exist_ok=True)
    for stem, shape in (("images-idx3", (10_000, 28, 28)), ("labels-idx1", (10_000,))):
        body = torch.randint(10, shape, dtype=torch.uint8, generator=generator(seed))
        lengths = b"".join(n.to_bytes(4, "big") for n in shape)
        content = bytes([0, 0, 8, len(shape)]) + lengths + body.numpy().tobytes()
        (raw / f"t10k-{stem}-ubyte").write_bytes(content)
        sums.append(hashlib.sha256(content).hexdigest())
    return tuple(sums)


@pytest.fixture
def write_known(monkeypatch, tmp_path):
    "A function that writes such a set to a folder and makes its checksums the expected ones."

    def write(folder, kind="MNIST"):
        "Write the set and return its root."
        sums = write_set(tmp_path / folder, kind)
        monkeypatch.setitem(image_sets._IDX_SHA256, (kind, "test"), sums)
        return tmp_path / folder

    return write


# what comes with the package


@pytest.mark.parametrize("split, n", [("train", 1000), ("test", 200)])
def test_digits_are_balanced(split, n):
    data = digits(split)
    assert data.shape == (1, 28, 28) and data.images.dtype == torch.uint8
    assert data.labels.bincount().tolist() == [n] * 10
    assert data.images.flatten(1).unique(dim=0).shape[0] == 10 * n  # no image twice


def test_digits_are_small_and_licensed():
    assets = files("optgen") / "assets"
    assert sum(len(f.read_bytes()) for f in assets.iterdir()) < 2.5e6
    notice = (assets / "README.md").read_text()
    assert "Attribution-ShareAlike 3.0" in notice and "LeCun" in notice


def flip_last_byte(content):
    "Return the content of an .xz file whose last byte is another, compressed again."
    return lzma.compress(lzma.decompress(content)[:-1] + b"\xff")


@pytest.mark.parametrize(
    "damage, word",
    [
        (None, "no such file"),
        (lambda content: content[:-100], "cannot be read"),
        (lambda content: b"no xz file", "cannot be read"),
        (lambda content: b"", "cannot be read"),
        (flip_last_byte, "altered"),
    ],
)
def test_damaged_digits_are_refused(monkeypatch, tmp_path, damage, word):
    path = tmp_path / "digits-test.xz"
    if damage:
        path.write_bytes(damage((image_sets.ASSETS / path.name).read_bytes()))
    monkeypatch.setattr(image_sets, "ASSETS", tmp_path)
    with refuses(path, word, "pip install --force-reinstall"):
        digits("test")


# MNIST's files


@pytest.mark.parametrize("kind", SETS)
def test_a_missing_set_is_named_with_its_command(kind, tmp_path):
    name = SETS[kind].__name__
    command = f"python -c 'from optgen.data.images import {name}; {name}(download=True)'"
    path = f"{kind}/raw/train-images-idx3-ubyte"
    with refuses(path, "no such file", command, "--data digits"):
        SETS[kind]()
    with refuses(tmp_path, f'root="{tmp_path}", download=True'):
        SETS[kind](root=tmp_path)


def test_places_are_searched_in_order(write_known, monkeypatch, tmp_path):
    cache = write_known("cache/optgen")
    assert len(mnist("test")) == 10_000
    monkeypatch.setenv("OPTGEN_DATA", str(tmp_path / "env"))
    assert len(mnist("test")) == 10_000  # nothing there: on to the cache
    (write_known("env") / "MNIST/raw/t10k-labels-idx1-ubyte").write_bytes(b"")
    with refuses(tmp_path / "env", "t10k-labels"):
        mnist("test")  # something there: it counts, though the cache is whole
    assert len(mnist("test", root=cache)) == 10_000
    (tmp_path / "empty").mkdir()
    with refuses(tmp_path / "empty"):  # a folder that is named is never replaced by another
        mnist("test", root=tmp_path / "empty")


def test_gz_is_read_too(write_known):
    root = write_known("here")
    want = mnist("test", root=root)
    for path in (root / "MNIST/raw").iterdir():
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes(), 1))
        path.unlink()
    got = mnist("test", root=root)
    assert torch.equal(got.images, want.images) and torch.equal(got.labels, want.labels)


@pytest.mark.parametrize("name", ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize(
    "damage, word",
    [
        (None, "no such file"),
        (lambda content: content[:-1], "truncated"),
        (lambda content: content[:1000], "truncated"),
        (lambda content: content + b"0", "too long"),
        (lambda content: b"", "not an idx file"),
        (lambda content: b"\0\0\x0d" + content[3:], "not an idx file"),
        (lambda content: content[:4] + b"\1" + content[5:], "header"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "altered"),
    ],
)
def test_damaged_files_are_refused(write_known, name, damage, word):
    root = write_known("here")
    path = root / "MNIST/raw" / name
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
    with refuses(path, word, "mnist(root="):
        mnist("test", root=root)


def test_a_folder_in_place_of_a_file_is_refused(write_known):
    path = write_known("here") / "MNIST/raw/t10k-labels-idx1-ubyte"
    path.unlink()
    path.mkdir()
    with refuses(path, "cannot be read"):
        mnist("test", root=path.parents[2])


def test_download_only_on_request_and_only_what_is_missing(monkeypatch, tmp_path):
    sums = write_set(tmp_path / "served")
    monkeypatch.setitem(image_sets._IDX_SHA256, ("MNIST", "test"), sums)
    calls = []

    def fetch(place, train, download):
        "Write the files where torchvision would."
        calls.append(place)
        write_set(place)

    fetch.classes = list("0123456789")
    monkeypatch.setattr(datasets, "MNIST", fetch)
    with pytest.raises(DataError):
        mnist("test")
    assert calls == []
    for _ in range(2):
        assert len(mnist("test", download=True)) == 10_000
    assert calls == [tmp_path / "cache/optgen"]
    mnist("test", root=tmp_path / "mine", download=True)
    assert calls[1:] == [tmp_path / "mine"]


def test_a_failed_download_says_so(monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    with refuses("cannot download MNIST", "127.0.0.1", "get on the network"):
        mnist(download=True)


@pytest.mark.parametrize("make", [digits, mnist, fashion_mnist])
@pytest.mark.parametrize("split", ["valid", "Train", "", None])
def test_a_bad_split_is_refused(make, split):
    with refuses(repr(split), "'train' or 'test'"):
        make(split)


def test_the_registry_names_the_sets():
    assert {name: entry.make for name, entry in DATASETS.items()} == {
        "digits": digits,
        "mnist": mnist,
        "fashion-mnist": fashion_mnist,
        "alice": alice,
    }
    assert "10,000 + 2,000" in DATASETS.summaries()["digits"]


def test_a_message_is_one_line_whatever_it_reports():
    error = DataError.with_fix("a\nb", "c\n  d", "e\n\nf")
    assert str(error) == "a b: c d. Fix: e f"
