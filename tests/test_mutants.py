"""The lists of wrong lines stay alive: each can be applied, compiles, and has its row.

`python tests/mutate.py` runs them; this costs nothing and is part of the suite.
"""

import pytest

from mutate import FOLDER, REPO, TABLE, Mutant, read_mutants

MUTANTS = read_mutants()


@pytest.mark.parametrize("area", sorted({mutant.area for mutant in MUTANTS}))
def test_every_mutant_applies_and_compiles(area):
    for mutant in [m for m in MUTANTS if m.area == area]:
        text = (REPO / mutant.module).read_text(encoding="utf-8")
        broken = mutant.apply(text)
        assert broken != text, mutant.name
        compile(broken, mutant.module, "exec")


def test_every_mutant_is_there_once():
    assert len({m.key for m in MUTANTS}) == len({m.name for m in MUTANTS}) == len(MUTANTS)


def test_every_mutant_names_tests_that_exist():
    for mutant in MUTANTS:
        assert mutant.tests, mutant.name
        for test in mutant.tests:
            assert (REPO / test.partition("::")[0]).is_file(), (mutant.name, test)


def test_the_table_has_a_row_for_every_mutant():
    rows = TABLE.read_text(encoding="utf-8").splitlines()
    for mutant in MUTANTS:
        name = mutant.name.replace("|", "\\|")
        found = [row for row in rows if row.startswith(f"| {name} | ")]
        assert len(found) == 1, f"{mutant.name!r}: write {TABLE.name} with tests/mutate.py --write"
        assert "**not run**" not in found[0], mutant.name


def test_a_text_that_occurs_twice_or_never_is_refused():
    mutant = Mutant("area", "name", "module.py", "x = 1", "x = 2", ("tests",))
    assert mutant.apply("x = 1\ny = 1\n") == "x = 2\ny = 1\n"
    for text in ("x = 1\nx = 1\n", "y = 1\n"):
        with pytest.raises(ValueError, match="must occur once in module.py"):
            mutant.apply(text)


def test_every_list_is_a_mutant_list():
    assert {path.stem for path in FOLDER.glob("*.json")} == {mutant.area for mutant in MUTANTS}
