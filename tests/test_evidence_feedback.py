"""The evidence on update rules: the same search for all, R3GAN's losses, what is measured."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

from optgen.data.images import Batch
from optgen.evidence import feedback, gans
from optgen.evidence.gans import RULES, make_gan
from optgen.evidence.reproduce import write_json

LOSSES = {
    "ring": {"non-saturating", "saturating", "hinge", "relativistic"},
    "mnist": {"hinge", "relativistic"},
}


@pytest.mark.parametrize("problem, trials", [("ring", 16), ("mnist", 8)])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_has_the_same_search(problem, trials, rule):
    tried = [s for s in feedback.tried_settings(problem).values() if s["rule"] == rule]
    assert len(tried) == trials
    rates = {s["lr"] for s in tried}
    if rule != "negative-momentum":
        assert rates == {1e-3, 2e-3, 4e-3, 8e-3}
    if rule == "r3gan":
        assert {s["loss"] for s in tried} == {"relativistic"}
        assert all(s["betas"] == [0.0, 0.99] for s in tried)
    else:
        pairs = [(s["loss"], s["lr"]) for s in tried]
        assert sorted(pairs) == sorted(product(LOSSES[problem], rates))
        assert all(s["betas"] == [0.5, 0.99] for s in tried)
    weights = [s["weight"] for s in tried]
    if RULES[rule].weighted:
        assert len({*weights}) == 4
        assert {weights.count(w) for w in weights} == {trials // 4}
        # No rate and no loss has a weight of its own.
        assert len({(s["lr"], s["weight"]) for s in tried}) == trials
        if rule != "r3gan":
            assert len({(s["loss"], s["weight"]) for s in tried}) == trials
    else:
        assert {*weights} == {None}


class Line(nn.Module):
    """A discriminator whose slope is its weight."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1).double()

    def forward(self, x):
        """Return the logits (B,)."""
        return self.layer(x)[:, 0]


def test_r3gan_is_a_relativistic_gan_with_both_penalties():
    torch.manual_seed(0)
    G, D = nn.Linear(3, 2).double(), Line()
    G.z_dim = 3
    config = {"rule": "r3gan", "weight": 0.7, "loss": "relativistic", "lr": 0.1}
    gan = make_gan(G, D, config | {"betas": [0.0, 0.99]})
    batch = gan.draw(Batch(torch.randn(5, 2, dtype=torch.float64)))
    real, fake = D(batch.x), D(G(batch.z))
    slopes = D.layer.weight.square().sum()  # the same at every point
    expected = {
        "G": softplus(real - fake).mean().item(),
        "D": (softplus(fake - real).mean() + 0.7 / 2 * slopes + 0.7 / 2 * slopes).item(),
    }
    gan.draw = lambda _: batch
    found = gan.step(None)
    assert {name: loss.item() for name, loss in found.items()} == pytest.approx(expected)
    for player in gan.players.values():
        assert player.optimizer.param_groups[0]["betas"] == (0.0, 0.99)


def test_all_rules_have_the_same_amounts_on_images():
    runs = feedback.image_tuning_runs("not read")
    assert {c["rule"] for c in runs.variants.values()} == {*RULES}
    kept = ("budget", "final", "look", "looks", "decay", "problem", "width", "batch")
    amounts = {tuple(c[key] for key in kept) for c in runs.variants.values()}
    assert amounts == {(250, 2000, 2000, 1, 0.99, "mnist", 16, 64)}
    assert not any("steps" in c for c in runs.variants.values())


def test_the_best_trial_on_images_has_the_least_distance(tmp_path):
    tried = feedback.tried_settings("mnist")
    for i, name in enumerate(tried):
        distance = None if i % 8 == 7 else 500.0 - i  # the last trial of each rule diverged
        record = {"variant": name, "seed": 100, "result": {"fid": distance}}
        write_json(tmp_path / "tune-mnist" / f"{name}-100.json", record)
    runs = feedback.experiment("mnist", tmp_path)
    names = [*tried]
    for k, rule in enumerate(RULES):
        setting = tried[names[8 * k + 6]]
        assert setting.items() <= runs.variants[rule].items()
    assert runs.run is gans.run_images
    assert {c["budget"] for c in runs.variants.values()} == {1000}


def test_each_network_has_its_own_hidden_layers():
    config = {"z_dim": 3, "width": 2, "generator_hidden": [5, 4], "discriminator_hidden": [6]}
    networks = gans.make_networks(config, (1, 8, 8))
    units = [[m.out_features for m in net.net if isinstance(m, nn.Linear)] for net in networks]
    assert units == [[5, 4, 2 * 4 * 4], [6, 1]]
