"""Design from examples and values: weights, trust region, rounds and budget, against the papers."""

import copy
import math

import pytest
import torch
from scipy.stats import chi2

from optgen.design import (
    CbAS,
    Designed,
    KnownExamples,
    LatentSearch,
    Retraining,
    bin_values,
    count_distinct,
    design,
    design_offline,
    importance_weights,
    nearest_distance,
    retraining_weights,
    sample_size,
    train_weighted,
)
from optgen.models.diffusion import Denoiser, PerceptronDenoiser
from optgen.models.vae import VAE
from optgen.schemes.denoising import DenoisingDiffusion
from optgen.schemes.elbo import BetaVAE
from optgen.testing import generator, randn


def scheme_of(seed=0, x_dim=6, z_dim=3):
    "Return a small VAE whose weights come from a seed."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BetaVAE(VAE(x_dim, 16, 8, z_dim))


def data_of(seed, n=40):
    "Return examples in [0, 1] and the values of `total`."
    x = torch.rand(n, 6, generator=generator(seed))
    return x, total(x)


def total(x):
    "Return minus the sum of the numbers."
    return -x.flatten(1).sum(1)


METHODS = {
    "latent": LatentSearch(0.4),
    "retraining": Retraining(rounds=4, steps=3, batch_size=8),
    "cbas": CbAS(0.3, rounds=4, steps=3, batch_size=8),
}


@pytest.mark.parametrize("k", [1e-3, 0.2, 5.0])
@pytest.mark.parametrize("seed", [1, 2])
def test_retraining_weights_are_those_of_the_paper(k, seed):
    values = torch.randn(9, generator=generator(seed), dtype=torch.float64)
    found = retraining_weights(values, k)
    raw = []
    for value in values.tolist():
        rank = sum(other < value for other in values.tolist())
        raw.append(1 / (k * 9 + rank))
    assert found.tolist() == pytest.approx([w / sum(raw) for w in raw], rel=1e-12)
    values[4] = math.nan
    assert retraining_weights(values, k).argmin() == 4


def test_the_ratio_of_two_vaes_is_that_of_their_pixels():
    first, model = scheme_of(1).model.double(), scheme_of(2).model.double()
    x, z = torch.rand(8, 6, generator=generator(3), dtype=torch.float64), randn(8, 3, seed=4)
    every = torch.ones(8, dtype=torch.bool)
    found, ratios = importance_weights(first, model, x, z, every), []
    for row, latent in zip(x, z):
        p, q = (m.decoder(latent[None])[0] for m in (first, model))
        nats = row * (p.log() - q.log()) + (1 - row) * ((1 - p).log() - (1 - q).log())
        ratios.append(nats.sum().exp().item())
    assert found.tolist() == pytest.approx([r / max(ratios) for r in ratios], rel=1e-9)
    chosen = found < found.max()
    kept = importance_weights(first, model, x, z, chosen)
    assert (kept[~chosen] == 0).all() and kept.max() == 1
    assert torch.allclose(kept[chosen] / kept[chosen].sum(), found[chosen] / found[chosen].sum())
    assert not importance_weights(first, model, x, z, ~every).any()
    weights = torch.tensor([1.0, 2.0, 0.0])
    assert sample_size(weights) == pytest.approx(9 / 5)


@pytest.mark.parametrize("quantile", [0.5, 0.95])
def test_the_latent_search_stays_in_its_ball(quantile, monkeypatch):
    scheme, seen = scheme_of(), []
    decoder = scheme.model.decoder
    monkeypatch.setattr(scheme.model, "decoder", lambda z: seen.append(z) or decoder(z))
    x, values = data_of(1)
    found = design(scheme, x, values, total, 200, LatentSearch(2.0, quantile), seed=3)
    z = torch.cat(seen)
    radius = chi2.ppf(quantile, 3) ** 0.5
    assert z.norm(dim=1).max() <= radius * (1 + 1e-5) and z.norm(dim=1).max() > 0.99 * radius
    assert torch.allclose(found.x, decoder(z)[: len(found.x)].detach(), atol=1e-6)
    assert found.best[1] == pytest.approx(total(found.x).min().item())
    start = scheme.model.encoder(x[values.argmin()][None])[0]
    assert (seen[0] - start).norm(dim=1).mean() < 4 * 2 * 3**0.5


