"""Makes README's relative links absolute, which PyPI needs: absolute_links.py REPOSITORY REF.

The release workflow runs it just before it builds, with the address of the repository that it runs
in, so no address is written down anywhere.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def absolute(text: str, repository: str, ref: str) -> str:
    """Pictures lead to the file itself, links to its page."""

    def replaced(link: re.Match[str]) -> str:
        kind = "raw" if link[1] else "blob"
        return f"{link[1]}[{link[2]}]({repository}/{kind}/{ref}/{link[3]})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)]+)\)", replaced, text)


if __name__ == "__main__":
    README.write_text(absolute(README.read_text(), *sys.argv[1:]))
