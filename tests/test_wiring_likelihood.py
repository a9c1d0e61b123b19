"""`MaximumLikelihood`, flows and pixel models against explicit sums, Jacobians and enumerations."""

import itertools
import math

import pytest
import torch
from torch import nn

from optgen.data.images import Batch
from optgen.models.flow import (
    ActNorm,
    AffineCoupling,
    Logit,
    ResidualNet,
    image_flow,
    maf,
    realnvp,
)
from optgen.models.pixels import MADE, PixelCNN, PixelLSTM, gate
from optgen.optim import SGD, Adam
from optgen.schemes.likelihood import MaximumLikelihood, quantize_levels
from optgen.testing import generator, jacobian, randn

F64 = torch.float64


def randomized(module, seed=0, scale=0.5):
    """Return a module in float64 with random weights, those that start at 0 too."""
    module = module.to(F64)
    for i, p in enumerate(module.parameters()):
        p.data.copy_(scale * randn(*p.shape, seed=100 * seed + i))
    return module


# The scheme


def waves(y, a):
    """Return the sum of log(1 + a sin(1300 y)), (B,)."""
    return (1 + a * (1300 * y.flatten(1)).sin()).log().sum(1)


class Waves(nn.Module):
    """A density that changes within a gray level, with dropout of its parameter."""

    def __init__(self, a=0.8, dropout=0.0):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([a] * 4, dtype=F64))
        self.dropout, self.is_density = nn.Dropout(dropout), True

    def log_prob(self, y):
        """Return the log-density (B,)."""
        return waves(y, self.dropout(self.a))

    def sample(self, n):
        """Return numbers that touch both ends of the interval and cells between."""
        x = torch.linspace(-0.1, 1.1, 4 * n, dtype=F64).view(n, 1, 2, 2)
        return self.dropout(torch.ones_like(x)) * x


def gray_batch(seed, n):
    """Return images of gray levels n / 255."""
    x = torch.randint(256, (n, 1, 2, 2), generator=generator(seed))
    return x, Batch(x.to(F64) / 255)


@pytest.mark.parametrize("k", [1, 3])
def test_a_density_is_evaluated_by_the_k_sample_bound_of_gray_levels(k):
    scheme, rng, seed = MaximumLikelihood(Waves(dropout=0.5), "dequantized"), generator(8), 8
    (n1, first), (n2, second) = gray_batch(1, 11), gray_batch(2, 5)
    found = scheme.evaluate([first, second], seed=seed, k=k, chunk=4)
    assert scheme.model.training
    nats = []
    for n in (*n1.split(4), *n2.split(4)):
        # P(n) is the integral of the density over the cell of the width 1/256.
        noise = [torch.rand(n.shape, generator=rng, dtype=F64) for _ in range(k)]
        y = (n + torch.stack(noise)) / 256
        log_p = torch.stack([waves(sample, 0.8) for sample in y])
        nats.append(4 * math.log(256) - log_p)
    nats = torch.cat(nats, 1)
    bound = -((-nats).exp().mean(0)).log()
    assert found["n"] == 16
    assert found["loss"] == pytest.approx(nats.mean().item())
    assert found["nll"] == pytest.approx(bound.mean().item())
    assert found["nll_se"] == pytest.approx(bound.std().item() / 4)
    assert found["bits_per_dim"] == pytest.approx(bound.mean().item() / 4 / math.log(2))
    if k > 1:
        assert found["nll"] < found["loss"] - 0.1
    assert scheme.evaluate([first, second], seed=9, k=k)["loss"] != found["loss"]
    torch.manual_seed(3)
    assert scheme.evaluate([first, second], seed=seed, k=k, chunk=4) == found


