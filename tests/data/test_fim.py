"""FIM against its definition, read back token by token, and against the probabilities that it promises."""

import math
from collections import Counter
from random import Random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_mini.data.fim import apply_fim
from dsv3_mini.errors import DataError

TOKENS = SimpleNamespace(eos_id=1000, fim_begin_id=1001, fim_hole_id=1002, fim_end_id=1003)
documents = st.lists(st.integers(0, 999), max_size=60)


def read_back(ids: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Prefix, middle and suffix of `<begin> pre <hole> suf <end> middle <eos>`."""
    assert ids[0] == TOKENS.fim_begin_id and ids[-1] == TOKENS.eos_id
    hole, end = ids.index(TOKENS.fim_hole_id), ids.index(TOKENS.fim_end_id)
    return ids[1:hole], ids[end + 1 : -1], ids[hole + 1 : end]


@given(documents.filter(len), st.integers(0, 2**32))
def test_prefix_middle_suffix_are_the_document(ids, seed):
    told = apply_fim(ids, TOKENS, 1.0, Random(seed))
    prefix, middle, suffix = read_back(told)
    assert prefix + middle + suffix == ids
    assert middle
    assert Counter(told) - Counter(ids) == Counter([1000, 1001, 1002, 1003])


@given(documents, st.integers(0, 2**32), st.floats(0, 1))
def test_a_document_ends_with_eos_once_and_chance_decides_alone(ids, seed, rate):
    told = apply_fim(ids, TOKENS, rate, Random(seed))
    assert told == apply_fim(tuple(ids), TOKENS, rate, Random(seed))
    assert told.count(TOKENS.eos_id) == 1 and told[-1] == TOKENS.eos_id
    assert told[0] == TOKENS.fim_begin_id or told == [*ids, TOKENS.eos_id]
    if rate == 0:
        assert told == [*ids, TOKENS.eos_id]


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_share_is_the_rate(rate):
    rng, n = Random(0), 20_000
    share = sum(apply_fim([1, 2, 3], TOKENS, rate, rng)[0] == TOKENS.fim_begin_id for _ in range(n)) / n
    assert abs(share - rate) < 4 * math.sqrt(rate * (1 - rate) / n)


def test_all_pairs_of_cuts_are_equally_likely():
    rng, n = Random(1), 12_000
    cuts = Counter()
    for _ in range(n):
        prefix, middle, _ = read_back(apply_fim([1, 2, 3], TOKENS, 1.0, rng))
        cuts[len(prefix), len(prefix) + len(middle)] += 1
    assert set(cuts) == {(a, b) for a in range(4) for b in range(a + 1, 4)}
    chi_square = sum((count - n / 6) ** 2 / (n / 6) for count in cuts.values())
    assert chi_square < 20.5  # 5 degrees of freedom, p = 0.001


@pytest.mark.parametrize("rate", [-0.1, 1.5, math.nan])
def test_a_rate_is_a_probability(rate):
    with pytest.raises(DataError, match="fim rate = .* from 0 to 1"):
        apply_fim([1], TOKENS, rate, Random(0))
