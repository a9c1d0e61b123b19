"""What comes out of a run: loading, samples in files, pictures of latents, and models to share."""

import base64
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import optgen
from cli_helpers import assert_one_line, run, train_args
from optgen.cli.measure import SampleWriter
from optgen.cli.runs import OpenRun, RunError
from optgen.models.vae import VAE
from optgen.schemes.elbo import BetaVAE
from optgen.training import checkpoint, drawing
from optgen.training.checkpoint import CheckpointError
from optgen.training.sharing import load_pretrained, push_to_hub, save_pretrained
from optgen.training.trainer import fit


@pytest.fixture(scope="module")
def vae(few_images, tmp_path_factory):
    """A finished run of a VAE with averages and a best epoch; tests must not change it."""
    out = tmp_path_factory.mktemp("outputs") / "vae"
    args = "--hidden 6,5 --z-dim 3 --epochs 3 --patience 9 --ema 0.6 --binarize static --out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optgen.training.callbacks.Pictures.on_epoch", lambda *args: None)
        assert run(*train_args("beta-vae", few_images, args), out) == 0
    return out


def weights_of(run):
    """Return the weights of a VAE's run by name."""
    return dict(run.scheme.model.named_parameters())


# Loading


def test_importing_the_package_does_not_import_torch():
    code = "import sys, optgen; assert 'torch' not in sys.modules; optgen.load, optgen.push_to_hub"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert {"load", "from_pretrained", "push_to_hub"} <= set(dir(optgen))
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        optgen.laod


@pytest.mark.parametrize("which", ["best", "last"])
@pytest.mark.parametrize("averaged", [True, False])
def test_load_gives_the_weights_that_are_asked_for(which, averaged, vae):
    name = "best.pt" if which == "best" else "checkpoint.pt"
    state = torch.load(vae / name, weights_only=True)["state"]
    expected = state["ema"][0] if averaged else state["scheme"]["model"]["weights"]
    found = optgen.load(vae, which=which, averaged=averaged, device="cpu")
    for key, p in weights_of(found).items():
        assert torch.equal(p, expected[f"module.{key}" if averaged else key])
    assert not found.scheme.model.training and found.config["options"]["z_dim"] == 3
    lines = [json.loads(line) for line in (vae / "metrics.jsonl").read_text().splitlines()]
    assert found.records == lines and found.state["step"] == state["step"]


def test_load_leaves_the_random_numbers_alone(vae):
    before = torch.get_rng_state()
    optgen.load(vae, device="cpu").sample(3)
    assert torch.equal(before, torch.get_rng_state())


def test_load_of_a_schedule_free_run_gives_the_averaged_weights(tmp_path, digit_images):
    from schedulefree import AdamWScheduleFree

    def make():
        """Return a new scheme with a schedule-free optimizer."""
        model = VAE(784, 6, 5, 2)
        return BetaVAE(model, optimizer=AdamWScheduleFree(model.parameters(), lr=0.01))

    trained = make()
    fit(trained, digit_images, epochs=1, out=tmp_path / "x", binarize="static", progress="none")
    state = torch.load(tmp_path / "x/checkpoint.pt", weights_only=True)["state"]["scheme"]["model"]
    found = optgen.load(tmp_path / "x", make(), device="cpu")
    raw = optgen.load(tmp_path / "x", make(), averaged=False, device="cpu")
    for i, (key, y) in enumerate(state["weights"].items()):
        z = state["optimizer"]["state"][i]["z"]
        x = y + (1 - 1 / 0.9) * (z - y)  # y = (1 - 0.9) z + 0.9 x
        assert torch.allclose(found.scheme.model.get_parameter(key), x, atol=1e-6)
        assert torch.equal(raw.scheme.model.get_parameter(key), y)
        assert not torch.allclose(x, y, atol=1e-6)


@pytest.fixture(scope="module")
def digit_images():
    """A few hundred digits."""
    from optgen.data.images import digits

    return digits("train").subset(torch.arange(200))


def test_errors_in_python_are_not_those_of_the_command_line(vae, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    config = json.loads((vae / "config.json").read_text())
    for changed, kind, message in (
        (None, RunError, "is not a run folder"),
        ("[", CheckpointError, "can't be read"),
        ({**config, "scheme": "gan"}, RunError, "no scheme 'gan'"),
        ({**config, "shape": [8]}, RunError, "'shape' must be three whole numbers"),
        (config, CheckpointError, "no checkpoint at"),
    ):
        if changed is not None:
            text = changed if isinstance(changed, str) else json.dumps(changed)
            (copy / "config.json").write_text(text)
        with pytest.raises(kind, match=message.replace("[", r"\[")) as caught:
            optgen.load(copy)
        assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)


