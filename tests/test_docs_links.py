"""README and docs: each link has a target, and the site has all pages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

import dpo_kernels

from docs_pages import PAGES, ROOT, name_of, prose

LINK = re.compile(
    r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)|<(https?://[^>]+)>|(?:src|srcset|href)=\"([^\"]+)\""
)
LINKED = [*PAGES, ROOT / "CHANGELOG.md"]


def links(page: Path) -> list[tuple[int, str]]:
    """(line, target) of every link and picture outside of code."""
    return [
        (number, next(filter(None, found)))
        for number, line in prose(page)
        for found in LINK.findall(re.sub(r"`[^`]*`(?!\])", "", line))
    ]


def anchors(page: Path) -> set[str]:
    """The valid anchors of a page: its headings, as GitHub and MkDocs convert them, and ids written in the page."""
    found = set()
    for _, line in prose(page):
        if heading := re.match(r"#{1,6} (.*?)(?: \{#([\w-]+)\})?$", line):
            text, given = heading.groups()
            found.add(given or re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-"))
        found.update(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", line))
    return found


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for number, target in links(page):
        if re.match(r"[a-z]+:", target):
            address = urlsplit(target)
            if address.scheme != "https" or not re.fullmatch(r"[\w-]+(\.[\w-]+)+", address.netloc):
                broken.append(f"{number}: {target} is no address")
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        if not place.exists() or not place.is_relative_to(ROOT):
            broken.append(f"{number}: {target} is not in the repository")
        elif anchor and (place.suffix != ".md" or anchor not in anchors(place)):
            broken.append(f"{number}: {target} names no heading")
    assert broken == []


def test_links_of_the_notebook_lead_somewhere() -> None:
    notebook = ROOT / "examples" / "dpo_in_ten_minutes.ipynb"
    cells = [
        cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "markdown"
    ]
    targets = [target for cell in cells for target, *_ in LINK.findall("".join(cell["source"]))]
    assert targets
    assert [target for target in targets if not (notebook.parent / target).exists()] == []


def test_the_check_of_links_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    monkeypatch.setattr("docs_pages.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "# A title: here\n\n[a](#a-title-here) `[no](link)` ```[no](link)``` [`b`](https://example.org/x)\n"
    )
    test_links_lead_somewhere(page)
    for link in ("[a](#a-title)", "[a](gone.md)", "![a](gone.svg)", "[a](http://example.org)", "[`b`](gone.py)"):
        page.write_text(f"# A title: here\n\n{link}\n")
        with pytest.raises(AssertionError):
            test_links_lead_somewhere(page)


def nav() -> set[str]:
    """The pages in the site's navigation."""

    def leaves(item: object) -> list[str]:
        if isinstance(item, dict):
            return [leaf for value in item.values() for leaf in leaves(value)]
        return [leaf for value in item for leaf in leaves(value)] if isinstance(item, list) else [str(item)]

    return set(leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))


def test_every_page_is_in_the_navigation() -> None:
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert {page for page in pages if not page.startswith("reports/")} <= nav()


def test_the_reference_has_every_public_name() -> None:
    import dpo_trainer

    for package in (dpo_kernels, dpo_trainer):
        page = (ROOT / "docs" / "api" / f"{package.__name__}.md").read_text(encoding="utf-8")
        described = {name.rpartition(".")[2] for name in re.findall(r"^::: ([\w.]+)", page, re.MULTILINE)}
        assert set(package.__all__) - {"__version__"} <= described


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == dpo_kernels.__version__
    assert f"{{{dpo_kernels.__version__}}}" in (ROOT / "docs" / "cite.md").read_text(encoding="utf-8")
