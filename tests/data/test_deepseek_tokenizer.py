"""The reader of tokenizer.json against the `tokenizers` library, which wrote the file and defines what it means."""

from __future__ import annotations

import copy
import json
import os
import pydoc_data.topics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, pre_tokenizers, trainers

from dsv3_mini.data.deepseek_tokenizer import byte_alphabet, load_deepseek_tokenizer, read_tokenizer_json
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.errors import DataError

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads wait for one another, and the texts are small

# The three regexes of the released DeepSeek-V3 tokenizer: numbers, Chinese and Japanese runs, everything else.
DEEPSEEK_SPLITS = [
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^"""
    "\r\n"
    r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+["
    "\r\n"
    r"]*|\s*["
    "\r\n"
    r"]+|\s+(?!\S)|\s+",
]
SPECIAL = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"]
ADDED = ["<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>", "<｜User｜>", "<｜Assistant｜>"]
OVERLAPPING = [
    AddedToken("<x", normalized=True),
    AddedToken("<xy", normalized=True),
    AddedToken("y>", normalized=False),
]

PROSE = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))[:80_000]
ASIAN = "深度求索、混合专家。トークン・アイ、こんにちは！第123章 2024年5月17日\n" * 20


def byte_level(use_regex: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def train(
    texts: list[str], vocab_size: int, steps: list[pre_tokenizers.PreTokenizer], special: list[str]
) -> tokenizers.Tokenizer:
    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator(texts, trainer)
    return theirs


def deepseek_like() -> tokenizers.Tokenizer:
    """Small, with the released pre-tokenizer: special tokens first, then bytes and merges, then added tokens."""
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in DEEPSEEK_SPLITS]
    theirs = train([PROSE, ASIAN], 1500, [*steps, byte_level()], SPECIAL)
    theirs.add_tokens([AddedToken(name, normalized=False, special=False) for name in ADDED])
    theirs.add_tokens(OVERLAPPING)
    return theirs


THEIRS = deepseek_like()
SPEC: dict[str, Any] = json.loads(THEIRS.to_str())


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("deepseek") / "tokenizer.json"
    THEIRS.save(str(file))
    return file


@pytest.fixture(scope="module")
def ours(path: Path) -> Any:
    return read_tokenizer_json(path)


# Code points that have a meaning in every Unicode version at hand.
fragments = st.sampled_from(
    [
        *SPECIAL,
        *ADDED,
        "<x",
        "<xy",
        "<xy>",
        "y>",
        " the",
        "1234567",
        " 12",
        "½",
        "中文",
        "ア・イ",
        "ー",
        "が",
        "\u3099",
        ".\n",
    ]
    + [
        "):\n\n",
        "  ",
        "   \n  ",
        " ",
        "\t",
        "\r\n",
        "'s",
        "_a",
        "é",
        "e\u0301",
        "\x00\x01",
        "\u200b",
        "🙂",
        "\u3000",
        "・\n",
    ]
)
texts = st.lists(fragments | st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=6), max_size=14).map(
    "".join
)


@given(texts)
@settings(max_examples=100, deadline=None)
def test_encodings_are_equal(ours: Any, text: str) -> None:
    expected = THEIRS.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, allowed_special="all") == expected
    assert ours.decode(expected) == text


@given(texts)
@settings(max_examples=100, deadline=None)
def test_cuts_are_equal_before_any_merging(ours: Any, text: str) -> None:
    split_only = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(p), "isolated") for p in DEEPSEEK_SPLITS])
    assert ours.cut(text) == [piece for piece, _ in split_only.pre_tokenize_str(text)]


def test_cutting_step_by_step_is_not_cutting_with_one_regex() -> None:
    """Why SplitEncoding exists: a piece's end counts as the text's end, and a later regex cuts what an earlier took."""
    ours = read_tokenizer_json_from(SPEC)
    assert ours.cut("abc中文 x") == ["abc", "中文", " x"]
    assert ours.cut("a   1234") == ["a", "   ", "123", "4"]
    assert ours.cut("ア・イ") == ["ア", "・", "イ"]


def test_real_text_is_equal(ours: Any) -> None:
    assert ours.encode_ordinary(PROSE + ASIAN) == THEIRS.encode(PROSE + ASIAN).ids
    assert ours.encode_batch([PROSE, ASIAN]) == [THEIRS.encode(PROSE).ids, THEIRS.encode(ASIAN).ids]
    assert ours.encode_to_numpy(PROSE).tolist() == THEIRS.encode(PROSE).ids
    again = copy.deepcopy(ours)
    assert again.encode(ASIAN + "<xy>", allowed_special="all") == THEIRS.encode(ASIAN + "<xy>").ids


@pytest.mark.parametrize(
    "steps",
    [
        [byte_level(use_regex=True)],  # GPT-2
        [pre_tokenizers.Digits(individual_digits=True), byte_level()],
        [pre_tokenizers.Digits(individual_digits=False), byte_level(use_regex=True)],
        [
            pre_tokenizers.Split(Regex("[\r\n]"), "isolated"),
            pre_tokenizers.Split(Regex(r"\s?\p{L}+"), "isolated", invert=True),
            pre_tokenizers.Split("a.", "isolated"),  # a string, not a regex
            pre_tokenizers.Digits(individual_digits=True),
            byte_level(),
        ],
        [pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\s+$"), "isolated")]), byte_level()],
    ],
)
def test_other_pre_tokenizers(steps: list[pre_tokenizers.PreTokenizer]) -> None:
    theirs = train([PROSE[:8_000]], 500, steps, [])
    ours = read_tokenizer_json_from(json.loads(theirs.to_str()))
    for text in (PROSE[20_000:20_300], ASIAN[:200], "a.b 12½3\r\n\r\n it's we'll  \n\tx ", "", " "):
        assert ours.encode_ordinary(text) == theirs.encode(text).ids
        spelled = [piece for piece, _ in theirs.pre_tokenizer.pre_tokenize_str(text)]
        assert [piece.encode() for piece in ours.cut(text)] == [bytes(byte_alphabet()[c] for c in p) for p in spelled]


def test_a_file_with_string_merges_reads_the_same(ours: Any) -> None:
    old = copy.deepcopy(SPEC)
    assert isinstance(old["model"]["merges"][0], list)
    old["model"]["merges"] = [" ".join(merge) for merge in old["model"]["merges"]]
    assert read_tokenizer_json_from(old).encode(PROSE) == ours.encode(PROSE)


# ---- merges and ranks ----------------------------------------------------------------------------------------------------


@given(st.lists(st.text("ab ", max_size=30), max_size=4), st.text("ab ", max_size=40))
@settings(max_examples=100, deadline=None)
def test_ranks_equal_merges_where_merges_crowd(corpus: list[str], text: str) -> None:
    """Two letters, long runs: every way in which merges can get into each other's way. What is read is equal."""
    theirs = train(corpus, 300, [byte_level()], [])
    assert read_tokenizer_json_from(json.loads(theirs.to_str())).encode(text) == theirs.encode(text).ids


PAIRS = ["a b", "b c", "c a", "ab c", "a bc", "bc a", "ca b", "abc a"]


@given(st.permutations(PAIRS), st.booleans(), st.data())
@settings(max_examples=100, deadline=None)
def test_any_merge_list_is_read_right_or_refused(order: list[str], shuffle: bool, data: st.DataObject) -> None:
    """Merge lists that no training gave, some with two ways to a token or ids out of order: never a wrong encoding."""
    vocab, merges = {c: i for i, c in enumerate(sorted(byte_alphabet()))}, []
    for left, right in map(str.split, order):
        if left in vocab and right in vocab:
            vocab.setdefault(left + right, len(vocab))
            merges.append([left, right])
    if shuffle:
        built = list(vocab)[256:]
        vocab.update(zip(data.draw(st.permutations(built)), range(256, len(vocab)), strict=True))
    spec = {"model": {"type": "BPE", "vocab": vocab, "merges": merges}, "pre_tokenizer": json.loads(BYTE_LEVEL)}
    try:
        ours = read_tokenizer_json_from(spec)
    except DataError as error:
        assert "ids must follow the merges" in str(error)
        return
    theirs = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[tuple(merge) for merge in merges]))
    for text in data.draw(st.lists(st.text("abc", max_size=12), min_size=5)):
        assert ours.encode(text) == theirs.encode(text).ids