# Samples


@pytest.mark.parametrize("seed", [0, 5])
def test_samples_do_not_depend_on_their_number_nor_on_the_chunk(seed, vae, tmp_path):
    found = {}
    for n, chunk in ((10, 1), (150, 64), (150, 1000)):
        path = tmp_path / f"{n}-{chunk}.npz"
        assert run("sample", vae, f"--n {n} --chunk {chunk} --seed {seed} --out", path) == 0
        found[n, chunk] = np.load(path)["arr_0"]
    assert found[150, 64].shape == (150, 8, 8, 1) and found[150, 64].dtype == np.uint8
    assert np.array_equal(found[150, 64], found[150, 1000])
    assert np.array_equal(found[10, 1], found[150, 64][:10])
    model = optgen.load(vae, device="cpu").scheme.model
    torch.manual_seed(seed)
    with torch.no_grad():
        first = model.decoder(torch.randn(64, 3)).view(64, 8, 8, 1)
    assert np.array_equal(found[150, 64][:64], (255 * first + 0.5).byte().numpy())
    assert not np.array_equal(found[150, 64][:64], found[150, 64][64:128])


def test_a_folder_is_completed_and_nothing_else_is_mixed_into_it(vae, tmp_path, capsys):
    folder, npz = tmp_path / "samples", tmp_path / "x.npz"
    assert run("sample", vae, "--n 130 --out", npz) == 0
    pixels = np.load(npz)["arr_0"][..., 0]
    assert run("sample", vae, "--n 70 --out", folder) == 0
    times = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.png")}
    (folder / "000003.png").unlink()
    assert run("sample", vae, "--n 130 --out", folder) == 0
    names = sorted(p.name for p in folder.glob("*.png"))
    assert names == [f"{i:06}.png" for i in range(130)]
    for i, name in enumerate(names):
        assert np.array_equal(np.asarray(Image.open(folder / name)), pixels[i])
    kept = [name for name in times if (folder / name).stat().st_mtime_ns == times[name]]
    assert len(kept) == 69
    capsys.readouterr()
    for more, message in (("--seed 1", "other weights, seed"), ("--n 9", "more than the 9")):
        assert run("sample", vae, f"--n 130 {more} --out", folder) == 2
        assert_one_line(capsys.readouterr().err, message)
    assert run("sample", vae, "--n 9 --seed 1 --overwrite --out", folder) == 0
    assert len([*folder.glob("*.png")]) == 9


def test_an_interrupted_file_leaves_nothing(vae, tmp_path, monkeypatch, capsys):
    path, draw = tmp_path / "x.npz", drawing.draw_block

    def fail(function, block, *args):
        """Draw, and fail in the second block as a full disk does."""
        if block:
            raise OSError(28, "No space left on device")
        return draw(function, block, *args)

    monkeypatch.setattr(drawing, "draw_block", fail)
    assert run("sample", vae, "--n 100 --chunk 64 --out", path) == 1
    assert_one_line(capsys.readouterr().err, "No space left on device")
    assert not [*tmp_path.iterdir()]
    path.write_bytes(b"mine")
    assert run("sample", vae, "--n 100 --out", path) == 2
    assert_one_line(capsys.readouterr().err, "exists: choose another file, or add --overwrite")
    assert run("sample", vae, "--n 100 --overwrite --out", path) == 1  # fails, and keeps it
    assert path.read_bytes() == b"mine" and len([*tmp_path.iterdir()]) == 1


class Conditional(nn.Module):
    """A scheme of three classes whose images show their class and where they were drawn."""

    conditional, n_classes = True, 3
    players = {"model": type("Player", (), {"params": {"w": torch.zeros(1)}})}

    def sample(self, n, labels=None):
        """Return images of one pixel."""
        return labels.view(n, 1, 1, 1) / 10


@pytest.mark.parametrize("name, expected", [(None, [0, 1, 2]), ("cat", [1]), ("2", [2])])
def test_classes_are_drawn_in_turn_or_one_of_them(name, expected):
    config = {"classes": ["ape", "cat", "dog"], "shape": [1, 1, 1]}
    opened = OpenRun(config, None, Conditional(), {})
    images = opened.sample(200, class_name=name)
    drawn = (10 * images).round().long().flatten()
    assert torch.equal(drawn, torch.tensor(expected * 200)[:200])
    with pytest.raises(ValueError, match="no class 'cow'; there are: ape, cat, dog"):
        opened.sample(2, class_name="cow")


