"""Build the documentation site from the executed, committed notebooks; no notebook is run.

python nbs/_site/build.py            # to _docs/; open _docs/index.html, or serve it: python -m http.server -d _docs
"""

import argparse
import shutil
import sys
from configparser import ConfigParser
from pathlib import Path
from tempfile import TemporaryDirectory

here = Path(__file__).resolve().parent
repo = here.parent.parent
sys.path.insert(0, str(here))
from pages import Site


def settings():
    cfg = ConfigParser(delimiters=["="])
    cfg.read(repo / "settings.ini", encoding="utf-8")
    return cfg["DEFAULT"]


def main():
    cfg = settings()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--notebooks",
        type=Path,
        default=repo / cfg["nbs_path"],
        help="folder of notebooks (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=repo / cfg["doc_path"],
        help="folder of the site (default: %(default)s)",
    )
    args = parser.parse_args()
    from sphinx.cmd.build import main as sphinx

    site = Site(args.notebooks.resolve(), cfg["lib_name"], cfg["git_url"], cfg["branch"], repo)
    with TemporaryDirectory() as work:
        source, built = Path(work) / "source", Path(work) / "html"
        site.write(source)
        failed = sphinx(
            [
                "-q",
                "-W",
                "--keep-going",
                "-c",
                str(here),
                "-D",
                f"html_extra_path={source / '_extra'}",
                "-d",
                f"{work}/doctrees",
                str(source),
                str(built),
            ]
        )
        shutil.rmtree(args.out, ignore_errors=True)
        shutil.copytree(built, args.out, ignore=shutil.ignore_patterns(".buildinfo*", "_sources"))
    for problem in site.problems:
        print(f"{problem}", file=sys.stderr)
    if not (failed or site.problems):
        print(f"{len(site.pages)} notebooks -> {args.out / 'index.html'}")
    return bool(failed or site.problems)


if __name__ == "__main__":
    sys.exit(main())
