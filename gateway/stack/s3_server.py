"""An S3 server for trying the S3 tier: moto's, with two buckets, in memory. It checks no signature and keeps nothing.

Run as `python -m gateway.stack.s3_server PORT BUCKET PINS_BUCKET`.
"""

import sys
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import unquote_to_bytes

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import BaseWSGIServer, make_server
from werkzeug.test import Client

ADDRESS = "127.0.0.1"
NAME = "localhost"

Environment = dict[str, Any]
Application = Callable[[Environment, Callable[..., Any]], Iterable[bytes]]


class _Handler(MotoRequestHandler):  # type: ignore[misc] # untyped
    def make_environ(self) -> Environment:
        # Python's server drops one of two slashes in front, which an object of a model's directory has.
        return {**super().make_environ(), "REQUEST_URI": self.requestline.split(" ")[1]}


def with_bucket_of_address(app: Application, bucket: str) -> Application:
    """Give a request to the address itself the path of a bucket; one to its name has a bucket in its path.

    LMCache has the bucket in the host of a URL only (lmcache 0.5.6, `l2_adapters/s3_l2_adapter.py`), and a name such as
    BUCKET.localhost resolves nowhere.
    """

    def call(environ: Environment, start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ.get("HTTP_HOST", "").partition(":")[0] == ADDRESS:
            uri = f"/{bucket}{environ['REQUEST_URI']}"
            path = unquote_to_bytes(uri.partition("?")[0]).decode("latin-1")
            environ.update(PATH_INFO=path, RAW_URI=uri, REQUEST_URI=uri)
        return app(environ, start_response)

    return call


def server(port: int, bucket: str, *more: str) -> BaseWSGIServer:
    """A server with these buckets, the first one at its address; 0 takes a free port."""
    app = with_bucket_of_address(DomainDispatcherApplication(create_backend_app), bucket)
    for name in (bucket, *more):
        made = Client(app).put(f"/{name}", base_url=f"http://{NAME}")
        if made.status_code != 200:
            raise RuntimeError(f"bucket {name} could not be made: {made.text}")
    return make_server(ADDRESS, port, app, threaded=True, request_handler=_Handler)


if __name__ == "__main__":
    server(int(sys.argv[1]), *sys.argv[2:]).serve_forever()
