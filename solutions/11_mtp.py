# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   dsv3:
#     title: Multi-token prediction
#     minutes: 80
#     after: [08_deepseek_moe]
#     builds: the joint of a state and the next token, a chain of depths, its loss, and an audit of who trains whom
#     tracks: [two-days, term]
# ---

# %% [markdown] tags=["why"]
# # 11 · Multi-token prediction
#
# At every position a language model is asked one question: which token comes next? DeepSeek-V3 is asked a second one
# while it trains: and which comes after that? The second question is put to a small module at the end of the model. It
# takes what the model has made of the text so far, is told the next token, and predicts the one behind it. That is
# **multi-token prediction**, MTP. It costs a few percent of the training, and the answers can be thrown away, or kept:
# a model that guesses two tokens at a time can write faster.
#
# In this lesson you build all of it: the joint in which a state meets a token, a chain of such modules, and its loss.
# You audit which loss trains which tensor. Then you measure what the second token teaches, and what it does not.
#
# Here is the chain with two depths. A box takes the state from the box below it, *reads* one token that the state has
# not seen yet, and predicts the one after it (→). DeepSeek-V3 has one depth; the report's equations allow any number.

# %%
from dsv3_mini.viz.figures.mtp import chain_figure

words = ["Nora", "gave", "the", "red", "lamp", "to", "Leon"]
chain_figure(words, depths=2)

# %% [markdown] tags=["paper"]
# ## In the report
#
# Section 2.2. Let $t_i$ be the token at position $i$ and $h^j_i$ the state that depth $j$ has made there, a vector of
# `d` numbers. Depth 0 is the main model. (The report counts depths with $k$; in this course `k` is a slot of a chosen
# expert, so depths are $j$, from 1 to $D$.)
#
# | equation | formula | in words |
# |---|---|---|
# | 21 | $h'^j_i = M_j\,[\mathrm{norm}(h^{j-1}_i)\,;\,\mathrm{norm}(\mathrm{Emb}(t_{i+j}))]$ | the **joint**: the state meets the next token that it has not read |
# | 22 | $h^j = \mathrm{Block}_j(h'^j)$ | one transformer block, with attention over all earlier positions |
# | 23 | $P^j_{i+j+1} = \mathrm{Head}(h^j_i)$ | the main model's head reads the prediction of token $i+j+1$ |
# | 24 | $L^j = $ cross-entropy of $P^j$ and $t_{i+j+1}$ | the loss of one depth |
# | 25 | $L_{MTP} = \lambda \cdot \frac{1}{D} \sum_j L^j$ | their mean, with one weight $\lambda$, added to the main loss |
#
# $[a\,;\,b]$ puts two vectors of width `d` into one of width `2d`, and the matrix $M_j$ brings it back to `d`.
# Embedding and head are *shared* with the main model: a module owns $M_j$, its norms and its block, nothing else.
#
# **A trap.** The report writes the state first in equation 21. The released weights want the **embedding first**. Both
# have the same shapes, so nothing complains when you follow the report; you will see below what it costs.

# %% [markdown] tags=["naive"]
# ## The naive way
#
# All of MTP's difficulty is counting. So count first: which token does depth `j` read at position `i`, and which does
# it predict? (`-` marks the positions for which the row has no token left to predict.)

# %%
for j in range(3):
    reads = [words[i + j] for i in range(len(words) - 1 - j)]
    predicts = [words[i + j + 1] for i in range(len(words) - 1 - j)]
    for name, row in (("reads", reads), ("predicts", predicts)):
        print(f"depth {j} {name:9}", *(f"{word:5}" for word in row), *["-"] * j)

# %% [markdown]
# Each depth reads what the depth before it has predicted: not the *guess*, the token that really came. Is that not
# cheating? Could the model not say from position `i` alone what the next *two* tokens are?
#
# It could, with two heads that do not know of each other. Look at what they can say. Say that half of the time "red
# lamp" follows, and half of the time "wet dog". Each head alone is right about its own word:

