"The documentation site: built once from the committed notebooks, read in headless Chromium."

import functools
import http.server
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
from configparser import ConfigParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

repo = Path(__file__).resolve().parent.parent
chromium = next(
    filter(
        None,
        map(
            shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
        ),
    ),
    None,
)
missing = [
    m
    for m in ("playwright", "sphinx", "myst_nb", "furo", "sphinx-mathjax-offline")
    if importlib.util.find_spec(m) is None
]
missing += ["Chromium"] * (not chromium)
pytestmark = pytest.mark.skipif(
    bool(missing), reason=f"the pages need {', '.join(missing)}, absent here"
)

flags = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
wide, narrow = dict(width=1400, height=900), dict(width=400, height=800)

# What a page shows, asked of the browser after its formulas are set. Code is code: nothing in it counts as TeX left over.
survey = r"""() => {
  const texts = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, box = node.parentElement;
    if (!node.data.trim() || box.closest("pre, code, script, style, noscript, textarea, mjx-container")) continue;
    if (box.checkVisibility()) texts.push(node.data);
  }
  return {
    title: document.title, texts, math: document.querySelectorAll("mjx-container").length,
    errors: [...document.querySelectorAll('mjx-merror, [data-mjx-error], [data-mml-node="merror"], mjx-container [fill="red"]')]
      .map(e => e.closest("mjx-container")?.innerText || e.textContent),
    ids: [...document.querySelectorAll("[id]")].map(e => e.id),
    links: [...document.querySelectorAll("a[href]")].map(a => a.href),
    images: [...document.images].map(i => ({src: i.src, alt: i.alt, width: i.naturalWidth})),
  };
}"""
# What is wider than the page and lies in no smaller box that scrolls; the theme clips it or lets the whole text slide, so that the
# page itself does not grow.
spill = """() => {
  const width = document.documentElement.clientWidth, page = document.scrollingElement, right = e => Math.round(e.getBoundingClientRect().right);
  const out = page.scrollWidth > innerWidth ? [`the page: ${page.scrollWidth} of ${innerWidth} px`] : [];
  const scrolls = e => e && !e.matches(".content, body") && (/auto|scroll/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  for (const e of document.querySelectorAll(".main *"))
    if (right(e) > width + 1 && e.checkVisibility() && !e.closest("svg, mjx-assistive-mml, .toc-drawer") && !scrolls(e))
      out.push(`${right(e)} of ${width} px: ${e.outerHTML.slice(0, 120)}`);
  return out.slice(0, 5);
}"""
contrast = r"""() => {
  const rgba = c => { const v = c.match(/[\d.]+/g).map(Number); return v.length < 4 ? [...v, 1] : v; };
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
  const linear = c => c.map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  const light = c => { const [r, g, b] = linear(c); return .2126 * r + .7152 * g + .0722 * b; };
  const own = e => rgba(getComputedStyle(e).backgroundColor);
  const behind = e => !e ? [255, 255, 255, 1] : own(e)[3] >= 1 ? own(e) : over(own(e), behind(e.parentElement));
  const seen = new Map(), tokens = new Set(), walker = document.createTreeWalker(document.querySelector(".page"), NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (e.matches(".highlight pre > span")) { if (tokens.has(e.className)) continue; tokens.add(e.className); }
    const text = walker.currentNode.data.trim();
    if (!text || e.closest("script, style, mjx-assistive-mml, .headerlink, .back-to-top")) continue;
    if (!e.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    const style = getComputedStyle(e), back = behind(e), fore = over(rgba(style.color), back), size = parseFloat(style.fontSize);
    const a = light(fore), b = light(back), ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    const needed = size >= 24 || size >= 18.66 && style.fontWeight >= 700 ? 3 : 4.5;
    if (ratio < needed) seen.set(style.color + back, `${ratio.toFixed(2)} < ${needed}: ${style.color} on ${back.slice(0, 3)}: ${text.slice(0, 40)}`);
  }
  return [...seen.values()];
}"""
raw = re.compile(r"\$|\\[a-zA-Z]+|\\[()\[\]]|Math input error")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


