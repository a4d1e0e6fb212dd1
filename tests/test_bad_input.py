"""Every mistake in what `dsv3` is given: exit code 2, one line that names the thing and the rule, and no file touched."""

from __future__ import annotations

import base64
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv3_mini.cli import main
from dsv3_mini.config import ModelConfig
from dsv3_mini.data.shipped import shipped
from dsv3_mini.hub import save_pretrained
from dsv3_mini.model import DeepSeekV3

NANO = ModelConfig.preset("nano")
SHARD, INDEX, NORM = "model-00001-of-00001.safetensors", "model.safetensors.index.json", "model.norm.weight"

# `run` is an ended run of exactly these flags; `out` does not exist, and must not come to be.
RUN = ["train", "--preset", "nano", "--mixture", "stories=1", "--tokens", "256", "--judge", "0", "--out"]
FRESH = ["train", "--preset", "nano", "--tokens", "256", "--judge", "0", "--out", "out"]
SAMPLE = ["sample", "--model", "model", "--seed", "1", "--max-new-tokens", "4"]
EVAL = ["eval", "--model", "model", "--samples", "0", "--rows", "2", "--context", "64"]
LEDGER = ["ledger", "--config", "config.json"]


@dataclass(frozen=True)
class World:
    """The folder that a command runs in, and what can be put there."""

    path: Path
    shelf: Path
    monkeypatch: pytest.MonkeyPatch

    def take(self, name: str) -> Path:
        """A copy of the nano model or the ended run, for a case to damage."""
        return Path(shutil.copytree(self.shelf / name, self.path / name))

    def write(self, name: str, content: str | bytes) -> None:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)


Prepare = Callable[[World], object]


@dataclass(frozen=True)
class Case:
    name: str
    arguments: list[str]
    says: tuple[str, ...]
    prepare: Prepare


CASES: list[Case] = []


def case(name: str, arguments: list[str], *says: str, given: Prepare = lambda world: None) -> None:
    """A row of the table: `given` the files, the command with `arguments` says all of `says` on one line."""
    CASES.append(Case(name, arguments, says, given))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nano model and an ended run, made once."""
    folder = tmp_path_factory.mktemp("shelf")
    torch.manual_seed(0)
    save_pretrained(DeepSeekV3(NANO), folder / "model")
    assert main([*RUN, str(folder / "run")]) == 0
    return folder


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, hidden ones too, with its bytes (None: a folder)."""
    return {str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes() for p in sorted(folder.rglob("*"))}


# ---- files to go wrong -----------------------------------------------------------------------------------------------

ABSENT = object()


def file(name: str, content: str | bytes) -> Prepare:
    return lambda world: world.write(name, content)


def config(**changes: Any) -> Prepare:
    """nano's config.json with some fields changed, or ABSENT."""
    values = {**NANO.to_hf(), **changes}
    return file("config.json", json.dumps({name: value for name, value in values.items() if value is not ABSENT}))


def ranks(change: Callable[[list[str]], list[str]]) -> Prepare:
    """The shipped tokenizer's rank file with its lines changed."""
    return lambda world: world.write(
        "ranks.tiktoken", "\n".join(change(shipped("tokenizer.tiktoken").read_text().splitlines()))
    )


def model(damage: Callable[[Path], object]) -> Prepare:
    return lambda world: damage(world.take("model"))


def run(damage: Callable[[Path], object] = lambda folder: None) -> Prepare:
    return lambda world: damage(world.take("run"))


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Prepare:
    """The model's weights in a single file, some of them changed."""

    def damage(folder: Path) -> None:
        weights = load_file(folder / SHARD)
        change(weights)
        (folder / SHARD).unlink()
        (folder / INDEX).unlink()
        save_file(weights, folder / "model.safetensors")

    return model(damage)


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def edit_json(name: str, **changes: Any) -> Callable[[Path], object]:
    return edit(name, lambda content: json.dumps({**json.loads(content), **changes}).encode())


def last_checkpoint(damage: Callable[[Path], object]) -> Prepare:
    return run(lambda folder: damage(sorted((folder / "checkpoints").iterdir())[-1]))


def longer_header(content: bytes) -> bytes:
    """The header's length, raised beyond the file's."""
    return struct.pack("<Q", len(content) * 2) + content[8:]


