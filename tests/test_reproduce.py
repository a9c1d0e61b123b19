"The runner of experiments: it resumes, it can be interrupted, it reports failures."

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from optgen.evidence import feedback
from optgen.evidence.reproduce import (
    Experiment,
    ReproduceError,
    load_results,
    perform,
    read_json,
    reproduce,
    reproduce_stages,
    source_state,
    tasks_of,
    tasks_without_result,
    write_json,
)


def draw(config, seed):
    return {
        "mean": torch.randn(config["n"], generator=torch.Generator().manual_seed(seed))
        .mean()
        .item(),
        "threads": torch.get_num_threads(),
    }


def cursed(config, seed):
    if seed == 1 and not Path(config["mended"]).exists():
        raise ArithmeticError("seed one is cursed")
    return {"seed": seed}


def dies(config, seed):
    os.kill(os.getpid(), signal.SIGKILL)


def slow(config, seed):
    time.sleep(0.3)
    return {"seed": seed}


def starts_another(config, seed):
    busy = "import time\nwhile time.process_time() < 0.6: pass"
    subprocess.run([sys.executable, "-S", "-c", busy], check=True)
    return {"seed": seed}


def hears(config, seed):
    return {"heard": os.environ.get("OPTGEN_TOLD")}


def quiet(experiments, out, jobs=1):
    return reproduce(experiments, out, jobs=jobs, progress=False)


TABLE = Experiment("means", draw, {"few": {"n": 5}, "many": {"n": 500}}, (0, 1))


def test_the_processor_time_of_a_run_is_also_that_of_the_processes_it_starts(tmp_path):
    quiet([Experiment("two", starts_another, {"a": {}}, (0,))], tmp_path)
    (record,) = load_results(tmp_path, "two")
    assert record["cpu_seconds"] > 0.4  # the clock of ended processes has coarse ticks


def test_runs_are_files_and_are_not_repeated(tmp_path):
    assert quiet([TABLE], tmp_path, jobs=2) == {"done": 4, "skipped": 0}
    for r in load_results(tmp_path, "means"):
        assert r["result"] == draw(r["config"], r["seed"]) | {"threads": 1}
        assert (
            r["config"] == TABLE.variants[r["variant"]]
            and r["environment"]["threads"] == 1
            and r["cpu_seconds"] >= 0 <= r["wall_seconds"]
        )
        assert r["environment"]["torch"] == torch.__version__ and {"commit", "modified"} <= r.keys()
    (tmp_path / "means/few-1.json").unlink()
    left = tasks_without_result(tasks_of(TABLE, tmp_path))
    assert [(t.variant, t.seed) for t in left] == [("few", 1)]
    more = TABLE._replace(seeds=(0, 1, 2))
    assert quiet([more], tmp_path) == {"done": 3, "skipped": 3} and quiet([more], tmp_path) == {
        "done": 0,
        "skipped": 6,
    }


def test_errors_are_recorded_told_and_repeated(tmp_path):
    mended = tmp_path / "mended"
    experiment = Experiment("cursed", cursed, {"v": {"mended": str(mended)}}, (0, 1, 2))
    with pytest.raises(ReproduceError, match="1 of 3 runs failed.*v-1.json.*run again"):
        quiet([experiment], tmp_path)
    good, bad, other = load_results(tmp_path, "cursed")
    assert (
        bad["error"]["type"] == "ArithmeticError"
        and "cursed" in bad["error"]["traceback"]
        and "result" not in bad
    )
    assert good["result"] == {"seed": 0} and other["result"] == {"seed": 2}
    mended.touch()
    assert quiet([experiment], tmp_path) == {"done": 1, "skipped": 2}


def test_a_killed_process_is_an_error_and_is_replaced(tmp_path):
    experiments = [Experiment("dies", dies, {"v": {}}, (0,)), TABLE._replace(seeds=(0,))]
    with pytest.raises(ReproduceError, match="1 of 3 runs failed"):
        quiet(experiments, tmp_path)
    assert (
        "exit code -9" in load_results(tmp_path, "dies")[0]["error"]["message"]
        and len(load_results(tmp_path, "means")) == 2
    )


def test_a_run_sees_the_variables_of_now(tmp_path, monkeypatch):
    "Not those of the first call, which started what later processes are forked from."
    for told in ("a", "b", None):
        if told:
            monkeypatch.setenv("OPTGEN_TOLD", told)
        else:
            monkeypatch.delenv("OPTGEN_TOLD", raising=False)
        quiet([Experiment(str(told), hears, {"v": {}}, (0,))], tmp_path / f"{told}")
        assert load_results(tmp_path / f"{told}", str(told))[0]["result"]["heard"] == told


