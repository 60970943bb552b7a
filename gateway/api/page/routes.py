"""Serve the page: its files, which hold nothing of anybody and need no key, and the plain list."""

from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from gateway.api.page import plain
from gateway.api.page.files import HEADERS, File, load

_INDEX = "index.html"


class Files:
    """Answers for the page's files. A browser keeps them, and asks each time whether they have changed."""

    def __init__(self, files: Mapping[str, File]) -> None:
        self._files = files

    async def index(self, request: Request) -> Response:
        """Serve the page itself."""
        return _answer(request, self._files[_INDEX])

    async def file(self, request: Request) -> Response:
        """Serve one of its files. Raises HTTPException for a path that is none."""
        file = self._files.get(request.path_params["path"])
        if file is None:
            raise HTTPException(404)
        return _answer(request, file)


def _answer(request: Request, file: File) -> Response:
    headers = {**HEADERS, "etag": file.etag, "cache-control": "no-cache"}
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if file.etag in known:
        return Response(status_code=304, headers=headers)
    return Response(file.body, headers={**headers, "content-type": file.content_type})


def routes() -> list[BaseRoute]:
    """The routes of the page; its files are read now."""
    files = Files(load())
    return [Route("/", files.index), Route("/ui/plain", plain.show), Route("/ui/{path:path}", files.file)]
