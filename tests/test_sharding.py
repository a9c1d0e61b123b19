"Ranks that bring their own parts of a batch, or slices of a joined one, against one process."

import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from shards import SCHEMES
from torch import nn

from optgen.testing import generator
from optgen.training.sharding import (
    RankError,
    RowGathering,
    ShardAveraging,
    SharedRandom,
    rank_slice,
)
from spread import RULES

pytestmark = pytest.mark.skipif(os.name != "posix", reason="ranks are forked as POSIX does")
FILES = 53


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """What shards.py left."""
    out = tmp_path_factory.mktemp("shards")
    (out / "images").mkdir()
    g = torch.Generator().manual_seed(0)
    for i in range(FILES):
        pixels = torch.randint(256, (8, 8), generator=g, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(out / f"images/{i:02d}.png")
    done = subprocess.run(
        [sys.executable, os.path.join(os.path.dirname(__file__), "shards.py"), out],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    for name, launched in json.loads((out / "outcomes.json").read_text()).items():
        assert set(launched["codes"]) == {0}, (name, launched["said"])
    return out


def results(job, world):
    """Return what each of `world` ranks left."""
    return [torch.load(job / f"{rank}-of-{world}.pt") for rank in range(world)]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("part", ["rules", "schemes"])
def test_ranks_follow_one_process(job, part, sharded, world):
    (one,), ranks = results(job, 1), results(job, world)
    names = [
        name for name in (RULES if part == "rules" else SCHEMES) if (name, sharded) in ranks[0]
    ]
    assert len(names) >= (6 if part == "rules" else 5)
    for name in names:
        expected = one[name, False]
        for found in (rank[name, sharded] for rank in ranks):
            assert torch.equal(found, ranks[0][name, sharded]), name
            assert (found - expected).abs().max() < 1e-12 * expected.abs().max(), name


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_loop_of_own_parts_goes_on_bit_for_bit(job, world):
    (one,) = results(job, 1)
    for rank in results(job, world):
        assert torch.equal(rank["resumed", True], rank["whole", True])
        assert (rank["whole", True] - one["whole", True]).abs().max() < 1e-12


@pytest.mark.parametrize("world", [2, 3])
def test_what_cannot_be_joined_is_named(job, world):
    for rank in range(world):
        found = json.loads((job / f"mistakes-{rank}-of-{world}.json").read_text())
        assert "another batch" in found["different"] and "sharded=True" in found["different"]
        assert "can't be joined" in found["mixed"] and "float" in found["mixed"]
        assert found["own parts"] == [True, False]
        (said,) = found["alone"]
        assert f"one of {world} processes" in said and "distribute(game)" in said


def test_a_process_group_that_comes_later_is_noticed_once(job):
    for rank in range(2):
        before, said, world = json.loads((job / f"late-{rank}.json").read_text())
        assert before == 0 and len(said) == 1 and "one of 2 processes" in said[0] and world == 2


@pytest.mark.parametrize("world", [2, 3])
def test_each_rank_decodes_its_own_part(job, world):
    ((one, whole),) = [torch.load(job / "read1-0.pt")]
    ranks = [torch.load(job / f"read{world}-{rank}.pt") for rank in range(world)]
    assert len(whole) == len(set(whole)) > 40
    for weights, decoded in ranks:
        assert (weights - one).abs().max() < 1e-12 and torch.equal(weights, ranks[0][0])
        assert abs(len(decoded) - len(whole) / world) <= 6
    assert Counter(whole) == sum((Counter(decoded) for _, decoded in ranks), Counter())


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("n", [1, 4, 7, 12])
def test_a_rank_reads_what_it_slices(n, world):
    for rank in range(world):
        ranks = ShardAveraging()
        ranks.rank, ranks.world = rank, world
        rows, share = rank_slice(n, rank, world)
        part = ranks.shard(torch.arange(n))
        assert part.tolist() == list(range(n))[rows] and ranks.share == share


@pytest.mark.parametrize("world", [2, 3])
def test_fit_joins_the_parts_of_a_distributed_sampler(job, world):
    weights, losses, examples = torch.load(job / f"own{world}-alone.pt")
    for rank in range(world):
        own, reported, counted = torch.load(job / f"own{world}-{rank}.pt")
        assert (own - weights).norm() < 1e-12 * weights.norm()
        assert reported == pytest.approx(losses, rel=1e-12)
        assert counted == examples  # of all ranks, by the speed that is reported


# Ranks that are threads of this process, so that what they exchange is seen here.


class Thread(ShardAveraging, RowGathering, SharedRandom):
    """A rank of threads that exchange tensors through a list."""

    control = None

    def __init__(self, rank, world, barrier, posted):
        self.rank, self.world, self.barrier, self.posted = rank, world, barrier, posted

    def exchange(self, own):
        """Return what every rank gives."""
        self.posted[self.rank] = own
        self.barrier.wait(30)
        found = list(self.posted)
        self.barrier.wait(30)
        return found

    def call(self, function, found, own, group=None):
        """Gather equal tensors of all ranks."""
        parts = self.exchange(own.clone())
        assert len({(x.shape, x.dtype) for x in parts}) == 1
        for here, part in zip(found, parts):
            here.copy_(part)

    def reduce(self, flat, op):
        """Sum over the ranks."""
        flat.copy_(sum(self.exchange(flat.clone())))


def on_threads(world, work):
    """Return what `work` returns on each of `world` ranks."""
    barrier, posted = Barrier(world), [None] * world
    ranks = [Thread(rank, world, barrier, posted) for rank in range(world)]
    with ThreadPoolExecutor(world) as pool:
        return [f.result() for f in [pool.submit(work, rank) for rank in ranks]]


@pytest.mark.parametrize("n, world", [(7, 3), (12, 4), (2, 5), (1, 3)])
def test_means_of_slices_are_means_of_rows(n, world):
    """A rank without rows computes on a lent one, which does not count."""
    x = torch.randn(n, 3, generator=generator(n), dtype=torch.float64)
    labels = torch.arange(n)

    def work(rank):
        part = rank.shard((x, labels))
        assert len(part[0]) == len(part[1]) >= 1
        return rank.share, rank.mean([part[0].mean(0), part[0].square().mean()])

    done = on_threads(world, work)
    assert sum(share for share, _ in done) == pytest.approx(1)
    for _, (mean, square) in done:
        assert torch.allclose(mean, x.mean(0)) and torch.allclose(square, x.square().mean())


def test_a_tensor_that_no_rank_has_stays_none():
    big = torch.full((2,), 60000.0, dtype=torch.float16)
    like = [torch.zeros(3), torch.zeros(2), torch.zeros(2, dtype=torch.float16)]

    def work(rank):
        rank.share = (0.5, 0.25, 0.25)[rank.rank]
        some = torch.full((2,), 8.0) if rank.rank == 1 else None
        return rank.mean([None, some, big], like) + rank.mean([big.double(), big])

    for none, some, half, wide, narrow in on_threads(3, work):
        assert none is None and torch.equal(some, torch.full((2,), 2.0))
        assert torch.equal(half, big) and torch.equal(wide, big.double())
        assert torch.equal(narrow, big) and narrow.dtype == torch.float16


def test_means_of_narrow_numbers_are_rounded_once():
    """The numbers lie in [1, 2), where float16 has steps of 2^-10."""
    numbers = (1 + torch.rand(3, 500, generator=generator(2))).half().clamp(max=1.99)
    shares = (0.5, 0.3, 0.2)

    def work(rank):
        rank.share = shares[rank.rank]
        return rank.mean([numbers[rank.rank]])[0]

    expected = torch.tensor(shares, dtype=torch.float64) @ numbers.double()
    for mean in on_threads(3, work):
        assert mean.dtype == torch.float16
        assert (mean.double() - expected).abs().max() < 0.501 * 2**-10


@pytest.mark.parametrize("counts", [(2, 3, 1), (0, 2, 0), (1, 1, 4)])
def test_rows_of_all_ranks_are_in_their_order(counts):
    parts = torch.randn(sum(counts), 2, generator=generator(5)).split(counts)

    def work(rank):
        own = parts[rank.rank]
        rank.share = 0.0 if rank.rank == 1 else 0.5
        scale = torch.tensor(rank.rank + 7)
        joined = rank.gather_rows([own, scale, torch.arange(len(own)) + 10 * rank.rank])
        return joined, rank.gather_part([own])

    numbers = [10 * rank + i for rank, count in enumerate(counts) for i in range(count)]
    for (rows, scale, order), (unlent,) in on_threads(3, work):
        assert torch.equal(rows, torch.cat(parts)) and order.tolist() == numbers
        assert scale.shape == () and scale.item() == 7  # rank 0's
        assert torch.equal(unlent, torch.cat([parts[0], parts[2]]))


@pytest.mark.parametrize("other", [torch.zeros(2, 3).double(), torch.zeros(2, 4)])
def test_parts_of_another_kind_are_refused_on_every_rank(other):
    def work(rank):
        with pytest.raises(RankError, match="can't be joined"):
            rank.gather_rows([other if rank.rank else torch.zeros(2, 3)])
        return True

    assert on_threads(2, work) == [True, True]


@pytest.mark.parametrize("number", [0, 1])
def test_other_ranks_draw_with_the_numbers_of_the_first_and_keep_their_own(number):
    net = nn.Linear(1, 1)
    player = SimpleNamespace(named_tensors=lambda: iter(net.named_parameters()))
    game = SimpleNamespace(players={"model": player})
    rank = Thread(number, 2, None, None)
    with torch.random.fork_rng(devices=()):
        first = torch.manual_seed(11).get_state()
        expected = torch.randn(6)
        rank.broadcast = lambda states: [first]
        torch.manual_seed(11 if number == 0 else 12)
        with rank.random_of_first(game):
            drawn = torch.randn(3)
        after = torch.randn(3)
        torch.manual_seed(12)
        own = expected[3:] if number == 0 else torch.randn(3)
    assert torch.equal(drawn, expected[:3])
    assert torch.equal(after, own)
