"""What a person sees while a run trains: a progress bar, the loss as a curve, the load of every expert.

On a terminal this is one panel that moves; where the output is a file it is a line now and then.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from dsv3_mini.train.trainer import Observer, StepReport, Trainer

BARS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 60


class Display(Observer):
    """Use as a context manager around `Trainer.run`."""

    def __init__(self, trainer: Trainer, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.log_every = trainer.recipe.log_every
        self.losses: list[float] = []
        self.speed = 0.0
        self.progress = Progress(
            TextColumn("{task.fields[tokens]}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        total = trainer.recipe.total_tokens
        self.task = self.progress.add_task("", total=total, completed=trainer.tokens, tokens="starting")
        self.live = (
            Live(self.progress, console=self.console, refresh_per_second=4) if self.console.is_terminal else None
        )

    def __enter__(self) -> Display:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def on_step(self, report: StepReport) -> None:
        self.losses.append(report.loss)
        self.speed = report.tokens_per_second if not self.speed else 0.95 * self.speed + 0.05 * report.tokens_per_second
        figures = (
            f"step {report.step}  {report.tokens / 1e6:.2f}M tokens  loss {report.loss:.3f}  "
            f"MTP {report.mtp_loss:.3f}  MaxVio {max(report.max_vio.values(), default=0):.2f}  {self.speed:,.0f} tokens/s"
        )
        if self.live:
            self.progress.update(self.task, completed=report.tokens, tokens=f"{report.tokens / 1e6:.2f}M tokens")
            self.live.update(
                Group(self.progress, Text(figures), Text("loss " + curve(self.losses)), *load_rows(report.load))
            )
        elif report.step % self.log_every == 0:
            self.console.print(figures)

    def on_evaluation(self, scores: dict[str, Any]) -> None:
        """Above the moving panel."""
        bits = "  ".join(f"{domain} {value:.3f}" for domain, value in scores["bits_per_byte"].items())
        self.console.print(f"bits per byte: {bits}")
        if "judged" in scores:
            judged = scores["judged"]
            self.console.print(
                f"judged: {judged['sentences_well_formed']:.0%} of sentences and {judged['well_formed']:.0%} of stories "
                f"well-formed, {judged['story_answers']:.0%} of story questions and {judged['sum_answers']:.0%} of "
                "two-digit sums right; a sample:"
            )
            self.console.print(Text(scores["sample"], style="italic"))


def curve(values: list[float], width: int = CURVE_WIDTH) -> str:
    """A line of bars: the mean of each of `width` equal stretches of values, between the least and the greatest."""
    if not values:
        return ""
    width = min(width, len(values))
    edges = [i * len(values) // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, high = min(means), max(means)
    bars = "".join(BARS[round((m - low) / max(high - low, 1e-9) * (len(BARS) - 1))] for m in means)
    return f"{bars} {means[0]:.2f} to {means[-1]:.2f}"


def load_rows(load: dict[int, list[int]]) -> list[Text]:
    """One line a layer: a bar for each expert, a half-full one for an even share."""
    rows = []
    for layer, counts in load.items():
        even = sum(counts) / len(counts) or 1
        bars = "".join(BARS[min(round(count / even * 3.5), len(BARS) - 1)] for count in counts)
        rows.append(Text(f"experts of layer {layer:2}  {bars}"))
    return rows
