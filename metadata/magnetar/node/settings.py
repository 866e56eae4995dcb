"""The settings of the server roles: one typed model each, with units and defaults. Unknown keys are errors."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

NAME_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,248}$"


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BookieSettings(Settings):
    """A storage node. `memory_bytes` bounds memtables, block cache and queues together."""

    id: str = Field(pattern=NAME_PATTERN)
    data_dir: Path
    cluster: str = Field(default="magnetar", pattern=NAME_PATTERN)
    listen: str = "127.0.0.1:7660"
    advertised_address: str = ""
    rack: str = ""
    memory_bytes: int = Field(default=128 * MIB, ge=16 * MIB)
    read_only_at: float = Field(default=0.95, gt=0, le=1, description="share of the disk in use")
    writable_at: float = Field(default=0.90, gt=0, le=1, description="share of the disk in use")
    gc_interval_s: float = Field(default=60.0, gt=0)
    lease_s: float = Field(default=5.0, ge=0.1)

    @model_validator(mode="after")
    def _writable_below_read_only(self) -> BookieSettings:
        if self.writable_at >= self.read_only_at:
            raise ValueError(
                "writable_at must be below read_only_at "
                f"writable_at={self.writable_at} read_only_at={self.read_only_at}"
            )
        return self


class BrokerSettings(Settings):
    """A broker. Sizes in bytes, times in seconds."""

    id: str = Field(pattern=NAME_PATTERN)
    cluster: str = Field(default="magnetar", pattern=NAME_PATTERN)
    listen: str = "127.0.0.1:7650"
    advertised_address: str = ""
    ensemble_size: int = Field(default=3, ge=1, le=16)
    write_quorum: int = Field(default=3, ge=1, le=16)
    ack_quorum: int = Field(default=2, ge=1, le=16)
    segment_bytes: int = Field(default=64 * MIB, ge=64 * KIB, le=2 * GIB)
    segment_s: float = Field(default=3600.0, gt=0)
    cache_bytes: int = Field(default=64 * MIB, ge=1 * MIB)
    pending_bytes: int = Field(default=24 * MIB, ge=1 * MIB, description="published and not yet stored, all producers")
    max_message_bytes: int = Field(default=5 * MIB, ge=1 * KIB, le=5 * MIB)
    retention_unsubscribed_s: float = Field(default=7 * 24 * 3600.0, ge=0)
    trim_interval_s: float = Field(default=5.0, gt=0)
    lease_s: float = Field(default=5.0, ge=0.1)

    @model_validator(mode="after")
    def _quorums_nest(self) -> BrokerSettings:
        if not self.ensemble_size >= self.write_quorum >= self.ack_quorum:
            raise ValueError(
                "quorums must nest: ensemble_size >= write_quorum >= ack_quorum "
                f"ensemble_size={self.ensemble_size} write_quorum={self.write_quorum} ack_quorum={self.ack_quorum}"
            )
        return self
