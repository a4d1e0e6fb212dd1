# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   dsv3:
#     title: The tour
#     minutes: 45
#     after: []
#     builds: "a first look at the whole: a model that writes, its experts at work, the numbers from tiny to 671B"
#     tracks: [half-day, two-days, term]
# ---

# %% [markdown] tags=["why"]
# # 00 · The tour
#
# Beside this notebook lies a small DeepSeek-V3. It has the parts of the large one: attention that keeps a short latent
# of each token, a mixture of experts that balances itself, a second head that predicts one token further. It was
# trained on a processor like yours.
#
# In this lesson you watch it write, count who does the work, and repair a loop. All else is looking around: what you
# see here you build, piece by piece, in the lessons that follow.
#
# Run the next cell (Shift+Enter), and watch.

# %%
import torch

import dsv3_mini as dsv3
from dsv3_mini.data.shipped import shipped
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.viz.widgets.writer import Writer

model = dsv3.from_pretrained(shipped("tiny")).eval()
cfg, tokenizer = model.cfg, Tokenizer.shipped()
writer = Writer(model, tokenizer)
opening = "One rainy morning, Nora"
story = writer.write(opening)
writer

# %% [markdown]
# The model reads a text as *tokens*: words and pieces of words. It is given the grey ones and writes the black ones.
# Each token passes through the *layers*, from below. In the lowest it passes through all of the layer. In each of the
# others a *router* sends it to a few *experts*, small networks that only some tokens visit: they light up. The darker
# the colour, the more the expert's answer weighs; that weight is its *gate value*. The gaps part *groups* of experts.
# On a cluster a group would live on one machine, and a token may visit a few of the groups only.
#
# At the top stands what came of it: the likeliest next tokens. Pause, step, hover over a token, or let the model go on
# from an opening of yours. A cell can do the same: this one goes to the third token.

# %%
writer.show(2)
chosen_here = torch.tensor(writer.steps[2]["chosen"])  # [l k]: a row of k experts for each sparse layer
groups = chosen_here // (cfg.n_routed_experts // cfg.n_group)
assert writer.here == 2 and chosen_here.shape[1] == cfg.num_experts_per_tok
assert all(len(set(row)) <= cfg.topk_group for row in groups.tolist())
print(f"{cfg.num_experts_per_tok} of {cfg.n_routed_experts} experts,", end=" ")
print(f"in at most {cfg.topk_group} of {cfg.n_group} groups, in each of {len(groups)} sparse layers")

# %% [markdown]
# Is it a story? The model learnt from stories whose grammar we know, and each ends with a question. So a program can
# judge what it writes: it reads the text from scratch, replays what happened, and answers the question itself. These
# are the scores that came with the model, on stories, questions and sums that no training text contained.

# %%
import json

judged = json.loads(shipped("tiny/scores.json").read_text())["judged"]
print(f"{judged['sentences_well_formed']:6.1%} of the sentences that it writes are right")
print(f"{judged['well_formed']:6.1%} of the stories are, from the opening to the answer")
print(f"{judged['story_answers']:6.1%} of the questions about stories of others it answers")
print(f"{judged['sum_answers']:6.1%} of the sums come out")

# %% [markdown] tags=["paper"]
# ## The report, and this course
#
# DeepSeek-V3 is described in a technical report. What it says becomes, here:
#
# | report | what it is about | lessons |
# |---|---|---|
# | section 2.1.1, equations 1-11 | multi-head latent attention (MLA) | 05, 06, 07 |
# | section 2.1.2, equations 12-20 | experts, their router, balance, node-limited routing | 08, 09, 10 |
# | section 2.2, equations 21-25 | multi-token prediction (MTP) | 11, 22 |
# | section 3.1-3.2 | the cluster, the pipeline, messages between machines | 18, 19, 20, 21 |
# | section 3.3 | training in 8-bit numbers (FP8) | 15, 16 |
# | section 3.4 | serving | 23 |
# | section 4.1 | data and tokenizer | 02, 03 |
# | section 4.2, 4.5 | pre-training, and which part brings what | 13, 14 |
# | section 4.3 | long context | 17 |
# | section 4.4, 5.3 | evaluation | 27 |
# | section 5.1, 5.2, equations 26-28 | fine-tuning, and learning from rewards | 24, 25 |
# | section 5.4 | learning from another model's answers | 26 |
#
# Lessons 01, 04 and 12 are the tools, the plain transformer and the whole put together; in 28 you are on your own.
#
# One equation for today, number 12. Let $u$ be a token's vector where it enters the feed-forward part of a sparse
# layer. Then what leaves it is
#
# $$h' = u + \sum_{i=1}^{N_s} \mathrm{FFN}^{(s)}_i(u) + \sum_{i=1}^{N_r} g_i \, \mathrm{FFN}^{(r)}_i(u)$$
#
# $\mathrm{FFN}^{(s)}_i$ are the $N_s$ *shared* experts, which every token visits. $\mathrm{FFN}^{(r)}_i$ are the $N_r$
# *routed* ones, and $g_i$ is the gate value of number $i$: the colour that you saw. It is 0 for all but the chosen $k$,
# and an expert with gate value 0 need not be computed. That is the whole trick: a large model of which a token
# uses a small part.

