"""Drafting with MTP: drafts are what the modules say in training, and the text is what it would be without them."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from chi_square import p_value
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import YARN, assert_routing_is_awake, nano, random_model, random_tokens
from torch import Tensor

from dsv3_mini import from_pretrained
from dsv3_mini.errors import ConfigError
from dsv3_mini.inference import choosing, complete, generate, speculative, stream
from dsv3_mini.inference.choosing import Drafted
from dsv3_mini.inference.settings import Settings
from dsv3_mini.inference.speculative import Drafter
from dsv3_mini.inference.writing import Counts, Writing
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.model.rope import rotations

FEW = 6  # tokens in a vocabulary so small that an untrained chain is often right, and often wrong


def few_words(modules: int = 1, **changes: Any) -> DeepSeekV3:
    # Of so few tokens the group limit has little to decide: this seed is one with which it does, whatever the modules.
    return random_model(nano(vocab_size=FEW, num_nextn_predict_layers=modules, **changes), seed=1)


def ragged(cfg: Any, lengths: list[int], seed: int = 3) -> list[list[int]]:
    return [random_tokens(cfg, 1, length, seed + i)[0].tolist() for i, length in enumerate(lengths)]


# ---- drafts ----------------------------------------------------------------------------------------------------------


class Watched:
    """Runs a Writing and keeps, for each pass, what each row's text was and what was drafted behind it."""

    def __init__(self, model: DeepSeekV3, prompts: list[list[int]], **more: Any) -> None:
        self.writing = Writing(model, prompts, Settings(use_mtp=True, **more))
        self.passes: list[tuple[list[list[int]], list[bool], Tensor]] = []
        original = Drafter.draft

        def draft(drafter: Drafter, *arguments: Any) -> Drafted:
            drafted = original(drafter, *arguments)
            texts = [p + r for p, r in zip(prompts, self.writing.rows, strict=True)]
            self.passes.append((texts, list(self.writing.ended), torch.tensor(drafted.tokens)))
            return drafted

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Drafter, "draft", draft)
            self.writing.finish()


@torch.no_grad()
def best_by_training_path(model: DeepSeekV3, text: list[int], depth: int) -> tuple[int, float]:
    """What depth `depth` says behind a text, run as in training, and by how much the choice was won."""
    logits = model(torch.tensor([text])).mtp_logits[depth - 1][0, -1]
    best = logits.topk(2)
    return int(best.indices[0]), float(best.values[0] - best.values[1])


@pytest.mark.parametrize("changes", [{}, YARN, {"kv_lora_rank": 64}], ids=["plain", "yarn", "wide latent"])
@pytest.mark.parametrize("modules", [1, 2, 3])
def test_drafts_are_what_the_chain_says_in_training(modules: int, changes: dict[str, Any]) -> None:
    """Rows of unequal lengths, that hold and refuse drafts at different times: every draft of every pass."""
    model = few_words(modules, **changes)
    prompts = ragged(model.cfg, [9, 4, 14])
    watched = Watched(model, prompts, max_new_tokens=30)
    counts, compared = watched.writing.counts, 0
    assert 0 < counts.held[0] < counts.checked[0], "drafts have to hold, and to be refused"
    for texts, ended, drafts in watched.passes:
        for text, end, row in zip(texts, ended, drafts.tolist(), strict=True):
            if end:
                continue
            for depth, draft in enumerate(row, start=1):
                expected, margin = best_by_training_path(model, text + row[: depth - 1], depth)
                if margin > 1e-4:  # closer than that, rounding may decide
                    assert draft == expected
                    compared += 1
    assert compared > 40 * modules


@torch.no_grad()
def last_module_on_and_on(model: DeepSeekV3, text: list[int], count: int) -> list[int]:
    """The last of the modules on its own states, everything run anew each time: embeddings of tokens 1.., states from 0."""
    tokens = torch.tensor([text])
    hidden = model.main_states(tokens[:, :-1])[0]
    drafts: list[int] = []
    (module,) = model.mtp
    for _ in range(count):
        read = torch.tensor([text[1:] + drafts])
        turn = rotations(model.cfg, torch.arange(read.shape[1]))
        states, _ = module(model.embed_tokens(read), hidden, turn)
        drafts.append(int(model.lm_head(states[0, -1]).argmax()))
        hidden = torch.cat([hidden, states[:, -1:]], dim=1)
    return drafts