class Reader:
    "Serves a built site on a free loopback port and reads every page of it once."

    def __init__(self, browser, folder):
        self.folder = folder
        self.server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
        )
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.base = f"http://127.0.0.1:{self.server.server_address[1]}/"
        self.context = browser.new_context(viewport=wide, color_scheme="light")
        self.context.set_default_timeout(0)
        self.pages = {
            p.relative_to(folder).as_posix(): {}
            for p in sorted(folder.rglob("*.html"))
            if "_static" not in p.parts
        }
        for name in self.pages:
            self.pages[name] = self.visit(name)

    def open(self, name, faults):
        "A page, loaded and typeset; `faults` collects what went wrong on the way."
        page = self.context.new_page()
        page.on(
            "console",
            lambda m: (
                faults.append(f"console: {m.text}") if m.type in ("error", "warning") else None
            ),
        )
        page.on("pageerror", lambda e: faults.append(f"script: {e}"))
        page.on("requestfailed", lambda r: faults.append(f"failed: {r.url}"))
        page.on(
            "response", lambda r: faults.append(f"{r.status}: {r.url}") if r.status >= 400 else None
        )
        page.on(
            "request",
            lambda r: (
                faults.append(f"another host: {r.url}")
                if not r.url.startswith((self.base, "data:", "blob:"))
                else None
            ),
        )
        page.goto(self.base + name, wait_until="load")
        page.wait_for_function(
            "!document.querySelector('.math') || document.documentElement.dataset.math === 'done' || !window.MathJax?.version"
        )
        return page

    def visit(self, name):
        faults = []
        page = self.open(name, faults)
        found = dict(
            page.evaluate(survey),
            faults=faults,
            spill={1400: page.evaluate(spill)},
            contrast={"light": page.evaluate(contrast)},
        )
        page.emulate_media(color_scheme="dark")
        found["contrast"]["dark"] = page.evaluate(contrast)
        page.set_viewport_size(narrow)
        page.evaluate(
            "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        )  # the page fits its formulas to the new width
        found["spill"][400] = page.evaluate(spill)
        page.close()
        return found

    def close(self):
        self.context.close()
        self.server.shutdown()
        self.server.server_close()

    # Each returns a list of complaints, empty where all is well.

    def faults(self):
        return [f"{n}: {f}" for n, p in self.pages.items() for f in p["faults"]]

    def raw_tex(self):
        return [
            f"{n}: {t.strip()[:80]}"
            for n, p in self.pages.items()
            for t in [p["title"], *p["texts"]]
            if raw.search(t)
        ]

    def raw_tables(self):
        return [
            f"{n}: {t.strip()[:80]}"
            for n, p in self.pages.items()
            for t in p["texts"]
            if "| ---" in t
        ]

    def bad_math(self):
        return [f"{n}: {e}" for n, p in self.pages.items() for e in p["errors"]]

    def images(self):
        bad = lambda i: (
            not i["alt"].strip() or re.search(r"\.(png|svg|jpe?g)$", i["alt"]) or not i["width"]
        )
        return [
            f"{n}: {i['src'][-60:]} alt={i['alt']!r}, {i['width']} px"
            for n, p in self.pages.items()
            for i in p["images"]
            if bad(i)
        ]

    def spills(self, width):
        return [f"{n}: {s}" for n, p in self.pages.items() for s in p["spill"][width]]

    def pale(self, theme):
        return [f"{n}: {c}" for n, p in self.pages.items() for c in p["contrast"][theme]]

    def links(self, blob):
        "Internal links and anchors must lead somewhere; links into the repository must name a file and a line that exist."
        out = []
        for name, page in self.pages.items():
            for link in set(page["links"]):
                url, anchor = urldefrag(link)
                if url.startswith(self.base):
                    path = unquote(urlsplit(url).path).lstrip("/") or "index.html"
                    if not (self.folder / path).is_file():
                        out.append(f"{name}: {link} leads nowhere")
                    elif (
                        anchor
                        and unquote(anchor)
                        not in self.pages.get(path, {"ids": [unquote(anchor)]})["ids"]
                    ):
                        out.append(f"{name}: {path} has no #{anchor}")
                elif url.startswith(blob):
                    path, line = (
                        repo / unquote(url[len(blob) :]).lstrip("/"),
                        re.fullmatch(r"L(\d+)", anchor),
                    )
                    if not path.exists():
                        out.append(f"{name}: {link} is not in the repository")
                    elif line and int(line[1]) > len(path.read_text(encoding="utf-8").splitlines()):
                        out.append(f"{name}: {link}: no such line")
                elif not url.startswith(("http://", "https://", "mailto:")):
                    out.append(f"{name}: {link} is no link")
        return out


def settings():
    cfg = ConfigParser(delimiters=["="])
    cfg.read(repo / "settings.ini", encoding="utf-8")
    return cfg["DEFAULT"]


blob = f"{settings()['git_url']}/blob/{settings()['branch']}"


def build(out, *options):
    return subprocess.run(
        [sys.executable, repo / "nbs" / "_site" / "build.py", "--out", out, *options],
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    out, nbs = tmp_path_factory.mktemp("pages") / "site", repo / "nbs"
    notebooks = [
        p.relative_to(nbs)
        for p in nbs.rglob("*.ipynb")
        if not any(part[0] in "._" for part in p.relative_to(nbs).parts)
    ]
    return out, build(out), notebooks


@pytest.fixture(scope="session")
def site(built, browser):
    reader = Reader(browser, built[0])
    yield reader
    reader.close()


def test_builds_without_a_complaint(built):
    assert built[1].returncode == 0, built[1].stderr[-4000:]


def test_every_notebook_has_its_page_and_its_place_in_the_sidebar(built, site):
    names = [
        "/".join(re.sub(r"^\d+[a-z]?_", "", part) for part in n.with_suffix(".html").parts)
        for n in built[2]
    ]
    assert set(names) <= set(site.pages)
    linked = set(urldefrag(l)[0] for l in site.pages["index.html"]["links"])
    assert {site.base + n for n in names} <= linked


def test_no_console_error_no_failed_request_no_other_host(site):
    assert not site.faults()


def test_no_raw_tex_is_left(site):
    assert not site.raw_tex()


def test_tables_are_tables(site):
    assert not site.raw_tables()


def test_mathematics_is_typeset(site):
    assert not site.bad_math()
    assert sum(p["math"] for p in site.pages.values()) > 0


def test_links_and_anchors_resolve(site):
    assert not site.links(blob)


def test_images_have_alternative_text(site):
    assert not site.images()


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_spills_over_the_page(site, width):
    assert not site.spills(width)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out(site, theme):
    assert not site.pale(theme)


def test_search_finds_the_vae(site):
    faults = []
    page = site.open("index.html", faults)
    box = page.locator("input.sidebar-search")
    box.fill("VAE")
    with page.expect_navigation():
        box.press("Enter")
    assert page.evaluate("Search.hasIndex()"), faults
    page.wait_for_function(
        "document.querySelector('#search-results p.search-summary')?.innerText.match(/found|did not match/)"
    )
    page.wait_for_load_state("networkidle")
    found = page.evaluate("[...document.querySelectorAll('#search-results li a')].map(a => a.href)")
    assert any("models/vae.html" in f for f in found), found
    assert (
        not [t for t in page.evaluate(survey)["texts"] if raw.search(t)]
        and not page.evaluate(spill)
        and not faults
    )
    page.close()


def test_dark_mode_toggles_and_is_remembered(site):
    page = site.open("index.html", [])
    brightness = lambda: (
        sum(
            map(
                int,
                re.findall(
                    r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor")
                )[:3],
            )
        )
        / 765
    )
    seen = {}
    for _ in range(3):
        page.locator("button.theme-toggle:visible").click()
        seen[page.evaluate("document.body.dataset.theme")] = brightness()
    assert set(seen) == {"auto", "light", "dark"} and seen["dark"] < 0.2 < 0.8 < seen["light"]
    while page.evaluate("document.body.dataset.theme") != "dark":
        page.locator("button.theme-toggle:visible").click()
    page.goto(site.base + "api.html")
    assert page.evaluate("document.body.dataset.theme") == "dark" and brightness() < 0.2
    page.close()


def test_api_entries_carry_their_tables_and_sources(site):
    "Somewhere an argument's name, type, default and details stand in one row, beside a link to the exported line."
    page = site.open("models/vae.html", [])
    rows = page.evaluate(
        "[...document.querySelectorAll('dl.py table tr')].map(r => [...r.cells].map(c => c.innerText.trim()))"
    )
    assert any(r[0] == "width" and "int" in r and "32" in r and len(r[-1]) > 3 for r in rows), rows
    assert any(
        re.search(r"optgen/models/vae\.py#L\d+$", l) for l in site.pages["models/vae.html"]["links"]
    )
    page.close()


# The checks above, shown to see what they look for.


@pytest.fixture(scope="session")
def faulty(tmp_path_factory, browser):
    "A site with one fault of each kind."
    nbs = tmp_path_factory.mktemp("faulty")
    cell = lambda kind, source, **more: dict(cell_type=kind, metadata={}, source=source, **more)
    png = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
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
            "<script>console.error('told you')</script>",
            '<p style="color: #999; background: #aaa">pale</p>',
            f'<a href="{blob}/nowhere.py">x</a>',
        )
    )
    figure = cell(
        "code",
        "draw()",
        execution_count=None,
        outputs=[dict(output_type="display_data", metadata={}, data={"image/png": png})],
    )
    for name, cells in dict(
        index=[cell("markdown", "# Index\n\n- [a](a.ipynb)")], a=[cell("markdown", page), figure]
    ).items():
        (nbs / f"{name}.ipynb").write_text(
            json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=4))
        )
    out = tmp_path_factory.mktemp("pages") / "faulty"
    result, reader = build(out, "--notebooks", nbs), None
    reader = Reader(browser, out)
    yield result, reader
    reader.close()


def test_the_build_refuses_what_it_can_see(faulty):
    assert faulty[0].returncode == 1
    for words in (
        "Eq. (nowhere) is cited and defined nowhere",
        "link to absent.ipynb",
        "draws a figure without",
        "gone",
    ):
        assert words in faulty[0].stderr


def test_the_browser_sees_the_rest(faulty):
    site = faulty[1]
    seen = {
        "console: told you": site.faults(),
        "another host: https://elsewhere.invalid": site.faults(),
        "failed": site.faults(),
        r"\frac": site.raw_tex(),
        "No table": site.raw_tables(),
        "undefinedmacro": site.bad_math(),
        "Missing argument": site.bad_math(),
        "#gone": site.links(blob),
        "nowhere.py is not in the repository": site.links(blob),
        "elsewhere.invalid": site.images(),
        "alt=''": site.images(),
        "wide": site.spills(400),
        "3000": site.spills(1400),
        "pale": site.pale("light"),
        ": pale": site.pale("dark"),
    }
    for word, found in seen.items():
        assert any(word in f for f in found), (word, found)
