"""The hash behind all randomness: known values, and that no two purposes share a stream."""

from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from gnnpipe.counter import GOLDEN_64, MASK_64, mix, stream_key

WORDS = st.integers(0, MASK_64)


def test_mix_gives_the_published_outputs_of_splitmix64() -> None:
    # First outputs of the authors' C program for the seeds 0 and 1234567.
    assert [mix(draw * GOLDEN_64) for draw in (1, 2, 3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]
    assert [mix(1234567 + draw * GOLDEN_64) for draw in (1, 2, 3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@given(WORDS)
def test_mix_is_a_bijection_of_64_bit_words(word: int) -> None:
    assert unmix(mix(word)) == word


@given(WORDS, st.integers(0, 63))
def test_one_flipped_bit_changes_about_half_of_the_output(word: int, bit: int) -> None:
    assert 8 <= (mix(word) ^ mix(word ^ (1 << bit))).bit_count() <= 56


@given(st.integers())
def test_mix_takes_any_integer_modulo_64_bits(value: int) -> None:
    assert mix(value) == mix(value & MASK_64)
    assert 0 <= mix(value) <= MASK_64


def test_a_stream_key_depends_on_every_part_and_on_their_order() -> None:
    keys = [stream_key(*parts) for length in range(5) for parts in permutations(range(5), length)]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key <= MASK_64 for key in keys)


def test_a_longer_stream_key_is_another_stream() -> None:
    assert len({stream_key(), stream_key(0), stream_key(0, 0), stream_key(0, 0, 0)}) == 4


def test_stream_keys_of_neighbouring_seeds_do_not_meet() -> None:
    keys = {
        stream_key(seed, epoch, chunk)
        for seed in range(20)
        for epoch in range(20)
        for chunk in range(20)
    }
    assert len(keys) == 20**3


def test_stream_keys_are_stable() -> None:
    # Written down once: a change would alter every seeded run.
    assert stream_key(0) == 0xA706DD2F4D197E6F
    assert stream_key(1, 2, 3) == 0xA7DFA81B2E24C20E


def unmix(word: int) -> int:
    """The inverse of mix: its steps undone from the last to the first."""
    word = unshift(word, 31)
    word = unshift(word * pow(0x94D049BB133111EB, -1, 1 << 64) & MASK_64, 27)
    return unshift(word * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & MASK_64, 30)


def unshift(word: int, bits: int) -> int:
    """Solves ``word = x ^ (x >> bits)`` for x."""
    x = word
    for _ in range(64 // bits):
        x = word ^ (x >> bits)
    return x