def test_more_drafts_than_modules_come_from_the_last_one() -> None:
    model = random_model(nano(vocab_size=12))
    prompts = ragged(model.cfg, [9, 4, 14])
    watched = Watched(model, prompts, max_new_tokens=40, drafts=4)
    same = total = 0
    for texts, ended, drafts in watched.passes:
        for text, end, row in zip(texts, ended, drafts.tolist(), strict=True):
            if not end and row:
                same += row == last_module_on_and_on(model, text, len(row))
                total += 1
    assert same == total > 30


def test_fewer_drafts_than_modules_use_the_first_ones() -> None:
    model = few_words(3)
    watched = Watched(model, ragged(model.cfg, [5, 8]), max_new_tokens=12, drafts=1)
    assert max(drafts.shape[1] for _, _, drafts in watched.passes) == 1


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_chain_ends_where_its_drafts_will_hardly_all_hold(rows: int, temperature: float) -> None:
    """Asked for no number, it goes on while the shares of a row's drafts, multiplied, are a half on average; 8 drafts are the most."""
    model = random_model(nano(vocab_size=12))
    with torch.no_grad():
        model.lm_head.weight.mul_(6)  # sure of itself now and then
    prompts, passes = ragged(model.cfg, [9, 4, 14][:rows]), []
    original = Drafter.draft

    def draft(drafter: Drafter, *arguments: Any) -> Drafted:
        drafted = original(drafter, *arguments)
        passes.append((arguments[2], arguments[4], drafted))  # kept, room
        return drafted

    source = torch.Generator().manual_seed(0) if temperature else None
    how = Settings(max_new_tokens=60, use_mtp=True, temperature=temperature, generator=source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drafter, "draft", draft)
        writing = Writing(model, prompts, how).finish()
    if not temperature:
        assert writing.rows == complete(model, prompts, 60)
    for kept, room, drafted in passes:
        alive = [chances for chances, k in zip(drafted.chances, kept, strict=True) if k]
        for count in range(1, drafted.count):
            assert sum(prod(row[:count]) for row in alive) / len(alive) >= 0.5
        assert drafted.count <= room <= 8
        assert drafted.count == room or sum(prod(row) for row in alive) / len(alive) < 0.5
    assert {drafted.count for _, _, drafted in passes} >= {1, 2, 3} and max(d.count for *_, d in passes) > 4 - rows


def test_who_asks_for_a_number_of_drafts_gets_it() -> None:
    model = random_model(nano(vocab_size=12))
    assert Settings(use_mtp=True).drafts_for(model) == 8 and Settings(use_mtp=True, drafts=3).drafts_for(model) == 3
    assert Settings().drafts_for(model) == 0
    watched = Watched(model, ragged(model.cfg, [9]), max_new_tokens=30, drafts=5)
    assert {drafts.shape[1] for *_, drafts in watched.passes[:-5]} == {5}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_common_tokens_are_drafted_and_all_are_written(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of six tokens the first three: greedy the likeliest of those, and the text is the main model's own."""
    monkeypatch.setattr(speculative, "COMMON", 3)
    model = few_words(2)
    prompts = ragged(model.cfg, [9, 4, 14])
    source = torch.Generator().manual_seed(2) if temperature else None
    watched = Watched(model, prompts, max_new_tokens=30, temperature=temperature, generator=source)
    drafted = {token for _, _, drafts in watched.passes for token in drafts.flatten().tolist()}
    assert drafted == {0, 1, 2} and max(map(max, watched.writing.rows)) > 2
    if temperature == 0:
        assert watched.writing.rows == complete(model, prompts, 30)
        for texts, _, drafts in watched.passes[:3]:
            for text, row in zip(texts, drafts.tolist(), strict=True):
                logits = model(torch.tensor([text])).mtp_logits[0][0, -1]
                assert row[0] == int(logits[:3].argmax())


# ---- lossless: greedy ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modules, drafts", [(1, None), (1, 3), (2, None), (3, None), (3, 2), (2, 5)])
@pytest.mark.parametrize("changes", [{}, {"kv_lora_rank": 64}], ids=["plain", "wide latent"])
def test_greedy_text_is_the_same(modules: int, drafts: int | None, changes: dict[str, Any]) -> None:
    model = few_words(modules, **changes)
    assert_routing_is_awake(model, random_tokens(model.cfg, rows=8))
    prompts = ragged(model.cfg, [7, 1, 12, 3])
    plain = complete(model, prompts, 40)
    writing = Writing(model, prompts, Settings(max_new_tokens=40, use_mtp=True, drafts=drafts)).finish()
    assert writing.rows == plain
    counts = writing.counts
    assert counts.passes < 4 * 39 and 0 < counts.held[0] < counts.checked[0]


@settings(max_examples=15)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(1, 24), st.sampled_from([1, 2, 4]),
    st.sampled_from([1.0, 1.3, 0.8]), st.sampled_from([None, 2, (0, 3)]), st.integers(0, 1000),
)  # fmt: skip
def test_any_batch_with_and_without_drafts_is_one_prompt_at_a_time(
    lengths: list[int], new: int, drafts: int, penalty: float, stop: Any, seed: int
) -> None:
    """Ragged prompts, any number of tokens, stop tokens, a repetition penalty: token for token."""
    model = few_words(2)
    prompts = ragged(model.cfg, lengths, seed)
    common = dict(max_new_tokens=new, stop_id=stop, repetition_penalty=penalty)
    alone = [complete(model, [prompt], **common)[0] for prompt in prompts]
    assert complete(model, prompts, **common) == alone
    assert complete(model, prompts, use_mtp=True, drafts=drafts, **common) == alone


