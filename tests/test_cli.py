"The command line, as its user meets it."

import json
import math

import pytest
import torch
from conftest import TINY, optgen
from PIL import Image

from optgen.cli.main import main


def run(*args):
    "Run a command in this process; its exit code."
    try:
        main([str(a) for a in args])
    except SystemExit as e:
        return e.code
    return 0


def test_a_run_folder_tells_the_run(tiny_run):
    files = {str(p.relative_to(tiny_run)) for p in tiny_run.rglob("*") if p.is_file()}
    assert files == {
        "config.json",
        "metrics.jsonl",
        "checkpoint.pt",
        "curves.png",
        "samples/epoch-0001.png",
        "samples/epoch-0002.png",
    }
    config = json.loads((tiny_run / "config.json").read_text())
    assert (
        config["scheme"] == "beta-vae"
        and config["options"]["hidden"] == "16,8"
        and config["environment"]["torch"] == torch.__version__
    )
    records = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [1, 2] and records[1]["valid"]["loss"] < records[0][
        "valid"
    ]["loss"]


def test_sample(tiny_run, tmp_path, capsys):
    for n, side in ((1, 28), (9, 92), (64, 242)):
        assert run("sample", tiny_run, "--n", n, "--out", tmp_path / "x.png") == 0
        assert Image.open(tmp_path / "x.png").size == (side, side)
    first = (tmp_path / "x.png").read_bytes()
    run("sample", tiny_run, "--n", 64, "--out", tmp_path / "x.png")
    assert first == (tmp_path / "x.png").read_bytes()
    run("sample", tiny_run, "--n", 64, "--out", tmp_path / "x.png", "--seed", 1)
    assert first != (tmp_path / "x.png").read_bytes()
    assert run("sample", tiny_run, "--out", tmp_path / "x.jpg") == 2


def test_evaluate(tiny_run, capsys):
    assert run("evaluate", tiny_run, "--k", 20, "--limit", 300, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (
        told["n"] == 300
        and told["k"] == 20
        and told["split"] == "test"
        and told["nll"] < -told["elbo"]
        and 0 <= told["active_units"] <= 2
    )
    assert abs(told["loss"] - (told["rate"] + told["distortion"])) < 1e-9
    assert run("evaluate", tiny_run, "--k", 20, "--limit", 300) == 0
    table = capsys.readouterr().out
    assert "\x1b" not in table and f"{told['nll']:.4f}" in table


def test_resume_goes_on_with_the_run(tiny_run, tmp_path):
    assert optgen(*TINY, "--epochs", 1, "--out", tmp_path / "run").returncode == 0
    assert (
        optgen(
            "train", "--resume", tmp_path / "run", "--epochs", 2, "--progress", "none"
        ).returncode
        == 0
    )
    a, b = (
        torch.load(run / "checkpoint.pt", weights_only=True)["state"]["scheme"]["model"]["weights"]
        for run in (tmp_path / "run", tiny_run)
    )
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_the_default_folder_is_never_one_that_is_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run(*TINY, "--epochs", 1) == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [
        "beta-vae-digits",
        "beta-vae-digits-2",
    ]
    assert "optgen evaluate runs/beta-vae-digits-2" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_your_own_colour_images_with_averaging_and_early_stopping(tmp_path, model, capsys):
    g = torch.Generator().manual_seed(0)
    for i in range(60):
        colour = torch.randint(256, (3,), generator=g).tolist()
        path = tmp_path / f"mine/{'ab'[i % 2]}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 30), tuple(colour)).save(path)
    out = tmp_path / "run"
    assert (
        run(
            "train",
            "beta-vae",
            "--data",
            tmp_path / "mine",
            "--image-size",
            16,
            "--model",
            model,
            "--hidden",
            "32,16",
            "--z-dim",
            2,
            "--batch-size",
            10,
            "--epochs",
            3,
            "--ema",
            0.9,
            "--patience",
            2,
            "--optimizer",
            "adamw",
            "--progress",
            "none",
            "--out",
            out,
        )
        == 0
    )
    assert (out / "best.pt").exists()
    assert run("sample", out, "--n", 4) == 0 and Image.open(out / "samples.png").size == (38, 38)
    assert run("evaluate", out, "--k", 5) == 0


def test_list_and_version(capsys):
    assert run("list") == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("beta-vae", "fashion-mnist", "rmsprop"))
    assert run("--version") == 0 and "0.3" in capsys.readouterr().out


def test_a_mistake_of_ours_keeps_its_traceback(tiny_run, monkeypatch):
    import optgen.training.trainer  # the trainer takes its own save_grid before it is broken
    import optgen.viz

    def broken(*_):
        raise RuntimeError("our mistake")

    monkeypatch.setattr(optgen.viz, "save_grid", broken)
    with pytest.raises(RuntimeError, match="our mistake"):
        main(["sample", str(tiny_run)])