def other_shape(content: bytes) -> bytes:
    """A shape in the header that its bytes do not have."""
    assert content.count(b'"shape":[4096,64]') == 4, "embedding and head, and MTP's copies"
    return content.replace(b'"shape":[4096,64]', b'"shape":[4096,63]', 1)


def parquet(kept: float = 1.0, **columns: list[Any]) -> Prepare:
    def write(world: World) -> None:
        world.write("rows.parquet", b"")
        pyarrow.parquet.write_table(pyarrow.table(columns), world.path / "rows.parquet")
        content = (world.path / "rows.parquet").read_bytes()
        world.write("rows.parquet", content[: int(len(content) * kept)])

    return write


def pickled(folder: Path) -> None:
    for name in (SHARD, INDEX):
        (folder / name).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")


def short_model(world: World) -> None:
    save_pretrained(DeepSeekV3(NANO.replace(vocab_size=512)), world.path / "model")


# ---- the table -------------------------------------------------------------------------------------------------------

# commands and flags
case("no command", [], "a COMMAND is missing", "train, sample, convert, eval, ledger, dry-run, grade, bench, doctor")
case("unknown command", ["trian"], "invalid choice: 'trian'", "'train'")
case("unknown flag", [*RUN, "run", "--micro-btch", "4"], "--micro-btch", "did you mean --micro-batch?", given=run())
case("a word too many", ["ledger", "671b"], "671b is not known here", "dsv3 ledger --help")
case("flag without value", [*RUN], "--out", "expected one argument")
case("both preset and config", [*LEDGER, "--preset", "nano"], "--preset", "not allowed with argument --config")
case("unknown preset", ["train", "--preset", "huge"], "--preset", "'huge'", "nano")
case("unknown recipe", [*RUN, "run", "--recipe", "fast"], "--recipe", "'fast'", "deepseek-v3", given=run())
case("no tokens", [*RUN, "run", "--tokens", "0"], "--tokens", "0 must be at least 1", given=run())
case("tokens in words", [*RUN, "run", "--tokens", "abc"], "--tokens", "'abc' is not a whole number", given=run())
case("half a token", [*RUN, "run", "--tokens", "0.5"], "--tokens", "'0.5' is not a whole number", given=run())
case("negative batch", [*RUN, "run", "--micro-batch", "-1"], "--micro-batch", "-1 must be at least 1", given=run())
case("batch beyond int64", [*RUN, "run", "--micro-batch", "9" * 30], "--micro-batch", "at most 9223372", given=run())
case("seed beyond int64", [*RUN, "run", "--seed", str(2**70)], "--seed", "must be at most", given=run())
case("no threads", [*RUN, "run", "--threads", "0"], "--threads", "0 must be at least 1", given=run())
case("a million threads", [*RUN, "run", "--threads", "1_000_000"], "--threads", "1000000 must be at most", given=run())
case("no time", [*RUN, "run", "--minutes", "0"], "--minutes", "0 must be a number of at least 0.01", given=run())
case("unknown precision", [*RUN, "run", "--precision", "fp4"], "--precision", "'fp4'", "bf16", given=run())
case("no CUDA", [*RUN, "run", "--device", "cuda"], "--device cuda is not here", "no CUDA GPU", given=run())
case("unknown device", [*RUN, "run", "--device", "meta"], "--device meta is not known", "cuda:N", given=run())
case("ledger of no context", ["ledger", "--context", "0"], "--context", "0 must be at least 1")
case(
    "negative price", ["ledger", "--dollars-per-hour", "-2"], "--dollars-per-hour", "-2 must be a number of at least 0"
)
case(
    "more than the memory",
    FRESH,
    "training this model takes 0 GB and cpu has 0 GB",
    "smaller",
    given=lambda world: world.monkeypatch.setattr("dsv3_mini.commands.train.memory", lambda: (1_000_000, None)),
)