@pytest.mark.parametrize("drafts", [1, 3, 8])
def test_the_context_can_be_filled_to_its_last_token(drafts: int) -> None:
    model = few_words(max_position_embeddings=24)
    prompts = ragged(model.cfg, [5, 10])
    plain = complete(model, prompts, 14)
    assert all(len(row) == 14 for row in plain)
    assert complete(model, prompts, 14, use_mtp=True, drafts=drafts) == plain


def test_generate_and_stream_agree_and_come_as_they_are_made() -> None:
    model = few_words()
    prompts = random_tokens(model.cfg, rows=3, length=6)
    plain = generate(model, prompts, 20)
    assert torch.equal(generate(model, prompts, 20, use_mtp=True), plain)
    columns = stream(model, prompts, 20, use_mtp=True)
    for place in range(20):
        assert torch.equal(next(columns), plain[:, 6 + place])
        assert columns.counts.passes <= 3 * place  # a row's place needs no more passes than plain decoding
    assert next(columns, None) is None
    assert columns.counts.tokens == 3 * 19


def test_bf16_drafts_in_bf16() -> None:
    """Windows and single tokens round differently in BF16, so that texts may differ; they are as long, and drafts hold."""
    model = few_words().to(torch.bfloat16)
    writing = Writing(model, ragged(model.cfg, [5, 8]), Settings(max_new_tokens=30, use_mtp=True)).finish()
    assert [len(row) for row in writing.rows] == [30, 30] and writing.counts.held[0] > 0


# ---- lossless: drawn -------------------------------------------------------------------------------------------------


@torch.no_grad()
def joint_distribution(model: DeepSeekV3, prompt: list[int], length: int, shares: Any) -> Tensor:
    """The exact probability of every text of `length` tokens, in order, from the main model alone."""
    texts, chances = torch.tensor([prompt]), torch.ones(1, dtype=torch.float64)
    for _ in range(length):
        following = shares(model(texts).logits[:, -1]).double()
        chances = (chances[:, None] * following).flatten()
        texts = torch.cat([texts.repeat_interleave(FEW, 0), torch.arange(FEW).repeat(len(texts))[:, None]], dim=1)
    return chances


