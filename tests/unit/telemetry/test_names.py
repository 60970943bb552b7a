"""docs/tracing.md names every attribute that a span may have."""

import re

from gateway.telemetry import genai
from tests.support.gateway_process import ROOT


def test_docs_have_every_attribute() -> None:
    _, rest = (ROOT / "docs/tracing.md").read_text().split("<!-- attributes -->")
    listed = re.findall(r"`((?:gen_ai|cwg|http|url|server|error)\.[\w.]+)`", rest.split("<!-- /attributes -->")[0])
    names = {value for name, value in vars(genai).items() if name.isupper() and isinstance(value, str)}
    assert set(listed) - {"cwg.receipt.bytes"} == {name for name in names if "." in name}