def test_a_picture_has_a_column_for_each_class(tmp_path):
    """Twelve single pixels make three columns and four rows, with two pixels between them."""
    opened = OpenRun(
        {"classes": ["ape", "cat", "dog"], "shape": [1, 1, 1]}, None, Conditional(), {}
    )
    path = tmp_path / "classes.png"
    SampleWriter(opened, 12, 0, opened.class_cycle(), {}, 64).to_picture(path)
    with Image.open(path) as picture:
        assert picture.size == (3 * 3 + 2, 4 * 3 + 2)
        pixels = torch.from_numpy(np.array(picture.convert("L"))).long()
    for column, shade in enumerate((0, 26, 51)):  # 0, 0.1 and 0.2 of 255
        drawn = pixels[2::3, 2 + 3 * column]
        assert len(drawn) == 4 and ((drawn - shade).abs() <= 1).all()


def test_mistakes_with_samples_are_one_line(vae, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    for args, code, message in (
        (("--out", tmp_path / "x.jpg"), 2, "--out takes a .png file, an .npz file or a folder"),
        (("--class 3",), 2, "trained without classes"),
        (("--chunk 0",), 2, "must be a whole number from 1"),
        (("--out", tmp_path), 2, "is not empty, and its files are not samples"),
    ):
        assert run("sample", vae, *args) == code
        assert_one_line(capsys.readouterr().err, message)
    assert (tmp_path / "notes.txt").read_text() == "mine" and len([*tmp_path.iterdir()]) == 1


# Pictures


def test_pictures_of_a_vae(vae, tmp_path, capsys, few_images):
    for command, more in (
        ("interpolate", "--rows 1 --columns 3"),
        ("interpolate", "--from noise --rows 2"),
        ("reconstruct", "--n 3"),
        ("traverse", "--dims 2 --columns 3"),
        ("traverse", "--from noise"),
    ):
        path = tmp_path / f"{command}.png"
        assert run(command, vae, more, "--split train --out", path) == 0, capsys.readouterr().err
        assert np.asarray(Image.open(path)).std() > 1
        path.unlink()
    capsys.readouterr()
    for command, more, message in (
        ("interpolate", "--rows 0", "must be a whole number from 1"),
        ("reconstruct", "--out x.jpg", "--out takes a .png file"),
        ("traverse", "--image 999", "are asked for"),
        ("traverse", "--class 1", "trained without classes"),
        ("traverse", "--steps 9", "--steps is not an option of beta-vae"),
    ):
        assert run(command, vae, more) == 2
        assert_one_line(capsys.readouterr().err, message)


def test_images_without_the_classes_of_a_conditional_run_are_one_line(
    few_images, tmp_path, capsys, no_pictures
):
    for i, path in enumerate(sorted(few_images.iterdir())):
        for folder in (f"two/{'ab'[i % 2]}", f"three/{'abc'[i % 3]}"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / path.name).write_bytes(path.read_bytes())
    out = tmp_path / "run"
    options = "--conditional --model flat --layers 2 --hidden 8,7 --epochs 1 --out"
    assert run(*train_args("realnvp", tmp_path / "two", options), out) == 0
    for picture, data in (
        ("reconstruct", few_images),
        ("interpolate", few_images),
        ("reconstruct --n 50", tmp_path / "three"),
    ):
        capsys.readouterr()
        assert run(*picture.split(), out, "--split train --data", data) == 2
        assert_one_line(capsys.readouterr().err, "without a class of the run", "a, b")
    assert run("reconstruct", out, "--split train --data", tmp_path / "two") == 0


@pytest.mark.parametrize(
    "scheme, options, pictures",
    [
        ("feedback-gan", "--width 2 --z-dim 4", ("interpolate", "traverse")),
        ("realnvp", "--channels 4 --scales 1", ("interpolate", "reconstruct")),
        ("ddpm", "--channels 4 --multiples 1,2", ("interpolate", "reconstruct")),
        ("assisted", "--labels 12 --method m1 --hidden 6,5", ("reconstruct", "traverse")),
        ("made", "--hidden 6", ()),
    ],
)
def test_pictures_and_exports_of_the_schemes(
    scheme, options, pictures, few_images, tmp_path, capsys, no_pictures
):
    data = few_images
    if scheme == "assisted":
        data = tmp_path / "labeled"
        for i, path in enumerate(sorted(few_images.iterdir())):
            (data / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            (data / "ab"[i % 2] / path.name).write_bytes(path.read_bytes())
    out = tmp_path / "run"
    assert run(*train_args(scheme, data, options), "--epochs 1 --out", out) == 0
    for picture in ("interpolate", "reconstruct", "traverse"):
        code = run(picture, out)
        shown = capsys.readouterr()
        if picture in pictures:
            assert code == 0 and (out / f"{picture}.png").exists(), shown.err
            if (scheme, picture) == ("realnvp", "reconstruct"):
                assert "largest difference 0.0000" in shown.out
        elif scheme != "assisted":
            assert code == 2
            assert_one_line(shown.err, f"a run of {scheme} has no latents to {picture}", "beta-vae")
    assert run("export", out, "--torch-export --to", tmp_path / "shared") == 0
    here, there = optgen.load(out, device="cpu"), optgen.from_pretrained(tmp_path / "shared")
    for name, player in here.scheme.players.items():
        other = there.scheme.players[name].params
        assert all(torch.equal(p, other[key].cpu()) for key, p in player.params.items())
    assert [*(tmp_path / "shared").glob("*.pt2")]


# Sharing


@pytest.fixture(scope="module")
def shared(vae, tmp_path_factory):
    """The folder of an exported model; tests must not change it."""
    folder = tmp_path_factory.mktemp("shared") / "vae"
    assert run("export", vae, "--to", folder) == 0
    return folder


def test_the_folder_has_the_layout_and_the_card_of_the_hub(vae, shared):
    from huggingface_hub import ModelCard
    from safetensors import safe_open

    assert {p.name for p in shared.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "samples.png",
    }
    best = torch.load(vae / "best.pt", weights_only=True)["state"]
    with safe_open(shared / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith("model.")]
        assert len(names) == len(best["scheme"]["model"]["weights"])
        assert {name.split(".")[0] for name in file.keys()} == {"model", "beta"}
        for name in names:
            expected = best["ema"][0][f"module.{name.removeprefix('model.')}"]
            assert torch.equal(file.get_tensor(name), expected)
    card = ModelCard.load(shared / "README.md")
    records = [json.loads(line) for line in (vae / "metrics.jsonl").read_text().splitlines()]
    numbers = next(r["valid"] for r in records if r["epoch"] == best["epoch"])
    assert card.data.library_name == "optgen" and "beta-vae" in card.data.tags
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == numbers
    for words in ("binarize static", "binarized once", "1 × 8 × 8", "samples.png"):
        assert words in card.content
    config = json.loads((shared / "config.json").read_text())
    assert config["options"]["data"] == "mine" and config["metrics"] == numbers
    assert str(vae.parent) not in card.content + json.dumps(config)


def test_a_shared_model_is_sampled_and_refused_where_it_was_changed(vae, shared, tmp_path, capsys):
    for folder, name in ((vae, "a"), (shared, "b")):
        assert run("sample", folder, "--n 70 --out", tmp_path / f"{name}.npz") == 0
    assert (tmp_path / "a.npz").read_bytes()[200:4000] == (tmp_path / "b.npz").read_bytes()[
        200:4000
    ]
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in shared.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    capsys.readouterr()
    for changed, message in (
        ({"options": {**config["options"], "z_dim": 4}}, "saved"),
        ({"options": {**config["options"], "magic": 4}}, "takes no option 'magic'"),
        ({"scheme": "made"}, "made takes no option"),
        ({"version": 9}, "reads up to 1"),
        ({"sha256": "0"}, "is damaged, or not of this config.json"),
        ({"parts": {"beta": {"entries": 3}}}, "damaged"),
    ):
        (copy / "config.json").write_text(json.dumps(config | changed))
        assert run("sample", copy) == 2
        assert_one_line(capsys.readouterr().err, message)
        with pytest.raises(ValueError, match=message):
            optgen.from_pretrained(copy)
    assert run("export", vae, "--to", shared) == 2
    assert_one_line(capsys.readouterr().err, "holds an exported model", "--overwrite")
    assert run("export", vae, "--to", vae) == 2
    assert_one_line(capsys.readouterr().err, "is not empty, and holds no exported model")


def test_a_model_of_ones_own_classes(tmp_path, digit_images):
    trained = BetaVAE(VAE(784, 6, 5, 2), beta=3.0)
    fit(trained, digit_images, epochs=1, ema=0.8, binarize="static", progress="none")
    folder = save_pretrained(trained, tmp_path / "mine")
    found = optgen.from_pretrained(folder, BetaVAE(VAE(784, 6, 5, 2), beta=3.0), device="cpu")
    for p, mean in zip(found.scheme.model.parameters(), trained.averages[0].means):
        assert torch.equal(p, mean)
    assert not torch.equal(p, [*trained.model.parameters()][-1])  # the trained ones are as before
    with pytest.raises(CheckpointError, match="saved 3.0, here 1.0"):
        load_pretrained(BetaVAE(VAE(784, 6, 5, 2)), folder)
    with pytest.raises(RunError, match="classes of its author's"):
        optgen.from_pretrained(folder)


class Hub(BaseHTTPRequestHandler):
    """A server that takes a commit as the Hub does."""

    def do_POST(self):
        """Answer the calls of an upload, and keep them."""
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        url = f"http://{self.headers['Host']}"
        if self.path.startswith("/api/repos/create"):
            answer = {"url": f"{url}/user/vae", "name": "user/vae"}
        elif "/preupload/" in self.path:
            kinds = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": f["path"], **kinds} for f in json.loads(body)["files"]]}
        else:
            answer = {"commitUrl": f"{url}/user/vae/commit/1", "commitOid": "1", "success": True}
        self.server.calls.append((self.path, body))
        self.respond(200, answer)

    def do_GET(self):
        """Answer that nothing is there."""
        self.respond(404, {"error": "not found"})

    do_HEAD = do_GET

    def respond(self, code, answer):
        """Send JSON."""
        content = json.dumps(answer).encode()
        self.send_response(self.server.code or code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        """Print nothing."""


@pytest.fixture
def hub(monkeypatch):
    """A running server in the place of the Hub."""
    server = HTTPServer(("127.0.0.1", 0), Hub)
    server.calls, server.code = [], None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(
        "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}"
    )
    yield server
    server.shutdown()
    server.server_close()


def test_a_folder_is_uploaded_as_one_commit(hub, shared):
    url = push_to_hub(shared, "user/vae", token="hf_x", message="mine")
    assert url.endswith("/user/vae/commit/1")
    path, body = hub.calls[-1]
    assert path.startswith("/api/models/user/vae/commit/main")
    lines = [json.loads(line) for line in body.splitlines()]
    assert lines[0]["value"]["summary"] == "mine"
    sent = {part["value"]["path"]: part["value"]["content"] for part in lines[1:]}
    assert sent.keys() == {"README.md", "config.json", "model.safetensors", "samples.png"}
    for name, content in sent.items():
        assert base64.b64decode(content) == (shared / name).read_bytes()


def test_an_upload_that_fails_is_one_line(hub, shared, tmp_path, vae, capsys):
    hub.code = 403
    assert run("export", vae, "--push user/vae --to", tmp_path / "new") == 2
    assert_one_line(capsys.readouterr().err, "was not uploaded to user/vae")
    assert (tmp_path / "new/README.md").exists()
    with pytest.raises(CheckpointError, match="can't be read|was not written by optgen"):
        push_to_hub(vae, "user/vae")


def test_an_opened_run_is_shown_in_a_line(vae, shared):
    found = optgen.load(vae, device="cpu")
    assert (
        repr(found) == f"OpenRun({str(found.path)!r}, scheme=BetaVAE, epochs={len(found.records)})"
    )
    assert "\n" not in repr(optgen.from_pretrained(shared, device="cpu"))
    assert len(repr(optgen.from_pretrained(shared, device="cpu"))) < 300


def test_a_model_comes_from_the_hub(shared, monkeypatch):
    asked = []

    def snapshot_download(repo_id, **settings):
        """Keep the arguments."""
        asked.append((repo_id, settings["revision"]))
        return str(shared)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    found = optgen.from_pretrained("user/vae", revision="v1", device="cpu")
    assert asked == [("user/vae", "v1")] and found.sample(2).shape == (2, 1, 8, 8)


def test_without_the_extra_the_message_says_what_to_install(
    shared, monkeypatch, vae, tmp_path, capsys
):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'optgen\[hub\]'"):
        optgen.from_pretrained("user/vae")
    with pytest.raises(ImportError, match="there is no folder user/vae"):
        optgen.from_pretrained("user/vae")
    with pytest.raises(RunError, match="nowhere holds no model"):
        optgen.from_pretrained("./nowhere")
    assert run("export", vae, "--push user/vae --to", tmp_path / "x") == 1
    assert_one_line(capsys.readouterr().err, "pip install 'optgen[hub]'")


def test_a_checkpoint_that_was_saved_by_another_program_is_no_run(vae, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.json").write_bytes((vae / "config.json").read_bytes())
    checkpoint.save(copy / "checkpoint.pt", {"model": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="is not the state of a run"):
        optgen.load(Path(copy))
