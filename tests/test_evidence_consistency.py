"""The evidence on consistency: views, losses and a run against references of the test's own."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy.special import erf
from torch.nn.functional import cross_entropy

from optgen.averaging import Average
from optgen.data.images import digits
from optgen.data.loading import Loader, balanced_indices
from optgen.evidence import assisted, consistency
from optgen.evidence.consistency import STRONG, WEAK, FixMatch, MeanTeacher, augmented_view
from optgen.evidence.reproduce import write_json
from optgen.models.classifier import Perceptron
from optgen.schemes.couplings import AssistedBatch
from optgen.testing import generator

F64 = torch.float64


def pixel(image, row, column):
    """Return a pixel, 0 outside of the image."""
    height, width = image.shape
    return image[row, column] if 0 <= row < height and 0 <= column < width else 0.0


def interpolated(image, row, column):
    """Return the bilinear mean of the four pixels around a point."""
    r, c = math.floor(row), math.floor(column)
    a, b = row - r, column - c
    corners = [(1 - a, r), (a, r + 1)]
    return sum(u * v * pixel(image, i, j) for u, i in corners for v, j in ((1 - b, c), (b, c + 1)))


def view_by_hand(image, eps, strengths):
    """Return a view of one image (H, W), pixel by pixel."""
    u = erf(eps / math.sqrt(2))
    angle, shear = strengths["turn"] * u[0], strengths["shear"] * u[1]
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    A = turn @ np.array([[1, shear], [0, 1]]) * math.exp(strengths["scale"] * u[2])
    height, width = image.shape
    out = np.zeros_like(image)
    for i in range(height):
        for j in range(width):
            x, y = (2 * j + 1) / width - 1, (2 * i + 1) / height - 1
            inside = max(abs(y - u[5]), abs(x - u[6])) <= strengths["hole"]
            if strengths["hole"] and inside:
                continue
            x, y = A @ [x, y] + strengths["shift"] * u[3:5]
            out[i, j] = interpolated(image, ((y + 1) * height - 1) / 2, ((x + 1) * width - 1) / 2)
    return out


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("strengths", [WEAK, STRONG], ids=["weak", "strong"])
def test_a_view_is_the_affine_map_of_the_image(strengths, seed):
    x = torch.rand(4, 1, 9, 12, dtype=F64, generator=generator(seed))
    eps = torch.randn(4, 7, dtype=F64, generator=generator(seed + 100))
    found = augmented_view(x, eps, strengths)
    by_hand = [view_by_hand(a[0].numpy(), e.numpy(), strengths) for a, e in zip(x, eps)]
    assert np.allclose(found[:, 0].numpy(), by_hand, atol=1e-12)


def classifiers(seed):
    """Return a classifier, an average that differs from it, and a batch."""
    torch.manual_seed(seed)
    net = Perceptron(64, 3, (16,)).double()
    average = Average(net, 0.5)
    for _ in range(2):
        average.update()
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p), alpha=0.2)
    x = torch.rand(8, 1, 8, 8, dtype=F64, generator=generator(seed))
    eps = torch.randn(2, 8, 14, dtype=F64, generator=generator(seed + 1))
    return net, average, AssistedBatch(x, x.flip(0), torch.arange(8) % 3, *eps)


def gradients(loss, net):
    """Return the gradients of a loss as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*net.parameters()])])


@pytest.mark.parametrize("seed", range(3))
def test_the_mean_teacher_receives_no_gradient(seed):
    net, average, batch = classifiers(seed)
    found = MeanTeacher(STRONG, average).terms(net, None, batch)
    teacher = copy.deepcopy(net)
    for p, mean in zip(teacher.parameters(), average.means):
        p.data.copy_(mean)
    p = net(augmented_view(batch.x, batch.eps[:, :7], STRONG)).softmax(1)
    q = teacher(augmented_view(batch.x, batch.eps[:, 7:], STRONG)).softmax(1).detach()
    expected = (p - q).square().sum() / (8 * 3)
    assert found.coupling.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(gradients(found.coupling, net), gradients(expected, net))


@pytest.mark.parametrize("seed", range(3))
def test_sure_pseudo_labels_of_weak_views_train_the_strong_ones(seed):
    net, _, batch = classifiers(seed)
    weak = net(augmented_view(batch.x, batch.eps[:, :7], WEAK)).softmax(1).detach()
    threshold = weak.max(1).values.median().item()
    found = FixMatch(WEAK, STRONG, threshold).terms(net, None, batch)
    strong = net(augmented_view(batch.x, batch.eps[:, 7:], STRONG)).log_softmax(1)
    kept = [i for i in range(8) if weak[i].max() >= threshold]
    assert 0 < len(kept) < 8
    expected = -sum(strong[i, weak[i].argmax()] for i in kept) / 8
    assert found.coupling.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(gradients(found.coupling, net), gradients(expected, net))
    labeled = net(augmented_view(batch.labeled, batch.eps_labeled[:, :7], WEAK))
    expected = cross_entropy(labeled, batch.y).item()
    assert found.classification.item() == pytest.approx(expected, rel=1e-12)


