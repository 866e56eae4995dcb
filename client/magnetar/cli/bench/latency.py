"""`magnetar bench latency`: how long one message takes to be stored, alone or at a rate."""

from __future__ import annotations

from dataclasses import dataclass

from magnetar.cli.bench.load import Load
from magnetar.cli.bench.publish import IN_FLIGHT_AT_A_RATE, Mode, Publish
from magnetar.cli.bench.verb import RateOption, SizeOption, verb


@dataclass(frozen=True, slots=True)
class Latency(Publish):
    """Publishing, each message by itself."""

    verb = "latency"


@verb
def latency(size: SizeOption = 1024, rate: RateOption = 0.0) -> Load:
    """Sends one message after the other, or at a rate, each by itself: percentiles of the time until it is stored."""
    return Latency(size=size, mode=Mode.single, in_flight=IN_FLIGHT_AT_A_RATE if rate else 1, rate=rate)
