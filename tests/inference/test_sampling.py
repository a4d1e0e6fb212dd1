"""Each step from logits to a token against its definition and against transformers' processors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from chi_square import p_value
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from dsv3_mini.errors import ConfigError
from dsv3_mini.inference.choosing import Dice, Drafted, Drawn, Greedy
from dsv3_mini.inference.sampling import Sampling, min_p, penalised, seen_before, top_p

CPU = torch.device("cpu")


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the functions ---------------------------------------------------------------------------------------------------


def test_top_p_by_hand() -> None:
    shares = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    for p, kept in ((0.4, [1]), (0.6, [1, 3]), (0.74, [1, 3]), (0.8, [1, 2, 3]), (0.95, [0, 1, 2, 3]), (1e-9, [1])):
        expected = torch.zeros(4)
        expected[kept] = shares[0, kept] / shares[0, kept].sum()
        torch.testing.assert_close(top_p(shares, p)[0], expected)


def test_min_p_by_hand() -> None:
    shares = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    for p, kept in ((0.1, [0, 1, 2, 3]), (0.25, [1, 2, 3]), (0.4, [1, 3]), (0.6, [1]), (1.0, [1])):
        expected = torch.zeros(4)
        expected[kept] = shares[0, kept] / shares[0, kept].sum()
        torch.testing.assert_close(min_p(shares, p)[0], expected)


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=30), st.floats(0.3, 2.0), st.floats(0.05, 0.999) | st.just(1.0),
    st.floats(0.0, 0.9), st.floats(0.5, 2.0), st.integers(0, 10**6),
)  # fmt: skip
def test_the_chain_is_that_of_transformers(
    history: list[int], temperature: float, p: float, floor: float, penalty: float, seed: int
) -> None:
    # In FP64: where a sum comes within rounding of p, whether a token is kept depends on the end that one adds from.
    logits, ids = random_logits(1, 41, seed=seed).double(), torch.tensor([history])
    theirs = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature), TopPLogitsWarper(p),
            MinPLogitsWarper(floor),
        ]
    )(ids, logits.clone()).softmax(-1)  # fmt: skip
    seen = torch.zeros(1, 41, dtype=torch.bool)
    seen[0, history] = True
    ours = Sampling(temperature=temperature, top_p=p, min_p=floor).shares(penalised(logits, seen, penalty))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_what_was_seen_before_each_place() -> None:
    seen = torch.zeros(2, 6, dtype=torch.bool)
    seen[0, 5] = seen[1, 0] = True
    before = seen_before(seen, torch.tensor([[1, 2], [0, 3]]))
    sets = [[{i for i in range(6) if place[i]} for place in row] for row in before]
    assert sets == [[{5}, {1, 5}, {1, 2, 5}], [{0}, {0}, {0, 3}]]
    assert torch.equal(seen_before(seen, torch.zeros(2, 0, dtype=torch.long))[:, 0], seen)


@pytest.mark.parametrize(
    "setting, words",
    [
        (dict(temperature=-0.1), "temperature = -0.1 must be at least 0"),
        (dict(temperature=math.nan), "temperature = nan"),
        (dict(top_p=0.0), "top_p = 0.0 must be above 0"),
        (dict(top_p=1.1), "top_p = 1.1"),
        (dict(min_p=-0.1), "min_p = -0.1 must be between 0 and 1"),
        (dict(min_p=1.5), "min_p = 1.5"),
        (dict(repetition_penalty=0.0), "repetition_penalty = 0.0 must be above 0"),
    ],
)
def test_a_setting_out_of_range_is_one_line(setting: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Sampling(**setting)
    assert words in str(caught.value) and "\n" not in str(caught.value)


# ---- drafts, judged --------------------------------------------------------------------------------------------------

ROWS, TOKENS = 40_000, 7


def judge(p: Tensor, q: Tensor, sampling: Sampling, seed: int = 0, source: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """Draw drafts from q [j v], let the main model's logits p [j+1 v] judge them: drafts, how many hold, the token after."""
    rows, drafts = ROWS if source is None else len(source), len(q)
    random = torch.Generator().manual_seed(seed)
    drawn = Drawn(sampling, [[0]] * rows, TOKENS, CPU, Dice(random if source is None else source, rows))
    columns, shares = [], []
    for place in range(drafts):
        column, _, (share,) = drawn.propose(q[place].expand(rows, -1), [[0] * place] * rows)
        columns.append(column)
        shares.append(share)
    tokens = [list(row) for row in zip(*columns, strict=True)] if drafts else [[]] * rows
    agreed, after = drawn.verify(p.expand(rows, -1, -1), Drafted(tokens, shares))
    return torch.tensor(tokens), torch.tensor(agreed), torch.tensor(after)