# %%
pairs = {("red", "lamp"): 0.5, ("wet", "dog"): 0.5}
first = {one: p for (one, _), p in pairs.items()}
second = {two: p for (_, two), p in pairs.items()}
print("pair       came    two heads side by side    a chain")
for one in first:
    for two in second:
        came = pairs.get((one, two), 0.0)
        chained = first[one] * (came / first[one])  # how likely the first is, times the second *given* the first
        print(f"{one} {two:5} {came:6.2f} {first[one] * second[two]:12.2f} {chained:21.2f}")

# %% [markdown]
# Two blind heads give half of their belief to a red dog and a wet lamp. A chain first settles the one word and then
# asks for the other, so that it can be exactly right. That is the "causal chain" of the report: depth `j` keeps
# everything that has been said up to token `i + j`.
#
# Now build it.

# %%
import torch
from einops import einsum, rearrange, reduce, repeat
from torch import Tensor

from dsv3_mini.course.checks import lesson_11 as check
from dsv3_mini.course.lesson import same, show_source

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · The joint
# ●●○ · 12 minutes
#
# `hidden[:, i]` is the state at position `i`; the last token that it has read is the one whose embedding is
# `embedding[:, i]`. Bring each state together with the embedding of the token *after* that: norm both, each by its own
# norm, put the **embedding first** and the state second into one vector of width `2d`, and project it with `eh_proj`
# (`[d, 2d]`, laid out as `nn.Linear.weight`). `hnorm` and `enorm` are functions from `[b s d]` to `[b s d]`.
#
# A row of `s` positions gives `s - 1` joints: after the last state no token is left.
#
# <details><summary>Hint 1</summary>The state loses its <em>last</em> position, the embedding its <em>first</em>. Then
# place <code>i</code> of the one belongs to place <code>i</code> of the other.</details>
# <details><summary>Hint 2</summary><code>torch.cat([..., ...], dim=-1)</code> joins along the width;
# <code>einsum(x, eh_proj, "b s joined, d joined -> b s d")</code> projects.</details>


# %%
def join(hidden: Tensor, embedding: Tensor, hnorm, enorm, eh_proj: Tensor) -> Tensor:
    """hidden, embedding [b s d], eh_proj [d 2d] -> [b s-1 d]: state i joined with the token after it."""
    ### BEGIN SOLUTION: cut both so that state i stands beside token i + 1, norm each, embedding first, project to d
    further = enorm(embedding[:, 1:])
    seen = hnorm(hidden[:, :-1])
    return einsum(torch.cat([further, seen], dim=-1), eh_proj, "b s joined, d joined -> b s d")
    ### END SOLUTION


# %%
check.join(join)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · The chain
# ●●○ · 12 minutes
#
# Now several depths. `modules` is a list of functions, one for each depth: `module(embedding, hidden)` takes two
# tensors of equal length that are cut already, and gives the next depth's states (it joins, runs its block, and norms).
# `hidden` is the main model's `[b s d]`; `embedding[:, i]` is the embedding of token `i`, also `[b s d]`.
#
# Depth `j` goes on from the states of depth `j - 1`, so each list of states is one position shorter than the one
# before. Give them all, depth 1 first. A row may be too short for all depths: leave those out that would have no
# position.
#
# <details><summary>Hint 1</summary>At position <code>i</code> depth <code>j</code> reads token <code>i + j</code>, so
# from the embeddings the first <code>j</code> are cut off.</details>
# <details><summary>Hint 2</summary>Keep one name for the states that were made last: <code>hidden =
# module(embedding[:, j:], hidden[:, :-1])</code>, for j from 1.</details>


