"""Hooks of MkDocs: pages from files outside of docs/, and links to files that the site does not have.

In the repository a page links to sources by a relative path, but the site has no sources. With `repo_url` in mkdocs.yml such
a link leads to the repository; without it the link is replaced by its text and the path.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
#: Pages of the site, by their file in the repository.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "examples/sentiment/README.md": "examples/sentiment.md",
    "examples/piqa/README.md": "examples/piqa.md",
    # Links to these files go to the page that replaces them.
    "README.md": "index.md",
    "examples/sentiment": "examples/sentiment.md",
    "examples/piqa": "examples/piqa.md",
}
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])+)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages whose files are outside of docs/."""
    for source, page in PAGES.items():
        if source.endswith(".md") and page != "index.md":
            files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The page, with links to files of the repository rewritten for the site."""
    here = page.file.src_uri
    source = next((path for path, target in PAGES.items() if target == here and here != "index.md"), f"docs/{here}")

    def rewritten(found: re.Match[str]) -> str:
        text, target = found.groups()
        path, _, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return found.group()
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        on_site = PAGES.get(wanted) or (wanted[len("docs/") :] if wanted.startswith("docs/") else None)
        if on_site and files.get_file_from_path(on_site):
            return f"[{text}]({posixpath.relpath(on_site, posixpath.dirname(here))}{'#' + anchor if anchor else ''})"
        if not (ROOT / wanted).exists():
            return found.group()  # MkDocs warns, and the strict build fails
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/HEAD/{wanted})"
        return f"`{wanted}`" if text.strip("`").rstrip("/") in wanted else f"{text} (`{wanted}`)"

    # In tables GitHub requires | to be escaped within code too; the site would show the escape.
    tables = re.sub(
        r"(?m)^\|.*$", lambda row: re.sub(r"`[^`]*`", lambda code: code[0].replace(r"\|", "|"), row[0]), markdown
    )
    return LINK.sub(rewritten, tables)