@pytest.mark.parametrize("sampling", [Sampling(temperature=1.0), Sampling(temperature=0.8, top_p=0.9, min_p=0.02)])
def test_what_comes_is_distributed_as_the_main_model_says(sampling: Sampling) -> None:
    """Of two drafts: the token at each place, given that it was reached, and how often drafts hold."""
    p, q = 0.5 * random_logits(3, TOKENS, seed=1), 0.5 * random_logits(2, TOKENS, seed=2)
    drafts, agreed, after = judge(p, q, sampling)
    wanted, drawn_from = sampling.shares(p), sampling.shares(q)
    reached = torch.ones(ROWS, dtype=torch.bool)
    for place in range(3):
        here = torch.where(agreed > place, drafts[:, min(place, 1)], after)[reached]
        counts = here.bincount(minlength=TOKENS)
        possible = wanted[place] > 0
        assert counts[~possible].sum() == 0
        assert p_value(counts[possible], wanted[place][possible]) > 0.01
        if place < 2:
            # The chance that a draft holds is what p and q have in common; 4 standard deviations of a binomial.
            common = torch.minimum(wanted[place], drawn_from[place]).sum().item()
            held, trials = (agreed > place)[reached].double().mean().item(), int(reached.sum())
            assert abs(held - common) < 4 * math.sqrt(common * (1 - common) / trials)
            assert 0.05 < common < 0.95, "both outcomes have to occur"
            even = torch.full((int(possible.sum()),), 1 / int(possible.sum()))
            assert p_value(counts[possible], even) < 1e-6, "and the test tells another distribution"
        reached &= agreed > place


def test_drafts_from_the_same_distribution_all_hold() -> None:
    p = random_logits(3, TOKENS)
    _, agreed, _ = judge(p, p[:2], Sampling(temperature=1.0))
    assert (agreed == 2).all()


def test_drafts_that_cannot_be_never_hold() -> None:
    p, q = torch.full((2, TOKENS), -torch.inf), torch.full((1, TOKENS), -torch.inf)
    p[:, :3], q[:, 3:] = 0.0, 0.0
    _, agreed, after = judge(p, q, Sampling(temperature=1.0))
    assert (agreed == 0).all() and after.max() == 2


def test_one_generator_a_row_makes_rows_independent_of_each_other() -> None:
    p, q = 0.5 * random_logits(3, TOKENS, seed=1), 0.5 * random_logits(2, TOKENS, seed=2)

    def sources(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = judge(p, q, Sampling(temperature=1.0), source=sources(*range(30)))
    for seed in range(30):
        alone = judge(p, q, Sampling(temperature=1.0), source=sources(seed))
        assert all(torch.equal(one[0], many[seed]) for one, many in zip(alone, together, strict=True))
    assert len(set(together[2].tolist())) > 3
    with pytest.raises(ConfigError, match="2 generators for 3 rows"):
        Dice(sources(1, 2), 3)


def test_greedy_keeps_the_run_up_to_the_first_difference() -> None:
    logits = torch.full((4, 4, 5), -1.0)
    for place, token in enumerate((1, 2, 3, 4)):  # the main model says 1 2 3 4
        logits[:, place, token] = 1.0
    drafts = [[1, 2, 3], [1, 2, 0], [1, 0, 3], [0, 2, 3]]
    agreed, after = Greedy(Sampling(), [[]] * 4, 5, CPU).verify(logits, Drafted(drafts, []))
    assert agreed == [3, 2, 1, 0] and after == [4, 3, 2, 1]


def test_a_penalty_counts_the_drafts_before_a_place() -> None:
    """0 is the best token everywhere, until it has been written; then 1; then 2."""
    logits = torch.tensor([3.0, 2.0, 1.5, 1.0]).expand(1, 3, 4)
    greedy = Greedy(Sampling(repetition_penalty=10.0), [[3]], 4, CPU)
    agreed, after = greedy.verify(logits, Drafted([[0, 1]], []))
    assert (agreed, after) == ([2], [2])
    assert greedy.propose(logits[:, 0], [[0]])[0] == [1]
    greedy.note([[0, 1]])
    assert greedy.propose(logits[:, 0], [[]])[0] == [2]


def test_a_proposal_says_which_share_it_had() -> None:
    """Of the first 5 tokens of 7: greedy the largest share of a softmax, drawn the share it was drawn from."""
    logits = random_logits(3, 5, seed=4)
    greedy = Greedy(Sampling(), [[]] * 3, 7, CPU).propose(logits, [[]] * 3)
    assert greedy.tokens == logits.argmax(-1).tolist() and greedy.shares == []
    assert greedy.chances == pytest.approx(logits.softmax(-1).amax(-1).tolist(), rel=1e-5)
    sampling = Sampling(temperature=0.7, top_p=0.9)
    dice = Dice(torch.Generator().manual_seed(0), 3)
    drawn = Drawn(sampling, [[]] * 3, 7, CPU, dice).propose(logits, [[]] * 3)
    (shares,) = drawn.shares
    torch.testing.assert_close(shares[:, :5], sampling.shares(logits))
    assert shares.shape == (3, 7) and not shares[:, 5:].any()
    assert drawn.chances == pytest.approx([float(shares[row, token]) for row, token in enumerate(drawn.tokens)])
    drafted = Drafted.nothing(3)
    for _ in range(2):
        drafted.add(greedy)
    assert drafted.count == 2 and drafted.tokens[1] == greedy.tokens[1:2] * 2
    assert drafted.chances[2] == greedy.chances[2:] * 2
