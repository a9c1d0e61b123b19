"""Break the package one line at a time, and see which test notices.

    python tests/mutate.py --only-named --write           # every mutant, by the tests it names
    python tests/mutate.py --only denoising --jobs 2      # those with this name or module
    python tests/mutate.py --kept --write                 # the table anew, from the kept results

A mutant is an entry of a list `tests/mutants/AREA.json`:

    {"name": "what breaks, in words", "module": "optgen/schemes/elbo.py",
     "before": "text that occurs once in the module", "after": "what stands there instead",
     "tests": ["tests/test_elbo.py"]}

Each is applied to a copy of the repository in a temporary folder, never to the working tree. There
pytest runs until the first failure: first the tests that the entry names (files or node ids), then,
if it survives those, all of `tests/` unless `--only-named`. A test kills a mutant only if it passes
without the mutant; this is tried once a test. A run that the mutant keeps from its end is a kill,
after `--timeout`.

Left out (`SKIPPED`) is what cannot kill by a wrong number, or would kill by the text alone: the
style of the text, the built pages, the pip installation, the layers of the imports, and the test of
the mutants themselves, which fails wherever one is applied.

Results are kept in `tests/mutants/results/AREA.json`, so that a stopped run goes on. A kill holds
until its mutant or its module changes; a survivor is tried again also when a test changes. The
table is `tests/mutants/README.md`. None of this is part of continuous integration:
`tests/test_mutants.py` only asserts that every mutant can still be applied and has its row.
"""

import argparse
import concurrent.futures
import hashlib
import importlib
import json
import multiprocessing
import os
import queue
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
FOLDER = REPO / "tests" / "mutants"
TABLE = FOLDER / "README.md"
COPIED = ("optgen", "tests", "nbs", "settings.ini", "setup.py", "README.md", "CHANGELOG.md")
SKIPPED = (
    "--ignore=tests/test_mutants.py",
    "--ignore=tests/test_package.py",
    "--ignore=tests/test_pages.py",
    "--ignore=tests/test_style.py",
    "--deselect=tests/test_cli.py::test_another_package_registers_a_scheme",
)
SURVIVED, NOT_RUN = "SURVIVED", "not run"
# What takes most of the start of pytest is imported once, and each run is forked.
FORK = multiprocessing.get_context("fork")
IMPORTED = ("torch", "torch._dynamo.testing", "torchvision", "scipy.linalg", "matplotlib.figure")


@dataclass(frozen=True)
class Mutant:
    """One wrong line.

    Attributes:
        area: name of its list.
        name: what breaks, in words.
        module: path of the module in the repository.
        before: text that occurs once in the module.
        after: what stands there instead.
        tests: files or node ids of the tests that should kill it.
    """

    area: str
    name: str
    module: str
    before: str
    after: str
    tests: tuple[str, ...]

    @property
    def key(self) -> str:
        """A digest of what the mutant does."""
        return digest(self.module, self.before, self.after)

    def apply(self, text: str) -> str:
        """Return the text of the module with the wrong line.

        Raises:
            ValueError: if `before` does not occur exactly once.
        """
        found = text.count(self.before)
        if found != 1:
            raise ValueError(
                f"mutant {self.name!r}: its text must occur once in {self.module}, occurs {found} "
                f"times: {self.before!r}"
            )
        return text.replace(self.before, self.after)


