from hypothesis import given
from hypothesis import strategies as st

from magnetar.broker.offset_set import CHUNK, OffsetSet, first_bit, indices, lowest, ones, pieces_of
from magnetar.broker.redelivery import DELIVERIES_MAX, DeliveryCounts, Returned

OFFSETS = st.integers(0, 3 * CHUNK)
LENGTHS = st.sampled_from([0, 1, 2, 63, 64, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
BITS = st.one_of(st.integers(0, 1 << 80), LENGTHS.map(ones))


def offsets_of(start: int, bits: int) -> set[int]:
    return {start + i for i in range(bits.bit_length()) if bits >> i & 1}


@given(st.integers(0, 1 << 100), st.integers(0, 110))
def test_lowest_keeps_exactly_the_lowest_bits(bits: int, count: int) -> None:
    chosen = lowest(bits, count)
    assert indices(chosen) == indices(bits)[:count]
    assert first_bit(chosen) == (indices(bits)[0] if bits and count else -1)


@given(
    st.lists(st.tuples(st.sampled_from(["add", "remove", "add_range", "remove_range", "take"]), OFFSETS, BITS, LENGTHS))
)
def test_an_offset_set_behaves_as_a_set(steps: list[tuple[str, int, int, int]]) -> None:
    offsets, model = OffsetSet(), set[int]()
    for what, start, bits, length in steps:
        some, span = offsets_of(start, bits), set(range(start, start + length))
        if what == "add":
            offsets.add(start, bits)
            model |= some
        elif what == "remove":
            assert offsets_of(start, offsets.remove(start, bits)) == model & some
            model -= some
        elif what == "add_range":
            offsets.add_range(start, start + length)
            model |= span
        elif what == "remove_range":
            assert offsets.remove_range(start, start + length) == len(model & span)
            model -= span
        else:
            taken = offsets.take_range(start, start + length)
            assert {offset for piece in taken for offset in offsets_of(*piece)} == model & span
            model -= span
        offsets.check()
        assert len(offsets) == len(model)
        assert offsets.first() == min(model, default=-1)
        assert offsets_of(start, offsets.window(start, length)) == model & span
    assert list(offsets) == sorted(model)
    assert all(offset in offsets for offset in model)


@given(st.lists(st.tuples(OFFSETS, LENGTHS), max_size=8))
def test_ranges_become_pieces_of_a_chunk_each(spans: list[tuple[int, int]]) -> None:
    pieces = list(pieces_of([(start, start + length) for start, length in spans]))
    assert len({start for start, _ in pieces}) == len(pieces)
    assert all(start % CHUNK == 0 and 0 < bits < 1 << CHUNK for start, bits in pieces)
    offsets = {offset for start, length in spans for offset in range(start, start + length)}
    assert {offset for piece in pieces for offset in offsets_of(*piece)} == offsets


def test_a_huge_range_costs_no_more_than_what_the_set_holds() -> None:
    offsets = OffsetSet([(5, 10), (1 << 40, (1 << 40) + 3)])
    assert offsets.remove_range(0, 1 << 62) == 8
    assert offsets.chunks == 0


def test_the_order_of_a_set_that_is_never_asked_for_its_first_costs_bounded_memory() -> None:
    offsets = OffsetSet()
    for start in range(0, 1000 * CHUNK, CHUNK):
        offsets.add_range(start, start + 1)
        offsets.remove_range(start, start + 1)
    assert len(offsets._heap) < 100


@given(st.lists(st.tuples(st.booleans(), OFFSETS, st.integers(1, 1 << 20)), max_size=30))
def test_counts_count_each_offset_alone(steps: list[tuple[bool, int, int]]) -> None:
    counts, model = DeliveryCounts(), dict[int, int]()
    for up, start, bits in steps:
        if up:
            counts.increment(start, bits)
            for offset in offsets_of(start, bits):
                model[offset] = model.get(offset, 0) + 1
        else:
            counts.forget(start, start + 10)
            for offset in range(start, start + 10):
                model.pop(offset, None)
        assert bool(counts) == bool(model)
        pairs = counts.pairs(start, bits)
        assert pairs == tuple(n for o in sorted(offsets_of(start, bits)) if o in model for n in (o - start, model[o]))
    for offset, count in model.items():
        assert counts[offset] == count


def test_a_count_stops_at_its_limit() -> None:
    counts = DeliveryCounts()
    for _ in range(DELIVERIES_MAX + 5):
        counts.increment(7, 1)
    counts.increment(7, 3)
    assert (counts[7], counts[8]) == (DELIVERIES_MAX, 1)


def test_what_came_back_waits_lowest_first_until_it_is_acknowledged() -> None:
    returned = Returned()
    returned.put(100, 0b110)
    returned.put(100, 0b001)
    returned.put(100, 0b001)
    assert list(returned.waiting) == [100, 101, 102]
    assert returned.counts.pairs(100, 0b111) == (0, 2, 1, 1, 2, 1)
    returned.waiting.remove_range(100, 102)
    returned.counts.forget_bits(100, 0b011)
    assert returned.waiting.first() == 102
    assert (returned.counts[100], returned.counts[102]) == (0, 1)
