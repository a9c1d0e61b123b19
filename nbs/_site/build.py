"""Build the documentation site from the executed, committed notebooks; no notebook is run.

python nbs/_site/build.py

The site is in _docs/: open _docs/index.html, or serve it by python -m http.server -d _docs.
"""

import argparse
import gc
import shutil
import sys
from configparser import ConfigParser, SectionProxy
from pathlib import Path
from tempfile import TemporaryDirectory

here = Path(__file__).resolve().parent
repo = here.parent.parent
sys.path.insert(0, str(here))
from pages import Site


def settings() -> SectionProxy:
    """Return the project's facts from settings.ini."""
    config = ConfigParser(delimiters=["="])
    config.read(repo / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def parse_arguments() -> argparse.Namespace:
    """Return the folders of the notebooks and of the site."""
    config = settings()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    folders = (
        ("--notebooks", "nbs_path", "folder of notebooks (default: %(default)s)"),
        ("--out", "doc_path", "folder of the site (default: %(default)s)"),
    )
    for option, key, text in folders:
        parser.add_argument(option, type=Path, default=repo / config[key], help=text)
    return parser.parse_args()


def run_sphinx(source: Path, built: Path, doctrees: Path) -> bool:
    """Build HTML, every warning an error.

    Args:
        source: folder that `Site.write` has filled.
        built: folder of the HTML.
        doctrees: folder for what Sphinx keeps between its two phases.

    Returns:
        Whether the build failed.
    """
    from sphinx.cmd.build import main as sphinx

    options = ["-q", "-W", "--keep-going", "-c", str(here), "-d", str(doctrees)]
    extra = f"html_extra_path={source / '_extra'}"
    return bool(sphinx([*options, "-D", extra, str(source), str(built)]))


def main() -> int:
    """Build the site, print what is wrong, and return the exit status."""
    config, arguments = settings(), parse_arguments()
    gc.set_threshold(500_000, 20, 100)  # the trees of the pages are many objects, and stay
    notebooks = arguments.notebooks.resolve()
    site = Site(notebooks, config["lib_name"], config["git_url"], config["branch"], repo)
    with TemporaryDirectory() as work:
        source, built = Path(work) / "source", Path(work) / "html"
        site.write(source)
        failed = run_sphinx(source, built, Path(work) / "doctrees")
        shutil.rmtree(arguments.out, ignore_errors=True)
        unwanted = shutil.ignore_patterns(".buildinfo*", "_sources")
        shutil.copytree(built, arguments.out, ignore=unwanted)
    for problem in site.problems:
        print(problem, file=sys.stderr)
    if failed or site.problems:
        return 1
    print(f"{len(site.pages)} notebooks -> {arguments.out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
