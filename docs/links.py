"""Where links of the markdown files lead outside of the repository: on the site, on an index.

The build of the package calls `dynamic_metadata` for its description; conf.py uses the rest.
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LINK = re.compile(r"(?<=\]\()[^)\s#]+")


def online(path):
    """The address of a file or folder of the repository; of a picture, that of its bytes."""
    kind = "raw" if path.suffix == ".png" else "blob"
    return f"{PROJECT['urls']['Homepage']}/{kind}/main/{path.relative_to(ROOT).as_posix()}"


def relinked(text, folder, address=online):
    """Markdown of a folder whose links to files are replaced by addresses of the files."""

    def replace(link):
        path = (folder / link[0]).resolve()
        return address(path) if path.exists() else link[0]

    return LINK.sub(replace, text)


def dynamic_metadata(_settings, _project):
    """The README for package indexes, which hold no other file of the repository."""
    text = relinked((ROOT / "README.md").read_text(encoding="utf-8"), ROOT)
    return {"readme": {"content-type": "text/markdown", "text": text}}
