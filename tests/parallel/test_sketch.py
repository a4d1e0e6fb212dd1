"""A layout by arithmetic against the dry run that follows every stage, and the table of clusters that ships."""

from __future__ import annotations

import pytest

from dsv3_mini.config import ModelConfig
from dsv3_mini.course.cluster import recorded
from dsv3_mini.errors import ConfigError
from dsv3_mini.parallel.dry_run import Estimate, Job, Machine, dry_run
from dsv3_mini.parallel.dry_run.scaling import SIZES, Losses, limit_of, scaling_row
from dsv3_mini.parallel.dry_run.sketch import lay_out, reached, sketch

LARGE = ModelConfig.preset("671b")


def test_reach_is_what_the_choices_say() -> None:
    nodes, gpus = reached(LARGE, 64)
    assert 3.5 < nodes <= 4 and nodes < gpus <= 8  # four groups at most, a group on each node
    assert reached(LARGE, 1) == (1.0, 1.0)
    assert reached(LARGE, 8) == (1.0, pytest.approx(nodes))  # a group on each GPU
    assert reached(LARGE, 256)[1] == 8.0  # an expert on each GPU


def test_the_wires_of_a_sketch_are_those_of_the_dry_run() -> None:
    """Of a rank with four layers; what a dry run counts besides are gradients, gathered weights and stages' messages."""
    paper = recorded()
    for row in paper["scaling"]:
        if row.gpus in (1024, 2048, 4096):
            drawn = sketch(LARGE, lay_out(LARGE, row.gpus, 16, 64), paper["kept"]["671b"])
            of_rank = row.microbatches * 4 / ((58 + 1) / 16)
            assert 0.94 < of_rank * drawn.wires.inside / row.inside <= 1
            assert 0.88 < of_rank * drawn.wires.network / row.network <= 1


def test_layouts_that_break_a_rule_say_which() -> None:
    for gpus, pp, ep, rule in ((256, 3, 8, "must divide the 256"), (2048, 32, 8, "there are 61 layers"), (16, 8, 4, "only 2 GPUs"),
                               (48, 4, 12, "n_routed_experts")):  # fmt: skip
        with pytest.raises(ConfigError, match=rule):
            lay_out(LARGE, gpus, pp, ep)


def test_the_table_that_ships_is_of_every_size_and_says_why_each_breaks() -> None:
    paper = recorded()
    rows = {row.gpus: row for row in paper["scaling"]}
    assert tuple(rows) == SIZES
    assert all("memory" in rows[gpus].limit for gpus in SIZES if rows[gpus].peak > 76e9)
    assert rows[16384].limit.startswith("batch: 2.1 times")
    assert rows[64] == scaling_row(LARGE, Machine(), 64)
    for row in rows.values():
        lost = {"traffic": row.wires, "balance": row.uneven, "bubble": row.bubble}
        assert all((word in row.limit) == (share is not None and share > 0.15) for word, share in lost.items())
        if row.measured:
            on_envelope = sketch(LARGE, lay_out(LARGE, row.gpus, row.pp, row.ep), paper["kept"]["671b"])
            assert on_envelope.peak == pytest.approx(row.peak, rel=0.1)


def test_slow_wires_are_named_as_what_holds_a_size_back() -> None:
    cfg = ModelConfig.preset("nano", vocab_size=512, num_hidden_layers=4)
    run = dry_run(Job(cfg, lay_out(cfg, 8, 2, 4, node=2), "DualPipeV", "bf16", batch=64, length=64))
    fast, slow = Machine(nvlink=1e30, ib=1e30), Machine(nvlink=1e9, ib=1e8, node=2)
    losses = {name: Losses.of(Estimate(run, machine, fused=True)) for name, machine in (("fast", fast), ("slow", slow))}
    assert losses["fast"].wires == pytest.approx(0) and losses["slow"].wires > 0.9
    assert "traffic" not in limit_of(run, fast, losses["fast"])
    assert limit_of(run, slow, losses["slow"]).startswith("traffic: ")
    # What is lost in the pipeline is its idle time, and nothing else.
    for machine in (fast, slow):
        free = Estimate(run, Machine(nvlink=1e30, ib=1e30), fused=True)
        found = Losses.of(Estimate(run, machine, fused=True))
        assert found.uneven + found.bubble == pytest.approx(free.bubble)
    assert limit_of(run, Machine(memory=1e6, reserve=0), losses["fast"]).startswith("memory: ")
