"Ranks that bring their own parts of a batch, or slices of a joined one, against one process."

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from PIL import Image
from shards import SCHEMES

from optgen.training.sharding import ShardAveraging, rank_slice
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
