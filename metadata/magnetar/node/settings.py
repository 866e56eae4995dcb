"""The settings of the server roles: one typed model each, with units and defaults. Unknown keys are errors.

Sizes are in bytes (`_bytes`), or text with a unit such as 64MiB or 10MB; times in seconds (`_s`); addresses are
`host:port`, port 0 is any free one.
`settings_loading.py` reads them from command line, environment and file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

NAME_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,248}$"
METADATA_SCHEME = "etcd://"
METADATA_ENDPOINTS_MAX = 16
LEASE_S_MAX = 600.0
PORT_MAX = 65_535


def split_address(address: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port` in two parts, the host as it is written. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    plain = host.startswith("[") == host.endswith("]") and (host.startswith("[") or ":" not in host)
    if not colon or not host or not plain or any(map(str.isspace, host)):
        raise ValueError("must be host:port, such as 127.0.0.1:7650")
    if not (port.isascii() and port.isdecimal() and int(port) <= PORT_MAX):
        raise ValueError("must be host:port with a port of 0 to 65535")
    return host, int(port)


def is_loopback(host: str) -> bool:
    return host in ("localhost", "[::1]") or host.startswith("127.")


def is_every_interface(host: str) -> bool:
    """Listening there is fine, but nobody can connect to an address with this host."""
    return host in ("0.0.0.0", "[::]")


def _address(value: str) -> str:
    split_address(value)
    return value


def _address_or_default(value: str) -> str:
    return _address(value) if value else value


def _reachable_or_default(value: str) -> str:
    if value and is_every_interface(split_address(value)[0]):
        raise ValueError("is what others connect to: name this host, not every interface")
    return value


def _metadata_url(value: str) -> str:
    endpoints = value.removeprefix(METADATA_SCHEME).split(",")
    if not value.startswith(METADATA_SCHEME) or not 0 < len(endpoints) <= METADATA_ENDPOINTS_MAX:
        raise ValueError("must be etcd://host:port[,host:port]")
    for endpoint in endpoints:
        if not split_address(endpoint)[1]:
            raise ValueError("must name the port of each endpoint")
    return value


def _directory(value: Any) -> Any:
    text = str(value)
    if not text or "\0" in text:
        raise ValueError("must name a directory")
    return Path(text).expanduser() if isinstance(value, str | Path) else value


_BYTE_SIZE = TypeAdapter(ByteSize)


def _size(value: Any) -> Any:
    """Text with a unit becomes bytes: 64MiB, 10MB. What has none stays as it is."""
    if not (isinstance(value, str) and value.rstrip()[-1:].isalpha()):
        return value
    try:
        return int(_BYTE_SIZE.validate_python(value))
    except (ValidationError, OverflowError):
        raise ValueError("must be a whole number of bytes, or have a unit, such as 64MiB or 10MB") from None


Size = Annotated[int, BeforeValidator(_size)]
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Address = Annotated[str, AfterValidator(_address)]
HttpAddress = Annotated[str, AfterValidator(_address_or_default), Field(description="empty: host of listen, port + 1")]
AdvertisedAddress = Annotated[
    str, AfterValidator(_reachable_or_default), Field(description="where others connect to; empty: what is listened on")
]
MetadataUrl = Annotated[str, AfterValidator(_metadata_url), Field(description="etcd://host:port[,host:port]")]
Directory = Annotated[Path, BeforeValidator(_directory)]
Lease = Annotated[float, Field(ge=0.1, le=LEASE_S_MAX, description="how long a lost process keeps its id")]


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Listening(Settings):
    """What every role has: an address for its service and one for /metrics, /livez and /readyz."""

    listen: Address
    http_listen: HttpAddress = ""
    advertised_address: AdvertisedAddress = ""

    @model_validator(mode="after")
    def _http_has_a_port(self) -> Self:
        if not self.http_listen and split_address(self.listen)[1] == PORT_MAX:
            raise ValueError(f"there is no port above it for HTTP: set http_listen too listen=`{self.listen}`")
        return self

    @property
    def http_address(self) -> str:
        """Where to listen for HTTP; any free port if the service takes one."""
        host, port = split_address(self.listen)
        return self.http_listen or f"{host}:{port + 1 if port else 0}"


class Joining(Listening):
    """What a member of a cluster has: its id and the cluster's metadata store."""

    id: Name
    cluster: Name = "magnetar"
    metadata: MetadataUrl = "etcd://127.0.0.1:2379"
    metadata_wait_s: float = Field(
        default=30.0, ge=0, le=3600, description="how long to wait for the metadata store at the start"
    )
    new_cluster: bool = Field(default=False, description="begin this cluster in a store that holds another one")
    lease_s: Lease = 5.0


class MetadataSettings(Listening):
    """The metadata server: one process, one SQLite file, not replicated."""

    data_dir: Directory
    listen: Address = "127.0.0.1:2379"


class BookieSettings(Joining):
    """A storage node. `memory_bytes` bounds memtables, block cache and queues together."""

    data_dir: Directory
    listen: Address = "127.0.0.1:7660"
    rack: str = ""
    memory_bytes: Size = Field(default=128 * MIB, ge=16 * MIB)
    read_only_at: float = Field(default=0.95, gt=0, le=1, description="share of the disk in use")
    writable_at: float = Field(default=0.90, gt=0, le=1, description="share of the disk in use")
    gc_interval_s: float = Field(default=60.0, gt=0)

    @model_validator(mode="after")
    def _writable_below_read_only(self) -> Self:
        if self.writable_at >= self.read_only_at:
            raise ValueError(
                "writable_at must be below read_only_at "
                f"writable_at=`{self.writable_at}` read_only_at=`{self.read_only_at}`"
            )
        return self


class BrokerSettings(Joining):
    """A broker. A segment is rolled at its size or its age, whichever comes first."""

    listen: Address = "127.0.0.1:7650"
    ensemble_size: int = Field(default=3, ge=1, le=16)
    write_quorum: int = Field(default=3, ge=1, le=16)
    ack_quorum: int = Field(default=2, ge=1, le=16)
    segment_bytes: Size = Field(default=64 * MIB, ge=64 * KIB, le=2 * GIB)
    segment_s: float = Field(default=3600.0, gt=0)
    cache_bytes: Size = Field(default=64 * MIB, ge=1 * MIB)
    pending_bytes: Size = Field(default=24 * MIB, ge=1 * MIB, description="published and not yet stored, all producers")
    max_message_bytes: Size = Field(default=5 * MIB, ge=1 * KIB, le=5 * MIB)
    retention_unsubscribed_s: float = Field(default=7 * 24 * 3600.0, ge=0)
    trim_interval_s: float = Field(default=5.0, gt=0)
    rest_after_s: float = Field(
        default=600.0, ge=1, description="a topic nobody uses for so long is closed until somebody wants it"
    )
    balance: bool = Field(default=True, description="moves shards from busy brokers to idle ones when it is elected")
    balance_interval_s: float = Field(default=60.0, ge=1, description="from one look at the loads to the next")

    @model_validator(mode="after")
    def _quorums_nest(self) -> Self:
        if not self.ensemble_size >= self.write_quorum >= self.ack_quorum:
            raise ValueError(
                "quorums must nest: ensemble_size >= write_quorum >= ack_quorum "
                f"ensemble_size=`{self.ensemble_size}` write_quorum=`{self.write_quorum}` "
                f"ack_quorum=`{self.ack_quorum}`"
            )
        return self
