"""The README and docs/: links lead to files that exist, and to headings that they have; settings files are valid."""

import re
from pathlib import Path

import pytest

from gateway.settings import load
from tests.support.gateway_process import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", _prose(page))
    assert [link for link in links if not _leads_somewhere(page, link)] == []


def test_heading_anchors_are_those_of_github(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# The `/v1` API\n\n## What's new, and why?\n\n```sh\n# no heading\n```\n\n## The `/v1` API\n")
    assert _anchors(page) == {"the-v1-api", "whats-new-and-why", "the-v1-api-1"}


def test_no_page_installs_a_package_that_no_index_has() -> None:
    """The gateway itself is installed from a clone."""
    wrong = re.compile(r"pip install\b.*\bcontext-window-gateway\b(?!.*\.git)")
    assert [str(page) for page in PAGES if wrong.search(page.read_text())] == []


def test_settings_files_of_the_docs_are_valid(tmp_path: Path) -> None:
    file = tmp_path / "gateway.toml"
    blocks = re.findall(r"^```toml\n(.*?)^```", (ROOT / "docs/own-vllm.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) > 1
    for block in blocks:
        file.write_text(re.sub(r"^# (?=\w+ = )", "", block, flags=re.MULTILINE))  # with what is commented out
        load(file=file, environment={})


def test_the_sizes_of_the_table_are_those_of_the_formula() -> None:
    """Keys and values, two bytes each."""
    rows = re.findall(r"^\| [^|]+ ((?:\| [\d.]+ ){4}.*)\|$", (ROOT / "docs/sizing.md").read_text(), re.MULTILINE)
    assert len(rows) > 5
    for row in rows:
        layers, heads, size, kib, *filled = (float(cell.replace("GiB", "")) for cell in row.strip("| ").split("|"))
        per_token = 2 * layers * heads * size * 2
        assert kib == per_token / 2**10
        assert filled == [round(per_token * tokens / 2**30, 1) for tokens in (8_192, 32_768, 131_072)]


def _leads_somewhere(page: Path, link: str) -> bool:
    file, _, anchor = link.partition("#")
    target = page.parent / file if file else page
    return target.exists() and (not anchor or anchor in _anchors(target))


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    anchors: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", _prose(page), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        number = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", known) is not None for known in anchors)
        anchors.add(f"{slug}-{number}" if number else slug)
    return anchors


def _prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
