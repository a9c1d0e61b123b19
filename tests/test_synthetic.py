"Synthetic sequences of the installed package: their exact likelihood, and that they repeat."

import pytest
import torch

from data_helpers import refuses
from optgen.data.loading import Loader
from optgen.models.synthetic import SyntheticSequences, synthetic_sequences
from optgen.testing import assert_mean, generator


def small_source(seed=0, dtype=torch.float64):
    "Return a source whose sequences can be listed."
    return SyntheticSequences(seed, vocab=4, length=3, hidden=8, embed=5, dtype=dtype)


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_the_weights_of_the_latent_in_the_output_have_a_range_of_their_own(scale):
    source = SyntheticSequences(3, vocab=400, length=3, hidden=8, embed=5, z_scale=scale)
    by_state, by_latent = source.head.weight.split((8, 2), 1)
    for weights, reach in ((by_state, 1.0), (by_latent, scale), (source.embedding.weight, 1.0)):
        assert 0.9 * reach < weights.abs().max() <= reach
        error = reach / (3 * weights.numel()) ** 0.5
        assert abs(weights.mean()) < 5 * error


@pytest.mark.parametrize("seed", range(4))
def test_sequences_have_the_likelihood_they_are_drawn_with(seed):
    source, every = small_source(seed), torch.cartesian_prod(*[torch.arange(4)] * 3)
    log_p, mean, cov = source.posterior(every, points=41)
    p = log_p.exp()
    assert abs(p.sum() - 1) < 1e-3
    x, z = source.sample(5000, generator(seed))
    assert x.shape == (5000, 3) and z.shape == (5000, 2) and 0 <= x.min() and x.max() < 4
    which = x @ torch.tensor([16, 4, 1])
    expected = 5000 * p
    often = expected > 10
    counts = which.bincount(minlength=64)
    chi2 = ((counts - expected)[often] ** 2 / expected[often]).sum()
    assert abs(chi2 - often.sum()) < 5 * (2 * often.sum()) ** 0.5
    residual = z - mean[which]
    assert_mean(residual, 0.0)
    assert_mean(residual[:, :, None] * residual[:, None] - cov[which], 0.0)


def test_a_sequences_likelihood_is_the_sum_of_its_tokens():
    source = small_source()
    x, z = source.sample(7, generator(0))
    state, before, total = None, torch.full((7, 1), source.vocab), 0.0
    for t in range(3):
        logits, state = source(before, z, state)
        before = x[:, t : t + 1]
        total = total + logits[:, 0].log_softmax(-1).gather(1, before)[:, 0]
    assert torch.allclose(source.log_likelihood(x, z), total, rtol=1e-12)
    found = source.log_likelihood(x, torch.stack([z, z.flip(0), 2 * z]))
    assert found.shape == (3, 7)
    assert torch.allclose(found[2], source.log_likelihood(x, 2 * z), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_posterior_does_not_depend_on_the_chunk(dtype):
    source = small_source(1, dtype)
    x, _ = source.sample(5, generator(1))
    want = source.posterior(x, chunk=10**6)
    for chunk in (1, 700, 1300):
        for a, b in zip(source.posterior(x, chunk=chunk), want):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    assert [tuple(t.shape) for t in want] == [(5,), (5, 2), (5, 2, 2)]
    assert want.log_marginal.dtype == dtype
    assert torch.equal(want.log_marginal, source.log_marginal(x, chunk=10**6))
    assert source.log_marginal(x[:0].new_zeros(1, 3)).isfinite().all()


def test_splits_of_sequences_repeat_and_differ():
    before = torch.random.get_rng_state()
    test, valid = synthetic_sequences("test"), synthetic_sequences("valid")
    other = synthetic_sequences("test", seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert len(test) == len(valid) == 2000 and test.shape == (10,)
    assert test.images.dtype == torch.int64 and len(test.images.unique()) > 500
    assert 0 <= test.images.min() and test.images.max() < 1000
    assert len({data.fingerprint for data in (test, valid, other)}) == 3
    assert test.fingerprint == synthetic_sequences("test").fingerprint
    torch.set_default_dtype(torch.float64)
    try:
        assert test.fingerprint == synthetic_sequences("test").fingerprint
    finally:
        torch.set_default_dtype(torch.float32)


def test_wrong_arguments_are_refused():
    with refuses("dev", "valid"):
        synthetic_sequences("dev")
    with pytest.raises(ValueError, match="length must be an integer, at least 1; got 0"):
        SyntheticSequences(length=0)
    with refuses("rounds=0"):
        small_source().posterior(torch.zeros(1, 3, dtype=torch.int64), rounds=0)


@pytest.mark.cuda
def test_sequences_on_the_device():
    here, there = small_source(2), small_source(2).cuda()
    x, z = here.sample(9, generator(0))
    found = there.log_likelihood(x.cuda(), z.cuda()).cpu()
    assert torch.allclose(found, here.log_likelihood(x, z), rtol=1e-9)
    assert torch.allclose(there.log_marginal(x.cuda()).cpu(), here.log_marginal(x), rtol=1e-7)
    assert there.sample(5, generator(0, "cuda"))[0].is_cuda
    made_there = SyntheticSequences(2, device="cuda").head.weight
    assert torch.equal(made_there.cpu(), SyntheticSequences(2).head.weight)
    test = synthetic_sequences("test")
    batch = next(iter(Loader(test, 50, device="cuda", shuffle=False)))
    assert batch.x.is_cuda and torch.equal(batch.x.cpu(), test.images[:50])