# a model's fields, by --set
case("unknown field", ["ledger", "--set", "n_routed_exprts=8"], "n_routed_exprts", "did you mean n_routed_experts?")
case("no equals sign", ["ledger", "--set", "n_group"], "--set 'n_group' must be FIELD=VALUE")
case("no field", ["ledger", "--set", "=8"], "--set '=8' must be FIELD=VALUE")
case("a word for a number", ["ledger", "--set", "hidden_size=wide"], "hidden_size = 'wide' must be a whole number")
case("true for a number", ["ledger", "--set", "hidden_size=true"], "hidden_size = True must be a whole number")
case("a number for true", ["ledger", "--set", "norm_topk_prob=1"], "norm_topk_prob = 1 must be true or false")
case("infinity", ["ledger", "--set", "rope_theta=inf"], "rope_theta = inf must be a number above 0")
case(
    "set in training", [*RUN, "run", "--set", "n_group=3"], "n_group = 3 must divide n_routed_experts (8)", given=run()
)
case(
    "context too short for the recipe",
    [*FRESH, "--set", "max_position_embeddings=32"],
    "max_position_embeddings = 32 is less than the recipe's context of 64",
)

# a model's fields, by --config
case("no config", LEDGER, "config.json does not exist")
case(
    "config is not JSON",
    LEDGER,
    "config.json cannot be read as JSON",
    "line 1 column",
    given=file("config.json", '{"a": 1, }'),
)
case("config is not UTF-8", LEDGER, "config.json cannot be read", "utf-8", given=file("config.json", b'{"a": "\xff"}'))
case("config is a list", LEDGER, "config.json = 'list' must hold a JSON object", given=file("config.json", "[]"))
case("field is missing", LEDGER, "hidden_size is missing", given=config(hidden_size=ABSENT))
case("uneven groups", LEDGER, "n_group = 3 must divide n_routed_experts (8)", given=config(n_group=3))
case(
    "more experts than the groups hold",
    LEDGER,
    "num_experts_per_tok = 5 must be at most topk_group x group size (2 x 2 = 4)",
    given=config(num_experts_per_tok=5),
)
case("more groups than there are", LEDGER, "topk_group = 5", "at most n_group (4)", given=config(topk_group=5))
case("groups of one", LEDGER, "n_group = 8 leaves 1 expert", given=config(n_group=8, topk_group=4))
case("odd rope", LEDGER, "qk_rope_head_dim = 7 must be even", given=config(qk_rope_head_dim=7))
case("negative size", LEDGER, "vocab_size = -1 must be a whole number of at least 1", given=config(vocab_size=-1))
case("negative layers", LEDGER, "num_hidden_layers = -3", "at least 1", given=config(num_hidden_layers=-3))
case("a float for an int", LEDGER, "hidden_size = 64.0 must be a whole number", given=config(hidden_size=64.0))
case("a string for an int", LEDGER, "hidden_size = '64' must be a whole number", given=config(hidden_size="64"))
case("more dense layers than layers", LEDGER, "first_k_dense_replace = 4", "(3)", given=config(first_k_dense_replace=4))
case("another model", LEDGER, "model_type = 'llama' must be 'deepseek_v3'", given=config(model_type="llama"))
case("tied embeddings", LEDGER, "tie_word_embeddings = True must be false", given=config(tie_word_embeddings=True))
case("every second layer sparse", LEDGER, "moe_layer_freq = 2 must be 1", given=config(moe_layer_freq=2))
case("halves of rope", LEDGER, "rope_interleave = False must be true", given=config(rope_interleave=False))
case(
    "fewer key heads",
    LEDGER,
    "num_key_value_heads = 2 must equal num_attention_heads (4)",
    given=config(num_key_value_heads=2),
)
case("unknown scores", LEDGER, "scoring_func = 'tanh' must be", given=config(scoring_func="tanh"))
case(
    "unknown rope", LEDGER, "rope_scaling.type = 'llama3' must be 'yarn'", given=config(rope_scaling={"type": "llama3"})
)
case("rope is no object", LEDGER, "rope_scaling = 'yarn' must be an object", given=config(rope_scaling="yarn"))
case(
    "yarn shrinks",
    LEDGER,
    "rope_scaling.factor = 0.5 must be at least 1",
    given=config(rope_scaling={"type": "yarn", "factor": 0.5}),
)
case(
    "yarn in words",
    LEDGER,
    "rope_scaling.factor = '40' must be",
    given=config(rope_scaling={"type": "yarn", "factor": "40"}),
)
case("a run of a config without a name", ["train", "--config", "config.json"], "--out is missing", given=config())

