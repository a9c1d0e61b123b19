"""Doublings of time to an aim, and M1+M2 in two stages, against references written here."""

import json
import math
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from optgen.data.images import Batch, digits
from optgen.evidence import published
from optgen.evidence.denoising import halve_images, make_scheme, run_denoising
from optgen.evidence.gans import make_networks, run_images
from optgen.evidence.published import M1_M2, doublings_to_aim, keep_active, make_m2, run_m1_m2
from optgen.models.schedules import CosineSchedule
from optgen.models.vae import VAE
from optgen.muon import Muon
from optgen.testing import generator

PLANS = Path(__file__).resolve().parent.parent / "nbs" / "90_evidence" / "plans"
SMALL = M1_M2 | {"feature_units": [12, 8], "feature_latents": 5, "hidden": [6], "units": 7}
SMALL |= {
    "z_dim": 2,
    "lr": 0.02,
    "feature_epochs": 8,
    "epochs": 2,
    "every": 1,
    "batch": 50,
    "valid": 60,
}


def build_features(seed, dead=(1, 3)):
    """Return a VAE of five latents, of which some have a mean that no image changes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = VAE(784, 12, 8, 5)
    with torch.no_grad():
        vae.q_net[-1].weight[list(dead)] = 0
    return vae


@pytest.mark.parametrize("seed", [0, 1])
def test_only_latents_that_vary_remain_and_nothing_of_them_is_trained(seed):
    vae, images = build_features(seed), digits("test").subset(torch.arange(80))
    kept = keep_active(vae, images, threshold=1e-9)
    assert kept.active.tolist() == [True, False, True, False, True] and kept.z_dim == 3
    assert not any(p.requires_grad for p in kept.parameters())
    x = images.images[:9].float() / 255
    with torch.random.fork_rng():
        torch.manual_seed(seed + 7)
        scheme = make_m2(SMALL, kept, images)
        before = {k: v.clone() for k, v in kept.state_dict().items()}
        first = [p.clone() for p in scheme.classifier.parameters()]
        scheme.step(Batch(x))
    assert all(torch.equal(before[k], v) for k, v in kept.state_dict().items())
    assert not all(map(torch.equal, first, scheme.classifier.parameters()))
    mean, log_var = vae.encoder(x)
    means = mean[:, [0, 2, 4]]
    assert torch.allclose(scheme.predict(x), scheme.classifier(means).softmax(-1))
    assert all(map(torch.equal, kept.encoder(x), (means, log_var[:, [0, 2, 4]])))
    z, whole = torch.randn(9, 3, generator=generator(seed)), torch.zeros(9, 5)
    whole[:, [0, 2, 4]] = z
    assert torch.equal(kept.decoder(z), vae.decoder(whole))
    assert torch.equal(kept.log_likelihood(x, z), vae.log_likelihood(x, whole))


def test_the_threshold_is_of_the_variance_of_the_means():
    vae, images = build_features(0), digits("test").subset(torch.arange(80))
    with torch.no_grad():
        variance = vae.encoder(images.images.float() / 255)[0].var(0)
    order = variance.sort().values
    between = (order[3] + order[4]).item() / 2
    assert keep_active(vae, images, between).active.tolist() == (variance > between).tolist()
    with pytest.raises(ValueError, match="no latent's mean has a variance above 1e"):
        keep_active(vae, images, 1e6)


def test_the_labeled_bound_has_the_weight_of_the_configuration():
    images = digits("test").subset(torch.arange(80))
    kept = keep_active(build_features(0), images, 1e-9)
    weights = [make_m2(SMALL | {"labeled_weight": w}, kept, images) for w in (0.03, 1.0)]
    assert [scheme.coupling.labeled_weight for scheme in weights] == [0.03, 1.0]


def test_a_run_of_two_stages_reports_the_test_error_of_its_classifier():
    def few(split="train"):
        return digits(split).subset(torch.arange(300 if split == "train" else 90))

    schemes = []

    def keep(*args):
        schemes.append(make_m2(*args))
        return schemes[-1]

    with (
        patch.object(published, "mnist", few),
        patch.object(published, "split", lambda config, seed: (few(), few(), few("test"))),
        patch.object(published, "make_m2", keep),
        patch.object(published, "keep_active", partial(keep_active, threshold=0.0)),
    ):
        found, again = (run_m1_m2(SMALL, 3) for _ in range(2))
    test = few("test")
    predicted = schemes[0].predict(test.images.float() / 255).argmax(1)
    assert found["test"]["error"] == pytest.approx(
        (predicted != test.labels).double().mean().item(), abs=1e-5
    )
    assert [look["epoch"] for look in found["curve"]] == [1, 2]
    assert found["curve"][-1]["valid_error"] == pytest.approx(found["test"]["error"], abs=1e-5)
    assert found["test"] == again["test"]


@pytest.mark.parametrize("power", [0.2, 1.0, 2.0])
def test_a_power_law_gains_the_same_ratio_with_each_doubling(power):
    times = [3, 6, 12, 24]
    values = [7 * t**-power for t in times]
    for doublings in (0.5, 3):
        aim = 7 * (24 * 2**doublings) ** -power
        assert doublings_to_aim(times, values, aim, True) == pytest.approx(doublings)


def test_a_logarithm_gains_the_same_amount_with_each_doubling():
    times = [1, 2, 4]
    values = [10 - 0.5 * math.log2(t) for t in times]
    assert doublings_to_aim(times, values, 8.0, False) == pytest.approx(2)


def test_the_value_at_half_the_time_is_interpolated():
    # At 5, half of 10, the line from (4, 9) to (8, 5) is at 8; the gain to 10 is 8 - 4.
    assert doublings_to_aim([4, 8, 10], [9.0, 5.0, 4.0], 2.0, False) == pytest.approx(0.5)
    expected = math.log(4 / 2) / math.log(8 / 4)
    assert doublings_to_aim([4, 8, 10], [9.0, 5.0, 4.0], 2.0, True) == pytest.approx(expected)


def test_what_has_arrived_and_what_never_does():
    assert doublings_to_aim([1, 2], [3.0, 2.0], 2.0, False) == 0
    assert doublings_to_aim([1, 2], [3.0, 3.0], 2.0, False) == math.inf
    assert doublings_to_aim([1, 2], [3.0, 4.0], 2.0, True) == math.inf
    with pytest.raises(ValueError, match="begins at 6 and ends at 10"):
        doublings_to_aim([6, 10], [3.0, 2.0], 1.0, False)


def test_the_runs_are_those_of_the_plan():
    plan = json.loads((PLANS / "published.json").read_text())["experiments"]
    runs = {"m1+m2": run_m1_m2, "gan": run_images, "stacked": run_images}
    runs |= {"gan-stronger": run_images, "stacked-stronger": run_images}
    runs["diffusion"] = run_denoising
    assert published.STAGES.keys() == plan.keys() == runs.keys()
    for name, planned in plan.items():
        experiment = published.experiment(name, "")
        assert experiment.run is runs[name] and [*experiment.seeds] == planned["seeds"]
        assert len(experiment.variants) * len(experiment.seeds) == planned["runs"]
    (config,) = published.experiment("gan", "").variants.values()
    nets = make_networks(config, (1, 28, 28))
    units = [[m.out_features for m in n.net if isinstance(m, torch.nn.Linear)] for n in nets]
    assert units == [[512, 32 * 7 * 7], [256, 1]] and config["steps"] == 4000
    (stacked,) = published.experiment("stacked", "").variants.values()
    changed = {key for key, value in stacked.items() if config.get(key) != value}
    assert changed == {"problem", "images", "final"} and stacked["problem"] == "stacked"
    for name, base in (("gan", config), ("stacked", stacked)):
        (stronger,) = published.experiment(f"{name}-stronger", "").variants.values()
        assert stronger == base | {"weight": 0.3} and base["weight"] == 0.01


def test_the_diffusion_model_of_the_plan_has_muon_and_levels_of_a_cosine_schedule():
    (config,) = published.experiment("diffusion", "").variants.values()
    steps = config["epochs"] * (60_000 // config["batch"])
    budget = json.loads((PLANS / "published.json").read_text())["experiments"]["diffusion"]
    assert budget["budget"] == f"{config['epochs']} epochs, {steps:,} steps" and not config["exact"]
    scheme = make_scheme(config, halve_images(digits("test")))
    assert isinstance(scheme.schedule, CosineSchedule)
    (optimizer,) = (player.optimizer for player in scheme.players.values())
    assert isinstance(optimizer.optimizers[0], Muon) and config["falls"]
