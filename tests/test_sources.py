"Data of any kind: what a training makes of them, and how a reading of them is resumed."

import json
import os
import random
import subprocess
import sys
import warnings
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_faults import assert_same
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)
from torchvision.transforms import ToTensor

from data_helpers import refuses
from optgen.data.images import Batch, Images, digits
from optgen.data.sources import as_loader
from optgen.data.toy import two_moons
from optgen.games import Game, Player
from optgen.models.vae import VAE, GaussianVAE
from optgen.schemes.elbo import BetaVAE
from optgen.testing import generator
from optgen.training.checkpoint import check_plain
from optgen.training.trainer import fit

KILLER = Path(__file__).with_name("foreign_killer.py")
DIGITS = digits("train").subset(torch.arange(230))
GRAY = DIGITS.images / 255


def scheme(model=None):
    """Return a VAE whose first weights are always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BetaVAE(model or VAE(784, 16, 8, 2))


def weights(s):
    """Return the weights of a scheme as one vector."""
    return torch.cat([p.detach().flatten() for p in s.model.parameters()])


def trained(data, **options):
    """Return the weights after two epochs on data."""
    s = scheme()
    fit(s, data, epochs=2, progress="none", **options)
    return weights(s)


class Noisy(Dataset):
    """Numbers with random transforms that draw from every generator of the process."""

    def __init__(self, n=50):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return torch.tensor([float(i), torch.rand(()).item(), np.random.rand(), random.random()])


class Stream(IterableDataset):
    """The same numbers, without an index."""

    def __iter__(self):
        return map(Noisy().__getitem__, range(50))


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX's")
def test_killed_in_mid_epoch_it_is_the_run_that_was_not(tmp_path):
    pytest.importorskip("torchdata")
    kinds = ("dataset", "loader", "stateful", "stream", "stateful-stream")
    names = [f"{kind}-{workers}" for kind in kinds for workers in (0, 2)]
    done = subprocess.run(
        [sys.executable, KILLER, tmp_path, "[5, 15, 20]", *names],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == dict.fromkeys(names, 3)
    for name in names:
        assert_same(tmp_path / f"{name}-killed", tmp_path / f"{name}-whole")
        said = json.loads((tmp_path / f"{name}-killed" / "said.json").read_text())
        assert len(said) == name.startswith("stream-")  # said once, by the one that can't


def through_file(state):
    """Return a state as it is after it was saved and read without running code."""
    check_plain(state)
    buffer = BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def read(make, n, stops=()):
    """Return `n` batches, epoch by epoch, read by a new loader after each number of batches."""
    loader, batches = make(), []
    while len(batches) < n:
        for batch in loader:
            batches.append(batch.x)
            if len(batches) in (n, *stops):
                break
        if len(batches) in stops:
            state = through_file(loader.state_dict())
            loader = make()
            loader.load_state_dict(state)
            stops = [stop for stop in stops if stop != len(batches)]
    return batches


def sampled(data, seed):
    """Return a sampler with a generator of its own."""
    return RandomSampler(data, generator=generator(seed))


WEIGHTS = torch.rand(50, generator=generator(1))
LOADERS = {
    "data set": lambda w: as_loader(Noisy(), 16, seed=4, workers=w),
    "subset": lambda w: as_loader(Subset(Noisy(), range(3, 45)), 16, seed=4, workers=w),
    "shuffled": lambda w: DataLoader(Noisy(), 16, shuffle=True, num_workers=w),
    "generator": lambda w: DataLoader(
        Noisy(), 16, shuffle=True, num_workers=w, generator=generator(2)
    ),
    "sampler": lambda w: DataLoader(Noisy(), 16, sampler=sampled(Noisy(), 3), num_workers=w),
    "weighted": lambda w: DataLoader(
        Noisy(), 16, sampler=WeightedRandomSampler(WEIGHTS, 50), num_workers=w, drop_last=True
    ),
    "single": lambda w: DataLoader(Noisy(4), None, shuffle=True, num_workers=w),
    "stream": lambda w: DataLoader(Stream(), 16, num_workers=w),
}


@pytest.mark.filterwarnings("ignore:.*resumed by epoch")
@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("kind", LOADERS)
def test_a_reading_that_is_resumed_anywhere_is_the_one_that_was_not(kind, seed):
    def make(workers=0):
        """Return a new loader in a process whose generators are anywhere."""
        torch.seed()
        random.seed()
        np.random.seed()
        return as_loader(LOADERS[kind](workers), seed=seed)

    whole = read(make, 10)
    for stops in ([1], [3], [4], [5, 9], [2, 3, 6]):
        torch.testing.assert_close(read(make, 10, stops), whole, rtol=0, atol=0)
    assert len({x.flatten()[1].item() for x in whole}) == 10  # transforms differ by batch


@pytest.mark.parametrize("kind", ["data set", "generator", "weighted"])
def test_the_number_of_workers_changes_nothing(kind):
    alone, shared = (read(lambda w=w: as_loader(LOADERS[kind](w)), 6) for w in (0, 2))
    torch.testing.assert_close(shared, alone, rtol=0, atol=0)
    assert not torch.equal(alone[0], alone[3])


def test_the_generators_of_the_process_are_left_alone():
    sources = [LOADERS[kind](0) for kind in LOADERS]  # a DataLoader draws its seed when made
    before = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    for source in sources:
        list(as_loader(source))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all() and random.getstate() == before[2]


def test_training_is_the_loop_that_one_would_write():
    dataset = TensorDataset(GRAY, DIGITS.labels)
    s = scheme()
    loader = DataLoader(dataset, 50, sampler=sampled(dataset, 5))
    fit(s, loader, epochs=2, seed=9, progress="none")
    by_hand, loader = scheme(), DataLoader(dataset, 50, sampler=sampled(dataset, 5))
    with torch.random.fork_rng():
        torch.manual_seed(9)
        noise = torch.get_rng_state()
        for _ in range(2):
            for x, y in loader:  # it draws from the generator that the noise comes from
                torch.set_rng_state(noise)
                by_hand.step(Batch(x, y))
                noise = torch.get_rng_state()
    assert torch.equal(weights(s), weights(by_hand))


class Pictures(Dataset):
    """Digits as torchvision serves them: pictures and whole numbers."""

    def __init__(self, transform=None):
        self.transform = transform

    def __len__(self):
        return 230

    def __getitem__(self, i):
        picture = Image.fromarray(DIGITS.images[i, 0].numpy())
        return self.transform(picture) if self.transform else picture, int(DIGITS.labels[i])


class Named(Dataset):
    """Digits with names that no one guesses."""

    def __len__(self):
        return 230

    def __getitem__(self, i):
        return {"photo": GRAY[i], "kind": int(DIGITS.labels[i]), "file": f"{i}.png"}


def test_the_same_images_train_alike_whatever_holds_them():
    expected = trained(DIGITS)
    for data in (
        DIGITS.images,
        DIGITS.images[:, 0],
        DIGITS.images.numpy(),
        GRAY,
        GRAY.numpy(),
        (GRAY, DIGITS.labels),
        (GRAY.numpy(), DIGITS.labels.numpy()),
        {"image": GRAY, "label": DIGITS.labels},
        TensorDataset(GRAY),
        Pictures(ToTensor()),
    ):
        assert torch.equal(trained(data), expected)
    chosen = {"batch": lambda b: (b["photo"], b["kind"])}
    assert torch.equal(trained(Named(), **chosen), expected)
    assert torch.equal(trained({"photo": GRAY, "kind": DIGITS.labels}, **chosen), expected)


def test_a_split_and_a_nested_batch_train():
    net = nn.Linear(784, 10)

    def loss(batch):
        """Return the cross entropy of the classes of a dictionary."""
        assert len(batch.x["file"]) == len(batch.y)
        return nn.functional.cross_entropy(net(batch.x["photo"].flatten(1)), batch.y)

    game = Game(net=Player(net, loss, torch.optim.SGD(net.parameters(), 0.5)))
    part = random_split(Named(), [150, 80], generator(0))[0]
    records = fit(
        game, part, epochs=3, batch=lambda b: Batch(b, b["kind"]), batch_size=40, progress="none"
    )
    assert records[2]["train"]["loss"] < 0.8 * records[0]["train"]["loss"]
    assert records[2]["step"] == 12


def test_a_strided_column_trains_as_its_copy():
    """Rows of one number, cut from a table, are strided in memory."""
    table = torch.rand(40, 5, generator=generator(3))
    losses = []
    for column in (table[:, 2], table[:, 2].clone(), table.numpy()[:, 2]):
        slope = nn.Parameter(torch.zeros(()))
        player = Player([slope], partial(squared_error, slope), torch.optim.SGD([slope], 0.1))
        losses.append(fit(Game(model=player), column, epochs=2, batch_size=7, progress="none"))
    numbers = [[record["train"] for record in records] for records in losses]
    assert numbers[0] == numbers[1] == numbers[2]


def squared_error(slope, batch):
    """Return the mean squared distance of a batch of numbers from `slope`."""
    return (batch.x - slope).square().mean()


def test_vectors_are_validated_logged_and_not_drawn(tmp_path):
    xy = two_moons(300, generator=generator(0))
    s = scheme(GaussianVAE(2, 16, 16, 2, out="linear"))
    records = fit(s, xy, valid=xy, epochs=3, patience=2, out=tmp_path / "run", progress="none")
    assert records[2]["valid"]["loss"] < records[0]["valid"]["loss"]
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"best.pt", "curves.png", "metrics.jsonl"} <= names and "samples" not in names


class Unsized(IterableDataset):
    """Digits without a length."""

    def __iter__(self):
        return iter(GRAY)


def test_data_without_a_length_train_but_for_a_schedule_and_a_warmup(tmp_path, capsys):
    records = fit(
        scheme(),
        Unsized(),
        valid=Unsized(),
        epochs=2,
        batch_size=50,
        out=tmp_path / "run",
        progress="bar",
    )
    assert [r["step"] for r in records] == [5, 10]
    assert (tmp_path / "run" / "samples" / "epoch-0001.png").exists()  # known by then
    with pytest.raises(ValueError, match="schedule depends on the number of steps"):
        fit(scheme(), Unsized(), schedule=lambda t: 1 - t, progress="none")
    with pytest.raises(ValueError, match="warmup depends on the number of steps"):
        fit(scheme(), Unsized(), warmup=3, progress="none")


def ramp(low, high, where=200):
    """Return gray digits one of which, late in the set, is out of range."""
    x = GRAY.clone()
    x[where] = torch.linspace(low, high, 784).view(1, 28, 28)
    return x


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        TensorDataset,
        lambda x: DataLoader(TensorDataset(x), 50),
        lambda x: DataLoader(TensorDataset(x), 50, num_workers=1),
        lambda x: {"x": x.numpy()},
    ],
)
def test_numbers_out_of_range_are_an_error_in_any_batch(wrap):
    for bad, cause in (
        (ramp(0, 255), "x / 255"),
        (ramp(-1, 1), "(x + 1) / 2"),
        (ramp(0, torch.nan), "finite"),
    ):
        with refuses("BetaVAE", "pixels in [0, 1]", cause):
            fit(scheme(), wrap(bad), progress="none")
        with refuses("BetaVAE", "pixels in [0, 1]", cause):
            fit(scheme(), GRAY, valid=wrap(bad), progress="none")
    with refuses("BetaVAE", "pixels in [0, 1]"):
        scheme().evaluate(DataLoader(TensorDataset(ramp(0, 255), DIGITS.labels), 50))


@pytest.mark.parametrize(
    "data, options, words",
    [
        (GRAY, {"binarize": "static"}, ("binarize='static'", "floats")),
        (TensorDataset(GRAY), {"binarize": "dynamic"}, ("binarize='dynamic'", "TensorDataset")),
        (DIGITS, {"binarize": "dynamic", "valid": GRAY}, ("binarize='static'", "floats")),
        (DIGITS.images.permute(0, 2, 3, 1), {}, ("permute",)),
        (DIGITS.images.long(), {}, ("int64", "x.to(torch.uint8)")),
        (DIGITS.images.flatten(1), {}, ("uint8", "(230, 784)")),
        (DIGITS.images > 3, {}, ("bool", "x.float()")),
        (np.array(["a", "b"]), {}, ("ndarray", "numeric arrays")),
        ((GRAY, DIGITS.labels[:7]), {}, ("230 and 7 rows",)),
        (GRAY.flatten(1).to_sparse(), {}, ("sparse", "x.to_dense()")),
        (GRAY.flatten(1).T[3], {}, ("BetaVAE", "expected (B, ...)")),
        (TensorDataset(GRAY), {"batch": "photo"}, ("batch=", "'photo'", "batch=lambda")),
        ((GRAY, DIGITS.labels, GRAY), {}, ("length 3", "batch=lambda")),
        (TensorDataset(GRAY, GRAY, GRAY), {}, ("length 3", "batch=lambda")),
        (Named(), {}, ("'photo', 'kind', 'file'", "batch=lambda")),
        (Named(), {"batch": lambda b: b["file"]}, ("batch=", "list of length")),
        (DIGITS, {"batch": lambda b: b}, ("batch=", "leave it out")),
        (Pictures(), {}, ("Pictures", "PIL", "ToTensor()")),
        (TensorDataset(DIGITS.images), {}, ("x / 255",)),
        (iter([GRAY]), {}, ("exhausted after one epoch",)),
        (DataLoader(TensorDataset(GRAY[:3]), 10, drop_last=True), {}, ("no batch",)),
        (TensorDataset(GRAY[:0]), {}, ("no batch",)),
        ([GRAY, GRAY], {}, ("list of length 2", "DataLoader")),
        ("digits", {}, ("str", "load('digits')")),
        (None, {}, ("NoneType", "Dataset")),
    ],
    ids=lambda value: None,
)
def test_mistakes_are_one_line(data, options, words):
    if isinstance(data, Pictures):
        words = ("Pictures", "cannot be made into a batch", "ToTensor()")
    with refuses(*words):
        fit(scheme(), data, progress="none", **options)


def test_other_data_of_the_same_length_are_refused(tmp_path):
    changed = TensorDataset(GRAY.flip(0))
    for data, other in (
        (TensorDataset(GRAY), changed),
        (
            DataLoader(TensorDataset(GRAY), 100, shuffle=True),
            DataLoader(changed, 100, shuffle=True),
        ),
        (GRAY, GRAY.flip(0)),
    ):
        out = tmp_path / type(data).__name__
        fit(scheme(), data, out=out, progress="none", samples=0)
        with refuses("belongs to another loader", "data: saved"):
            fit(scheme(), other, epochs=2, out=out, resume=True, progress="none", samples=0)
        fit(scheme(), data, epochs=2, out=out, resume=True, progress="none", samples=0)


class Drifting(IterableDataset):
    """Numbers that are never the same again."""

    count = 0

    def __iter__(self):
        for _ in range(6):
            Drifting.count += 1
            yield torch.tensor([float(Drifting.count)])


def test_a_loader_that_never_gives_the_same_again_says_so():
    def make():
        """Return a loader of the drifting numbers."""
        return as_loader(DataLoader(Drifting(), 2))

    loader, resumed = make(), make()
    next(iter(loader))
    resumed.load_state_dict(loader.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(list(resumed)) == 2
    texts = [str(w.message) for w in caught]
    assert "resumed by epoch" in texts[0] and "optgen[loaders]" in texts[0]
    assert "does not give the same batches again" in texts[1] and len(texts) == 2


class Opaque:
    """A loader whose state cannot be saved."""

    def __iter__(self):
        return iter([GRAY])

    def state_dict(self):
        """Return what no checkpoint holds."""
        return {"place": {1, 2}}

    def load_state_dict(self, state):
        """Continue from a state."""


def test_a_state_that_cannot_be_saved_is_one_error(tmp_path):
    with refuses("holds a set at state['place']", "let state_dict return"):
        fit(scheme(), Opaque(), out=tmp_path / "run", progress="none")


def test_images_of_the_package_need_no_loader_of_others():
    assert as_loader(Images(DIGITS.images), 50).state_dict().keys() >= {"static", "dynamic"}
    assert as_loader(torch.arange(60).view(20, 3), 5).data.max_value is None


@pytest.mark.parametrize("n, drop_last", [(230, False), (230, True), (200, False), (30, False)])
def test_what_a_loader_says_of_its_epochs_is_so(n, drop_last):
    data = TensorDataset(GRAY[:n])
    sampler = sampled(data, 1)
    for loader in (
        as_loader(GRAY[:n], 50, drop_last=drop_last),
        as_loader(data, 50, drop_last=drop_last),
        as_loader(DataLoader(data, 50, sampler=sampler, drop_last=drop_last)),
    ):
        sizes = [len(batch.x) for batch in loader]
        said = loader.steps, loader.examples, loader.last_batch_size
        assert said == (len(sizes), sum(sizes), sizes[-1]) and loader.shape == (1, 28, 28)


# Orders, epochs and options, against torch's own loaders


def numbers_of(loader, epochs):
    """Return the first number of every example, epoch by epoch."""
    return [torch.cat([batch.x[:, 0] for batch in loader]).tolist() for _ in range(epochs)]


NUMBERS = TensorDataset(torch.arange(20.0)[:, None])


@pytest.mark.parametrize("kind", ["separate", "stream"])
def test_epochs_and_seeds_have_orders_of_their_own(kind):
    """A shuffled loader without a generator is seeded by the run, an iterable one too."""

    class Shuffled(IterableDataset):
        def __iter__(self):
            return iter(torch.randperm(20).float()[:, None])

    data = NUMBERS if kind == "separate" else Shuffled()
    orders = []
    for seed in (0, 1):
        loader = as_loader(DataLoader(data, 6, shuffle=kind == "separate" or None), seed=seed)
        orders += numbers_of(loader, 3)
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6


class Mine(DataLoader):
    """A loader with a reading of its own, which is not taken apart."""

    def __iter__(self):
        return super().__iter__()


@pytest.mark.parametrize("kind", [DataLoader, Mine])
def test_a_distributed_sampler_has_the_orders_of_its_epochs(kind):
    own, given = (DistributedSampler(NUMBERS, 2, rank=1, shuffle=True, seed=3) for _ in range(2))
    expected = []
    for epoch in range(3):
        own.set_epoch(epoch)
        expected.append([float(i) for i in own])
    assert numbers_of(as_loader(kind(NUMBERS, 4, sampler=given)), 3) == expected


@pytest.mark.parametrize("stop", [2, 6])
def test_a_sampler_and_a_loader_with_generators_of_their_own_go_on(stop):
    """The loader's generator is not the sampler's, and is moved once an epoch too."""

    def make():
        random = sampled(NUMBERS, 3)
        return as_loader(DataLoader(NUMBERS, 5, sampler=random, generator=generator(8)))

    whole = read(make, 9)
    torch.testing.assert_close(read(make, 9, [stop]), whole, rtol=0, atol=0)


class LateDrift(IterableDataset):
    """Numbers of which one is another one at each reading."""

    def __init__(self, place):
        self.place, self.readings = place, 0

    def __iter__(self):
        self.readings += 1
        for i in range(6):
            yield torch.tensor([float(i) + (i == self.place) * 0.5 * self.readings])


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("place, is_noticed", [(0, True), (2, True), (5, False)])
def test_the_first_and_the_last_batch_that_are_read_again_are_compared(place, is_noticed):
    data = LateDrift(place)
    loader, resumed = (as_loader(DataLoader(data, 1)) for _ in range(2))
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    resumed.load_state_dict(loader.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rest = torch.cat([batch.x for batch in resumed]).flatten()
    assert rest[:2].tolist() == [3, 4] and len(rest) == 3
    again = [w for w in caught if "does not give the same batches again" in str(w.message)]
    assert len(again) == is_noticed


def test_options_of_tensors_and_data_sets_hold():
    x = torch.arange(20.0)[:, None]
    for data in (x, NUMBERS):
        orders = [numbers_of(as_loader(data, 6, seed=seed), 1)[0] for seed in (0, 0, 1)]
        assert orders[0] == orders[1] != orders[2]
        assert len(numbers_of(as_loader(data, 6, drop_last=True), 1)[0]) == 18
        assert numbers_of(as_loader(data, 6, shuffle=False), 2) == [list(range(20))] * 2
        one, other = as_loader(data, 6, seed=0), as_loader(data, 6, seed=1)
        with refuses("belongs to another loader", "seed: saved 0"):
            other.load_state_dict(one.state_dict())
    stream = [len(batch.x) for batch in as_loader(Stream(), 16, drop_last=True)]
    assert stream == [16] * 3
    transformed = [
        torch.cat([batch.x for batch in as_loader(Noisy(), 50, shuffle=False, seed=seed)])
        for seed in (0, 0, 1)
    ]
    assert torch.equal(*transformed[:2]) and (transformed[0] != transformed[2])[:, 1:].any()
    assert torch.equal(transformed[0][:, 0], transformed[2][:, 0])


def test_what_a_scheme_sees_of_tensors():
    x = torch.rand(8, 3, generator=generator(0))
    assert torch.equal(as_loader((x, torch.arange(8))).data.labels, torch.arange(8))
    for y in (x, torch.arange(16).view(8, 2), torch.arange(8).int()):  # targets, not labels
        assert as_loader((x, y)).data.labels is None
    flat = as_loader(DIGITS.images[:, 0], 230, shuffle=False)
    assert torch.equal(next(iter(flat)).x, DIGITS.images / 255)
    tokens = torch.randint(5, (8, 7), generator=generator(0))
    assert next(iter(as_loader(tokens, 8, shuffle=False))).x.tolist() == tokens.tolist()
    for wrong in (torch.arange(8), torch.arange(16).view(4, 2, 2)):
        with refuses("int64 tokens (N, T)"):
            as_loader(wrong)
    with refuses("flip=True", "floats"):
        as_loader(x, flip=True)
    with refuses("8 and 7 rows"):
        as_loader((x, torch.arange(7)))
