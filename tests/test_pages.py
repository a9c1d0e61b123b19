"""The documentation site: built once from the committed notebooks, read in headless Chromium."""

import functools
import http.server
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

repo = Path(__file__).resolve().parent.parent
browsers = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
chromium = next(filter(None, map(shutil.which, browsers)), None)
packages = ("playwright", "sphinx", "myst_nb", "furo", "sphinx-mathjax-offline")
missing = [name for name in packages if importlib.util.find_spec(name) is None]
missing += ["Chromium"] * (not chromium)
reading = pytest.mark.skipif(
    bool(missing), reason=f"the pages need {', '.join(missing)}, absent here"
)

flags = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
wide, narrow = {"width": 1400, "height": 900}, {"width": 400, "height": 800}

# What a page shows, asked of the browser after its formulas are set. Code is code: nothing in it
# counts as TeX left over.
survey = r"""() => {
  const texts = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const code = "pre, code, script, style, noscript, textarea, mjx-container";
  while (walker.nextNode()) {
    const node = walker.currentNode, box = node.parentElement;
    if (!node.data.trim() || box.closest(code)) continue;
    if (box.checkVisibility()) texts.push(node.data);
  }
  const wrong = "mjx-merror, [data-mjx-error], [data-mml-node='merror'], "
    + "mjx-container [fill='red']";
  return {
    title: document.title, texts, math: document.querySelectorAll("mjx-container").length,
    errors: [...document.querySelectorAll(wrong)]
      .map(e => e.closest("mjx-container")?.innerText || e.textContent),
    ids: [...document.querySelectorAll("[id]")].map(e => e.id),
    links: [...document.querySelectorAll("a[href]")].map(a => a.href),
    images: [...document.images].map(i => ({src: i.src, alt: i.alt, width: i.naturalWidth})),
  };
}"""
# What is wider than the page and lies in no smaller box that scrolls; the theme clips it or lets
# the whole text slide, so that the page itself does not grow.
spill = """() => {
  const width = document.documentElement.clientWidth, page = document.scrollingElement;
  const right = e => Math.round(e.getBoundingClientRect().right);
  const out = page.scrollWidth > innerWidth
    ? [`the page: ${page.scrollWidth} of ${innerWidth} px`] : [];
  const scrolls = e => e && !e.matches(".content, body")
    && (/auto|scroll/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  const apart = "svg, mjx-assistive-mml, .toc-drawer";
  for (const e of document.querySelectorAll(".main *"))
    if (right(e) > width + 1 && e.checkVisibility() && !e.closest(apart) && !scrolls(e))
      out.push(`${right(e)} of ${width} px: ${e.outerHTML.slice(0, 120)}`);
  return out.slice(0, 5);
}"""
contrast = r"""() => {
  const rgba = c => {
    const v = c.match(/[\d.]+/g).map(Number);
    return v.length < 4 ? [...v, 1] : v;
  };
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
  const linear = c =>
    c.map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  const light = c => { const [r, g, b] = linear(c); return .2126 * r + .7152 * g + .0722 * b; };
  const own = e => rgba(getComputedStyle(e).backgroundColor);
  const known = new Map([[null, [255, 255, 255, 1]]]);
  const behind = e => {
    if (!known.has(e)) {
      const color = own(e);
      known.set(e, color[3] >= 1 ? color : over(color, behind(e.parentElement)));
    }
    return known.get(e);
  };
  const seen = new Map(), tokens = new Set();
  const walker = document.createTreeWalker(document.querySelector(".page"), NodeFilter.SHOW_TEXT);
  const apart = "script, style, mjx-assistive-mml, .headerlink, .back-to-top";
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (e.matches(".highlight pre > span")) {
      if (tokens.has(e.className)) continue;
      tokens.add(e.className);
    }
    const text = walker.currentNode.data.trim();
    if (!text || e.closest(apart)) continue;
    if (!e.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    const style = getComputedStyle(e), back = behind(e), fore = over(rgba(style.color), back);
    const a = light(fore), b = light(back), size = parseFloat(style.fontSize);
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    const needed = size >= 24 || size >= 18.66 && style.fontWeight >= 700 ? 3 : 4.5;
    if (ratio < needed) {
      const colors = `${style.color} on ${back.slice(0, 3)}`;
      const fault = `${ratio.toFixed(2)} < ${needed}: ${colors}: ${text.slice(0, 40)}`;
      seen.set(style.color + back, fault);
    }
  }
  return [...seen.values()];
}"""
typeset = """!document.querySelector('.math') || document.documentElement.dataset.math === 'done'
  || !window.MathJax?.version"""