@pytest.mark.parametrize("budget", [1, 37, 90])
@pytest.mark.parametrize("name", METHODS)
def test_every_evaluation_counts_and_seeds_decide(name, budget):
    counts, x_values = [], data_of(2)
    before = torch.random.get_rng_state()

    def counted(x):
        "Return the values and note their number."
        counts.append(len(x))
        return total(x)

    runs = []
    for seed in (1, 1, 2):
        counts.clear()
        runs.append(design(scheme_of(), *x_values, counted, budget, METHODS[name], seed=seed))
        assert sum(counts) == budget == len(runs[-1].x) == len(runs[-1].values)
    assert torch.equal(runs[0].x, runs[1].x) and not torch.equal(runs[0].x, runs[2].x)
    assert torch.allclose(runs[0].values, total(runs[0].x).double())
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("name", METHODS)
def test_data_may_have_another_dtype_and_the_model_dropout(name, dtype):
    def dropped(seed):
        "Return a VAE whose encoder and decoder drop units in training."
        scheme = scheme_of(seed)
        for net in (scheme.model.q_net, scheme.model.p_net):
            net.insert(2, torch.nn.Dropout(0.5))
        return scheme

    x, values = data_of(10)
    one, two = (
        design(dropped(1), x.to(dtype), values, total, 30, METHODS[name], seed=4) for _ in range(2)
    )
    assert one.x.dtype == dtype and torch.equal(one.x, two.x)


def test_a_search_that_can_improve_no_more_begins_anew():
    x, values = data_of(11)

    def flat(x):
        "Return the same value for all."
        return torch.zeros(len(x))

    found = design(scheme_of(z_dim=2), x, values, flat, 3000, LatentSearch(1e-9), seed=1)
    assert count_distinct(found.x[-2000:], 1e-4) > 1


