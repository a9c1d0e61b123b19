"""The work of a draw, counted: it grows with the size of what is drawn, and repeats nothing."""

import math
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from optgen.models.autoregressive import AutoregressiveVAE, SequenceVAE
from optgen.models.diffusion import Denoiser, PerceptronDenoiser
from optgen.models.flow import MaskedAutoregressive, maf
from optgen.models.pixels import MADE, PixelCNN, PixelLSTM, PixelModel
from optgen.models.schedules import PowerSchedule
from optgen.models.tokens import TokenLSTM
from optgen.schemes.denoising import DenoisingDiffusion
from optgen.schemes.language import LanguageModel
from optgen.testing import generator, jacobian

F64 = torch.float64


def build(factory, seed=0, scale=1.5):
    """Return a module in float64, its weights larger than at first, from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = factory().double()
        for p in model.parameters():
            p.data.mul_(scale).add_(0.1 * torch.randn_like(p))
    return model


def flops(function):
    """Return the operations of the matrix products in a call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


# Images that are tall, flat, narrower than the kernels, and of one row, column or pixel.
PIXEL_MODELS = {
    "pixelcnn": lambda: PixelCNN((1, 9, 7), 6, 5),
    "pixelcnn of 256": lambda: PixelCNN((1, 5, 6), 4, 3, levels=256),
    "pixelcnn of a row": lambda: PixelCNN((1, 1, 11), 4, 3, levels=3),
    "pixelcnn of a column": lambda: PixelCNN((1, 11, 1), 4, 3, 2, 3),
    "pixelcnn of a pixel": lambda: PixelCNN((1, 1, 1), 4, 2),
    "pixelcnn of one layer": lambda: PixelCNN((1, 4, 6), 4, 1, 1, 2, 2),
    "dilated pixelcnn": lambda: PixelCNN((1, 12, 8), 3, 5, 2, 4, 1, (1, 3)),
    "made": lambda: MADE((1, 5, 6), (17,), 4),
    "direct made of 256": lambda: MADE((3, 2, 3), (40, 7), 256, direct=True),
    "wide made": lambda: MADE((1, 2, 3), (50, 60), direct=True),
    "made without units": lambda: MADE((2, 2, 3), (), 3),
    "made of a pixel": lambda: MADE((1, 1, 1), (3,)),
    "lstm": lambda: PixelLSTM((3, 3, 4), 5, 2, 4),
}
every_pixel_model = pytest.mark.parametrize("name", PIXEL_MODELS)


@pytest.mark.parametrize("seed", [0, 1])
@every_pixel_model
def test_draws_are_those_of_a_pass_over_the_image_at_each_pixel(name, seed):
    model, rng, n = build(PIXEL_MODELS[name], seed), generator(seed + 5), 4
    x = model.sample(n, generator(seed + 5))
    again = torch.zeros_like(x)
    with torch.no_grad():
        for i in range(again[0].numel()):
            logits = model.logits(again)[:, i]
            again.view(n, -1)[:, i] = model.draw_level(logits, rng)
        assert torch.equal(x, again)
        whole = model.logits(x)
        for i, logits in enumerate(model.successive_logits(x)):
            torch.testing.assert_close(logits, whole[:, i], rtol=1e-10, atol=1e-10)
        assert i == math.prod(model.shape) - 1


@every_pixel_model
def test_draws_in_bfloat16_and_in_training_mode_have_the_levels(name):
    model = build(PIXEL_MODELS[name]).bfloat16()
    x = model.sample(3, generator(1))
    assert x.dtype == torch.bfloat16 and torch.equal(x, model.sample(3, generator(1)))
    steps = x.float() * (model.levels - 1)
    assert (steps - steps.round()).abs().max() <= 0.5 and 0 <= x.min() and x.max() <= 1


@every_pixel_model
def test_a_draw_is_no_more_work_than_one_pass_over_the_image(name):
    model = build(PIXEL_MODELS[name])
    x = torch.zeros(3, *model.shape, dtype=F64)
    assert flops(lambda: model.sample(3)) <= flops(lambda: model.logits(x))
    one_pass = flops(lambda: model.logits(x))
    assert flops(lambda: [*PixelModel.successive_logits(model, x)]) == x[0].numel() * one_pass