two_frames = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
raw = re.compile(r"\$|\\[a-zA-Z]+|\\[()\[\]]|Math input error")


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and logs nothing."""

    def log_message(self, *args):
        """Log nothing."""


class Tab:
    """One tab of a browser that reads page after page, and what went wrong on the way."""

    def __init__(self, browser, base):
        self.base, self.faults = base, []
        self.context = browser.new_context(viewport=wide, color_scheme="light")
        self.context.set_default_timeout(0)
        self.page = self.context.new_page()
        self.page.on("console", self.hear)
        self.page.on("pageerror", lambda error: self.faults.append(f"script: {error}"))
        self.page.on("requestfailed", self.miss)
        self.page.on("response", self.receive)
        self.page.on("request", self.ask)

    def hear(self, message):
        """Note errors and warnings of the console."""
        if message.type in ("error", "warning"):
            self.faults.append(f"console: {message.text}")

    def miss(self, request):
        """Note what could not be loaded; what the next page cut short is not at fault."""
        if request.failure != "net::ERR_ABORTED":
            self.faults.append(f"failed: {request.url}")

    def receive(self, response):
        """Note failures of the server."""
        if response.status >= 400:
            self.faults.append(f"{response.status}: {response.url}")

    def ask(self, request):
        """Note requests to other hosts."""
        if not request.url.startswith((self.base, "data:", "blob:")):
            self.faults.append(f"another host: {request.url}")

    def open(self, name):
        """Load a page, its formulas typeset, and forget earlier faults."""
        self.faults = []
        self.page.goto(self.base + name, wait_until="load")
        self.page.wait_for_function(typeset)
        return self.page

    def close(self):
        """Close the tab."""
        self.context.close()

    def read(self, name, turn):
        """Return what a page shows, wide and narrow, light and dark.

        A page is loaded in the view that the page before it was left in: the views of every other
        page are taken in reverse.
        """
        page = self.open(name)
        found = {"spill": {}, "contrast": {}}
        views = (self.view_wide_light, self.view_wide_dark, self.view_narrow_dark)
        for view in views if turn % 2 == 0 else views[::-1]:
            view(page, found)
        return found | {"faults": self.faults}

    def view_wide_light(self, page, found):
        """Survey a page as a reader in daylight sees it."""
        page.emulate_media(color_scheme="light")
        found |= page.evaluate(survey)
        found["spill"][wide["width"]] = page.evaluate(spill)
        found["contrast"]["light"] = page.evaluate(contrast)

    def view_wide_dark(self, page, found):
        """Survey the colors of a page at night."""
        if page.viewport_size != wide:
            page.set_viewport_size(wide)
            page.evaluate(two_frames)
        page.emulate_media(color_scheme="dark")
        found["contrast"]["dark"] = page.evaluate(contrast)

    def view_narrow_dark(self, page, found):
        """Survey a page on a telephone, its formulas fitted to the width."""
        if page.viewport_size != narrow:
            page.set_viewport_size(narrow)
        page.evaluate(two_frames)
        found["spill"][narrow["width"]] = page.evaluate(spill)


def read_pages(base, names):
    """Read pages one after another in a browser of its own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        tab = Tab(browser, base)
        found = {name: tab.read(name, turn) for turn, name in enumerate(names)}
        browser.close()
    return found


