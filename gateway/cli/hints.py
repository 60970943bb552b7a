"""Hints of the admin API in the words of `cwg`: its commands and options."""

from types import MappingProxyType

from gateway.errors import CODES, HintWords

WORDS = HintWords(
    names=MappingProxyType(
        {
            "GET /admin/cache": "`cwg cache`",
            "GET /admin/health": "`cwg health`",
            "GET /admin/sessions": "`cwg sessions`",
            "GET /admin/windows": "`cwg list`",
            "GET /admin/windows/{}/messages": "`cwg messages NAME`",
            "PATCH /admin/windows/{}": "`cwg describe NAME --ttl SECONDS`",
            "as_text": "--as-text",
            "at_turn": "--at-turn",
            "as_text=true": "--as-text",
            "description": "--description",
            "into_session": "--into",
            "keep_as": "--keep-as",
            "max_tokens": "--max-tokens",
            "messages": "`cwg messages NAME`",
            "new_session_id": "--session",
            "prefix": "--prefix",
            "null": "an empty description, --no-tags or --no-ttl",
            "tags": "--tag",
            "ttl_seconds": "--ttl",
            "verify": "`cwg verify NAME`",
        }
    ),
    by_code=MappingProxyType(
        {
            "unauthorized": "set CWG_API_KEY to the gateway's key",
            "forbidden": "use the gateway's IP address or localhost in CWG_URL, or start the gateway with api_key",
            "not_found": "names have no slash; else, is CWG_URL the address of a gateway of this version?",
            "method_not_allowed": "is the gateway of this version?",
            "window_already_exists": "choose another name, or delete that window with `cwg delete`",
        }
    ),
)
_SELF_EXPLANATORY = ("invalid_request", "unknown_parameter")  # what their remedy says, the message does already


def translate_hint(code: str, hint: str) -> str:
    """The hint of an error in the words of `cwg`; for an error without one, the remedy for its code."""
    if not hint and code in CODES and code not in _SELF_EXPLANATORY:
        remedy = CODES[code].remedy
        hint = remedy[0].lower() + remedy[1:]
    return WORDS.translate(code, hint)
