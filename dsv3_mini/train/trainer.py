"""The pre-training loop: one optimizer step is a page, all around it is keeping a run safe.

A run is a folder:

    RUN/config.json       the model, Hugging Face names       RUN/recipe.json   the recipe, as it was started
    RUN/log.jsonl         one line a logged step or evaluation
    RUN/checkpoints/      what it resumes from                RUN/model/        the trained model, HF layout (at the end)

A run that is killed resumes from its last checkpoint and ends with the same weights, to the bit, as one that was not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dsv3_mini.config import ModelConfig
from dsv3_mini.data.packing import inputs_and_targets
from dsv3_mini.data.stream import TokenStream
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.errors import CheckpointError, ConfigError, UserError
from dsv3_mini.files import write_text
from dsv3_mini.fp8.convert import to_fp8
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.train.balance import LoadCounter, max_violation, routers, update_biases
from dsv3_mini.train.checkpoint import checkpoint_name, checkpoints
from dsv3_mini.train.halves import Halves
from dsv3_mini.train.losses import Losses
from dsv3_mini.train.optimizer import MasterAdamW, own_piece
from dsv3_mini.train.recipe import DTYPES, Recipe
from dsv3_mini.train.replicas import ALONE, Replicas
from dsv3_mini.train.run_log import NoLog, RunLog


class Diverged(UserError):
    """A loss or a gradient is not a finite number."""


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did. Losses in nats per token; load per sparse layer; max_vio of each of them."""

    step: int
    tokens: int
    loss: float
    mtp_loss: float
    balance_loss: float
    learning_rate: float
    batch_size: int
    gamma: float
    mtp_lambda: float
    grad_norm: float
    tokens_per_second: float
    seconds: float  # of training so far, over all resumptions
    load: dict[int, list[int]] = field(repr=False)

    @property
    def max_vio(self) -> dict[int, float]:
        return {layer: max_violation(torch.tensor(load)) for layer, load in self.load.items()}

    def to_log(self) -> dict[str, Any]:
        values = {k: round(v, 6) if isinstance(v, float) else v for k, v in vars(self).items()}
        return {**values, "max_vio": {layer: round(vio, 4) for layer, vio in self.max_vio.items()}}