@pytest.mark.parametrize("modules, drafts, common", [(1, 1, 3), (2, 2, FEW), (1, 3, FEW)])
@pytest.mark.parametrize("more", [dict(temperature=1.0), dict(temperature=1.5, top_p=0.95)], ids=["plain", "top-p"])
def test_drawn_texts_have_the_distribution_of_the_main_model(
    modules: int, drafts: int, common: int, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tokens of a vocabulary of six, 216 texts: chi-square at 1%, the chance that a right sampler fails here.

    Once only three of the six tokens are drafted, and still all are written.
    """
    monkeypatch.setattr(speculative, "COMMON", common)
    model, prompt, rows = few_words(modules), [1, 4, 2, 0], 20_000
    chosen = Settings(**more, max_new_tokens=3, use_mtp=True, drafts=drafts, generator=torch.Generator().manual_seed(5))
    chances = joint_distribution(model, prompt, 3, chosen.shares)
    writing = Writing(model, [prompt] * rows, chosen).finish()
    held = writing.counts.acceptance
    assert 0.1 < held < 0.9, "drafts have to hold, and to be refused"
    first, second, third = torch.tensor(writing.rows).T
    counts = (FEW * FEW * first + FEW * second + third).bincount(minlength=FEW**3)
    assert counts[chances == 0].sum() == 0
    # Rare texts are counted together, so that each class expects at least 5.
    likely = chances * rows >= 5
    classes = torch.cat([counts[likely], counts[~likely].sum()[None]])
    wanted = torch.cat([chances[likely], chances[~likely].sum()[None]])
    if wanted[-1] * rows < 5:
        classes, wanted = classes[:-1], wanted[:-1] / wanted[:-1].sum()
    assert len(wanted) > 30
    assert p_value(classes, wanted) > 0.01


@pytest.mark.parametrize("mistake", ["accept all", "draw again from p"])
def test_the_test_tells_wrong_samplers(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepting every draft, or drawing from p and not from what is missing, must not pass the test above."""
    if mistake == "accept all":
        monkeypatch.setattr(choosing, "_first_ones", lambda holds: torch.full((len(holds),), holds.shape[1]))
    else:
        monkeypatch.setattr(choosing, "missing", lambda p, q: p)
    with pytest.raises(AssertionError):
        test_drawn_texts_have_the_distribution_of_the_main_model(1, 1, FEW, dict(temperature=1.0), monkeypatch)


def test_a_seed_gives_one_text() -> None:
    model = few_words(2)
    prompts = random_tokens(model.cfg, rows=3, length=4)
    one, two, three = (
        generate(model, prompts, 20, 1.0, generator=torch.Generator().manual_seed(seed), use_mtp=True)
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, two) and not torch.equal(one, three)


# ---- counts, and mistakes --------------------------------------------------------------------------------------------


def test_counts_by_hand() -> None:
    counts = Counts()
    counts.add(drafted=2, agreed=2, written=3)  # both held, and one more
    counts.add(drafted=2, agreed=1, written=2)  # the second was refused
    counts.add(drafted=2, agreed=0, written=1)
    counts.add(drafted=2, agreed=2, written=1)  # the text ended with the first draft: the second does not count
    assert (counts.passes, counts.tokens, counts.checked, counts.held) == (4, 7, [4, 2], [3, 1])
    assert counts.acceptance == 0.75 and counts.acceptance_at(2) == 0.5 and counts.acceptance_at(3) == 0
    assert counts.tokens_per_pass == 1.75 and counts.drafts_per_pass == 2.0
    plain = Writing(few_words(), [[1, 2]], Settings(max_new_tokens=9)).finish().counts
    assert (plain.passes, plain.tokens, plain.acceptance, plain.tokens_per_pass) == (8, 8, 0.0, 1.0)


def test_counts_of_a_chain_that_is_always_right() -> None:
    """A head of zeros with one row says one token for ever, in the main model as in MTP: every draft holds."""
    model = few_words(2)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    writing = Writing(model, [[1, 2, 3]], Settings(max_new_tokens=31, use_mtp=True)).finish()
    assert writing.rows == [[0] * 31]
    assert writing.counts.acceptance == 1.0 and writing.counts.passes == 10 and writing.counts.tokens_per_pass == 3.0


def test_drafting_takes_fewer_passes_on_the_model_that_ships() -> None:
    from dsv3_mini.bench.generate import openings
    from dsv3_mini.data.shipped import shipped

    model, prompts = from_pretrained(shipped("tiny")).eval(), openings(4, 24)
    plain = generate(model, prompts, 48)
    writing = Writing(model, prompts, Settings(max_new_tokens=48, use_mtp=True)).finish()
    assert writing.rows == plain[:, 24:].tolist()
    assert writing.counts.acceptance > 0.5 and writing.counts.tokens_per_pass > 1.5


@pytest.mark.parametrize(
    "modules, setting, words",
    [
        (0, dict(use_mtp=True), "num_nextn_predict_layers = 0"),
        (1, dict(drafts=2), "drafts = 2 needs use_mtp=True"),
        (1, dict(use_mtp=True, drafts=0), "drafts = 0 must be a whole number of at least 1"),
        (1, dict(max_new_tokens=2.5), "max_new_tokens = 2.5 must be a whole number"),
        (1, dict(temperature=1.0, generator=[torch.Generator()] * 3), "3 generators for 2 rows"),
        (1, dict(top_p=2.0), "top_p = 2.0"),
    ],
)
def test_mistakes_are_one_line(modules: int, setting: dict[str, Any], words: str) -> None:
    model = few_words(modules)
    with pytest.raises(ConfigError) as caught:
        complete(model, [[1, 2], [3]], **setting)
    assert words in str(caught.value) and "\n" not in str(caught.value)
