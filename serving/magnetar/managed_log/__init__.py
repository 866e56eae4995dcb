"""The log of a shard: a chain of segments, the cursors in it, trimming, the read cache."""