# %%
def chain(hidden: Tensor, embedding: Tensor, modules: list) -> list[Tensor]:
    """hidden, embedding [b s d] -> states of depth 1 [b s-1 d], depth 2 [b s-2 d], ... as far as the row reaches."""
    ### BEGIN SOLUTION: for each depth cut the states at their end, the embeddings at their beginning, and run its module
    states = []
    for j, module in enumerate(modules, start=1):
        if hidden.shape[1] < 2:
            break
        hidden = module(embedding[:, j:], hidden[:, :-1])
        states.append(hidden)
    return states
    ### END SOLUTION


# %%
check.chain(chain)

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · The whole loss
# ●●○ · 12 minutes
#
# `states[0]` are the main model's states `[b s d]`, `states[j]` those of depth `j`, `[b s-j d]`. One `head` `[v d]`
# reads all of them. `targets[:, i]` is the token *after* position `i`, or `IGNORED` where the row is padded. Add the
# mean of the depths' losses, times `mtp_weight` (the report's $\lambda$), to the main loss. A model without depths has
# its main loss alone.
#
# The cross-entropy is lesson 04's: the package's `cross_entropy(hidden, head, targets)` is the mean over all targets
# that are not `IGNORED`, in nats. `hidden` and `targets` have to be as long.
#
# <details><summary>Hint 1</summary>Targets are one ahead of the tokens already. What does depth 1 predict at position
# 0, and where does that stand in <code>targets</code>?</details>
# <details><summary>Hint 2</summary>Depth <code>j</code> is measured against <code>targets[:, j:]</code>. With
# <code>j = 0</code> that is the main loss.</details>

# %%
from dsv3_mini.train.losses import cross_entropy


def total_loss(states: list[Tensor], head: Tensor, targets: Tensor, mtp_weight: float) -> Tensor:
    """states[j] [b s-j d], head [v d], targets [b s] -> a number: main loss + mtp_weight * mean of the others."""
    ### BEGIN SOLUTION: each depth against its own targets; the first loss stands alone, the mean of the others is weighed
    main, *deeper = [cross_entropy(hidden, head, targets[:, j:]) for j, hidden in enumerate(states)]
    return main + mtp_weight * sum(deeper) / max(len(deeper), 1)
    ### END SOLUTION


# %%
check.total_loss(total_loss)

# %% [markdown] tags=["package"]
# ## The package's own
#
# `MTPModule` is your joint, a block as in every other layer, and a norm. That last norm is easily forgotten: the
# checkpoint calls it `shared_head.norm`, but it is *not* shared, each module has its own. `hidden_states` is your
# chain. What it hands from depth to depth are the normed states, the main model's after its final norm.

# %%
import dsv3_mini as dsv3
from dsv3_mini.model.mtp import MTPModule

show_source(MTPModule, dsv3.DeepSeekV3.hidden_states)

# %% [markdown]
# Are they the same as yours? First the joint, with the weights of the course's trained model. To see the joint alone,
# take the block and the norm out of a copy of its module.

# %%
import copy

from dsv3_mini.data.shipped import shipped
from dsv3_mini.data.tokenizer import Tokenizer

model, tokenizer = dsv3.from_pretrained(shipped("tiny")).eval(), Tokenizer.shipped()


class NoBlock(torch.nn.Module):
    def forward(self, x, turn, mask, cache):
        return x, None


bare = copy.deepcopy(model.mtp[0])
bare.block, bare.norm = NoBlock(), torch.nn.Identity()

# %%
from dsv3_mini.data.stories import HELD_OUT_SEED, generate_story

texts = [generate_story(HELD_OUT_SEED, number).text for number in range(16)]
rows = torch.tensor([[tokenizer.eos_id, *tokenizer.encode(text)][:48] for text in texts])  # [b s], the eos first
with torch.no_grad():
    hidden, embedding = model.main_states(rows)[0], model.embed_tokens(rows)


def package_join(hidden, embedding, hnorm, enorm, eh_proj):
    return bare(embedding[:, 1:], hidden[:, :-1], None)[0]


