"""Who stores an entry, and how many of them must have spoken. Pure.

A place is an index into an ensemble; sets of places are bit masks, so that counting them costs no allocation. With
E places, an entry stands on Qw of them (its write set), of which F <= Qw are filled, the others vacant. It is
acknowledged at Qa, and nothing can be said against it before F - Qa + 1 members of its write set denied it: those that
acknowledge are Qa of these F, and any Qa of F and any F - Qa + 1 of F have a member in common. A vacant place does not
change that. Whoever comes to fill it begins another fragment, or this one again if nothing of it was confirmed; and
until that is committed, what he stores does not count: it takes Qa members of both ensembles.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from magnetar.metadata.records import VACANT, LedgerRecord

PLACES_MAX = 32
"""Places of an ensemble. More would only make frames and masks larger: striping is not the default."""


class Quorum:
    """The arithmetic of one (E, Qw, Qa). There are only E distinct write sets, so all are made once.

    striped    an entry does not stand on every member
    """

    __slots__ = ("_write_masks", "_write_sets", "ack_quorum", "ensemble_size", "striped", "write_quorum")

    def __init__(self, ensemble_size: int, write_quorum: int, ack_quorum: int) -> None:
        if not PLACES_MAX >= ensemble_size >= write_quorum >= ack_quorum >= 1:
            raise ValueError(
                f"quorums do not hold E >= Qw >= Qa >= 1: ensemble_size=`{ensemble_size}` "
                f"write_quorum=`{write_quorum}` ack_quorum=`{ack_quorum}` ensemble_size_max=`{PLACES_MAX}`"
            )
        self.ensemble_size = ensemble_size
        self.write_quorum = write_quorum
        self.ack_quorum = ack_quorum
        self.striped = ensemble_size != write_quorum
        self._write_sets = tuple(
            tuple((first + k) % ensemble_size for k in range(write_quorum)) for first in range(ensemble_size)
        )
        self._write_masks = tuple(mask_of(places) for places in self._write_sets)

    @classmethod
    def of(cls, record: LedgerRecord) -> Quorum:
        return cls(record.ensemble_size, record.write_quorum, record.ack_quorum)

    def __repr__(self) -> str:
        return f"Quorum({self.ensemble_size}/{self.write_quorum}/{self.ack_quorum})"

    def write_set(self, entry_id: int) -> tuple[int, ...]:
        """The places of the entry, in the order of its round robin."""
        return self._write_sets[entry_id % self.ensemble_size]

    def write_mask(self, entry_id: int) -> int:
        return self._write_masks[entry_id % self.ensemble_size]

    def is_denied(self, entry_id: int, denied: int, filled: int) -> bool:
        """True if so many of the filled places have denied the entry that it was not acknowledged."""
        return self._covers(self.write_mask(entry_id), denied, filled)

    def is_covered(self, known: int, filled: int) -> bool:
        """True if so many of the filled places have spoken that no acknowledged entry can be hidden from them."""
        return all(self._covers(mask, known, filled) for mask in self._write_masks)

    def _covers(self, write_mask: int, spoken: int, filled: int) -> bool:
        """F - Qa + 1 of F, and at least one, whatever the record says."""
        needed = (write_mask & filled).bit_count() - self.ack_quorum + 1
        return (write_mask & filled & spoken).bit_count() >= max(needed, 1)

    def can_acknowledge(self, answering: int) -> bool:
        """True if every write set has an ack quorum among the places that answer."""
        return all((mask & answering).bit_count() >= self.ack_quorum for mask in self._write_masks)


def mask_of(places: Iterable[int]) -> int:
    mask = 0
    for place in places:
        mask |= 1 << place
    return mask


def places_of(mask: int) -> Iterator[int]:
    """The places of a mask, lowest first."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


def filled_mask(bookies: Iterable[str]) -> int:
    """The places that a bookie fills."""
    return mask_of(place for place, bookie in enumerate(bookies) if bookie != VACANT)