@pytest.mark.parametrize("levels", [2, 3, 10, 16, 255, 256])
def test_gray_levels_are_rounded_down(levels):
    n = range(256)
    expected = [(i * levels // 256) / (levels - 1) for i in n]
    for dtype in (torch.float32, F64):
        found = quantize_levels(torch.tensor(n, dtype=dtype) / 255, levels)
        assert found.tolist() == pytest.approx(expected, abs=1e-6)
    scheme = MaximumLikelihood(MADE((1, 2, 2), (3,), levels), "levels" if levels > 2 else "binary")
    x = torch.tensor(n).view(64, 1, 2, 2) / 255
    if levels > 2:
        batch = scheme.draw(Batch(x))
        assert batch.x.flatten().tolist() == pytest.approx(expected, abs=1e-6)
        assert scheme.evaluate([x])["n"] == 64


def test_a_step_descends_the_mean_over_the_batch():
    model = Waves()
    scheme = MaximumLikelihood(model, "dequantized", SGD(model.parameters(), lr=0.1))
    n, batch = gray_batch(1, 6)
    torch.manual_seed(2)
    noise = torch.rand(n.shape, dtype=F64)
    torch.manual_seed(2)
    loss = scheme.step(batch)["model"]
    a = torch.full((4,), 0.8, dtype=F64, requires_grad=True)
    expected = 4 * math.log(256) - waves((n + noise) / 256, a).mean()
    torch.testing.assert_close(loss, expected.detach())
    (g,) = torch.autograd.grad(expected, a)
    torch.testing.assert_close(model.a.detach(), a.detach() - 0.1 * g)


def test_the_defaults_of_a_likelihood():
    model = Waves()
    scheme = MaximumLikelihood(model, "dequantized")
    (player,) = scheme.players.values()
    assert type(player.optimizer) is Adam and player.optimizer.param_groups[0]["lr"] == 1e-3
    batch = gray_batch(1, 4)[1]
    assert scheme.evaluate([batch]) == scheme.evaluate([batch], seed=0, k=1, chunk=200)
    assert scheme.evaluate([batch]) != scheme.evaluate([batch], seed=1)
    with pytest.raises(ValueError, match="k=2: the likelihood of binary data is exact"):
        MaximumLikelihood(MADE((1, 2, 2), (3,)), "binary").evaluate([batch], k=2)
    with pytest.raises(ValueError, match="pixel"):
        scheme.draw(Batch(batch.x + 0.001))


def test_drawn_gray_levels_are_the_cells_of_the_draws():
    scheme = MaximumLikelihood(Waves(dropout=0.9), "dequantized", shape=(4, 1, 1))
    x = scheme.sample(30)
    assert x.shape == (30, 4, 1, 1) and scheme.model.training
    draws = torch.linspace(-0.1, 1.1, 120, dtype=F64).tolist()
    expected = [min(max(math.floor(256 * y), 0), 255) for y in draws]
    assert x.mul(255).flatten().tolist() == pytest.approx(expected)


def test_the_first_batch_alone_calibrates_a_flow():
    flow = realnvp(4, 2, (5,), preprocessing=[Logit(0.1)]).to(F64)
    scheme = MaximumLikelihood(flow, "dequantized", SGD(flow.parameters(), lr=0.0))
    for p in flow.parameters():
        p.data.add_(0.1)
    first = scheme.draw(gray_batch(1, 50)[1])
    z, _ = flow.transforms[1](flow.transforms[0](first.x.flatten(1))[0])
    torch.testing.assert_close(z.mean(0), torch.zeros(4, dtype=F64), rtol=0, atol=1e-9)
    torch.testing.assert_close(z.var(0, correction=0), torch.ones(4, dtype=F64))
    before = [p.clone() for p in flow.parameters()]
    scheme.step(gray_batch(2, 50)[1])
    assert all(map(torch.equal, before, flow.parameters()))


@pytest.mark.parametrize("levels", [2, 5, 200])
def test_the_likelihood_of_pixels_is_a_sum_over_their_levels(levels):
    model = randomized(MADE((1, 2, 2), (7,), levels, dropout=0.5))
    scheme = MaximumLikelihood(model, "binary" if levels == 2 else "levels", shape=(1, 2, 2))
    n = torch.randint(256, (64, 1, 2, 2), generator=generator(1))
    x = (n >= 128).to(F64) if levels == 2 else n.to(F64) / 255
    target = (n * levels // 256).flatten(1)
    y = target.to(F64) / (levels - 1)
    found = scheme.evaluate([x[:4], Batch(x[4:])])
    model.eval()
    logits = model.net(y).view(64, model.outputs, 4)  # the first output of every pixel, and so on
    if levels == 2:
        logits = torch.cat([0 * logits, logits], 1)
    nats = -logits.log_softmax(1).gather(1, target[:, None]).sum((1, 2))
    assert found["nll"] == found["loss"] == pytest.approx(nats.mean().item())
    assert found["nll_se"] == pytest.approx(nats.std().item() / 8)
    assert found["bits_per_dim"] == pytest.approx(nats.mean().item() / 4 / math.log(2))


# Flows

FLOWS = {
    "realnvp": lambda: realnvp(6, 3, (5,), 0.7, preprocessing=[Logit(0.05)]),
    "maf": lambda: maf(6, 3, (8,), 0.7, preprocessing=[Logit(0.05)]),
    "image_flow": lambda: image_flow((1, 4, 8), 2, 2, 4, 2, 0.7, preprocessing=[Logit(0.05)]),
    "image_flow of three": lambda: image_flow((2, 8, 8), 3, 1, 3, 1),
}
some_flows = pytest.mark.parametrize("name", [n for n in FLOWS if n != "image_flow of three"])


def make_flow(name):
    """Return a flow with random weights, calibrated, and two images of it."""
    flow = randomized(FLOWS[name](), scale=0.4)
    x = torch.rand(20, *flow.shape, generator=generator(1), dtype=F64)
    flow.calibrate(x)
    return flow, x[:2]


@some_flows
def test_the_density_of_a_flow_is_that_of_its_jacobian(name):
    flow, x = make_flow(name)
    for image in x:
        image = image[None].clone().requires_grad_()
        z, log_det = flow(image)
        J = jacobian(z, image)
        normal = torch.distributions.Normal(torch.zeros_like(z), 1.0)
        expected = torch.linalg.slogdet(J).logabsdet
        torch.testing.assert_close(log_det[0], expected)
        nats = normal.log_prob(z).sum() + expected
        torch.testing.assert_close(flow.log_prob(image)[0], nats)
        D = z.numel()
        assert (J.abs() > 1e-12).sum() > 0.7 * D**2 or name != "maf"


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_is_inverted_and_its_draws_are_seeded(name):
    flow, x = make_flow(name)
    z, _ = flow(x)
    torch.testing.assert_close(flow.inverse(z), x, rtol=1e-6, atol=1e-8)
    noise = torch.randn(3, *flow.z_shape, generator=generator(7), dtype=F64)
    torch.testing.assert_close(flow.sample(3, generator(7)), flow.inverse(noise))


@some_flows
def test_a_new_flow_is_its_preprocessing_and_an_order(name):
    flow = FLOWS[name]().to(F64)
    x = torch.rand(3, *flow.shape, generator=generator(1), dtype=F64)
    z, log_det = flow(x)
    v = 0.05 + 0.9 * x.flatten(1)
    torch.testing.assert_close(z.flatten(1).sort().values, (v / (1 - v)).log().sort().values)
    torch.testing.assert_close(log_det, (0.9 / (v * (1 - v))).log().sum(1))


@pytest.mark.parametrize("name", FLOWS)
def test_every_act_norm_of_a_calibrated_flow_standardizes_that_batch(name):
    flow = randomized(FLOWS[name](), scale=0.4)
    x, outputs = torch.rand(30, *flow.shape, generator=generator(3), dtype=F64), []

    def keep(module, inputs, output):
        """Keep the image of the layer."""
        outputs.append(output[0])

    flow.calibrate(x)
    norms = [m for m in flow.modules() if isinstance(m, ActNorm)]
    for norm in norms:
        norm.register_forward_hook(keep)
    flow(x)
    assert len(outputs) == len(norms) > 1
    for z in outputs:
        by_number = z if z.dim() == 2 else z.transpose(0, 1).flatten(1).T
        torch.testing.assert_close(by_number.mean(0), torch.zeros_like(by_number[0]))
        torch.testing.assert_close(by_number.var(0, correction=0), torch.ones_like(by_number[0]))


def checkerboard(shape):
    """Return 1 where row and column have an odd sum."""
    C, H, W = shape
    return [[[(i + j) % 2 for j in range(W)] for i in range(H)] for _ in range(C)]


def half_of_channels(shape):
    """Return 1 in the first half of the channels."""
    C, H, W = shape
    return [[[int(c < C // 2)] * W for _ in range(H)] for c in range(C)]


def expand(mask, shape):
    """Return a mask in the shape of the images, as a list."""
    return mask.expand(shape).int().tolist()


def complement(mask):
    """Return a mask of the other numbers."""
    return [[[1 - v for v in row] for row in channel] for channel in mask]


@pytest.mark.parametrize("couplings", [1, 3])
def test_the_masks_of_an_image_flow_alternate_in_every_scale(couplings):
    flow = image_flow((1, 4, 8), 2, couplings, 3, 1, 0.9)
    found = [m for m in flow.modules() if isinstance(m, AffineCoupling)]
    assert all(m.max_log_scale == 0.9 for m in found)
    expected = []
    for shape in ((1, 4, 8), (2, 2, 4)):
        squeezed = (4 * shape[0], shape[1] // 2, shape[2] // 2)
        for make, own in ((checkerboard, shape), (half_of_channels, squeezed)):
            for k in range(couplings):
                mask = make(own)
                expected.append((own, mask if k % 2 else complement(mask)))
    for coupling, (shape, mask) in zip(found, expected, strict=True):
        assert expand(coupling.mask, shape) == mask


def test_the_masks_of_realnvp_alternate():
    found = [m for m in realnvp(5, 3, (4,), 0.9).modules() if isinstance(m, AffineCoupling)]
    assert all(m.max_log_scale == 0.9 for m in found)
    masks = [m.mask.tolist() for m in found]
    assert masks == [[1, 0, 1, 0, 1], [0, 1, 0, 1, 0], [1, 0, 1, 0, 1]]


def test_half_of_the_numbers_leave_a_flow_at_every_scale():
    x = randn(2, 2, 8, 8, seed=3)
    flow = image_flow((2, 8, 8), 3, 1, 3, 1).to(F64)  # at first only rearrangements
    z, _ = flow(x)
    channels = nn.functional.pixel_unshuffle(x, 2)  # 8 channels of 4 x 4
    inner = nn.functional.pixel_unshuffle(channels[:, :4], 2)  # 16 of 2 x 2
    last = nn.functional.pixel_unshuffle(inner[:, :8], 2)  # 32 of 1 x 1
    second = torch.cat([last, inner[:, 8:].reshape(last.shape)], 1)
    expected = torch.cat([second, channels[:, 4:].reshape(second.shape)], 1)
    torch.testing.assert_close(z, expected)


def test_log_scales_are_bounded_and_blocks_are_residual():
    net = randomized(ResidualNet(2, 3, 2))
    x = randn(2, 2, 4, 4, seed=1)
    h = nn.functional.conv2d(x, net.start.weight, net.start.bias, padding=1)
    for block in net.blocks:
        first, second = block[1], block[3]
        a = nn.functional.conv2d(h.clamp(min=0), first.weight, first.bias, padding=1)
        h = h + nn.functional.conv2d(a.clamp(min=0), second.weight, second.bias)
    out = nn.functional.conv2d(h.clamp(min=0), net.end.weight, net.end.bias, padding=1)
    torch.testing.assert_close(net(x), torch.stack([out[:, :2], out[:, 2:]], 1))
    mask = torch.tensor(checkerboard((2, 4, 4)), dtype=F64)
    coupling = AffineCoupling(mask, net, 0.3)
    a, t = net(mask * x).unbind(1)
    z, log_det = coupling(x)
    log_scale = 0.3 * (a / 0.3).tanh()
    torch.testing.assert_close(z, torch.where(mask > 0, x, x * log_scale.exp() + t))
    torch.testing.assert_close(log_det, (log_scale * (1 - mask)).flatten(1).sum(1))


@pytest.mark.parametrize("layers", [1, 2])
def test_a_masked_flow_sees_the_numbers_before_and_then_in_reverse(layers):
    flow = randomized(maf(5, layers, (12,)), scale=0.8)
    x = randn(1, 5, seed=2).requires_grad_()
    J = jacobian(flow(x)[0], x).abs() > 1e-12
    if layers == 1:  # the order is reversed once
        assert torch.equal(J.flip(0), torch.ones(5, 5, dtype=torch.bool).tril())
    else:
        assert J.sum() > 20


# Pixel models

SHAPE = (1, 2, 2)
PIXEL_MODELS = {
    "made": lambda levels: MADE(SHAPE, (9,), levels, direct=True),
    "deep made": lambda levels: MADE(SHAPE, (6, 7), levels),
    "lstm": lambda levels: PixelLSTM(SHAPE, 4, 2, levels),
    "pixelcnn": lambda levels: PixelCNN(SHAPE, 3, 2, 1, levels, 1),
}
every_pixel_model = pytest.mark.parametrize("name", PIXEL_MODELS)


def all_images(levels):
    """Return all images of 2 x 2 pixels."""
    values = [v / (levels - 1) for v in range(levels)]
    return torch.tensor(list(itertools.product(values, repeat=4)), dtype=F64).view(-1, *SHAPE)


@pytest.mark.parametrize("levels", [2, 3])
@every_pixel_model
def test_probabilities_of_all_images_sum_to_one_and_are_those_of_draws(name, levels):
    model, n = randomized(PIXEL_MODELS[name](levels), scale=0.7), 6000
    images = all_images(levels)
    p = model.log_prob(images).exp().detach()
    assert p.sum().item() == pytest.approx(1.0)
    draws = model.sample(n, generator(5)).mul(levels - 1)
    assert (draws - draws.round()).abs().max() < 1e-9
    digits = draws.round().long().flatten(1) @ (levels ** torch.tensor([3, 2, 1, 0]))
    counts = digits.bincount(minlength=levels**4)
    chi2 = ((counts - n * p) ** 2 / (n * p).clamp(min=1e-9))[n * p > 1].sum().item()
    cells = int((n * p > 1).sum())
    assert chi2 < cells + 6 * (2 * cells) ** 0.5


@pytest.mark.parametrize("levels", [2, 3])
@every_pixel_model
def test_a_pixel_is_conditioned_on_all_pixels_before_it(name, levels):
    model = randomized(PIXEL_MODELS[name](levels), scale=0.7)
    x = torch.rand(8, *SHAPE, generator=generator(1), dtype=F64).requires_grad_()
    logits = model.logits(x)
    assert logits.shape == (8, 4, 1 if levels == 2 else levels)
    for i in range(4):
        J = jacobian(logits[:, i].sum(0), x).view(-1, 8, 4).abs().sum((0, 1)) > 1e-12
        assert J.tolist() == [j < i for j in range(4)]


@pytest.mark.parametrize("name", ["made", "lstm", "pixelcnn"])
def test_a_drawn_pixel_sees_what_the_likelihood_sees(name):
    models = {
        "made": lambda: MADE((1, 9, 3), (30,), 3),
        "lstm": lambda: PixelLSTM((1, 9, 3), 5, 2, 3),
        "pixelcnn": lambda: PixelCNN((1, 12, 3), 3, 3, 1, 3, 1, (1, 2)),
    }
    model = randomized(models[name](), scale=0.7)
    x = model.sample(4, generator(2))
    logits = model.logits(x)
    for i, found in enumerate(model.successive_logits(x)):
        torch.testing.assert_close(found, logits[:, i])
    # By the same random numbers, pixel after pixel from the logits of the whole image.
    rng, again = generator(2), torch.zeros_like(x)
    for i in range(logits.shape[1]):
        p = model.logits(again)[:, i].softmax(-1)
        level = torch.multinomial(p, 1, generator=rng)[:, 0]
        again.view(4, -1)[:, i] = level.to(F64) / 2
    assert torch.equal(again, x)


@pytest.mark.parametrize("dilations", [(1,), (1, 2), (3, 1)])
def test_a_pixel_of_the_pixel_cnn_sees_the_rows_in_its_reach(dilations):
    model = randomized(PixelCNN((1, 16, 3), 3, 3, 1, 2, 2, dilations), scale=0.7)
    x = torch.rand(1, 1, 16, 3, generator=generator(1), dtype=F64).requires_grad_()
    seen = jacobian(model.logits(x)[0, -2], x).abs().view(16, 3).sum(1) > 1e-12
    assert seen.tolist() == [row >= 15 - model.rows_in_reach for row in range(16)]


def shifted(h, rows, columns):
    """Return images moved down and to the right, zeros before them."""
    H, W = h.shape[2:]
    padded = nn.functional.pad(h, (max(0, columns), max(0, -columns), rows, 0))
    return padded[:, :, :H, max(0, -columns) :][..., :W]


def tap_by_tap(conv, h, rows, columns):
    """Return a convolution as a sum over its taps, each at an offset (up, left) of the pixel."""
    total = conv.bias.view(1, -1, 1, 1)
    for a, up in enumerate(rows):
        for b, left in enumerate(columns):
            total = total + torch.einsum(
                "oi,bihw->bohw", conv.weight[:, :, a, b], shifted(h, up, left)
            )
    return total


def test_the_pixel_cnn_is_two_stacks_of_dilated_taps():
    model = randomized(PixelCNN((1, 6, 5), 2, 3, 1, 4, 2, (1, 2)), scale=0.6)
    x = torch.rand(2, 1, 6, 5, generator=generator(1), dtype=F64)
    rows, columns = torch.meshgrid(
        torch.linspace(-1, 1, 6, dtype=F64), torch.linspace(-1, 1, 5, dtype=F64), indexing="ij"
    )
    model.places = torch.stack([rows, columns])
    v = h = torch.cat([x, model.places.expand(2, -1, -1, -1)], 1)
    for layer, radius, dilation in zip(model.layers, (2, 1, 1), (1, 1, 2)):
        ups = [dilation * (radius - a) for a in range(radius + 1)]
        lefts = [dilation * (radius - b) for b in range(2 * radius + 1)]
        down = tap_by_tap(layer.down, v, ups, lefts)
        # The first layer does not see the pixel itself.
        own = [dilation * (radius - b) for b in range(radius + (not layer.first))]
        right = tap_by_tap(layer.right, h, [0], own)
        mixed = right + tap_by_tap(layer.mix, shifted(down, 1, 0), [0], [0])
        values, gates = mixed[:, :2], mixed[:, 2:]
        update = tap_by_tap(layer.out, values.tanh() * gates.sigmoid(), [0], [0])
        v = down[:, :2].tanh() * down[:, 2:].sigmoid()
        h = update if layer.first else h + update
    assert [layer.first for layer in model.layers] == [True, False, False]
    hidden, last = model.out[1], model.out[3]
    h = tap_by_tap(hidden, h.clamp(min=0), [0], [0]).clamp(min=0)
    expected = tap_by_tap(last, h, [0], [0]).flatten(2).mT
    torch.testing.assert_close(model.logits(x), expected)
    a = randn(1, 4, 2, 2)
    torch.testing.assert_close(gate(a), a[:, :2].tanh() / (1 + (-a[:, 2:]).exp()))


def test_the_pixel_lstm_reads_each_pixel_after_a_mark_of_the_beginning():
    model = randomized(PixelLSTM((1, 2, 3), 4, 2, 3))
    x = torch.rand(2, 1, 2, 3, generator=generator(1), dtype=F64)
    state = [(torch.zeros(2, 4, dtype=F64),) * 2 for _ in range(2)]
    before = torch.cat([torch.zeros(2, 1, dtype=F64), x.flatten(1)[:, :-1]], 1)
    for i in range(6):
        h = torch.stack([before[:, i], torch.full((2,), float(i == 0), dtype=F64)], 1)
        for layer in range(2):
            w, u, b, c = (
                getattr(model.lstm, f"{name}_l{layer}")
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            hidden, cell = state[layer]
            i_gate, f_gate, g, o_gate = (h @ w.T + b + hidden @ u.T + c).chunk(4, 1)
            cell = f_gate.sigmoid() * cell + i_gate.sigmoid() * g.tanh()
            h = o_gate.sigmoid() * cell.tanh()
            state[layer] = (h, cell)
        expected = h @ model.out.weight.T + model.out.bias
        torch.testing.assert_close(model.logits(x)[:, i], expected)


def test_made_starts_at_the_mean_image_and_drops_units():
    mean = torch.tensor([0.1, 0.5, 0.9, 0.3])
    model = MADE(SHAPE, (8, 5), x_mean=mean, dropout=0.4, direct=True)
    for p in list(model.net.parameters())[:-1]:
        nn.init.zeros_(p)
    model.eval()
    x = torch.rand(3, *SHAPE)
    torch.testing.assert_close(model.logits(x)[..., 0].sigmoid(), mean.expand(3, 4))
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.4, 0.4]
    assert model.direct.weight.abs().max() == 0


@pytest.mark.parametrize("shape", [(3,), (3, 2, 4)])
def test_an_act_norm_takes_a_small_deviation_for_a_thousandth(shape):
    norm, x = ActNorm(shape).to(F64), torch.rand(50, *shape, generator=generator(1), dtype=F64)
    x[:, 1] = 0.25
    norm.calibrate(x)
    z, log_det = norm(x)
    assert norm.log_scale[1].item() == pytest.approx(math.log(1000))
    assert z[:, 1].abs().max() < 1e-9
    pixels = math.prod(shape[1:])
    expected = pixels * norm.log_scale.sum()
    torch.testing.assert_close(log_det, expected.expand(50))
    torch.testing.assert_close(norm.inverse(z), x)
