"""The project's page on an index: README.md without its links to other files. Everything else is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup


def index_page(readme: str) -> str:
    """Links to files become their text: an index does not hold these files."""
    return re.sub(r"\[([^\]]*)\]\((?!https?:|#)[^)]*\)", r"\1", readme)


setup(
    long_description=index_page(Path(__file__).with_name("README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
