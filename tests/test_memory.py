"""What is remembered over steps survives a number that is not finite: levels, ladder, phases.

Controllers and averages have tests of their own.
"""

import copy
import math

import pytest
import torch

from optgen.models.diffusion import Denoiser, UNet
from optgen.models.ladder import LadderEncoder
from optgen.schemes.denoising import DenoisingDiffusion
from optgen.schemes.elbo import Aggressive
from optgen.schemes.levels import AdaptiveLevels, UniformLevels, optimal_coupling
from optgen.testing import generator

# The last one is finite, and its square is not.
BAD = [math.nan, math.inf, -math.inf, 1e30]


def running_mean(bins, decay, batches):
    """Return the mean squared losses of the bins in plain Python, from (bin, loss) pairs."""
    square, met = [0.0] * bins, [0] * bins
    for batch in batches:
        for j in range(bins):
            found = [loss**2 for i, loss in batch if i == j]
            if found:
                met[j] += 1
                step = max(1 / met[j], 1 - decay)
                square[j] += min(step, 1) * (sum(found) / len(found) - square[j])
    return square


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("seed", [0, 1])
def test_adaptive_levels_skip_what_is_not_finite(bad, seed):
    rng, levels, kept, skipped = generator(seed), AdaptiveLevels(4, decay=0.8), [], 0
    for t in range(30):
        u = torch.rand(10, generator=rng)
        loss = torch.rand(10, generator=rng)
        wrong = torch.zeros(10, dtype=torch.bool) if t % 3 else u < 0.3 + 0.7 * (t == 9)
        levels.update(u, torch.where(wrong, bad, loss))
        skipped += wrong.sum().item()
        right = ~wrong
        kept.append([(int(4 * a), b) for a, b in zip(u[right].tolist(), loss[right].tolist())])
    expected = torch.tensor(running_mean(4, 0.8, kept))
    assert torch.allclose(levels.square, expected, rtol=1e-4)
    assert levels.skipped == skipped > 0
    u, density = levels.draw(500, u, rng)
    assert u.isfinite().all() and density.isfinite().all()
    # The count is saved; a state of release 0.4 has none.
    state = levels.state_dict()
    again, old = AdaptiveLevels(4), AdaptiveLevels(4)
    again.load_state_dict(state)
    old.load_state_dict({key: state[key] for key in ("square", "met")})
    assert again.skipped == skipped and old.skipped == 0
    assert torch.equal(again.square, levels.square) and torch.equal(old.square, levels.square)


def test_a_sum_of_squares_that_overflows_is_left_out():
    levels, u = AdaptiveLevels(2), torch.tensor([0.1, 0.2, 0.3, 0.9])
    levels.update(u, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    levels.update(u, torch.tensor([1.5e19, 1.5e19, 1.5e19, 4.0]))
    assert torch.allclose(levels.square, torch.tensor([14 / 3, 16.0])) and levels.met[0] == 1


def test_levels_that_remember_belong_to_one_scheme():
    model = Denoiser(UNet((1, 8, 8), 4, (1,), attention=False), (1, 8, 8))
    levels = AdaptiveLevels(3)
    DenoisingDiffusion(model, levels=levels)
    with pytest.raises(ValueError, match="this AdaptiveLevels is already used by another scheme"):
        DenoisingDiffusion(model, levels=levels)
    shared = UniformLevels()
    for _ in range(2):
        DenoisingDiffusion(model, levels=shared)


@pytest.mark.parametrize("bad", BAD[:3])
def test_the_ladders_running_statistics_skip_what_is_not_finite(bad):
    torch.manual_seed(0)
    model = LadderEncoder((6, 5, 4), decay=0.5)
    clean = model.activations(torch.randn(20, 6))
    model.update_running_statistics(clean)
    poisoned = copy.deepcopy(model)
    wrong = clean._replace(mean=[clean.mean[0], *(m.clone() for m in clean.mean[1:])])
    wrong.mean[1].detach_()[2] = bad
    poisoned.update_running_statistics(wrong)
    for name, buffer in poisoned.named_buffers():
        assert buffer.isfinite().all(), name
    assert poisoned.mean1[2] == model.mean1[2]
    # The other statistics went on as they would have.
    model.update_running_statistics(clean)
    for name, buffer in model.named_buffers():
        assert torch.allclose(buffer, poisoned.get_buffer(name)) or name == "mean1"


def test_an_information_that_is_not_finite_does_not_end_the_aggressive_phase():
    rule = Aggressive(window=2)
    for information in (1.0, 1.0, math.nan, 3.0, 2.0, 2.0, math.inf, 0.0, 1.0, 1.0):
        assert rule.memory["waiting"]
        rule.compare_information(torch.tensor(information))
    # The windows' means are 1, none, 2, none, 1: only the last one is below the best.
    assert not rule.memory["waiting"] and rule.memory["best"] == 2.0


@pytest.mark.parametrize("bad", BAD[:3])
def test_a_loss_that_is_not_finite_does_not_stop_the_encoder_for_ever(bad):
    rule, decided = Aggressive(check=2, most=100), []
    for loss in (5.0, 5.0, bad, 4.0, 3.0, 3.0, 3.5, 3.5):
        rule.memory["moves"] += 1
        rule.memory["loss"] = rule.memory["loss"] + torch.tensor(loss)
        decided.append(rule.encoder_has_converged())
    # 10, none, 6, 7: only the last one is no longer falling.
    assert decided == [False] * 7 + [True]


def test_noise_and_images_are_as_many():
    x = torch.randn(5, 1, 2, 2, generator=generator())
    for n in (3, 7, 0):
        with pytest.raises(ValueError, match=f"5 images and {n} of noise"):
            optimal_coupling(x, torch.randn(n, 1, 2, 2))
    with pytest.raises(ValueError, match="noise must be shaped as the images"):
        optimal_coupling(x, torch.randn(5, 1, 2, 3))
    with pytest.raises(ValueError, match="4 labels"):
        optimal_coupling(x, torch.randn_like(x), torch.zeros(4, dtype=torch.int64))
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="image or noise that is not finite"):
            optimal_coupling(torch.where(x > 0, bad, x), torch.randn_like(x))