def test_help_does_not_wait_for_torch():
    import subprocess
    import sys

    code = "import sys; from optgen.cli.main import main\ntry: main(['train', '--help'])\nfinally: assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.fixture(scope="session")
def few_images(tmp_path_factory):
    "Sixty grey images of 8 x 8 in a folder."
    folder, g = tmp_path_factory.mktemp("images") / "mine", torch.Generator().manual_seed(0)
    folder.mkdir()
    for i in range(60):
        Image.fromarray(torch.randint(256, (8, 8), dtype=torch.uint8, generator=g).numpy()).save(
            folder / f"{i:02}.png"
        )
    return folder


def gan(few_images, *args):
    return [
        "train",
        "feedback-gan",
        "--data",
        few_images,
        "--image-size",
        8,
        "--width",
        4,
        "--hidden",
        "8",
        "--z-dim",
        3,
        "--batch-size",
        10,
        "--progress",
        "none",
        *args,
    ]


RULES = (
    "simultaneous",
    "alternating:D=2",
    "alternating:inner=consensus",
    "extragradient:past=true",
    "optimistic",
    "consensus",
    "literal",
    "nagarajan-kolter",
    "smoothing",
    "symplectic:align=false",
    "lookahead:inner=extragradient,every=2",
    "unrolled:player=D,steps=2",
    "competitive:iterations=2",
)


@pytest.mark.parametrize(
    "rule, model", [(rule, ("mlp", "conv")[i % 2]) for i, rule in enumerate(RULES)]
)
def test_a_gan_by_every_rule(rule, model, few_images, tmp_path, capsys):
    from optgen.cli.main import RULES as names

    assert {r.partition(":")[0] for r in RULES} == set(names)
    weight = (
        ("--weight", 0.02)
        if any(
            word in rule
            for word in ("consensus", "literal", "nagarajan", "smoothing", "symplectic")
        )
        else ()
    )
    assert (
        run(
            *gan(
                few_images,
                "--rule",
                rule,
                *weight,
                "--model",
                model,
                "--epochs",
                2,
                "--out",
                tmp_path / "run",
            )
        )
        == 0
    )
    capsys.readouterr()
    assert run("evaluate", tmp_path / "run", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["scheme"] == "feedback-gan"
        and found["epoch"] == 2
        and {"G", "D", "fid", "fid_floor"} <= found.keys()
        and found["fid"] >= 0
    )
    assert (
        run("sample", tmp_path / "run", "--n", 4) == 0
        and Image.open(tmp_path / "run/samples.png").size[0] > 16
    )


def test_a_gan_resumes_and_averages(few_images, tmp_path):
    options = (
        "--rule",
        "lookahead:inner=consensus,every=3",
        "--weight",
        0.1,
        "--ema",
        0.9,
        "--r1",
        0.5,
    )
    for name, epochs in (("whole", 4), ("half", 2)):
        assert run(*gan(few_images, *options, "--epochs", epochs, "--out", tmp_path / name)) == 0
    assert run("train", "--resume", tmp_path / "half", "--epochs", 4, "--progress", "none") == 0
    whole, half = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["state"]
        for name in ("whole", "half")
    )
    for a, b in (
        (whole["scheme"]["G"]["weights"], half["scheme"]["G"]["weights"]),
        (whole["ema"][0], half["ema"][0]),
    ):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(
        not torch.equal(w, whole["ema"][0][f"module.{k}"])
        for k, w in whole["scheme"]["G"]["weights"].items()
    )
    config = json.loads((tmp_path / "half/config.json").read_text())
    config["options"]["rule"] = "competitive"
    config["options"]["weight"] = None
    (tmp_path / "half/config.json").write_text(json.dumps(config))
    assert (
        run("train", "--resume", tmp_path / "half", "--epochs", 5, "--progress", "none") == 1
        and run("evaluate", tmp_path / "half") == 1
    )


