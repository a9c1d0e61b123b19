"Loaders of the installed package: sets by name, streams, and resuming where one stopped."

import gzip
import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from data_helpers import refuses, same_batches, write_folder
from optgen.data import images as image_sets
from optgen.data.folders import ImageFiles, image_folder
from optgen.data.images import DataError, Images, digits
from optgen.data.loading import Loader, load

# sets by name


@pytest.mark.parametrize("name, kind", [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_load_reads_the_files_of_a_named_set(name, kind, monkeypatch, tmp_path):
    raw = tmp_path / kind / "raw"
    raw.mkdir(parents=True)
    sums = []
    for stem, shape in (("images-idx3", (10_000, 28, 28)), ("labels-idx1", (10_000,))):
        lengths = b"".join(n.to_bytes(4, "big") for n in shape)
        content = bytes([0, 0, 8, len(shape)]) + lengths + bytes(torch.Size(shape).numel())
        (raw / f"t10k-{stem}-ubyte.gz").write_bytes(gzip.compress(content, 1))
        sums.append(hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(image_sets._IDX_SHA256, (kind, "test"), tuple(sums))
    assert load(name, "test", root=tmp_path).name == kind


def test_load_knows_the_digits_and_names_the_sets_it_knows(tmp_path):
    assert load("digits").name == "digits"
    for bad in ("mnits", "", str(tmp_path / "gone")):
        with refuses(bad, "digits, mnist, fashion-mnist"):
            load(bad)
    (tmp_path / "file").write_text("")
    with refuses(tmp_path / "file", "holds no text"):
        load(str(tmp_path / "file"))


@pytest.mark.parametrize("split", ["valid", "Train", "", None])
def test_a_bad_split_is_refused(split):
    with refuses(repr(split), "'train' or 'test'"):
        load("digits", split)


# streams


@pytest.mark.parametrize("binarize", [None, "dynamic"])
def test_workers_stream_what_memory_holds(tmp_path, binarize):
    write_folder(tmp_path, [f"{c}/{i}.png" for c in "ab" for i in range(20)], channels=3)
    memory = image_folder(tmp_path, size=8, holdout=0.0)
    disk = image_folder(tmp_path, size=8, holdout=0.0, memory_limit=0)
    assert isinstance(memory, Images) and isinstance(disk, ImageFiles)
    want = list(Loader(memory, 7, seed=1, binarize=binarize))
    before = torch.random.get_rng_state()
    loader = Loader(disk, 7, seed=1, binarize=binarize, workers=2)
    for k, _ in enumerate(loader):
        if k == 2:
            break
    again = Loader(disk, 7, seed=1, binarize=binarize, workers=2)
    again.load_state_dict(loader.state_dict())
    rest = list(again)
    assert len(rest) == 3 and same_batches(rest, want[3:])
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_workers_error_is_one_line(tmp_path):
    path = write_folder(tmp_path, ["a.png", "b.png"]) / "b.png"
    loader = Loader(image_folder(tmp_path, holdout=0.0, memory_limit=0), 1, workers=2)
    path.write_bytes(b"")  # damaged after it was checked
    with refuses(path, "cannot be read"):
        try:
            list(loader)
        except DataError as error:
            assert str(error).startswith(str(tmp_path))
            raise


# resuming

RESUME = """
import sys, torch
from optgen.data.images import digits
from optgen.data.loading import Loader
for kind in ("static", "dynamic"):
    loader = Loader(digits("test"), 300, binarize=kind, seed=3)
    loader.load_state_dict(torch.load(f"{sys.argv[1]}/{kind}.state", weights_only=True))
    torch.save([tuple(b) for _ in range(2) for b in loader], f"{sys.argv[1]}/{kind}.out")
"""


def test_another_process_continues_bit_for_bit(tmp_path):
    want = {}
    for kind in ("static", "dynamic"):
        loader = Loader(digits("test"), 300, binarize=kind, seed=3)
        batches = iter(loader)
        for _ in range(4):
            next(batches)
        torch.save(loader.state_dict(), tmp_path / f"{kind}.state")
        want[kind] = [*batches, *loader]
    subprocess.run([sys.executable, "-c", RESUME, tmp_path], check=True)
    for kind, batches in want.items():
        got = torch.load(tmp_path / f"{kind}.out", weights_only=True)
        assert len(got) == len(batches) == 10 and same_batches(got, batches)


def test_a_state_is_integers_and_tensors():
    for binarize in (None, "static", "dynamic"):
        state = Loader(digits("test"), 100, binarize=binarize).state_dict()
        assert all(isinstance(value, (int, torch.Tensor)) for value in state.values())


def test_a_state_does_not_change_as_the_loader_goes_on():
    loader = Loader(digits("test"), 500, binarize="dynamic")
    state = loader.state_dict()
    kept = {key: torch.as_tensor(value).clone() for key, value in state.items()}
    for _ in range(2):
        list(loader)
    assert all(torch.equal(torch.as_tensor(state[key]), value) for key, value in kept.items())


@pytest.mark.parametrize(
    "change, word",
    [
        ({"batch_size": 10}, "batch_size"),
        ({"seed": 1}, "seed"),
        ({"shuffle": False}, "shuffle"),
        ({"drop_last": True}, "drop_last"),
        ({"binarize": "static"}, "static"),
        ({"static_seed": 4}, "static_seed"),
    ],
)
def test_a_state_of_another_loader_is_refused(change, word):
    settings = {"batch_size": 100, "binarize": "dynamic"}
    loader = Loader(digits("test"), **settings)
    other = Loader(digits("test"), **{**settings, **change})
    with refuses("loader state", "saved", word):
        loader.load_state_dict(other.state_dict())


def test_a_state_of_other_data_or_none_is_refused():
    train, test = (Loader(digits(split), 100) for split in ("train", "test"))
    with refuses("data: saved"):
        test.load_state_dict(train.state_dict())
    state = test.state_dict()
    without_start = {key: value for key, value in state.items() if key != "start"}
    for bad in ({}, {**state, "batch": 21}, without_start):
        with refuses("loader state"):
            test.load_state_dict(bad)


def test_breaking_off_an_epoch_starts_a_new_one():
    loader = Loader(digits("test"), 100)
    for _ in loader:
        break
    assert loader.epoch == 0
    assert len(torch.cat([batch.y for batch in loader])) == 2000 and loader.epoch == 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("binarize", [None, "static", "dynamic"])
def test_cuda_serves_the_same_without_waiting(binarize):
    here = Loader(digits("test"), 100, binarize=binarize, device="cpu")
    there = Loader(digits("test"), 100, binarize=binarize, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = list(there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = list(here)
    assert all(batch.x.is_cuda and batch.y.is_cuda for batch in got)
    assert all(torch.equal(a.y, b.y.cpu()) for a, b in zip(want, got))
    if binarize != "dynamic":
        # A GPU may divide by 255 through the reciprocal: one unit in the last place.
        for a, b in zip(want, got):
            torch.testing.assert_close(b.x.cpu(), a.x, rtol=torch.finfo(a.x.dtype).eps, atol=0.0)
    state, rest = there.state_dict(), list(there)
    again = Loader(digits("test"), 100, binarize=binarize, device="cuda")
    again.load_state_dict(state)
    assert all(torch.equal(a.x, b.x) for a, b in zip(rest, again))


STREAMED = """
import sys
from optgen.bench.epochs import peak_memory
from optgen.data.folders import ImageFiles
from optgen.data.loading import Loader

files = ImageFiles([sys.argv[1]] * int(sys.argv[2]), size=96)
print(sum(len(batch.x) for batch in Loader(files, 100, workers=0)), peak_memory())
"""


def test_the_memory_of_a_stream_does_not_grow_with_its_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg")
    peaks = []
    for n in (2000, 8000):  # 55 and 221 MB of bytes, four times as much of floats
        command = [sys.executable, "-c", STREAMED, str(tmp_path / "a.jpg"), str(n)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        count, peak = done.stdout.split()
        assert int(count) == n
        peaks.append(float(peak))
    assert peaks[1] - peaks[0] < 50  # 6000 images are 166 MB of bytes
