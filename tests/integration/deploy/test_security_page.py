"""SECURITY.md, which forges show to whoever wants to report a vulnerability."""

import re

from tests.support.gateway_process import ROOT


def test_s80_it_says_how_to_report_and_its_links_lead_somewhere() -> None:
    page = (ROOT / "SECURITY.md").read_text()
    assert "report it privately" in page
    links = re.findall(r"\]\(([^)#]+)", page)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
