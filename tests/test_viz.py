"Pictures of the installed package: their pixels, lines and arrows are the numbers given."

import base64
import io
import json
import re

import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image

from optgen.metrics import measure_calibration
from optgen.testing import randn
from optgen.viz import (
    FrameSlider,
    image_grid,
    new_figure,
    phase_portrait,
    plot_curves,
    read_log,
    reliability_diagram,
    save_image_grid,
)


def test_images_stand_in_rows(tmp_path):
    x = randn(5, 1, 4, 3).clamp(0, 1)
    picture = image_grid(x)
    assert picture.shape == (3, 2 * 6 + 2, 3 * 5 + 2)
    for i in range(5):
        top, left = 2 + i // 3 * 6, 2 + i % 3 * 5
        assert torch.equal(picture[1, top : top + 4, left : left + 3], x[i, 0].float())
    save_image_grid(x, tmp_path / "new" / "x.png", columns=1)
    assert Image.open(tmp_path / "new" / "x.png").size == (3 + 4, 5 * 6 + 2)


def test_integers_are_levels_and_floats_are_clamped():
    levels = image_grid(torch.full((1, 3, 2, 2), 51, dtype=torch.uint8), padding=0)
    assert torch.allclose(levels, torch.tensor(0.2))
    assert image_grid(torch.full((1, 3, 2, 2), 9.0)).max() == 1
    with pytest.raises(ValueError, match=r"got \(3, 2, 2\)"):
        image_grid(torch.zeros(3, 2, 2))


def test_a_log_is_read_up_to_a_line_cut_off(tmp_path):
    log = tmp_path / "metrics.jsonl"
    assert read_log(log) == []
    log.write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    assert read_log(log) == [{"epoch": 1}, {"epoch": 2}]


def test_curves_are_the_numbers_of_the_log():
    records = [
        {"epoch": e, "train": {"loss": e**2}, "valid": {"loss": e**3, "kl_rate": 1 / e}}
        for e in (1, 2, 3)
    ]
    assert json.loads(json.dumps(records)) == records
    fig = plot_curves(records)
    loss, kl_rate = fig.axes
    assert (loss.get_title(), kl_rate.get_title()) == ("loss", "kl rate")
    lines = {line.get_label(): line.get_xydata().tolist() for line in loss.lines}
    assert lines == {"train": [[1, 1], [2, 4], [3, 9]], "valid": [[1, 1], [2, 8], [3, 27]]}
    assert [line.get_label() for line in kl_rate.lines] == ["valid"]
    with pytest.raises(ValueError, match="no records"):
        plot_curves([])


def test_the_arrows_of_a_portrait_are_roots_of_speeds():
    ax = phase_portrait(
        lambda p: -p, {"a": torch.ones(4, 2)}, (0.5, 0), half_width=1, arrows_per_side=5
    )
    arrows, points = ax.collections[0], torch.tensor(ax.collections[0].XY)
    moves = torch.stack([torch.as_tensor(arrows.U), torch.as_tensor(arrows.V)], 1)
    speed = points.norm(dim=1, keepdim=True)
    expected = -points * 0.5 / (speed * 2**0.5).sqrt().clamp(min=1e-9)
    assert torch.allclose(moves, expected) and len(points) == 25
    path, start, cross = ax.lines
    assert path.get_label() == "a" and start.get_xydata().tolist() == [[1, 1]]
    assert cross.get_xydata().tolist() == [[0.5, 0]]
    assert ax.get_xlim() == ax.get_ylim() == (-1, 1)
    with pytest.raises(ValueError, match=r"got \(169,\)"):
        phase_portrait(lambda p: p[:, 0])


def test_a_portrait_is_drawn_on_the_axes_given():
    fig, ax = plt.subplots()
    assert phase_portrait(lambda p: p, ax=ax) is ax
    plt.close(fig)


def test_a_reliability_diagram_shows_the_bins():
    claimed = torch.tensor([[0.9, 0.1]] * 4 + [[0.6, 0.4]] * 2)
    found = measure_calibration(claimed, torch.tensor([0, 0, 0, 1, 0, 1]), bins=5)
    top, below = reliability_diagram(found, error=1 / 3).axes
    assert [bar.get_height() for bar in top.patches] == pytest.approx([0, 0, 0, 0.5, 0.75])
    assert [bar.get_height() for bar in below.patches] == pytest.approx([0, 0, 0, 1 / 3, 2 / 3])
    assert top.get_title().startswith("error 33.33%, calibration error")
    assert reliability_diagram(found).axes[0].get_title().startswith("calibration error")


def test_a_slider_holds_every_figure_and_shows_one(tmp_path):
    frames = {}
    for name, width in (("a & b", 2.0), ("c", 3.0)):
        frames[name] = new_figure(width, 1.0)
    html = FrameSlider(frames, "size", "A <figure>", start="c", dpi=50)._repr_html_()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    sizes = [Image.open(io.BytesIO(base64.b64decode(picture))).size for picture in pictures]
    assert sizes == [(100, 50), (150, 50)]
    assert re.findall(r"display: (\w+)\"", html) == ["none", "block"]
    assert "A &lt;figure&gt; size a &amp; b." in html and "<output>c</output>" in html
    assert 'data-labels="a &amp; b|c"' in html and 'max="1" value="1"' in html
    for wrong in ({"c": frames["c"]}, {}):
        with pytest.raises(ValueError, match="at least two frames"):
            FrameSlider(wrong, "size", "")
    with pytest.raises(ValueError, match="FrameSlider: start must be one of"):
        FrameSlider(frames, "size", "", start="d")
