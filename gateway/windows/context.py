"""The parts of a running gateway, as the verbs and the doors need them. `gateway.app` makes and opens them."""

from dataclasses import dataclass, field

from gateway.engines.pool import Engines
from gateway.kv.lmcache import LMCache
from gateway.kv.pins import Pins
from gateway.metrics import Telemetry
from gateway.runtime.offload import Offload
from gateway.runtime.stalls import Stalls
from gateway.sessions.recorder import Turns
from gateway.sessions.resolver import SaltRule, Sessions
from gateway.sessions.salt_notes import SaltNotes
from gateway.sessions.token_estimator import Estimator
from gateway.settings import Settings
from gateway.store.types import Store
from gateway.windows.background import Chores


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that is open while the gateway runs. `cache` is None where no cache is configured."""

    settings: Settings
    store: Store
    engines: Engines
    cache: LMCache | None
    pins: Pins
    salts: SaltRule
    sessions: Sessions
    turns: Turns
    salt_notes: SaltNotes
    chores: Chores
    telemetry: Telemetry
    estimator: Estimator
    stalls: Stalls
    offload: Offload = field(default_factory=Offload)
