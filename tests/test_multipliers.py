"""Controllers of a constraint against cooper's own runs of a constrained classification."""

import math

import cooper
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from optgen.multipliers import AugmentedLagrangian, NuPI
from optgen.testing import generator

F64 = torch.float64
STEPS, LR, SHARE = 200, 0.5, 0.3


def points(seed):
    """Return 80 points of two classes, and their labels."""
    rng = generator(seed)
    labels = torch.randint(0, 2, (80,), generator=rng).to(F64)
    x = torch.randn(80, 3, generator=rng, dtype=F64) + labels[:, None]
    return torch.cat([x, torch.ones(80, 1, dtype=F64)], 1), labels


def measure(w, x, labels):
    """Return the loss of a logistic regression, and the share of positive answers, 0-dim."""
    logits = x @ w
    return binary_cross_entropy_with_logits(logits, labels), logits.sigmoid().mean()


class FewPositives(cooper.ConstrainedMinimizationProblem):
    """Logistic regression with at most a share of positive answers."""

    def __init__(self, w, data, formulation, penalty=None, type_=cooper.ConstraintType.INEQUALITY):
        super().__init__()
        self.w, self.data, self.multiplier = (
            w,
            data,
            cooper.multipliers.DenseMultiplier(1, dtype=F64),
        )
        coefficient = None
        if penalty is not None:
            init = torch.tensor([penalty], dtype=F64)
            coefficient = cooper.penalty_coefficients.DensePenaltyCoefficient(init)
        self.constraint = cooper.Constraint(type_, formulation, self.multiplier, coefficient)

    def compute_cmp_state(self):
        """Return loss and violation."""
        loss, share = measure(self.w, *self.data)
        violation = cooper.ConstraintState(violation=(share - SHARE)[None])
        return cooper.CMPState(loss, {self.constraint: violation})


def run_cooper(problem, dual):
    """Return the path of the weights and of the multiplier, each step."""
    primal = torch.optim.SGD([problem.w], LR)
    optimizer = cooper.optim.AlternatingDualPrimalOptimizer(problem, primal, dual)
    path = []
    for _ in range(STEPS):
        optimizer.roll()
        path.append(torch.cat([problem.w.detach(), problem.multiplier.weight.detach()]))
    return torch.stack(path)


def run_ours(controller, data, seen):
    """Return the path of the weights and of the number that `seen` returns, each step."""
    w = torch.zeros(4, dtype=F64, requires_grad=True)
    path = []
    for _ in range(STEPS):
        loss, share = measure(w, *data)
        (gradient,) = torch.autograd.grad(loss + controller.update(share) * share, w)
        with torch.no_grad():
            w -= LR * gradient
        path.append(torch.cat([w.detach(), seen(controller).reshape(1)]))
    return torch.stack(path)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kp, smoothing", [(0.0, 0.0), (0.5, 0.0), (2.0, 0.8), (2.0, -0.5)])
@pytest.mark.filterwarnings("ignore:nuPI optimizer instantiated with negative EMA")
def test_nu_pi_is_coopers(kp, smoothing, seed):
    data = points(seed)
    problem = FewPositives(
        torch.zeros(4, dtype=F64, requires_grad=True), data, cooper.formulations.Lagrangian
    )
    gains = {"Kp": torch.tensor(kp, dtype=F64), "Ki": torch.tensor(0.5, dtype=F64)}
    init = cooper.optim.nuPIInitType.ZEROS
    dual = cooper.optim.nuPI(
        problem.multiplier.parameters(),
        1.0,
        **gains,
        ema_nu=smoothing,
        init_type=init,
        maximize=True,
    )
    expected = run_cooper(problem, dual)
    found = run_ours(NuPI(SHARE, ki=0.5, kp=kp, smoothing=smoothing), data, lambda c: c.value)
    assert (found - expected).abs().max() < 1e-10
    assert found[-1, -1] > 0.1  # the constraint is active


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "type_", [cooper.ConstraintType.INEQUALITY, cooper.ConstraintType.EQUALITY]
)
def test_the_augmented_lagrangian_is_coopers(type_, seed):
    data = points(seed)
    w = torch.zeros(4, dtype=F64, requires_grad=True)
    problem = FewPositives(w, data, cooper.formulations.AugmentedLagrangian, 2.0, type_)
    dual = torch.optim.SGD(problem.multiplier.parameters(), 0.5, maximize=True)
    expected = run_cooper(problem, dual)
    low = 0.0 if type_ == cooper.ConstraintType.INEQUALITY else -math.inf
    controller = AugmentedLagrangian(SHARE, step=0.5, penalty=2.0, low=low)
    found = run_ours(controller, data, lambda c: c.ascended)
    assert (found - expected).abs().max() < 1e-10
    assert found[-1, -1] > 0.1


def test_nan_pins_coopers_multiplier_and_none_of_ours():
    weight = cooper.multipliers.DenseMultiplier(1, dtype=F64).weight
    dual = torch.optim.SGD([weight], 0.5, maximize=True)
    seen = []
    for g in (1.0, math.nan, 1.0):
        weight.grad = torch.tensor([g], dtype=F64)
        dual.step()
        seen.append(weight.item())
    assert seen[0] == 0.5 and math.isnan(seen[2])
    for controller in (NuPI(0.0, ki=0.5, kp=0.0), AugmentedLagrangian(0.0, step=0.5, penalty=0.0)):
        values = [
            controller.update(torch.tensor(g, dtype=F64)).item() for g in (1.0, math.nan, 1.0)
        ]
        assert values == [0.5, 0.5, 1.0]
        assert controller.skipped == 1


def test_the_box_is_checked_and_the_first_multiplier_lies_in_it():
    for make in (NuPI, AugmentedLagrangian):
        for low, high in ((1.0, 0.5), (math.nan, 1.0), (math.inf, math.inf)):
            with pytest.raises(ValueError, match="low <= high must hold"):
                make(1.0, low=low, high=high)
        assert make(1.0, low=-math.inf).value == 0
        assert make(1.0, low=-math.inf, high=-2.0).value == -2
        assert make(1.0, low=0.3).value == 0.3
