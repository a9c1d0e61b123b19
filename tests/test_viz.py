"Pictures of the installed package: their pixels, lines and arrows are the numbers given."

import base64
import io
import itertools
import json
import math
import re

import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image

from optgen.metrics import measure_calibration
from optgen.testing import randn
from optgen.viz import (
    ARROW_GAP,
    EDGE_LOOKS,
    NODE_LOOKS,
    ROUND_NODES,
    Edge,
    FrameSlider,
    Node,
    draw_diagram,
    image_grid,
    new_figure,
    phase_portrait,
    plot_curves,
    read_log,
    reliability_diagram,
    save_image_grid,
    upstream,
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


def drawn_parts(ax):
    """Return the borders of a diagram's nodes, and its arrows as (start, tip)."""
    heads = [patch for patch in ax.patches if type(patch).__name__ == "Polygon"]
    borders = [patch for patch in ax.patches if patch not in heads]
    arrows = [(line.get_xydata()[0], head.get_xy()[0]) for line, head in zip(ax.lines, heads)]
    assert len(ax.lines) == len(heads)
    return borders, [tuple(map(torch.tensor, arrow)) for arrow in arrows]


def is_inside(border, ax, point):
    """Return whether a point in inches lies within a border, whose line has no width."""
    return border.contains_point(ax.transData.transform(point), radius=0)


def wheel(kind, both_ways):
    """Return a diagram whose hub is joined to twelve nodes around it."""
    nodes = {"hub": Node(2.0, 1.0, "the hub", kind)}
    for i in range(12):
        angle = 0.1 + math.pi * i / 6
        place = (2 + 2 * math.cos(angle), 1 + 2 * math.sin(angle))
        nodes[f"{i}"] = Node(*place, f"$z_{{{i}}}$", list(NODE_LOOKS)[i % 5])
    edges = [Edge("hub", name) for name in nodes if name != "hub"]
    if both_ways:
        edges += [Edge(b, a, "gradient") for a, b, *_ in edges]
    return nodes, edges


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("kind", NODE_LOOKS)
def test_arrows_end_at_the_borders_of_their_nodes(kind, both_ways):
    nodes, edges = wheel(kind, both_ways)
    ax = draw_diagram(nodes, edges).axes[0]
    borders, arrows = drawn_parts(ax)
    assert len(borders) == len(nodes) and len(arrows) == len(edges)
    border_of = dict(zip(nodes, borders))
    for edge, (start, tip) in zip(edges, arrows):
        along = (tip - start) / (tip - start).norm()
        for name, end, inwards in ((edge.source, start, -along), (edge.target, tip, along)):
            # The corners of a box are rounded by up to 0.02 inches.
            step = (0.003 if nodes[name].kind in ROUND_NODES else 0.02) * inwards
            assert is_inside(border_of[name], ax, end + step), edge
            assert not is_inside(border_of[name], ax, end - step), edge


@pytest.mark.parametrize("both_ways", [False, True])
def test_opposite_arrows_run_side_by_side_and_single_ones_between_the_centers(both_ways):
    nodes, edges = wheel("network", both_ways)
    _, arrows = drawn_parts(draw_diagram(nodes, edges).axes[0])
    for edge, (start, tip) in zip(edges, arrows):
        source, target = (torch.tensor(nodes[name][:2]).double() for name in edge[:2])
        along = (target - source) / (target - source).norm()
        left = torch.stack([-along[1], along[0]])
        for point in (start, tip):
            aside = (point - source) @ left
            assert abs(aside - (ARROW_GAP if both_ways else 0.0)) < 1e-6
        assert (tip - start) @ along > 0


def test_every_label_is_drawn_beside_its_arrow():
    ends = {"right": (3, 0), "left": (-3, 0), "up": (0, 2), "down": (0, -2), "aslant": (2.5, 1.5)}
    nodes = {"hub": Node(0, 0, "hub")} | {k: Node(*at, k, "value") for k, at in ends.items()}
    edges = [Edge("hub", name, label=f"to the {name}") for name in ends]
    fig = draw_diagram(nodes, edges)
    ax = fig.axes[0]
    extents = {text.get_text(): text.get_window_extent() for text in ax.texts}
    labels = [*(node.label for node in nodes.values()), *(edge.label for edge in edges)]
    assert [text.get_text() for text in ax.texts] == labels
    assert not any(a.overlaps(b) for a, b in itertools.combinations(extents.values(), 2))
    for edge, (start, tip) in zip(edges, drawn_parts(ax)[1]):
        box = extents[edge.label]
        for t in torch.linspace(0, 1, 101):
            assert not box.contains(*ax.transData.transform(start + t * (tip - start))), edge
        middle = torch.tensor(ax.transData.inverted().transform(((box.x0 + box.x1) / 2, box.y0)))
        (a, b), (c, d) = tip - start, middle - start
        assert a * d - b * c > 0, edge  # it lies to the left of its arrow
        center = ax.transData.transform((start + tip) / 2)
        away = math.dist(center, ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2))
        assert away < math.hypot(box.width, box.height) / 2 + 0.06 * fig.dpi, edge


