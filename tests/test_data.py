"The data of the installed package: what is read, what is refused, and that a loader goes on where it stopped."

import gzip
import hashlib
import subprocess
import sys
from importlib.resources import files

import pytest
import torch
from PIL import Image

from optgen.data import images as image_sets
from optgen.data.folders import ImageFiles, image_folder
from optgen.data.images import DataError, Images, digits, fashion_mnist, mnist
from optgen.data.loading import Loader, load, split_holdout
from optgen.data.sequences import Sequences
from optgen.data.toy import stacked_digits
from optgen.games import Game, Player
from optgen.models.synthetic import SyntheticSequences, synthetic_sequences
from optgen.optim import SGD
from optgen.testing import assert_mean
from optgen.training.trainer import fit

SETS = {"MNIST": mnist, "FashionMNIST": fashion_mnist}


def one_line(error, *words):
    message = str(error.value)
    assert (
        "\n" not in message and "To mend it: " in message and all(str(w) in message for w in words)
    ), message


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
        body = torch.randint(
            10, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
        )
        content = (
            bytes([0, 0, 8, len(shape)])
            + b"".join(n.to_bytes(4, "big") for n in shape)
            + body.numpy().tobytes()
        )
        (raw / f"t10k-{stem}-ubyte").write_bytes(content)
        sums.append(hashlib.sha256(content).hexdigest())
    return tuple(sums)


@pytest.fixture
def known(monkeypatch, tmp_path):
    "`known(place)` writes such a set to a folder and makes its checksums the expected ones."

    def make(place, kind="MNIST"):
        monkeypatch.setitem(image_sets._sha256, (kind, "test"), write_set(tmp_path / place, kind))
        return tmp_path / place

    return make


# what comes with the package


@pytest.mark.parametrize("split, n", [("train", 1000), ("test", 200)])
def test_digits_are_balanced(split, n):
    d = digits(split)
    assert (
        d.shape == (1, 28, 28)
        and d.images.dtype == torch.uint8
        and d.labels.bincount().tolist() == [n] * 10
    )
    assert d.images.flatten(1).unique(dim=0).shape[0] == 10 * n  # no image twice


def test_digits_are_small_and_licensed():
    assets = files("optgen") / "assets"
    assert sum(len(f.read_bytes()) for f in assets.iterdir()) < 2.5e6
    assert (
        "Attribution-ShareAlike 3.0" in (assets / "README.md").read_text()
        and "LeCun" in (assets / "README.md").read_text()
    )


@pytest.mark.parametrize(
    "damage, word",
    [
        (None, "no such file"),
        (lambda b: b[:-100], "cannot be read"),
        (lambda b: b"no xz file", "cannot be read"),
        (lambda b: b"", "cannot be read"),
        (
            lambda b: image_sets.lzma.compress(image_sets.lzma.decompress(b)[:-1] + b"\xff"),
            "altered",
        ),
    ],
)
def test_damaged_digits_are_refused(monkeypatch, tmp_path, damage, word):
    if damage:
        (tmp_path / "digits-test.xz").write_bytes(
            damage((image_sets.ASSETS / "digits-test.xz").read_bytes())
        )
    monkeypatch.setattr(image_sets, "ASSETS", tmp_path)
    with pytest.raises(DataError) as e:
        digits("test")
    one_line(e, tmp_path / "digits-test.xz", word, "pip install --force-reinstall")


# MNIST's files


@pytest.mark.parametrize("kind", SETS)
def test_a_missing_set_is_named_with_its_command(kind, tmp_path):
    with pytest.raises(DataError) as e:
        SETS[kind]()
    command = f"python -c 'from optgen.data.images import {SETS[kind].__name__}; {SETS[kind].__name__}(download=True)'"
    one_line(e, f"{kind}/raw/train-images-idx3-ubyte", "no such file", command, "--data digits")
    with pytest.raises(DataError) as e:
        SETS[kind](root=tmp_path)
    one_line(e, tmp_path, f'root="{tmp_path}", download=True')