def test_what_does_not_fit_is_one_error():
    net, average, batch = classifiers(0)
    for make in (lambda v: MeanTeacher(v, average), lambda v: FixMatch(WEAK, v, 0.9)):
        for bad in ({"turn": 0.1}, WEAK | {"blur": 1.0}):
            with pytest.raises(ValueError, match="a view has the strengths turn, shear, .* got "):
                make(bad)
    for threshold in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"FixMatch: threshold .*got {threshold}"):
            FixMatch(WEAK, STRONG, threshold)
    with pytest.raises(ValueError, match=r"images \(B, C, H, W\), got shape \(8, 64\)"):
        MeanTeacher(WEAK, average).terms(net, None, batch._replace(labeled=batch.x.flatten(1)))


def losses_by_hand(method, net, teacher, batch, settings):
    """Return classification loss and consistency of a batch."""
    x, labeled, y, eps, eps_labeled = batch
    view = settings["view"]
    classification = cross_entropy(net(augmented_view(labeled, eps_labeled[:, :7], view)), y)
    first, second = augmented_view(x, eps[:, :7], view), eps[:, 7:]
    if method == "mean-teacher":
        target = teacher(augmented_view(x, second, view)).softmax(1).detach()
        return classification, (net(first).softmax(1) - target).square().mean()
    if method == "fixmatch":
        sure, label = net(first).softmax(1).detach().max(1)
        found = cross_entropy(net(augmented_view(x, second, STRONG)), label, reduction="none")
        return classification, found[sure >= settings["threshold"]].sum() / len(x)
    return classification, torch.zeros(())


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("method", ["augment", "mean-teacher", "fixmatch"])
def test_a_run_is_the_loop_of_its_equations(method, seed, monkeypatch):
    train, test = digits("train").subset(torch.arange(260)), digits("test")
    parts = {"train": train, "test": test}
    monkeypatch.setitem(assisted.DATA, "mnist", parts.__getitem__)
    view = WEAK | {"turn": 0.3, "hole": 0.1}
    settings = {"method": method, "view": view, "weight": 2.0, "threshold": 0.15, "rise": 0.5}
    settings |= {"labels": 40, "valid": 20, "hidden": [12], "batch": 50, "epochs": 2, "decay": 0.2}
    settings |= {"lr": 5e-3, "average": 0.7, "outside": False, "dropout": 0.2}
    found = consistency.run_consistency(consistency.BASE | settings, seed)

    chosen = balanced_indices(train, 40, seed)
    images, labels = train.images[chosen] / 255, train.labels[chosen]
    torch.manual_seed(seed)
    net = Perceptron(784, 10, (12,), 0.2)
    mean = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(net.parameters(), 5e-3, weight_decay=0.2)
    loader, steps = Loader(train, 50, seed=seed, drop_last=True), 10
    batches = [batch for _ in range(2) for batch in loader]
    for t, batch in enumerate(batches, 1):
        orders = [torch.randperm(40) for _ in range(2)]
        order = torch.cat(orders)[:50]
        eps = torch.randn(2, 50, 14)
        drawn = AssistedBatch(batch.x, images[order], labels[order], *eps)
        terms = losses_by_hand(method, net, mean, drawn, settings)
        loss = terms[0] + 2.0 * min(1, (t - 1) / 5) * terms[1]
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, 2 * (1 - (t - 1) / steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate = max(9 / (t + 9), 0.3) if t > 1 else 1.0
        for p, q in zip(mean.parameters(), net.parameters()):
            p.data.lerp_(q.data, rate)
    logits = mean.eval()(test.images.float() / 255).detach()
    errors = (logits.argmax(1) != test.labels).float().mean().item()
    assert found["test"]["error"] == pytest.approx(errors, abs=2 / len(test))
    assert found["test"]["nll"] == pytest.approx(
        cross_entropy(logits, test.labels).item(), abs=5e-5
    )
    assert found["curve"][-1]["test_nll"] == pytest.approx(found["test"]["nll"], abs=1e-5)


def test_the_trials_choose_the_settings_of_the_runs(tmp_path):
    tried = consistency.tuning_runs(tmp_path)
    assert tried.seeds == (100,) and len(tried.variants) == 12
    for config in tried.variants.values():
        assert (config["epochs"], config["valid"], config["outside"]) == (6, 1000, False)
    best = {"augment": 2, "mean-teacher": 4, "fixmatch": 1}
    for name, config in tried.variants.items():
        method, _, i = name.rpartition("-")
        error = 0.1 if best[method] == int(i) else 0.2
        result = {"curve": [{"valid_error": error, "valid_nll": 1.0}], "test": {"error": 1 - error}}
        record = {"variant": name, "seed": 100, "config": config, "result": result}
        write_json(tmp_path / "tune" / f"{name}-100.json", record)
    runs = consistency.hundred_runs(tmp_path)
    assert runs.seeds == (0, 1, 2, 3, 4) and runs.variants.keys() == best.keys()
    for method, i in best.items():
        chosen, config = tried.variants[f"{method}-{i}"], runs.variants[method]
        own = ("method", "view", "weight", "threshold", "dropout", "decay")
        assert all(config[key] == chosen[key] for key in own)
        same = ("hidden", "lr", "batch", "labels", "valid", "data", "epochs", "every", "outside")
        assert all(config[key] == assisted.ALWAYS[key] for key in same)
