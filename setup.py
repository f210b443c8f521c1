"""What a package index shows: the README, whose links to files are absolute once the repository has an address."""

import re
from pathlib import Path

from setuptools import setup

REPOSITORY = ""  # its address, such as "https://github.com/OWNER/hf_schatten"

PICTURE = re.compile(r"!\[([^]]*)\]\((?!https:)([^)]*)\)\n\n(\*.*\*\n\n)?")  # with the line below it
LINK = re.compile(r"(?<!!)\[([^]]*)\]\((?!https:)([^)#]*)(#[^)]*)?\)")


def as_text(link: re.Match[str]) -> str:
    """Return the words of a link, and the file in the source distribution where they do not name it."""
    words, path, _ = link.groups()
    return words if path in ("", words) else f"{words} ({path})"


readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
if REPOSITORY:
    readme = PICTURE.sub(rf"![\1]({REPOSITORY}/raw/main/\2)\n\n\3", readme)
    readme = LINK.sub(rf"[\1]({REPOSITORY}/blob/main/\2\3)", readme.replace("](#", "](README.md#"))
else:
    readme = LINK.sub(as_text, PICTURE.sub("", readme))

setup(
    long_description=readme,
    long_description_content_type="text/markdown",
    project_urls={"Repository": REPOSITORY, "Documentation": f"{REPOSITORY}#documentation"} if REPOSITORY else {},
)
