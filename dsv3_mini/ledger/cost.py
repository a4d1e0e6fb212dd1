"""GPU hours, days and dollars: what a training run costs at a given speed (report Table 1).

Speed is told in GPU hours per trillion tokens, as the report does. `hours_per_trillion` turns FLOPs per token and a
sustained rate into that figure; `sustained_flops` goes back.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv3_mini.errors import ConfigError

TRILLION = 10**12
H800_PEAK = 989e12  # dense BF16 FLOP/s


@dataclass(frozen=True)
class TrainingCost:
    """The cost of `tokens` on `gpus` at `hours_per_trillion` GPU hours per trillion tokens."""

    tokens: int
    hours_per_trillion: float
    gpus: int
    dollars_per_hour: float

    @property
    def gpu_hours(self) -> float:
        return self.tokens * self.hours_per_trillion / TRILLION

    @property
    def dollars(self) -> float:
        return self.gpu_hours * self.dollars_per_hour

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return TRILLION / (self.hours_per_trillion * 3600)

    @property
    def tokens_per_second(self) -> float:
        return self.gpus * self.tokens_per_second_per_gpu

    @property
    def days_per_trillion(self) -> float:
        return self.hours_per_trillion / self.gpus / 24

    @property
    def days(self) -> float:
        return self.gpu_hours / self.gpus / 24


@dataclass(frozen=True)
class Run:
    """A whole training run as the report accounts for it: GPU hours by stage."""

    tokens: int
    hours_per_trillion: int
    gpus: int
    context_extension_hours: int
    post_training_hours: int

    @property
    def pre_training_hours(self) -> float:
        return self.tokens * self.hours_per_trillion / TRILLION

    @property
    def hours(self) -> float:
        return self.pre_training_hours + self.context_extension_hours + self.post_training_hours


REPORT_RUN = Run(
    tokens=14_800_000_000_000,
    hours_per_trillion=180_000,
    gpus=2048,
    context_extension_hours=119_000,
    post_training_hours=5_000,
)


def training_cost(
    hours_per_trillion: float = REPORT_RUN.hours_per_trillion,
    *,
    tokens: int = REPORT_RUN.tokens,
    gpus: int = REPORT_RUN.gpus,
    dollars_per_hour: float = 2.0,
) -> TrainingCost:
    """The cost of training on `tokens` tokens; the defaults are the report's pre-training.

    Raises:
        ConfigError: a figure is out of range.
    """
    for name, value, positive in (
        ("hours_per_trillion", hours_per_trillion, True),
        ("tokens", tokens, True),
        ("gpus", gpus, True),
        ("dollars_per_hour", dollars_per_hour, False),
    ):
        _require_number(name, value, positive)
    return TrainingCost(tokens, hours_per_trillion, gpus, dollars_per_hour)


def hours_per_trillion(flops_per_token: float, flops_per_second: float) -> float:
    """GPU hours per trillion tokens at a sustained rate, in FLOP/s per GPU."""
    _require_number("flops_per_token", flops_per_token, True)
    _require_number("flops_per_second", flops_per_second, True)
    return flops_per_token * TRILLION / flops_per_second / 3600


def sustained_flops(flops_per_token: float, hours_per_trillion: float) -> float:
    """FLOP/s per GPU that a speed in GPU hours per trillion tokens amounts to."""
    _require_number("flops_per_token", flops_per_token, True)
    _require_number("hours_per_trillion", hours_per_trillion, True)
    return flops_per_token * TRILLION / (hours_per_trillion * 3600)


def _require_number(name: str, value: float, positive: bool) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) != float("inf")
    if not (is_number and (value > 0 or (value == 0 and not positive))):
        raise ConfigError(f"{name} = {value!r} must be a number {'above 0' if positive else 'of at least 0'}")