same(join, package_join, (hidden, embedding, bare.hnorm, bare.enorm, bare.eh_proj.weight))

# %% [markdown]
# Then chain and loss, in a small fresh model with two depths. A module wants to know how far RoPE (lesson 05) turns
# each position. Attention sees distances only, so at every depth the count may start at 0.

# %%
from dsv3_mini.model.rope import rotations


def as_functions(net: dsv3.DeepSeekV3) -> list:
    """The MTP modules of `net` as functions of (embedding, hidden)."""

    def run(module, embedding, hidden):
        return module(embedding, hidden, rotations(net.cfg, torch.arange(hidden.shape[1])))[0]

    return [lambda e, h, module=module: run(module, e, h) for module in net.mtp]


# %%
torch.manual_seed(0)
deep = dsv3.DeepSeekV3(dsv3.ModelConfig.preset("nano", num_nextn_predict_layers=2, initializer_range=0.08))
noise = torch.randint(deep.cfg.vocab_size, (4, 65))
tokens, targets = noise[:, :-1], noise[:, 1:]
main = deep.main_states(tokens)[0]


def package_chain(hidden, embedding, modules):
    return deep.hidden_states(tokens).mtp


same(chain, package_chain, (main, deep.embed_tokens(tokens), as_functions(deep)))

# %%
from dsv3_mini.train.losses import training_losses


def package_loss(states, head, targets, mtp_weight):
    return training_losses(deep, tokens, targets, mtp_weight, balance_weight=0.0).total


states = [main, *deep.hidden_states(tokens).mtp]
same(total_loss, package_loss, *[(states, deep.lm_head.weight, targets, weight) for weight in (0.0, 0.3, 1.0)])

# %% [markdown]
# Now the trap. What happens to a trained model if somebody follows the report's order, state first? To join `[h; e]`
# with the same weights is to join `[e; h]` with the two halves of `eh_proj` exchanged.

# %%
story_inputs, story_targets = rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def depth_1_nats(module: MTPModule) -> float:
    """The loss of the trained model's depth 1 on sixteen stories, with `module` as its MTP module."""
    hidden, embedding = model.main_states(story_inputs)[0], model.embed_tokens(story_inputs)
    turn = rotations(model.cfg, torch.arange(story_inputs.shape[1] - 1))
    deeper, _ = module(embedding[:, 1:], hidden[:, :-1], turn)
    return cross_entropy(deeper, model.lm_head.weight, story_targets[:, 1:]).item()


# %%
exchanged = copy.deepcopy(model.mtp[0])
with torch.no_grad():
    left, right = exchanged.eh_proj.weight.chunk(2, dim=1)
    exchanged.eh_proj.weight.copy_(torch.cat([right, left], dim=1))
cost = depth_1_nats(exchanged) - depth_1_nats(model.mtp[0])
assert cost > 1
print("with the halves exchanged depth 1 loses more than one nat a token:", cost > 1)

# %% [markdown]
# Nothing raised an error, and the main model still writes as well as before, because it never asks its MTP module. Only
# who looks at the module's own loss can notice.

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · Who is left out?
# ●●○ · 12 minutes
#
# A model with several losses has a new way to be wrong: some tensor hangs on none of them. It keeps its first random
# numbers for ever, and no error says so. Write the audit that finds it: the names of all parameters that get nothing
# from a loss, in the order of the dict.
#
# A parameter gets nothing if the loss does not depend on it (its gradient is `None`), or if every entry of its gradient
# is 0. Gradients that an earlier loss has left in `.grad` must not deceive you. And because several losses of one pass
# are to be audited, one after the other, the graph has to outlive your function: ask for `retain_graph=True`.
#
# <details><summary>Hint 1</summary><code>torch.autograd.grad(loss, list_of_tensors, retain_graph=True,
# allow_unused=True)</code> gives a gradient or None for each tensor, and leaves <code>.grad</code> alone.</details>
# <details><summary>Hint 2</summary><code>gradient.any()</code> is true if one entry is not 0.</details>


