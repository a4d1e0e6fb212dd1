# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   dsv3:
#     title: Node-limited routing
#     minutes: 80
#     after: [09_load_balance]
#     builds: groups ranked and opened, messages counted by token and by node, queues before full experts
#     tracks: [two-days, term]
# ---

# %% [markdown] tags=["why"]
# # 10 · Node-limited routing
#
# The experts of one layer of DeepSeek-V3 are spread over 64 GPUs in eight machines, which one calls **nodes**. A token
# lies on one of those GPUs. Its eight experts lie on others, and to each of them a copy of the token's vector must
# travel: over a fast wire inside a node, over a slow one between nodes. A router that does not care where experts lie
# sends copies to nearly every node.
#
# In this lesson the router learns to care. You write the rule that lets a token into four nodes only, count the
# messages that it saves, measure what it costs, and find out why DeepSeek-V3 never turns a token away at a full expert.
# Nothing is sent yet: that is lesson 19. Here we count.
#
# Two choices of one token, that lies on the orange GPU of node 1. Above, the eight experts may be anywhere. Below, they
# are on four nodes at most, and where two share a node, one copy crosses the network and is handed on inside.

# %%
from dsv3_mini.parallel.traffic import Cluster
from dsv3_mini.viz.figures.cluster_map import View, cluster_figure

cluster = Cluster(nodes=8, gpus=8, experts=4)  # 8 GPUs in a node, 4 experts on a GPU
free = View.of(cluster, "A free choice", [40, 70, 5, 101, 150, 152, 230, 170], home=10)
limited = View.of(cluster, "Four nodes at most", [40, 61, 150, 101, 118, 145, 230, 152], home=10)
cluster_figure(cluster, free, limited)

# %% [markdown] tags=["paper"]
# ## In the report
#
# Section 2.1.2 has two short paragraphs for this lesson. The first is **node-limited routing**: a token is sent to at
# most $M$ nodes, and the nodes are ranked by the sum of the token's $K/M$ highest affinities among the experts that lie
# there. $K$ is the number of experts that a token chooses. With $p_i$ for how much the token prefers expert $i$, and
# $E_n$ for the experts on node $n$:
#
# $$ \mathrm{rank}_n = \text{the sum of the } \tfrac{K}{M} \text{ largest } p_i \text{ with } i \in E_n $$
#
# The $M$ nodes of highest rank are open, and the token takes the $K$ best of the experts there. The second paragraph is
# **no token-dropping**: because the load is balanced (lesson 09), every token gets all experts that it chose, in
# training and when the model is used. Section 3.2 says what the limit buys: the wires inside a node are 3.2 times as
# fast as those between nodes.
#
# | | in the report | in the released code, and here |
# |---|---|---|
# | what is summed | affinities $s_i$ | preferences $s_i + b_i$, with the bias of lesson 09 |
# | how many of them | $K/M$, which is $8/4 = 2$ | always the two best |
# | a node | a machine | a *group*: a run of experts, `n_group` of them, `topk_group` open |
# | closed experts | not said | $-\infty$, and the find-the-bug shows why not 0 |
#
# In shapes: `T` tokens, `k` chosen experts, `e` experts, `g` groups (nodes), `m` members of a group.

# %% [markdown] tags=["naive"]
# ## The naive way
#
# One token, twelve experts on four nodes, three to be chosen. `preference` has a number for each expert; experts 0 to 2
# lie on node 0, 3 to 5 on node 1, and so on.


