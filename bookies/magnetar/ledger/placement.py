"""Which bookies an ensemble is made of. Pure: the bookies as last heard of, and a source of randomness, are arguments.

Rules:
1. Only bookies that accept new entries of this ledger are eligible: WRITABLE, and not above the ledger in their floor.
2. Members stand in distinct racks while there are unused ones; after that, anywhere. A rack never costs a member.
   Bookies without a rack stand in one together.
3. Among equals the draw is weighted by free disk, at most WEIGHT_RATIO_MAX times the median's.
4. A replacement takes the place of what it replaces: a bookie's place in the ensemble never moves.
5. Places may stay vacant while every write set still has its ack quorum.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from magnetar.ledger.errors import NotEnoughBookies
from magnetar.ledger.quorum import Quorum, filled_mask
from magnetar.metadata.records import VACANT, BookieRegistration, BookieState, LedgerRecord

WEIGHT_RATIO_MAX = 3
"""An empty bookie among full ones takes at most so many times its share: it would become the hot spot."""


class Randomness(Protocol):
    def random(self) -> float:
        """A number in [0, 1)."""
        ...


def is_eligible(bookie: BookieRegistration, ledger_id: int) -> bool:
    """True if the bookie takes ordinary adds to the ledger. A reborn bookie refuses ids below its floor."""
    return bookie.state is BookieState.WRITABLE and ledger_id >= bookie.ledger_floor


def lacks_racks(record: LedgerRecord, racks: Mapping[str, str]) -> bool:
    """True if a fragment of a whole ledger stands in fewer racks than it could. False if the ledger misses a member.

    racks   of the bookies that count: those that have a session and are not to be emptied
    """
    used = [{racks.get(name) for name in fragment.bookies} for fragment in record.fragments]
    if any(None in some for some in used):
        return False
    most = len(set(racks.values()))
    return any(len(some) < min(len(f.bookies), most) for some, f in zip(used, record.fragments, strict=True))


def loses_rack(record: LedgerRecord, place: str, target: str, racks: Mapping[str, str]) -> bool:
    """True if some fragment stands in fewer racks once the target has the place. Of members that `racks` names."""
    for others in _others(record, place, target):
        kept = {racks[name] for name in others if name in racks}
        if racks[target] in kept and place in racks and racks[place] not in kept:
            return True
    return False


def unknown_racks(record: LedgerRecord, place: str, target: str, racks: Mapping[str, str]) -> set[str]:
    """The members of which `racks` must tell before `loses_rack` can be believed. None if the rack stays the same, or
    if nobody has one."""
    if racks.get(place) == racks[target] or not any(racks.values()):
        return set()
    fragments = _others(record, place, target)
    return {name for others in fragments for name in (place, *others) if name not in racks}


def _others(record: LedgerRecord, place: str, target: str) -> list[list[str]]:
    """Of each fragment in which the target can have the place, who else fills one."""
    fragments = [fragment.bookies for fragment in record.fragments if place in fragment.bookies]
    return [[name for name in f if name not in (place, VACANT)] for f in fragments if target not in f]


def choose_ensemble(
    quorum: Quorum,
    registered: Sequence[BookieRegistration],
    ledger_id: int,
    rng: Randomness,
    *,
    rack: str | None = None,
) -> tuple[str, ...]:
    """A new ledger's ensemble, one member in `rack` if it can be; places nobody can fill are VACANT.

    Raises NotEnoughBookies if some write set would have fewer members than an acknowledgement needs.
    """
    ensemble = [VACANT] * quorum.ensemble_size
    chosen = _draw(ensemble, range(quorum.ensemble_size), registered, ledger_id, rng, avoid=(), rack=rack)
    for place, bookie in chosen.items():
        ensemble[place] = bookie
    if not quorum.can_acknowledge(filled_mask(ensemble)):
        # Striped write sets need more than Qa in all: every run of Qw neighbours must hold Qa.
        needed = quorum.ensemble_size - quorum.write_quorum + quorum.ack_quorum
        raise NotEnoughBookies(needed, len(chosen))
    return tuple(ensemble)


def choose_replacements(
    ensemble: Sequence[str],
    places: Sequence[int],
    registered: Sequence[BookieRegistration],
    ledger_id: int,
    rng: Randomness,
    *,
    avoid: Collection[str] = (),
) -> dict[int, str]:
    """Spare bookies for these places, for as many of them as there are spares; never a member, never one to avoid."""
    return _draw(ensemble, places, registered, ledger_id, rng, avoid=avoid, rack=None)


def _draw(
    ensemble: Sequence[str],
    places: Sequence[int],
    registered: Sequence[BookieRegistration],
    ledger_id: int,
    rng: Randomness,
    *,
    avoid: Collection[str],
    rack: str | None,
) -> dict[int, str]:
    candidates = {
        bookie.bookie_id: bookie
        for bookie in sorted(registered, key=lambda bookie: bookie.bookie_id)
        if is_eligible(bookie, ledger_id) and bookie.bookie_id not in avoid and bookie.bookie_id not in ensemble
    }
    racks = {bookie.bookie_id: bookie.rack for bookie in registered}
    used = {racks[name] for place, name in enumerate(ensemble) if name in racks and place not in places}
    weights = _weights(candidates)
    drawn: dict[int, str] = {}
    for place in places:
        if not candidates:
            break
        preferred = [name for name, bookie in candidates.items() if bookie.rack == rack] if rack and not drawn else []
        elsewhere = [name for name, bookie in candidates.items() if bookie.rack not in used]
        name = _weighted(preferred or elsewhere or list(candidates), weights, rng)
        used.add(candidates.pop(name).rack)
        drawn[place] = name
    return drawn


def _weights(candidates: Mapping[str, BookieRegistration]) -> dict[str, float]:
    free = sorted(bookie.disk_free_bytes for bookie in candidates.values())
    if not free or free[-1] <= 0:
        return dict.fromkeys(candidates, 1.0)
    ceiling = max(1, free[len(free) // 2] * WEIGHT_RATIO_MAX)
    return {name: float(max(1, min(bookie.disk_free_bytes, ceiling))) for name, bookie in candidates.items()}


def _weighted(names: Sequence[str], weights: Mapping[str, float], rng: Randomness) -> str:
    target = rng.random() * sum(weights[name] for name in names)
    for name in names:
        target -= weights[name]
        if target < 0:
            return name
    return names[-1]
