"""The parts of a running gateway, as the verbs and the doors need them. `gateway.app` makes and opens them."""

from dataclasses import dataclass, field

from gateway.chores import Chores
from gateway.engines import Engines
from gateway.kv.lmcache import LMCache
from gateway.kv.pins import Pins
from gateway.offload import Offload
from gateway.salt_notes import SaltNotes
from gateway.sessions import SaltRule, Sessions
from gateway.settings import Settings
from gateway.stalls import Stalls
from gateway.store.contract import Store
from gateway.telemetry import Telemetry
from gateway.tokens import Estimator
from gateway.turns import Turns


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