# %%
def naive_choice(preference: list[float], nodes: int, limit: int, k: int) -> list[int]:
    """The k experts that one token prefers, on the `limit` nodes whose two best preferences sum highest."""
    size = len(preference) // nodes

    def rank(node: int) -> float:
        return sum(sorted(preference[node * size : (node + 1) * size])[-2:])

    open_nodes = sorted(range(nodes), key=rank, reverse=True)[:limit]
    candidates = [expert for expert in range(len(preference)) if expert // size in open_nodes]
    return sorted(candidates, key=lambda expert: preference[expert], reverse=True)[:k]


# %%
preference = [0.9, 0.1, 0.2, 0.6, 0.7, 0.1, 0.5, 0.3, 0.4, 0.8, 0.2, 0.1]
for limit in (4, 2, 1):
    experts = naive_choice(preference, nodes=4, limit=limit, k=3)
    wanted = sum(preference[expert] for expert in experts)
    print(f"M = {limit}: experts {experts} on nodes {sorted({e // 3 for e in experts})}, wanted {wanted:.1f}")

# %% [markdown]
# Freely, the token visits three nodes. With two it gives up expert 9 for expert 3, its second best for its fourth. With
# one it has to take what node 1 has left, and leaves the expert that it wanted most: node 0 has the best single expert,
# node 1 the two best together.
#
# Now for all tokens at once.

# %%
import torch
from einops import einsum, rearrange, reduce, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsv3_mini.course.checks import lesson_10 as check
from dsv3_mini.course.lesson import same, show_source

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Open the best groups
# ●●○ · 12 minutes
#
# `preference` has the shape `[b s e]`: for each token a number for each expert, which may be negative. Mark the experts
# that the token may choose, those of its `topk_group` best groups. A group is a run of neighbouring experts, and its
# rank is the sum of the *two best* preferences in it (you ranked groups in lesson 01). The result is `[b s e]` of true
# and false.
#
# <details><summary>Hint 1</summary>Four steps: split <code>e</code> into <code>(g m)</code>; rank the groups; find the
# best ones with <code>topk</code>; give every member the mark of its group.</details>
# <details><summary>Hint 2</summary>From numbers of groups to marks:
# <code>torch.zeros_like(rank, dtype=torch.bool).scatter(-1, best, True)</code>.</details>
# <details><summary>Hint 3</summary><code>repeat(is_open, "b s g -> b s (g m)", m=...)</code> is the way back to
# experts. Which letter runs fastest?</details>


# %%
def open_experts(preference: Float[Tensor, "b s e"], n_group: int, topk_group: int) -> Bool[Tensor, "b s e"]:
    """True for the experts in each token's best `topk_group` groups; a group's rank is the sum of its two best."""
    ### BEGIN SOLUTION: split e into groups, rank them by the sum of their two best, mark the best, repeat the marks
    grouped = rearrange(preference, "b s (g m) -> b s g m", g=n_group)
    rank = reduce(grouped.topk(2, dim=-1).values, "b s g two -> b s g", "sum")
    best = rank.topk(topk_group, dim=-1).indices
    is_open = torch.zeros_like(rank, dtype=torch.bool).scatter(-1, best, True)
    return repeat(is_open, "b s g -> b s (g m)", m=grouped.shape[-1])
    ### END SOLUTION


# %%
check.open_experts(open_experts)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Where must it go?
# ●○○ · 8 minutes
#
# Messages are counted for tokens in one long row: `chosen` is `[T k]`, the numbers of each token's experts. The
# `n_experts` experts lie evenly on `n_nodes` nodes, in order. Mark the nodes that each token visits, `[T g]`. Two
# experts on one node are *one* visit.
#
# <details><summary>Hint 1</summary>On which node does expert 37 lie, if each node has 32? Whole-number division,
# <code>//</code>.</details>
# <details><summary>Hint 2</summary><code>scatter</code> again. Writing True twice to one place does no harm, and that
# is what makes two experts one visit.</details>


# %%
def visited_nodes(chosen: Int[Tensor, "T k"], n_experts: int, n_nodes: int) -> Bool[Tensor, "T g"]:
    """True where a node holds at least one of the token's experts."""
    ### BEGIN SOLUTION: from experts to their nodes, from nodes to marks
    node = chosen // (n_experts // n_nodes)
    return torch.zeros(len(chosen), n_nodes, dtype=torch.bool).scatter(1, node, True)
    ### END SOLUTION


# %%
check.visited_nodes(visited_nodes)

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · Who sends to whom
# ●●○ · 12 minutes
#
# Every token lies somewhere: `home`, `[T]`, is the number of its node. Count the messages between nodes, as a table
# `[sender receiver]`: row 2, column 5 says how many tokens of node 2 visit node 5. What a token finds at home needs no
# network, so that the diagonal is 0.
#
# A column's sum is what a node receives, a row's sum what it sends, and the whole table's sum divided by the tokens is
# the number of messages per token.
#
# <details><summary>Hint 1</summary>Give the home marks as well: <code>torch.nn.functional.one_hot(home, nodes)</code>
# is <code>[T sender]</code>, 1 at home and 0 elsewhere.</details>
# <details><summary>Hint 2</summary>Then it is a sum over tokens of a product of two marks, and einsum takes words for
# letters: <code>"T sender, T receiver -> sender receiver"</code>. It multiplies numbers: <code>visited.long()</code>.
# </details>


# %%
def messages(visited: Bool[Tensor, "T g"], home: Int[Tensor, " T"]) -> Int[Tensor, "sender receiver"]:
    """How many tokens each node sends to each other node, once for every node that a token visits; 0 to itself."""
    ### BEGIN SOLUTION: marks of the homes, an einsum over the tokens, 0 on the diagonal
    sender = torch.nn.functional.one_hot(home, visited.shape[1])
    sent = einsum(sender, visited.long(), "T sender, T receiver -> sender receiver")
    return sent.fill_diagonal_(0)
    ### END SOLUTION


# %%
check.messages(messages)

# %% [markdown] tags=["package"]
# ## The package's own
#
# The limit is one function of the router, and it stands between two lines that you know: after the bias, before the
# choice. Counting belongs to `parallel/`, with the machines.

# %%
from dsv3_mini.model.router import Router, limit_to_groups
from dsv3_mini.parallel.traffic import nodes_reached, traffic

show_source(Router.forward, limit_to_groups, nodes_reached, traffic)


# %%
def limit_with_yours(preference: Tensor, n_group: int, topk_group: int) -> Float[Tensor, "b s e"]:
    return preference.masked_fill(~open_experts(preference, n_group, topk_group), -torch.inf)


torch.manual_seed(0)
same(limit_with_yours, limit_to_groups, (torch.randn(2, 5, 16), 4, 2), (torch.randn(1, 9, 12) - 3, 3, 1))
chosen_by_some = torch.rand(30, 16).topk(4).indices
same(visited_nodes, nodes_reached, (chosen_by_some, 16, 4), (chosen_by_some, 16, 8))
same(messages, traffic, (nodes_reached(chosen_by_some, 16, 4), torch.arange(30) % 4))

# %% [markdown]
# ## Messages, counted
#
# Take the released model's router, 256 experts on eight nodes, as it is on the first day of training: its weights are
# random, its biases 0. Give it 2,048 tokens, dealt to the nodes like cards, and let it choose under every limit from one
# node to eight, which is none.

# %%
from dsv3_mini import ModelConfig

large = ModelConfig.preset("671b")
e, k, nodes = large.n_routed_experts, large.num_experts_per_tok, large.n_group
torch.manual_seed(0)
gate = Router(large, layer=large.first_k_dense_replace).requires_grad_(False)
torch.nn.init.normal_(gate.weight, std=large.initializer_range)
x = torch.randn(1, 2048, large.hidden_size)  # a norm stands before the router: numbers of size 1
home = torch.arange(2048) % nodes


def choose_within(limit: int, x: Tensor) -> Int[Tensor, "T k"]:
    """The router's choice among the experts of at most `limit` nodes."""
    gate.topk_group = limit
    return gate(x).chosen[0]


# %%
chosen = {limit: choose_within(limit, x) for limit in range(1, nodes + 1)}
print(f"{'M':>2} {'visited':>8} {'at most':>8} {'messages':>9} {'busiest':>8}")
for limit, experts in chosen.items():
    reached = nodes_reached(experts, e, nodes)
    visits, sent = reached.sum(dim=1), traffic(reached, home)
    received = sent.sum(dim=0).float()
    per_token, busiest = sent.sum() / len(home), received.max() / received.mean()
    print(f"{limit:2} {visits.float().mean():8.1f} {visits.max():8} {per_token:9.1f} {busiest:8.1f}")

# %% [markdown]
# By limit: the nodes that a token visits, on average and at most; the messages that it sends; and what the busiest node
# receives, in even shares. That last number is a matter of balance, not of the limit: a random router has no favourite
# nodes.
#
# Is the free choice's number right? A token that picks 8 of 256 experts blindly misses a node of 32 with the
# probability that all 8 lie among the other 224. So the mean number of nodes has a formula, and one visit in eight is
# to the token's own node, which sends nothing.

# %%
import math

missed = math.comb(e - e // nodes, k) / math.comb(e, k)
by_formula = nodes * (1 - missed)
visits = nodes_reached(chosen[nodes], e, nodes).sum(dim=1)
measured = visits.float().mean().item()
print(f"a node is missed with probability {missed:.2f}: {by_formula:.1f} nodes, {by_formula * 7 / 8:.1f} messages")
print("measured the same, within a tenth of a node:", abs(measured - by_formula) < 0.1)
print(f"free choices that lie on 4 nodes or fewer anyway: {(visits <= 4).float().mean():.0%}")

# %% [markdown]
# What is saved is first the *worst* token: no token goes to more than `M` nodes, whatever its router has learnt, so that
# memory and wires can be planned for `M` and not for eight. And what is it worth to hand copies on inside a node? For
# comparison: a copy over the network for each expert.
#
# What is lost is choice. The **advantage** of a choice is the sum of its eight affinities beyond that of eight experts
# picked blindly; 100% is the advantage of the free choice.

# %%
from dsv3_mini.viz.figures.node_limited import Counted, messages_figure

scores = gate(x).scores[0]
chance, best_sum = k * scores.mean(), scores.topk(k).values.sum(dim=1).mean()


def counted(experts: Int[Tensor, "T k"]) -> Counted:
    """Messages and kept advantage of one choice."""
    away = nodes_reached(experts, e, nodes).scatter(1, home[:, None], False).sum(dim=1)
    kept = (scores.gather(1, experts).sum(dim=1).mean() - chance) / (best_sum - chance)
    return Counted(away.float().mean().item(), int(away.max()), kept.item())


# %%
counts = {limit: counted(experts) for limit, experts in chosen.items()}
copies = (chosen[nodes] // (e // nodes) != home[:, None]).sum(dim=1).float().mean().item()
once_a_node = [counts[limit].mean for limit in (nodes, 4)]
print(
    f"messages: a copy for each expert {copies:.1f}, for each node {once_a_node[0]:.1f}, at M = 4 {once_a_node[1]:.1f}"
)
print(f"advantage kept at M = 4: {counts[4].kept:.0%}")
messages_figure(counts, copies)

# %% [markdown]
# Remember that this router is untrained: its tokens have no favourites, and experts that belong together do not lie
# together. A router that is *trained* with the limit can learn both. What the limit costs a trained model we measure
# below.
#
# ## The other way to limit traffic
#
# Many mixtures of experts limit something else: each expert has a **capacity**, a fixed number of places for each
# batch. It is given as a *capacity factor*: 1.0 means exactly the even share, `T * k / e` places, and 1.25 a quarter
# more. A choice that finds its expert full is **dropped**: the expert adds nothing to that token, whose vector passes
# by on the residual stream. What it buys is that all experts have the same number of rows, known beforehand.

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · Who finds a place?
# ●●○ · 12 minutes
#
# `chosen` is `[T k]`. Tokens come in order, and each token's choices from left to right. An expert takes the first
# `capacity` choices that fall on it. Mark the choices that find a place, `[T k]`. No loop over tokens, please: a batch
# has many.
#
# <details><summary>Hint 1</summary>Flatten the choices to one row of <code>T * k</code>. A choice finds a place if at
# most <code>capacity</code> choices up to and with itself fell on the same expert.</details>
# <details><summary>Hint 2</summary><code>one_hot(choices, n_experts).cumsum(0)</code> is a table
# <code>[(T k) e]</code>: how many have come to each expert by then.</details>
# <details><summary>Hint 3</summary>From each row you need one column, the choice's own expert: <code>gather(1,
# choices[:, None])</code>.</details>


# %%
def finds_place(chosen: Int[Tensor, "T k"], n_experts: int, capacity: int) -> Bool[Tensor, "T k"]:
    """True where a choice is among the first `capacity` choices of its expert, token by token, left to right."""
    ### BEGIN SOLUTION: count the choices of each expert as they come, look up the own expert's count, compare
    choices = rearrange(chosen, "T k -> (T k)")
    come = torch.nn.functional.one_hot(choices, n_experts).cumsum(0)
    place = come.gather(1, choices[:, None])
    return rearrange(place <= capacity, "(T k) 1 -> T k", k=chosen.shape[1])
    ### END SOLUTION


# %%
check.finds_place(finds_place)

# %% [markdown]
# `dsv3_mini` has no capacity anywhere: its experts take as many rows as come (`grouped_mm`, lesson 08). For comparison
# there is a version in the course's own drawer, with a switch that makes every router of a model drop.

# %%
from dsv3_mini.course.capacity import dropping, within_capacity

show_source(dropping)
same(finds_place, within_capacity, (chosen_by_some, 16, 5), (chosen_by_some, 16, 9))

# %% [markdown] tags=["experiment"]
# ## Experiment 1: why the sum of two?
#
# The report ranks a node by its $K/M$ best experts. Is that the best number? Let `j` be how many are summed, and look
# for the `j` that keeps the most advantage, for `M` of 1, 2 and 4 with $K = 8$.
#
# **What we expect.** A token takes $K/M$ experts from each of its nodes, on average. With `j` too small the rank does
# not see them all; with `j` too large it counts experts that will not be taken. For `M = 1` the rank *is* the sum that
# is wanted when `j = 8`. For the others, if the best `j` is more than one away from $K/M$, the rule is wrong or we have
# not understood it.

# %%
grouped = rearrange(scores, "T (g m) -> T g m", g=nodes)


def kept_by_rank(j: int, limit: int) -> float:
    """The advantage kept if nodes are ranked by the sum of their j best."""
    rank = reduce(grouped.topk(j, dim=-1).values, "T g j -> T g", "sum")
    is_open = torch.zeros_like(rank, dtype=torch.bool).scatter(1, rank.topk(limit, dim=1).indices, True)
    left = rearrange(grouped.masked_fill(~is_open[..., None], -torch.inf), "T g m -> T (g m)")
    return ((left.topk(k).values.sum(dim=1).mean() - chance) / (best_sum - chance)).item()


# %%
from dsv3_mini.viz.figures.node_limited import rank_figure

kept = {limit: [kept_by_rank(j, limit) for j in range(1, k + 1)] for limit in (1, 2, 4)}
for limit, shares in kept.items():
    best = 1 + max(range(k), key=shares.__getitem__)
    print(
        f"M = {limit}: K/M = {k // limit}, best j = {best}; the rule is at most one off:", abs(best - k // limit) <= 1
    )
    assert abs(best - k // limit) <= 1
print(f"always two, as in the released code: at M = 1 {kept[1][1]:.0%} are kept, by the rule {kept[1][7]:.0%}")
rank_figure(kept, k)

# %% [markdown]
# The rule finds the best `j`, and the curves are flat around it: at `M = 4` one more or less is worth next to nothing.
# The two that the released code always sums are the rule's own for the released model, and would be too few at `M = 1`.
#
# ## Experiment 2: what a trained model pays
#
# The tiny model has 16 experts in four groups and chooses four, in at most two groups: it was trained so. Change its
# limit without training it anew, and measure the loss on stories that it has never seen. Then put its limit back, and
# let its routers drop.
#
# **What we expect.** With `M = 1` a token's four experts are all four of one group, so nearly all choice is gone: the
# loss rises. With `M = 3` or 4 it may choose better experts, but it was never trained with such choices: little changes
# either way. Dropping takes experts away and gives nothing back: the more is dropped, the higher the loss. If dropping at
# a factor of 1.0 costs nothing, those experts were not needed, and capacity would be the simpler way.

# %%
import dsv3_mini as dsv3
from dsv3_mini.data.shipped import shipped
from dsv3_mini.data.stream import held_out_rows
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.evaluate.bits_per_byte import held_out_loss
from dsv3_mini.train.balance import routers

model, tokenizer = dsv3.from_pretrained(shipped("tiny")).eval(), Tokenizer.shipped()


def full_rows(domain: str) -> Int[Tensor, "b s1"]:
    """Held-out text in rows of 257 tokens, cut where a row is full: padding would stand in the queues, too."""
    rows = held_out_rows(domain, tokenizer, seq_len=256, rows=16).tokens
    tokens = rows[rows != tokenizer.pad_id]
    return rearrange(tokens[: len(tokens) // 257 * 257], "(b s1) -> b s1", s1=257)


# %%
stories = full_rows("stories")


def loss_of_stories() -> float:
    """Nats per token of the tiny model as it is now. It is given one row at a time."""
    return held_out_loss(model, stories, tokenizer.pad_id, batch=1).per_token


# %%
trained_with, by_limit = model.cfg.topk_group, {}
for limit in [*range(1, model.cfg.n_group + 1), trained_with]:  # the last puts it back
    for router in routers(model):
        router.topk_group = limit
    by_limit[limit] = loss_of_stories()
untouched = by_limit[trained_with]
extra = {limit: loss - untouched for limit, loss in by_limit.items()}
print("one node instead of two costs more than 1% of the loss:", extra[1] > 0.01 * untouched)
print("three or four change it less than one does:", max(abs(extra[3]), abs(extra[4])) < extra[1])

# %%
from dsv3_mini.viz.figures.node_limited import price_figure

by_factor = {}
for factor in (0.75, 1.0, 1.25, 1.5):
    with dropping(model, factor) as shares:
        by_factor[factor] = (loss_of_stories(), sum(shares) / len(shares))
losses = [loss for loss, _ in by_factor.values()]
few = [loss for loss, share in by_factor.values() if share < 0.02]
print("the loss falls from a factor of 0.75 to 1.0 to 1.25:", losses[0] > losses[1] > losses[2])
print("at 1.0 dropping costs more than 1% of the loss:", losses[1] > 1.01 * untouched)
print("where less than 2% is dropped it stays the same to 1%:", all(abs(x / untouched - 1) < 0.01 for x in few))
price_figure(by_limit, by_factor, untouched, trained_with)

# %% [markdown]
# Many dropped choices cost; a few are not seen in the loss of so small a model. How many there are depends on the batch,
# which nobody knows beforehand. The experts are balanced over batches of *all* kinds of text: stories alone are less
# even, and one row by itself less than many. See for yourself which experts overflow, and how many places stay empty at
# the same time. A factor that drops nothing is a factor that computes a lot of nothing.

# %%
from dsv3_mini.viz.widgets.node_limited import capacity_explorer, dropped_and_empty

SPARSE = 1  # the middle one of the sparse layers
batches = {"one row of stories": stories[:1], "all rows of stories": stories, "all rows of sums": full_rows("sums")}
with torch.no_grad():
    loads = {name: model(rows[:, :-1]).routing[SPARSE].load for name, rows in batches.items()}
loads["stories and sums"] = loads["all rows of stories"] + loads["all rows of sums"]
queues = capacity_explorer(loads)
queues

# %%
before = queues.picture.value
queues.set(batch="all rows of stories", factor=1.5)
assert queues.picture.value != before
outcomes = [dropped_and_empty(loads["one row of stories"], factor) for factor in (1.0, 1.5, 2.0, 4.0)]
lost, empty = zip(*outcomes, strict=True)
print("a larger factor drops less:", list(lost) == sorted(lost, reverse=True))
print("and leaves more places empty:", list(empty) == sorted(empty))

# %% [markdown]
# So DeepSeek-V3 has no capacity. It takes every choice, and pays in another coin: all wait for the busiest expert. That
# is why balance matters so much here (lesson 09), and why the biases must keep the load even in *every* batch, not only
# on average.

# %% [markdown] tags=["interactive"]
# ## The cluster map
#
# Here is the released geometry once more, with the router from above and the words of a story, dealt to the nodes like
# cards. The same word has the same vector, so that it goes to the same experts. Vectors and router are random.
#
# Press *play*, or click on the map and use the keyboard: left and right go from token to token, up and down change the
# limit, space plays, a digit tells of a node. Point at a word, an expert, a GPU or a node. Then let each *expert* have a
# copy of its own, and watch the blue wires.

# %%
from dsv3_mini.data.stories import generate_story
from dsv3_mini.viz.widgets.cluster_map import ClusterMap

ids = torch.tensor(tokenizer.encode(generate_story(seed=10, index=0).text)[:48])
known, which = ids.unique(return_inverse=True)
torch.manual_seed(0)
vectors = torch.randn(len(known), large.hidden_size)[which]
routes = {limit: choose_within(limit, vectors[None]) for limit in range(1, nodes + 1)}
words = [tokenizer.decode([i]) for i in ids.tolist()]
homes = [cluster.gpus * (i % nodes) + i // nodes for i in range(len(words))]
cluster_map = ClusterMap(cluster, words, homes, routes)
cluster_map.set(token=20)
cluster_map

# %%
before = cluster_map.png()
cluster_map.set(token=len(words) - 1, limit=4)
assert cluster_map.png() != before
assert len(cluster_map.journey.network) <= 4 and len(cluster_map.experts) == k
with_limit = sum(cluster_map.received)
cluster_map.set(limit=8)
without = sum(cluster_map.received)
cluster_map.set(once_per="expert")
print("fewer messages with the limit than without:", with_limit < without)
print("and far fewer than with a copy for each expert:", 1.5 * with_limit < sum(cluster_map.received))

# %% [markdown]
# `cluster_map.save_html("map.html")` writes all of it into one file that plays without Python, for slides. The tiny
# model's routers fit on a map as well: four nodes of four GPUs, one expert on each, and words that mean something to
# them.

# %%
tiny = Cluster(nodes=4, gpus=4, experts=1)
with torch.no_grad():
    by_tiny = model(ids[None]).routing[SPARSE].chosen[0]
places = [tiny.gpus * (i % tiny.nodes) + i // tiny.nodes % tiny.gpus for i in range(len(words))]
tiny_map = ClusterMap(tiny, words, places, {model.cfg.topk_group: by_tiny})
tiny_map.set(token=len(words) - 1)
assert nodes_reached(by_tiny, tiny.n_experts, tiny.nodes).sum(dim=1).max() <= model.cfg.topk_group
tiny_map

# %% [markdown]
# ## Find the bug
#
# Somebody writes the last step, the choice, in one short line: closed experts are multiplied by 0, and the rest is
# `topk`. It passes its test. It trains. Weeks later tokens turn up on nodes that were closed to them.


# %%
def choose_with_a_bug(preference: Tensor, allowed: Tensor, k: int) -> Int[Tensor, "b s k"]:
    return (preference * allowed).topk(k, dim=-1).indices


torch.manual_seed(0)
affinity = torch.rand(1, 500, 16)
for bias in (0.0, -0.7, -1.0):
    allowed = limit_to_groups(affinity + bias, n_group=4, topk_group=2).isfinite()
    picked = choose_with_a_bug(affinity + bias, allowed, k=4)
    on_closed = 1 - allowed.gather(-1, picked).float().mean()
    print(f"all biases at {bias:4}: {on_closed:4.0%} of the choices fall on closed nodes")

# %% [markdown] tags=["bug"]
# ### Find the bug · The zero that won
# ●○○ · 8 minutes
#
# On the first day the biases are 0, and the line does what it should. Then balance moves them (lesson 09). Write the
# choice so that it holds for any bias. `preference` and `allowed` are `[b s e]`, and at least `k` experts of each token
# are allowed. The result is the numbers of its `k` best allowed experts, the best first.
#
# <details><summary>Hint 1</summary>What is the preference of a closed expert after the multiplication? Which open
# experts does that beat?</details>
# <details><summary>Hint 2</summary>There is one number that is below every other:
# <code>preference.masked_fill(..., -torch.inf)</code>.</details>


# %%
def choose(preference: Float[Tensor, "b s e"], allowed: Bool[Tensor, "b s e"], k: int) -> Int[Tensor, "b s k"]:
    """The k experts of highest preference among the allowed ones, the best first."""
    ### BEGIN SOLUTION: closed experts at minus infinity, then topk
    return preference.masked_fill(~allowed, -torch.inf).topk(k, dim=-1).indices
    ### END SOLUTION


# %%
check.choose(choose)

# %% [markdown] tags=["at-671b"]
# ## At 671B
#
# A copy of a token is `hidden_size` numbers. It travels to the experts in FP8, one byte a number, and the result comes
# back in BF16, two bytes (section 3.3; the few bytes of FP8 scales are left out here). One GPU's wire carries 50 GB a
# second between nodes and 160 GB a second inside one (section 3.2).

# %%
from dsv3_mini.parallel.traffic import INSIDE_SPEED, NETWORK_SPEED

d, layers = large.hidden_size, large.num_hidden_layers - large.first_k_dense_replace
there, back = d, 2 * d
print(f"a copy: {there:,} bytes there, {back:,} back; {layers} sparse layers")
for name, mean in (("each expert", copies), ("each node, free", counts[8].mean), ("each node, M = 4", counts[4].mean)):
    size, time = mean * (there + back), mean * (there + back) / NETWORK_SPEED
    print(f"a copy for {name:16} {layers * size / 1e6:4.1f} MB a token, {time * 1e6:.1f} microseconds a layer")

# %% [markdown]
# Is a microsecond much? Compare it with the arithmetic that it serves: the nine experts of one token in one layer, eight
# chosen and one shared, at the speed that the report's GPUs sustained on average.

# %%
from dsv3_mini.ledger import count_parameters, report_flops_per_second

flops = 2 * (k + large.n_shared_experts) * count_parameters(large).expert.total
arithmetic = flops / report_flops_per_second()
network = counts[4].mean * (there + back) / NETWORK_SPEED
print(f"experts: {flops / 1e9:.1f} GFLOP, {arithmetic * 1e6:.1f} microseconds; network: {network * 1e6:.1f}")
print("moving a token takes as long as half of its arithmetic, or longer:", network > arithmetic / 2)

# %% [markdown]
# So the network must work *while* experts compute, and never wait (lesson 20). And it leaves room on the inside wires:
# while one copy crosses between nodes, an inside wire carries `160 / 50` of them. Four nodes with so many experts each
# would cost no more than what is sent today.

# %%
faster = INSIDE_SPEED / NETWORK_SPEED
print(f"experts per node at no extra time: {faster:.1f}; on {large.topk_group} nodes: {large.topk_group * faster:.1f}")
print(f"so up to {round(large.topk_group * faster)} experts for a token, where the model takes {k}")

# %% [markdown] tags=["recap"]
# ## Recap
#
# 1. A token's eight experts lie on four nodes, one of them its own. How many messages cross the network, and does it
#    matter whether a node holds one of the eight or five?
#    <details><summary>Answer</summary>Three, one for each other node. It does not matter to the network: one copy goes
#    to a node and is handed on inside, where wires are 3.2 times as fast.</details>
# 2. Why is a node ranked by the sum of its two best preferences, and not by its best?
#    <details><summary>Answer</summary>The token takes K/M = 2 experts from each of its M = 4 nodes, on average. A node
#    with one star and nobody else is worth less to it than a node with two good experts.</details>
# 3. DeepSeek-V3 drops no token. What does it pay instead, and what keeps the price low?
#    <details><summary>Answer</summary>Experts take as many tokens as come, so all wait for the busiest one, and its GPU
#    needs memory for them. The biases of lesson 09 keep the busiest near the mean.</details>

# %% [markdown] tags=["next"]
# ## Next
#
# The mixture of experts is complete: experts, gate, balance, and now the way there. Lesson 11 returns to the model's
# end, and lets it predict a second token. The messages that you counted are sent in lesson 19, and lesson 20 hides the
# time they take behind the arithmetic.
