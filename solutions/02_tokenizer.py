# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   dsv3:
#     title: The tokenizer
#     minutes: 75
#     after: []
#     builds: Byte-level BPE from text to tokens, the random split of joined tokens, a stream decoder that loses nothing
#     tracks: [two-days, term]
# ---

# %% [markdown] tags=["why"]
# # 02 · The tokenizer
#
# A model does not read text. It reads numbers from 0 to V - 1, where V is the size of its *vocabulary*, and a
# *tokenizer* stands between the two: it cuts a text into pieces, the *tokens*, and gives each its number, its *id*.
# Everything that the model ever sees has passed through those cuts, and some odd behaviour of large models is nothing
# but a cut in the wrong place.
#
# In this lesson you build a byte-level BPE tokenizer of the kind that DeepSeek-V3 uses: you count pairs of neighbours,
# merge them, and encode a word that was never seen before. Then you meet a bias that every such tokenizer brings along,
# measure it in a model, and write the report's remedy, the random split.
#
# The picture shows where the lesson goes. Above, the text as bytes. Below, the same text as the course's models read
# it.

# %%
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.viz.figures.tokens import tokens_figure

tokenizer = Tokenizer.shipped()
TEXT = "Nora's naïve dog counted 128 toys.\nWas the dog happy? 🙂"


def token_bytes(tokenizer, text):
    """The bytes of each token of `text`."""
    return [tokenizer.token_bytes(id_) for id_ in tokenizer.encode(text)]


cuts = {"bytes": [bytes([byte]) for byte in TEXT.encode()], "the course's tokenizer": token_bytes(tokenizer, TEXT)}
tokens_figure(cuts)

# %% [markdown]
# How to read it: a box is a token, and neighbours differ in colour. `·` is a blank, `↵` a line break, and `\xC3` a
# byte that is no character by itself.
#
# Two things to notice. The blank before a word belongs to the word's token. And at the end of the first line, the full
# stop and the line break share one token. We come back to that one.

# %% [markdown] tags=["paper"]
# ## In the report
#
# Section 4.1 ("Data Construction") has one paragraph on the tokenizer. What it says:
#
# - byte-level BPE with a vocabulary of 128K tokens, its training data chosen to compress many languages well;
# - the pre-tokenizer knows tokens that *join punctuation and line breaks*;
# - such tokens may bring a *token boundary bias* when a prompt of several lines ends without a line break. So a share
#   of them is split at random during training. The share is not told.
#
# There is no equation. There is one for comparing models with different tokenizers, which the evaluation (section 4.4)
# uses under the name bits-per-byte. With L the mean loss per token in nats, and a text of N tokens and B bytes:
#
# $$\text{bits per byte} = \frac{L}{\ln 2} \cdot \frac{N}{B}$$
#
# A tokenizer with longer tokens makes N smaller and each token harder to guess, so L grows. Loss per token compares
# nothing across tokenizers; loss per byte does.

# %% [markdown] tags=["naive"]
# ## Two naive ways
#
# **A number for each word.** Collect the words of a training text, number them, done. What share of the words of
# *other* text of the same kind has no number? We ask four kinds of text, half of each for training, half to test.

# %%
import json

from dsv3_mini.data.bpe import pre_tokenize
from dsv3_mini.data.shipped import shipped


def rows_of(name):
    with shipped(name).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


corpus = rows_of("tokenizer_corpus.jsonl")
texts = {domain: [row["text"] for row in rows_of(f"{domain}.held_out.jsonl")] for domain in ("stories", "sums")}
for domain in ("code", "prose"):
    texts[domain] = [row["text"] for row in corpus if row["domain"] == domain]

# %%
for domain, documents in texts.items():
    half = len(documents) // 2
    known = {word for text in documents[:half] for word in pre_tokenize(text)}
    other = [word for text in documents[half:] for word in pre_tokenize(text)]
    unknown = sum(word not in known for word in other) / len(other)
    print(f"{domain:8} {len(known):6,} words known, {unknown:5.1%} of other text unknown")

