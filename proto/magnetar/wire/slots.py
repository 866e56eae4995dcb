"""Slots: the 16-bit hash of a key that says which shard of a topic holds it.

`slot(key) = reverse_bits16(murmur2(key) & 0xffff)`, with murmur2 as in Kafka. Reversing the bits turns "equal low bits"
into "equal high bits": for N = 2^k each of Kafka's partitions `murmur2(key) mod N` is one contiguous range of slots.
A message without a key has no slot of its own: whoever forms its batch chooses one.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from murmurhash2 import murmurhash2

SLOTS = 65536

SEED = 0x9747B28C

CACHED_KEYS_MAX = 65536
"""Recent keys whose slot is remembered; when it is full, all are forgotten."""

CACHED_KEY_BYTES_MAX = 64
"""Longer keys are hashed each time, so that the cache is bounded in bytes too."""

_REVERSED = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))

_recent: dict[bytes, int] = {}


def murmur2(key: bytes) -> int:
    """Kafka's hash of a key, as an unsigned 32-bit number."""
    hashed: int = murmurhash2(key, SEED)
    return hashed


def slot_of(key: bytes) -> int:
    """The slot of a key, 0 to 65535."""
    slot = _recent.get(key)
    return _remembered(key) if slot is None else slot


def slots_of(keys: Sequence[bytes]) -> array[int]:
    """The slot of each key, in bulk: an array of typecode "H"."""
    found = list(map(_recent.get, keys))
    if None in found:
        return array("H", [_remembered(key) if slot is None else slot for key, slot in zip(keys, found, strict=True)])
    return array("H", found)  # type: ignore[arg-type]  # the check above is one call where a loop would be many


def _remembered(key: bytes) -> int:
    hashed = murmur2(key)
    slot = _REVERSED[hashed & 0xFF] << 8 | _REVERSED[hashed >> 8 & 0xFF]
    if len(key) <= CACHED_KEY_BYTES_MAX:
        if len(_recent) >= CACHED_KEYS_MAX:
            _recent.clear()
        _recent[key] = slot
    return slot