def digest(*texts: str) -> str:
    """Return a digest of several texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def read_mutants(folder: Path = FOLDER) -> list[Mutant]:
    """Return the mutants of all lists, by area."""
    return [
        Mutant(area=path.stem, **{**entry, "tests": tuple(entry["tests"])})
        for path in sorted(folder.glob("*.json"))
        for entry in json.loads(path.read_text(encoding="utf-8"))
    ]


class Results:
    """What is known of each mutant, kept in one file an area.

    Args:
        folder: folder of the files.
        only_named: whether survivors need to survive only the tests that they name.
    """

    def __init__(self, folder: Path, only_named: bool) -> None:
        self.folder, self.only_named = folder, only_named
        self.by_area = {
            path.stem: json.loads(path.read_text(encoding="utf-8"))
            for path in folder.glob("*.json")
        }
        tests = sorted((REPO / "tests").glob("*.py"))
        self.tests = digest(*(path.read_text(encoding="utf-8") for path in tests))

    def forget_others(self, mutants: list[Mutant]) -> None:
        """Leave out what is of no mutant any more."""
        keys = {mutant.key for mutant in mutants}
        for area, kept in self.by_area.items():
            self.by_area[area] = {key: result for key, result in kept.items() if key in keys}

    def killer(self, mutant: Mutant) -> str | None:
        """Return what killed the mutant when it was run last, None if it never was."""
        return self.by_area.get(mutant.area, {}).get(mutant.key, {}).get("killer")

    def holds(self, mutant: Mutant) -> bool:
        """Return whether the last result still holds."""
        kept = self.by_area.get(mutant.area, {}).get(mutant.key)
        if not kept or kept["module"] != digest((REPO / mutant.module).read_text(encoding="utf-8")):
            return False
        same = kept["tests"] == self.tests and (kept["all"] or self.only_named)
        return same or kept["killer"] != SURVIVED

    def keep(self, mutant: Mutant, killer: str) -> None:
        """Write down a result."""
        module = digest((REPO / mutant.module).read_text(encoding="utf-8"))
        kept = {"name": mutant.name, "killer": killer, "module": module, "tests": self.tests}
        self.by_area.setdefault(mutant.area, {})[mutant.key] = kept | {"all": not self.only_named}
        self.folder.mkdir(exist_ok=True)
        text = json.dumps(self.by_area[mutant.area], indent=1, sort_keys=True)
        path = self.folder / f"{mutant.area}.json"
        path.with_suffix(".tmp").write_text(text + "\n", encoding="utf-8")
        path.with_suffix(".tmp").replace(path)


def run_pytest(folder: Path, output: Path, tests: Sequence[str]) -> None:
    """Run tests in a copy, in a process that was forked for it, and exit with pytest's code.

    No bytecode is kept: a mutant may have the size and the second of what it replaces.
    """
    os.setsid()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *SKIPPED, *tests])
    if not Path(sys.modules["optgen"].__file__).is_relative_to(folder):
        print(f"the copy imports {sys.modules['optgen'].__file__}", flush=True)
        code = 3
    sys.stdout.flush()
    os._exit(code)


class Copy:
    """A copy of the repository, to break and to mend again.

    Args:
        folder: an empty folder.
        timeout: seconds after which pytest is stopped.
    """

    def __init__(self, folder: Path, timeout: float) -> None:
        self.folder, self.timeout, self.sound = folder, timeout, {}
        for name in COPIED:
            source = REPO / name
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
                shutil.copytree(source, folder / name, ignore=ignored)
            elif source.exists():
                shutil.copy2(source, folder / name)

    def first_failure(self, *tests: str) -> str | None:
        """Run tests and return the node id of the first that fails, None if all pass."""
        output = self.folder / "pytest.txt"
        process = FORK.Process(target=run_pytest, args=(self.folder, output, tests))
        process.start()
        process.join(self.timeout)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            return "timeout"
        if process.exitcode == 0:
            return None
        found = output.read_text(encoding="utf-8")
        failed = re.search(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", found, re.M)
        if not failed:
            raise RuntimeError(f"pytest {' '.join(tests)} ended with {process.exitcode}: {found}")
        return failed[1]

    def passes_unbroken(self, *tests: str) -> bool:
        """Return whether tests pass without a mutant."""
        if tests not in self.sound:
            self.sound[tests] = self.first_failure(*tests) is None
        return self.sound[tests]

    def killer(self, mutant: Mutant, only_named: bool) -> str:
        """Return the test that kills a mutant, or `SURVIVED`.

        Raises:
            RuntimeError: if the test fails without the mutant too.
        """
        path = self.folder / mutant.module
        text = path.read_text(encoding="utf-8")
        path.write_text(mutant.apply(text), encoding="utf-8")
        try:
            failed = self.first_failure(*mutant.tests)
            if failed is None and not only_named:
                failed = self.first_failure("tests")
        finally:
            path.write_text(text, encoding="utf-8")
        if failed is None:
            return SURVIVED
        if not self.passes_unbroken(*(mutant.tests if failed == "timeout" else [failed])):
            raise RuntimeError(f"{failed} fails without the mutant {mutant.name!r} too")
        return failed


def run(mutants: list[Mutant], results: Results, jobs: int, timeout: float) -> None:
    """Run mutants, several at a time, and keep each result as it comes; print errors."""
    copies = queue.SimpleQueue()
    for name in IMPORTED:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        for job in range(min(jobs, len(mutants))):
            (Path(folder) / str(job)).mkdir()
            copies.put(Copy(Path(folder) / str(job), timeout))

        def killer(mutant: Mutant) -> str:
            copy = copies.get()
            try:
                return copy.killer(mutant, results.only_named)
            finally:
                copies.put(copy)

        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            found = {pool.submit(killer, mutant): mutant for mutant in mutants}
            for done in concurrent.futures.as_completed(found):
                if error := done.exception():
                    print(f"{found[done].name}: {error}", file=sys.stderr, flush=True)
                    continue
                results.keep(found[done], done.result())
                print(row(found[done], results), flush=True)


def row(mutant: Mutant, results: Results) -> str:
    """Return the row of a mutant in the table."""
    killer = results.killer(mutant) or NOT_RUN
    shown = f"**{killer}**" if killer in (SURVIVED, NOT_RUN) else f"`{killer}`"
    cells = (mutant.name, f"`{mutant.module.removeprefix('optgen/')}`", shown)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def table(mutants: list[Mutant], results: Results) -> str:
    """Return the table of all mutants, with the totals of each area first."""
    rows = ["# Mutants: wrong lines, and the test that notices", ""]
    rows += ["Written by `python tests/mutate.py`, whose docstring says how.", ""]
    rows += ["| area | mutants | killed | share |", "|---|---|---|---|"]
    areas = {name: [m for m in mutants if m.area == name] for name in {m.area for m in mutants}}
    for name, members in [*sorted(areas.items()), ("all", mutants)]:
        killed = sum((results.killer(m) or SURVIVED) != SURVIVED for m in members)
        rows.append(f"| {name} | {len(members)} | {killed} | {killed / len(members):.1%} |")
    for name, members in sorted(areas.items()):
        rows += ["", f"## {name}", "", "| mutant | module | killed by |", "|---|---|---|"]
        rows += [row(mutant, results) for mutant in members]
    return "\n".join(rows) + "\n"


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="TEXT", default="", help="in the name or module")
    parser.add_argument("--only-named", action="store_true", help="run only the tests named")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds of a pytest run")
    parser.add_argument("--kept", action="store_true", help="run nothing, take kept results")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    return parser.parse_args()


def main() -> None:
    """Run what has no valid result, and print the table."""
    arguments, mutants = parse_arguments(), read_mutants()
    for mutant in mutants:
        mutant.apply((REPO / mutant.module).read_text(encoding="utf-8"))
    results = Results(FOLDER / "results", arguments.only_named)
    results.forget_others(mutants)
    chosen = [m for m in mutants if arguments.only in m.name or arguments.only in m.module]
    waiting = [m for m in chosen if not results.holds(m)]
    if waiting and not arguments.kept:
        run(waiting, results, arguments.jobs, arguments.timeout)
    print(table(chosen, results))
    if arguments.write:
        TABLE.write_text(table(mutants, results), encoding="utf-8")


if __name__ == "__main__":
    main()
