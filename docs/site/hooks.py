"""Files outside of docs/ as pages and pictures of the site: bench/results, the changelog and so on.

Documents link to each other as they lie in the repository, so that the links work there. On the
site the same links are turned to where these files are then.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
_DOCUMENTS = ("CHANGELOG", "CONTRIBUTING", "SECURITY")
_LINK = re.compile(r"(\]\()(?!https?:|mailto:|#)([^)#\s]+)((?:#[^)]*)?\))")


def places() -> dict[Path, str]:
    """Where on the site the files lie that do not belong to docs/, by their paths."""
    found = {ROOT / f"{name}.md": f"{name.lower()}.md" for name in _DOCUMENTS}
    found[ROOT / "examples" / "README.md"] = "examples/index.md"
    for path in sorted((ROOT / "examples").glob("*.py")):
        found[path] = f"examples/{path.name}"
    for pattern in ("*.md", "*.html", "quality/*.md", "quality/*.html", "quality/*.svg"):
        for path in sorted(RESULTS.glob(pattern)):
            found[path] = f"results/{path.relative_to(RESULTS).as_posix()}"
    return found


def on_files(files: Any, config: Any, **_: object) -> Any:
    """Add them to the files of the site."""
    for path, place in places().items():
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: object) -> str:
    """Turn links between files of the repository into links between files of the site."""
    source = Path(page.file.abs_src_path).resolve()
    docs = Path(config["docs_dir"]).resolve()
    outside = places()

    def turned(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(source.parent / match[2]))
        if target in outside:
            place = outside[target]
        elif target.is_relative_to(docs):
            place = target.relative_to(docs).as_posix()
        else:
            raise PluginError(f"{source}: {match[2]} is no file of the site.")
        start = os.path.dirname(page.file.src_uri) or "."
        return match[1] + os.path.relpath(place, start) + match[3]

    # What is in there is Markdown too, as in the repository.
    return _LINK.sub(turned, markdown).replace("<details>", '<details markdown="1">')


def on_page_content(html: str, **_: object) -> str:
    """Keep a number with its error bar and its unit in one line."""
    return re.sub(r"(?<=\d) (?=[±%])|(?<=±) (?=\d)", "\N{NO-BREAK SPACE}", html)
