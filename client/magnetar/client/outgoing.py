"""What may be sent: the checks of one message before it goes anywhere. They raise public errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from magnetar.client.errors import InvalidArgument, MessageTooLarge

MESSAGE_BYTES_MAX = 5 << 20
"""Payload, key and properties of one message."""

_AS_THEY_ARE = {bytes, type(None)}

PROPERTIES_MAX = 0xFFFF
"""Of one message, and bytes of the name of one."""


def payload_bytes(payload: object) -> bytes:
    """A payload that is not bytes, as bytes. Raises InvalidArgument."""
    if isinstance(payload, bytes | bytearray | memoryview):
        return bytes(payload)
    if isinstance(payload, str):
        raise InvalidArgument("a payload is bytes, not str: use text.encode()")
    raise InvalidArgument(f"a payload is bytes: type=`{type(payload).__name__}`")


def key_to_bytes(key: object) -> bytes:
    """A key as it travels. Raises InvalidArgument."""
    if isinstance(key, str):
        try:
            return key.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgument(f"a key cannot be encoded as UTF-8: {error.reason}") from None
    if isinstance(key, bytes | bytearray | memoryview):
        return bytes(key)
    raise InvalidArgument(f"a key is str or bytes: type=`{type(key).__name__}`")


def checked_properties(properties: Mapping[str, str]) -> dict[str, str]:
    """A copy, so that later changes do not travel. Raises InvalidArgument."""
    try:
        pairs = dict(properties)
        for name, value in pairs.items():
            if len(name.encode()) > PROPERTIES_MAX:
                raise InvalidArgument(f"the name of a property is at most {PROPERTIES_MAX} bytes")
            value.encode()
    except (AttributeError, TypeError, ValueError) as error:
        if isinstance(error, InvalidArgument):
            raise
        raise InvalidArgument("properties map str to str, both encodable as UTF-8") from None
    if len(pairs) > PROPERTIES_MAX:
        raise InvalidArgument(f"a message has at most {PROPERTIES_MAX} properties: properties=`{len(pairs)}`")
    return pairs


def key_column(keys: Iterable[str | bytes | None], payloads: Sequence[bytes]) -> list[bytes | None]:
    """The keys of these payloads as they travel. Raises InvalidArgument."""
    given = list(keys)
    try:
        # Most columns are of one kind: whether they are costs less than a look at each key from here.
        as_they_are = _AS_THEY_ARE.issuperset(map(type, given))
        column = cast("list[bytes | None]", given) if as_they_are else _encoded_keys(given)
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"a key cannot be encoded as UTF-8: {error.reason}") from None
    if len(column) != len(payloads):
        raise InvalidArgument(f"there is one key for each payload: keys=`{len(column)}` payloads=`{len(payloads)}`")
    return column


def _encoded_keys(keys: Iterable[str | bytes | None]) -> list[bytes | None]:
    return [None if key is None else key.encode() if type(key) is str else key_to_bytes(key) for key in keys]


def check_sizes(payloads: Sequence[bytes], keys: Sequence[bytes | None] | None) -> None:
    """Raises MessageTooLarge."""
    longest = max(map(len, payloads), default=0)
    longest_key = max(map(len, filter(None, keys)), default=0) if keys is not None else 0
    if longest + longest_key <= MESSAGE_BYTES_MAX:
        return
    for payload, key in zip(payloads, keys or [None] * len(payloads), strict=True):
        if len(payload) + len(key or b"") > MESSAGE_BYTES_MAX:
            raise too_large(len(payload) + len(key or b""))


def too_large(size: int) -> MessageTooLarge:
    return MessageTooLarge(
        f"payload, key and properties are too many bytes together: "
        f"bytes=`{size}` max_message_bytes=`{MESSAGE_BYTES_MAX}`"
    )
