"""The evidence of tuning: the objective and the searches, against references written here."""

import math

import pytest
import torch

from optgen.data.images import digits
from optgen.evidence import tuning as page

SETTINGS = {"lr": 2e-3, "batch_size": 64, "units": 24, "z_dim": 3}


@pytest.mark.parametrize("seed", [3, 8])
def test_the_loss_is_minus_the_bound_of_the_model_on_its_part(seed, monkeypatch):
    models = []

    def untrained(scheme, loader, epochs, progress):
        "Keep the model as it is."
        assert epochs == 7 and sum(len(batch.x) for batch in loader) == 2000
        models.append(scheme.model)

    monkeypatch.setattr(page, "fit", untrained)
    found = page.train(SETTINGS, seed, 7, "test")
    (model,) = models
    order = torch.randperm(10_000, generator=torch.Generator().manual_seed(0))
    x = digits().images[order[3000:4000]].double().flatten(1) / 255
    model = model.double()
    rng = torch.Generator().manual_seed(seed)
    losses = []
    with torch.no_grad():
        mean, log_var = model.encoder(x)
        rate = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum(1)
        for _ in range(40):
            z = mean + (0.5 * log_var).exp() * torch.randn(mean.shape, generator=rng).double()
            p = model.decoder(z).flatten(1)
            nats = -(x * p.log() + (1 - x) * (1 - p).log()).sum(1)
            losses.append((nats + rate).mean())
    losses = torch.stack(losses)
    assert abs(found - losses.mean()) < 5 * losses.std() + 1e-3


def test_a_training_takes_its_settings(monkeypatch):
    seen = {}

    def noted(scheme, loader, epochs, progress):
        "Note what is trained."
        seen["lr"] = scheme.players["model"].optimizer.param_groups[0]["lr"]
        seen["batch"] = len(next(iter(loader)).x)
        seen["z_dim"] = scheme.model.z_dim
        seen["units"] = [p.shape[0] for p in scheme.model.parameters() if p.dim() == 2][:2]

    monkeypatch.setattr(page, "fit", noted)
    page.train(SETTINGS, 0, 1, "valid")
    assert seen == {"lr": 2e-3, "batch": 64, "z_dim": 3, "units": [24, 12]}


def test_divergence_is_nan(monkeypatch):
    def diverging(*args, **kwargs):
        "Diverge."
        raise page.NonFinite("a loss is not finite")

    monkeypatch.setattr(page, "fit", diverging)
    assert math.isnan(page.train(SETTINGS, 0, 1, "valid"))


@pytest.mark.parametrize("method", ["cma", "random", "tpe", "default"])
def test_a_run_reports_its_best_settings_trained_anew(method, monkeypatch):
    if method == "tpe":
        pytest.importorskip("optuna")
    calls = []

    def loss(settings, seed, epochs, part):
        "Return a loss with its minimum at a rate of 1e-3, and note the call."
        calls.append((dict(settings), seed, epochs, part))
        return (
            abs(math.log10(settings["lr"]) + 3) + 0.01 * settings["z_dim"] + (part == "test") * 50
        )

    monkeypatch.setattr(page, "train", loss)
    found = page.run_tuning({"method": method, "budget": 12, "epochs": 2}, 6)
    trials = 1 if method == "default" else 12
    tried, again = calls[:trials], calls[trials:]
    assert all(call[1:] == (6, 2, "valid") for call in tried)
    assert [call[1:] for call in again] == [(6000 + i, 2, "test") for i in range(3)]
    values = [abs(math.log10(s["lr"]) + 3) + 0.01 * s["z_dim"] for s, *_ in tried]
    assert found["best"] == [round(min(values[: n + 1]), 3) for n in range(trials)]
    assert found["settings"] == tried[values.index(min(values))][0] == again[0][0]
    assert found["retrained"] == [round(min(values) + 50, 3)] * 3
    for settings, *_ in tried:
        assert 1e-5 <= settings["lr"] <= 1e-1 and settings["batch_size"] in range(16, 513)
        assert settings["units"] in range(16, 513) and settings["z_dim"] in range(2, 65)
    rates = [math.log10(settings["lr"]) for settings, *_ in tried]
    assert method == "default" or max(rates) - min(rates) > 0.5
