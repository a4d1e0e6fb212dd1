# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   dsv3:
#     title: Data
#     minutes: 75
#     after: [02_tokenizer]
#     builds: best-fit packing, targets, document masks, fill in the middle; the stream that feeds every later training
#     tracks: [two-days, term]
# ---

# %% [markdown] tags=["why"]
# # 03 · Data
#
# A model reads rows of tokens, and all rows of a batch have one length. Texts do not: a sum has fifty tokens, a
# function three hundred. Between the two stands a decision that nobody sees in the model's code, and that the model
# lives with for its whole life: *what stands in a row, and what may a token of it look at?*
#
# Below are twelve documents, laid into rows of 32 tokens in two ways. Above, all are written one after the other and
# the string is cut every 32 tokens; `2..` and `..2` are the two halves of document 2. A model that reads the second
# half answers for something whose beginning it never saw. Below, the same documents are packed whole.
#
# In this lesson you write the packer, the targets, the mask and the fill-in-the-middle of DeepSeek-V3, and end with the
# stream that feeds every training of this course.

# %%
import torch

from dsv3_mini.data.packing import pack
from dsv3_mini.viz.figures.packing import rows_figure

documents = [[number] * length for number, length in enumerate([12, 25, 7, 18, 10, 15, 6, 20, 9, 13, 8, 11])]
string = torch.tensor([token for document in documents for token in document])
cut = torch.nn.functional.pad(string, (0, 160 - len(string)), value=-1).view(5, 32)
whole = pack(documents, seq_len=32, eos_id=-1, pad_id=-1).tokens[:, 1:]
rows_figure({"cut blindly": cut, "packed whole": whole})

# %% [markdown] tags=["paper"]
# ## In the report
#
# Section 4.1 (data), 4.2 (lengths and batches) and 5.1 (fine-tuning) of the DeepSeek-V3 report say in a few sentences:
#
# - Documents are *packed*, so that they stay whole. In pre-training no mask keeps apart the documents that share a row.
# - One document in ten is turned into *fill in the middle* (FIM), in the order prefix, suffix, middle (PSM), before
#   packing. With $f_\text{pre}, f_\text{middle}, f_\text{suf}$ for the three parts of a document, the model reads
#
# $$
# \texttt{<fim\_begin>}\; f_\text{pre}\; \texttt{<fim\_hole>}\; f_\text{suf}\;
# \texttt{<fim\_end>}\; f_\text{middle}\; \texttt{<eos>}
# $$
#
# - Rows are 4096 tokens long, a batch grows from 3072 to 15360 rows, and 14.8 trillion tokens are read in all.
# - Supervised fine-tuning packs too, but *with* a mask: there, examples must not see each other.
#
# The loss is the same throughout. With $t_1 \dots t_{s+1}$ the tokens of a row, $C$ the places whose target counts (all
# but padding) and $p$ the model's probability,
#
# $$\mathcal{L} = -\frac{1}{|C|} \sum_{i \in C} \ln p(t_{i+1} \mid t_1 \dots t_i).$$
#
# Our letters in this lesson: `b` rows of a batch, `s` places of a row (as queries), `t` the same places (as keys),
# `v` tokens of the vocabulary.

# %% [markdown]
# ## Four domains
#
# The course reads four kinds of text, and downloads none of them. *Stories* and *sums* come from this project's own
# grammars, without end. *Code* and *prose* are the source and the documentation of the Python that runs this notebook.
# `load_corpus` gives each as a Hugging Face dataset with the columns `text` and `domain`.

# %%
from dsv3_mini.data.corpora import DOMAINS, load_corpus
from dsv3_mini.viz.figures.packing import samples_figure

corpora = {domain: load_corpus(domain) for domain in DOMAINS}
samples = {}
for domain, corpus in corpora.items():
    samples[domain] = next(row["text"] for row in corpus if len(row["text"]) < 400)
    print(f"{domain:8} {type(corpus).__name__:16} columns {', '.join(list(next(iter(corpus)))[:2])}")
samples_figure(samples)