def test_places_are_searched_in_order(known, monkeypatch, tmp_path):
    cache = known("cache/optgen")
    assert len(mnist("test")) == 10_000
    monkeypatch.setenv("OPTGEN_DATA", str(tmp_path / "env"))
    assert len(mnist("test")) == 10_000  # nothing there: on to the cache
    (known("env") / "MNIST/raw/t10k-labels-idx1-ubyte").write_bytes(b"")
    with pytest.raises(DataError) as e:
        mnist("test")  # something there: it counts, though the cache is whole
    one_line(e, tmp_path / "env", "t10k-labels")
    assert len(mnist("test", root=cache)) == 10_000
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as e:
        mnist(
            "test", root=tmp_path / "empty"
        )  # a folder that is named is never replaced by another
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
@pytest.mark.parametrize(
    "damage, word",
    [
        (None, "no such file"),
        (lambda b: b[:-1], "truncated"),
        (lambda b: b[:1000], "truncated"),
        (lambda b: b + b"0", "too long"),
        (lambda b: b"", "not an idx file"),
        (lambda b: b"\0\0\x0d" + b[3:], "not an idx file"),
        (lambda b: b[:4] + b"\1" + b[5:], "header"),
        (lambda b: b[:-1] + bytes([b[-1] ^ 1]), "altered"),
    ],
)
def test_damaged_files_are_refused(known, name, damage, word):
    root = known("here")
    path = root / "MNIST/raw" / name
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
    with pytest.raises(DataError) as e:
        mnist("test", root=root)
    one_line(e, path, word, "mnist(root=")


def test_a_folder_in_place_of_a_file_is_refused(known):
    path = known("here") / "MNIST/raw/t10k-labels-idx1-ubyte"
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError) as e:
        mnist("test", root=path.parents[2])
    one_line(e, path, "cannot be read")


def test_download_only_on_request_and_only_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(image_sets._sha256, ("MNIST", "test"), write_set(tmp_path / "served"))
    calls = []

    def fetch(place, train, download):
        calls.append(place)
        write_set(place)

    monkeypatch.setattr(image_sets.datasets, "MNIST", fetch)
    fetch.classes = list("0123456789")
    with pytest.raises(DataError):
        mnist("test")
    assert calls == []
    for _ in range(2):
        assert len(mnist("test", download=True)) == 10_000
    assert calls == [tmp_path / "cache/optgen"]
    mnist("test", root=tmp_path / "mine", download=True)
    assert calls[1:] == [tmp_path / "mine"]


def test_a_failed_download_says_so(monkeypatch):
    monkeypatch.setattr(image_sets.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(DataError) as e:
        mnist(download=True)
    one_line(e, "cannot download MNIST", "127.0.0.1", "get on the network")


@pytest.mark.parametrize(
    "f", [digits, mnist, fashion_mnist, lambda s: load("digits", s), lambda s: image_folder(".", s)]
)
@pytest.mark.parametrize("split", ["valid", "Train", "", None])
def test_a_bad_split_is_refused(f, split):
    with pytest.raises(DataError) as e:
        f(split)
    one_line(e, repr(split), "'train' or 'test'")


def test_load_knows_the_names_and_the_paths(known, tmp_path):
    assert (
        load("mnist", "test", root=known("here")).name == "MNIST"
        and load("digits").name == "digits"
    )
    assert load("fashion-mnist", "test", root=known("here", "FashionMNIST")).name == "FashionMNIST"
    for bad in ("mnits", "", str(tmp_path / "gone")):
        with pytest.raises(DataError) as e:
            load(bad)
        one_line(e, bad, "digits, mnist, fashion-mnist")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError) as e:
        load(str(tmp_path / "file"))
    one_line(e, tmp_path / "file", "is a file")