# %%
from dsv3_mini.viz.figures.map import map_figure

map_figure(here=0)

# %% [markdown] tags=["naive"]
# ## Writing, the naive way
#
# A model does one thing: for each position of a text it scores every token of its vocabulary as the next. To write,
# take the best token after the last position, append it, and ask again. Shapes are written with one letter an axis:
# `b` texts in the batch, `s` positions, `v` tokens in the vocabulary. `eos_id` is the token that begins every text.

# %%
start = [tokenizer.eos_id, *tokenizer.encode(opening)]
ids, read = list(start), 0
for _ in range(12):
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits  # [b s v], one text
    read += len(ids)
    ids.append(int(logits[0, -1].argmax()))
assert story.startswith(tokenizer.decode(ids[1:]))
print(f"{len(ids) - len(start)} tokens, the same that the writer wrote")
print(f"to write them, the model read {read} tokens; the writer's read {len(ids) - 1}")

# %% [markdown]
# The naive way reads all of the text again for every new token. The writer above keeps what attention needs of
# each token in a *cache*, and reads each once. Lesson 07 builds that cache; how little a token may leave in it is what
# lesson 06 is about.

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Who works how much
# ●○○ · 5 minutes
#
# A layer's routing is a table `chosen` of shape `[b s k]`: for each of `s` positions of `b` texts the numbers of its
# `k` experts, from 0 up. Count, for each of `n_experts` experts, how many tokens visit it: a tensor of shape `[e]`.
#
# <details><summary>Hint 1</summary>
#
# For counting it does not matter which token a choice came from: `chosen.flatten()` is one long list of choices.
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.bincount` counts how often each number occurs. Look at its argument `minlength`: what if nobody visits the
# last expert?
# </details>


# %%
def tokens_per_expert(chosen: torch.Tensor, n_experts: int) -> torch.Tensor:
    """chosen [b s k], expert numbers -> [e]: how many tokens visit each expert."""
    ### BEGIN SOLUTION: count how often each of the n_experts numbers stands in chosen
    return torch.bincount(chosen.flatten(), minlength=n_experts)
    ### END SOLUTION


# %%
from dsv3_mini.course.checks import lesson_00 as check

check.tokens_per_expert(tokens_per_expert)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · How much of it works
# ●○○ · 10 minutes
#
# A model has `layers` sparse layers. In each there are `n_experts` routed experts of `expert` parameters (its trained
# numbers), of which a token visits `k`. All other parameters together, `always` of them, work for every token. What
# share of the whole model works for one token?
#
# <details><summary>Hint 1</summary>
#
# Two sums and a division: first what works for one token, then all that is there. `always` stands in both.
# </details>
# <details><summary>Hint 2</summary>
#
# Every sparse layer has experts of its own, and a token visits `k` of them in each.
# </details>


# %%
def activated_share(always: int, expert: int, layers: int, n_experts: int, k: int) -> float:
    """The share, from 0 to 1, of a model's parameters that work for one token."""
    ### BEGIN SOLUTION: parameters that work for one token, divided by all parameters
    at_work = always + layers * k * expert
    whole = always + layers * n_experts * expert
    return at_work / whole
    ### END SOLUTION


# %%
check.activated_share(activated_share)

# %% [markdown] tags=["package"]
# ## The package's own
#
# `dsv3_mini` is the package that this course builds: each lesson shows its source beside yours. The router counts
# visits like this; the count is what keeps the experts balanced, in lesson 09.

# %%
from dsv3_mini.course.lesson import same, show_source
from dsv3_mini.model.router import expert_load

show_source(expert_load)

# %%
with torch.no_grad():
    routing = model(torch.tensor([ids])).routing  # of every sparse layer, that of multi-token prediction last
same(tokens_per_expert, expert_load, *[(layer.chosen, cfg.n_routed_experts) for layer in routing])

# %% [markdown]
# And the *ledger* counts parameters: for each preset, from `nano` (for tests) to `671b` (the released model), it lists
# every tensor that the model has. Your formula must come to the same share.

# %%
from dsv3_mini.config import PRESETS
from dsv3_mini.ledger import count_parameters


def my_share(preset: str) -> float:
    """Your answer, with the sizes of a preset."""
    shape, counts = dsv3.ModelConfig.preset(preset), count_parameters(dsv3.ModelConfig.preset(preset))
    expert, layers, k = counts.expert.total, counts.moe_layers, shape.num_experts_per_tok
    always = counts.main_trainable - layers * shape.n_routed_experts * expert
    return activated_share(always, expert, layers, shape.n_routed_experts, k)


# %%
def ledger_share(preset: str) -> float:
    """The same from the ledger's list of tensors."""
    counts = count_parameters(dsv3.ModelConfig.preset(preset))
    return counts.activated / counts.main_trainable


same(my_share, ledger_share, *[(preset,) for preset in PRESETS])
for preset in PRESETS:
    print(f"{preset:>6}: {ledger_share(preset):4.0%} of the parameters work for a token")

# %% [markdown] tags=["experiment"]
# ## An experiment: do experts specialise?
#
# The model learnt from four kinds of text: stories, sums, Python code and English prose. Nobody told an expert what to
# care for. Did they divide the work?
#
# We expect: yes, the experts of one kind of text differ from those of another. But loads also differ by chance, from
# text to text of one kind. So there is a yardstick: cut the texts of each kind into two halves, and measure how far
# apart *they* are. The distance between two loads is the share of visits that would have to move to make them equal.
# The experiment fails if two kinds are, on the whole, no farther apart than two halves of one kind.

# %%
from dsv3_mini.data.stream import held_out_rows

DOMAINS = ("stories", "sums", "code", "prose")
SPARSE = 1  # the middle one of the sparse layers
halves = {}
for domain in DOMAINS:
    rows = held_out_rows(domain, tokenizer, seq_len=256, rows=16).tokens
    with torch.no_grad():
        chosen = model(rows).routing[SPARSE].chosen
    halves[domain] = [expert_load(half, cfg.n_routed_experts).float() for half in (chosen[::2], chosen[1::2])]

# %%
from itertools import combinations

from dsv3_mini.viz.figures.routing import load_figure


def distance(load: torch.Tensor, other: torch.Tensor) -> float:
    """Two loads [e] -> the share of visits that would have to move, from 0 (equal) to 1 (no expert in common)."""
    return float((load / load.sum() - other / other.sum()).abs().sum() / 2)


whole = {domain: first + second for domain, (first, second) in halves.items()}
load_figure({domain: load / load.mean() for domain, load in whole.items()}, routing[SPARSE].layer)

# %%
within = [distance(first, second) for first, second in halves.values()]
between = [distance(whole[one], whole[other]) for one, other in combinations(DOMAINS, 2)]
farther = sum(between) / len(between) / (sum(within) / len(within))
assert farther > 2
print("two kinds of text are more than twice as far apart as two halves of one: they have divided the work")

# %% [markdown]
# A row that is both dark and light says: this kind of text has its favourites. Yet over all texts together no expert
# idles. Lesson 09 shows how: a small number for each expert, raised where too few come and lowered where too many do.
#
# And does the model work things out, or repeat what it has read? Some sums of two-digit numbers were held out: no text
# that it learnt from contains them. If it only repeats, it gets hardly any of them right. We expect that it has learnt
# the steps, and gets more than half.

# %%
from dsv3_mini.data import sums
from dsv3_mini.inference.generate import complete

problems = [sums.held_out_sum(number) for number in range(24)]
prompts = [[tokenizer.eos_id, *tokenizer.encode(problem.prompt)] for problem in problems]
worked = [tokenizer.decode(new) for new in complete(model, prompts, 80, stop_id=tokenizer.eos_id)]
right = sum(sums.is_right(problem, answer) for problem, answer in zip(problems, worked, strict=True))
assert right > len(problems) / 2
print("more than half of the sums that it never saw come out; the first of them:\n")
print(problems[0].prompt + worked[0])

# %% [markdown] tags=["interactive"]
# ## The ledger, from tiny to 671B
#
# The class that wrote your story is the released model's too. What changes is the configuration, and with it every
# number. Slide from `nano` to `671b`. *Activated* parameters are those that work for one token. The *cache* is what
# attention keeps of a text while it writes: the green bar is DeepSeek's latent, the grey one what usual attention of the
# same heads would keep. The cost is that of training on as many tokens as the report did, at the speed of its machines.

# %%
from dsv3_mini.viz.widgets.ledger import ledger_explorer

explorer = ledger_explorer()
explorer

# %%
before = explorer.picture.value
explorer.set(preset="671b", context=131_072)
assert explorer.picture.value != before and explorer.values == {"preset": "671b", "context": 131_072}
print("moved to", explorer.values)

# %% [markdown]
# ## Find the bug
#
# A friend wrote the loop for a text of their own. `scores_of(ids)` gives the scores `[s v]` of the next token after
# each position. The result has the right length, and is no story. Run it and read what it says.


# %%
def write_badly(scores_of, ids, n_new):
    """ids, and n_new more: each the likeliest after all that stands before it."""
    ids = list(ids)
    last = len(ids) - 1
    for _ in range(n_new):
        scores = scores_of(ids)
        ids.append(int(scores[last].argmax()))
    return ids


# %%
def scores_of(ids: list[int]) -> torch.Tensor:
    """The tiny model's scores [s v] of the next token after each position."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


new = write_badly(scores_of, start, 12)[len(start) :]
assert len(set(new)) == 1
print(f"{len(new)} new tokens, {len(set(new))} different")

# %% [markdown] tags=["bug"]
# ### The bug · A story of one word
# ●○○ · 5 minutes
#
# Write the loop so that it works. `ids` is a list of token numbers that still belongs to the caller: leave it as it is.
#
# <details><summary>Hint 1</summary>
#
# Which row of `scores` is read in the first turn of the loop, and which in the second?
# </details>
# <details><summary>Hint 2</summary>
#
# Row `i` says what follows position `i`, and does not change when tokens are added after it: no position sees later ones.
# </details>


# %%
def write_on(scores_of, ids, n_new):
    """ids, and n_new more: each the likeliest after all that stands before it."""
    ### BEGIN SOLUTION: the same loop, with the row that belongs to the end of the text as it is now
    ids = list(ids)
    for _ in range(n_new):
        scores = scores_of(ids)
        ids.append(int(scores[-1].argmax()))
    return ids
    ### END SOLUTION


# %%
check.write_on(write_on)

# %% [markdown] tags=["at-671b"]
# ## The numbers at 671B
#
# Built without memory for its numbers (on torch's *meta* device), the released model is there in a second, and can be
# counted. The ledger arrives at the same number without building it.

# %%
large = dsv3.ModelConfig.preset("671b")
with torch.device("meta"):
    built = dsv3.DeepSeekV3(large.replace(num_nextn_predict_layers=0))  # without multi-token prediction
counts = count_parameters(large)
assert sum(p.numel() for p in built.parameters()) == counts.main_trainable
print(f"{counts.main_trainable:,} parameters, of which {counts.activated:,} work for a token")
print(
    f"{counts.moe_layers} sparse layers of {large.n_routed_experts} experts, {large.num_experts_per_tok} for a token:"
)
print(f"each token makes {counts.moe_layers * large.num_experts_per_tok} visits")

# %%
from dsv3_mini.ledger import REPORT_RUN, ledger

book = ledger(large)
print(f"a token leaves {book.cache.bytes('mla'):,} bytes in the cache, not {book.cache.bytes('mha'):,}")
print(f"training it read {REPORT_RUN.tokens / 1e12:g} trillion tokens on {REPORT_RUN.gpus:,} GPUs")
print(f"and took {REPORT_RUN.hours:,.0f} GPU hours in all: at $2 an hour, ${2 * REPORT_RUN.hours / 1e6:.3f} million")
tiny_share, large_share = ledger_share("tiny"), ledger_share("671b")
print(f"share of the parameters at work for a token: tiny {tiny_share:.0%}, 671b {large_share:.1%}")

# %% [markdown] tags=["recap"]
# ## Recap
#
# 1. A model has many experts, and a token visits a few. What does that save, and what does it not save?
#
# <details><summary>Answer</summary>
#
# Computation: only the chosen experts are run for a token. Not memory: the next token may want any of the others, so
# all of them must be at hand.
# </details>
#
# 2. What is the difference between being *chosen* and the *gate value*?
#
# <details><summary>Answer</summary>
#
# Being chosen decides whether an expert sees the token at all. The gate value says how much the answer of a chosen
# expert weighs in the sum of equation 12. Lesson 09 makes much of that difference: a bias may change who is chosen
# without changing how much they weigh.
# </details>
#
# 3. Why did the friend's loop write one word only, though it gave the model the whole text each time?
#
# <details><summary>Answer</summary>
#
# It always read the row of the same position. That row depends on the tokens up to that position alone, and those did
# not change. What follows the *grown* text stands in its last row.
# </details>

# %% [markdown] tags=["next"]
# ## What is next
#
# Give the writer an opening of yours: "After lunch,", or a sum such as "58 + 27 = ?". `writer.save_html("story.html")`
# makes a page of it that plays in any browser. In a terminal, `dsv3 sample "After lunch,"` writes too,
# `dsv3 ledger --preset 671b` counts all that can be counted, and `dsv3 train --preset tiny` trains the model that you
# have just used.
#
# Then open **01 · Shapes and einops**: the language in which every later lesson is written.