def test_cbas_draws_with_the_noise_of_the_pixels():
    x, values = data_of(12)
    found = design(scheme_of(), x, values, total, 30, METHODS["cbas"], seed=1)
    assert set(found.x.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("name", METHODS)
def test_failures_are_kept_and_never_best(name):
    def fails(x):
        "Return nan where the first number is small."
        return total(x).where(x[:, 0] > 0.5, torch.nan)

    x, values = data_of(3)
    found = design(scheme_of(), x, values, fails, 60, METHODS[name], seed=1)
    assert found.values.isnan().any()
    if not found.values.isnan().all():
        assert found.best[1] == found.values[~found.values.isnan()].min()


def test_retraining_trains_on_what_its_weights_say_and_starts_from_the_best(monkeypatch):
    rounds, starts = [], []

    def spy(scheme, x, weights, steps, batch_size, rng):
        "Note the examples and weights of a round."
        rounds.append((x.clone(), weights.clone(), steps, batch_size))

    class Noting(LatentSearch):
        "A latent search that notes its share of the budget."

        def search(self, model, known, budget, rng):
            "Note the best example and the budget, and search."
            starts.append((known.best(), budget))
            super().search(model, known, budget, rng)

    monkeypatch.setattr("optgen.design.train_weighted", spy)
    x, values = data_of(4)
    method = Retraining(0.01, 3, 7, 5, Noting())
    found = design(scheme_of(), x, values, total, 32, method, seed=1)
    assert [budget for _, budget in starts] == [10, 11, 11]
    known, scores = torch.cat([x, found.x]), torch.cat([values.double(), found.values])
    for (seen, weights, *rest), (best, _), n in zip(rounds, starts, (40, 50, 61)):
        assert torch.equal(seen, known[:n]) and rest == [7, 5]
        assert torch.allclose(weights, retraining_weights(scores[:n], 0.01))
        assert torch.equal(best[0], known[scores[:n].argmin()])
    assert found.sample_sizes == pytest.approx([sample_size(w) for _, w, *_ in rounds])


def test_cbas_weights_a_batch_under_a_threshold_that_never_rises(monkeypatch):
    rounds = []

    def spy(scheme, x, weights, steps, batch_size, rng):
        "Note a round, and move the decoder."
        rounds.append((x, weights))
        with torch.no_grad():
            scheme.model.p_net[-1].bias += 0.3 * torch.randn(6, generator=generator(len(rounds)))

    monkeypatch.setattr("optgen.design.train_weighted", spy)
    x, values = data_of(5)
    scheme = scheme_of()
    found = design(scheme, x, values, total, 60, CbAS(0.25, 3, 1, 4), seed=2)
    assert len(rounds) == 2 and len(found.sample_sizes) == 3  # The last round trains nothing.
    threshold = math.inf
    for i, (seen, weights) in enumerate(rounds):
        batch = found.values[20 * i : 20 * i + 20]
        assert torch.equal(seen, found.x[20 * i : 20 * i + 20])
        threshold = min(threshold, batch.sort().values[math.floor(0.25 * 19)].item())
        assert torch.equal(weights > 0, batch <= threshold)
        if i == 0:  # The first model is the present one.
            assert weights.unique().tolist() == [0.0, 1.0]
    assert 0 < weights[weights > 0].min() < 1


def test_cbas_gives_failures_no_weight(monkeypatch):
    rounds = []
    monkeypatch.setattr("optgen.design.train_weighted", lambda *given: rounds.append(given[2]))

    def fails(x):
        "Return nan for all examples, or all but the first."
        values = torch.full((len(x),), math.nan)
        values[5] = math.inf
        if len(rounds) or seen:
            values[0] = 1.0
        seen.append(len(x))
        return values

    seen = []
    found = design(scheme_of(), *data_of(6), fails, 30, CbAS(0.5, 3, 1, 4), seed=2)
    assert seen == [10, 10, 10] and found.sample_sizes == [0.0, 1.0, 1.0]
    assert len(rounds) == 1 and rounds[0].nonzero().flatten().tolist() == [0]


def test_examples_are_drawn_by_their_weights(monkeypatch):
    scheme, seen = scheme_of(), []
    monkeypatch.setattr(scheme, "step", seen.append)
    x = torch.arange(4.0)[:, None].expand(4, 6) / 4
    train_weighted(scheme, x, torch.tensor([1.0, 0.0, 2.0, 5.0]), 50, 400, generator(1))
    assert {len(batch.x) for batch in seen} == {400} and len(seen) == 50
    shares = torch.stack(
        [(torch.cat([b.x for b in seen])[:, 0] == i / 4).float().mean() for i in range(4)]
    )
    exact = torch.tensor([1.0, 0, 2, 5]) / 8
    assert ((shares - exact).abs() <= 4 * (exact * (1 - exact) / 20_000).sqrt()).all()


def test_distances_and_distinct_examples():
    x, data = randn(5, 2, 3, seed=6), randn(7, 2, 3, seed=7)
    exact = [min(((a - b) ** 2).mean().sqrt().item() for b in data) for a in x]
    assert nearest_distance(x, data).tolist() == pytest.approx(exact)
    chain = torch.tensor([0.0, 0.9, 1.8, 5.0, 5.1])[:, None]
    assert count_distinct(chain, 1.0) == 3  # 0, 1.8 and 5: the second is near the first.
    assert count_distinct(chain, 0.01) == 5


def test_the_given_examples_are_not_changed():
    x, values = data_of(8)
    kept = x.clone(), values.clone()
    design(scheme_of(), x, values, lambda x: x.zero_().sum(1), 20, METHODS["latent"])
    assert torch.equal(x, kept[0]) and torch.equal(values, kept[1])


def test_a_summary_of_an_empty_tail_and_bad_arguments():
    designed = Designed(torch.rand(3, 2), torch.tensor([1.0, 2.0, 4.0]).double(), [])
    assert designed.summary(last=1)["mean"] == 4 and designed.summary(last=9)["median"] == 2
    with pytest.raises(ValueError, match="last"):
        designed.summary(last=0)
    x, values = data_of(9)
    for bad, words in (
        ({"budget": 0}, "budget"),
        ({"seed": -1.5}, "seed"),
        ({"values": values[:3]}, "the values must be 40 real numbers"),
        ({"values": values * math.nan}, "all values are nan"),
        ({"data": x.long()}, "floating-point examples"),
        ({"data": x[:0]}, "floating-point examples"),
        ({"data": torch.tensor(1.0), "values": torch.tensor(1.0)}, "of the shape"),
        ({"data": x * math.nan}, "must be finite"),
        ({"scheme": torch.nn.Linear(2, 2)}, "scheme.model"),
    ):
        given = {"scheme": scheme_of(), "data": x, "values": values, "objective": total} | bad
        with pytest.raises(ValueError, match=words):
            design(**given)
    for make, words in (
        (lambda: LatentSearch(0.0), "sigma"),
        (lambda: LatentSearch(quantile=1.0), "quantile"),
        (lambda: Retraining(k=0.0), "k must"),
        (lambda: Retraining(rounds=0), "rounds"),
        (lambda: CbAS(1.0), "share"),
        (lambda: CbAS(steps=0), "steps"),
    ):
        with pytest.raises(ValueError, match=words):
            make()


def test_known_examples_know_what_is_left():
    known = KnownExamples(*data_of(1), total, 10)
    known.evaluate(torch.rand(4, 6, generator=generator(2)))
    assert known.remaining == 6 and len(known.designed().x) == 4
    assert copy.deepcopy(known).best().shape == (1, 6)


def test_a_latent_inside_of_the_ball_stays_where_it_is():
    search, radius = LatentSearch(quantile=0.8), chi2.ppf(0.8, 4) ** 0.5
    directions = randn(6, 4, seed=11)
    z = directions / directions.norm(dim=1, keepdim=True)
    lengths = torch.tensor([0.1, 0.5, 0.999, 1.001, 2.0, 30.0]).double()[:, None] * radius
    expected = z * lengths.clamp(max=radius)
    assert torch.allclose(search.project(z * lengths), expected, rtol=1e-12)


def test_the_threshold_of_cbas_stays_when_a_batch_is_worse(monkeypatch):
    rounds, batches = [], []
    monkeypatch.setattr("optgen.design.train_weighted", lambda *given: rounds.append(given[2]))

    def worse(x):
        "Return values that rise from batch to batch, but for one of the last batch."
        batches.append(torch.arange(10.0) + 5 * len(batches))
        if len(batches) == 3:
            batches[-1][7] = 1.5
        return batches[-1]

    found = design(scheme_of(), *data_of(7), worse, 40, CbAS(0.5, 4, 1, 4), seed=2)
    chosen = [weights.nonzero().flatten().tolist() for weights in rounds]
    assert chosen == [[0, 1, 2, 3, 4], [], [7]] or chosen == [[0, 1, 2, 3, 4], [7]]
    assert found.sample_sizes[1] == 0.0


@pytest.mark.parametrize("bins", [2, 7])
@pytest.mark.parametrize("seed", [1, 2])
def test_bins_are_of_equal_width_and_good_ones_weigh_more(seed, bins):
    values = torch.randn(300, generator=generator(seed), dtype=torch.float64)
    label, weights = bin_values(values, bins)
    low, high = values.min().item(), values.max().item()
    width = (high - low) / bins
    tau = max(values.quantile(0.1).item() - low, width)
    expected = [min(int((v - low) / width), bins - 1) for v in values.tolist()]
    assert label.tolist() == expected
    raw = []
    for b in expected:
        center, best = low + (b + 0.5) * width, low + 0.5 * width
        raw.append(math.exp(-(center - best) / tau) / (expected.count(b) / 300 + 1e-3))
    mean = sum(raw) / 300
    assert weights.tolist() == pytest.approx([min(w / mean, 5) for w in raw], rel=1e-9)
    same = bin_values(torch.ones(4), 3)
    assert same[0].tolist() == [0] * 4 and same[1].tolist() == [1.0] * 4


def conditional(seed=0, classes=5):
    "Return a conditional diffusion of two numbers."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Denoiser(PerceptronDenoiser(2, 16, classes=classes), (2,), "v", 0.6)
        return DenoisingDiffusion(model, conditional=True, pixels=False, label_dropout=0.1)


def test_offline_design_trains_on_bins_and_draws_the_best(monkeypatch):
    scheme, seen, asked = conditional(), [], []
    monkeypatch.setattr(scheme, "step", seen.append)
    sample = scheme.sample

    def noted(n, **options):
        "Note how draws are asked for."
        asked.append((n, options))
        return sample(n, **options)

    monkeypatch.setattr(scheme, "sample", noted)
    x = torch.rand(50, 2, generator=generator(1))
    values = x.norm(dim=1)
    found = design_offline(scheme, x, values, 9, steps=6, batch_size=20, guidance=1.5, seed=3)
    assert found.shape == (9, 2) and len(seen) == 6
    label, weights = bin_values(values, 5)
    for batch in seen:
        rows = [(x == row).all(1).nonzero().item() for row in batch.x]
        assert torch.equal(batch.y, label[rows]) and len(rows) == 20
        assert torch.allclose(batch.weights.double(), weights[rows])
    assert not torch.equal(seen[0].x, seen[1].x)
    ((n, options),) = asked
    assert n == 9 and options["labels"].tolist() == [0] * 9 and options["guidance"] == 1.5


def test_offline_design_repeats_itself_and_names_bad_input():
    x = torch.rand(40, 2, generator=generator(2))
    before = torch.random.get_rng_state()
    one, two, other = (
        design_offline(conditional(), x, x.sum(1), 5, steps=3, seed=s) for s in (1, 1, 2)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(before, torch.random.get_rng_state())
    with pytest.raises(ValueError, match="two classes at least"):
        design_offline(scheme_of(), x, x.sum(1))
    with pytest.raises(ValueError, match="40 values that are not finite"):
        design_offline(conditional(), x, x.sum(1) * math.nan)
    with pytest.raises(ValueError, match="designs"):
        design_offline(conditional(), x, x.sum(1), 0)
    with pytest.raises(ValueError, match="the values must be 40 real numbers"):
        design_offline(conditional(), x, x.sum(1)[:3])


def test_retraining_with_infinite_k_has_equal_weights():
    x = torch.rand(12, 16, generator=generator(1))
    scheme = BetaVAE(VAE(16, 8, 8, 2))
    found = design(scheme, x, x.sum(1), lambda x: x.sum(1), 20, Retraining(torch.inf, 2, 1, 4))
    assert found.sample_sizes == [12.0, 22.0]
    with pytest.raises(ValueError, match="k must be"):
        Retraining(k=-torch.inf)