# %% [markdown]
# Two classes, and the difference matters. A `Dataset` is a table on disk: it has a length, and any row can be read at
# any time. An `IterableDataset` is a promise: nothing exists until somebody asks for the next row, so it may be
# endless, or lie on the other side of a network. `map`, `filter` and `take` on it are promises too.

# %%
made = []
stream = corpora["stories"].map(lambda row: {"made": made.append(row["text"]), **row})
with_key = stream.filter(lambda row: "Question: Where" in row["text"])
print("stories made before anybody asks:", len(made))
asked = list(with_key.take(3))
print("asked for:", len(asked), "· made on the way, at least as many:", len(made) >= 3)

# %% [markdown]
# The two grammars know their own rules, so their texts can be *judged*: a later lesson asks which share of what a model
# writes is a well-formed story with a right answer. Here the judge reads a story, the same story with another answer,
# and a sum.

# %%
from dsv3_mini.data.stories import generate_story
from dsv3_mini.data.story_judge import judge_story
from dsv3_mini.data.sums import generate_sum, judge_sum

story = generate_story(seed=0, index=3)
print(story.text)
print("right:", judge_story(story.text).answer_right)
print("another answer:", judge_story(story.text.removesuffix(story.answer) + "It is on the moon.").problem)
print("the sum is right:", judge_sum(generate_sum(seed=0, index=3).text).answer_right)

# %% [markdown]
# Text of your own comes in the same way: a folder, a `.txt` file, JSONL or Parquet. What has no held-out part of its
# own is split by a hash of its text: the same document always lands on the same side, whatever file it came in. A
# corpus on the hub is refused until you allow the network.

# %%
import json
import tempfile
from pathlib import Path

from dsv3_mini.errors import DataError

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "mine.jsonl"
    file.write_text("\n".join(json.dumps({"text": generate_sum(1, i).text}) for i in range(400)), encoding="utf-8")
    train, held_out = (set(load_corpus(str(file), split)["text"]) for split in ("train", "held_out"))
print("documents in both parts:", len(train & held_out), "· held out:", f"{len(held_out) / 400:.1%}")
try:
    load_corpus("hub:roneneldan/TinyStories")
except DataError as error:
    print("DataError:", error)

# %% [markdown]
# How long are documents? We take 600 of each domain, encode them, and close each with eos, the token that says "here a
# text ends". The dashed line is a row of 256 tokens. (The course's small model was trained on rows of 208.)

# %%
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.viz.figures.packing import lengths_figure

tokenizer = Tokenizer.shipped()
texts = {}
for domain, corpus in corpora.items():
    rows = corpus.take(600) if domain in ("stories", "sums") else corpus.shuffle(seed=0).take(600)
    texts[domain] = [row["text"] for row in rows]
encoded = {domain: [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts[domain]] for domain in DOMAINS}
lengths_by_domain = {domain: [len(ids) for ids in encoded[domain]] for domain in DOMAINS}
lengths_figure(lengths_by_domain, row_length=256)

# %% [markdown] tags=["track:term"]
# How much is there to learn in each? A compressor is a model too: what it can predict, it need not store. The order to
# expect: sums follow from their first line, stories from a grammar, and people write code and prose as they like.

# %% tags=["track:term"]
import lzma

from dsv3_mini.viz.figures.packing import bits_figure

raw = {domain: "\n\n".join(texts[domain]).encode()[:60_000] for domain in DOMAINS}
bits = {domain: 8 * len(lzma.compress(data, preset=9)) / len(data) for domain, data in raw.items()}
assert bits["sums"] < bits["stories"] < min(bits["code"], bits["prose"])
print("sums < stories < code and prose:", True)
bits_figure(bits)

# %% [markdown] tags=["naive"]
# ## The naive way
#
# The first idea of everybody, and of many a training script: join everything, cut every `row_length` tokens. No place
# is wasted. The second idea keeps documents whole: one row is open; a document that does not fit closes it and opens
# the next.