def test_interrupted_from_outside_it_leaves_whole_files_and_goes_on(tmp_path):
    process = subprocess.Popen(
        [sys.executable, __file__, tmp_path],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # a job in the background ignores it
    while len([*tmp_path.glob("slow/v-*.json")]) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: everybody in the group
    error = process.communicate()[1]
    assert process.returncode != 0 and "KeyboardInterrupt" in error
    there = load_results(tmp_path, "slow")
    assert (
        3 <= len(there) < 60
        and all("result" in r for r in there)
        and not [*tmp_path.glob("slow/.*")]
    )
    done = quiet([Experiment("slow", slow, {"v": {}}, tuple(range(5)))], tmp_path)
    assert (
        done["done"] + done["skipped"] == 5
        and done["skipped"] >= 2
        and not multiprocessing.active_children()
    )


def test_files_are_whole_and_say_what_is_wrong(tmp_path):
    path = tmp_path / "a/b.json"
    write_json(path, {"x": [1, 2], "y": {"z": None}})
    assert path.read_text() == '{\n "x": [1, 2],\n "y": {"z": null}\n}\n' and read_json(path)[
        "y"
    ] == {"z": None}
    with pytest.raises(ValueError):
        write_json(path, {"x": float("inf")})
    assert read_json(path)["x"] == [1, 2]
    path.write_text(path.read_text()[:9])
    with pytest.raises(ReproduceError, match="b.json is damaged"):
        read_json(path)
    with pytest.raises(FileNotFoundError, match="run the experiment"):
        load_results(tmp_path, "none")
    with pytest.raises(ValueError, match="jobs"):
        quiet([TABLE], tmp_path, jobs=0)


def test_another_configuration_is_refused(tmp_path):
    quiet([TABLE._replace(seeds=(0,))], tmp_path)
    with pytest.raises(ReproduceError, match="few-0.json.*another folder"):
        quiet([TABLE._replace(variants={"few": {"n": 6}})], tmp_path)


def test_a_number_that_is_none_is_an_error_not_a_file():
    assert "error" in perform(lambda config, seed: {"x": float("nan")}, {}, 0)


def test_source_state():
    assert {"commit", "modified"} == source_state().keys() and json.dumps(source_state())


def test_stages_of_the_feedback_table(tmp_path):
    with pytest.raises(ValueError, match="no stage rings; there are tune, ring"):
        reproduce_stages(feedback.STAGES, feedback.experiment, ["rings"], tmp_path)
    with pytest.raises(FileNotFoundError, match="tune"):
        feedback.experiment("ring", tmp_path)
    tuned = feedback.experiment("tune", tmp_path)
    assert tuned.variants.keys() == feedback.tried_settings("ring").keys() and {
        c["rule"] for c in tuned.variants.values()
    } == set(feedback.RULES)


def test_a_tiny_table_from_tuning_to_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(
        feedback, "RULES", {k: feedback.RULES[k] for k in ("simultaneous", "consensus")}
    )
    names = feedback.tried_settings("ring")
    small = {"steps": 4, "every": 2}
    for i, (name, s) in enumerate(names.items()):
        write_json(
            tmp_path / f"tune/{name}-100.json",
            {"variant": name, "seed": 100, "result": {"modes": i, "share": 0.0}},
        )
    ring = feedback.experiment("ring", tmp_path)
    best = ring.variants["consensus"]
    assert (best["lr"], best["weight"], best["loss"]) == (8e-3, 3.0, "relativistic")
    assert names["consensus_0.008_3_relativistic"].items() <= best.items()
    ring = ring._replace(variants={k: c | small for k, c in ring.variants.items()}, seeds=(0,))
    assert quiet([ring], tmp_path) == {"done": 2, "skipped": 0}
    for r in load_results(tmp_path, "ring"):
        assert (
            len(r["result"]["curve"]) == 2
            and len(r["result"]["points"]) == 300
            and r["result"]["diverged"] is None
        )


if __name__ == "__main__":  # what the test of interruptions starts
    import test_reproduce

    slow_runs = Experiment("slow", test_reproduce.slow, {"v": {}}, tuple(range(60)))
    quiet([slow_runs], sys.argv[1], jobs=2)
