"""Packaging read from settings.ini, the one place where the project's facts are written."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]


def minor_version(version: str) -> int:
    """Return 11 for "3.11"."""
    return int(version.split(".")[1])


versions = range(minor_version(cfg["min_python"]), minor_version(cfg["max_python"]) + 1)

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=cfg["keywords"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        *(f"Programming Language :: Python :: 3.{version}" for version in versions),
    ],
    packages=find_packages(include=["optgen", "optgen.*"]),
    package_data={"optgen": ["assets/*"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={
        "dev": cfg["dev_requirements"].split(),
        **{name: cfg[f"{name}_requirements"].split() for name in cfg["extras"].split()},
    },
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}=optgen._modidx:d"],
    },
    zip_safe=False,
)
