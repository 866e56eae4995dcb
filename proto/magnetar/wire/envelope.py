"""The envelope of a ledger's entry: the same bytes when sent, stored, read and verified. Big-endian, 40 bytes.

    version u8 = 1 | flags u8 = 0 | reserved u16 = 0 | ledger_id u64 | entry_id u64 | lac i64 | length u64 | crc32c u32

and then the payload. The checksum covers all else: the 36 bytes before it and the payload. For one (ledger, entry) only
one byte string ever exists, so flags and reserved are zero and nothing else verifies.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from fastcrc import crc32

HEADER_SIZE = 40
VERSION = 1

_FIELDS = struct.Struct(">BBHQQqQ")
_CHECKSUM = struct.Struct(">I")
_HEADER = struct.Struct(">BBHQQqQI")


class DamagedEnvelope(ValueError):
    """These bytes are not the envelope they should be; the message says what differs."""


class Envelope(NamedTuple):
    """The header of an entry.

    lac      last entry known to be confirmed when this one was added, -1 = none
    length   payload bytes of the ledger up to and with this entry
    """

    ledger_id: int
    entry_id: int
    lac: int
    length: int


def encode(ledger_id: int, entry_id: int, lac: int, length: int, payload: bytes | memoryview) -> bytes:
    """The envelope's bytes, header and payload."""
    fields = _FIELDS.pack(VERSION, 0, 0, ledger_id, entry_id, lac, length)
    checksum = crc32.iscsi(payload, crc32.iscsi(fields))
    return b"".join((fields, _CHECKSUM.pack(checksum), payload))


def peek(data: bytes | memoryview) -> Envelope:
    """The header alone, its checksum not looked at; raises DamagedEnvelope if it is short or of another version."""
    return _parse(data)[0]


def verify(data: bytes | memoryview, ledger_id: int | None = None, entry_id: int | None = None) -> Envelope:
    """The header, after everything was checked; raises DamagedEnvelope naming the first thing that differs."""
    envelope, stored = _parse(data)
    view = memoryview(data)
    computed = crc32.iscsi(view[HEADER_SIZE:], crc32.iscsi(view[: _FIELDS.size]))
    if computed != stored:
        raise DamagedEnvelope(f"envelope has a wrong checksum: stored=`{stored:08x}` computed=`{computed:08x}`")
    if ledger_id is not None and envelope.ledger_id != ledger_id:
        raise DamagedEnvelope(f"envelope is of another ledger: wanted=`{ledger_id}` found=`{envelope.ledger_id}`")
    if entry_id is not None and envelope.entry_id != entry_id:
        raise DamagedEnvelope(f"envelope is of another entry: wanted=`{entry_id}` found=`{envelope.entry_id}`")
    return envelope


def payload(data: bytes | memoryview) -> memoryview:
    """What stands behind the header, not copied; raises DamagedEnvelope if there is no whole header."""
    if len(data) < HEADER_SIZE:
        raise DamagedEnvelope(f"envelope is short: bytes=`{len(data)}`")
    return memoryview(data)[HEADER_SIZE:]


def _parse(data: bytes | memoryview) -> tuple[Envelope, int]:
    """The header and its stored checksum."""
    if len(data) < HEADER_SIZE:
        raise DamagedEnvelope(f"envelope is short: bytes=`{len(data)}`")
    version, flags, reserved, ledger_id, entry_id, lac, length, stored = _HEADER.unpack_from(data)
    if version != VERSION:
        raise DamagedEnvelope(f"envelope is of another version: version=`{version}`")
    if flags or reserved:
        raise DamagedEnvelope(f"envelope has unknown flags: flags=`{flags}` reserved=`{reserved}`")
    return Envelope(ledger_id, entry_id, lac, length), stored
