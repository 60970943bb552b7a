"""What recording a batch of turns adds to many tables: collected for all of them, and written with a statement each.

On a server a statement costs a round trip, whatever it adds. What the turns have let go of is released at the end, when
all that they refer to is there.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from gateway.store.database import Db

_CONTENTS = "INSERT INTO contents VALUES (?, ?) ON CONFLICT DO NOTHING"
_LINKS = "INSERT INTO links VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING"


@dataclass(slots=True)
class Batch:
    """Rows by statement, in the order in which the statements were first used; contents and links come before them."""

    text_bytes: int = 0
    _contents: dict[bytes, bytes] = field(default_factory=dict)
    _links: dict[bytes, tuple[bytes, bytes | None, bytes, int]] = field(default_factory=dict)
    _rows: dict[str, list[Sequence[object]]] = field(default_factory=dict)
    _transcripts: list[bytes | None] = field(default_factory=list)
    _released_contents: list[bytes | None] = field(default_factory=list)

    def add(self, statement: str, rows: Iterable[Sequence[object]]) -> None:
        """Run a statement for these rows later."""
        if new := list(rows):
            self._rows.setdefault(statement, []).extend(new)

    def add_content(self, content_id: bytes, body: bytes) -> None:
        """Add a content later."""
        self._contents[content_id] = body
        self.text_bytes += len(body)

    def add_link(self, link: bytes, parent: bytes | None, content_id: bytes, depth: int) -> None:
        """Add a link of a transcript later."""
        self._links[link] = link, parent, content_id, depth

    def release(self, transcript: bytes | None) -> None:
        """Delete a transcript at the end, up to what something else refers to."""
        self._transcripts.append(transcript)

    def release_content(self, content_id: bytes | None) -> None:
        """Delete a content at the end, unless something refers to it."""
        self._released_contents.append(content_id)

    async def write(self, db: Db) -> None:
        """Write all that was collected."""
        await self.write_texts(db)
        for statement, rows in self._rows.items():
            await db.many(statement, rows)
        self._rows = {}

    async def write_texts(self, db: Db) -> None:
        """Write only the contents and links."""
        await db.many(_CONTENTS, self._contents.items())
        await db.many(_LINKS, self._links.values())
        self._contents, self._links, self.text_bytes = {}, {}, 0

    def has_link(self, link: bytes) -> bool:
        """Whether a link is among what is added later."""
        return link in self._links

    def released(self) -> tuple[list[bytes | None], list[bytes | None]]:
        """The transcripts and the contents that were let go of."""
        return self._transcripts, self._released_contents