BYTE_LEVEL = '{"type": "ByteLevel", "add_prefix_space": false, "use_regex": false}'


def test_a_merge_list_that_ranks_cannot_express_is_refused() -> None:
    """`bc` is older than `ab`, so `abc` becomes a + bc, which the list does not merge, but ranks would."""
    vocab = {c: i for i, c in enumerate(byte_alphabet())} | {"bc": 256, "ab": 257, "abc": 258}
    merges = [["b", "c"], ["a", "b"], ["ab", "c"]]
    theirs = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[tuple(merge) for merge in merges]))
    assert theirs.encode("abc").tokens == ["a", "bc"]
    spec = {"model": {"type": "BPE", "vocab": vocab, "merges": merges}, "pre_tokenizer": json.loads(BYTE_LEVEL)}
    with pytest.raises(DataError, match="token id 258 = 'a bc' is not the next pair of model.merges"):
        read_tokenizer_json_from(spec)


def test_byte_alphabet_is_theirs() -> None:
    assert sorted(byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    text = "".join(map(chr, range(0x100)))  # U+0000 to U+00FF: bytes 0x00 to 0x7f, 0x80 to 0xbf, 0xc2, 0xc3
    (spelled, _), *_ = byte_level().pre_tokenize_str(text)
    assert bytes(byte_alphabet()[c] for c in spelled) == text.encode()


# ---- special tokens ------------------------------------------------------------------------------------------------------


def test_special_tokens_only_where_allowed(ours: Any) -> None:
    text = "a<｜User｜>b"
    user = THEIRS.token_to_id("<｜User｜>")
    assert user not in ours.encode_ordinary(text) and ours.decode(ours.encode_ordinary(text)) == text
    assert ours.encode(text, disallowed_special=()) == ours.encode_ordinary(text)
    assert ours.encode(text, allowed_special={"<｜User｜>"})[1] == user
    with pytest.raises(DataError, match="text holds the special token '<｜User｜>'"):
        ours.encode(text)
    with pytest.raises(DataError, match="text holds the special token '<｜User｜>'"):
        ours.encode(text, disallowed_special={"<｜User｜>"})


def test_where_added_tokens_overlap(ours: Any) -> None:
    """The longer one wins; but first of all those that are not "normalized", here `y>`."""
    for text, names in [("<xy", ["<xy"]), ("<xz", ["<x", "z"]), ("<xy>", ["<x", "y>"])]:
        ids = ours.encode(text, allowed_special="all")
        assert ids == [THEIRS.token_to_id(name) for name in names] == THEIRS.encode(text).ids


def test_as_a_tokenizer(path: Path) -> None:
    tokenizer = load_deepseek_tokenizer(path.parent)
    assert tokenizer.n_vocab == THEIRS.get_vocab_size()
    named = [tokenizer.eos_id, tokenizer.pad_id, tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id]
    assert named == [THEIRS.token_to_id(t) for t in (*SPECIAL[1:], ADDED[1], ADDED[0], ADDED[2])]
    assert tokenizer.encode(PROSE) == THEIRS.encode(PROSE).ids
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(b"\xff\x00 ok \xe4\xb8")) == b"\xff\x00 ok \xe4\xb8"
    ids = tokenizer.encode("It ends.\n\nHere." * 50)
    split = tokenizer.split_joined(ids, 1.0, np.random.default_rng(0))
    assert tokenizer.decode(split) == tokenizer.decode(ids) and len(split) == len(ids) + 50
    with pytest.raises(DataError, match="special token 'user' is not in this tokenizer"):
        tokenizer.chat([{"role": "user", "content": "DeepSeek's chat format is not ours"}])
    with pytest.raises(DataError, match="cannot be saved as a rank file"):
        tokenizer.save(path.parent / "ranks.tiktoken")


