"Distances and coverages of the installed package, against closed forms and counts by hand."

import math

import pytest
import torch

from optgen.data.images import digits
from optgen.data.toy import grid_centers, grid_mixture
from optgen.sample_quality import (
    feature_stats,
    fid,
    frechet_distance,
    frechet_floor,
    label_coverage,
    label_floor,
    mode_coverage,
)
from optgen.testing import generator, randn


def random_covariance(d, seed, rank=None):
    "Return a random covariance, of full rank unless another is given."
    W = randn(d, rank or d, seed=seed)
    return W @ W.T / d


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-7), (torch.float32, 1e-3)])
@pytest.mark.parametrize("rank", [8, 3])
def test_frechet_is_the_eigenvalues_of_the_product(dtype, tol, rank):
    a, b = random_covariance(8, 0), random_covariance(8, 1, rank=rank)
    m, n = randn(2, 8, seed=2)
    root_trace = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()
    exact = ((m - n) ** 2).sum() + a.trace() + b.trace() - 2 * root_trace
    found = frechet_distance(*(t.to(dtype) for t in (m, a, n, b)))
    assert found.dtype == dtype and torch.allclose(found.double(), exact, rtol=tol)


def test_distance_of_two_real_sets_is_their_floor():
    images = digits().images / 255
    W = torch.linalg.qr(torch.randn(784, 16, generator=generator()))[0]

    def project(images):
        "Return 16 random projections."
        return images.flatten(1) @ W

    cov = feature_stats([images], project).cov
    distances = []
    for seed in range(12):
        p = torch.randperm(len(images), generator=generator(seed))
        first, second = images[p[:2000]], images[p[2000:6000]]
        distances.append(fid([first], second.split(777), project))
    assert abs(sum(distances) / 12 / frechet_floor(cov, 2000, 4000) - 1) < 0.15


def test_coverage_counts_what_it_should():
    mu = grid_centers()
    x = grid_mixture(10_000, generator=generator())[0]
    found = mode_coverage(x, mu, 0.05)
    by_hand = ((x[:, None] - mu).norm(dim=2) <= 0.15).sum(0)
    assert torch.equal(found.counts.long(), by_hand) and found.modes == 25
    assert found.share.item() == pytest.approx(by_hand.sum().item() / 10_000)
    assert mode_coverage(x[:, :1].expand(-1, 2) * 0 + 99, mu, 0.05).modes == 0


def test_coverage_has_a_radius_and_a_least_share():
    mu = torch.tensor([[0.0, 0.0], [9.0, 0.0]])
    x = torch.cat([torch.zeros(9, 2), torch.tensor([[9.0, 1.5]])])
    assert mode_coverage(x, mu, 1.0).counts.tolist() == [9, 1]
    assert mode_coverage(x, mu, 1.0, max_sigmas=1.4).counts.tolist() == [9, 0]
    assert mode_coverage(x, mu, 1.0, min_share=0.1).modes == 2
    assert mode_coverage(x, mu, 1.0, min_share=0.11).modes == 1


def test_labels_of_a_perfect_sampler():
    modes, kl = label_coverage(torch.randint(1000, (26_000,), generator=generator()), 1000)
    expected, nats = label_floor(26_000, 1000)
    assert modes == round(expected) == 1000 and abs(kl - nats) < 0.005


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda: mode_coverage(torch.zeros(0, 2), torch.zeros(3, 2), 1.0), "0 samples"),
        (lambda: mode_coverage(torch.zeros(3, 2), torch.zeros(0, 2), 1.0), "0 centers"),
        (lambda: mode_coverage(torch.zeros(3, 2), torch.zeros(3, 2), 0.0), "std must be"),
        (lambda: label_coverage(torch.tensor([5]), 5), "label 5"),
        (lambda: label_coverage(torch.tensor([], dtype=torch.int64), 5), "no labels"),
        (lambda: fid([torch.zeros(1, 2)], [torch.zeros(9, 2)]), "two images"),
        (lambda: feature_stats([torch.full((9, 2), math.nan)]), "not finite"),
    ],
)
def test_bad_samples_are_one_clear_error(call, word):
    with pytest.raises(ValueError, match=word):
        call()


@pytest.mark.cuda
def test_sample_metrics_on_the_device():
    x = grid_mixture(5000, generator=generator())[0]
    on_cpu = mode_coverage(x, grid_centers(), 0.05)
    on_gpu = mode_coverage(x.cuda(), grid_centers().cuda(), 0.05)
    assert torch.equal(on_cpu.counts, on_gpu.counts.cpu()) and on_gpu.share.is_cuda
    assert fid([x.cuda()], [x.cuda() + 1]) == pytest.approx(fid([x], [x + 1]), rel=1e-5)
