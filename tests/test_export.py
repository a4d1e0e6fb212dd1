"""The way out to servers: transformers opens the folder, and its tokenizer, template and greedy text are ours."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import pydoc_data.topics
import random
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import nano, random_model

from dsv3_mini import from_pretrained, generate, save_pretrained
from dsv3_mini.cli import main
from dsv3_mini.config import ModelConfig
from dsv3_mini.data.bpe import train_bpe
from dsv3_mini.data.deepseek_tokenizer import read_tokenizer_json
from dsv3_mini.data.hf_tokenizer import CHAT_TEMPLATE, merges, tokenizer_json
from dsv3_mini.data.shipped import shipped
from dsv3_mini.data.stories import HELD_OUT_SEED, generate_story
from dsv3_mini.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from dsv3_mini.errors import CheckpointError, ConfigError, DataError
from dsv3_mini.hub.export import export_pretrained

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads wait for one another, and the texts are small


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer.shipped()


@pytest.fixture(scope="module")
def folder(ours: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, exported."""
    path = tmp_path_factory.mktemp("export") / "tiny"
    export_pretrained(from_pretrained(shipped("tiny")), ours, path)
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


# ---- the tokenizer -----------------------------------------------------------------------------------------------------

NASTY = [
    "", " ", "\n", "\r\n", "\t\t x", " " * 2500, "\n" * 40, " \n \n  a", "a" * 3000, "...!?).\n\n", "'s 're _x .join",
    "3.14159 12,000 ½ ² Ⅷ ٣", "你好，世界。", "ア・イ ー が e\u0301 \u0301", "🙂🏳️‍🌈👨‍👩‍👧", "\x00\x01\x7f\x85\u2028\u2029", "\u200b\ufeff\u00a0\u3000x",
    "שלום عليكم हिन्दी ไทย", "\ufffd\ue000\U0010fffd", "Ġ Ċ <0x0A> ▁", "def f(x):\n    return {'a': [x, *x]}  # ok\n\n\n",
]  # fmt: skip
fragments = st.sampled_from(
    [*SPECIAL_TOKENS, *NASTY[1:], " the", "1234567", ".\n", "):\n\n", "   \n  ", "<|", "|>", "eos"]
)
# Unassigned code points are left out: the two regex engines may know different versions of Unicode.
texts = st.lists(fragments | st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=8), max_size=12).map(
    "".join
)


def assert_alike(ours: Tokenizer, theirs: Any, text: str) -> None:
    as_text = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert as_text == ours.encode(text)
    recognised = ours.encoding.encode(text, allowed_special="all")
    assert theirs(text).input_ids == [ours.eos_id, *recognised]
    assert theirs.decode(as_text) == text


@pytest.mark.parametrize("text", NASTY)
def test_nasty_texts_have_our_ids(ours: Tokenizer, theirs: Any, text: str) -> None:
    assert_alike(ours, theirs, text)


@given(texts)
@settings(max_examples=200, deadline=None)
def test_made_up_texts_have_our_ids(ours: Tokenizer, theirs: Any, text: str) -> None:
    assert_alike(ours, theirs, text)


def test_thousands_of_texts_have_our_ids(ours: Tokenizer, theirs: Any) -> None:
    """Windows of real text (stories, code, prose), and random characters of several scripts."""
    rng = random.Random(0)
    source = "".join(generate_story(HELD_OUT_SEED, number).text for number in range(40))
    source += inspect.getsource(argparse) + "".join(pydoc_data.topics.topics.values())[:200_000]
    assigned = [
        chr(c)
        for c in (*range(0x20, 0x2000), *range(0x3000, 0x9FFF, 7), *range(0x1F300, 0x1F5FF))
        if chr(c).isprintable()
    ]
    windows = [source[at : at + rng.randint(1, 120)] for at in (rng.randrange(len(source)) for _ in range(3000))]
    windows += ["".join(rng.choices(assigned, k=rng.randint(1, 40))) for _ in range(2000)]
    ids = theirs(windows, add_special_tokens=False, split_special_tokens=True).input_ids
    assert ids == [ours.encode(window) for window in windows]
    assert theirs.batch_decode(ids) == windows


def test_the_file_read_back_is_the_same_tokenizer(ours: Tokenizer, folder: Path) -> None:
    """Our reader proves, token by token, that merging by this list is merging by these ranks."""
    back = read_tokenizer_json(folder)
    assert {token: back.encode_single_token(token) for token in ours.ranks} == {t: i for i, t in enumerate(ours.ranks)}
    assert {name: back.encode_single_token(name) for name in SPECIAL_TOKENS} == {
        n: ours.special(n) for n in SPECIAL_TOKENS
    }


@given(st.lists(st.text("ab c1.\n", min_size=1, max_size=30), min_size=1, max_size=4), st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_merges_are_those_that_training_made(lines: list[str], more: int) -> None:
    """Each pair's union is the token of its rank, and both halves are older; as many pairs as tokens of several bytes."""
    try:
        ranks = train_bpe(lines * 2, 256 + more)
    except DataError:
        return  # too little text for so many tokens
    pairs = merges(ranks)
    assert [a + b for a, b in pairs] == ranks[256:]
    assert all(max(ranks.index(a), ranks.index(b)) < ranks.index(a + b) for a, b in pairs)


def test_a_token_of_no_merge_is_refused() -> None:
    lonely = [bytes([byte]) for byte in range(256)] + [b"abc"]
    with pytest.raises(DataError, match="token b'abc' of rank 256 is made of 3 older ones"):
        tokenizer_json(Tokenizer.from_ranks(lonely))


def test_a_foreign_tokenizer_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="copy that file instead"):
        tokenizer_json(Tokenizer(read_tokenizer_json(folder)))


