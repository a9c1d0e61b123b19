"The oracles of the installed package: each passes a right formula and catches a wrong one."

import math

import pytest
import torch

from optgen.testing import (
    LinearGaussian,
    assert_mean,
    check_gradient,
    decay_rate,
    finite_difference,
    jacobian,
    parity,
    spectral_radius,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
def test_finite_difference(seed):
    x = randn(2, 3, seed=seed)
    before = x.clone()
    assert torch.allclose(
        finite_difference(lambda x: (x**3).sum(), x), 3 * x**2, atol=1e-9
    ) and torch.equal(x, before)
    assert (
        finite_difference(lambda x: (x**2).sum(), torch.tensor(3.0, dtype=torch.float64)).shape
        == ()
    )
    with pytest.raises(TypeError, match="float64"):
        finite_difference(lambda x: x.sum(), x.float())


def test_check_gradient_catches_a_lost_half_and_takes_gradients_inside():
    w = randn(4).requires_grad_()
    check_gradient(lambda: (w**2).sum(), w)
    with pytest.raises(AssertionError, match="off by"):
        check_gradient(lambda: (w * w.detach()).sum(), w)

    def penalty():  # a loss that holds a gradient itself, as the penalties of games do
        (g,) = torch.autograd.grad((w**3).sum(), w, create_graph=True)
        return (g**2).sum()

    check_gradient(penalty, [w])
    with pytest.raises(AssertionError):
        check_gradient(lambda: penalty() + w.detach().sum(), [w])


@pytest.mark.parametrize("seed", range(10))
def test_assert_mean(seed):
    x = randn(4000, 3, seed=seed)
    mean, se = assert_mean(x, 0.0)
    assert torch.allclose(se, torch.full((3,), 4000**-0.5, dtype=torch.float64), rtol=0.1)
    with pytest.raises(AssertionError, match="standard errors"):
        assert_mean(x, 0.12)
    with pytest.raises(AssertionError):
        assert_mean(x.where(x < 3, math.nan), 0.0)
    with pytest.raises(ValueError, match="two samples"):
        assert_mean(x[:1], 0.0)


def test_assert_mean_false_alarms_are_as_rare_as_they_should_be():
    alarms = 0
    for seed in range(400):
        try:
            assert_mean(randn(100, seed=seed), 0.0, z=2.0)
        except AssertionError:
            alarms += 1
    assert 5 < alarms < 40  # 4.6 % of 400 are 18


def test_jacobian():
    A, x, y = randn(3, 4), randn(2, seed=1).requires_grad_(), randn(2, seed=2).requires_grad_()
    assert torch.allclose(jacobian(A @ torch.cat([x, y]), [x, y]), A)
    assert torch.equal(
        jacobian([2 * x], [x, y]), torch.cat([2 * torch.eye(2), torch.zeros(2, 2)], 1).double()
    )


@pytest.mark.parametrize("seed", range(5))
def test_spectral_radius_and_decay_rate(seed):
    A = randn(4, 4, seed=seed)
    c = randn(4, seed=seed + 1)
    rho = torch.linalg.eigvals(A).abs().max().item()
    assert abs(spectral_radius(lambda w: A @ w + c, 4) - rho) < 1e-9 * max(1, rho)
    assert abs(decay_rate([3 * 0.9**t * (1.1 + math.cos(t)) for t in range(2000)]) - 0.9) < 1e-3
    with pytest.raises(ValueError, match="positive"):
        decay_rate([1.0, 0.0])


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_parity(dtype, tol):
    SGD = torch.optim.SGD
    assert (
        parity(
            lambda p: SGD(p, 0.01, momentum=0.9, foreach=True),
            lambda p: SGD(p, 0.01, momentum=0.9, foreach=False),
            dtype=dtype,
        )
        < tol
    )
    assert (
        parity(
            lambda p: SGD(p, 0.01, momentum=0.9),
            lambda p: SGD(p, 0.01, momentum=0.9, dampening=0.01),
            dtype=dtype,
        )
        > 100 * tol
    )


@pytest.mark.parametrize("seed", range(5))
def test_linear_gaussian_obeys_bayes_everywhere(seed):
    model = LinearGaussian(randn(5, 2, seed=seed), randn(5, seed=seed + 1), sigma=0.6)
    x, z = randn(3, 5, seed=seed + 2), 3 * randn(7, 3, 2, seed=seed + 3)
    log_prior = -(z**2).sum(-1) / 2 - math.log(2 * math.pi)
    assert torch.allclose(
        model.log_likelihood(x, z) + log_prior,
        model.posterior(x).log_prob(z) + model.marginal.log_prob(x),
        rtol=1e-10,
    )
    assert torch.allclose(model.encoder(x)[0], model.posterior(x).mean)
    mean_field = 1 / torch.linalg.inv(model.posterior(x).covariance_matrix).diagonal(
        dim1=-2, dim2=-1
    )
    assert torch.allclose(model.encoder(x)[1].exp(), mean_field)
