"""The ledger on the page: one list of sections, read by the table and by JSON alike.

A figure is a label, its number and a unit; the table writes the number in full or rounded as the unit asks, JSON keeps
the number itself.
"""

from __future__ import annotations

import dataclasses
import textwrap
from dataclasses import dataclass

from dsv3_mini.config import ModelConfig
from dsv3_mini.ledger.books import Ledger, ledger
from dsv3_mini.ledger.cost import H800_PEAK, REPORT_RUN, sustained_flops
from dsv3_mini.ledger.memory import checkpoint_bytes, training_state

WIDTH = 100
LABEL = 62  # columns for a label; the value stands right-aligned after it


@dataclass(frozen=True)
class Figure:
    """One line: `key` names it in JSON, `note` says how it comes about."""

    key: str
    label: str
    value: float
    unit: str = "count"
    note: str = ""


@dataclass(frozen=True)
class Section:
    key: str
    title: str
    figures: tuple[Figure, ...]


def ledger_text(cfg: ModelConfig, context: int = 4096, dollars_per_hour: float = 2.0) -> str:
    """The whole ledger of `cfg` as text, what `dsv3 ledger` prints.

    Raises:
        ConfigError: `context` or `dollars_per_hour` is out of range.
    """
    return render(ledger(cfg, context, dollars_per_hour=dollars_per_hour))


def to_dict(book: Ledger) -> dict[str, dict[str, object]]:
    """The config and every figure of the table, unrounded, for JSON."""
    figures: dict[str, dict[str, object]] = {"config": dataclasses.asdict(book.cfg)}
    for section in sections(book):
        figures[section.key] = {figure.key: figure.value for figure in section.figures}
    return figures


def render(book: Ledger) -> str:
    """The ledger as plain text, at most 100 columns wide."""
    lines = textwrap.wrap(", ".join(f"{name} {value}" for name, value in _config(book.cfg).items()), WIDTH)
    for section in sections(book):
        lines += ["", section.title, "-" * len(section.title)]
        for figure in section.figures:
            value = _number(figure)
            lines.append(f"  {figure.label:<{LABEL}}{value:>{WIDTH - LABEL - 2}}")
            lines += [f"      {part}" for part in textwrap.wrap(figure.note, WIDTH - 6)]
    return "\n".join(lines) + "\n"


def sections(book: Ledger) -> tuple[Section, ...]:
    return (
        _parameters(book),
        _flops(book),
        _decoding(book),
        _cache(book),
        _training_state(book),
        _speed(book),
        _report_run(book),
    )


def _parameters(book: Ledger) -> Section:
    parameters, cfg = book.parameters, book.cfg
    attention = [
        Figure(f"attention_{tensor.name}", f"  {tensor.name}  {' x '.join(map(str, tensor.shape))}", tensor.total)
        for tensor in parameters.attention.tensors
    ]
    return Section("parameters", "Parameters", (
        Figure("attention", "attention (MLA), one layer", parameters.attention.total),
        *attention,
        Figure("dense_ffn", f"dense FFN, width {cfg.intermediate_size}", parameters.dense_ffn.total),
        Figure("expert", f"one expert, width {cfg.moe_intermediate_size}", parameters.expert.total),
        Figure("shared_experts", f"shared experts, {cfg.n_shared_experts} in one", parameters.shared_experts.total),
        Figure("gate_weight", "gate weight", parameters.gate["gate"]),
        Figure("gate_bias", "gate bias (a buffer, not trained)", parameters.gate["gate bias"]),
        Figure("dense_layer", f"dense layer (of which {parameters.dense_layers})", parameters.dense_layer.trainable),
        Figure("moe_layer", f"MoE layer (of which {parameters.moe_layers}), without the gate bias", parameters.moe_layer.trainable),
        Figure("embedding", "embedding", parameters.embedding.total),
        Figure("head", "output head", parameters.head.total),
        Figure("main_trainable", "main model, trainable", parameters.main_trainable),
        Figure("main", f"main model with its {parameters.gate_biases:,} gate biases", parameters.main),
        Figure("activated", "activated per token, embedding and head counted", parameters.activated),
        Figure("activated_without_embedding", "activated per token, without the input embedding",
               parameters.activated_without_embedding),
        Figure("mtp_eh_proj", "MTP module's eh_proj", parameters.mtp_module["eh_proj"]),
        Figure("mtp_unique", f"MTP, {_plural(parameters.mtp_modules, 'module')}: unique, gate biases included",
               parameters.mtp_unique),
        Figure("mtp_shipped", "MTP as shipped, embedding and head duplicated", parameters.mtp_shipped),
        Figure("live", "the model in memory: main + unique MTP", parameters.live),
        Figure("shipped", "everything shipped", parameters.shipped),
    ))  # fmt: skip