# corpora
case("share in words", [*FRESH, "--mixture", "stories=much"], "--mixture", "'stories' is 'much'")
case("share of no number", [*FRESH, "--mixture", "stories=nan"], "--mixture: the share of 'stories' is nan", "above 0")
case("negative share", [*FRESH, "--mixture", "stories=-1,sums=2"], "--mixture: the share of 'stories' is -1", "above 0")
case("no share at all", [*FRESH, "--mixture", "stories=0"], "--mixture: the share of 'stories' is 0", "above 0")
case("corpus twice", [*FRESH, "--mixture", "stories=1,stories=2"], "--mixture", "stories stands twice")
case("empty mixture", [*FRESH, "--mixture", ""], "--mixture ''", "a corpus has no name")
case("unknown corpus", [*FRESH, "--mixture", "storis=1"], "'storis' does not exist", "did you mean stories?")
case("missing path", [*FRESH, "--mixture", "texts/a.txt"], "'texts/a.txt' does not exist", "give stories, sums")
case("no network", [*FRESH, "--mixture", "hub:owner/name"], "'hub:owner/name'", "off by default")
case("empty file", [*FRESH, "--mixture", "a.txt"], "'a.txt' is empty", given=file("a.txt", ""))
case("blank file", [*FRESH, "--mixture", "a.txt"], "'a.txt' is empty", given=file("a.txt", " \n\n \n"))
case(
    "empty folder",
    [*FRESH, "--mixture", "a"],
    "a holds no text",
    "found nothing",
    given=lambda w: (w.path / "a").mkdir(),
)
case(
    "folder of pictures", [*FRESH, "--mixture", "a"], "a holds no text", "found .png", given=file("a/b.png", b"\x89PNG")
)
case(
    "not UTF-8",
    [*FRESH, "--mixture", "a.txt"],
    "a.txt is not UTF-8",
    "0xe9 at position 3",
    given=file("a.txt", b"caf\xe9"),
)
case(
    "broken JSONL",
    [*FRESH, "--mixture", "a.jsonl"],
    "a.jsonl, line 2: not JSON",
    given=file("a.jsonl", '{"text": "one"}\n{"text": \n{"text": "three"}\n'),
)
case(
    "JSONL without text",
    [*FRESH, "--mixture", "a.jsonl"],
    "a.jsonl has no column 'text'",
    "it has 'body'",
    given=file("a.jsonl", '{"body": "one"}\n{"body": "two"}\n'),
)
case(
    "JSONL of numbers",
    [*FRESH, "--mixture", "a.jsonl", "--text-column", "n"],
    "a.jsonl, line 1: 'n' is 1, not text",
    given=file("a.jsonl", '{"n": 1}\n{"n": 2}\n'),
)
case(
    "truncated Parquet",
    [*FRESH, "--mixture", "rows.parquet"],
    "rows.parquet cannot be read as parquet",
    given=parquet(0.5, text=["one", "two"]),
)
case(
    "Parquet without text",
    [*FRESH, "--mixture", "rows.parquet"],
    "rows.parquet has no column 'text'",
    "'body'",
    given=parquet(body=["one", "two"]),
)

# tokenizers
TOKENIZER = [*FRESH, "--mixture", "stories", "--tokenizer", "ranks.tiktoken"]
SECOND = base64.b64encode(b"\x01").decode()
case("no tokenizer", TOKENIZER, "ranks.tiktoken does not exist")
case("bad base64", TOKENIZER, "ranks.tiktoken: line 3", "'!!! 2'", given=ranks(lambda x: [*x[:2], "!!! 2", *x[3:]]))
case(
    "rank twice",
    TOKENIZER,
    "ranks.tiktoken: line 4: rank 2 occurs twice",
    given=ranks(lambda x: [*x[:3], f"{SECOND} 2"]),
)
case("rank left out", TOKENIZER, "ranks.tiktoken: rank 2 is missing", given=ranks(lambda x: x[:2] + x[3:]))
case("bytes left out", TOKENIZER, "ranks.tiktoken: byte 0x", "every byte", given=ranks(lambda x: x[:9]))
case("tokenizer of nothing", TOKENIZER, "ranks.tiktoken: byte 0x00 is missing", given=ranks(lambda x: []))
case(
    "tokenizer beyond the vocabulary",
    [*FRESH, "--mixture", "stories", "--set", "vocab_size=2048"],
    "vocab_size = 2048 is less than the tokenizer's 4096 tokens",
)
case(
    "model of fewer words",
    SAMPLE,
    "vocab_size = 512 is less than the tokenizer's 4096",
    "tokenizer.tiktoken",
    given=short_model,
)
case(
    "model's own tokenizer is damaged",
    SAMPLE,
    "tokenizer.tiktoken: line 1",
    given=model(lambda folder: (folder / "tokenizer.tiktoken").write_text("rubbish")),
)