# %%
def unreached(loss: Tensor, parameters: dict[str, Tensor]) -> list[str]:
    """Names of the parameters that get no gradient from `loss`: none at all, or zeros only."""
    ### BEGIN SOLUTION: fresh gradients of all parameters, the graph kept; the names of those that are None or all zeros
    gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
    return [name for name, g in zip(parameters, gradients, strict=True) if g is None or not g.any()]
    ### END SOLUTION


# %%
check.unreached(unreached)

# %% [markdown]
# The package has the same in `dsv3_mini/train/reach.py`. Put the question to the model with two depths: one loss for
# each of them, one for the main model, all of the same pass.

# %%
from dsv3_mini.train import reach

parameters = dict(deep.named_parameters())
by_depth = {
    name: cross_entropy(hidden, deep.lm_head.weight, targets[:, j:])
    for j, (name, hidden) in enumerate(zip(("main model", "depth 1", "depth 2"), states, strict=True))
}
same(unreached, reach.unreached, *[(loss, parameters) for loss in by_depth.values()])

# %%
from dsv3_mini.viz.figures.mtp import reach_figure

PARTS = {"embedding": "embed_tokens.", "main layers": "layers.", "final norm": "norm.", "head": "lm_head.",
         "depth 1": "mtp.0.", "depth 2": "mtp.1."}  # fmt: skip
reached = {}
for loss_name, loss in by_depth.items():
    left_out = set(reach.unreached(loss, parameters))
    members = {part: {name for name in parameters if name.startswith(begin)} for part, begin in PARTS.items()}
    reached[loss_name] = {part: (len(names - left_out), len(names)) for part, names in members.items()}
reach_figure(reached)

# %%
assert not reach.unreached(by_depth["depth 2"], parameters)
assert {name.split(".")[0] for name in reach.unreached(by_depth["main model"], parameters)} == {"mtp"}
print(f"the loss of depth 2 alone reaches all {len(parameters)} tensors of the model")

# %% [markdown]
# Read the table row by row. The loss of a depth goes back through the whole chain: through its own module, the depths
# before it, and *all* of the main model. It trains the embedding through two doors, as the text's tokens and as the
# tokens that the joints read. It does not train a depth behind it. So every state of the main model hears, besides "you
# should have known the next token", a quieter "you should have held what is needed for the one after". How much quieter
# is $\lambda$'s business.

# %% [markdown] tags=["experiment"]
# ## Experiment: what the second token learns
#
# Depth 1 predicts a token that lies two ahead of the state that it starts from. Has it learnt to look two steps ahead?
# Take tokens of stories that the trained model never saw, and ask several readers for the *same* tokens $t_{i+2}$:
#
# 1. the main model at position $i + 1$: it has read everything before the token;
# 2. depth 1 at position $i$: it has read the same, the last token through its joint;
# 3. one who stands at position $i$ and has *not* read token $i + 1$. We make this reader from the same model: let it
#    take its six likeliest next tokens, ask depth 1 what would follow each, and average, weighed by how likely each is;
# 4. depth 1, with the tokens of another story in its joint;
# 5. depth 1, with the states of another story in its joint.
#
# **What we expect.** If depth 1 has learnt *one more step*, it comes within half a nat of the main model, and reader 3
# pays at least 0.2 nats more than it, for not knowing the token between. If it has learnt to look two steps ahead, it
# hardly needs the token: reader 3 is as good. And if it leaned on one of its two inputs only, spoiling the other (4, 5)
# would cost it nothing; we expect that either costs more than half a nat.

# %%
places = torch.arange(8, 46, 4)  # positions i in each of the 16 rows
wanted = rows[:, places + 2]
(depth_1,) = as_functions(model)


def surprise(states: Tensor) -> float:
    """states [b i d], of those who are asked for `wanted` -> nats per token."""
    return cross_entropy(states, model.lm_head.weight, wanted).item()