# %%
def blind_cuts(lengths: list[int], row_length: int) -> list[bool]:
    """Whether each document is torn when the joined text is cut every row_length tokens."""
    torn, start = [], 0
    for length in lengths:
        torn.append(start // row_length != (start + length - 1) // row_length)
        start += length
    return torn


# %%
def one_open_row(lengths: list[int], row_length: int) -> int:
    """How many rows it takes when only the last row is open. No document is longer than a row."""
    rows, room = 0, 0
    for length in lengths:
        if length > room:
            rows, room = rows + 1, row_length
        room -= length
    return rows


# %%
stories = lengths_by_domain["stories"]
torn = blind_cuts(stories, 256)
fill = sum(stories) / (256 * one_open_row(stories, 256))
print(f"{len(stories)} stories in rows of 256")
print(f"cut blindly:   every place filled, {sum(torn) / len(torn):.0%} of the stories torn")
print(f"one open row:  no story torn, {fill:.0%} of the places filled")

# %% [markdown]
# Torn documents, or empty places: both are paid for. An empty place costs as much computation as a full one.

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Best fit
#
# ●●○ · 15 minutes
#
# Packing is a famous problem (*bin packing*), and its exact solution is out of reach for thousands of documents. A
# greedy rule comes close, *best fit decreasing*:
#
# 1. Take the longest document first (of equally long ones, the earlier in the list).
# 2. Put it into the row that has the **least** room left among those where it fits (of equals, the one opened first).
# 3. If it fits nowhere, open a new row with room for `capacity` tokens.
#
# Write `best_fit(lengths, capacity)`. It returns the rows, each a list of document numbers (their place in `lengths`);
# numbers ascend within a row, and rows ascend by their first number. No document is longer than `capacity`.
#
# <details><summary>Hint 1</summary>Keep two lists side by side: the members of each row, and the room that it has
# left.</details>
# <details><summary>Hint 2</summary><code>sorted(range(len(lengths)), key=lambda i: -lengths[i])</code> gives document
# numbers, longest first, and leaves ties in order.</details>
# <details><summary>Hint 3</summary><code>min(candidates, key=lambda r: room[r])</code> takes the first of equals;
# sorting a list of lists compares their first members first.</details>


# %%
def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Which documents go into which row, by best fit decreasing: document numbers, ascending."""
    ### BEGIN SOLUTION: go through the documents, longest first; put each into the fullest row that still has room for it
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        candidates = [r for r in range(len(rows)) if room[r] >= lengths[i]]
        if not candidates:
            rows.append([])
            room.append(capacity)
            candidates = [len(rows) - 1]
        row = min(candidates, key=lambda r: room[r])
        rows[row].append(i)
        room[row] -= lengths[i]
    return sorted(sorted(row) for row in rows)
    ### END SOLUTION


# %%
from dsv3_mini.course.checks import lesson_03 as check

check.best_fit(best_fit)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Inputs and targets
#
# ●○○ · 10 minutes
#
# A packed row has `s + 1` tokens: eos first (so that a row begins as every document in it does: after an end), then
# whole documents, then padding where nothing fits any more. The model reads `s` of them and predicts `s`: at each place
# the *next* token.
#
# Write `inputs_and_targets(rows, pad_id)`. `rows` is `[b s+1]`. Return two tensors `[b s]`: the inputs, and their
# targets. Where a target is padding, it is -100 instead: `cross_entropy` leaves such places out, so they cost nothing
# and teach nothing. Padding stays in the inputs, where causal attention keeps it from reaching anything that counts.
#
# <details><summary>Hint 1</summary>Both are slices of the same rows: all but the last token, all but the
# first.</details>
# <details><summary>Hint 2</summary><code>targets.masked_fill(condition, -100)</code> makes a new tensor; a place is
# ignored because of its target, not of its input.</details>

# %%
from torch import Tensor


def inputs_and_targets(rows: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """rows [b s+1] -> inputs [b s] and targets [b s]: the next token, or -100 where that is padding."""
    ### BEGIN SOLUTION: cut off the last token for the inputs, the first for the targets, and mark targets that are padding
    inputs, targets = rows[:, :-1], rows[:, 1:]
    return inputs, targets.masked_fill(targets == pad_id, -100)
    ### END SOLUTION


# %%
check.inputs_and_targets(inputs_and_targets)

# %% [markdown]
# ## What may a token look at?
#
# Attention is causal: a token sees what stands before it, never what comes after. In a packed row, "before" may be
# another document altogether: the last tokens of a sum look at the story that happens to share their row. V3 allows
# that in pre-training: plain causal attention is simpler, and the eos between two documents tells the model that what
# lies behind is another matter. In fine-tuning it masks: an answer must not lean on somebody else's question.

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · The document mask
#
# ●●○ · 10 minutes
#
# `document_ids` `[b s]` holds, for each place of a row, the number of the document that stands there: 0 for the row's
# first, then 1, 2 and so on; -1 for padding. Write `document_mask(document_ids)`: a tensor of booleans `[b s t]`, True
# where the query at `s` may look at the key at `t`: the key is not later than the query, and stands in the same
# document. Padding counts as a document of its own: it may see padding.
#
# <details><summary>Hint 1</summary>Two conditions, joined with <code>&amp;</code>: one depends on places alone, the
# other on the ids.</details>
# <details><summary>Hint 2</summary><code>torch.ones(n, n, dtype=torch.bool).tril()</code> is True on and below the
# diagonal: row s, column t, where t is not later than s.</details>
# <details><summary>Hint 3</summary>Comparing <code>[b s 1]</code> with <code>[b 1 t]</code> gives
# <code>[b s t]</code>.</details>

# %%
from einops import rearrange


def document_mask(document_ids: Tensor) -> Tensor:
    """document_ids [b s] -> [b s t]: True where query s may look at key t: not later, same document."""
    ### BEGIN SOLUTION: join "the key is not later" (lower triangle) and "query and key have the same document id"
    length = document_ids.shape[1]
    not_later = torch.ones(length, length, dtype=torch.bool).tril()
    same_one = rearrange(document_ids, "b s -> b s 1") == rearrange(document_ids, "b t -> b 1 t")
    return not_later & same_one
    ### END SOLUTION


# %%
check.document_mask(document_mask)

# %% [markdown]
# One packed row as a picture, seen both ways: a story, two sums, and a little padding. The black lines are the borders
# of documents; a coloured square is a pair of tokens that attention computes. What the mask takes away lies to the left
# of the triangles.

# %%
from dsv3_mini.model.transformer import same_document
from dsv3_mini.viz.figures.packing import mask_figure

few = [encoded["stories"][0], encoded["sums"][0], encoded["sums"][1]]
room = sum(len(document) for document in few) + 12
one_row = pack(few, room, tokenizer.eos_id, tokenizer.pad_id).document_ids
everything = torch.ones(room + 1, room + 1, dtype=torch.bool).tril()
mask_figure({"pre-training": everything, "fine-tuning": same_document(one_row)[0]}, one_row[0])

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · Fill in the middle
#
# ●○○ · 10 minutes
#
# A model that writes from left to right cannot use what stands to the right of the cursor. Unless it is told the right
# side first. That is all that FIM does: the document is cut in three, and its middle moved to the end. The loss stays
# next-token loss, and nothing in the model changes.
#
# Write `psm(ids, start, end, special)`: `ids` are a document's tokens (no eos yet), the middle is what lies from
# `start` up to, not including, `end`. Return the tokens in the order of the formula above, closed with eos. `special`
# has the ids `fim_begin_id`, `fim_hole_id`, `fim_end_id` and `eos_id`; our tokenizer is one such object.
#
# <details><summary>Hint 1</summary>Seven pieces in a row, four of them single tokens: <code>[a, *some, b, *more]</code>
# builds such a list.</details>
# <details><summary>Hint 2</summary>Prefix <code>ids[:start]</code>, suffix <code>ids[end:]</code>, middle
# <code>ids[start:end]</code>; the last two swap their places.</details>

# %%
from dsv3_mini.data.fim import FimTokens


def psm(ids: list[int], start: int, end: int, special: FimTokens) -> list[int]:
    """A document as prefix, suffix, middle, with the special tokens between them and eos at the end."""
    ### BEGIN SOLUTION: begin, prefix, hole, suffix, end, middle, eos: one list
    prefix, middle, suffix = ids[:start], ids[start:end], ids[end:]
    head = [special.fim_begin_id, *prefix, special.fim_hole_id, *suffix, special.fim_end_id]
    return [*head, *middle, special.eos_id]
    ### END SOLUTION


# %%
check.psm(psm)

# %% [markdown]
# This is what the model reads, with a sum for a document:

# %%
from random import Random

from dsv3_mini.data.fim import apply_fim

ids = tokenizer.encode(generate_sum(seed=0, index=3).text)
print(tokenizer.decode(apply_fim(ids, tokenizer, rate=1.0, rng=Random(0))))

# %% [markdown] tags=["package"]
# ## The package's own
#
# Here are the four pieces as the package has them. `pack` cuts documents that are longer than a row, which your
# `best_fit` need not; `_best_fit` finds the fullest row by bisection in a sorted list, so that ten thousand documents
# do not take a hundred million comparisons. `apply_fim` draws the cuts, and does so for `rate` of all documents.

# %%
from dsv3_mini.course.lesson import same, show_source
from dsv3_mini.data import packing

show_source(packing.pack, packing._best_fit, packing.inputs_and_targets, same_document, apply_fim)

# %% [markdown]
# Yours against it. `check.packed_rows` reads off which documents `pack` laid into which row; `check.fim_at` hands
# `apply_fim` two cuts instead of chance.

# %%
every_length = [min(length, 256) for domain in DOMAINS for length in lengths_by_domain[domain][:100]]
block = pack(encoded["stories"][:50], 256, tokenizer.eos_id, tokenizer.pad_id)
same(best_fit, check.packed_rows, (every_length, 256), (every_length, 320))
same(inputs_and_targets, packing.inputs_and_targets, (block.tokens, tokenizer.pad_id))
same(document_mask, same_document, (block.document_ids,))
same(psm, check.fim_at, *((ids, start, end, tokenizer) for start, end in ((0, 5), (3, 20), (10, len(ids)))))

# %% [markdown]
# Does the mask do what it promises? If attention is all that lets tokens look at each other, then with the mask each
# document must get the very logits that it gets when it is alone. We take a small random model, a row of the two shortest
# stories, and look at the second one: in the row with the mask, in the row without it, and alone.

# %%
import dsv3_mini as dsv3

torch.manual_seed(0)
model = dsv3.DeepSeekV3(dsv3.ModelConfig.preset("nano", initializer_range=0.1)).eval()
pair = pack(sorted(encoded["stories"], key=len)[:2], 200, tokenizer.eos_id, tokenizer.pad_id)
second = pair.document_ids == 1
with torch.no_grad():
    alone = model(pair.tokens[second][None]).logits[0]
    masked = model(pair.tokens, pair.document_ids).logits[second]
    unmasked = model(pair.tokens).logits[second]
print("with the mask as if alone:", torch.allclose(masked, alone, atol=1e-4))
print("without it as if alone:   ", torch.allclose(unmasked, alone, atol=1e-4))

# %% [markdown]
# Positions do not spoil it, although the second story stands further right in the row: the rotary embedding of lesson
# 05 knows distances only.
#
# ### The stream
#
# `TokenStream` puts the pieces in order: draw a document from the domain that lags furthest behind its share, encode,
# FIM, pack, shuffle rows. Its order is a function of its settings alone. So a run that was stopped goes on with the
# very rows that were to come, which the next cell proves by way of JSON, as a checkpoint stores it.

# %%
from dsv3_mini.data.stream import MIXTURE, TokenStream

stream = TokenStream(tokenizer, seq_len=160, block_rows=64)
stream.next_batch(300)
state = json.dumps(stream.state_dict())
resumed = TokenStream(tokenizer, seq_len=160, block_rows=64)
resumed.load_state_dict(json.loads(state))
print("goes on with the same rows:", torch.equal(stream.next_batch(40), resumed.next_batch(40)))
read = {domain: progress.tokens for domain, progress in stream.progress().items()}
off = max(abs(read[domain] / sum(read.values()) - share) for domain, share in MIXTURE.items())
print("every domain within 2% of its share:", off < 0.02)
for each in (stream, resumed):
    each.close()

# %% [markdown] tags=["experiment"]
# ## Experiment: what does it cost to keep documents whole?
#
# **What we expect.** If cuts fall blindly every $s$ tokens, a document of $n$ tokens has $n - 1$ places between its
# tokens where one may fall, so it is torn with a probability of $(n - 1) / s$ (and surely if it is longer than a row).
# The mean of that over all documents should be what we measure, within 3 percentage points. Keeping documents whole
# should be expensive with one open row (over 10% padding in rows of 256) and nearly free with best fit (under 2%). And
# some documents stay torn: those longer than a row.
#
# It could fail. Documents of similar length may pack badly however clever the rule: two of 130 tokens never share a row
# of 256. And lengths in a fixed rhythm would make the cuts fall on borders more often, or less, than chance.

# %%
lengths = [length for domain in DOMAINS for length in lengths_by_domain[domain]]
Random(0).shuffle(lengths)
row_lengths = [128, 160, 256, 512, 1024]


def pieces(row_length: int) -> list[int]:
    """Lengths once documents longer than a row are cut, as every way of packing must."""
    return [min(row_length, n - start) for n in lengths for start in range(0, n, row_length)]


def filled(rows: int, row_length: int) -> float:
    return sum(lengths) / (rows * row_length)


# %%
torn: dict[str, list[float]] = {"cut blindly": [], "packed whole": []}
padding: dict[str, list[float]] = {"cut blindly": [], "one open row": [], "best fit": []}
for s in row_lengths:
    torn["cut blindly"].append(sum(blind_cuts(lengths, s)) / len(lengths))
    torn["packed whole"].append(sum(n > s for n in lengths) / len(lengths))
    padding["cut blindly"].append(0.0)
    padding["one open row"].append(1 - filled(one_open_row(pieces(s), s), s))
    padding["best fit"].append(1 - filled(len(check.packed_rows(pieces(s), s)), s))

# %%
from dsv3_mini.viz.figures.packing import packing_cost_figure

expected = [sum(min(1, (n - 1) / s) for n in lengths) / len(lengths) for s in row_lengths]
at_256 = row_lengths.index(256)
assert all(abs(a - b) < 0.03 for a, b in zip(torn["cut blindly"], expected, strict=True))
assert padding["one open row"][at_256] > 0.10 and padding["best fit"][at_256] < 0.02
print("torn by blind cuts as often as (n - 1) / s says:", True)
print("rows of 256: one open row wastes over 10%, best fit under 2%:", True)
packing_cost_figure(row_lengths, torn, padding)

# %% [markdown]
# So whole documents are to be had for almost nothing, once all rows are open. The picture also says when: rows must be
# some times longer than documents. At 128 tokens, too many documents are longer than a row, or too long to share one.

# %% [markdown] tags=["interactive"]
# ## The packing viewer
#
# Ten short documents in rows of your length. Above, the rows with their documents by number, and padding in grey. The
# outlined token looks: what it can see is in full colour, there and in the text below, and the rest is pale. Move it,
# switch the mask on and off, and make rows longer until no document is cut (in rows of 32, the sum with its steps is).

# %%
from dsv3_mini.viz.widgets.packing import packing_explorer

viewer = packing_explorer(tokenizer)
viewer

# %% [markdown]
# A cell can move the controls too. With the mask on, the same token sees fewer others; with longer rows, fewer rows
# are needed.

# %%
from dsv3_mini.viz.figures.packing import visible_from
from dsv3_mini.viz.widgets.packing import TEXTS

ids_of = [[*tokenizer.encode(text), tokenizer.eos_id] for text in TEXTS]
packed = pack(ids_of, 32, tokenizer.eos_id, tokenizer.pad_id)
row, query = viewer.values["row"], viewer.values["query"]
before, picture = visible_from(packed.document_ids[row], query, masked=False), viewer.picture.value
viewer.set(masked=True)
after = visible_from(packed.document_ids[row], query, masked=True)
assert viewer.picture.value != picture and after.sum() < before.sum()
print(f"the token at place {query} sees {int(before.sum())} tokens without the mask, {int(after.sum())} with it")
rows_at_32 = viewer.controls["row"].max + 1
viewer.set(row_length=48)
print("longer rows are fewer:", viewer.controls["row"].max + 1 < rows_at_32)

# %% [markdown]
# ## Find the bug
#
# A colleague trains a model on packed rows. The loss falls as it should; what the model writes is strange. Here is the
# loss:


# %%
def strange_loss(logits: Tensor, rows: Tensor, pad_id: int) -> Tensor:
    """Mean cross-entropy of the next token (nats). logits [b s v], one for each input; rows [b s+1]."""
    inputs, targets = packing.inputs_and_targets(rows, pad_id)
    logits, targets = logits[:, :-1], targets[:, 1:]  # the logits at a place predict the token at the next one
    logits, targets = rearrange(logits, "b s v -> (b s) v"), rearrange(targets, "b s -> (b s)")
    return torch.nn.functional.cross_entropy(logits, targets)


# %% [markdown]
# To see what it teaches, we train the smallest model there is: a table that holds, for each token, the logits of what
# follows it. It reads sixty sums, in which only some hundred different tokens occur (so we number those anew, and the
# table is small), and then continues "ones:" by always taking the likeliest token.

# %%
sums = pack(encoded["sums"][:60], 160, tokenizer.eos_id, tokenizer.pad_id).tokens
vocabulary, rows = sums.unique(return_inverse=True)
pad = vocabulary.tolist().index(tokenizer.pad_id)
table = torch.nn.Parameter(torch.zeros(len(vocabulary), len(vocabulary)))
optimizer = torch.optim.Adam([table], lr=0.3)
losses = []
for _ in range(40):
    loss = strange_loss(table[rows[:, :-1]], rows, pad)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print("the loss fell to less than half:", losses[-1] < losses[0] / 2)

# %%
written = [vocabulary.tolist().index(token) for token in tokenizer.encode("ones:")]
for _ in range(6):
    written.append(int(table[written[-1]].argmax()))
print(repr(tokenizer.decode(vocabulary[written].tolist())))

# %% [markdown] tags=["bug"]
# ### Find the bug · A loss that falls
#
# ●●○ · 10 minutes
#
# In a sum, "ones:" goes on with a space, a digit, a space and a sign. The table has learnt something else. Write the
# loss as it should be: `next_token_loss(logits, rows, pad_id)`, the formula from the beginning of this lesson. `logits`
# is `[b s v]`, one for each input, `rows` is `[b s+1]`.
#
# <details><summary>Hint 1</summary>Give row 0 the tokens 10, 11, 12, 13 and follow one place by hand: which target does
# the logit of input 10 meet?</details>
# <details><summary>Hint 2</summary>The comment is true of rows. What are `targets` already?</details>


# %%
def next_token_loss(logits: Tensor, rows: Tensor, pad_id: int) -> Tensor:
    """Mean cross-entropy of the next token (nats) over targets that count. logits [b s v], rows [b s+1]."""
    ### BEGIN SOLUTION: the strange loss without what makes it strange
    inputs, targets = packing.inputs_and_targets(rows, pad_id)
    logits, targets = rearrange(logits, "b s v -> (b s) v"), rearrange(targets, "b s -> (b s)")
    return torch.nn.functional.cross_entropy(logits, targets)
    ### END SOLUTION


# %%
check.next_token_loss(next_token_loss)

# %% [markdown]
# Nothing crashes, no shape is wrong, and the loss falls: a model can learn to predict the token after the next. People
# meet this whenever a data loader shifts and a model's own loss shifts as well. Two ways to notice: read what the model
# writes, and test a loss with logits that know the answer. Such logits must cost nothing.

# %%
inputs, targets = packing.inputs_and_targets(rows, pad)
knows = torch.nn.functional.one_hot(targets.clamp(min=0), len(vocabulary)).float() * 50
flat, wanted = rearrange(knows, "b s v -> (b s) v"), rearrange(targets, "b s -> (b s)")
right = torch.nn.functional.cross_entropy(flat, wanted)
strange = strange_loss(knows, rows, pad)
print(f"logits that know the next token: loss {right.item():.2f}; by the strange loss above 10: {strange.item() > 10}")

# %% [markdown] tags=["at-671b"]
# ## At 671B
#
# The recipe of the report is a preset of the package, and its schedules are functions of the tokens seen. So the steps
# of the whole training can be counted by taking them, one after the other.

# %%
from dsv3_mini.train.recipe import Recipe

recipe = Recipe.preset("deepseek-v3")
tokens = steps = steps_of_growth = 0
while tokens < recipe.total_tokens:
    rows_now = round(recipe.batch_size(tokens))
    steps_of_growth += rows_now < recipe.batch_size(recipe.total_tokens)
    tokens += rows_now * round(recipe.context(tokens))
    steps += 1
context = round(recipe.context(0))
first, last = (round(recipe.batch_size(seen)) for seen in (0, recipe.total_tokens))
print(f"tokens: {recipe.total_tokens / 1e12:.1f}T, {recipe.total_tokens / context / 1e9:.2f} billion rows of {context}")
print(f"a batch: {first:,} to {last:,} rows, {first * context / 1e6:.1f} to {last * context / 1e6:.1f} million tokens")
print(f"steps: {steps:,}, of them {steps_of_growth:,} with a growing batch")

# %% [markdown]
# What is a padded place worth at this size? And what does the missing mask cost? Without it attention computes pairs of
# tokens from different documents. An upper bound for what masking could save is all of attention's share of the work.

# %%
from dsv3_mini.ledger import flops_per_token, training_cost

cost = training_cost()
print(f"pre-training: {cost.gpu_hours / 1e3:,.0f} thousand H800 hours, {cost.dollars / 1e6:.2f} million dollars")
print(f"one place in a hundred padded: {cost.dollars / 100:,.0f} dollars of them for nothing")
flops = flops_per_token(dsv3.ModelConfig.preset("671b"), context)
print(f"attention in rows of {context}: {flops.train_attention / flops.train:.0%} of the FLOPs")
ids_bytes = 4 * recipe.total_tokens
print(f"the tokens on disk, four bytes each: {ids_bytes / 1e12:.0f} TB")

# %% [markdown]
# That is far more than fits into a machine's memory, so nobody shuffles it there. It is why a stream's position should
# be a small piece of JSON, as above: after a crash late in such a run, "which documents has it seen?" has an answer at
# once.

# %% [markdown] tags=["recap"]
# ## Recap
#
# **1.** Why does the order "longest first" matter to best fit?
#
# <details><summary>Answer</summary>Short documents fit into what others leave, long ones do not. If the short ones come
# first, they take a bite of every row, and a long one must open a new row although there is room enough in
# sum.</details>
#
# **2.** V3 pre-trains without a document mask and fine-tunes with one. What would go wrong the other way round?
#
# <details><summary>Answer</summary>A mask in pre-training is a choice, not a mistake; V3 does without. No mask in
# fine-tuning is one: an example could lean on the questions and answers of its neighbours in the row, which no user
# will ever send along.</details>
#
# **3.** FIM is applied before packing, to whole documents. What would the model learn if it were applied to packed
# rows?
#
# <details><summary>Answer</summary>A row's prefix, middle and suffix then begin and end in different documents. The
# model would learn to fill a hole in a sum with half a story, and that eos may stand in the middle of a
# middle.</details>

# %% [markdown] tags=["next"]
# ## Next
#
# In [04 · The transformer](04_transformer.ipynb) the rows meet a model: normalisation, attention and feed-forward
# layers by hand, and a first training run, on the stream you have just seen.