# model folders
case("no model", SAMPLE, "model is not a folder")
case("model of no name", ["sample", "--model", ""], "holds neither model.safetensors nor")
case("empty model", SAMPLE, "model holds neither model.safetensors nor", given=lambda w: (w.path / "model").mkdir())
case(
    "model without config",
    SAMPLE,
    "model has no config.json",
    given=model(lambda folder: (folder / "config.json").unlink()),
)
case("model with a bad config", SAMPLE, "n_group = 3 must divide", given=model(edit_json("config.json", n_group=3)))
case("model without index", SAMPLE, "holds neither", given=model(lambda folder: (folder / INDEX).unlink()))
case("weights cut off", SAMPLE, f"{SHARD} is cut off or damaged", given=model(edit(SHARD, lambda b: b[:-100])))
case("weights of no bytes", SAMPLE, f"{SHARD} is cut off or damaged", given=model(edit(SHARD, lambda b: b"")))
case("header too long", SAMPLE, f"{SHARD} is cut off or damaged", given=model(edit(SHARD, longer_header)))
case("header tampered with", SAMPLE, f"{SHARD} is cut off or damaged", given=model(edit(SHARD, other_shape)))
case("tensor missing", SAMPLE, f"1 missing ({NORM})", given=tensors(lambda t: t.pop(NORM)))
case("tensor too many", SAMPLE, "1 unknown (extra)", given=tensors(lambda t: t.update(extra=torch.ones(1))))
case(
    "tensor of another shape",
    SAMPLE,
    f"{NORM} [65] instead of [64]",
    given=tensors(lambda t: t.update({NORM: torch.ones(65)})),
)
case(
    "tensor of integers",
    SAMPLE,
    f"{NORM} I64",
    given=tensors(lambda t: t.update({NORM: torch.ones(64, dtype=torch.int64)})),
)
case(
    "index names a missing file",
    SAMPLE,
    "other.safetensors is missing",
    given=model(edit_json(INDEX, weight_map={NORM: "other.safetensors"})),
)
case(
    "index leads out of its folder",
    SAMPLE,
    "'../other.safetensors'",
    "in the same folder",
    given=model(edit_json(INDEX, weight_map={NORM: "../other.safetensors"})),
)
case("index without a map", SAMPLE, f"{INDEX} has no weight_map", given=model(edit(INDEX, lambda b: b"{}")))
case("pickles", SAMPLE, "pytorch_model.bin", "never opened", given=model(pickled))
case(
    "run that has not ended",
    ["sample", "--model", "run"],
    "run is a run that has not ended",
    "dsv3 train --out run",
    given=run(lambda folder: shutil.rmtree(folder / "model")),
)

