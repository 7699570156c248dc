"""Counter-based randomness: a draw is a pure function of what it is for.

Chunk orders, initial weights and dropout masks come from hashes of (seed, epoch, layer, ...)
instead of a generator's state, so no stage, schedule, recomputation or resume can change them.

The mixer is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014).
"""

MASK_64 = (1 << 64) - 1
GOLDEN_64 = 0x9E3779B97F4A7C15


def mix(value: int) -> int:
    """SplitMix64's output function: a bijection of 64-bit integers that scatters all bits."""
    value &= MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK_64
    return value ^ (value >> 31)


def signed(value: int) -> int:
    """The int64 with the bits of the unsigned ``value``; torch multiplies modulo 2^64."""
    return value - (1 << 64) if value >= 1 << 63 else value


def stream_key(*parts: int) -> int:
    """Folds integers, in order, into one unsigned 64-bit key."""
    key = 0
    for part in parts:
        key = mix(key + GOLDEN_64 + mix(part + GOLDEN_64))
    return key