def _flops(book: Ledger) -> Section:
    figures: list[Figure] = []
    for flops in book.flops:
        at = f"at a context of {flops.context:,}"
        figures += [
            Figure(f"train_{flops.context}", f"one trained token {at}", flops.train, "FLOP"),
            Figure(
                f"train_linear_{flops.context}", "  6N, N activated without the embedding", flops.train_linear, "FLOP"
            ),
            Figure(f"train_attention_{flops.context}", "  causal attention", flops.train_attention, "FLOP"),
            Figure(f"forward_{flops.context}", "  of these: forward", flops.forward, "FLOP"),
            Figure(f"backward_{flops.context}", "  of these: backward", flops.backward, "FLOP"),
        ]
    figures += [
        Figure("mtp_linear", "MTP adds, 6N with the shared head", book.mtp_flops.train_linear, "FLOP"),
        Figure("mtp_attention", "MTP adds, causal attention", book.mtp_flops.train_attention, "FLOP"),
    ]
    return Section("flops", "FLOPs of training, per token", tuple(figures))


def _decoding(book: Ledger) -> Section:
    decode = book.decode
    return Section("decoding", f"FLOPs of decoding one token, {decode.context:,} in the cache", (
        Figure("linear", "2N, the same in all three", decode.linear, "FLOP"),
        Figure("absorbed", "absorbed: attention on the latent itself", decode.absorbed, "FLOP"),
        Figure("expanded", "expanded: keys and values of all heads cached", decode.expanded, "FLOP"),
        Figure("re_expanded", "re-expanded: the latent up-projected at every step", decode.re_expanded, "FLOP"),
    ))  # fmt: skip


def _cache(book: Ledger) -> Section:
    cache = book.cache
    return Section("cache", f"Cache of one token, all layers, {cache.dtype.upper()}", (
        Figure("mla_numbers", "MLA: latent and rope key, numbers", cache.mla),
        Figure("mla_bytes", "MLA", cache.bytes("mla"), "bytes"),
        Figure("mha_bytes", "MHA with the same heads", cache.bytes("mha"), "bytes"),
        Figure("gqa_bytes", f"GQA with {_plural(cache.groups, 'group')}", cache.bytes("gqa"), "bytes"),
        Figure("mqa_bytes", "MQA", cache.bytes("mqa"), "bytes"),
        Figure("saving", "MHA over MLA", cache.saving, "times"),
    ))  # fmt: skip


def _training_state(book: Ledger) -> Section:
    fp8 = training_state(book.cfg, weights="fp8", moments="bf16")
    figures = [
        Figure("master", "FP32 master weights", fp8.master, "bytes"),
        Figure("gradients", "FP32 gradients", fp8.gradients, "bytes"),
        Figure("moments", "Adam's moments in BF16", fp8.moments, "bytes"),
        Figure("weights", "weights in FP8 (embedding, head, gate, norms in BF16)", fp8.weights, "bytes"),
        Figure("total", "all of it", fp8.total, "bytes"),
    ]
    for weights, moments in (("fp8", "bf16"), ("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32")):
        state = training_state(book.cfg, weights=weights, moments=moments)
        label = f"per parameter: weights {weights.upper()}, moments {moments.upper()}"
        figures.append(Figure(f"per_parameter_{weights}_{moments}", label, state.per_parameter, "bytes each"))
    figures += [
        Figure(f"checkpoint_{weights}", f"checkpoint as shipped, {weights.upper()}",
               checkpoint_bytes(book.cfg, weights=weights), "bytes")
        for weights in ("fp8", "bf16")
    ]  # fmt: skip
    return Section("training_state", "Training state (MTP included, activations not) and checkpoint", tuple(figures))