# runs
case(
    "other model's run",
    [*RUN, "run", "--set", "hidden_size=32"],
    "config.json is of another run (hidden_size differs)",
    given=run(),
)
case("other recipe's run", [*RUN, "run", "--seed", "7"], "recipe.json is of another run (seed differs)", given=run())
case("other corpus's run", [*RUN, "run", "--mixture", "sums"], "another run (mixture differs)", given=run())
case(
    "folder of other things", [*RUN, "home"], "home is not empty and holds no run", given=file("home/thesis.tex", "42")
)
case("file for a folder", [*RUN, "home"], "home is a file", given=file("home", "42"))
case("folder below a file", [*RUN, "home/run"], "home/run: Not a directory", given=file("home", "42"))
case(
    "recipe is damaged",
    [*RUN, "run"],
    "recipe.json is not a JSON object",
    given=run(edit("recipe.json", lambda b: b[:40])),
)
case(
    "config is damaged",
    [*RUN, "run"],
    "config.json is not a JSON object",
    given=run(edit("config.json", lambda b: b"[1]")),
)
case(
    "checkpoint cut off",
    [*RUN, "run"],
    "state.safetensors cannot be read",
    "remove step-0000000",
    given=last_checkpoint(edit("state.safetensors", lambda b: b[:-100])),
)
case(
    "checkpoint without state",
    [*RUN, "run"],
    "state.json cannot be read",
    given=last_checkpoint(lambda folder: (folder / "state.json").unlink()),
)
case(
    "checkpoint of no step",
    [*RUN, "run"],
    "state.json: step, tokens",
    "remove step-0000000",
    given=last_checkpoint(edit_json("state.json", step="one")),
)
case(
    "checkpoint of no stream",
    [*RUN, "run"],
    "state.json: step, tokens",
    given=last_checkpoint(edit_json("state.json", stream=[1])),
)
case(
    "checkpoint of another stream",
    [*RUN, "run"],
    "stream state: format 99 is not 1",
    given=last_checkpoint(edit_json("state.json", stream={"format": 99})),
)

# prompts, samples and measuring
case("negative temperature", [*SAMPLE, "--temperature", "-0.5"], "--temperature", "-0.5 must be", given=model(str))
case("temperature of no number", [*SAMPLE, "--temperature", "nan"], "--temperature", "nan must be", given=model(str))
case("endless temperature", [*SAMPLE, "--temperature", "inf"], "--temperature", "inf must be", given=model(str))
case(
    "temperature in words",
    [*SAMPLE, "--temperature", "hot"],
    "--temperature",
    "'hot' is not a number",
    given=model(str),
)
case("no new tokens", [*SAMPLE, "--max-new-tokens", "0"], "--max-new-tokens", "0 must be at least 1", given=model(str))
case("negative seed", [*SAMPLE, "--seed", "-1"], "--seed", "-1 must be at least 0", given=model(str))
case(
    "prompt beyond the context",
    [*SAMPLE, " one two" * 200],
    "the prompt has",
    "max_position_embeddings = 256",
    given=model(str),
)
case("prompt of no text", [*SAMPLE, "caf\udce9"], "the prompt is not UTF-8", "at character 3", given=model(str))
case(
    "unknown domain",
    [*EVAL, "--domains", "stories", "story"],
    "'story' does not exist",
    "did you mean stories?",
    given=model(str),
)
case(
    "context beyond the model's",
    [*EVAL, "--context", "257"],
    "--context 257 is more than max_position_embeddings = 256",
    given=model(str),
)
case("samples from no token", [*EVAL, "--top-p", "0"], "top_p = 0.0 must be above 0", given=model(str))
case("samples from more than all", [*SAMPLE, "--top-p", "1.5"], "top_p = 1.5", "at most 1", given=model(str))
case("no rows", [*EVAL, "--rows", "0"], "--rows", "0 must be at least 1", given=model(str))
case("negative samples", [*EVAL, "--samples", "-1"], "--samples", "-1 must be at least 0", given=model(str))
case(
    "no room to judge",
    [*EVAL, "--samples", "2"],
    "--samples 2 needs a context of 288",
    "max_position_embeddings = 128",
    given=model(edit_json("config.json", max_position_embeddings=128)),
)


@pytest.mark.parametrize("bad", [pytest.param(bad, id=bad.name) for bad in CASES])
def test_a_mistake_is_one_line_and_touches_nothing(
    bad: Case, tmp_path: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bad.prepare(World(tmp_path, shelf, monkeypatch))
    before = snapshot(tmp_path)
    capsys.readouterr()
    try:
        code = main(bad.arguments)
    except SystemExit as left:  # argparse's way
        code = left.code
    said = capsys.readouterr()
    assert code == 2
    assert said.err.startswith("dsv3") and said.err.endswith("\n") and said.err.count("\n") == 1, said.err
    assert not [part for part in bad.says if part not in said.err], said.err
    assert said.out == ""
    assert snapshot(tmp_path) == before


def test_the_table_is_long_and_names_no_case_twice() -> None:
    assert len(CASES) >= 45 and len({bad.name for bad in CASES}) == len(CASES)
