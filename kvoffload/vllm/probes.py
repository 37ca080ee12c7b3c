"""Reads from the SSD that no request waits for: whether the drive is as slow as it was. Scheduler side."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvoffload.estimates import Loading, Probe
from kvoffload.manager import BlockManager
from kvoffload.types import BlockKey, ProbeRead, Tier
from kvoffload.vllm.decisions import Decisions

PROBE_BLOCKS_MAX = 1024  # that workers hand to the engine at once, so that its time is that of the drive


@dataclass
class InFlight:
    probe: ProbeRead
    loading: Loading
    ranks: int  # that are still to end it
    seconds: float = 0.0  # of the slowest rank that has


class Probes:
    """`group_of`: a key's KV-cache group, as workers number them."""

    def __init__(self, core: BlockManager, decisions: Decisions, ranks: int, group_of: Callable[[BlockKey], int]):
        self._core, self._decisions, self._ranks, self._group_of = core, decisions, ranks, group_of
        self._planned: list[ProbeRead] = []
        self._in_flight: dict[int, InFlight] = {}  # by transfer

    def begin(self, transfer: int, wanted: Probe, found: Sequence[tuple[int, Tier, BlockKey]]) -> None:
        """Has the blocks of `found` (where each ends, and lies) read whose tokens are in the stretch, the first at least."""
        end = next(position for position, _, _ in found if position >= wanted.end)
        keys = [key for position, tier, key in found if tier is Tier.SSD and wanted.begin < position <= end]
        places = self._core.read_for_time(keys[:PROBE_BLOCKS_MAX], self._owner(transfer))
        if not places:
            self._decisions.end_probe(None, 0.0, ())
            return
        probe = ProbeRead(
            transfer,
            keys=tuple(place.key for place in places),
            groups=tuple(self._group_of(place.key) for place in places),
            generations=tuple(place.generation for place in places),
            ssd_slots=tuple(place.ssd_slot for place in places),
            patience_s=wanted.patience_s,
        )
        self._planned.append(probe)
        self._in_flight[transfer] = InFlight(probe, self._decisions.begin_probe(len(places)), self._ranks)

    def take_plan(self) -> tuple[ProbeRead, ...]:
        planned, self._planned = tuple(self._planned), []
        return planned

    def take_in(self, ended: Mapping[int, tuple[int, float]], failed: dict[int, dict[BlockKey, int]]) -> None:
        """`ended`: by transfer, how many ranks ended it since the last call, and how long the slowest took. `failed`: blocks of
        any transfer that failed on some rank; those of probes that end are taken out."""
        for transfer, (ranks, seconds) in ended.items():
            found = self._in_flight.get(transfer)
            if found is None:  # of before a reset
                continue
            found.ranks -= ranks
            found.seconds = max(found.seconds, seconds)
            if found.ranks <= 0:
                del self._in_flight[transfer]
                errors = failed.pop(transfer, {})
                self._core.load_done(found.probe.keys, self._owner(transfer), errors, used=False)
                # An engine that was idle sees late that reads had failed in time.
                self._decisions.end_probe(found.loading, min(found.seconds, found.probe.patience_s), errors.values())

    def clear(self) -> None:
        """Those in flight will not be told of."""
        self._planned.clear()
        self._in_flight.clear()

    @staticmethod
    def _owner(transfer: int) -> str:
        return f"probe {transfer}"