# %%
with torch.no_grad():
    further, seen = embedding[:, 1:], hidden[:, :-1]
    nats = {
        "main model, one token back": surprise(hidden[:, places + 1]),
        "depth 1, two tokens back": surprise(depth_1(further, seen)[:, places]),
    }


# %%
@torch.no_grad()
def without_reading(i: int, guesses: int = 6) -> Tensor:
    """[b v]: in each row, what one who has read up to token i can believe about token i + 2."""
    first = model(rows[:, : i + 1]).logits[:, -1].softmax(-1).topk(guesses)
    so_far = repeat(rows[:, : i + 1], "b s -> (b guess) s", guess=guesses)
    supposed = torch.cat([so_far, rearrange(first.indices, "b guess -> (b guess) 1")], dim=1)
    then = model(supposed).mtp_logits[0][:, -1].softmax(-1)
    weights = first.values / reduce(first.values, "b guess -> b 1", "sum")
    return einsum(weights, rearrange(then, "(b guess) v -> b guess v", guess=guesses), "b guess, b guess v -> b v")


# %%
from dsv3_mini.viz.figures.mtp import readers_figure

believed = torch.stack([without_reading(int(i)) for i in places], dim=1)  # [b i v]
nats["two tokens back, has not read the next"] = -believed.gather(-1, wanted[..., None]).log().mean().item()
with torch.no_grad():
    nats["depth 1, another story's tokens"] = surprise(depth_1(further.roll(1, 0), seen)[:, places])
    nats["depth 1, another story's states"] = surprise(depth_1(further, seen.roll(1, 0))[:, places])
readers_figure(nats, "Who has read the next token knows the one after it")

# %%
main_model, deeper, blind, other_tokens, other_states = nats.values()
print("depth 1 is within half a nat of the main model:        ", abs(deeper - main_model) < 0.5)
print("not to have read the token between costs over 0.2 nats:", blind - deeper > 0.2)
print("another story's tokens cost over half a nat:           ", other_tokens - deeper > 0.5)
print("another story's states cost over half a nat:           ", other_states - deeper > 0.5)
assert abs(deeper - main_model) < 0.5 < min(other_tokens, other_states) - deeper and blind - deeper > 0.2

# %% [markdown]
# So depth 1 does not see two steps ahead. It learns *one more step*, from a state that was made before the step's token
# was known, and it needs both of its inputs. The gap between bars 2 and 3 is, about, what the token between says of the
# next one; no reader at position $i$ can know that, however well it is trained.
#
# That is also why the MTP loss in a training log is about as low as the main loss, which puzzles people at first: both
# readers know the same tokens. Two things part them. The newest token has been through one block only, and not through
# all of the model; and what depth 1 says has been through one block *more* than what the main model says. In a model of
# four layers a fifth one counts. The first two bars show how that comes out here.
#
# What is it good for, then? Not for depth 1: for the states that it starts from. They are made at position $i$, and
# when the next token arrives one block has to make do with them: that is what the gradient asks of them. The report
# measures the gain by training with and without MTP at two scales (Table 4): with it is better. We have not measured
# that here. Such comparisons are what lesson 14 is about.

# %% [markdown] tags=["interactive"]
# ## The prediction ladder
#
# What does each depth believe, at each position? Each column is a token of the text. Under it stands what the main
# model had guessed one token back, and what depth 1 had guessed two tokens back, each with the probability that it had
# given to the token that came. The frames are one position's rungs.
#
# - Move the position along the story. Where do both rungs fail? Where a story really leaves it open: the next name,
#   the next thing.
# - Then let depth 1 read *another* token than the one that came. The main model's rung stays as it is. Depth 1 goes
#   along with what it is told, and believes something else about the token after.

# %%
from dsv3_mini.viz.widgets.mtp import OTHER, beliefs, ladder_explorer

