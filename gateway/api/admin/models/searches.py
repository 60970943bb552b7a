"""What searches, and questions to whichever windows match, answer."""

from typing import Annotated

from pydantic import Field

from gateway.api.admin.models.responses import Answer, AskReceipt, ErrorInfo, Match, Moment, Number, Warnings
from gateway.windows.tree import Kind


class SearchResult(Answer):
    kind: Kind
    name: str
    title: str | None
    model: str
    state: str
    token_count: int
    created_at: Moment
    match: Match


class SearchResults(Answer):
    query: str
    results: list[SearchResult]
    all_words: Annotated[bool, Field(description="false: nothing has all of the words, these have some")]
    truncated: Annotated[bool, Field(description="there may be more")]


class AskedWindow(Answer):
    window_name: str
    title: str | None
    match: Match
    model: str
    answer: str | None
    reasoning: str | None
    finish_reason: str | None
    receipt: AskReceipt | None
    warnings: Warnings
    error: ErrorInfo | None = Field(description="in place of the answer")


class AnsweredByAny(Answer):
    question: str
    answers: list[AskedWindow] = Field(description="of the windows that were asked, the best match first")
    warnings: Warnings
    duration_ms: Number
