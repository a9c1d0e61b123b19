"""Numbers in the prose of the pages: each is in the code, an output or a result beside it.

A number is a decimal, a percentage, a whole number of two digits or more, or a small number or
numeral before a unit ("six epochs", "4 products"). Code, formulas, links, years and the numbers of
sections are left out. A number of three digits may stand anywhere in the code cells of its page.
A shorter one must stand in its own section, from one heading to the next, unless the prose
summarizes the page. `python tests/test_numbers.py` prints how many altered numbers are found.
"""

import functools
import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

NBS = Path(__file__).resolve().parent.parent / "nbs"
PAGES = sorted(path for path in NBS.rglob("*.ipynb") if "_site" not in path.parts)

# Sections that speak of the whole page.
SUMMARIES = ("In short", "Limits", "Verdict", "Result")
# Pages whose numbers another page repeats.
REPEATED = {
    "44b_optimizers": "44_epochs",
    "48a_scaling": "45_rules",
    "96_classifier": "22_classifier",
    "index": "50_mnist_vae",
}
# Sizes of MNIST, also of the digits in the package; the level of intervals, in percent.
COMMON = {60_000.0, 10_000.0, 784.0, 256.0, 95.0}
# (page, words around the number) -> where it is from, if not from the code.
SOURCES = {
    ("22_classifier", "is fifteen epochs"): "optgen.evidence.classifier",
    ("26_ladder", "results took 150 epochs"): "Rasmus et al. (2015)",
    ("50_mnist_vae", "3,280 epochs"): "Burda et al. (2016)",
    ("50_mnist_vae", "50 latents"): "Burda et al. (2016)",
    ("50_mnist_vae", "5,000 importance samples"): "Burda et al. (2016)",
    ("50_mnist_vae", "a VAE of two such layers"): "Burda et al. (2016)",
    ("60_ask_tell", "results of 31 algorithms"): "title of a paper",
    ("92_assisted", "the published 12,"): "Kingma et al. (2014): 11.97 %",
    ("92a_consistency", "M1+M2 is published at 3.33"): "Kingma et al. (2014), Table 1",
    ("93_feedback", "has 99 or 79 for DCGAN"): "Metz et al. (2017); Lin et al. (2018)",
}

