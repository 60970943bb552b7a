"""Track a request's KV transfers, so that the scheduler is notified of its end exactly once."""

from collections.abc import Iterable, Mapping

CHECKED: Mapping[str, str] = {"vllm": "0.32.0", "lmcache": "0.5.6"}
"""The versions this was read for and tested with: it relies on how each of them behaves."""


class Transfers:
    """The requests whose KV is being loaded, and the finished ones whose blocks vLLM has not freed yet.

    vLLM 0.32 frees the blocks of a finished request at the first completion that is reported, whatever else is in
    progress, and its engine dies of the second (`Scheduler._update_from_kv_xfer_finished`). LMCache 0.5.6 reports two
    for a request that was aborted during its load: `finished_sending` in the next step, though nothing was ever stored,
    and `finished_recving` when the load is over; until then the LMCache server writes to those blocks.

    So of these two, only the end of the load is passed on. A store cannot be in progress as well: it reads the blocks
    of a running request, and one that waits for its load does not run.
    """

    def __init__(self) -> None:
        self._loading: set[str] = set()
        self._unfreed: set[str] = set()  # finished; the scheduler keeps their blocks until a completion is reported

    def load_submitted(self, request_id: str) -> None:
        """The workers are given a load in this step."""
        self._loading.add(request_id)

    def finished(self, request_id: str, *, delays_free: bool) -> None:
        """A request has finished or was aborted; `delays_free` tells whether the connector asked to keep its blocks."""
        if delays_free or request_id in self._loading:
            self._unfreed.add(request_id)

    def loads_done(self, reported: Iterable[str]) -> set[str]:
        """Return those of the reported loads that the scheduler is to be notified of; the others are unknown to it."""
        done = self._loading.intersection(reported)
        self._loading -= done
        self._unfreed -= done
        return done

    def stores_done(self, reported: Iterable[str]) -> set[str]:
        """Return those of the reported stores after which blocks may be freed. Call `loads_done` first."""
        done = self._unfreed.intersection(reported) - self._loading
        self._unfreed -= done
        return done
