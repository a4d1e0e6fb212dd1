# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   dsv3:
#     title: Expert parallelism
#     minutes: 90
#     after: [10_node_limited_routing, 15_fp8_numbers]
#     builds: all-to-all by hand, dispatch and combine and their backward, a message in FP8, waiting measured
#     tracks: [term]
# ---

# %% [markdown] tags=["why"]
# # 19 · Expert parallelism
#
# In lesson 10 you counted messages. Now they are sent.
#
# A sparse layer of DeepSeek-V3 has 256 experts, too many for one GPU. So 64 GPUs share them, four on each, and every
# GPU has tokens of its own. A process that runs on one GPU is a **rank**. In each sparse layer every rank sends its
# tokens to the ranks that hold their experts, which is **dispatch**, and gets back what they made of them, which is
# **combine**. Sharing a layer's experts in this way is **expert parallelism**.
#
# You write it all on ranks that are simulated in one process: the exchange, dispatch, combine, and what happens to them
# in the backward pass. Then real processes do the same. You find out why a token travels in one byte a number and comes
# home in two, what everybody waits for, and how a rank with nothing to do can stop a whole cluster.
#
# Four ranks, two experts on each, fourteen tokens that want two experts. A colour is a token's home.

# %%
import torch

from dsv3_mini.viz.figures.expert_parallel import exchange_figure

torch.manual_seed(4)
fourteen = torch.rand(14, 8).topk(2).indices
homes = torch.tensor([0] * 4 + [1] * 5 + [2] * 2 + [3] * 3)
exchange_figure(fourteen, homes, experts=8, ranks=4)

# %% [markdown] tags=["paper"]
# ## In the report
#
# | section | what | where |
# |---|---|---|
# | 3.2 | experts of a layer over 64 GPUs, in 8 nodes (machines) | at 671B |
# | 3.2.2 | a token crosses the network once for each node, and is handed on inside | two legs |
# | 3.3.3 | dispatch in FP8 with scales that are powers of two; combine in BF16, forward and backward | exercise 4, experiment 2 |
# | 3.2.1 | messages hidden behind the arithmetic of another microbatch | at 671B, and lesson 20 |
# | 2.1.2 | no token is dropped | no room to plan |
#
# The layer itself does not change. For token $t$ with its vector $u_t$, its $K$ experts and their gates $g_{i,t}$
#
# $$ h_t = \sum_{i \,\in\, \text{chosen}(t)} g_{i,t}\, \mathrm{FFN}_i(u_t) = \sum_{r} \Big( \sum_{i \,\in\, \text{chosen}(t),\; i
# \text{ on rank } r} g_{i,t}\, \mathrm{FFN}_i(u_t) \Big) . $$
#
# The right side is how it is computed. Each rank sums over its own experts, and one vector comes home from each rank:
# the outer sum is the token's own rank's. So a token makes as many copies as it has *ranks*, not experts.
#
# In shapes: `T` tokens of a rank, `k` chosen experts, `d` width. A table `[sender receiver]` counts rows.

# %% [markdown] tags=["naive"]
# ## The naive way
#
# A post office. Every rank has a mailbox; a letter has a sender, a token and a number. Expert `e` multiplies by `e + 1`.