# %% [markdown]
# Text that a grammar made has few words. Real text never runs out of new ones: a name, a typing error, a number, a
# function that somebody wrote this morning. Each becomes `<unknown>`, and what was unknown can never be written either.
#
# **A number for each byte.** UTF-8 writes any text as bytes, of which there are 256. Nothing is ever unknown. The price
# is length: a sequence several times as long, for a model whose attention pays for every pair of places in it.

# %%
sentence = "Nora's naïve dog"
print(list(sentence.encode()))
print(f"{len(sentence)} characters, {len(sentence.encode())} bytes, {len(pre_tokenize(sentence))} words")
decoded = bytes(list(sentence.encode())).decode()
print("there and back:", decoded == sentence)

# %% [markdown]
# Byte-pair encoding (BPE) is the way between: start with the 256 bytes, so that nothing is unknown, and add the pieces
# that occur most often, so that sequences are short.
#
# ## First, cut into words
#
# Merging freely across a text would waste tokens: `dog.`, `dog,` and `dog?` would each become a token of their own. So
# a *pre-tokenizer*, one regular expression, cuts the text into words first, and **no token ever crosses a cut**. Joined
# again, the pieces are the text.

# %%
pieces = pre_tokenize("Nora's dog has 128 toys.\n\nSee:  x = f(a_b);\n")
print(pieces)
print("joined again:", "".join(pieces) == "Nora's dog has 128 toys.\n\nSee:  x = f(a_b);\n")

# %% [markdown]
# A blank goes to the word after it. A sign may take the letters after it (`'s`, `_b`). Signs take the line breaks after
# them: `.` and two breaks are one piece, and may thus become one token. Digits stand alone here, so that a tiny model
# sees the digits that it adds; DeepSeek-V3 takes them up to three at a time.

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Count the pairs
# ●○○ · 8 minutes
#
# Training text is kept as distinct words with the number of times each occurs: `words` maps a word, a tuple of token
# ids, to its count. At the start the ids are bytes, so `the` is `(116, 104, 101)`.
#
# Write `count_pairs(words)`: for each pair of neighbours `(a, b)`, how often it occurs in the whole text.
# `{(1, 2, 1): 5}` has `{(1, 2): 5, (2, 1): 5}`.
#
# <details><summary>Hint 1</summary>The neighbours of a word are <code>zip(word, word[1:])</code>.</details>
# <details><summary>Hint 2</summary>A <code>Counter</code> starts every count at 0: <code>counts[pair] += count</code>.
# </details>


# %%
def count_pairs(words: dict[tuple[int, ...], int]) -> dict[tuple[int, int], int]:
    """Words with their counts -> pairs of neighbours with theirs."""
    ### BEGIN SOLUTION: for each word and each pair of neighbours in it, add the word's count
    counts = {}
    for word, count in words.items():
        for pair in zip(word, word[1:], strict=False):
            counts[pair] = counts.get(pair, 0) + count
    return counts
    ### END SOLUTION


# %%
from dsv3_mini.course.checks import lesson_02 as check

check.count_pairs(count_pairs)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Merge a pair
# ●○○ · 10 minutes
#
# The best pair becomes a new token with an id of its own. Write `merge_pair(word, pair, token)`: the word with every
# occurrence of `pair` replaced by `token`, from left to right. `(1, 2, 3, 1, 2)` with the pair `(1, 2)` and the token
# 300 becomes `(300, 3, 300)`. A token that went into one merge cannot go into a second.
#
# <details><summary>Hint 1</summary>A <code>for</code> loop moves on by one, and here you sometimes move on by two: use
# <code>while i &lt; len(word)</code>.</details>
# <details><summary>Hint 2</summary><code>word[i : i + 2] == pair</code> is also right at the last place, where the
# slice has one item only.</details>


# %%
def merge_pair(word: tuple[int, ...], pair: tuple[int, int], token: int) -> tuple[int, ...]:
    """`word` with each `pair` replaced by `token`."""
    ### BEGIN SOLUTION: walk through the word; at a pair append the token and move on by two, else copy and move on by one
    merged, i = [], 0
    while i < len(word):
        if word[i : i + 2] == pair:
            merged.append(token)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return tuple(merged)
    ### END SOLUTION