def test_ids_may_leave_a_gap() -> None:
    """The released vocabulary is padded, and an added token may stand anywhere behind it."""
    spec = copy.deepcopy(SPEC)
    spec["added_tokens"].append({**spec["added_tokens"][-1], "content": "<far>", "id": 5000})
    tokenizer = Tokenizer(read_tokenizer_json_from(spec))
    assert tokenizer.n_vocab == 5001 and tokenizer.special("<far>") == 5000
    assert tokenizer.encode_bytes(b".\n") == THEIRS.encode(".\n").ids and tokenizer.joined
    with pytest.raises(DataError, match="token id 4999 is not in the vocabulary"):
        tokenizer.decode([4999])


# ---- what is refused -----------------------------------------------------------------------------------------------------


def read_tokenizer_json_from(spec: Any, name: str = "tokenizer.json") -> Any:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_text(json.dumps(spec), encoding="utf-8")
        return read_tokenizer_json(Path(folder) / name)


def put(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change to the file: the field at `keys` becomes `value`."""

    def change(spec: dict[str, Any]) -> None:
        for key in keys[:-1]:
            spec = spec[key]
        spec[keys[-1]] = value

    return change


STEPS = ("pre_tokenizer", "pretokenizers")


@pytest.mark.parametrize(
    "change, words",
    [
        (put("normalizer", value={"type": "NFC"}), "normalizer = 'NFC' is not supported"),
        (
            put("normalizer", value={"type": "Sequence", "normalizers": [{"type": "NFC"}]}),
            "normalizer = 'Sequence' is not supported",
        ),
        (put("model", value=None), "model.type = None must be 'BPE'"),
        (put("model", "type", value="Unigram"), "model.type = 'Unigram' must be 'BPE'"),
        (put("model", "dropout", value=0.1), "model.dropout = 0.1 is not supported"),
        (put("model", "byte_fallback", value=True), "model.byte_fallback = True is not supported"),
        (put("model", "end_of_word_suffix", value="</w>"), "model.end_of_word_suffix = '</w>' is not supported"),
        (put("model", "vocab", value=[]), "model.vocab = 'list' must map tokens to ids"),
        (put("model", "vocab", "a", value=-1), r"model.vocab\['a'\] = -1 must be a whole number"),
        (put("model", "vocab", "a", value="7"), r"model.vocab\['a'\] = '7' must be a whole number"),
        (put("model", "vocab", "a", value=5), r"id 5 = '.' already belongs to '.'"),
        (put("model", "vocab", "<｜▁pad▁｜>", value=9), "added token '<｜▁pad▁｜>': id = 2 is 9 in model.vocab"),
        (put("model", "vocab", "alone", value=9999), "token 'alone' = 9999 is built by no merge"),
        (lambda spec: spec["model"]["vocab"].pop("Ā"), "byte 0x00 = 'Ā' is not in model.vocab"),
        (put("model", "merges", value=None), "model.merges = 'NoneType' must be a list of pairs"),
        (put("model", "merges", 3, value="one"), r"model.merges\[3\] = 'one' must be a pair of tokens"),
        (put("model", "merges", 3, value=["a", "b", "c"]), r"model.merges\[3\] = .* must be a pair of tokens"),
        (put("model", "merges", 3, value=["a", 1]), r"model.merges\[3\] = .* must be a pair of tokens"),
        (lambda spec: spec["model"]["merges"].append(["a", "☃"]), "'a ☃' = '☃' is not in model.vocab"),
        (lambda spec: spec["model"]["merges"].reverse(), "ids must follow the merges"),
        (lambda spec: spec["model"]["merges"].pop(), "is built by no merge"),
        (put("pre_tokenizer", value=None), "pre_tokenizer = None must end with ByteLevel"),
        (put("pre_tokenizer", value={"type": "Metaspace"}), "pre_tokenizer = 'Metaspace' must end with ByteLevel"),
        (put(*STEPS, 0, value={"type": "Punctuation"}), "pre_tokenizer step 'Punctuation' is not supported"),
        (put(*STEPS, 0, "behavior", value="Removed"), "Split.behavior = 'Removed' is not supported"),
        (put(*STEPS, 0, "pattern", value={"Regex": "(["}), r"pattern '\(\[' is not a regex that Python can read"),
        (put(*STEPS, 0, "pattern", value={"Regex": r"\h"}), r"uses \\h, which Python reads differently"),
        (put(*STEPS, 0, "pattern", value="x"), "Split.pattern = 'x' must hold a Regex or a String"),
        (put(*STEPS, 0, "pattern", value={"Regex": ""}), "Split.pattern = .* must hold a Regex or a String"),
        (put(*STEPS, 3, "add_prefix_space", value=True), "ByteLevel.add_prefix_space = True is not supported"),
        (put("added_tokens", value=[]), "token '<｜begin▁of▁sentence｜>' = 0 is built by no merge"),
        (put("added_tokens", value="x"), "added_tokens = 'str' must be a list"),
        (put("added_tokens", 0, value="x"), "added_tokens.content = None must be text"),
        (put("added_tokens", 0, "content", value=""), "added_tokens.content = '' must be text"),
        (put("added_tokens", 3, "id", value=None), "id = None must be a whole number"),
        (put("added_tokens", 3, "id", value=40), "id 40 = '<｜fim▁hole｜>' already belongs to"),
        (put("added_tokens", 3, "lstrip", value=True), "added token '<｜fim▁hole｜>': lstrip = True is not supported"),
        (put("added_tokens", 3, "content", value="<｜User｜>"), "added token '<｜User｜>': id = .* is its second id"),
    ],
)
def test_what_cannot_be_read_is_one_line(change: Callable[[dict[str, Any]], Any], words: str) -> None:
    spec = copy.deepcopy(SPEC)
    change(spec)
    with pytest.raises(DataError, match=words) as error:
        read_tokenizer_json_from(spec)
    assert "\n" not in str(error.value) and "tokenizer.json: " in str(error.value)


@pytest.mark.parametrize(
    "text, words", [("{", "cannot be read as JSON"), ("[]", "must hold a JSON object"), (None, "does not exist")]
)
def test_not_a_tokenizer_json(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match=words):
        read_tokenizer_json(tmp_path)
