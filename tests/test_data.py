"The data of the installed package: what is read, what is refused, and that a loader goes on where it stopped."
import gzip
import hashlib
import subprocess
import sys
from importlib.resources import files

import pytest
import torch
from PIL import Image

from optgen import data
from optgen.data import DataError, ImageFiles, Images, Loader, digits, fashion_mnist, image_folder, load, mnist, stacked

SETS = {"MNIST": mnist, "FashionMNIST": fashion_mnist}


def one_line(error, *words):
    message = str(error.value)
    assert "\n" not in message and "To mend it: " in message and all(str(w) in message for w in words), message


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path):
    "No data but what a test makes."
    monkeypatch.delenv("OPTGEN_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_set(root, kind="MNIST", seed=0):
    "Random files of the size of a test split under `root`, and their SHA-256."
    raw, sums = root / kind / "raw", []
    raw.mkdir(parents=True, exist_ok=True)
    for stem, shape in (("images-idx3", (10_000, 28, 28)), ("labels-idx1", (10_000,))):
        body = torch.randint(10, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        content = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape) + body.numpy().tobytes()
        (raw / f"t10k-{stem}-ubyte").write_bytes(content)
        sums.append(hashlib.sha256(content).hexdigest())
    return tuple(sums)


@pytest.fixture
def known(monkeypatch, tmp_path):
    "`known(place)` writes such a set to a folder and makes its checksums the expected ones."
    def make(place, kind="MNIST"):
        monkeypatch.setitem(data._sha256, (kind, "test"), write_set(tmp_path / place, kind))
        return tmp_path / place
    return make


# what comes with the package

@pytest.mark.parametrize("split, n", [("train", 1000), ("test", 200)])
def test_digits_are_balanced(split, n):
    d = digits(split)
    assert d.shape == (1, 28, 28) and d.images.dtype == torch.uint8 and d.labels.bincount().tolist() == [n] * 10
    assert d.images.flatten(1).unique(dim=0).shape[0] == 10 * n  # no image twice


def test_digits_are_small_and_licensed():
    assets = files("optgen") / "assets"
    assert sum(len(f.read_bytes()) for f in assets.iterdir()) < 2.5e6
    assert "Attribution-ShareAlike 3.0" in (assets / "README.md").read_text() and "LeCun" in (assets / "README.md").read_text()


@pytest.mark.parametrize("damage, word", [
    (None, "no such file"), (lambda b: b[:-100], "cannot be read"), (lambda b: b"no xz file", "cannot be read"), (lambda b: b"", "cannot be read"),
    (lambda b: data.lzma.compress(data.lzma.decompress(b)[:-1] + b"\xff"), "altered"),
])
def test_damaged_digits_are_refused(monkeypatch, tmp_path, damage, word):
    if damage: (tmp_path / "digits-test.xz").write_bytes(damage((data.ASSETS / "digits-test.xz").read_bytes()))
    monkeypatch.setattr(data, "ASSETS", tmp_path)
    with pytest.raises(DataError) as e: digits("test")
    one_line(e, tmp_path / "digits-test.xz", word, "pip install --force-reinstall")


# MNIST's files

@pytest.mark.parametrize("kind", SETS)
def test_a_missing_set_is_named_with_its_command(kind, tmp_path):
    with pytest.raises(DataError) as e: SETS[kind]()
    command = f"python -c 'from optgen.data import {SETS[kind].__name__}; {SETS[kind].__name__}(download=True)'"
    one_line(e, f"{kind}/raw/train-images-idx3-ubyte", "no such file", command, "--data digits")
    with pytest.raises(DataError) as e: SETS[kind](root=tmp_path)
    one_line(e, tmp_path, f'root="{tmp_path}", download=True')


def test_places_are_searched_in_order(known, monkeypatch, tmp_path):
    cache = known("cache/optgen")
    assert len(mnist("test")) == 10_000
    monkeypatch.setenv("OPTGEN_DATA", str(tmp_path / "env"))
    assert len(mnist("test")) == 10_000                      # nothing there: on to the cache
    (known("env") / "MNIST/raw/t10k-labels-idx1-ubyte").write_bytes(b"")
    with pytest.raises(DataError) as e: mnist("test")        # something there: it counts, though the cache is whole
    one_line(e, tmp_path / "env", "t10k-labels")
    assert len(mnist("test", root=cache)) == 10_000
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as e: mnist("test", root=tmp_path / "empty")  # a folder that is named is never replaced by another
    one_line(e, tmp_path / "empty")


def test_gz_is_read_too(known):
    root = known("here")
    want = mnist("test", root=root)
    for f in (root / "MNIST/raw").iterdir():
        f.with_name(f.name + ".gz").write_bytes(gzip.compress(f.read_bytes(), 1))
        f.unlink()
    got = mnist("test", root=root)
    assert torch.equal(got.images, want.images) and torch.equal(got.labels, want.labels)


@pytest.mark.parametrize("name", ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize("damage, word", [
    (None, "no such file"), (lambda b: b[:-1], "truncated"), (lambda b: b[:1000], "truncated"), (lambda b: b + b"0", "too long"),
    (lambda b: b"", "not an idx file"), (lambda b: b"\0\0\x0d" + b[3:], "not an idx file"),
    (lambda b: b[:4] + b"\1" + b[5:], "header"), (lambda b: b[:-1] + bytes([b[-1] ^ 1]), "altered"),
])
def test_damaged_files_are_refused(known, name, damage, word):
    root = known("here")
    path = root / "MNIST/raw" / name
    if damage: path.write_bytes(damage(path.read_bytes()))
    else: path.unlink()
    with pytest.raises(DataError) as e: mnist("test", root=root)
    one_line(e, path, word, "mnist(root=")


def test_a_folder_in_place_of_a_file_is_refused(known):
    path = known("here") / "MNIST/raw/t10k-labels-idx1-ubyte"
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError) as e: mnist("test", root=path.parents[2])
    one_line(e, path, "cannot be read")


def test_download_only_on_request_and_only_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(data._sha256, ("MNIST", "test"), write_set(tmp_path / "served"))
    calls = []

    def fetch(place, train, download):
        calls.append(place)
        write_set(place)
    monkeypatch.setattr(data.datasets, "MNIST", fetch)
    fetch.classes = list("0123456789")
    with pytest.raises(DataError): mnist("test")
    assert calls == []
    for _ in range(2): assert len(mnist("test", download=True)) == 10_000
    assert calls == [tmp_path / "cache/optgen"]
    mnist("test", root=tmp_path / "mine", download=True)
    assert calls[1:] == [tmp_path / "mine"]


def test_a_failed_download_says_so(monkeypatch):
    monkeypatch.setattr(data.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(DataError) as e: mnist(download=True)
    one_line(e, "cannot download MNIST", "127.0.0.1", "get on the network")


@pytest.mark.parametrize("f", [digits, mnist, fashion_mnist, lambda s: load("digits", s), lambda s: image_folder(".", s)])
@pytest.mark.parametrize("split", ["valid", "Train", "", None])
def test_a_bad_split_is_refused(f, split):
    with pytest.raises(DataError) as e: f(split)
    one_line(e, repr(split), "'train' or 'test'")


def test_load_knows_the_names_and_the_paths(known, tmp_path):
    assert load("mnist", "test", root=known("here")).name == "MNIST" and load("digits").name == "digits"
    assert load("fashion-mnist", "test", root=known("here", "FashionMNIST")).name == "FashionMNIST"
    for bad in ("mnits", "", str(tmp_path / "gone")):
        with pytest.raises(DataError) as e: load(bad)
        one_line(e, bad, "digits, mnist, fashion-mnist")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError) as e: load(str(tmp_path / "file"))
    one_line(e, tmp_path / "file", "is a file")


# a folder of images

def write_folder(root, names, channels=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(256, (8, 8, channels), dtype=torch.uint8, generator=g).squeeze(-1).numpy()).save(root / name)
    return root


def test_classes_are_numbered_over_both_splits(tmp_path):
    write_folder(tmp_path, ["train/a/0.png", "train/b/0.png", "train/c/0.png", "test/c/0.png", "test/b/x/0.png"])
    train, test = (image_folder(tmp_path, s, size=8) for s in ("train", "test"))
    assert train.classes == test.classes == ("a", "b", "c") and train.labels.tolist() == [0, 1, 2] and test.labels.tolist() == [1, 2]


def test_a_folder_in_every_state_of_disorder(tmp_path):
    write_folder(tmp_path / "half", ["train/a/0.png"])
    with pytest.raises(DataError) as e: image_folder(tmp_path / "half", "test")
    one_line(e, tmp_path / "half/test", "no such folder beside")
    write_folder(tmp_path / "half", ["test/0.png"])
    with pytest.raises(DataError) as e: image_folder(tmp_path / "half")
    one_line(e, "0.png", "class is unknown")
    write_folder(tmp_path / "mixed", ["a.png"]), write_folder(tmp_path / "mixed", ["b.png"], channels=3)
    with pytest.raises(DataError) as e: image_folder(tmp_path / "mixed", holdout=0.)
    one_line(e, "b.png", "a.png", "channels=1", "channels=3")
    assert [image_folder(tmp_path / "mixed", holdout=0., channels=c).shape for c in (1, 3)] == [(1, 28, 28), (3, 28, 28)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as e: image_folder(tmp_path / "empty")
    one_line(e, tmp_path / "empty", "no image")
    (write_folder(tmp_path / "bad", ["a.png", "b.png"]) / "b.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(DataError) as e: image_folder(tmp_path / "bad", holdout=0.)
    one_line(e, tmp_path / "bad/b.png", "cannot be read")


@pytest.mark.parametrize("binarize", [None, "dynamic"])
def test_workers_stream_what_memory_holds(tmp_path, binarize):
    write_folder(tmp_path, [f"{c}/{i}.png" for c in "ab" for i in range(20)], channels=3)
    memory, disk = (image_folder(tmp_path, size=8, holdout=0., memory=m) for m in (2**20, 0))
    assert isinstance(memory, Images) and isinstance(disk, ImageFiles)
    want = list(Loader(memory, 7, seed=1, binarize=binarize))
    before = torch.random.get_rng_state()
    loader = Loader(disk, 7, seed=1, binarize=binarize, workers=2)
    for k, _ in enumerate(loader):
        if k == 2: break
    again = Loader(disk, 7, seed=1, binarize=binarize, workers=2)
    again.load_state_dict(loader.state_dict())
    rest = list(again)
    assert len(rest) == 3 and all(torch.equal(p, q) for a, b in zip(rest, want[3:]) for p, q in zip(a, b))
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_workers_error_is_one_line(tmp_path):
    (write_folder(tmp_path, ["a.png", "b.png"]) / "b.png").write_bytes(b"")
    with pytest.raises(DataError) as e: list(Loader(image_folder(tmp_path, holdout=0., memory=0), 1, workers=2))
    one_line(e, tmp_path / "b.png", "cannot be read")
    assert str(e.value).startswith(str(tmp_path))


# the loader

RESUME = """
import sys, torch
from optgen.data import Loader, digits
for kind in ("static", "dynamic"):
    loader = Loader(digits("test"), 300, binarize=kind, seed=3)
    loader.load_state_dict(torch.load(f"{sys.argv[1]}/{kind}.state", weights_only=True))
    torch.save([tuple(b) for _ in range(2) for b in loader], f"{sys.argv[1]}/{kind}.out")
"""


def test_another_process_goes_on_bit_for_bit(tmp_path):
    want = {}
    for kind in ("static", "dynamic"):
        it = iter(loader := Loader(digits("test"), 300, binarize=kind, seed=3))
        for _ in range(4): next(it)
        torch.save(loader.state_dict(), tmp_path / f"{kind}.state")
        want[kind] = [*it, *loader]
    subprocess.run([sys.executable, "-c", RESUME, tmp_path], check=True)
    for kind, batches in want.items():
        got = torch.load(tmp_path / f"{kind}.out", weights_only=True)
        assert len(got) == len(batches) == 10 and all(torch.equal(p, q) for a, b in zip(got, batches) for p, q in zip(a, b))


def test_a_state_is_integers_and_tensors():
    for binarize in (None, "static", "dynamic"):
        state = Loader(digits("test"), 100, binarize=binarize).state_dict()
        assert all(isinstance(v, (int, torch.Tensor)) for v in state.values())


def test_a_state_does_not_change_as_the_loader_goes_on():
    loader = Loader(digits("test"), 500, binarize="dynamic")
    state = loader.state_dict()
    kept = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
    list(loader), list(loader)
    assert all(torch.equal(state[k], v) if isinstance(v, torch.Tensor) else state[k] == v for k, v in kept.items())


@pytest.mark.parametrize("change", [
    dict(batch_size=10), dict(seed=1), dict(shuffle=False), dict(drop_last=True), dict(binarize="static"), dict(static_seed=4)])
def test_a_state_of_another_loader_is_refused(change):
    make = lambda **kw: Loader(digits("test"), **{"batch_size": 100, "binarize": "dynamic", **kw})
    with pytest.raises(DataError) as e: make().load_state_dict(make(**change).state_dict())
    one_line(e, "loader state", "saved", next(iter(change)) if "binarize" not in change else "static")


def test_a_state_of_other_data_or_none_is_refused():
    train, test = (Loader(digits(s), 100) for s in ("train", "test"))
    with pytest.raises(DataError) as e: test.load_state_dict(train.state_dict())
    one_line(e, "data: saved")
    for bad in ({}, {**test.state_dict(), "batch": 21}, {k: v for k, v in test.state_dict().items() if k != "start"}):
        with pytest.raises(DataError) as e: test.load_state_dict(bad)
        one_line(e, "loader state")


def test_breaking_off_an_epoch_starts_a_new_one():
    loader = Loader(digits("test"), 100)
    for _ in loader: break
    assert loader.epoch == 0 and len(torch.cat([b.y for b in loader])) == 2000 and loader.epoch == 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("binarize", [None, "static", "dynamic"])
def test_cuda_serves_the_same_without_waiting(binarize):
    here, there = (Loader(digits("test"), 100, binarize=binarize, device=d) for d in ("cpu", "cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try: got = list(there)
    finally: torch.cuda.set_sync_debug_mode("default")
    want = list(here)
    assert all(b.x.is_cuda and b.y.is_cuda for b in got)
    assert all(torch.equal(a.y, b.y.cpu()) for a, b in zip(want, got))
    if binarize != "dynamic":  # a GPU may divide by 255 through the reciprocal: one unit in the last place
        for a, b in zip(want, got): torch.testing.assert_close(b.x.cpu(), a.x, rtol=torch.finfo(a.x.dtype).eps, atol=0.)
    state, rest = there.state_dict(), list(there)
    again = Loader(digits("test"), 100, binarize=binarize, device="cuda")
    again.load_state_dict(state)
    assert all(torch.equal(a.x, b.x) for a, b in zip(rest, again))


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_stacks_are_images_with_their_numbers(channels):
    source = digits("test"); few = stacked(source, 50, channels, seed=channels)
    at = {x.numpy().tobytes(): y for x, y in zip(source.images, source.labels.tolist())}
    for x, y in zip(few.images, few.labels.tolist()): assert int("".join(str(at[c.numpy().tobytes()]) for c in x)) == y
    assert few.shape == (channels, 28, 28) and torch.equal(few.labels, stacked(source, 50, channels, seed=channels).labels)
    assert next(iter(Loader(few, 10))).x.shape == (10, channels, 28, 28)


def test_only_grey_images_with_labels_are_stacked():
    for bad, word in ((lambda: stacked(stacked(digits("test"), 9)), "grey"), (lambda: stacked(Images(digits("test").images)), "labels"), (lambda: stacked(digits("test"), 0), "no image")):
        with pytest.raises(DataError) as e: bad()
        one_line(e, word)


@pytest.mark.cuda
def test_stacks_are_the_same_on_every_device():
    source = digits("test"); there = stacked(Images(source.images.cuda(), source.labels.cuda()), 99)
    assert there.images.is_cuda and torch.equal(there.images.cpu(), stacked(source, 99).images)