# %%
check.merge_pair(merge_pair)

# %% [markdown]
# ## Training is these two, again and again
#
# The whole of BPE training: count, take the best pair, make it a token, merge it everywhere. Of pairs with equal counts
# we take the one with the older tokens, so that the result does not depend on the order of the text.

# %%
from collections import Counter


def train_by_hand(text, vocab_size, count_pairs, merge_pair):
    words = Counter(tuple(word.encode()) for word in pre_tokenize(text))
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < vocab_size:
        counts = count_pairs(words)
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        tokens.append(tokens[best[0]] + tokens[best[1]])
        merged = Counter()
        for word, count in words.items():
            merged[tuple(merge_pair(word, best, len(tokens) - 1))] += count
        words = merged
    return tokens


# %% [markdown]
# With your two functions inside, does it learn the same tokens as the package's trainer?

# %%
from dsv3_mini.course.lesson import same
from dsv3_mini.data.bpe import train_bpe


def by_hand(text, vocab_size):
    return train_by_hand(text, vocab_size, count_pairs, merge_pair)


some_stories = "\n".join(texts["stories"][:40])
same(by_hand, lambda text, size: train_bpe([text], size), (some_stories, 320), ("\n".join(texts["prose"][:30]), 320))

# %% [markdown]
# And what does it learn? The first tokens of a thousand stories, oldest first:

# %%
learned = train_bpe(texts["stories"], 512)
print([token.decode() for token in learned[256:280]])
print(
    "and of the course's tokenizer, a thousand merges later:", [token.decode() for token in tokenizer.ranks[1300:1306]]
)

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · Encode a word
# ●●○ · 15 minutes
#
# A token's place in the list is its *rank*: its age, counted from the oldest. `ranks` maps a token's bytes to its rank.
# To encode a word, begin with its single bytes and repeat what training did: of all neighbours whose union is a token,
# glue the two whose union has the **lowest** rank; where several have it, the leftmost. Stop when no two neighbours
# make a token.
#
# Write `encode_word(word, ranks)`: the bytes of the word's tokens. With `he` at rank 256 and `the` at 257, `b"the"`
# becomes `[b"the"]` in two merges.
#
# <details><summary>Hint 1</summary><code>parts = [word[i : i + 1] for i in range(len(word))]</code>: slices of bytes
# are bytes, while <code>word[i]</code> is a number.</details>
# <details><summary>Hint 2</summary>Put <code>ranks.get(left + right, math.inf)</code> for all neighbours into a list;
# its <code>min</code> and <code>index</code> say what to merge and where.</details>