class Trainer:
    """A run in `folder`: started there if it is empty or absent, resumed if it holds checkpoints.

    Args:
        folder: the run's folder.
        cfg, recipe: the model and how to train it; a resumed run must be given the same.
        tokenizer: what the stream encodes with; its vocabulary must fit the model's.
        open_stream: makes the stream of rows of a given length; `TokenStream` of the recipe's mixture by default.
        device: where to train.
        replicas: the processes that share each batch; by default this one is alone.
        start: the weights and gate biases of a new run, in FP32; drawn at random by default. Adam's moments start at zero.

    Raises:
        ConfigError: tokenizer or context do not fit the model, or the folder holds another run. CheckpointError: a damaged checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        cfg: ModelConfig,
        recipe: Recipe,
        tokenizer: Tokenizer,
        open_stream: Callable[[int], TokenStream] | None = None,
        device: str = "cpu",
        replicas: Replicas = ALONE,
        start: DeepSeekV3 | None = None,
    ) -> None:
        if tokenizer.n_vocab > cfg.vocab_size:
            raise ConfigError(f"vocab_size = {cfg.vocab_size} is less than the tokenizer's {tokenizer.n_vocab} tokens")
        longest = round(max(value for piece in recipe.context.pieces for value in (piece.start, piece.end)))
        if longest > cfg.max_position_embeddings:
            raise ConfigError(
                f"max_position_embeddings = {cfg.max_position_embeddings} is less than the recipe's context of {longest}: "
                "choose another recipe, or a model that reads as far"
            )
        fewest = round(min(min(piece.start, piece.end) for piece in recipe.batch_size.pieces))
        replicas.check_batch(fewest)
        self.folder, self.cfg, self.recipe, self.tokenizer, self.device = folder, cfg, recipe, tokenizer, device
        self.replicas = replicas
        # In FP32 alone: gradients in BF16 are added up in FP32, by the optimizer, and FP8 weights are rounded once for all.
        alone = device == "cpu" and recipe.precision == "fp32" and replicas.count == 1
        self.halves = Halves(torch.get_num_threads() if alone else 1, cfg.hidden_size)
        self._open_stream = open_stream or self._default_stream
        self._refuse_other_run()
        torch.manual_seed(recipe.seed)
        # Masters are taken from the FP32 initialisation, so that FP32 and BF16 runs start from the same weights.
        model = DeepSeekV3(cfg).to(device)
        if start is not None:
            model.load_state_dict(start.state_dict())
        elif recipe.head_from_embedding:
            with torch.no_grad():
                model.lm_head.weight.copy_(model.embed_tokens.weight)
        fp8 = recipe.precision == "fp8"
        # The twin's linears stay FP32 in `to`: they are their own masters, and what they multiply is rounded to FP8.
        dtype = DTYPES[recipe.precision]
        self.model, masters = replicas.divide(to_fp8(model) if fp8 else model, dtype, recipe.micro_batch)
        moments = torch.bfloat16 if fp8 else torch.float32
        self.optimizer = MasterAdamW(self.model, recipe.betas, recipe.weight_decay, recipe.ema_decay, masters, moments)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.stream = self._open_stream(round(recipe.context(0)))
        self.last_saved: Path | None = None
        self._average: dict[str, Tensor] | None = None  # while observers evaluate
        found = checkpoints(folder)
        if found:
            self._resume(found[-1])
        if replicas.first:
            self._adopt_folder()  # last, so that a start that fails leaves nothing behind

    # ---- the step --------------------------------------------------------------------------------------------------

    def train_step(self) -> StepReport:
        """One optimizer step on the next batch, in micro-batches; afterwards every gate bias moves once."""
        recipe, began = self.recipe, time.perf_counter()
        learning_rate, gamma = recipe.learning_rate(self.tokens), recipe.gamma(self.tokens)
        mtp_lambda, batch_size = recipe.mtp_lambda(self.tokens), round(recipe.batch_size(self.tokens))
        rows = self._next_rows(batch_size).to(self.device)
        _, all_targets = inputs_and_targets(rows, self.tokenizer.pad_id)
        counter, sums = LoadCounter(), torch.zeros(3, device=self.device)

        def learn(part: Int[Tensor, "b s1"]) -> Losses:
            inputs, targets = inputs_and_targets(part, self.tokenizer.pad_id)
            losses = self.replicas.losses(
                self.model, inputs, targets, mtp_lambda, recipe.alpha, batch_targets=all_targets
            )
            self._require_finite(losses.total, "loss")
            losses.total.backward()
            return losses

        parts = self.replicas.own_parts(rows, recipe.micro_batch)
        for number, part in enumerate(parts, start=1):
            self.replicas.before_micro_batch(self.model, last=number == len(parts))
            for losses in self.halves.map(learn, part):
                counter.add(losses.routing)
                sums += torch.stack([losses.main, losses.mtp, losses.balance])
            self.optimizer.collect_gradients()
        if self.replicas.count > 1:
            self.replicas.sum_gradients(self.optimizer.gradients(resting=None if mtp_lambda else "mtp."))
            self.replicas.add_up([sums])
            self.replicas.add_up(list(counter.load.values()))
        grad_norm = self.replicas.clip_gradients(self.optimizer, recipe.clip_norm)
        self._require_finite(grad_norm, "gradient norm")
        self.optimizer.step(learning_rate)
        update_biases(self.model, counter.load, gamma)
        self.step += 1
        self.tokens += rows.shape[0] * (rows.shape[1] - 1)
        main, mtp, balance = sums.tolist()
        took = time.perf_counter() - began
        self.seconds += took
        speed = rows.shape[0] * (rows.shape[1] - 1) / took
        load = {layer: counted.tolist() for layer, counted in counter.load.items()}
        return StepReport(self.step, self.tokens, main, mtp, balance, learning_rate, batch_size, gamma, mtp_lambda,
                          float(grad_norm), speed, self.seconds, load)  # fmt: skip

    def run(self, observers: Iterable[Observer] = (), should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Train to the recipe's end, or until `should_stop` says so; either way the run is saved. True if at the end.

        What observers return when an evaluation is due is logged. Of several processes the first one writes and evaluates.
        """
        observers = list(observers)
        with RunLog(self.folder / "log.jsonl", self.step) if self.replicas.first else NoLog() as log:
            while self.tokens < self.recipe.total_tokens and not self.replicas.anyone(should_stop()):
                before = self.tokens
                report = self.train_step()
                if report.step % self.recipe.log_every == 0 or report.step == 1:
                    log.write({"kind": "step", **report.to_log()})
                for observer in observers:
                    observer.on_step(report)
                done = self.tokens >= self.recipe.total_tokens
                if done or _crossed(before, self.tokens, self.recipe.evaluate_every):
                    self._average = self.averaged_weights()
                    scores = {k: v for observer in observers for k, v in observer.evaluate(self).items()}
                    self._average = None
                    log.write({"kind": "evaluation", "step": self.step, "tokens": self.tokens, **scores})
                    for observer in observers:
                        observer.on_evaluation(scores)
                if not done and _crossed(before, self.tokens, self.recipe.checkpoint_every):
                    self._save()
        if self.last_saved is None or self.last_saved.name != checkpoint_name(self.step):
            self._save()
        self.replicas.settle()
        return self.tokens >= self.recipe.total_tokens

    def _next_rows(self, batch_size: int) -> Int[Tensor, "b s1"]:
        context = round(self.recipe.context(self.tokens))
        if context != self.stream.seq_len:
            longer = self._open_stream(context)
            longer.follow(self.stream)
            self.stream.close()
            self.stream = longer
        return self.stream.next_batch(batch_size)

    def _default_stream(self, context: int) -> TokenStream:
        return TokenStream(self.tokenizer, context, self.recipe.mixture, seed=self.recipe.seed)

    def _require_finite(self, value: Tensor, what: str) -> None:
        if torch.isfinite(value):
            return
        culprit = first_not_finite(self.model, self.optimizer.masters)
        last = checkpoints(self.folder)
        good = f"the last good checkpoint is {last[-1]}" if last else "no checkpoint was written yet"
        raise Diverged(
            f"step {self.step + 1}: {what} is {value.item()}, first seen in {culprit}: training stopped; {good}. "
            "Lower the learning rate, or look at the data of this step"
        )

    # ---- keeping it safe -------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Write a checkpoint of this moment; several processes call this together. Returns its folder."""
        folder = self._save()
        self.replicas.settle()
        return folder

    def _save(self) -> Path:
        """As `save`, but where weights are shared the writing may go on beside the next steps."""
        tensors = self.optimizer.tensors()
        for router in routers(self.model):
            if router.e_score_correction_bias is not None:
                tensors[f"gate_bias.{router.layer}"] = router.e_score_correction_bias
        tensors["rng"] = torch.get_rng_state()
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "context": self.stream.seq_len,
            "stream": self.stream.state_dict(),
        }
        self.replicas.save(self.folder, self.step, tensors, state)
        self.last_saved = self.folder / "checkpoints" / checkpoint_name(self.step)
        return self.last_saved

    def _resume(self, folder: Path) -> None:
        checkpoint = self.replicas.load(folder)
        self.optimizer.load_tensors(checkpoint)
        for router in routers(self.model):
            bias = router.e_score_correction_bias
            if bias is not None:
                bias.copy_(checkpoint.tensor(f"gate_bias.{router.layer}", bias.shape))
        torch.set_rng_state(checkpoint.tensor("rng", torch.get_rng_state().shape))
        state = checkpoint.state
        whole = all(type(state[name]) is int and state[name] >= 0 for name in ("step", "tokens", "context"))
        if not (whole and isinstance(state["seconds"], (int, float)) and isinstance(state["stream"], dict)):
            raise CheckpointError(
                f"{folder / 'state.json'}: step, tokens, seconds and context must be numbers, stream an object: "
                f"remove {folder.name} to resume from the one before"
            )
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        if state["context"] != self.stream.seq_len:
            self.stream = self._open_stream(state["context"])
        self.stream.load_state_dict(state["stream"])
        self.last_saved = folder

    def averaged_weights(self) -> dict[str, Tensor]:
        """The moving average of the weights, whole; of several processes, which call this together, only in the first."""
        own = self.optimizer.ema or {name: master.detach() for name, master in self.optimizer.masters.items()}
        whole = self.replicas.whole(own)
        return whole if self.replicas.first else {}

    def averaged_model(self) -> DeepSeekV3:
        """A copy of the model, in FP32, with the moving average of the weights and the biases of now.

        It takes `averaged_weights`, in which all processes must join, unless an observer asks, for whom they have.
        """
        weights = self._average or self.averaged_weights()
        with torch.device("meta"):
            model = DeepSeekV3(self.cfg)
        model = model.to_empty(device=self.device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
            for name, buffer in model.named_buffers():
                buffer.copy_(self.model.get_buffer(name))
        return model.eval()

    def _refuse_other_run(self) -> None:
        """A folder that holds another run, or something that is no run, is left alone."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"{self.folder} is a file: choose another --out")
        for name, values in self._records().items():
            file = self.folder / name
            if not file.exists():
                continue
            try:
                found = dict(json.loads(file.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                raise CheckpointError(
                    f"{file} is not a JSON object: this folder cannot be resumed, choose another --out"
                ) from None
            other = next((k for k in [*values, *found] if k not in found or found[k] != values.get(k)), None)
            if other:
                raise ConfigError(
                    f"{file} is of another run ({other} differs): give the flags that it was started with, or another --out"
                )
        names = {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()
        # A run that was killed as it began has only some of these.
        begun = {suffixed for name in self._records() for suffixed in (name, f"{name}.partial")}
        if names - begun and "recipe.json" not in names:
            raise ConfigError(f"{self.folder} is not empty and holds no run: choose another --out")

    def _adopt_folder(self) -> None:
        """Note what this run is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, values in self._records().items():
            write_json(self.folder / name, values)

    def _records(self) -> dict[str, dict[str, Any]]:
        """What the two files say that tell one run from another, as JSON gives it back."""
        records = {"config.json": self.cfg.to_hf(), "recipe.json": recipe_record(self.recipe)}
        return {name: json.loads(json.dumps(values)) for name, values in records.items()}


class Observer:
    """Told of every step; asked for scores when an evaluation is due, then told all observers' scores."""

    def on_step(self, report: StepReport) -> None: ...

    def evaluate(self, trainer: Trainer) -> dict[str, Any]:
        return {}

    def on_evaluation(self, scores: dict[str, Any]) -> None: ...


def first_not_finite(model: DeepSeekV3, masters: dict[str, Tensor]) -> str:
    """The name of the first weight, else gradient, that holds a NaN or an infinity."""
    parameters = dict(model.named_parameters())
    for name, tensor in masters.items():
        if not torch.isfinite(tensor).all():
            return f"weight {name}"
    for name, tensor in masters.items():
        gradient = tensor.grad if tensor.grad is not None else parameters[name].grad
        gradient = None if gradient is None else own_piece(gradient)
        if gradient is not None and not torch.isfinite(gradient).all():
            return f"gradient of {name}"
    return "an activation (all weights and gradients are finite)"


def recipe_record(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain JSON."""

    def plain(value: Any) -> Any:
        if hasattr(value, "pieces"):
            return [[p.until if p.until < 1e300 else "end", p.start, p.end, p.shape] for p in value.pieces]
        return dict(value) if isinstance(value, dict) else value

    return {name: plain(value) for name, value in vars(recipe).items()}


def write_json(file: Path, values: dict[str, Any]) -> None:
    write_text(file, json.dumps(values, indent=2) + "\n")


def _crossed(before: int, after: int, every: int) -> bool:
    return before // every != after // every
