"""The numbers of `evaluate_vae`, of AUROC and of intervals, against their definitions."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Normal

from optgen.metrics import auroc, evaluate_vae, importance_nll, measure_calibration, wilson_interval
from optgen.models.vae import VAE
from optgen.sample_quality import feature_stats, fid, label_coverage, mode_coverage
from optgen.testing import generator

F64 = torch.float64
K, SIZES = 6, (9, 4, 2)  # samples of z, and images of the batches


class HalfInTraining(nn.Module):
    """Dropout that drops every second number, in training only."""

    def forward(self, x):
        """Return the numbers, or twice every second one."""
        return 2 * x * (torch.arange(x.shape[-1]) % 2) if self.training else x


def small_vae():
    """Return a VAE in float64 whose encoder and decoder differ by their mode."""
    torch.manual_seed(0)
    vae = VAE(6, 5, 4, 3).double()
    vae.q_net.insert(2, HalfInTraining())
    vae.p_net.insert(2, HalfInTraining())
    with torch.no_grad():
        vae.q_net[-1].weight.mul_(torch.tensor([3.0, 0.6, 0.1] * 2).double()[:, None])
    return vae


def without_dropout(net, x):
    """Return the output of a network of the VAE, its dropout left out."""
    for layer in net:
        if not isinstance(layer, HalfInTraining):
            x = layer(x)
    return x


def images(n, seed):
    """Return binary images."""
    return torch.randint(2, (n, 1, 2, 3), generator=generator(seed)).double()


def reference(vae, batches, seed, first):
    """Return what an evaluation should report: by image, then the information of the first."""
    rng, rows, means, stds = generator(seed), [], [], []
    for x in batches:
        mean, log_var = without_dropout(vae.q_net, x.flatten(1)).chunk(2, -1)
        q, prior = Normal(mean, log_var.exp().sqrt()), Normal(torch.zeros_like(mean), 1.0)
        z = mean + q.stddev * torch.randn(K, *mean.shape, generator=rng, dtype=F64)
        p = Bernoulli(logits=without_dropout(vae.p_net, z)).log_prob(x.flatten(1)).sum(-1)
        w = (p + prior.log_prob(z).sum(-1) - q.log_prob(z).sum(-1)).exp()
        share = w / w.sum(0)
        rate = torch.distributions.kl_divergence(q, prior).sum(-1)
        squares = (share**2).sum(0)
        error = (squares - 1 / K).clamp(min=0).sqrt()
        rows.append(torch.stack([-w.mean(0).log(), error, 1 / squares, rate, -p.mean(0)]))
        means.append(mean)
        stds.append(q.stddev)
    means, stds = torch.cat(means), torch.cat(stds)
    m, s = means[:first], stds[:first]
    z = m + s * torch.randn(m.shape, generator=rng, dtype=F64)
    density = Normal(m, s).log_prob(z[:, None]).sum(-1).exp()  # of z_i under the posterior of x_j
    information = (density.diagonal() / density.mean(1)).log().mean().item()
    return torch.cat(rows, 1), means, information


@pytest.mark.parametrize("seed", [0, 5])
def test_every_number_of_a_vae(seed):
    vae = small_vae()
    batches = [images(n, n) for n in SIZES]
    with torch.no_grad():
        (nll, mc_se, ess, rate, distortion), means, information = reference(vae, batches, seed, 11)
    variance = means.var(0, correction=0)
    threshold = variance.sort().values[:2].mean().item()  # two units are active
    assert (variance > 0.01).sum() != 2
    found = evaluate_vae(vae, batches, k=K, seed=seed, threshold=threshold, information_images=11)
    n = sum(SIZES)
    expected = {
        "n": n,
        "k": K,
        "elbo": -(rate + distortion).mean().item(),
        "elbo_se": (rate + distortion).std().item() / math.sqrt(n),
        "rate": rate.mean().item(),
        "distortion": distortion.mean().item(),
        "nll": nll.mean().item(),
        "nll_se": nll.std().item() / math.sqrt(n),
        "nll_mc_se": math.sqrt((mc_se**2).sum()) / n,
        "ess": ess.mean().item(),
        "bits_per_dim": nll.mean().item() / (6 * math.log(2)),
        "active_units": 2,
        "mutual_information": information,
        "mutual_information_ceiling": math.log(11),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9), name
    assert vae.q_net[2].training


def test_a_standard_error_is_that_of_many_evaluations():
    # The error over draws of z, which no image sees, against the spread of repeated estimates.
    vae, x = small_vae().eval(), images(8, 1)
    rng = generator(2)
    repeated = torch.stack([importance_nll(vae, x, 50, generator=rng).nll for _ in range(400)])
    spread = repeated.std(0)
    claimed = torch.stack([importance_nll(vae, x, 50, generator=rng).mc_se for _ in range(40)])
    # A standard deviation of 400 values is within 3.5 % of its own, at one standard error.
    assert ((claimed.mean(0) / spread - 1).abs() < 0.25).all()


@pytest.mark.parametrize("seed", range(3))
def test_auroc_is_the_share_of_ordered_pairs(seed):
    inside = torch.randint(9, (31,), generator=generator(seed)).double() + 2
    outside = torch.randint(9, (17,), generator=generator(seed + 10)).double()
    pairs = [
        1.0 if a > b else 0.5 if a == b else 0.0 for a in inside.tolist() for b in outside.tolist()
    ]
    found = auroc(inside, outside).item()
    assert found == pytest.approx(sum(pairs) / len(pairs)) and found > 0.55
    assert auroc(outside, inside).item() == pytest.approx(1 - found)


@pytest.mark.parametrize("wrong, n", [(0, 7), (3, 50), (49, 50)])
def test_an_interval_is_where_the_score_test_accepts(wrong, n):
    low, high = wilson_interval(wrong, n)
    p = torch.linspace(0, 1, 200_001, dtype=F64)
    accepted = p[(wrong / n - p).abs() <= 1.96 * (p * (1 - p) / n).sqrt()]
    assert low == pytest.approx(accepted.min().item(), abs=1e-5)
    assert high == pytest.approx(accepted.max().item(), abs=1e-5)


@pytest.mark.parametrize("bins", [4, 15])
def test_calibration_bin_by_bin(bins):
    logits = 3 * torch.randn(200, 4, generator=generator(3), dtype=F64)
    labels = torch.randint(4, (200,), generator=generator(4))
    p = logits.softmax(1)
    found = measure_calibration(p, labels, bins)
    total = 0.0
    for b in range(bins):
        low, high = b / bins, (b + 1) / bins
        members = [
            (max(row), row.index(max(row)) == label)
            for row, label in zip(p.tolist(), labels.tolist())
            if low <= max(row) < high
        ]
        assert found.counts[b] == len(members)
        if members:
            confidence = sum(c for c, _ in members) / len(members)
            accuracy = sum(right for _, right in members) / len(members)
            assert found.confidence[b].item() == pytest.approx(confidence)
            assert found.accuracy[b].item() == pytest.approx(accuracy)
            total += len(members) / 200 * abs(confidence - accuracy)
    assert found.ece.item() == pytest.approx(total)


def test_distance_of_two_sets_in_features():
    # Independent numbers: the distance is a sum over them, of the means' and deviations' squares.
    a, b = (torch.randn(n, 1, generator=generator(n), dtype=F64) for n in (60, 45))
    b = 3 * b + 1

    def double(x):
        """Return features."""
        return 2 * x

    expected = (2 * a.mean() - 2 * b.mean()) ** 2 + (2 * a.std() - 2 * b.std()) ** 2
    for first in (a.split(17), feature_stats(a.split(17), double)):
        found = fid(first, b.split(20), double)
        assert found == pytest.approx(expected.item())
    assert feature_stats(a.split(17), double).cov.item() == pytest.approx(4 * a.var().item())


def test_modes_and_labels_are_counted():
    centers = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    samples = torch.tensor([[0.1, 0.0]] * 6 + [[4.0, 0.2]] * 2 + [[0.0, 3.6]] * 1 + [[2.0, 2.0]])
    found = mode_coverage(samples, centers, std=0.1, max_sigmas=3.0, min_share=0.2)
    assert found.counts.tolist() == [6, 2, 0] and found.modes == 2
    assert found.share.item() == pytest.approx(0.8)
    classes, kl = label_coverage(torch.tensor([0, 0, 0, 2]), 4)
    assert classes == 2
    assert kl.item() == pytest.approx(0.75 * math.log(3) + 0.25 * math.log(1))