class Reader:
    """Serves a built site on a free loopback port and reads each of its pages once."""

    def __init__(self, folder, browsers=2):
        self.folder = folder
        handler = functools.partial(Quiet, directory=str(folder))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.base = f"http://127.0.0.1:{self.server.server_address[1]}/"
        paths = [p.relative_to(folder) for p in sorted(folder.rglob("*.html"))]
        names = [p.as_posix() for p in paths if "_static" not in p.parts]
        shares = [names[i::browsers] for i in range(browsers)]
        with ThreadPoolExecutor(browsers) as pool:
            read = list(pool.map(functools.partial(read_pages, self.base), shares))
        self.pages = {name: found for share in read for name, found in share.items()}

    def close(self):
        """Stop serving."""
        self.server.shutdown()
        self.server.server_close()

    # Each returns a list of complaints, empty where all is well.

    def complaints(self, *keys):
        """Return what pages hold under the keys, each entry with its page."""
        out = []
        for name, page in self.pages.items():
            found = functools.reduce(lambda held, key: held[key], keys, page)
            out += [f"{name}: {entry}" for entry in found]
        return out

    def texts_with(self, pattern):
        """Return the visible texts and titles that match."""
        return [
            f"{name}: {text.strip()[:80]}"
            for name, page in self.pages.items()
            for text in [page["title"], *page["texts"]]
            if re.search(pattern, text)
        ]

    def faults(self):
        """Return errors of the console and requests that failed or went elsewhere."""
        return self.complaints("faults")

    def raw_tex(self):
        """Return TeX that was not typeset."""
        return self.texts_with(raw)

    def raw_tables(self):
        """Return tables that stayed text."""
        return self.texts_with(r"\| ---")

    def bad_math(self):
        """Return formulas that MathJax refused."""
        return self.complaints("errors")

    def spills(self, width):
        """Return what is wider than a window of this width."""
        return self.complaints("spill", width)

    def pale(self, theme):
        """Return texts whose contrast is below WCAG's AA."""
        return self.complaints("contrast", theme)

    def images(self):
        """Return images that did not load or have no alternative text."""
        return [
            f"{name}: {i['src'][-60:]} alt={i['alt']!r}, {i['width']} px"
            for name, page in self.pages.items()
            for i in page["images"]
            if not has_alternative(i) or not i["width"]
        ]

    def links(self, blob):
        """Return links that lead nowhere: to pages, anchors, files or lines that do not exist."""
        return [
            f"{name}: {complaint}"
            for name, page in self.pages.items()
            for complaint in filter(None, (self.link(o, blob) for o in set(page["links"])))
        ]

    def link(self, link, blob):
        """Return what is wrong with a link, None where it leads somewhere."""
        url, anchor = urldefrag(link)
        if url.startswith(self.base):
            path = unquote(urlsplit(url).path).lstrip("/") or "index.html"
            if not (self.folder / path).is_file():
                return f"{link} leads nowhere"
            if anchor and path in self.pages and unquote(anchor) not in self.pages[path]["ids"]:
                return f"{path} has no #{anchor}"
        elif url.startswith(blob):
            path = repo / unquote(url[len(blob) :]).lstrip("/")
            line = re.fullmatch(r"L(\d+)", anchor)
            if not path.exists():
                return f"{link} is not in the repository"
            if line and int(line[1]) > len(path.read_text(encoding="utf-8").splitlines()):
                return f"{link}: no such line"
        elif not url.startswith(("http://", "https://", "mailto:")):
            return f"{link} is no link"
        return None


def has_alternative(image):
    """Return whether an image has an alternative text that is not its file's name."""
    return image["alt"].strip() and not re.search(r"\.(png|svg|jpe?g)$", image["alt"])