ladder = ladder_explorer(model, tokenizer)
ladder

# %%
before = ladder.picture.value
ladder.set(position=12, reads=OTHER)
assert ladder.picture.value != before
story = rows[0].tolist()
told = beliefs(model, story)
supposed = beliefs(model, [*story[:13], tokenizer.eos_id, *story[14:]])  # as if the story had ended after token 12
moved = [float((there[12] - here[12]).abs().max()) for here, there in zip(told, supposed, strict=True)]
print("main model at position 12, token 13 changed: moved", moved[0] > 1e-4)
print("depth 1 at position 12, token 13 changed:    moved", moved[1] > 1e-4)
assert moved[0] < 1e-4 < moved[1]

# %% [markdown]
# `ladder_explorer(model, tokenizer, {"mine": "..."})` shows a text of yours.
#
# ## Find the bug
#
# A friend trains with MTP and is delighted: "the second token is easy! After a few steps its loss is far below the main
# one". You are suspicious, and let the friend's code train on *pure chance*: every token drawn at random, from 32, all
# as likely. Nobody can predict those. Whoever gets below $\ln 32$ nats has looked at the answer.


# %%
def friends_logits(targets: Tensor, hidden: Tensor, embed, module, head) -> Tensor:
    """targets [b s], the token after each position; hidden [b s d] -> [b s-1 v]: logits of the second token."""
    further = embed(targets)[:, 1:]  # depth 1 reads one token further
    deeper = module(further, hidden[:, :-1])
    return head(deeper)


# %%
torch.manual_seed(0)
net = dsv3.DeepSeekV3(dsv3.ModelConfig.preset("nano", vocab_size=32, initializer_range=0.08))
(net_depth_1,) = as_functions(net)


