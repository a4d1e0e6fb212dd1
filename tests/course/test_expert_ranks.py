"""Lesson 19's real ranks: a rank that fails is named (that they compute the right thing, the lesson's own cells assert)."""

from __future__ import annotations

import pytest
import torch

from dsv3_mini.config import ModelConfig
from dsv3_mini.course.expert_ranks import on_ranks
from dsv3_mini.errors import UserError
from dsv3_mini.model.experts import GroupedExperts


def test_a_rank_that_fails_says_why() -> None:
    experts = GroupedExperts(ModelConfig.preset("nano", n_routed_experts=8, hidden_size=8, moe_intermediate_size=4))
    tokens = {
        "x": torch.zeros(2, 8),
        "chosen": torch.zeros(2, 1).long(),
        "gates": torch.ones(2, 1),
        "weight": torch.ones(2, 8),
    }
    with pytest.raises(UserError, match="a rank failed: .*dispatch 'smoke' is not known: choose one of plain"):
        on_ranks(experts, tokens, counts=[2], layouts=[(1, "smoke")])