# a folder of images


def write_folder(root, names, channels=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(
            torch.randint(256, (8, 8, channels), dtype=torch.uint8, generator=g).squeeze(-1).numpy()
        ).save(root / name)
    return root


def test_classes_are_numbered_over_both_splits(tmp_path):
    write_folder(
        tmp_path,
        ["train/a/0.png", "train/b/0.png", "train/c/0.png", "test/c/0.png", "test/b/x/0.png"],
    )
    train, test = (image_folder(tmp_path, s, size=8) for s in ("train", "test"))
    assert (
        train.classes == test.classes == ("a", "b", "c")
        and train.labels.tolist() == [0, 1, 2]
        and test.labels.tolist() == [1, 2]
    )


def test_a_folder_in_every_state_of_disorder(tmp_path):
    write_folder(tmp_path / "half", ["train/a/0.png"])
    with pytest.raises(DataError) as e:
        image_folder(tmp_path / "half", "test")
    one_line(e, tmp_path / "half/test", "no such folder beside")
    write_folder(tmp_path / "half", ["test/0.png"])
    with pytest.raises(DataError) as e:
        image_folder(tmp_path / "half")
    one_line(e, "0.png", "class is unknown")
    (
        write_folder(tmp_path / "mixed", ["a.png"]),
        write_folder(tmp_path / "mixed", ["b.png"], channels=3),
    )
    with pytest.raises(DataError) as e:
        image_folder(tmp_path / "mixed", holdout=0.0)
    one_line(e, "b.png", "a.png", "channels=1", "channels=3")
    assert [image_folder(tmp_path / "mixed", holdout=0.0, channels=c).shape for c in (1, 3)] == [
        (1, 28, 28),
        (3, 28, 28),
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as e:
        image_folder(tmp_path / "empty")
    one_line(e, tmp_path / "empty", "no image")
    (write_folder(tmp_path / "bad", ["a.png", "b.png"]) / "b.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(DataError) as e:
        image_folder(tmp_path / "bad", holdout=0.0)
    one_line(e, tmp_path / "bad/b.png", "cannot be read")


@pytest.mark.parametrize("binarize", [None, "dynamic"])
def test_workers_stream_what_memory_holds(tmp_path, binarize):
    write_folder(tmp_path, [f"{c}/{i}.png" for c in "ab" for i in range(20)], channels=3)
    memory, disk = (image_folder(tmp_path, size=8, holdout=0.0, memory=m) for m in (2**20, 0))
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
    assert len(rest) == 3 and all(
        torch.equal(p, q) for a, b in zip(rest, want[3:]) for p, q in zip(a, b)
    )
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_workers_error_is_one_line(tmp_path):
    (write_folder(tmp_path, ["a.png", "b.png"]) / "b.png").write_bytes(b"")
    with pytest.raises(DataError) as e:
        list(Loader(image_folder(tmp_path, holdout=0.0, memory=0), 1, workers=2))
    one_line(e, tmp_path / "b.png", "cannot be read")
    assert str(e.value).startswith(str(tmp_path))


# the loader

RESUME = """
import sys, torch
from optgen.data.images import digits
from optgen.data.loading import Loader
for kind in ("static", "dynamic"):
    loader = Loader(digits("test"), 300, binarize=kind, seed=3)
    loader.load_state_dict(torch.load(f"{sys.argv[1]}/{kind}.state", weights_only=True))
    torch.save([tuple(b) for _ in range(2) for b in loader], f"{sys.argv[1]}/{kind}.out")
"""


def test_another_process_goes_on_bit_for_bit(tmp_path):
    want = {}
    for kind in ("static", "dynamic"):
        it = iter(loader := Loader(digits("test"), 300, binarize=kind, seed=3))
        for _ in range(4):
            next(it)
        torch.save(loader.state_dict(), tmp_path / f"{kind}.state")
        want[kind] = [*it, *loader]
    subprocess.run([sys.executable, "-c", RESUME, tmp_path], check=True)
    for kind, batches in want.items():
        got = torch.load(tmp_path / f"{kind}.out", weights_only=True)
        assert len(got) == len(batches) == 10 and all(
            torch.equal(p, q) for a, b in zip(got, batches) for p, q in zip(a, b)
        )


def test_a_state_is_integers_and_tensors():
    for binarize in (None, "static", "dynamic"):
        state = Loader(digits("test"), 100, binarize=binarize).state_dict()
        assert all(isinstance(v, (int, torch.Tensor)) for v in state.values())


def test_a_state_does_not_change_as_the_loader_goes_on():
    loader = Loader(digits("test"), 500, binarize="dynamic")
    state = loader.state_dict()
    kept = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
    list(loader), list(loader)
    assert all(
        torch.equal(state[k], v) if isinstance(v, torch.Tensor) else state[k] == v
        for k, v in kept.items()
    )


@pytest.mark.parametrize(
    "change",
    [
        dict(batch_size=10),
        dict(seed=1),
        dict(shuffle=False),
        dict(drop_last=True),
        dict(binarize="static"),
        dict(static_seed=4),
    ],
)
def test_a_state_of_another_loader_is_refused(change):
    make = lambda **kw: Loader(digits("test"), **{"batch_size": 100, "binarize": "dynamic", **kw})
    with pytest.raises(DataError) as e:
        make().load_state_dict(make(**change).state_dict())
    one_line(
        e, "loader state", "saved", next(iter(change)) if "binarize" not in change else "static"
    )


def test_a_state_of_other_data_or_none_is_refused():
    train, test = (Loader(digits(s), 100) for s in ("train", "test"))
    with pytest.raises(DataError) as e:
        test.load_state_dict(train.state_dict())
    one_line(e, "data: saved")
    for bad in (
        {},
        {**test.state_dict(), "batch": 21},
        {k: v for k, v in test.state_dict().items() if k != "start"},
    ):
        with pytest.raises(DataError) as e:
            test.load_state_dict(bad)
        one_line(e, "loader state")


def test_breaking_off_an_epoch_starts_a_new_one():
    loader = Loader(digits("test"), 100)
    for _ in loader:
        break
    assert loader.epoch == 0 and len(torch.cat([b.y for b in loader])) == 2000 and loader.epoch == 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("binarize", [None, "static", "dynamic"])
def test_cuda_serves_the_same_without_waiting(binarize):
    here, there = (
        Loader(digits("test"), 100, binarize=binarize, device=d) for d in ("cpu", "cuda")
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = list(there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = list(here)
    assert all(b.x.is_cuda and b.y.is_cuda for b in got)
    assert all(torch.equal(a.y, b.y.cpu()) for a, b in zip(want, got))
    if (
        binarize != "dynamic"
    ):  # a GPU may divide by 255 through the reciprocal: one unit in the last place
        for a, b in zip(want, got):
            torch.testing.assert_close(b.x.cpu(), a.x, rtol=torch.finfo(a.x.dtype).eps, atol=0.0)
    state, rest = there.state_dict(), list(there)
    again = Loader(digits("test"), 100, binarize=binarize, device="cuda")
    again.load_state_dict(state)
    assert all(torch.equal(a.x, b.x) for a, b in zip(rest, again))


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_stacks_are_images_with_their_numbers(channels):
    source = digits("test")
    few = stacked_digits(source, 50, channels, seed=channels)
    at = {x.numpy().tobytes(): y for x, y in zip(source.images, source.labels.tolist())}
    for x, y in zip(few.images, few.labels.tolist()):
        assert int("".join(str(at[c.numpy().tobytes()]) for c in x)) == y
    assert few.shape == (channels, 28, 28) and torch.equal(
        few.labels, stacked_digits(source, 50, channels, seed=channels).labels
    )
    assert next(iter(Loader(few, 10))).x.shape == (10, channels, 28, 28)


def test_only_grey_images_with_labels_are_stacked():
    for bad, word in (
        (lambda: stacked_digits(stacked_digits(digits("test"), 9)), "grey"),
        (lambda: stacked_digits(Images(digits("test").images)), "labels"),
        (lambda: stacked_digits(digits("test"), 0), "no image"),
    ):
        with pytest.raises(DataError) as e:
            bad()
        one_line(e, word)


@pytest.mark.cuda
def test_stacks_are_the_same_on_every_device():
    source = digits("test")
    there = stacked_digits(Images(source.images.cuda(), source.labels.cuda()), 99)
    assert there.images.is_cuda and torch.equal(
        there.images.cpu(), stacked_digits(source, 99).images
    )


# sequences


def small_source(seed=0, dtype=torch.float64, **sizes):
    return SyntheticSequences(
        seed, **{"vocab": 4, "length": 3, "hidden": 8, "embed": 5, **sizes}, dtype=dtype
    )


@pytest.mark.parametrize("seed", range(4))
def test_sequences_have_the_likelihood_they_are_drawn_with(seed):
    source, every = small_source(seed), torch.cartesian_prod(*[torch.arange(4)] * 3)
    log_p, mean, cov = source.posterior(every, points=41)
    p = log_p.exp()
    assert abs(p.sum() - 1) < 1e-3
    x, z = source.sample(5000, torch.Generator().manual_seed(seed))
    assert x.shape == (5000, 3) and z.shape == (5000, 2) and 0 <= x.min() and x.max() < 4
    which = x @ torch.tensor([16, 4, 1])
    want = 5000 * p
    often = want > 10
    count = which.bincount(minlength=64)
    assert (
        abs(((count - want)[often] ** 2 / want[often]).sum() - often.sum())
        < 5 * (2 * often.sum()) ** 0.5
    )
    off = z - mean[which]  # what is left of z once x is known
    assert_mean(off, 0.0)
    assert_mean(off[:, :, None] * off[:, None] - cov[which], 0.0)


def test_a_sequences_likelihood_is_the_sum_of_its_tokens():
    source, (x, z) = small_source(), small_source().sample(7, torch.Generator().manual_seed(0))
    state, before, total = None, torch.full((7, 1), source.vocab), 0.0
    for t in range(3):
        logits, state = source(before, z, state)
        before = x[:, t : t + 1]
        total = total + logits[:, 0].log_softmax(-1).gather(1, before)[:, 0]
    assert torch.allclose(source.log_likelihood(x, z), total, rtol=1e-12)
    many = torch.stack([z, z.flip(0), 2 * z])
    found = source.log_likelihood(x, many)
    assert found.shape == (3, 7) and torch.allclose(
        found[2], source.log_likelihood(x, 2 * z), rtol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_posterior_does_not_depend_on_the_chunk(dtype):
    source = small_source(1, dtype)
    x, _ = source.sample(5, torch.Generator().manual_seed(1))
    want = source.posterior(x, chunk=10**6)
    for chunk in (1, 700, 1300):
        assert all(
            torch.allclose(a, b, rtol=1e-4, atol=1e-4)
            for a, b in zip(source.posterior(x, chunk=chunk), want)
        )
    assert (
        [tuple(t.shape) for t in want] == [(5,), (5, 2), (5, 2, 2)]
        and want[0].dtype == dtype
        and torch.equal(want[0], source.log_marginal(x, chunk=10**6))
    )
    assert source.posterior(x[:0].new_zeros(1, 3))[0].isfinite().all()


def test_splits_of_sequences_repeat_and_differ():
    before = torch.random.get_rng_state()
    a, b, c = (
        synthetic_sequences("test"),
        synthetic_sequences("valid"),
        synthetic_sequences("test", seed=1),
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert (
        len(a) == len(b) == 2000
        and a.images.dtype == torch.int64
        and a.shape == (10,)
        and 0 <= a.images.min()
        and a.images.max() < 1000
        and len(a.images.unique()) > 500
    )
    assert (
        len({s.fingerprint for s in (a, b, c)}) == 3
        and a.fingerprint == synthetic_sequences("test").fingerprint
    )
    torch.set_default_dtype(torch.float64)
    try:
        assert a.fingerprint == synthetic_sequences("test").fingerprint
    finally:
        torch.set_default_dtype(torch.float32)
    rest, held = split_holdout(a, 0.25)
    assert len(rest) == 1500 and type(held) is Sequences and held.split == "test"


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: Sequences(torch.zeros(3, 4)), ("float32", "int64 (N, T)")),
        (lambda: Sequences(torch.zeros(3, 4, 1, dtype=torch.int64)), ("int64 (N, T)",)),
        (lambda: Sequences(torch.tensor([[0, -7]])), ("-7",)),
        (lambda: Sequences(torch.tensor([[0]]), split="dev"), ("dev", "valid")),
        (lambda: Loader(Sequences(torch.tensor([[0]])), 1, binarize="dynamic"), ("tokens",)),
        (lambda: synthetic_sequences("dev"), ("dev", "valid")),
        (lambda: SyntheticSequences(length=0), ("length=0",)),
        (
            lambda: small_source().posterior(torch.zeros(1, 3, dtype=torch.int64), rounds=0),
            ("rounds=0",),
        ),
    ],
)
def test_bad_sequences_are_refused(call, words):
    with pytest.raises(DataError) as e:
        call()
    one_line(e, *words)


class Unigram(torch.nn.Module):
    def __init__(self, vocab):
        super().__init__()
        self.logits, self.drop = torch.nn.Parameter(torch.zeros(vocab)), torch.nn.Dropout(0.1)

    def forward(self, x):
        return -self.drop(self.logits).log_softmax(0)[x].sum(1)


def unigram():
    model = Unigram(1000)
    game = Game(model=Player(model, lambda b: model(b.x).mean(), SGD(model.parameters(), lr=2.0)))
    game.evaluate = lambda batches: {"loss": torch.cat([model(b.x) for b in batches]).mean().item()}
    return game, model


def test_sequences_train_and_resume_bit_for_bit(tmp_path):
    train, valid = synthetic_sequences("valid"), synthetic_sequences("test")

    def run(out, epochs, resume=False):
        game, model = unigram()
        records = fit(
            game,
            train,
            epochs=epochs,
            valid=valid,
            out=tmp_path / out,
            resume=resume,
            seed=3,
            samples=0,
            progress="none",
        )
        return model.logits.detach(), [r["valid"]["loss"] for r in records]

    want, losses = run("whole", 3)
    run("parts", 2)
    got, again = run("parts", 3, resume=True)
    assert torch.equal(got, want) and again == losses and losses[-1] < 69


@pytest.mark.cuda
def test_sequences_on_the_device():
    here, there = small_source(2), small_source(2).cuda()
    x, z = here.sample(9, torch.Generator().manual_seed(0))
    assert torch.allclose(
        there.log_likelihood(x.cuda(), z.cuda()).cpu(), here.log_likelihood(x, z), rtol=1e-9
    )
    assert torch.allclose(there.log_marginal(x.cuda()).cpu(), here.log_marginal(x), rtol=1e-7)
    assert there.sample(5, torch.Generator("cuda").manual_seed(0))[0].is_cuda and torch.equal(
        SyntheticSequences(2, device="cuda").head.weight.cpu(), SyntheticSequences(2).head.weight
    )
    held = synthetic_sequences("test")
    batch = next(iter(Loader(held, 50, device="cuda", shuffle=False)))
    assert batch.x.is_cuda and torch.equal(batch.x.cpu(), held.images[:50])
