"""What lesson 13 measures of a run: against loops, and against the package's own validation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from nano_runs import MIXTURE, NANO, nano_recipe, nano_trainer, small_tokenizer
from random_models import random_model

from dsv3_mini.course.pretrain_run import (
    ROWS,
    SHAPE,
    TOKENS,
    Scores,
    apart,
    at_the_start,
    domain_loads,
    read_by_grammar,
    read_log,
    reference_rows,
    run_recipe,
    served,
    shipped_run,
    thinned,
)
from dsv3_mini.data.stories import HELD_OUT_SEED, generate_story
from dsv3_mini.data.stream import held_out_rows
from dsv3_mini.evaluate.bits_per_byte import held_out_loss
from dsv3_mini.train.recipe import Recipe
from dsv3_mini.train.trainer import Trainer


def test_the_run_is_the_nano_recipe_stretched() -> None:
    recipe, nano = run_recipe(), Recipe.preset("nano")
    assert recipe.total_tokens == TOKENS and recipe.mixture == nano.mixture
    for share in (0.0, 0.03, 0.3, 0.7, 0.9, 0.95, 1.0):
        for name in ("learning_rate", "batch_size", "gamma", "mtp_lambda"):
            own, other = getattr(recipe, name), getattr(nano, name)
            assert own(share * TOKENS) == pytest.approx(other(share * nano.total_tokens))
    assert SHAPE.num_nextn_predict_layers == 1 and run_recipe(10).evaluate_every == 1


def test_scores_are_those_of_the_averaged_model(tmp_path: Path) -> None:
    trainer, tokenizer = nano_trainer(tmp_path / "run", nano_recipe(steps=3)), small_tokenizer()
    trainer.train_step()
    scorer = Scores(list(MIXTURE), tokenizer, 32)
    before = torch.get_rng_state()
    scores = scorer.evaluate(trainer)
    assert torch.equal(torch.get_rng_state(), before)
    for domain in MIXTURE:
        rows = held_out_rows(domain, tokenizer, 32, ROWS)
        loss = held_out_loss(trainer.averaged_model(), rows.tokens, tokenizer.pad_id)
        assert scores["validation_loss"][domain] == pytest.approx(loss.per_token, abs=1e-4)
        assert scores["bits_per_byte"][domain] == pytest.approx(loss.bits_per_byte(rows.n_bytes), abs=1e-4)
    first = tokenizer.decode([tokenizer.encode(generate_story(HELD_OUT_SEED, 0).text)[0]])
    assert scores["sample"].startswith(first) and 0 <= scores["judged"]["sentences_well_formed"] <= 1
    assert scorer.evaluate(trainer) == scores == json.loads(json.dumps(scores))


def test_the_grammar_reads_sentence_by_sentence() -> None:
    story = generate_story(HELD_OUT_SEED, 0).text
    body = story.split("\n")[0]
    read = read_by_grammar(story)
    assert " ".join(text for text, _ in read) == body and all(right is True for _, right in read)
    broken = read_by_grammar(body[:-1] + "\nQuestion: Where?")
    assert broken[-1][1] is None and all(right for _, right in broken[:-1])
    assert read_by_grammar("Zork flew the the moon. One") == [("Zork flew the the moon.", False), ("One", None)]
    assert read_by_grammar("") == read_by_grammar("\n") == []


def test_thinning_keeps_the_ends() -> None:
    lines = [{"step": i} for i in range(1000)]
    for count in (1, 2, 5, 6, 199, 200, 201, 999, 1000):
        for most in (5, 200):
            kept = thinned(lines[:count], most)
            assert len(kept) <= most and kept[0] == lines[0] and kept[-1] == lines[count - 1]
            assert [line["step"] for line in kept] == sorted({line["step"] for line in kept})
            if count <= most:
                assert kept == lines[:count]
    assert thinned([], 5) == []


def test_the_shipped_log_has_both_kinds_of_lines(tmp_path: Path) -> None:
    lines = shipped_run()
    assert {line["kind"] for line in lines} == {"step", "evaluation"}
    file = tmp_path / "log.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_log(file) == lines


def test_loads_by_domain_are_those_of_a_loop() -> None:
    tokenizer, model = small_tokenizer(), random_model(NANO).eval()
    rows = reference_rows(tokenizer, 32, 3, ["stories", "sums"])
    loads = domain_loads(model, rows, tokenizer.pad_id)
    assert loads.shape == (2, 2, 8)
    for n, tokens in enumerate(rows.values()):
        with torch.no_grad():
            _, routings = model.main_states(tokens)
        for layer, routing in enumerate(routings):
            counts = [0] * 8
            for row, chosen in zip(tokens.tolist(), routing.chosen.tolist(), strict=True):
                for token, experts in zip(row, chosen, strict=True):
                    for expert in experts if token != tokenizer.pad_id else ():
                        counts[expert] += 1
            assert loads[n, layer].tolist() == pytest.approx([8 * count / sum(counts) for count in counts])


def test_how_far_apart_and_whom_they_serve() -> None:
    loads = torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]], [[1.0, 1.0]]])  # three domains, one layer, two experts
    assert apart(loads).tolist() == pytest.approx([(1 + 0.5 + 0.5) / 3])
    assert apart(loads[:1].expand(3, 1, 2)).tolist() == [0.0]
    shares = served(loads)
    assert shares[:, 0, 0].tolist() == pytest.approx([2 / 3, 0, 1 / 3]) and shares.sum(0).tolist() == [[1.0, 1.0]]
    assert served(torch.zeros(2, 1, 2)).tolist() == [[[0.0, 0.0]], [[0.0, 0.0]]]


def test_the_start_is_that_of_a_run(tmp_path: Path) -> None:
    recipe = nano_recipe(seed=3)
    trainer = Trainer(tmp_path / "run", NANO, recipe, small_tokenizer())
    torch.manual_seed(11)
    expected = torch.rand(2)
    torch.manual_seed(11)
    model = at_the_start(NANO, seed=3)
    assert torch.equal(torch.rand(2), expected)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    trainer.stream.close()
