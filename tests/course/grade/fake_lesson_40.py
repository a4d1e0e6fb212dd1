"""A lesson's checker module, small: three exercises, the last with a property that no one notebook cell needs."""

from __future__ import annotations

import torch

from dsv3_mini.course.checks.framework import Case, Exercise, Mistake


def _matrix(generator: torch.Generator) -> tuple[torch.Tensor]:
    return (torch.randn(2, 3, generator=generator),)


def _matrix_and_weight(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, generator=generator), torch.randn(3, generator=generator)


double = Exercise("double", lambda x: 2 * x, [Case("a matrix", _matrix)], seconds=2)
scale = Exercise(
    "scale",
    lambda x, weight: x * weight,
    [Case("a matrix and a weight", _matrix_and_weight)],
    [Mistake(lambda x, weight: x + weight, "you add the weight: a weight is multiplied")],
    seconds=2,
)
total = Exercise("total", lambda x: x.sum(), [Case("a matrix", _matrix)], seconds=2)