# %%
def encode_word(word: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The tokens of one word."""
    ### BEGIN SOLUTION: from single bytes, glue the neighbours whose union has the lowest rank until no union is a token
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        unions = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in ranks]
        if not unions:
            return parts
        _, i = min(unions)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    ### END SOLUTION


# %%
check.encode_word(encode_word)

# %% [markdown]
# The result is not always the one that a person would choose. Here are a few words of the standard library, and what
# the course's tokenizer makes of them. `data` is a token, yet `database` does not begin with it: `at` is older than
# `data`, and by the time `data` could be built, its letters are taken.

# %%
ranks = {token: rank for rank, token in enumerate(tokenizer.ranks)}
print("data is a token, of rank", ranks[b"data"])
for word in ("database", "dataclasses", "determination", "textually"):
    print(f"{word:14}", [part.decode() for part in token_bytes(tokenizer, word)])

# %% [markdown] tags=["package"]
# ## The package's own
#
# `dsv3_mini/data/bpe.py` does the same. Its encoder is the one that you wrote. Its trainer is faster in one way: it
# does not count everything again after each merge, but only in the words that held the pair (their *homes*).

# %%
from dsv3_mini.course.lesson import show_source
from dsv3_mini.data.bpe import encode_with_ranks

show_source(train_bpe, encode_with_ranks)

# %%
words = sorted({word for text in texts["prose"][:300] for word in pre_tokenize(text)}, key=len)[-200:]
same(encode_word, encode_with_ranks, *[(word.encode(), ranks) for word in words])

# %% [markdown]
# Encoding a terabyte that way would take a while. `Tokenizer` hands the ranks to *tiktoken*, a library that does
# exactly this in compiled code, pre-tokenizer included. It is a file of ranks and a regex; the special tokens (end of
# text, padding, fill-in-the-middle, chat roles) come after the ranks.

# %%
show_source(Tokenizer.from_ranks, Tokenizer.encode)

# %%
for domain, documents in texts.items():
    for text in documents[:20]:
        slow = [ranks[part] for word in pre_tokenize(text) for part in encode_with_ranks(word.encode(), ranks)]
        assert tokenizer.encode(text) == slow
        assert tokenizer.decode(slow) == text
    print(f"{domain}: tiktoken gives the same ids, and they decode to the text")
print(f"{len(tokenizer.ranks):,} ranks and {tokenizer.n_vocab - len(tokenizer.ranks)} special tokens")

# %% [markdown] tags=["track:term"]
# ### The released tokenizer comes in another file
#
# The hub stores DeepSeek-V3's tokenizer as `tokenizer.json`, which lists the *merges* (which two halves make a token)
# and spells bytes as printable characters: a blank is `Ġ`. tiktoken knows ranks only, and ranks forget the halves. They
# can be found again: encode a token with the ranks *below* its own, and the two parts that are left are its halves.

# %% tags=["track:term"]
from dsv3_mini.data.deepseek_tokenizer import byte_alphabet, read_tokenizer_json

spelling = {byte: character for character, byte in byte_alphabet().items()}


def merges_of(ranks):
    """The pair that makes each token, oldest first, spelled as tokenizer.json does."""
    known, merges = {}, []
    for token, rank in ranks.items():
        if len(token) > 1:
            halves = encode_with_ranks(token, known)
            merges.append(["".join(spelling[byte] for byte in half) for half in halves])
        known[token] = rank
    return merges


# %% [markdown] tags=["track:term"]
# So our tokenizer can be written in the layout of the released one. The package's reader proves for every token that
# ranks and merges agree before it trusts such a file: a vocabulary for which they differ exists, and is refused.

# %% tags=["track:term"]
import tempfile
from pathlib import Path

from dsv3_mini.data.bpe import PATTERN

merges = merges_of(ranks)
vocab = {"".join(spelling[byte] for byte in token): rank for token, rank in ranks.items()}
cut = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated"}
steps = [cut, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]
spec = {"model": {"type": "BPE", "vocab": vocab, "merges": merges}}
spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}

# %% tags=["track:term"]
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "tokenizer.json")
    path.write_text(json.dumps(spec), encoding="utf-8")
    encoding = read_tokenizer_json(path)
print(merges[:4], "...")
print("the same ids:", all(encoding.encode_ordinary(text) == tokenizer.encode(text) for text in texts["prose"][:50]))

# %% [markdown]
# ## How large a vocabulary?
#
# A list of ranks has a lovely property: its first n tokens *are* the tokenizer that training would have stopped at with
# a vocabulary of n. So one file holds tokenizers of every size. We ask each size how many bytes a token holds on
# average, for the four kinds of text, and for a language that the training text does not contain.

# %%
from itertools import pairwise

from dsv3_mini.viz.figures.tokens import vocabulary_figure

samples = {domain: "\n".join(documents)[:60_000] for domain, documents in texts.items()}
samples["German"] = "Der Hund zählte seine Bälle und wunderte sich, dass keiner fehlte. " * 20
sizes = [256, 512, 1024, 2048, len(tokenizer.ranks)]
bytes_per_token = {domain: [] for domain in samples}
for size in sizes:
    smaller = Tokenizer.from_ranks(tokenizer.ranks[:size])
    for domain, text in samples.items():
        bytes_per_token[domain].append(len(text.encode()) / len(smaller.encode(text)))
vocabulary_figure(sizes, bytes_per_token)

# %%
gains = {domain: [after / before for before, after in pairwise(v)] for domain, v in bytes_per_token.items()}
for domain, values in bytes_per_token.items():
    print(f"{domain:8}", *(f"{value:.2f}" for value in values), "  last doubling:", f"x {gains[domain][-1]:.2f}")
dearer = bytes_per_token["prose"][-1] / bytes_per_token["German"][-1]
print(f"German needs {dearer:.1f} times the tokens of English prose for the same bytes")
assert all(gain[-1] < gain[0] for gain in gains.values())
print("each kind of text gains less from the last doubling than from the first: pass")

# %% [markdown]
# Sums stop growing first: they have few words. The other three kinds are still growing at the right end, and stand high
# because the tokenizer learnt from such text (from this very code and prose, so a new text of their kind
# would do a little worse). German it has never met. What the training text of a *tokenizer* leaves out, its readers pay
# for in every model built on it: longer sequences, more cost, less context. That is why the report chose its data for
# many languages.
#
# ## A cut in the wrong place
#
# Now to that token for the full stop and the line break. In training text, a sentence that ends a line always ends with
# the one token `.↵`. A person who types a prompt ends it with `.`, presses no return, and waits.

# %%
line = "It had been a long day.\nQuestion: Who has the potato?"
prompt = "It had been a long day."
cuts = {"as training has it": token_bytes(tokenizer, line), "as the prompt has it": token_bytes(tokenizer, prompt)}
tokens_figure(cuts, title="The same full stop, two different tokens")

# %% [markdown]
# Same text up to the full stop, other tokens. A model that was trained on the first kind has learnt that after a bare
# `.` the line *always* goes on: had it ended, the token would have been the other one. It has drawn a sound conclusion
# from the cuts, and a wrong one about the text. This is the **token boundary bias**.
#
# The report's remedy: during training, replace some of the joined tokens by their two parts, chosen at random. The
# text stays the same, and the model sees both. `tokenizer.joined` maps each joined token's id to the ids of its parts.

# %%
from dsv3_mini.data.stream import SPLIT_RATE

joined = tokenizer.joined
print("this course trains with a split rate of", SPLIT_RATE)
print(len(joined), "tokens join signs and line breaks, the oldest of them:")
for id_ in list(joined)[:4]:
    print(f"{tokenizer.token_bytes(id_)!r:10} = {[tokenizer.token_bytes(part) for part in joined[id_]]}")

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · The random split
# ●○○ · 8 minutes
#
# Write `split_joined(ids, joined, rate, rng)`: a list of ids in which each token of `joined` is replaced by its parts
# with probability `rate`, each by its own toss. `rng.random()` gives a number spread evenly from 0 to 1 (1 itself never
# comes).
#
# <details><summary>Hint 1</summary><code>rng.random() &lt; rate</code> is true with probability <code>rate</code>:
# never at 0, always at 1.</details>
# <details><summary>Hint 2</summary>The parts are a list: add them with <code>+=</code>.</details>

# %%
import random


def split_joined(ids: list[int], joined: dict[int, list[int]], rate: float, rng: random.Random) -> list[int]:
    """`ids` with each token of `joined` replaced by its parts, with probability `rate`."""
    ### BEGIN SOLUTION: for each id, add its parts if it is joined and the toss says so, else the id itself
    split = []
    for id_ in ids:
        if id_ in joined and rng.random() < rate:
            split += joined[id_]
        else:
            split.append(id_)
    return split
    ### END SOLUTION


# %%
check.split_joined(split_joined)

# %%
show_source(Tokenizer.split_joined)

# %% [markdown] tags=["experiment"]
# ## The experiment: how biased, at which rate?
#
# **What we expect.** Let p be the share of sentence ends that are line ends, and r the split rate. A line end comes
# as `.` and a break with probability r, else as one token; a sentence end inside a line always comes as a bare `.`. So
# among bare full stops, a break follows with the share
#
# $$q = \frac{r\,p}{r\,p + (1 - p)}, \qquad \text{that is} \quad \frac{q}{1 - q} = r\,\frac{p}{1 - p}$$
#
# The *odds* of a break are multiplied by r. With r = 0 the bias is total, with r = 1 it is gone (and so is the use of
# joined tokens). A small rate, such as this course's 0.1, makes a break possible, but keeps it ten times too unlikely.
#
# It could fail: if stories had other ways to end a line, or the split were not independent of what stands around. We
# count, in a thousand stories.

# %%
from dsv3_mini.viz.figures.tokens import boundary_figure, boundary_share

stories = [tokenizer.encode(text) for text in texts["stories"]]
full_stop = tokenizer.encode(".")[0]
line_end = tokenizer.encode(".\n")[0]


def share_before_a_break(rate):
    """Of all bare full stops in the split stories, the share with a line break after it."""
    rng = random.Random(0)
    after = []
    for ids in stories:
        ids = tokenizer.split_joined(ids, rate, rng)
        after += [tokenizer.token_bytes(b).startswith(b"\n") for a, b in pairwise(ids) if a == full_stop]
    return sum(after) / len(after)


# %%
# Nothing follows the last token of a story, so it is no sentence end that we can ask about.
ends = [id_ for ids in stories for id_ in ids[:-1] if id_ in (full_stop, line_end)]
truth = ends.count(line_end) / len(ends)
counted = {rate: share_before_a_break(rate) for rate in (0, 0.1, 0.25, 0.5, 0.75, 1)}
for rate, share in counted.items():
    print(f"r = {rate:<4}  predicted {boundary_share(truth, rate):.3f}  counted {share:.3f}")
assert all(abs(share - boundary_share(truth, rate)) < 0.01 for rate, share in counted.items())
print("counted within 0.01 of the prediction at every rate: pass")
boundary_figure(truth, counted)

# %% [markdown]
# ### And a trained model?
#
# The shipped model was trained with the same rate as above, r = 0.1. What does it believe after a bare full stop? There
# are two ways to ask.
#
# - **By tokens**: the probability of all tokens that begin with a break, after the bare `.`. This is what sampling
#   uses.
# - **By bytes**: step back *before* the full stop and ask for all tokens that begin with `.`, of which some go on with
#   a break. This does not depend on where the prompt happens to end: it is what the model knows about the text.
#
# We expect the formula to hold at every single place, with the belief by bytes as p and the belief by tokens as q: the
# odds fall to a tenth. Where the model is in doubt that changes everything. Where it is certain, at odds of thousands
# to one, a tenth of them is certainty still. It could fail: the model was never told the formula, and saw few splits.

# %%
import torch

import dsv3_mini as dsv3

model = dsv3.from_pretrained(shipped("tiny")).eval()


@torch.no_grad()
def next_token(text):
    """The ids of `text` after the end-of-text token, and the probabilities of what follows each: [s v]."""
    ids = [tokenizer.eos_id, *tokenizer.encode(text)]
    return ids, model(torch.tensor([ids])).logits[0].float().softmax(-1)


# %%
def begins_with(start):
    """Which tokens begin with these bytes: [v], true or false."""
    return torch.tensor([tokenizer.token_bytes(id_).startswith(start) for id_ in range(tokenizer.n_vocab)])


breaks, stops, stops_with_break = begins_with(b"\n"), begins_with(b"."), begins_with(b".\n")


# %%
def beliefs(text):
    """At each bare full stop of `text`: the belief in a line break, by tokens and by bytes."""
    ids, p = next_token(text)
    for place in (i for i, id_ in enumerate(ids) if id_ == full_stop):
        after = p[place, breaks].sum()
        as_one_token, as_two = p[place - 1, stops_with_break].sum(), p[place - 1, full_stop] * after
        yield after.item(), ((as_one_token + as_two) / p[place - 1, stops].sum()).item()


# %% [markdown]
# Two kinds of text: stories up to their last full stop, and documentation up to the first full stop that ends a line.
# Documentation is wrapped by hand, so that nobody can be sure where a line ends. (The model may have read this very
# documentation in training. That does no harm here: two of its beliefs are compared with each other.)

# %%
beginnings = {
    "stories": [text.split("\nQuestion")[0] for text in texts["stories"][:40]],
    "prose": [text[: text.find(".\n") + 1] for text in texts["prose"][:150] if text.find(".\n") < 600],
}
doubtful = {}
for domain, documents in beginnings.items():
    found = [pair for text in documents for pair in beliefs(text)]
    doubtful[domain] = [(tokens, bytes_) for tokens, bytes_ in found if 0.1 < bytes_ < 0.9]
    print(f"{domain}: {len(found)} full stops, the model is in doubt at {len(doubtful[domain])}")

# %%
from statistics import fmean, median

from dsv3_mini.viz.figures.tokens import belief_figure

by_tokens, by_bytes = zip(*doubtful["prose"], strict=True)
ratios = [q / (1 - q) / (p / (1 - p)) for q, p in doubtful["prose"]]
print(f"in doubt, the model gives a break {fmean(by_bytes):.1f} by bytes, {fmean(by_tokens):.1f} by tokens")
print(f"odds by tokens : odds by bytes = {median(ratios):.2f} (median), expected {SPLIT_RATE}")
close = SPLIT_RATE / 2 < median(ratios) < SPLIT_RATE * 2
print("within a factor of two:", "pass" if close else "not as expected")
belief_figure(by_bytes, by_tokens, SPLIT_RATE)

# %% [markdown]
# Each dot is a full stop. Without a bias the dots would lie on the dashed line; the curve is the formula, into which
# nothing of the model went. So the random split does what it was made for, a break is possible, and yet the bias is not
# undone. That would take r = 1.
#
# In the stories the model is hardly ever in doubt: their last sentences are of a kind of their own, and it knows them.
# It is the same with sums, where the line always ends after `= ?`. There the small rate is all that is needed.

# %%
after_question = []
for text in texts["sums"][:20]:
    ids, p = next_token(text.split("\n")[0])
    after_question.append(p[-1, breaks].sum().item())
likely = sum(share > 0.5 for share in after_question)
print(f"after a bare '= ?' the model expects a break in {likely} of 20 sums")

# %% [markdown]
# The second way of asking is also a remedy at the time of use, without any training: drop the prompt's last token, and
# let the model choose among the tokens that begin with its bytes. It goes by the name of *token healing*.

# %% [markdown] tags=["interactive"]
# ## Type your own
#
# Change the text, choose two tokenizers, leave the box (Tab) to see the cuts. Things to try: your own name; a number
# with many digits; a line of your own code; three blanks, then four; your language. Can you find an English word for
# which the large vocabulary needs more than four tokens?

# %%
from dsv3_mini.viz.widgets.tokens import token_explorer


def cutter(size):
    """The tokenizer of the first `size` ranks, as a function from text to the bytes of its tokens."""
    smaller = Tokenizer.from_ranks(tokenizer.ranks[:size])
    return lambda text: token_bytes(smaller, text)


cutters = {"bytes": cutter(256), "512 ranks": cutter(512), "1,024 ranks": cutter(1024)}
cutters["all ranks"] = cutter(len(tokenizer.ranks))
cutters["words, before merging"] = lambda text: [word.encode() for word in pre_tokenize(text)]
explorer = token_explorer(cutters, TEXT, first="512 ranks", second="all ranks")
explorer

# %%
before = explorer.picture.value
explorer.set(text="Ein naïver Hund.\n", first="bytes", second="words, before merging")
assert explorer.picture.value != before
for name in (explorer.values["first"], explorer.values["second"]):
    print(f"{name}: {len(cutters[name](explorer.values['text']))} tokens")

# %% [markdown]
# ## Find the bug
#
# A chat shows its answer while the model writes, token by token. Here is how many a program does it. With English it
# has worked for months. Then somebody asks for a café.


# %%
def broken_stream(tokens):
    """One piece of text for each token, to be shown as it comes."""
    return [token.decode("utf-8", errors="replace") for token in tokens]


for text in ("The dog is happy.", "Un café naïf 🙂."):
    print("".join(broken_stream(token_bytes(tokenizer, text))))

# %% [markdown] tags=["bug"]
# ### Exercise 5 · A stream that loses nothing
# ●●○ · 12 minutes
#
# Why do the marks appear, and why not in plain English? Mend it: write `stream_text(tokens)`, which takes the bytes of
# each token in turn and returns a list with one piece of text for each. The pieces joined are the text. A character
# appears in the piece of the token that completes it; until then a piece may be empty. Bytes that can never become a
# character (a model can write those) become `\ufffd`. What is incomplete when the stream ends is left out.
#
# <details><summary>Hint 1</summary>Which bytes may follow, and how many, is written in a character's first byte.
# Somebody has to remember the bytes that still wait.</details>
# <details><summary>Hint 2</summary><code>codecs.getincrementaldecoder("utf-8")(errors="replace")</code> is a decoder
# with a memory: feed it bytes, and it gives the text that is complete.</details>

# %%
import codecs


def stream_text(tokens: list[bytes]) -> list[str]:
    """One piece of text for each token; joined they are the text."""
    ### BEGIN SOLUTION: use one decoder with a memory for the whole stream, and feed it token by token
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return [decoder.decode(token) for token in tokens]
    ### END SOLUTION


# %%
check.stream_text(stream_text)

# %% [markdown] tags=["at-671b"]
# ## At 671B
#
# What a vocabulary costs in the released model. A token's id is looked up in the *embedding*, one row of width d for
# each token; at the other end the *output head*, of the same size, gives a score to each token of the vocabulary (a
# *logit*).

# %%
from dsv3_mini.ledger import REPORT_RUN, count_parameters

for name in ("tiny", "671b"):
    cfg = dsv3.ModelConfig.preset(name)
    parts = count_parameters(cfg)
    both = parts.embedding.total + parts.head.total
    print(f"{name}: {cfg.vocab_size:,} tokens x width {cfg.hidden_size:,}")
    print(f"  embedding {parts.embedding.total:,}, output head {parts.head.total:,}")
    print(f"  both are {both / parts.main:.2%} of {parts.main:,} parameters")
    print(f"  the head is {parts.head.total / parts.activated_without_embedding:.1%} of what a token activates")

# %%
large = dsv3.ModelConfig.preset("671b")
print(f"{large.vocab_size:,} = {large.vocab_size // 128:,} x 128: the matrix divides evenly among many GPUs")
print(f"an id needs {(large.vocab_size - 1).bit_length()} bits, one more than two bytes have")
print(f"{REPORT_RUN.tokens / 1e12} trillion ids of 4 bytes: {REPORT_RUN.tokens * 4 / 1e12:.0f} TB of training data")
print(f"logits of one sequence of 4,096 tokens in FP32: {4096 * large.vocab_size * 4 / 1e9:.1f} GB")
growth = len(samples["prose"].encode()) / len(tokenizer.encode(samples["prose"]))
print(f"English prose as bytes instead of our tokens: {growth:.1f} times as many steps and cache entries")

# %% [markdown]
# In a tiny model the vocabulary is a large part of everything; at 671B the experts dwarf it. That is one reason why
# large models can afford large vocabularies. What does not shrink away is the logits: lesson 13 computes the loss in
# slices, so that they never stand in memory all at once.

# %% [markdown] tags=["recap"]
# ## Three questions
#
# 1. `data` is a token. Why may `database` be encoded without it?
#
# <details><summary>Answer</summary>Encoding repeats the merges by age, not by length. An older pair inside the word
# (here <code>at</code>, then <code>ab</code>) takes letters that the younger token would have needed.</details>
#
# 2. A model was trained without the random split. Your prompt ends with a full stop, and the model never starts a
#    new line. Has it learnt too little?
#
# <details><summary>Answer</summary>No, it has learnt the cuts too well: in its training text a full stop at a line's
# end was always the joined token, so a bare one proved that the line goes on. End the prompt with the break, heal the
# boundary, or train with the split.</details>
#
# 3. Model A has a loss of 2.0 nats per token, model B of 1.8. Which one predicts text better?
#
# <details><summary>Answer</summary>Nobody can say without the tokenizers. If A's tokens hold 4.5 bytes and B's 3.8, A
# needs 2.0 / 4.5 = 0.44 nats a byte and B 1.8 / 3.8 = 0.47: A is better. Divide by ln 2 for bits per byte.</details>

# %% [markdown] tags=["next"]
# ## What is next
#
# You can turn any text into ids and back. Lesson 03 asks which text: four kinds of it, mixed, packed into rows without
# a wasted place, some documents with their middle moved to the end.