def settings():
    """Return the project's facts."""
    config = ConfigParser(delimiters=["="])
    config.read(repo / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


blob = f"{settings()['git_url']}/blob/{settings()['branch']}"


def build(out, *options):
    """Build a site and return the finished process."""
    command = [sys.executable, repo / "nbs" / "_site" / "build.py", "--out", out, *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="session")
def builds(tmp_path_factory):
    """The folder and the finished process of both sites, the faulty one built beside the real."""
    out, notebooks = tmp_path_factory.mktemp("pages"), tmp_path_factory.mktemp("notebooks")
    write_faulty(notebooks)
    with ThreadPoolExecutor(2) as pool:
        real = pool.submit(build, out / "real")
        faulty = pool.submit(build, out / "faulty", "--notebooks", notebooks)
    return {"real": (out / "real", real.result()), "faulty": (out / "faulty", faulty.result())}


@pytest.fixture(scope="session")
def site(builds) -> Iterator[Reader]:
    """The site, read."""
    reader = Reader(builds["real"][0])
    yield reader
    reader.close()


@pytest.fixture(scope="session")
def browser():
    """A browser for what is done by hand."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, site):
    """A fresh tab on the site."""
    tab = Tab(browser, site.base)
    yield tab
    tab.close()


@reading
def test_builds_without_a_complaint(builds):
    finished = builds["real"][1]
    assert finished.returncode == 0, finished.stderr[-4000:]


@reading
def test_every_notebook_has_its_page_and_its_place_in_the_sidebar(site):
    nbs = repo / "nbs"
    paths = [p.relative_to(nbs).with_suffix(".html") for p in nbs.rglob("*.ipynb")]
    shown = [p for p in paths if not any(part[0] in "._" for part in p.parts)]
    names = ["/".join(re.sub(r"^\d+[a-z]?_", "", part) for part in p.parts) for p in shown]
    assert set(names) <= set(site.pages)
    linked = {urldefrag(link)[0] for link in site.pages["index.html"]["links"]}
    assert {site.base + name for name in names} <= linked


@reading
def test_no_console_error_no_failed_request_no_other_host(site):
    assert not site.faults()


@reading
def test_no_raw_tex_is_left(site):
    assert not site.raw_tex()


@reading
def test_tables_are_tables(site):
    assert not site.raw_tables()


@reading
def test_mathematics_is_typeset(site):
    assert not site.bad_math()
    assert sum(page["math"] for page in site.pages.values()) > 0


@reading
def test_links_and_anchors_resolve(site):
    assert not site.links(blob)


@reading
def test_images_have_alternative_text(site):
    assert not site.images()


@reading
@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_spills_over_the_page(site, width):
    assert not site.spills(width)


@reading
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out(site, theme):
    assert not site.pale(theme)


@reading
def test_search_finds_the_vae(tab):
    page = tab.open("index.html")
    box = page.locator("input.sidebar-search")
    box.fill("VAE")
    with page.expect_navigation():
        box.press("Enter")
    assert page.evaluate("Search.hasIndex()"), tab.faults
    summary = "document.querySelector('#search-results p.search-summary')"
    page.wait_for_function(f"{summary}?.innerText.match(/found|did not match/)")
    page.wait_for_load_state("networkidle")
    found = page.evaluate("[...document.querySelectorAll('#search-results li a')].map(a => a.href)")
    assert any("models/vae.html" in link for link in found), found
    assert not [text for text in page.evaluate(survey)["texts"] if raw.search(text)]
    assert not page.evaluate(spill) and not tab.faults


@reading
def test_dark_mode_toggles_and_is_remembered(tab):
    page = tab.open("index.html")

    def brightness():
        """Return the brightness of the background, from 0 to 1."""
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", color)[:3])) / 765

    def theme():
        """Return the theme that is set."""
        return page.evaluate("document.body.dataset.theme")

    seen = {}
    for _ in range(3):
        page.locator("button.theme-toggle:visible").click()
        seen[theme()] = brightness()
    assert set(seen) == {"auto", "light", "dark"} and seen["dark"] < 0.2 < 0.8 < seen["light"]
    while theme() != "dark":
        page.locator("button.theme-toggle:visible").click()
    page.goto(tab.base + "api.html")
    assert theme() == "dark" and brightness() < 0.2


@reading
def test_api_entries_carry_their_tables_and_sources(site, tab):
    """An argument's name, type, default and details stand in a row; a link leads to the line."""
    page = tab.open("models/vae.html")
    rows = page.evaluate(
        "[...document.querySelectorAll('dl.py table tr')]"
        ".map(row => [...row.cells].map(cell => cell.innerText.trim()))"
    )
    assert any(r[0] == "width" and "int" in r and "32" in r and len(r[-1]) > 3 for r in rows), rows
    links = site.pages["models/vae.html"]["links"]
    assert any(re.search(r"optgen/models/vae\.py#L\d+$", link) for link in links)
    assert re.search(r"(Returns|Raises) ", page.locator("dl.py").first.inner_text())


@reading
def test_checks_figures_and_imports_are_folded(tab):
    """Checks fold behind their word, and a check's code is not seen before it is opened."""
    page = tab.open("models/vae.html")
    words = set(page.locator("details.hide:not([open]) > summary").all_inner_texts())
    assert {"Check", "Code of the figure"} <= {word.strip() for word in words}, words
    code = page.locator(".cell_input", has_text=re.compile(r"^\s*assert ", re.M))
    assert code.count() > 0
    assert not [i for i in range(code.count()) if code.nth(i).is_visible()]


@reading
def test_a_slider_shows_one_figure_at_a_time(tab):
    """Of the figures behind a slider one is seen, and the slider decides which."""
    figure = tab.open("optimizers/rules.html").locator("figure:has(input[type=range])").first
    images, slider = figure.locator("img"), figure.locator("input[type=range]")

    def seen():
        """Return which figures are visible, and the label beside the slider."""
        shown = [i for i in range(images.count()) if images.nth(i).is_visible()]
        return shown, figure.locator("output").inner_text()

    assert images.count() == 6 and seen() == ([3], "0.4")
    slider.focus()
    slider.press("ArrowRight")
    assert seen() == ([4], "0.8")
    slider.press("Home")
    assert seen() == ([0], "0.05")


# The reading of docstrings.


@pytest.fixture
def symbols(monkeypatch):
    """The site's reader of definitions."""
    monkeypatch.syspath_prepend(repo / "nbs" / "_site")
    return importlib.import_module("symbols")


source = '''
@dataclass(frozen=True)
class Record(Base):
    r"""A record of $|x|$.

    It has a second paragraph:

        with an example

    Attributes:
        seed: of the run; "none" is a value.
        size: two
            lines.
    """

    seed: int
    size: float = 1e-3


class Model:
    r"""A model.

    Args:
        width: of a layer,
            $\\geq 1$.
        *others, **more: passed on.

    Attributes:
        shape: of an image.
    """

    shape: tuple[int, ...] = (1, 2)

    def __init__(self, width: int = 8, *others: int, deep: bool = False, **more: int) -> None:
        pass

    @classmethod
    def load(cls, path: str) -> "Model":
        """Read a model.

        Raises:
            OSError: if there is none.
            ValueError: if it is broken: cut, or
                of another version.

        Returns:
            The model: in evaluation mode.
        """

    def silent(self) -> None:
        pass


def distance(x: Tensor, *, p: float = 2) -> Tensor:
    """Return the distance.

    Example:
        distance(x)
    """
'''


def test_docstrings_become_directives(symbols):
    record, model, distance = symbols.symbols(source, "package.module")
    text = record.markdown(str)
    assert ":py:class}" not in text and "{py:class} Record(seed: int, size: float = 1e-3)" in text
    assert '| `seed` | `int` |  | of the run; `"none"` is a value. |' in text
    assert "| `size` | `float` | `1e-3` | two lines. |" in text
    assert "A record of $|x|$.\n\nIt has a second paragraph:\n\n    with an example" in text
    assert "Attributes:" not in text and record.doc.summary == "A record of $|x|$."

    text = model.markdown(str)
    assert (
        "Model(width: int = 8, *others: int, deep: bool = False, **more: int)\n:module: "
        "package.module"
    ) in text
    assert r"| `width` | `int` | `8` | of a layer, $\geq 1$. |" in text
    assert "| `*others` | `int` |  | passed on. |" in text
    assert "| `**more` | `int` |  | passed on. |" in text
    assert "| Attribute | Type | Details |" in text
    assert "| `shape` | `tuple[int, ...]` | of an image. |" in text
    assert [member.name for member in model.members()] == ["Model.load"]
    assert (
        "{py:method} Model.load(path: str) -> Model\n:module: package.module\n:classmethod:" in text
    )
    assert "*Returns* The model: in evaluation mode." in text
    assert "*Raises* `OSError` if there is none." in text
    assert "*Raises* `ValueError` if it is broken: cut, or\nof another version." in text

    text = distance.markdown(str)
    assert "distance(x: Tensor, *, p: float = 2) -> Tensor" in text
    assert "Example:\n    distance(x)" in text and "| Argument" not in text


def test_checks_are_distinguished_from_other_cells(symbols):
    checks = ("assert x", "with raises(ValueError, 'a'):\n    f()", "testing.assert_mean(x, 0, 1)")
    assert all(map(symbols.is_check, checks))
    assert not any(map(symbols.is_check, ("x = 'assert y'", "import math", "%time", "")))


def test_imports_are_distinguished_from_other_cells(symbols):
    imports = (
        "import math\nfrom torch import Tensor",
        'from a import B\n_all_ = ["B"]',
        "import a\nif TYPE_CHECKING:\n    from b import C",
        "with warnings.catch_warnings():\n    warnings.simplefilter('ignore')\n    import a",
    )
    assert all(map(symbols.only_imports, imports))
    others = ("", "import a\nx = 1", "if x:\n    import a\n    y = 2", "with f():\n    g()")
    assert not any(map(symbols.only_imports, others))


def module_page(name, source):
    """Return a notebook that exports a module, with a paragraph that names things."""
    lead = cell("markdown", f"# {name}\n\n> A page.\n\nSee `sample`, `distance` and `Model`.")
    code = [cell("code", f"#| default_exp {name}"), cell("code", f"#| export\n{source}")]
    code = [c | {"execution_count": None, "outputs": []} for c in code]
    return {"cells": [lead, *code], "metadata": {}, "nbformat": 4, "nbformat_minor": 4}


def test_a_word_that_may_be_meant_otherwise_is_no_link(tmp_path, symbols):
    pages = {
        "metrics": 'def distance(x):\n    """Return it."""',
        "cli.tools": 'def sample(n):\n    """Draw."""\n\ndef only_here():\n    """Do."""',
        "model": 'class Model:\n    """A."""\n\n    def sample(self):\n        """Draw."""',
    }
    for name, text in pages.items():
        (tmp_path / f"{name}.ipynb").write_text(json.dumps(module_page(name, text)))
    site = importlib.import_module("pages").Site(tmp_path, "lib", "", "", repo)
    here = {page.module: page for page in site.pages}
    found = {
        name: site.find(name, here["lib.metrics"]) for name in ("sample", "only_here", "Model")
    }
    assert found["sample"] is None and found["only_here"] is None
    assert found["Model"].full == "lib.model.Model"
    assert site.find("distance", here["lib.model"]).full == "lib.metrics.distance"
    assert site.find("sample", here["lib.cli.tools"]).full == "lib.cli.tools.sample"
    assert site.find("Model.sample", here["lib.metrics"]).full == "lib.model.Model.sample"
    prose = importlib.import_module("prose").Prose(site, here["lib.metrics"])
    assert prose("`distance.json` of `distance`") == (
        "`distance.json` of {py:obj}`distance <lib.metrics.distance>`"
    )
    assert prose("`Model.weights`") == "{py:obj}`Model.weights <lib.model.Model>`"


# The checks above, shown to see what they look for.


def write_faulty(folder):
    """Write the notebooks of a site with one fault of each kind."""
    page = "\n\n".join(
        (
            r"# Faults",
            r"Left over: \\frac{1}{2}.",
            "No table: | --- | --- |",
            r"$$\undefinedmacro{x}$$",
            r"$$\frac{1}$$",
            "[gone](#gone)",
            "Eq. (nowhere)",
            "[absent](absent.ipynb)",
            '<img src="https://elsewhere.invalid/a.png">',
            '<div style="width: 3000px">wide</div>',
            "<script>console.error('heard you')</script>",
            '<p style="color: #999; background: #aaa">pale</p>',
            f'<a href="{blob}/nowhere.py">x</a>',
        )
    )
    png = (
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5E"
        "rkJggg=="
    )
    output = {"output_type": "display_data", "metadata": {}, "data": {"image/png": png}}
    figure = cell("code", "draw()", execution_count=None, outputs=[output])
    index = [cell("markdown", "# Index\n\n- [a](a.ipynb)")]
    for name, cells in {"index": index, "a": [cell("markdown", page), figure]}.items():
        notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
        (folder / f"{name}.ipynb").write_text(json.dumps(notebook))


def cell(kind, source, **more):
    """Return a cell of a notebook."""
    return {"cell_type": kind, "metadata": {}, "source": source, **more}


@pytest.fixture(scope="session")
def faulty(builds):
    """The faulty site, read."""
    reader = Reader(builds["faulty"][0], browsers=1)
    yield reader
    reader.close()


@reading
def test_the_build_refuses_what_it_can_see(builds):
    finished = builds["faulty"][1]
    assert finished.returncode == 1
    for words in (
        "Eq. (nowhere) is cited and defined nowhere",
        "link to absent.ipynb",
        "draws a figure without",
        "gone",
    ):
        assert words in finished.stderr


@reading
def test_the_browser_sees_the_rest(faulty):
    seen = {
        "console: heard you": faulty.faults(),
        "another host: https://elsewhere.invalid": faulty.faults(),
        "failed": faulty.faults(),
        r"\frac": faulty.raw_tex(),
        "No table": faulty.raw_tables(),
        "undefinedmacro": faulty.bad_math(),
        "Missing argument": faulty.bad_math(),
        "#gone": faulty.links(blob),
        "nowhere.py is not in the repository": faulty.links(blob),
        "elsewhere.invalid": faulty.images(),
        "alt=''": faulty.images(),
        "wide": faulty.spills(400),
        "3000": faulty.spills(1400),
        "pale": faulty.pale("light"),
        ": pale": faulty.pale("dark"),
    }
    for word, found in seen.items():
        assert any(word in complaint for complaint in found), (word, found)