def test_a_diagram_is_as_large_as_what_it_shows():
    nodes = {"a": Node(-1.0, 5.0, "first"), "b": Node(1.5, 7.0, "second", "observed")}
    kinds = list(EDGE_LOOKS)
    for n in range(1, len(kinds) + 1):
        fig = draw_diagram(nodes, [Edge("a", "b", kind) for kind in reversed(kinds[:n])])
        ax = fig.axes[0]
        extents = [artist.get_window_extent() for artist in (*ax.texts, *ax.patches)]
        for box in extents:
            assert fig.bbox.x0 <= box.x0 and box.x1 <= fig.bbox.x1
            assert fig.bbox.y0 <= box.y0 and box.y1 <= fig.bbox.y1
        inches = ax.transData.transform([(0, 0), (1, 1)])
        assert (inches[1] - inches[0]).tolist() == pytest.approx([fig.dpi, fig.dpi])
        if n == 1:
            assert not fig.legends
            continue
        (legend,) = fig.legends
        assert [t.get_text() for t in legend.get_texts()] == [EDGE_LOOKS[k][0] for k in kinds[:n]]
        for handle, kind in zip(legend.get_lines(), kinds):
            assert handle.get_color() == EDGE_LOOKS[kind][1]["color"]
        box = legend.get_window_extent()
        assert fig.bbox.x0 <= box.x0 and box.x1 <= fig.bbox.x1 and box.y0 >= 0
        assert not any(box.overlaps(other) for other in extents)


def test_an_edge_of_an_unknown_node_is_one_error_with_all_names():
    nodes = {"a": Node(0, 0, "a"), "b": Node(1, 0, "b"), "above a": Node(0, 0, "c")}
    message = r"^draw_diagram: edges join \['c', 'd'\], which are not nodes: the nodes are \['a', "
    with pytest.raises(ValueError, match=message):
        draw_diagram(nodes, [Edge("a", "b"), Edge("d", "b"), Edge("a", "c")])
    with pytest.raises(ValueError, match="kind must be one of .*'feedback'.*got 'back'"):
        draw_diagram(nodes, [Edge("a", "b", "back")])
    with pytest.raises(ValueError, match="kind must be one of .*'loss'.*got 'round'"):
        draw_diagram(nodes | {"e": Node(2, 0, "e", "round")}, [])
    for other in ("a", "above a"):
        with pytest.raises(ValueError, match=f"'a' and '{other}' stand at one point"):
            draw_diagram(nodes, [Edge("a", other)])
    with pytest.raises(ValueError, match="no"):
        draw_diagram({}, [])


def test_upstream_follows_arrows_of_one_kind_to_their_start():
    edges = [
        Edge("x", "f"),
        Edge("f", "loss"),
        Edge("g", "f", "value"),
        Edge("loss", "f", "gradient"),
        Edge("f", "other"),
        Edge("x", "g"),
        Edge("y", "loss", label="of few"),
    ]
    assert upstream(edges, "loss") == [edges[0], edges[1], edges[6]]
    assert upstream(edges, "f", "gradient") == [edges[3]]
    assert upstream(edges, "x") == [] == upstream(edges, "unheard of")
    chain = [Edge(a, b) for a, b in itertools.pairwise("abcdef")]
    assert upstream(chain, "f") == chain and upstream(chain, "c") == chain[:2]
    loop = [Edge("a", "b"), Edge("b", "a")]
    assert upstream(loop, "a") == loop


def test_a_notebook_shows_figures_before_pyplot_has_made_one(monkeypatch):
    shells = pytest.importorskip("IPython.core.interactiveshell")
    figure = new_figure(1.0, 1.0)
    shell = shells.InteractiveShell()
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    formatter = shell.display_formatter.formatters["image/png"]
    assert formatter(figure) is None
    picture = formatter(new_figure(3.0, 2.0, dpi=50))
    assert Image.open(io.BytesIO(picture)).format == "PNG"
    formatter.for_type(type(figure), lambda figure: b"the notebook's own")
    assert formatter(new_figure(1.0, 1.0)) == b"the notebook's own"