def decode(model, n):
    """Draw n examples of a VAE whose decoder draws."""
    return model.decoder(torch.zeros(n, model.z_dim, dtype=F64), generator())


# Name: a function of a size that returns the draw of a model of that size.
STEPWISE = {
    "rows of a pixelcnn": lambda n: build(lambda: PixelCNN((1, n, 4), 3, 4)).sample,
    "columns of a pixelcnn": lambda n: build(lambda: PixelCNN((1, 3, n), 3, 4)).sample,
    "rows of an lstm": lambda n: build(lambda: PixelLSTM((1, n, 4), 5, 2)).sample,
    "autoregressive vae": lambda n: partial(
        decode, build(lambda: AutoregressiveVAE((1, n, 4), 2, hidden=3, width=4, radius=2))
    ),
    "sequence vae": lambda n: partial(decode, build(lambda: SequenceVAE(7, n, 2, 3, 4))),
    "recurrent model": lambda n: partial(
        build(lambda: TokenLSTM(9, 3, 5, 2)).sample, length=n, prompt=torch.tensor([1, 2, 3])
    ),
    "text": lambda n: partial(
        LanguageModel(build(lambda: TokenLSTM(256, 3, 5))).sample, length=n, prompt="ab"
    ),
}


@pytest.mark.parametrize("name", STEPWISE)
def test_every_step_of_a_draw_is_the_same_work(name):
    first, second, third = (flops(partial(STEPWISE[name](n), 2)) for n in (6, 12, 24))
    # What does not grow, such as a prompt, is in all three.
    assert third - second == 2 * (second - first) > 0


def test_the_inverse_of_a_masked_flow_is_no_more_work_than_the_flow():
    flow, z = build(lambda: maf(12, 3, (9, 20))), torch.zeros(5, 12, dtype=F64)
    assert 0 < flops(lambda: flow.inverse(z)) <= flops(lambda: flow(z))


@pytest.mark.parametrize("hidden", [(), (3,), (40, 7)])
def test_the_inverse_of_a_masked_layer_has_the_inverse_jacobian(hidden):
    layer = build(lambda: MaskedAutoregressive(6, hidden))
    x = torch.randn(1, 6, generator=generator(2), dtype=F64).requires_grad_()
    z = layer(x)[0]
    J = jacobian(z[0], x).view(6, 6)
    z = z.detach().requires_grad_()
    back = layer.inverse(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(jacobian(back[0], z).view(6, 6) @ J, torch.eye(6, dtype=F64))


class CountingSchedule(PowerSchedule):
    """A schedule that counts how often its levels are computed."""

    calls = 0

    def level(self, t):
        """Return the levels, and count."""
        self.calls += 1
        return super().level(t)


@pytest.mark.parametrize(
    ("conditional", "guidance"), [(False, 1.0), (True, 0.0), (True, 1.0), (True, 2.0)]
)
@pytest.mark.parametrize(("sampler", "calls"), [("ddim", 5), ("heun", 9), ("ancestral", 5)])
def test_levels_are_computed_once_a_draw_and_the_network_once_a_slope(
    sampler, calls, conditional, guidance
):
    network = PerceptronDenoiser(4, 8, 1, classes=3 if conditional else 0)
    dropout = 0.1 if conditional else 0.0
    scheme = DenoisingDiffusion(
        Denoiser(network, (4,)), conditional=conditional, pixels=False, label_dropout=dropout
    )
    schedule, sizes = CountingSchedule(), []
    schedule.calls = 0
    network.register_forward_hook(lambda module, given, out: sizes.append(len(out)))
    for _ in range(2):
        scheme.sample(6, sampler, 5, schedule, guidance=guidance)
    assert schedule.calls == 2
    assert sizes == [12 if guidance == 2 else 6] * 2 * calls
