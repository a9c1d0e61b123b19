"The oracles of the installed package: each passes a right formula and catches a wrong one."

import json
import math
import platform
import subprocess
import sys
from types import SimpleNamespace

import conftest
import pytest
import torch
from fastcore.basics import num_cpus
from torch.optim import SGD

from optgen.testing import (
    LinearGaussian,
    assert_mean,
    check_gradient,
    decay_rate,
    finite_difference,
    flat_weights,
    generator,
    jacobian,
    keep_freed_memory,
    optimizer_parity,
    optimizer_path,
    raises,
    randn,
    spectral_radius,
)


def test_random_numbers_depend_on_their_seed_alone():
    expected = torch.randn(2, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    assert torch.equal(randn(2, 3, seed=4), expected)
    assert not torch.equal(randn(2, 3, seed=5), expected)
    assert randn(2, dtype=torch.float32).dtype == torch.float32
    assert generator(7).initial_seed() == 7 and generator().device.type == "cpu"


def test_raises_needs_the_exception_and_every_word():
    with raises(ValueError, "one", "two"):
        raise ValueError("two and one")
    with pytest.raises(AssertionError, match="no ValueError was raised"):
        with raises(ValueError):
            pass
    with pytest.raises(AssertionError, match="the message lacks 'three'"):
        with raises(ValueError, "one", "three"):
            raise ValueError("two and one")
    with pytest.raises(TypeError, match="another"):
        with raises(ValueError):
            raise TypeError("another")


def test_flat_weights_are_detached_and_in_order():
    layer = torch.nn.Linear(2, 1)
    found = flat_weights(layer)
    assert torch.equal(found, torch.cat([layer.weight[0], layer.bias]))
    assert not found.requires_grad
    assert flat_weights([torch.ones(1, 2), torch.zeros(())]).tolist() == [1, 1, 0]


@pytest.mark.parametrize("seed", range(3))
def test_finite_difference(seed):
    x = randn(2, 3, seed=seed)
    before = x.clone()
    assert torch.allclose(finite_difference(lambda x: (x**3).sum(), x), 3 * x**2, atol=1e-9)
    assert torch.equal(x, before)
    scalar = torch.tensor(3.0, dtype=torch.float64)
    assert finite_difference(lambda x: (x**2).sum(), scalar).shape == ()
    with pytest.raises(TypeError, match="float64"):
        finite_difference(lambda x: x.sum(), x.float())


def test_check_gradient_catches_a_lost_half_and_takes_gradients_inside():
    w = randn(4).requires_grad_()
    check_gradient(lambda: (w**2).sum(), w)
    with pytest.raises(AssertionError, match="off by"):
        check_gradient(lambda: (w * w.detach()).sum(), w)

    def penalty():
        "Return a loss that contains a gradient itself, as the penalties of games do."
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
    expected = torch.cat([2 * torch.eye(2), torch.zeros(2, 2)], 1).double()
    assert torch.equal(jacobian([2 * x], [x, y]), expected)


@pytest.mark.parametrize("seed", range(5))
def test_spectral_radius_and_decay_rate(seed):
    A = randn(4, 4, seed=seed)
    c = randn(4, seed=seed + 1)
    rho = torch.linalg.eigvals(A).abs().max().item()
    assert abs(spectral_radius(lambda w: A @ w + c, 4) - rho) < 1e-9 * max(1, rho)
    errors = [3 * 0.9**t * (1.1 + math.cos(t)) for t in range(2000)]
    assert abs(decay_rate(errors) - 0.9) < 1e-3
    with pytest.raises(ValueError, match="positive"):
        decay_rate([1.0, 0.0])


def test_spectral_radius_is_that_of_the_fixed_point():
    two = torch.full((1,), 2.0, dtype=torch.float64)
    found = spectral_radius(lambda w: w - 0.5 * torch.tanh(w - 2), 1, fixed_point=two)
    assert abs(found - 0.5) < 1e-8


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_parity(dtype, tol):
    def path_distance(first, second):
        "Return the parity of two variants of SGD with momentum."
        return optimizer_parity(
            lambda p: SGD(p, 0.01, momentum=0.9, **first),
            lambda p: SGD(p, 0.01, momentum=0.9, **second),
            dtype=dtype,
        )

    assert path_distance(dict(foreach=True), dict(foreach=False)) < tol
    assert path_distance({}, dict(dampening=0.01)) > 100 * tol


def test_optimizer_path_is_gradient_descent_from_a_seeded_start():
    path = optimizer_path(lambda p: SGD(p, 0.01), steps=3, seed=2)
    assert path.shape == (3, 20)
    assert not torch.equal(path, optimizer_path(lambda p: SGD(p, 0.01), steps=3, seed=3))
    p = path[0]
    gradient = p.cos() * p + p.sin() + 4 * (p - 1) ** 3 / 50
    assert torch.allclose(path[1], p - 0.01 * gradient, rtol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_linear_gaussian_obeys_bayes_everywhere(seed):
    model = LinearGaussian(randn(5, 2, seed=seed), randn(5, seed=seed + 1), sigma=0.6)
    x, z = randn(3, 5, seed=seed + 2), 3 * randn(7, 3, 2, seed=seed + 3)
    log_prior = -(z**2).sum(-1) / 2 - math.log(2 * math.pi)
    log_joint = model.log_likelihood(x, z) + log_prior
    posterior = model.posterior(x)
    expected = posterior.log_prob(z) + model.marginal.log_prob(x)
    assert torch.allclose(log_joint, expected, rtol=1e-10)
    mean, log_var = model.encoder(x)
    assert torch.allclose(mean, posterior.mean)
    precision = torch.linalg.inv(posterior.covariance_matrix)
    assert torch.allclose(log_var.exp(), 1 / precision.diagonal(dim1=-2, dim2=-1))


# How the tests run.


@pytest.mark.parametrize(
    "given",
    [{}, {"file_or_dir": ["tests"]}, {"numprocesses": 0}, {"numprocesses": 3}, {"usepdb": True}],
    ids=str,
)
@pytest.mark.parametrize("worker", [False, True])
def test_the_whole_suite_alone_runs_on_every_core(given, worker):
    usual = {"file_or_dir": [], "numprocesses": None, "usepdb": False}
    option = SimpleNamespace(**usual | given, dist="no", loadscopereorder=True)
    config = SimpleNamespace(option=option, **{"workerinput": {}} if worker else {})
    conftest.pytest_cmdline_main(config)
    spread = {"numprocesses": min(num_cpus(), 8), "dist": "loadfile", "loadscopereorder": False}
    expected = usual | given | {"dist": "no", "loadscopereorder": True}
    assert vars(option) == (expected if given or worker else expected | spread)


def test_the_allocator_is_told_to_keep_freed_memory(monkeypatch):
    told = []
    libc = SimpleNamespace(mallopt=lambda option, value: told.append((option, value)))
    monkeypatch.setattr("optgen.testing.sys.platform", "linux")
    monkeypatch.setattr("optgen.testing.ctypes.CDLL", lambda name: libc)
    keep_freed_memory()
    # malloc.h: M_TRIM_THRESHOLD is -1, M_MMAP_THRESHOLD is -3 and takes 32 MiB at most.
    assert told == [(-1, 2**31 - 1), (-3, 32 * 2**20)]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is glibc's")
def test_memory_that_is_freed_serves_the_next_step():
    script = """
import json, resource, torch
from optgen.testing import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(5 * 2**20) for _ in range(6)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
print(json.dumps([faults() for _ in range(8)]))
"""
    # A process of its own: what other tests left in the heap would count.
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found[-1] < 1000, found