@pytest.mark.parametrize(
    "args, word",
    [
        (("--compile", "--rule", "consensus"), "Consensus differentiates twice"),
        (("--compile", "--r1", 1), "R1 and R2"),
        (("--r1", "nan"), "finite"),
        (("--image-size", 4), "at least 8 x 8"),
        (("--rule", "unrolled:player=E"), "'E' is neither"),
        (("--rule", 'unrolled:player="E"'), "names a player 'E'"),
        (("--rule", 'competitive:lr="a"'), "lr must be a finite number"),
        (("--rule", "consensus:weights=1"), "weights"),
        (("--rule", "alternating", "--weight", 1), "inner=consensus"),
        (("--holdout", 0.01), "needs two at least"),
        (("--seed", 2**70), "--seed"),
        (("--rule", "consensus", "--weight", "nan"), "finite"),
    ],
)
def test_mistakes_with_a_gan_are_one_line_and_leave_nothing(
    args, word, few_images, tmp_path, capsys
):
    assert run(*gan(few_images, *args, "--out", tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert word in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.fixture
def undrawn(monkeypatch):
    "To save time, a run leaves no pictures."
    monkeypatch.setattr("optgen.training.trainer.RunFolder.draw", lambda *args: None)


def vae(few_images, *args):
    return [
        "train",
        "beta-vae",
        "--data",
        few_images,
        "--image-size",
        8,
        "--hidden",
        "16,8",
        "--z-dim",
        2,
        "--batch-size",
        10,
        "--epochs",
        1,
        "--progress",
        "none",
        *args,
    ]


GREY = ("--likelihood", "gaussian", "--binarize", "none")
WAYS = {
    **{
        beta: ("--beta", beta)
        for beta in (
            "0.5",
            "warmup",
            "warmup:epochs=2,start=0.5",
            "cyclical:cycles=2",
            "capacity:target=2",
            "free-bits",
            "free-bits:minimum=0.5,groups=1",
            "geco:target=40",
            "control:kl=1",
        )
    },
    "sigma": ("--beta", "sigma", *GREY),
    "gaussian": GREY,
    **{
        f"{name} {k}": ("--estimator", name, "--k", k)
        for name, k in (("elbo", 2), ("stl", 1), ("iwae", 3), ("dreg", 3))
    },
    **{
        f"{name} sampled": ("--estimator", name, "--k", 3, "--sampled") for name in ("iwae", "dreg")
    },
    **{
        inference: ("--inference", inference)
        for inference in (
            "amortised",
            "aggressive:check=1,most=2,window=1",
            "semi",
            "semi:steps=2,mode=adjoint,clip=null",
        )
    },
    "conv": ("--model", "conv", "--beta", "geco:target=40"),
    "autoregressive": (
        "--model",
        "autoregressive",
        "--beta",
        "control:kl=1",
        "--estimator",
        "iwae",
        "--k",
        2,
        "--inference",
        "aggressive:check=1,most=2,window=2",
    ),
    "all": (
        "--beta",
        "sigma",
        *GREY,
        "--inference",
        "semi:steps=1",
        "--estimator",
        "dreg",
        "--k",
        2,
        "--sampled",
        "--ema",
        0.9,
    ),
}


def state(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["state"]["scheme"]


@pytest.mark.parametrize("way", WAYS)
def test_a_vae_every_way(way, few_images, tmp_path, capsys, undrawn):
    assert run(*vae(few_images, *WAYS[way], "--out", tmp_path / "run")) == 0
    before = state(tmp_path / "run")["beta"]
    assert before["t"] == 6  # 54 images, ten a step
    assert run("train", "--resume", tmp_path / "run", "--epochs", 2, "--progress", "none") == 0
    assert (
        state(tmp_path / "run")["beta"]["t"] == 12
        and state(tmp_path / "run")["beta"]["name"] == before["name"]
    )
    capsys.readouterr()
    assert run("evaluate", tmp_path / "run", "--k", 5, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["epoch"] == 2
        and found["mutual_information"] <= found["mutual_information_ceiling"]
        and found["pixels"].startswith("grey" if "gaussian" in WAYS[way] else "binarised")
    )
    assert abs(found["beta"] - state(tmp_path / "run")["beta"]["value"].mean()) < 1e-6
    assert (
        run("evaluate", tmp_path / "run", "--k", 5) == 0
        and "mutual information ceiling" in capsys.readouterr().out
    )
    assert run("sample", tmp_path / "run", "--n", 4) == 0 and Image.open(
        tmp_path / "run/samples.png"
    ).size == (22, 22)


def test_every_name_is_tried():
    from optgen.cli.main import BETAS, INFERENCE

    tried = [str(word).partition(":")[0] for args in WAYS.values() for word in args]
    assert {*BETAS, *INFERENCE, "conv", "autoregressive", "gaussian"} <= set(tried)


def test_a_schedule_is_of_the_length_with_which_the_run_began(few_images, tmp_path, undrawn):
    "Three epochs of six steps and a fourth: as four at once, but for the schedule, which is as long as was asked for at first."
    for name, beta in (
        ("warmup", "warmup:epochs=2"),
        ("cyclical", "cyclical:cycles=1"),
        ("capacity", "capacity:target=1e6"),
    ):
        out = tmp_path / name
        assert run(*vae(few_images, "--beta", beta, "--epochs", 3, "--out", out)) == 0
        assert json.loads((out / "config.json").read_text())["options"]["steps"] == 18
        assert run("train", "--resume", out, "--epochs", 4, "--progress", "none") == 0
        config = json.loads((out / "config.json").read_text())
        assert (
            config["epochs"] == 4
            and config["options"]["steps"] == 18
            and config["options"]["epoch_steps"] == 6
        )
    from optgen.cli.main import open_run

    betas = {
        name: open_run(tmp_path / name, "cpu")[1].beta
        for name in ("warmup", "cyclical", "capacity")
    }
    assert betas["warmup"].steps == 12 and betas["cyclical"].steps == betas["capacity"].steps == 18
    assert betas["warmup"].value == betas["cyclical"].value == 1 and betas["capacity"].value == -10


def test_a_run_of_02_still_opens(few_images, tmp_path, undrawn):
    assert run(*vae(few_images, "--out", tmp_path / "run")) == 0
    whole = tmp_path / "whole"
    assert run(*vae(few_images, "--epochs", 2, "--out", whole)) == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    for key in ("estimator", "k", "sampled", "inference", "likelihood", "steps", "epoch_steps"):
        config["options"].pop(key)
    config["options"]["beta"] = 1.0
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    kept = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    kept["state"]["scheme"].pop("beta")
    torch.save(kept, tmp_path / "run/checkpoint.pt")
    assert run("evaluate", tmp_path / "run", "--k", 5) == run("sample", tmp_path / "run") == 0
    assert run("train", "--resume", tmp_path / "run", "--epochs", 2, "--progress", "none") == 0
    a, b = (state(folder)["model"]["weights"] for folder in (whole, tmp_path / "run"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_another_controller_in_the_config_is_told(few_images, tmp_path, capsys, undrawn):
    assert run(*vae(few_images, "--beta", "geco:target=40", "--out", tmp_path / "run")) == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    config["options"]["beta"] = "control:kl=2"
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    capsys.readouterr()
    for args in (
        ("train", "--resume", tmp_path / "run", "--epochs", 2),
        ("evaluate", tmp_path / "run"),
    ):
        assert run(*args) == 1
        said = capsys.readouterr().err
        assert (
            said.count("\n") == 1 and "the controller Geco" in said and "this is ControlVae" in said
        )


@pytest.mark.parametrize(
    "args, word",
    [
        (
            ("--beta", "dance"),
            "none of warmup, cyclical, capacity, free-bits, geco, control, sigma",
        ),
        (("--beta", "geco"), "--beta geco wants its target: --beta geco:target=…"),
        (("--beta", "control"), "wants its target"),
        (("--beta", "nan"), "finite"),
        (("--beta", "-1"), "at least 0"),
        (("--beta", "inf"), "finite"),
        (("--beta", "geco:target=NaN"), "got nan"),
        (("--beta", "geco:target=ten"), "'ten' is neither a number"),
        (("--beta", "geco:90"), "'90' has no value"),
        (("--beta", "geco:target=40,speed=1"), "takes no speed, but target, rate"),
        (("--beta", "geco:target=40,epochs=3"), "takes no epochs"),
        (("--beta", "warmup:epochs=0"), "epochs must be a number above 0"),
        (("--beta", "warmup:epochs=NaN"), "got nan"),
        (("--beta", "cyclical:cycles=99"), "can't hold 99 cycles"),
        (("--beta", "free-bits:groups=3"), "3 groups can't share 2 latents"),
        (("--beta", "control:kl=-1"), "at least 0"),
        (("--beta", "sigma"), "--likelihood gaussian --binarize none"),
        ((*GREY, "--beta", "sigma:dim=3"), "takes no dim"),
        (("--beta", "control:kl=1,target=2"), "give one"),
        (("--likelihood", "gaussian"), "--binarize none"),
        ((*GREY, "--model", "conv"), "--model mlp"),
        (("--estimator", "best"), "'iwae'"),
        (("--sampled",), "'elbo' has no weights"),
        (("--estimator", "stl", "--sampled"), "'stl' has no weights"),
        (("--k", 0), "x>=1"),
        (("--inference", "dance"), "none of amortised, aggressive, semi"),
        (("--inference", "amortised:steps=1"), "takes no arguments"),
        (("--inference", "semi:steps=0.5"), "steps must be an integer"),
        (("--inference", "semi:mode=best"), "'best' is neither"),
        (("--inference", "semi:optimizer=1"), "takes no optimizer"),
        (("--inference", "aggressive:check=0"), "check must be an integer"),
        (("--inference", "semi", "--compile"), "without compile"),
        (("--model", "autoregressive", "--binarize", "none"), "--binarize dynamic or static"),
    ],
)
def test_mistakes_with_a_vae_are_one_line_and_leave_nothing(
    args, word, few_images, tmp_path, capsys
):
    assert run(*vae(few_images, *args, "--out", tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert word in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_colours_where_pixels_have_one_channel_are_refused(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    for i in range(20):
        Image.new("RGB", (8, 8), (i, 2 * i, 3 * i)).save(tmp_path / f"mine/{i:02}.png")
    for command in (
        vae(tmp_path / "mine", "--model", "autoregressive"),
        likely(tmp_path / "mine", "pixelcnn"),
    ):
        assert run(*command, "--out", tmp_path / "run") == 2
        said = capsys.readouterr().err
        assert (
            "one channel" in said
            and "3 channels" in said
            and said.count("\n") == 1
            and not (tmp_path / "run").exists()
        )
    for name, args in (("lstm", ("--hidden", 4)), ("realnvp", ("--channels", 4))):
        assert run(*likely(tmp_path / "mine", name, *args, "--out", tmp_path / name)) == 0


def likely(folder, name, *args):
    return [
        "train",
        name,
        "--data",
        folder,
        "--image-size",
        8,
        "--batch-size",
        10,
        "--epochs",
        1,
        "--progress",
        "none",
        *args,
    ]


LIKELIHOODS = {  # scheme, arguments, what is told of the pixels
    "lstm": ("lstm", ("--hidden", 6), "binarised once"),
    "lstm grey": (
        "lstm",
        ("--hidden", 6, "--layers", 2, "--binarize", "none", "--levels", 16),
        "grey, 16 levels rounded down from 256",
    ),
    "pixelcnn": (
        "pixelcnn",
        ("--channels", 4, "--layers", 2, "--binarize", "static"),
        "binarised once",
    ),
    "made": ("made", ("--hidden", "12,8", "--ema", 0.9), "binarised once"),
    "made grey": ("made", ("--hidden", "8", "--binarize", "none"), "grey, 256 levels"),
    "realnvp": ("realnvp", ("--couplings", 1, "--channels", 4, "--patience", 2), "upper bound"),
    "realnvp flat": ("realnvp", ("--scales", 4, "--layers", 2, "--hidden", "8"), "upper bound"),
    "maf": ("maf", ("--layers", 2, "--hidden", "8", "--alpha", 0.05), "upper bound"),
}


@pytest.mark.parametrize("way", LIKELIHOODS)
def test_a_likelihood_every_way(way, few_images, tmp_path, capsys, undrawn):
    name, args, pixels = LIKELIHOODS[way]
    assert run(*likely(few_images, name, *args, "--out", tmp_path / "run")) == 0
    assert (
        name != "realnvp"
        or (
            "flat vectors, since 8 x 8 cannot be halved 4 times"
            if "flat" in way
            else "images, since 8 x 8 can be halved 2 times"
        )
        in capsys.readouterr().out
    )
    assert run("train", "--resume", tmp_path / "run", "--epochs", 2, "--progress", "none") == 0
    capsys.readouterr()
    k = () if pixels != "upper bound" else ("--k", 3)
    assert run("evaluate", tmp_path / "run", "--split", "train", *k, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["scheme"] == name
        and found["epoch"] == 2
        and pixels in found["pixels"]
        and found["n"] > 50
        and abs(found["bits_per_dim"] - found["nll"] / 64 / math.log(2)) < 1e-6
        and 0 < found["nll"] <= found["loss"]
    )
    assert found.get("k") == (3 if k else None) and (found["nll"] < found["loss"]) == bool(k)
    assert run("evaluate", tmp_path / "run") == 0 and "bits per dim" in capsys.readouterr().out
    assert run("sample", tmp_path / "run", "--n", 4) == 0 and Image.open(
        tmp_path / "run/samples.png"
    ).size == (22, 22)


def test_a_flow_resumes_bit_for_bit_with_what_its_first_batch_began(few_images, tmp_path, undrawn):
    args = ("--couplings", 1, "--channels", 4)
    for name, epochs in (("whole", 2), ("half", 1)):
        assert (
            run(*likely(few_images, "realnvp", *args, "--epochs", epochs, "--out", tmp_path / name))
            == 0
        )
    assert run("train", "--resume", tmp_path / "half", "--epochs", 2, "--progress", "none") == 0
    a, b = (state(tmp_path / name) for name in ("whole", "half"))
    assert (
        a["begun"]
        and b["begun"]
        and all(torch.equal(w, b["model"]["weights"][k]) for k, w in a["model"]["weights"].items())
    )
    assert json.loads((tmp_path / "half/config.json").read_text())["options"]["model"] == "image"


@pytest.mark.parametrize(
    "args, word",
    [
        (("lstm", "--levels", 16), "--levels 16 is of grey pixels: add --binarize none"),
        (("made", "--levels", 300), "--levels"),
        (("made", "--hidden", "0"), "--hidden"),
        (("pixelcnn", "--channels", 0), "--channels"),
        (("realnvp", "--model", "image", "--scales", 4), "divisible by 16, got 8 x 8"),
        (("maf", "--alpha", 0.5), "--alpha"),
        (("maf", "--batch-size", 1), "two images at least"),
        (("realnvp", "--binarize", "dynamic"), "--binarize"),
        (("made", "--k", 2), "--k"),
    ],
)
def test_mistakes_with_a_likelihood_are_one_line_and_leave_nothing(
    args, word, few_images, tmp_path, capsys
):
    assert run(*likely(few_images, *args, "--out", tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert word in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_mixed_up_likelihoods_are_told(few_images, tmp_path, capsys, undrawn):
    out = tmp_path / "run"
    assert run(*likely(few_images, "made", "--hidden", 8, "--out", out)) == 0
    for args, word in (
        (("--k", 2), "made has an exact one"),
        (("--outside", "digits"), "which made has not"),
    ):
        capsys.readouterr()
        assert run("evaluate", out, *args) == 2
        said = capsys.readouterr().err
        assert word in said and said.count("\n") == 1
    config = json.loads((out / "config.json").read_text())
    config["scheme"] = "maf"
    config["options"] |= {"layers": 1, "alpha": 0.1}
    (out / "config.json").write_text(json.dumps(config))
    for args in (("evaluate", out), ("sample", out), ("train", "--resume", out, "--epochs", 2)):
        capsys.readouterr()
        assert run(*args) == 1
        said = capsys.readouterr().err
        assert "not this player's" in said and said.count("\n") == 1


DIFFUSIONS = {
    "ddpm": ("ddpm",),
    "ddpm otherwise": (
        "ddpm",
        "--target",
        "v",
        "--weight",
        "min-snr",
        "--schedule",
        "cosine",
        "--levels",
        "adaptive",
        "--uncertainty",
        "--dropout",
        0.1,
    ),
    "flow-matching": ("flow-matching", "--coupling", "optimal", "--ema", 0),
}


def diffusion(folder, name, *args):
    return likely(folder, name, "--channels", 4, "--multiples", "1,2", *args)


@pytest.mark.parametrize("way", DIFFUSIONS)
def test_a_diffusion_every_way(way, few_images, tmp_path, capsys, undrawn):
    out, how = (
        tmp_path / "run",
        ("--steps", 2, "--sampler", "ancestral") if way == "ddpm" else ("--steps", 3),
    )
    assert (
        run(*diffusion(few_images, *DIFFUSIONS[way], "--out", out)) == 0
        and run("train", "--resume", out, "--epochs", 2, "--progress", "none") == 0
    )
    capsys.readouterr()
    assert (
        run(
            "evaluate",
            out,
            "--split",
            "train",
            "--limit",
            100,
            "--k",
            2,
            "--fid-steps",
            1,
            "--ode-steps",
            1,
            "--json",
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert (
        found["epoch"] == 2
        and found["k"] == 2
        and "upper bound" in found["pixels"]
        and abs(found["bound_bits_per_dim"] - found["bound"] / 64 / math.log(2)) < 1e-6
        and {"loss", "fid", "fid_floor", "nll"} <= found.keys()
    )
    assert run("sample", out, "--n", 4, *how) == 0 and Image.open(out / "samples.png").size == (
        22,
        22,
    )


@pytest.mark.parametrize(
    "args, word",
    [
        (("ddpm", "--multiples", "1,2,2,2,2"), "divisible by 16, got 8 x 8"),
        (("ddpm", "--target", "score"), "--target"),
        (("flow-matching", "--weight", "best"), "'min-snr'"),
        (("flow-matching", "--multiples", "0"), "--multiples"),
        (("ddpm", "--dropout", 1), "--dropout"),
    ],
)
def test_mistakes_with_a_diffusion_are_one_line_and_leave_nothing(
    args, word, few_images, tmp_path, capsys
):
    assert run(*likely(few_images, *args, "--out", tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert word in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_steps_are_of_a_diffusion_and_pairs_forbid_a_sampler(few_images, tmp_path, capsys, undrawn):
    assert (
        run(*likely(few_images, "made", "--hidden", 8, "--out", tmp_path / "made")) == 0
        and run(
            *diffusion(
                few_images, "flow-matching", "--coupling", "optimal", "--out", tmp_path / "flow"
            )
        )
        == 0
    )
    for args, word in (
        (("sample", tmp_path / "made", "--steps", 2), "made is drawn at once"),
        (("evaluate", tmp_path / "made", "--fid-steps", 2), "which made is not"),
        (("sample", tmp_path / "flow", "--sampler", "ancestral"), "take ddim or heun"),
    ):
        capsys.readouterr()
        assert run(*args) == 2
        said = capsys.readouterr().err
        assert word in said and said.count("\n") == 1


@pytest.fixture(scope="module")
def few_labelled(tmp_path_factory):
    "Grey images of 8 x 8, dark and light ones in a folder each, and as many without a class."
    folder, g = tmp_path_factory.mktemp("images") / "mine", torch.Generator().manual_seed(0)
    for i in range(90):
        kind = ("dark", "light", "unlabelled")[i % 3]
        (folder / kind).mkdir(parents=True, exist_ok=True)
        low = 0 if kind == "dark" or (kind == "unlabelled" and i % 2) else 120
        Image.fromarray(
            torch.randint(low, low + 130, (8, 8), dtype=torch.uint8, generator=g).numpy()
        ).save(folder / kind / f"{i:02}.png")
    return folder


def assisted(folder, *args):
    return [
        "train",
        "assisted",
        "--data",
        folder,
        "--image-size",
        8,
        "--hidden",
        "16,8",
        "--z-dim",
        2,
        "--batch-size",
        10,
        "--epochs",
        1,
        "--labels",
        12,
        "--progress",
        "none",
        *args,
    ]


METHODS = {
    "plain": ("--method", "plain", "--dropout", 0.2),
    "conv": ("--method", "plain", "--model", "conv", "--labels", "all"),
    "reconstruction": (
        "--method",
        "reconstruction:loss=squared,to=classifier",
        "--weight",
        "control:target=3",
    ),
    "conv reconstruction": (
        "--method",
        "reconstruction",
        "--model",
        "conv",
        "--weight",
        "balanced:project=true",
    ),
    "agreement": (
        "--method",
        "agreement:divergence=jensen-shannon",
        "--weight",
        "warmup:epochs=1",
        "--binarize",
        "dynamic",
    ),
    "geco": ("--weight", "geco:target=0.5", "--alpha", 2),
    "m1": ("--method", "m1", "--ema", 0.9),
    "m1+m2": ("--method", "m1+m2", "--weight", "cyclical:cycles=1"),
    "ladder": ("--method", "ladder:noise=0.2", "--patience", 3),
    "gamma": ("--method", "gamma", "--weight", 0.5),
}


@pytest.mark.parametrize("way", METHODS)
def test_a_classifier_every_way(way, few_labelled, few_images, tmp_path, capsys, undrawn):
    assert run(*assisted(few_labelled, *METHODS[way], "--out", tmp_path / "run")) == 0
    assert run("train", "--resume", tmp_path / "run", "--epochs", 2, "--progress", "none") == 0
    config = json.loads((tmp_path / "run/config.json").read_text())["options"]
    assert config["classes"] == ["dark", "light"] and (
        config["labelled"] == "all" if way == "conv" else len(set(config["labelled"])) == 12
    )
    capsys.readouterr()
    assert run("evaluate", tmp_path / "run", "--outside", few_images, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["epoch"] == 2
        and found["n_outside"] == 60
        and found["n"] > 2
        and found["error_low"] <= found["error"] <= found["error_high"]
        and Image.open(found["diagram"]).size[0] > 200
    )
    assert 0 <= found["auroc_confidence"] <= 1 and ("auroc" in found) == (
        way in ("reconstruction", "conv reconstruction", "agreement", "geco", "m1", "m1+m2")
    )
    draws = way in ("agreement", "geco", "m1", "m1+m2")
    assert (
        run("sample", tmp_path / "run", "--n", 4) == (0 if draws else 1)
        and (tmp_path / "run/samples.png").exists() == draws
    )


def test_the_labelled_images_are_balanced_seeded_and_apart_from_the_validation(
    few_labelled, tmp_path, undrawn
):
    from optgen.cli import main as cli
    from optgen.data.loading import load

    images = load(str(few_labelled), size=8)
    options = lambda **kw: dict(labels="12", seed=0, holdout=0.1) | kw
    pixels = lambda d: {x.numpy().tobytes() for x in d.images}
    places = {}
    for seed in (0, 1, 2):
        o = options(seed=seed)
        train, valid, more = cli.few_of(o, images)
        places[seed] = o["labelled"]
        assert (
            images.labels[o["labelled"]].bincount().tolist() == [6, 6]
            and torch.equal(more["labelled"].images, images.images[o["labelled"]])
            and 2 <= len(valid) <= 12
            and (valid.labels >= 0).all()
        )
        assert (
            not pixels(valid) & pixels(train)
            and pixels(more["labelled"]) < pixels(train)
            and len(train) + len(valid) == len(images)
        )
        again = options(seed=seed)
        cli.few_of(again, images)
        assert again == o
    assert places[0] != places[1] != places[2]
    known = images.take((images.labels >= 0).nonzero().flatten())
    train, valid, more = cli.few_of(options(labels="all"), known)
    assert (
        more == {} and (train.labels.bincount() >= 9 * valid.labels.bincount() - 10).all()
    )  # every batch brings its own classes
    assert run(*assisted(few_labelled, "--out", tmp_path / "run")) == 0
    assert (
        json.loads((tmp_path / "run/config.json").read_text())["options"]["labelled"] == places[0]
    )


def test_rare_classes_are_not_lost_to_validation():
    from optgen.cli import main as cli
    from optgen.data.images import Images

    labels = torch.cat([torch.zeros(1000), torch.ones(5), -torch.ones(7)]).long()
    rare = Images(torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8), labels)
    train, valid, more = cli.few_of(dict(labels="all", seed=0, holdout=0.1), rare)
    assert (
        valid.labels.bincount().tolist() == [100, 1]
        and more["labelled"].labels.bincount().tolist() == [900, 4]
        and len(train) == 911
    )
    train, valid, more = cli.few_of(dict(labels="10", seed=0, holdout=0.1), rare)
    assert more["labelled"].labels.bincount().tolist() == [5, 5] and len(valid) == 10
    few = rare.take(torch.tensor([0, 1, 2, 3, 1000, 1001, 1002, 1003, *range(1005, 1012)]))
    _, valid, more = cli.few_of(dict(labels="all", seed=0, holdout=0.1), few)
    assert valid.labels.tolist() == [0, 1] and more["labelled"].labels.bincount().tolist() == [3, 3]


@pytest.mark.parametrize(
    "args, code, word",
    [
        (("--method", "dance"), 2, "none of plain, reconstruction, agreement"),
        (("--method", "plain:to=both"), 2, "takes no arguments"),
        (("--method", "ladder", "--model", "conv"), 2, "leave out --model conv"),
        (("--method", "m1", "--weight", "balanced"), 2, "has none"),
        (("--method", "reconstruction:loss=hinge"), 2, "'bernoulli' or 'squared'"),
        (("--method", "agreement:to=everyone"), 2, "'everyone'"),
        (("--weight", "dance"), 2, "none of warmup, cyclical, geco, control, balanced"),
        (("--weight", "-1"), 2, "at least 0"),
        (("--weight", "geco"), 2, "wants its target"),
        (("--labels", "some"), 2, "a whole number or all"),
        (("--labels", 1), 1, "one label a class"),
        (("--labels", 1000), 1, "ask for fewer"),
        (("--labels", 20, "--holdout", 0.01), 2, "for validation"),
        (("--method", "plain", "--weight", 1), 2, "has none"),
        (("--method", "gamma", "--dropout", 0.1), 2, "noise=…"),
        (("--method", "ladder:noise=-1"), 2, "at least 0"),
        (("--method", "ladder:noise=high"), 2, "at least 0"),
        (("--alpha", -1), 2, "--alpha"),
        (("--hidden", "0"), 2, "--hidden"),
    ],
)
def test_mistakes_with_a_classifier_are_one_line_and_leave_nothing(
    args, code, word, few_labelled, tmp_path, capsys
):
    assert run(*assisted(few_labelled, *args, "--out", tmp_path / "run")) == code
    said = capsys.readouterr().err
    assert word in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_images_without_classes_and_foreign_outsiders_are_refused(
    few_images, few_labelled, tiny_run, tmp_path, capsys
):
    assert (
        run(*assisted(few_images, "--out", tmp_path / "run")) == 1
        and "has no labels" in capsys.readouterr().err
    )
    assert run(*assisted(few_labelled, "--method", "plain", "--out", tmp_path / "run")) == 0
    assert (
        run("evaluate", tmp_path / "run", "--outside", "digits") == 2
        and "the run's are (1, 8, 8)" in capsys.readouterr().err
    )
    config = json.loads((tmp_path / "run/config.json").read_text())
    config["options"]["classes"] = ["dark", "bright"]
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    assert (
        run("evaluate", tmp_path / "run") == 1
        and "the run learnt dark, bright" in capsys.readouterr().err
    )
    assert (
        run("evaluate", tiny_run, "--outside", "digits") == 2
        and "which beta-vae has not" in capsys.readouterr().err
    )
