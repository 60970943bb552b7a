"""The services of a running gateway, as operations and APIs need them. `gateway.app` creates and opens them."""

from dataclasses import dataclass, field

from gateway.engines.pool import EnginePool
from gateway.kv.lmcache import LMCache
from gateway.kv.pins import Pins
from gateway.metrics import Metrics
from gateway.runtime.offload import Offload
from gateway.runtime.stalls import Stalls
from gateway.sessions.active_turns import ActiveTurns
from gateway.sessions.recorder import TurnRecorder
from gateway.sessions.resolver import SaltRule, SessionResolver
from gateway.sessions.salt_notes import SaltNotes
from gateway.sessions.token_estimator import Estimator
from gateway.settings import Settings
from gateway.store.store import Store
from gateway.windows.background import BackgroundTasks


@dataclass(frozen=True, slots=True)
class Services:
    """Everything that is open while the gateway runs. `cache` is None where no cache is configured."""

    settings: Settings
    store: Store
    engines: EnginePool
    cache: LMCache | None
    pins: Pins
    salts: SaltRule
    turns: ActiveTurns
    sessions: SessionResolver
    recorder: TurnRecorder
    salt_notes: SaltNotes
    background: BackgroundTasks
    metrics: Metrics
    estimator: Estimator
    stalls: Stalls
    offload: Offload = field(default_factory=Offload)
