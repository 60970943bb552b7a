"""LMCache's connector for vLLM, made safe for clients that disconnect while their KV is being loaded.

vLLM imports this by name (`--kv-transfer-config`, `kv_connector_module_path`), in its own processes. Nothing of the
gateway is imported with it but `gateway.stack.transfers` and `gateway.stack.seeds`, so it needs none of the gateway's
dependencies.

What it fixes, if a request is aborted during its load: EngineCore dies of `assert req_id in self.requests`, and the
request's blocks are given to others while the LMCache server still writes to them. Upstream: vllm#43226, vllm#46240,
LMCache#4185 and LMCache#4938. vllm#48821 removes the assertion and leaves the writing; vllm#56089 counts loads and
stores in the scheduler before it frees, and LMCache#4939 reports one end per request. None was released when this was
written. Here it is done in between: the connector sees every completion before the scheduler does
(`update_connector_output`), and passes on the one that ends the request.

A request that is aborted earlier, between look-up and load, leaves what LMCache has found for it locked in its memory
for `--l1-read-ttl-seconds` (300): the locks belong to whoever reads the result of the look-up, and nobody does. A few
dozen such requests fill the memory, and nothing can be loaded for minutes. So these look-ups are read to their end.
"""

from importlib.metadata import version
from typing import Any

import vllm
from lmcache.integration.vllm.lmcache_mp_connector import LMCacheMPConnector
from lmcache.integration.vllm.lmcache_mp_metadata import LMCacheMPRequestState
from lmcache.integration.vllm.lmcache_mp_metrics import LMCacheMPPromMetrics
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.logger import init_logger
from vllm.platforms import current_platform

from gateway.stack import seeds
from gateway.stack.transfers import CHECKED, Transfers

METRIC = "vllm:lmcache_mp_abort_safe"  # with the prefix `vllm:`, vLLM clears it when it restarts within one process

logger = init_logger(f"vllm.{__name__}")  # vLLM shows only what is logged under its own name


def installed() -> dict[str, str]:
    """The versions in this environment; those of vLLM's CPU build have a suffix."""
    return {"vllm": vllm.__version__.partition("+")[0], "lmcache": version("lmcache")}


class AbortSafeLMCacheConnector(LMCacheMPConnector):  # type: ignore[misc]
    """`LMCacheMPConnector` that tells the scheduler of a request's end once, when nothing writes to its blocks.

    With versions other than `CHECKED` it is `LMCacheMPConnector` as it is, and says so in the log.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._transfers: Transfers | None = None
        self._unread: dict[str, Any] = {}  # trackers of aborted requests, by id, whose look-ups nobody has read
        found = installed()
        if role != KVConnectorRole.SCHEDULER:
            if found == CHECKED and current_platform.is_cpu():
                seeds.make_safe()
            return
        if found == CHECKED:
            self._transfers = Transfers()
            logger.info(
                "Aborting a request during its KV load is safe: patched for vLLM %(vllm)s, LMCache %(lmcache)s", found
            )
        else:
            logger.warning(
                "The patch for requests aborted during their KV load was checked with %s and is off with %s: a client "
                "that leaves may crash the engine, unless these versions have their own (vllm#46240, LMCache#4938)",
                CHECKED,
                found,
            )

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        """See the base class, called in every step; notes the loads that go to the workers with this one."""
        self._release_unread()
        metadata = super().build_connector_meta(scheduler_output)
        if self._transfers is not None:
            for request in metadata.requests:
                if request.direction == "RETRIEVE":
                    self._transfers.load_submitted(request.request_id)
        return metadata

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """See the base class; vLLM calls this for aborted requests as well."""
        request_id = request.request_id
        tracker = self.request_trackers.get(request_id)
        if self._transfers and tracker and not self.lazy_offload and _is_looked_up(tracker):
            self._cleanup_request_tracker(request_id)
            self._unread[request_id] = tracker
            delays_free, params = self._can_store, None
        else:
            delays_free, params = super().request_finished(request, block_ids)
        if self._transfers:
            self._transfers.finished(request_id, delays_free=delays_free)
        return delays_free, params

    def has_pending_push_work(self) -> bool:
        """See the base class: whether the engine has to keep stepping without requests."""
        return bool(self._unread) or bool(super().has_pending_push_work())

    def _release_unread(self) -> None:
        """Read the look-ups that have a result by now, unlock what they found, and end their sessions."""
        adapter = self.scheduler_adapter
        for request_id, tracker in list(self._unread.items()):
            found = adapter.check_lookup_result(request_id)
            if found is None:
                continue
            if found:
                adapter.free_lookup_locks(
                    tracker.get_token_ids(),
                    start=0,
                    end=found,
                    request_id=request_id,
                    cache_salt=tracker.cache_salt,
                    request_configs=tracker.request_configs,
                )
            adapter.cleanup_lookup_result(request_id)
            adapter.end_session(request_id)
            del self._unread[request_id]

    def update_connector_output(self, connector_output: Any) -> None:
        """See the base class; the scheduler reads `connector_output` afterwards, without what it must not see."""
        super().update_connector_output(connector_output)
        if self._transfers is not None:
            connector_output.finished_recving = self._transfers.loads_done(connector_output.finished_recving or ())
            connector_output.finished_sending = self._transfers.stores_done(connector_output.finished_sending or ())

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> Any:
        return _Metrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def _is_looked_up(tracker: Any) -> bool:
    """Whether a look-up was begun for a request, and neither a load nor a computation has followed."""
    begun = tracker.lookup_started_at is not None or tracker.num_lmcache_hit_tokens > 0
    return bool(begun and tracker.state == LMCacheMPRequestState.PREFETCHING)


class _Metrics(LMCacheMPPromMetrics):  # type: ignore[misc]
    """LMCache's metrics, and one that tells a gateway that this engine has the patch."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        gauge = self._gauge_cls(
            name=METRIC,
            documentation="1: a client may disconnect while its KV is being loaded; 0: that may end the engine.",
            multiprocess_mode="mostrecent",
            labelnames=labelnames,
        )
        for labelvalues in per_engine_labelvalues.values():
            gauge.labels(*labelvalues).set(installed() == CHECKED)