# %%
def by_post(values: list[list[float]], chosen: list[list[list[int]]], held: int) -> list[list[float]]:
    """One layer: values[rank][token], the experts chosen[rank][token], `held` experts on each rank."""
    mailbox: list[list[tuple[int, int, float]]] = [[] for _ in values]
    for rank, tokens in enumerate(chosen):
        for token, experts in enumerate(tokens):
            for owner in {expert // held for expert in experts}:
                mailbox[owner].append((rank, token, values[rank][token]))
    home = [[0.0] * len(row) for row in values]
    for owner, letters in enumerate(mailbox):
        for rank, token, value in letters:
            home[rank][token] += sum(value * (e + 1) for e in chosen[rank][token] if e // held == owner)
    return home


# %%
values = [[10.0, 20.0], [30.0], []]
chosen_by_rank = [[[0, 1], [1, 4]], [[4, 5]], []]  # six experts, two on each of three ranks
print(by_post(values, chosen_by_rank, held=2))
assert by_post(values, chosen_by_rank, held=2) == [[10 * 1 + 10 * 2, 20 * 2 + 20 * 5], [30 * 5 + 30 * 6], []]

# %% [markdown]
# Token 0 needs experts 0 and 1: one letter, to its own rank. Token 1 needs experts on two ranks, and makes two letters.
# Rank 2 has no token, and works for the others.
#
# Letter by letter is far too slow for a GPU. The whole post of all ranks is one operation, the **all-to-all**: every rank
# lays its rows in the order of their receivers, and everybody's parts change places at once. Like the transpose of a
# table whose entries are lists.

# %%
from einops import rearrange, reduce
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from dsv3_mini.course.checks import lesson_19 as check
from dsv3_mini.course.exchanges import Deadlock
from dsv3_mini.course.exchanges import all_to_all as exchange
from dsv3_mini.course.lesson import same, show_source

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · All to all
# ●○○ · 10 minutes
#
# `rows` is a list with a tensor for each rank, `[leaving d]`: all that it sends, first what goes to rank 0, then what goes
# to rank 1, and so on. `leaving` is `[sender receiver]`: row 2, column 5 says how many of rank 2's rows go to rank 5, and
# may be 0. Return a list of what each rank has afterwards, `[arrived d]`: first what rank 0 sent, then rank 1.
#
# <details><summary>Hint 1</summary><code>rows[r].split([2, 0, 3])</code> cuts a tensor into parts of 2, 0 and 3 rows. Which
# row or column of <code>leaving</code> cuts rank r's rows?</details>
# <details><summary>Hint 2</summary>Now there is a list of lists: <code>parts[sender][receiver]</code>. Rank r gets
# <code>parts[0][r], parts[1][r], ...</code>, put together with <code>torch.cat</code>.</details>


# %%
def all_to_all(rows: list[Tensor], leaving: Int[Tensor, "sender receiver"]) -> list[Tensor]:
    """What each rank has after an exchange, in the order of the senders."""
    ### BEGIN SOLUTION: cut each rank's rows by its row of `leaving`; each rank gets its part of every sender's
    parts = [sent.split(counts) for sent, counts in zip(rows, leaving.tolist(), strict=True)]
    return [torch.cat([part[rank] for part in parts]) for rank in range(len(rows))]
    ### END SOLUTION


# %%
check.all_to_all(all_to_all)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Who leaves, and where to
# ●●○ · 10 minutes
#
# One rank's view. `chosen` is `[T k]`, the experts of its tokens; the `n_experts` experts lie evenly on the ranks, in
# order. A token leaves *once* for each rank that holds one of its experts, its own rank included. Return two tensors:
#
# - `token`, the numbers of the tokens that leave, in the order in which an exchange wants them: first all that go to rank
#   0, from the first token to the last, then all that go to rank 1;
# - `leaving`, `[ranks]`: how many go to each rank.
#
# <details><summary>Hint 1</summary>A table of marks first, <code>needed</code>, <code>[T ranks]</code>: in lesson 10 you
# made one of nodes, with <code>scatter</code>.</details>
# <details><summary>Hint 2</summary><code>needed.T.nonzero()</code> lists the true places of <code>[ranks T]</code> row by
# row: pairs of rank and token.</details>


# %%
def copies_to_send(
    chosen: Int[Tensor, "T k"], n_experts: int, ranks: int
) -> tuple[Int[Tensor, " copies"], Int[Tensor, " ranks"]]:
    """The token of each copy that leaves, rank by rank, and how many go to each rank."""
    ### BEGIN SOLUTION: mark which rank each token needs; list the marks receiver by receiver; count them
    needed = torch.zeros(len(chosen), ranks, dtype=torch.bool).scatter(1, chosen // (n_experts // ranks), True)
    _, token = needed.T.nonzero(as_tuple=True)
    return token, needed.sum(dim=0)
    ### END SOLUTION


# %%
check.copies_to_send(copies_to_send)

# %% [markdown]
# ## No room to plan
#
# How many rows will arrive depends on what the router has just chosen, so nobody can know beforehand. There are two ways
# out. One gives each expert a fixed number of places, fills up what stays empty, and drops what finds none: that is the
# *capacity* of lesson 10. DeepSeek-V3 takes the other one. The ranks exchange the *counts* first, one number for each pair,
# and then exactly the rows that there are. So nothing is padded, and **no token is dropped**, however unequal the choice.

# %%
from dsv3_mini.parallel.traffic import nodes_reached


def leaving_table(chosen: list[Tensor], n_experts: int) -> tuple[list[Tensor], Int[Tensor, "sender receiver"]]:
    """What all ranks know after the counts have travelled: their own copies, and the table."""
    ranks = len(chosen)
    needed = [nodes_reached(own, n_experts, ranks) for own in chosen]
    return [marks.T.nonzero()[:, 1] for marks in needed], torch.stack([marks.sum(dim=0) for marks in needed])


by_rank = [fourteen[homes == rank] for rank in range(4)]
which, table = leaving_table(by_rank, n_experts=8)
print("rows are senders, columns receivers:", *table.tolist(), sep="\n")
print(f"kept {[len(own) for own in by_rank]} tokens, compute {table.sum(dim=0).tolist()} rows")

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · Bring it home
# ●●○ · 12 minutes
#
# All ranks at once again. `results[r]` is `[arrived d]`: what rank r's experts made of the rows that it got, in their
# order. `token[r]` and `leaving` are those of dispatch, and `tokens[r]` is how many tokens rank r has. Send every result
# back to where its row came from, and add up those of the same token. Return a list of `[T d]`, zeros for a token that
# went nowhere. `exchange` is the package's `all_to_all`.
#
# <details><summary>Hint 1</summary>What rank 3 got from rank 1 it gives to rank 1. What does that make of the table of
# counts?</details>
# <details><summary>Hint 2</summary>After the exchange rank r's rows lie in the order in which they left, so row i belongs to
# token <code>token[r][i]</code>. A token may stand there more than once: <code>index_add</code> adds, an assignment
# overwrites.</details>


# %%
def bring_home(results: list[Tensor], token: list[Tensor], leaving: Tensor, tokens: list[int]) -> list[Tensor]:
    """For each rank the sums of what came back for its tokens."""
    ### BEGIN SOLUTION: the exchange with the table turned over, then index_add by token on each rank
    returned = exchange(results, leaving.T)
    return [
        torch.zeros(count, rows.shape[1]).index_add(0, which, rows)
        for count, which, rows in zip(tokens, token, returned, strict=True)
    ]
    ### END SOLUTION


# %%
check.bring_home(bring_home)

# %% [markdown]
# ## Backward: the same two, the other way round
#
# What is the gradient of dispatch? A token's copies lie on several ranks, each gets a gradient there, and the token's own
# is their sum. So gradients come home and are added up per token: that *is* combine. And the gradient of combine? A token's
# output was a sum of results, so each result gets the token's gradient: it travels to all ranks that computed for it, as
# in dispatch. Nothing new has to be written. Autograd has derived it meanwhile: let it differentiate dispatch.


# %%
def dispatch_gradient(grads: list[Tensor], token: list[Tensor], leaving: Tensor, tokens: list[int]) -> list[Tensor]:
    """Autograd's gradient of all ranks' tokens, from gradients of what arrived."""
    xs = [torch.zeros(count, grads[0].shape[1], requires_grad=True) for count in tokens]
    arrived = exchange([x[which] for x, which in zip(xs, token, strict=True)], leaving)
    return list(torch.autograd.grad(arrived, xs, grads))


counts = [len(own) for own in by_rank]
arrived_grads = [torch.randn(int(n), 3) for n in table.sum(dim=0)]
same(bring_home, dispatch_gradient, (arrived_grads, which, table, counts))

# %% [markdown] tags=["package"]
# ## The package's own
#
# In the package a dispatch and its combine are a `Hop`, and `ParallelExperts` stands in the place of a layer's experts:
# the model does not know. `all_to_all_single_autograd` is torch's exchange; its backward is an exchange with the counts
# turned over. Choices and gates travel beside the vectors.

# %%
from dsv3_mini.parallel.expert_parallel import ParallelExperts
from dsv3_mini.parallel.hop import Hop

show_source(Hop, ParallelExperts.forward)


# %%
def package_copies(chosen: Tensor, n_experts: int, ranks: int) -> tuple[Tensor, Tensor]:
    """What a Hop works out of its `needed`."""
    needed = nodes_reached(chosen, n_experts, ranks)
    return needed.T.nonzero()[:, 1], needed.sum(dim=0)


same(
    all_to_all,
    exchange,
    (arrived_grads, table.T),
    ([torch.randn(3, 2), torch.randn(1, 2)], torch.tensor([[1, 2], [0, 1]])),
)
same(copies_to_send, package_copies, (fourteen, 8, 4), (torch.rand(20, 16).topk(5).indices, 16, 8))

# %% [markdown]
# **Two legs.** Lesson 10 sent one copy to each *node* over the slow network. So the way of a token has two legs: a hop
# between the ranks that have the same place on all nodes, and from there a hop inside the node. On the way home a node's
# results are added up where they meet, so that one row for each token and node crosses the network.
#
# Now with real processes. Four of them start on this machine, with four experts each, meet over *gloo* (torch's exchange
# for CPUs), and run a layer of 16 experts forward and backward, three times: as one node of four, as two nodes of two, and
# once more with tokens in FP8, to which we come below. Rank 1 has no tokens at all.

# %%
from dsv3_mini import ModelConfig
from dsv3_mini.course.expert_ranks import on_ranks
from dsv3_mini.model.experts import GroupedExperts

torch.manual_seed(0)
cfg = ModelConfig.preset("nano", n_routed_experts=16, hidden_size=256, moe_intermediate_size=64)
experts = GroupedExperts(cfg)
for parameter in experts.parameters():
    torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)

# %%
inputs = {"x": torch.randn(40, 256), "chosen": torch.rand(40, 16).topk(4).indices}
inputs |= {"gates": torch.rand(40, 4), "weight": torch.randn(40, 256)}  # the loss is sum(out * weight)
runs = on_ranks(experts, inputs, counts=[15, 0, 5, 20], layouts=[(1, "plain"), (2, "plain"), (2, "fp8")])


# %%
def one_process() -> dict[str, Tensor]:
    """The same layer, forward and backward, with all experts in one place."""
    x, gates = (inputs[name].clone().requires_grad_() for name in ("x", "gates"))
    out = experts(x, inputs["chosen"], gates, inputs["chosen"].flatten().bincount(minlength=16))
    (out * inputs["weight"]).sum().backward()
    return {"out": out.detach(), "x": x.grad, "gates": gates.grad} | {n: p.grad for n, p in experts.named_parameters()}


# %%
def off(found: Tensor, right: Tensor) -> float:
    """How far, relative to the size of what is right."""
    return ((found - right).norm() / right.norm()).item()


right = one_process()
for run, name in zip(runs, ("one leg", "two legs", "two legs, FP8"), strict=True):
    worst = max(off(run.tensors[what], right[what]) for what in right)
    print(f"{name:14} outputs and all gradients within", "1e-5" if worst < 1e-5 else "6%" if worst < 0.06 else "more")

# %% [markdown]
# In FP32 the ranks compute what one process computes, forward and backward, in either way. FP8 is a few per cent off, as
# E4M3 must be (lesson 15).
#
# ## Half of the bytes
#
# On the way to the experts a vector is about to be multiplied in FP8 (lesson 16), which rounds it to E4M3 first: one byte
# a number, and a scale for each 128 of them. It may as well be rounded *before* it travels. The report takes scales that
# are powers of two here. A power of two is its exponent, so one byte is enough for it: `2^j` is stored as `j + 127`, a
# format called E8M0.

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · A vector as a message
# ●●○ · 15 minutes
#
# Write what travels. `x` is `[T d]` in FP32, `d` a multiple of 128, and no 128 numbers are all zero. For each tile of 128
# numbers in a row the scale is the smallest power of two that is at least `largest magnitude / 448`. Return bytes
# (`torch.uint8`), `[T d + d/128]`: a token's numbers `x / scale` in E4M3, then a byte for each scale, its exponent plus 127.
#
# <details><summary>Hint 1</summary><code>rearrange(x, "T (a n) -> T a n", n=128)</code>, then the largest magnitude with
# <code>reduce</code>. The exponent is <code>torch.ceil(torch.log2(largest / 448))</code>.</details>
# <details><summary>Hint 2</summary><code>.to(torch.float8_e4m3fn)</code> rounds, <code>.view(torch.uint8)</code> shows the
# same memory as bytes.</details>


# %%
def to_message(x: Float[Tensor, "T d"]) -> UInt8[Tensor, "T bytes"]:
    """Each row's numbers in E4M3, then the exponents of its scales."""
    ### BEGIN SOLUTION: tiles of 128, their exponents rounded up, the numbers divided and cast, bytes side by side
    tiles = rearrange(x, "T (a n) -> T a n", n=128)
    exponent = torch.ceil(torch.log2(reduce(tiles.abs(), "T a n -> T a", "max") / 448))
    numbers = (tiles / rearrange(torch.exp2(exponent), "T a -> T a 1")).to(torch.float8_e4m3fn)
    return torch.cat(
        [rearrange(numbers.view(torch.uint8), "T a n -> T (a n)"), (exponent + 127).to(torch.uint8)], dim=1
    )
    ### END SOLUTION


# %%
check.to_message(to_message)

# %%
from dsv3_mini.parallel.fp8_hop import Fp8Hop, packed
from dsv3_mini.parallel.traffic import row_bytes

show_source(packed, Fp8Hop)
same(to_message, packed, (torch.randn(5, 256),), (1000 * torch.randn(3, 128),))
print(f"a vector of 7,168 numbers: {row_bytes(7168, 'fp8')[0]:,} bytes in FP8, {row_bytes(7168, 'plain')[0]:,} in BF16")

# %% [markdown]
# `Fp8Hop` has the backward pass that you found above: `_Out` is dispatch, and its gradient comes home by `gather`; `_Home`
# is combine, and its gradient leaves by `scatter`. What goes *out* is FP8 both times, what comes *home* is BF16 both times.
# What did the three runs above send to other ranks?

# %%
legs = ("network", "inside")
for run, name in zip(runs, ("one leg", "two legs", "two legs, FP8"), strict=True):
    total = [sum(leg) for leg in zip(*run.sent, strict=True)]
    named = zip(("inside",) if len(total) == 1 else legs, total, strict=True)
    print(f"{name:14}", ", ".join(f"{leg} {sent / 1e3:.0f} kB" for leg, sent in named))
share = sum(map(sum, runs[2].sent)) / sum(map(sum, runs[1].sent))
print(f"with FP8 on the way out, BF16 home: {share:.0%} of the bytes")

# %% [markdown] tags=["experiment"]
# ## Experiment 1: who waits for whom?
#
# An exchange is over when the last row has arrived. So it takes as long as the GPU needs that sends or gets the most, and
# everybody else waits. Balance (lesson 09) keeps experts near the mean. What if it fails, and some experts are far more
# popular than others?
#
# Take the released geometry, 256 experts on 64 GPUs in 8 nodes, with 128 tokens on each GPU, and a router of random
# preferences. Add to each expert's preference a popularity, `skew` times a random number.
#
# **What we expect.** The GPU with the most popular experts gets more and more rows: up to *all* tokens, where the mean GPU
# gets as many as a token has copies, over 64. But the network counts a token once for each node. Every token goes to 4 of 8
# nodes, so no node can get more than all tokens, twice the mean. If that is right, skew hurts the arithmetic most, the wires
# inside a node nearly as much, and the network hardly more than twofold. If copies on the network pile up as experts do, we
# have not understood what the limit buys.

# %%
from dsv3_mini.model.router import limit_to_groups
from dsv3_mini.parallel.traffic import Cluster, fullest, wire_tables

large = ModelConfig.preset("671b")
cluster = Cluster(nodes=8, gpus=8, experts=4)
torch.manual_seed(0)
home = torch.arange(64 * 128) % 64
preference, popularity = torch.randn(len(home), 256), torch.randn(256)


def route(skew: float, limit: int = large.topk_group) -> Int[Tensor, "T k"]:
    """All tokens' experts: the best 8 of `limit` nodes."""
    wanted = (preference + skew * popularity)[None]
    return limit_to_groups(wanted, cluster.nodes, limit).topk(large.num_experts_per_tok).indices[0]


# %%
def fullest_over_mean(skew: float) -> tuple[float, float, float]:
    """Of the rows that a GPU computes, of the copies inside nodes, and of those over the network."""
    chosen = route(skew)
    network, inside = wire_tables(cluster, chosen, home)
    rows = (chosen // cluster.experts).flatten().bincount(minlength=64).float()
    return (rows.max() / rows.mean()).item(), *(fullest(wires) * 64 / int(wires.sum()) for wires in (inside, network))


skews = [0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0]
names = ("rows that a GPU computes", "copies inside a node", "copies over the network")
curves = dict(zip(names, map(list, zip(*map(fullest_over_mean, skews), strict=True)), strict=True))
for name, values in curves.items():
    print(f"{name:25} fullest over mean:", *(f"{value:.1f}" for value in values))

# %%
from dsv3_mini.viz.figures.expert_parallel import skew_figure

by_skew = list(zip(*curves.values(), strict=True))
most_even = all(network < min(rows, inside) for rows, inside, network in by_skew[1:])
rows, inside, network = (values[-1] for values in curves.values())
print("wherever there is skew the network is the most even:", most_even)
print("and hardly above its ceiling:", network < 2.3)
assert most_even and network < 2.3 < inside < rows
skew_figure(skews, curves, ceiling=2.0)

# %% [markdown]
# The order is as expected. (The network's ceiling is two in the mean over a node's GPUs, and one GPU's wire may have a bit
# more.) So a bad balance is first of all arithmetic that waits: the GPU with the popular experts computes many times the
# mean, and the 63 others have nothing to do until it has finished.
#
# ## Experiment 2: what does rounding cost?
#
# Dispatch rounds to E4M3, combine to BF16. Why not both to E4M3? Take the tiny trained model with its products in FP8
# (lesson 16), and round what goes to its experts while it reads stories that it has never seen.
#
# **What we expect.** Nothing: not a small difference but none, to the last bit. The experts' first step is the same
# rounding, and what stands on the grid already is not moved again. That holds if scales are powers of two. With any other
# scale the second rounding may move numbers.

# %%
import dsv3_mini as dsv3
from dsv3_mini.data.shipped import shipped
from dsv3_mini.data.stream import held_out_rows
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.fp8 import from_fp8, to_fp8
from dsv3_mini.fp8.quantize import quantize

model = to_fp8(dsv3.from_pretrained(shipped("tiny")).eval())
stories = held_out_rows("stories", Tokenizer.shipped(), seq_len=128, rows=4).tokens[:, :-1]


def in_e4m3(x: Tensor, power_of_two: bool = True) -> Tensor:
    """x after a trip in FP8."""
    return quantize(x, (1, 128), power_of_two=power_of_two).dequantize()


# %%
from collections.abc import Callable

Trip = Callable[[Tensor], Tensor]


def logits_with(there: Trip = Tensor.clone, back: Trip = Tensor.clone) -> Tensor:
    """The model's logits when vectors travel to the experts by `there`, and results by `back`."""
    all_experts = [module for module in model.modules() if isinstance(module, GroupedExperts)]
    hooks = [each.register_forward_pre_hook(lambda _, args: (there(args[0]), *args[1:])) for each in all_experts]
    hooks += [each.register_forward_hook(lambda _, args, out: back(out)) for each in all_experts]
    with torch.no_grad():
        logits = model(stories).logits
    for hook in hooks:
        hook.remove()
    return logits


# %%
as_it_is = logits_with()
for name, power_of_two in (("powers of two", True), ("any scale", False)):
    rounded = logits_with(there=lambda x, two=power_of_two: in_e4m3(x, two))
    print(f"there in E4M3, {name:13}: the same to the last bit: {torch.equal(rounded, as_it_is)}")
    assert torch.equal(rounded, as_it_is) == power_of_two

# %% [markdown]
# So half of the bytes on the way out cost *nothing*, if the products are in FP8 anyway. That is what powers of two are for:
# a rounding that is done once.
#
# On the way *home* nobody would have rounded to 3 bits. **What we expect** there: E4M3 costs something new, and BF16, with
# its 7 bits, far less. We measure it in the model with its products in high precision, where nothing else rounds. (With FP8
# products there is no small change: whatever moves a number, even BF16's rounding, pushes some others over an edge of E4M3,
# and a layer later the difference is as large as FP8's own. Leave out `from_fp8` and see.)

# %%
from_fp8(model)
as_it_is = logits_with()
bf16 = off(logits_with(back=lambda out: out.bfloat16().float()), as_it_is)
e4m3 = off(logits_with(back=in_e4m3), as_it_is)
print("home in E4M3 moves the logits more than twice as far as home in BF16:", e4m3 > 2 * bf16)
assert e4m3 > 2 * bf16

# %% [markdown]
# On the way home each byte that is saved is paid for, and the report does not save it.

# %% [markdown] tags=["interactive"]
# ## The wires
#
# Experiment 1's routing, 64 GPUs and the report's wires (50 GB a second over the network, 160 inside a node). Move the
# skew, the node limit and what tokens travel in. On the left the bytes that each GPU gets over the network; on the right
# how long the four parts of dispatch and combine take, and how much of that is waiting.
#
# Things to look for: without the limit (M = 8) the network takes longer, and is more even. FP8 shortens dispatch and leaves
# combine alone. With M = 1 the network is quick, and a skew fills one node.

# %%
from dsv3_mini.viz.widgets.expert_parallel import wires_explorer

wires = wires_explorer(cluster, route, home, large.hidden_size)
wires

# %%
from dsv3_mini.parallel.exchange_time import exchange_times


def milliseconds(skew: float, limit: int, kind: str) -> float:
    times = exchange_times(cluster, route(skew, limit), home, large.hidden_size, kind)
    return 1e3 * sum(part.seconds for part in times.values())


before = wires.picture.value
wires.set(skew=2.0, limit=8, tokens_in="BF16")
assert wires.picture.value != before
for skew, limit, kind in ((0.0, 4, "fp8"), (0.0, 4, "plain"), (0.0, 8, "fp8"), (2.0, 4, "fp8")):
    print(f"skew {skew:g}, M = {limit}, {kind:5}: {milliseconds(skew, limit, kind):.2f} ms a layer")

# %% [markdown]
# ## Find the bug
#
# So far you saw all ranks at once, which no program on a cluster can. Here is the layer as *one rank* sees it: its own
# tokens, and `yield` for an exchange. `arrived = yield messages` gives `messages[j]` to rank j, waits until every rank has
# come to its own `yield`, and goes on with what each of them gave. A message here is a pair, rows and their choices.
#
# Its author thought of the rank that has no tokens, as there may be at the end of a data set, and saved it the work.


# %%
def layer_with_a_bug(x: Tensor, chosen: Tensor, rank: int, ranks: int, held: int, work: Callable) -> check.Program:
    """One rank's part of a layer; work(rows, choices) is the sum of what its own experts make of each row."""
    if len(x) == 0:
        return x  # no tokens, nothing to do
    tokens = [(chosen // held == to).any(dim=1).nonzero()[:, 0] for to in range(ranks)]
    arrived = yield [(x[token], chosen[token]) for token in tokens]
    returned = yield [work(rows, choices) for rows, choices in arrived]
    out = torch.zeros_like(x)
    for token, rows in zip(tokens, returned, strict=True):
        out = out.index_add(0, token, rows)
    return out


# %%
for counts in ([3, 2, 4], [3, 0, 4]):
    xs = [torch.randn(count, 4) for count in counts]
    choices = [torch.rand(count, 6).topk(2).indices for count in counts]
    try:
        check.rank_of_tokens(xs, choices, 6, layer_with_a_bug)
        print(f"tokens {counts}: done")
    except Deadlock as stuck:
        print(f"tokens {counts}: {stuck}".replace(". ", ".\n"))

# %% [markdown] tags=["bug"]
# ### Find the bug · The rank that did not come
# ●●○ · 8 minutes
#
# On a real cluster there is no message. All ranks stand still, at full price, until a time limit ends them, and it happens
# once in thousands of steps. Write the program so that it ends for any tokens and any choice: a rank without tokens, a rank
# that nobody needs, no tokens at all. `held` is how many experts lie on each rank.
#
# <details><summary>Hint 1</summary>A rank without tokens still has experts. Who needs them?</details>
# <details><summary>Hint 2</summary>What do the lines after the first two do when <code>x</code> is <code>[0 d]</code>? Indexing,
# <code>zeros_like</code> and <code>index_add</code> all take empty tensors.</details>


# %%
def layer_on_a_rank(x: Tensor, chosen: Tensor, rank: int, ranks: int, held: int, work: Callable) -> check.Program:
    """One rank's part of a layer; work(rows, choices) is the sum of what its own experts make of each row."""
    ### BEGIN SOLUTION: the same without the shortcut: two exchanges, whatever there is to say
    tokens = [(chosen // held == to).any(dim=1).nonzero()[:, 0] for to in range(ranks)]
    arrived = yield [(x[token], chosen[token]) for token in tokens]
    returned = yield [work(rows, choices) for rows, choices in arrived]
    out = torch.zeros_like(x)
    for token, rows in zip(tokens, returned, strict=True):
        out = out.index_add(0, token, rows)
    return out
    ### END SOLUTION


# %%
check.layer_on_a_rank(layer_on_a_rank)

# %% [markdown]
# The same holds in the backward pass, where nobody writes the exchanges: autograd calls them. It does so on every rank
# only if the tensors have a history there, empty ones too. (The package's tests send all tokens to one expert, leave ranks
# empty, and send one token in all, in every kind of hop.)

# %% [markdown] tags=["at-671b"]
# ## At 671B
#
# 64 GPUs share the experts of a layer. The report does not say how many tokens a GPU has in a microbatch; let it be one
# sequence of 4,096. The choice is the even one of experiment 1, scaled up.

# %%
even = {kind: exchange_times(cluster, route(0.0), home, large.hidden_size, kind) for kind in ("plain", "fp8")}
scale = 4096 / 128
for kind, times in even.items():
    parts = {name: 1e3 * scale * part.even for name, part in times.items()}
    print(f"{kind:6}", ", ".join(f"{name} {ms:.1f} ms" for name, ms in parts.items()))
there, back = row_bytes(large.hidden_size, "fp8")
print(f"a copy: {there:,} bytes there, {back:,} home; forward and backward {2 * (there + back):,}")
print(f"if all were BF16: {4 * back:,}, so FP8 saves {1 - (there + back) / (2 * back):.0%}")

# %% [markdown]
# Against it stands the arithmetic of a layer, at the speed that the report's GPUs sustained on average. Forward it is one
# product for each weight, backward two, while messages are as many backward as forward.

# %%
from dsv3_mini.ledger import count_parameters, report_flops_per_second

parameters = count_parameters(large)
active = parameters.attention.total + (large.num_experts_per_tok + large.n_shared_experts) * parameters.expert.total
arithmetic = 4096 * 2 * active / report_flops_per_second()
messages = scale * sum(part.even for name, part in even["fp8"].items() if "network" in name)
print(f"a layer forward: arithmetic {1e3 * arithmetic:.1f} ms, network {1e3 * messages:.1f} ms")
layers = large.num_hidden_layers - large.first_k_dense_replace
print(
    f"{layers} sparse layers: {layers * messages / 4096 * 1e6:.0f} microseconds of a GPU's network for a token, forward"
)

# %% [markdown]
# The network needs a good part of the arithmetic's time, with wires at their full rate and nobody waiting; the report, with
# real ones, speaks of about 1 to 1. So a GPU that waits for its messages is idle for a large share of its life. It need not:
# the network and the tensor cores are different parts of a machine. **Overlap** takes *two* microbatches, and while the
# tokens of one travel, the experts compute for the other. The package's kernels wait; where DeepSeek's own are installed
# (`dispatch=deep_ep` in `--layout`), a few of a GPU's multiprocessors do nothing but send. Here are the parts of one forward
# and one backward laid over each other with the times from above. Lesson 20 makes a pipeline of them.

# %%
from dsv3_mini.parallel.schedule_costs import ChunkCosts, Part
from dsv3_mini.viz.figures.schedule import overlap_figure

flops = report_flops_per_second()
mlp_share = 1 - parameters.attention.total / active
attention, mlp = (1e3 * arithmetic * share for share in (1 - mlp_share, mlp_share))
dispatch_ms, combine_ms = (1e3 * scale * even["fp8"][f"{part}, network"].even for part in ("dispatch", "combine"))
chunk = ChunkCosts(Part(attention, attention, attention), Part(mlp, mlp, mlp), dispatch_ms, combine_ms, layers=1)
alone = chunk.phases()
print(
    f"F and B one after the other: {alone.forward + alone.backward:.0f} ms, laid over each other: {alone.both:.0f} ms"
)
overlap_figure(chunk)

# %% [markdown]
# And memory? What arrives must lie somewhere. With an even choice a GPU gets about as many rows as its own tokens have
# copies; if all 64 GPUs' tokens chose experts of one GPU, it would get all of them.

# %%
copies = nodes_reached(route(0.0), 256, 64).sum().item() / len(home)
usual, most = (rows * large.hidden_size / 1e9 for rows in (4096 * copies, 4096 * 64))
print(f"a token makes {copies:.1f} copies, on as many GPUs; vectors that arrive, in FP8: {usual:.2f} GB")
print(f"if all tokens of 64 GPUs go to one: {most:.2f} GB there, and nothing elsewhere")

# %% [markdown] tags=["recap"]
# ## Recap
#
# 1. What is the gradient of dispatch, and what is that of combine?
#    <details><summary>Answer</summary>Dispatch copies a token to several ranks, so its gradient is the sum of those of the
#    copies: they come home and are added up, as combine does. Combine adds up results, so each result gets its token's
#    gradient: it is sent out, as dispatch does.</details>
# 2. Why may tokens travel in E4M3 for nothing, and results not?
#    <details><summary>Answer</summary>The experts' first product rounds tokens to E4M3 with the same power-of-two scales
#    anyway, and rounding twice to one grid is rounding once. Results are added up and stay: rounding them to 3 bits would
#    be a new error.</details>
# 3. A rank has no tokens in this microbatch. What must it do in the layer?
#    <details><summary>Answer</summary>All that the others do: tell its counts (zeros), take part in both exchanges, and
#    compute for the tokens that arrive. It has experts, and others wait for them; and the exchange itself waits for it.
#    </details>

# %% [markdown] tags=["next"]
# ## Next
#
# Each rank now holds a part of every layer's experts. Lesson 20 cuts the model the other way, into stages of layers, and
# puts the exchanges that you wrote where nobody waits for them.
