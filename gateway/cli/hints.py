"""Hints of the admin API in the words of `cwg`: its commands and options."""

from types import MappingProxyType

from gateway.errors import HintWords

WORDS = HintWords(
    names=MappingProxyType(
        {
            "GET /admin/sessions": "`cwg sessions`",
            "GET /admin/windows": "`cwg list`",
            "GET /admin/windows/{}/messages": "`cwg messages NAME`",
            "PATCH /admin/windows/{}": "`cwg describe NAME --ttl SECONDS`",
            "as_text=true": "--as-text",
            "description": "--description",
            "max_tokens": "--max-tokens",
            "new_session_id": "--session",
            "prefix": "--prefix",
            "null": "an empty description, --no-tags or --no-ttl",
            "tags": "--tag",
            "ttl_seconds": "--ttl",
        }
    ),
    by_code=MappingProxyType({"unauthorized": "set CWG_API_KEY to the gateway's key"}),
)
