"""The hand-written wire format: names, slots, entry envelopes, columnar batches and entries of many batches. Pure."""