def _speed(book: Ledger) -> Section:
    cost = book.cost
    rate = sustained_flops(book.flops[0].train, cost.hours_per_trillion)
    return Section("cost", f"Cost of training this config, {cost.gpus:,} GPUs at ${cost.dollars_per_hour:g} an hour", (
        Figure("flops_per_second", "sustained per GPU (by default the report's rate on an H800)", rate, "FLOP/s"),
        Figure("utilisation", f"of an H800's {H800_PEAK / 1e12:.0f} TFLOP/s in BF16", 100 * rate / H800_PEAK, "%"),
        Figure("hours_per_trillion", "GPU hours per trillion tokens", cost.hours_per_trillion, "rounded"),
        Figure("tokens_per_second_per_gpu", "tokens per second and GPU", cost.tokens_per_second_per_gpu, "rounded"),
        Figure("tokens_per_second", "tokens per second, all GPUs", cost.tokens_per_second, "rounded"),
        Figure("days_per_trillion", "days per trillion tokens", cost.days_per_trillion, "days"),
        Figure("gpu_hours", f"GPU hours for {cost.tokens / 1e12:g} trillion tokens", cost.gpu_hours, "rounded"),
        Figure("days", "days", cost.days, "days"),
        Figure("dollars", "dollars", cost.dollars, "$"),
    ))  # fmt: skip


def _report_run(book: Ledger) -> Section:
    run, price = REPORT_RUN, book.cost.dollars_per_hour
    return Section("report_run", "The report's own run, for comparison (671B on 2,048 H800; Table 1)", (
        Figure("pre_training_hours", f"pre-training, {run.hours_per_trillion:,} GPU hours per trillion tokens",
               run.pre_training_hours, "rounded"),
        Figure("context_extension_hours", "context extension", run.context_extension_hours),
        Figure("post_training_hours", "post-training", run.post_training_hours),
        Figure("hours", "all GPU hours", run.hours, "rounded"),
        Figure("dollars", f"at ${price:g} an hour", run.hours * price, "$"),
    ))  # fmt: skip


def _config(cfg: ModelConfig) -> dict[str, object]:
    values = dataclasses.asdict(cfg)
    scaling = values.pop("rope_scaling")
    values["rope_scaling"] = "none" if scaling is None else "yarn " + " ".join(f"{k} {v}" for k, v in scaling.items())
    return values


def _number(figure: Figure) -> str:
    """A figure as the table writes it: exact where it is a count, four to five digits where it is large and a rate."""
    value = figure.value
    if figure.unit == "count":
        return f"{value:,}"
    if figure.unit == "rounded":
        return f"{value:,.0f}" if value >= 100 else f"{value:,.4g}"
    if figure.unit == "bytes":
        return f"{value:,} bytes"
    if figure.unit == "bytes each":
        return f"{value:.3f} bytes"
    if figure.unit == "$":
        return f"${value:,.0f}" if value >= 100 else f"${value:,.2g}"
    if figure.unit == "%":
        return f"{value:.1f}%"
    if figure.unit == "times":
        return f"{value:.2f}x"
    if figure.unit == "days":
        return f"{value:,.2f}" if value >= 0.01 else f"{value:.2g}"
    return _with_prefix(value, figure.unit)


def _with_prefix(value: float, unit: str) -> str:
    """250455917568 FLOP -> 250.46 GFLOP."""
    prefixes = ("", "k", "M", "G", "T", "P", "E")
    power = 0
    while value >= 1000 and power < len(prefixes) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.2f} {prefixes[power]}{unit}"


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"