# ---- conversations -----------------------------------------------------------------------------------------------------

SYSTEM, ASK = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is the lamp?\n"}
ANSWER = {"role": "assistant", "content": " Under the bench."}


@pytest.mark.parametrize("messages", [[ASK], [SYSTEM, ASK], [ASK, ANSWER], [SYSTEM, ASK, ANSWER, ASK]])
def test_the_template_renders_our_chat(ours: Tokenizer, theirs: Any, messages: list[dict[str, str]]) -> None:
    asks = messages[-1] is ASK
    ids = theirs.apply_chat_template(messages, add_generation_prompt=asks, return_dict=False)
    assert ids == ours.chat(messages)
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks) == ours.decode(ids)


def test_the_rendered_text() -> None:
    """By jinja2 alone, as servers render it."""
    text = (
        jinja2.Environment()
        .from_string(CHAT_TEMPLATE)
        .render(messages=[SYSTEM, ASK, ANSWER, ASK], eos_token="<|eos_token|>", add_generation_prompt=True)
    )
    assert text == (
        "<|system|>Be brief.<|user|>Where is the lamp?\n<|assistant|> Under the bench.<|eos_token|>"
        "<|user|>Where is the lamp?\n<|assistant|>"
    )


def test_an_unknown_role_is_refused(theirs: Any) -> None:
    with pytest.raises(Exception, match="role tool must be one of system, user, assistant"):
        theirs.apply_chat_template([{"role": "tool", "content": "x"}])


# ---- the folder --------------------------------------------------------------------------------------------------------


def test_transformers_writes_our_greedy_text(ours: Tokenizer, theirs: Any, folder: Path) -> None:
    other = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = from_pretrained(folder).eval()
    story = generate_story(HELD_OUT_SEED, 3).text[:90]
    prompt = theirs(story, return_tensors="pt").input_ids
    assert prompt.tolist() == [[ours.eos_id, *ours.encode(story)]]
    text = other.generate(prompt, do_sample=False, max_new_tokens=48)
    assert text.shape[1] > prompt.shape[1] + 16
    assert torch.equal(text, generate(model, prompt, 48, stop_id=ours.eos_id))


def test_what_a_server_reads(ours: Tokenizer, theirs: Any, folder: Path) -> None:
    read = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    ids = {"bos_token_id": ours.eos_id, "eos_token_id": ours.eos_id, "pad_token_id": ours.pad_id}
    assert ids.items() <= read["config.json"].items() and ids.items() <= read["generation_config.json"].items()
    assert read["config.json"]["architectures"] == ["DeepseekV3ForCausalLM"]
    sampling = transformers.GenerationConfig.from_pretrained(folder)
    assert (sampling.do_sample, sampling.temperature, sampling.top_p) == (True, 0.6, 0.95)
    config = transformers.AutoConfig.from_pretrained(folder)
    assert isinstance(config, transformers.DeepseekV3Config) and config.dtype == torch.bfloat16
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == tuple(ids.values())
    assert theirs.model_max_length == config.max_position_embeddings == 512
    assert set(theirs.all_special_tokens) == set(SPECIAL_TOKENS)
    assert ModelConfig.from_hf(folder / "config.json") == ModelConfig.from_hf(shipped("tiny/config.json"))
    assert Tokenizer.load(folder / "tokenizer.tiktoken").ranks == ours.ranks


def test_a_tokenizer_of_another_model_leaves_nothing(ours: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size = 512 is less than the tokenizer's 4096 tokens"):
        export_pretrained(random_model(nano()), ours, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_full_disk_leaves_what_was_there(ours: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(nano(vocab_size=4096))
    save_pretrained(model, tmp_path / "out")
    before = sorted((path.name, path.read_bytes()) for path in (tmp_path / "out").iterdir())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Tokenizer, "save", full)
    with pytest.raises(CheckpointError, match="No space left"):
        export_pretrained(model, ours, tmp_path / "out", overwrite=True)
    assert sorted((path.name, path.read_bytes()) for path in (tmp_path / "out").iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- dsv3 convert ------------------------------------------------------------------------------------------------------


def test_convert_writes_a_folder_that_all_open(
    ours: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pretrained(random_model(nano(vocab_size=4096)), tmp_path / "model", torch.float32)
    ours.save(tmp_path / "model" / "tokenizer.tiktoken")
    folders = [str(tmp_path / "model"), str(tmp_path / "out")]
    assert main(["convert", *folders, "--dtype", "fp8"]) == 0
    assert "in FP8" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fp8" and config["eos_token_id"] == ours.eos_id
    sample = ["sample", "--model", str(tmp_path / "out"), "--temperature", "0", "--max-new-tokens", "3", "--mtp", "Tom"]
    assert main(sample) == 0 and capsys.readouterr().out.startswith("Tom")

    again = ["convert", *folders, "--no-mtp"]
    assert main(again) == 2 and "is not empty" in capsys.readouterr().err
    assert main([*again, "--overwrite"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["num_nextn_predict_layers"] == 0
