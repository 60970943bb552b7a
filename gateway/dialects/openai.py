"""What OpenAI's APIs share."""

import orjson

from gateway.errors import GatewayError


def error_body(error: GatewayError) -> bytes:
    """Render an error in OpenAI's shape; `param` is the field that is wrong."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    shown = {"message": sentence(error), "type": kind, "param": error.details.get("field"), "code": error.code}
    return orjson.dumps({"error": shown})


def sentence(error: GatewayError) -> str:
    """What is wrong, and what to do about it."""
    return f"{error.message} ({error.hint})" if error.hint else error.message