NUMERALS = (
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
)
VALUES = {word: n for n, word in enumerate(NUMERALS.split(), 2)}
VALUES |= {"twenty-five": 25, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60}
VALUES |= {"hundred": 100, "thousand": 1000}
SCALES = {"": 1, "hundred": 100, "thousand": 1000}
UNITS = (
    "batch batches bits bytes cores digits draws epochs? images? labels? layers? minutes? modes? "
    "nats neighbors? parameters? passes percent pixels points? probes products? ranks rounds? runs "
    "samples seconds? seeds? sequences steps? times trials"
)
UNIT = "|".join(UNITS.split())
LEFT_OUT = (
    r"```.*?```",
    r"\$\$.*?\$\$",
    r"\$[^$\n]*\$",
    r"`[^`\n]*`",
    r"\]\([^)]*\)",
    r"https?://\S+",
    r"<[^>]*>",
    r"arXiv:\S+|Lecture [\d.]+",
    r"§[\d.]+|[Cc]hapter \d+|ch\. \d+|Alg\. \d+|CC BY-SA [\d.]+|Apache-[\d.]+|CRC-\d+|SHA-\d+",
    r"^\d+\. ",
    r"\b(?:19|20)\d\d[a-z]?\b",
)
DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
TOKEN = re.compile(
    rf"(?<![\w.^_])(?P<digits>{DIGITS})(?![\w]*\d)"
    rf"(?=(?:\s(?:to|and|or)\s{DIGITS})?\s?(?P<unit>%|[a-zA-Zµ]+)?)"
)
WORD = re.compile(
    rf"\b(?P<word>{'|'.join(sorted(VALUES, key=len, reverse=True))})\s"
    rf"(?P<scale>(?:hundred|thousand)\s)?(?:[a-z-]+\s)?(?P<unit>{UNIT})\b",
    re.IGNORECASE,
)
DRAWING = re.compile(
    r"(?:figsize|ms|mew|lw|fontsize|alpha|capsize|xytext|[xy]lim|color)=(?:\([^)]*\)|[^,)\s]*)"
)
IN_CODE = re.compile(r"(?<![A-Za-z_\d.])(?:\d[\d_,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Claim:
    """A number that the prose of a page states.

    Attributes:
        page: stem of the notebook.
        text: the digits as written; those of a numeral.
        unit: the word or sign behind it, "" if there is none.
        context: the words around it.
        pool: the numbers among which it must be found.
    """

    page: str
    text: str
    unit: str
    context: str
    pool: frozenset[float]

    def is_found(self, text: str | None = None) -> bool:
        """Return whether the number, or another in its place, is in the pool as rounded here."""
        text = (text or self.text).replace(",", "")
        decimals = len(text.partition(".")[2])
        value = float(text)
        if decimals == 0 and value < 10:
            return value in self.pool
        factors = {"%": (1, 100), "percent": (1, 100), "kB": (1, 1e-3), "MB": (1, 1e-6)}
        return any(
            abs(round(factor * x, decimals) - value) < 1e-9
            for factor in factors.get(self.unit, (1,))
            for x in self.pool
        )


def without_code(text: str) -> str:
    """Return markdown without code, formulas, links, years and the numbers of sections."""
    for pattern in LEFT_OUT:
        text = re.sub(pattern, lambda found: "¤" * len(found[0]), text, flags=re.S | re.M)
    return text


def stated_numbers(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield the position, the digits and the unit of each number in markdown."""
    text = without_code(text)
    for found in TOKEN.finditer(text):
        digits, unit = found["digits"], found["unit"] or ""
        small = re.fullmatch(r"\d", digits) and not re.fullmatch(rf"%|{UNIT}", unit)
        if not small:
            yield found.start(), digits, unit
    for found in WORD.finditer(text):
        scale = SCALES[(found["scale"] or "").strip()]
        yield found.start(), str(VALUES[found["word"].lower()] * scale), found["unit"]


def numbers_in(text: str) -> set[float]:
    """Return the numbers in code or in an output."""
    found = (
        word.replace("_", "").replace(",", "") for word in IN_CODE.findall(DRAWING.sub("", text))
    )
    return {float(number) for number in found}


def shown(cell: dict) -> str:
    """Return the source and the text outputs of a cell."""
    parts = ["".join(cell["source"])]
    for output in cell.get("outputs", []):
        parts.append("".join(output.get("text", "")))
        data = output.get("data", {})
        parts += ["".join(data.get(f"text/{kind}", "")) for kind in ("plain", "markdown")]
    return "\n".join(parts)


@functools.cache
def read_cells(page: str) -> list[dict]:
    """Return the cells of the notebook with this stem."""
    (path,) = (path for path in PAGES if path.stem == page)
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


@functools.cache
def page_numbers(page: str) -> frozenset[float]:
    """Return the numbers in the code cells of a page, and of a page that it repeats."""
    cells = (cell for cell in read_cells(page) if cell["cell_type"] == "code")
    found = set().union(*(numbers_in(shown(cell)) for cell in cells))
    return frozenset(found | (page_numbers(REPEATED[page]) if page in REPEATED else set()))


def sections(cells: list[dict]) -> Iterator[tuple[str, list[str], list[dict]]]:
    """Yield the title, the prose and the code cells of each section of a page."""
    title, prose, code = "In short", [], []
    for cell in cells:
        if cell["cell_type"] == "code":
            code.append(cell)
            continue
        for part in re.split(r"^(?=##+ )", "".join(cell["source"]), flags=re.M):
            if heading := re.match(r"##+ (.+)", part):
                yield title, prose, code
                title, prose, code = heading[1], [], []
            prose.append(part)
    yield title, prose, code


def claims(page: str) -> Iterator[Claim]:
    """Yield the numbers in the prose of a page."""
    whole = page_numbers(page)
    for title, prose, code in sections(read_cells(page)):
        near = frozenset(set().union(*(numbers_in(shown(cell)) for cell in code)))
        for text in prose:
            summary = any(f"{word}" in title or f"**{word}" in text for word in SUMMARIES)
            for start, digits, unit in stated_numbers(text):
                precise = len(re.sub(r"\D", "", digits).strip("0")) >= 3 or "," in digits
                context = " ".join(text[max(0, start - 40) : start + 40].split())
                pool = whole if summary or precise or not code else near
                yield Claim(page, digits, unit, context, pool | COMMON)


def has_source(claim: Claim) -> bool:
    """Return whether a number is one of `SOURCES`."""
    return any(page == claim.page and text in claim.context for page, text in SOURCES)


@pytest.mark.parametrize("page", [path.stem for path in PAGES])
def test_numbers_of_the_prose_are_those_of_the_code(page):
    lost = [c for c in claims(page) if not c.is_found() and not has_source(c)]
    assert not lost, "\n".join(f"{c.text} {c.unit}: …{c.context}…" for c in lost)


def alter(text: str, rng: random.Random) -> str:
    """Return digits with one of them, which is not a leading zero, exchanged for another."""
    places = [i for i, c in enumerate(text) if c.isdigit()]
    i = rng.choice(places)
    return text[:i] + rng.choice([d for d in "123456789" if d != text[i]]) + text[i + 1 :]


def count_noticed(pages: Iterable[str], rng: random.Random) -> dict[str, list[bool]]:
    """Return by number of digits whether each number of the pages is noticed when altered."""
    noticed = {"one digit": [], "two digits": [], "three digits or more": []}
    for claim in (claim for page in pages for claim in claims(page)):
        digits = len(re.sub(r"\D", "", claim.text).lstrip("0"))
        kind = [*noticed][min(digits, 3) - 1]
        noticed[kind].append(not claim.is_found(alter(claim.text, rng)))
    return noticed


def test_altered_numbers_are_noticed():
    noticed = count_noticed([path.stem for path in PAGES], random.Random(0))
    shares = {kind: sum(found) / len(found) for kind, found in noticed.items()}
    assert shares["three digits or more"] > 0.9 and shares["two digits"] > 0.6, shares
    assert sum(map(len, noticed.values())) > 700


def test_every_source_is_of_a_number():
    lost = {(c.page, c.context) for path in PAGES for c in claims(path.stem) if not c.is_found()}
    unused = {(p, text) for p, text in SOURCES if not any(p == q and text in c for q, c in lost)}
    assert not unused


def printed(page: str, pattern: str) -> list[float]:
    """Return the numbers that the outputs of a page show in the group of a pattern."""
    cells = (cell for cell in read_cells(page) if cell["cell_type"] == "code")
    outputs = ("".join(out.get("text", "")) for cell in cells for out in cell["outputs"])
    found = [number for text in outputs for number in re.findall(pattern, text, re.M)]
    assert found, f"{page} prints nothing like {pattern}"
    return [float(number) for number in found]


def test_orders_of_times_are_those_of_the_outputs():
    # "hundreds of times as long", "dozens of times as long where the batch is binarized anew"
    (loader,) = printed("06_loading", r"DataLoader.* ([\d.]+) ms")
    (gray,), (anew,) = (
        printed("06_loading", rf"Loader, {x} +([\d.]+) ms") for x in ("gray", "dynamic")
    )
    assert 200 < loader / gray < 1000 and 20 < loader / anew < 100
    # "less than a hundredth of a training step"
    shares = printed("14_controllers", r"^\w+ +([\d.]+) %")
    assert len(shares) == 8 and 0 < min(shares) and max(shares) < 1


if __name__ == "__main__":
    generator = random.Random()
    some = generator.sample([path.stem for path in PAGES], 20)
    print("altered on", ", ".join(sorted(some)))
    for name, found in count_noticed(some, generator).items():
        print(f"{name}: {sum(found)} of {len(found)} noticed")