# %%
def train_on_chance(second_token_logits, steps: int) -> list[float]:
    """Train `net` on rows of pure chance -> its last losses in nats: of the next token, and of the second."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(steps):
        chance = torch.randint(32, (16, 33))
        targets, hidden = chance[:, 1:], net.main_states(chance[:, :-1])[0]
        second = second_token_logits(targets, hidden, net.embed_tokens, net_depth_1, net.lm_head)
        pairs = ((net.lm_head(hidden), targets), (second, targets[:, 1:]))
        losses = [torch.nn.functional.cross_entropy(z.flatten(0, 1), y.flatten()) for z, y in pairs]
        sum(losses).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [loss.item() for loss in losses]


# %%
import math

next_token, second_token = train_on_chance(friends_logits, steps=80)
print(f"nobody can do better than ln 32 = {math.log(32):.2f} nats")
print("the main model does not: ", next_token > 0.97 * math.log(32))
print("the friend's depth 1 does, by far:", second_token < 0.5 * math.log(32))
assert second_token < 0.5 * math.log(32) < 0.97 * math.log(32) < next_token

# %% [markdown] tags=["bug"]
# ### Find the bug · The second token was too easy
# ●●○ · 10 minutes
#
# The friend's comment is right and the line below it is not. Write the function as it should be. `embed`, `module` and
# `head` are functions: token ids to embeddings, `(embedding, hidden)` to states, states to logits. What comes out is
# measured against `targets[:, 1:]`.
#
# <details><summary>Hint 1</summary>Say in words which token <code>targets[:, 0]</code> is, and which one the prediction
# at place 0 is measured against.</details>
# <details><summary>Hint 2</summary>One token further than the <em>tokens</em>. How much further than the
# <em>targets</em> is that?</details>


# %%
def second_token_logits(targets: Tensor, hidden: Tensor, embed, module, head) -> Tensor:
    """targets [b s], the token after each position; hidden [b s d] -> [b s-1 v]: logits of the second token."""
    ### BEGIN SOLUTION: state i meets the token right after it, and nothing that it is asked for
    further = embed(targets)[:, :-1]
    deeper = module(further, hidden[:, :-1])
    return head(deeper)
    ### END SOLUTION


# %%
check.second_token_logits(second_token_logits)

# %% [markdown]
# Keep the test, it takes seconds: a loss on pure chance that falls below $\ln v$ has seen the answer, in any model.
# On real text the same leak looks like good news.

# %% [markdown] tags=["at-671b"]
# ## At 671B
#
# The released model has one depth, and its block is a full MoE layer. What is it, in parameters? The checkpoint stores
# embedding and head once more for it; in memory they are the main model's.

# %%
from dsv3_mini.ledger import count_parameters, flops_per_token, mtp_flops_per_token

large = dsv3.ModelConfig.preset("671b")
counts = count_parameters(large)
print(f"main model            {counts.main:>15,}")
print(f"MTP module            {counts.mtp_unique:>15,}   {counts.mtp_unique / counts.main:.1%} of it")
print(
    f"  its joint, eh_proj  {counts.mtp_module['eh_proj']:>15,}   d x 2d = {large.hidden_size:,} x {2 * large.hidden_size:,}"
)
print(f"  as it is shipped    {counts.mtp_shipped:>15,}   embedding and head again")
assert counts.shipped == counts.main + counts.mtp_shipped

# %% [markdown]
# And in training? A second question for every token, at the price of one layer and one more pass through the head; the
# head is the larger half, because it gives a logit for every token of the vocabulary once more.

# %%
main, extra = flops_per_token(large, context=4096), mtp_flops_per_token(large, context=4096)
print(f"a trained token costs {main.train / 1e9:.1f} GFLOP, its second question {extra.train / 1e9:.1f} more:")
print(f"{extra.train_linear / 1e9:.1f} in matrices, {extra.train_attention / 1e9:.1f} in attention over 4,096 tokens")
print(f"the shared head takes {6 * counts.head.activated / extra.train:.0%} of that")
for depths in (1, 2, 4):
    more = mtp_flops_per_token(large.replace(num_nextn_predict_layers=depths), context=4096).train
    print(
        f"{depths} depth{'s' if depths > 1 else ' '}: {more / main.train:5.1%} more to train, each weighs lambda / {depths}"
    )

# %% [markdown]
# $\lambda$ is a schedule, a function of the tokens seen. Late in training the states answer to the second question
# less.

# %%
from dsv3_mini.train.recipe import Recipe

weight = Recipe.preset("deepseek-v3").mtp_lambda
for trillions in (0, 5, 9.9, 10, 14.7):
    print(f"after {trillions:>4} trillion tokens: lambda = {weight(trillions * 1e12)}")

# %% [markdown] tags=["recap"]
# ## Recap
#
# 1. In a log the MTP loss is about as low as the main loss. Does the model see two tokens ahead?
#    <details><summary>Answer</summary>No. Depth 1 has read the next token before it is asked for the one after, so it
#    knows as much as the main model does one position later. It learns one more step, from an older state.</details>
# 2. You load released weights. The text that the model writes is faultless, and the loss of its MTP module is worse
#    than guessing. Where do you look first?
#    <details><summary>Answer</summary>At the order in the joint (embedding first, then the state), and at the norm
#    before the shared head. Writing does not ask the module, so only its own loss tells.</details>
# 3. A model has four depths and $\lambda = 0.3$. What does the loss of depth 3 weigh, and which modules does it train?
#    <details><summary>Answer</summary>0.3 / 4 = 0.075 of the main loss. It trains depths 1 to 3 and all of the main
#    model, embedding and head included, and not depth 4.</details>

# %% [markdown] tags=["next"]
# ## Next
#
# You have built every part of the model now. Lesson 12 puts them together and holds the result against another
# implementation and against the count of every parameter. Depth 1 comes back in lesson 22: given the model's *own*
# guess instead of the token that came, it drafts the token after, and a model that checks its drafts writes faster. The
# report gives 85 to 90% accepted drafts, and 1.8 times the speed.
