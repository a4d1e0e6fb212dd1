# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   dsv3:
#     title: Collectives
#     minutes: 85
#     after: [13_pretrain]
#     builds: all-gather and reduce-scatter on a ring, an optimizer step that ranks share, ZeRO's memory counted
#     tracks: [term]
# ---

# %% [markdown] tags=["why"]
# # 18 · Collectives
#
# DeepSeek-V3 was trained by 2,048 GPUs at once. None of them holds the model, none sees the whole batch, and yet
# together they take the step that one enormous machine would take. What they need for that is a handful of ways to talk
# to each other, called **collectives**: operations that all members of a group enter together, each with its own
# tensor.
#
# In this lesson you build them from nothing but *send* and *receive*, count every byte, run your functions on four real
# processes, and then use them for what they are there for: the gradient of a batch that no rank has whole, and an
# optimizer whose memory the ranks share. A **rank** is one of the group's members, by its number; here it is a process,
# on a cluster a GPU.
#
# These are the five. Four ranks, one below the other; each has a row of four pieces, before and after.

# %%
from dsv3_mini.course.rounds import FILMS
from dsv3_mini.viz.figures.collectives import collectives_figure

names = ("broadcast", "all-reduce", "reduce-scatter", "all-gather", "all-to-all")
collectives_figure([FILMS[name](4) for name in names])

# %% [markdown] tags=["paper"]
# ## In the report
#
# Section 3.1 describes the cluster: 2,048 H800 GPUs in **nodes** (machines) of eight. Inside a node GPUs talk over
# NVLink, between nodes over InfiniBand. Section 3.2 says how the work is shared: pipeline stages, experts over 64 GPUs,
# and data parallelism with **ZeRO-1**; and section 3.2.2 gives the speeds. Each way of sharing has its collective:
#
# | what is shared | who talks | with what | lesson |
# |---|---|---|---|
# | the batch (data parallelism) | those with the same weights | all-reduce of gradients | this one |
# | the optimizer's state (ZeRO-1) | the same | reduce-scatter of gradients, all-gather of weights | this one |
# | the experts | 64 GPUs of a stage | all-to-all of tokens, there and back | 19 |
# | the layers (pipeline) | neighbours | send and receive | 20 |
# | a matrix (tensor parallelism) | a node | all-reduce of activations, in each layer | not in training |
#
# What a message costs we write as everybody does, with a latency $\alpha$ and a speed $s$: a message of $b$ bytes takes
# $\alpha + b/s$. The report's speeds are $s = 160$ GB/s for NVLink and $50$ GB/s for InfiniBand, for each GPU. It gives
# no latency; where we need one we take $\alpha = 10$ µs.
#
# Letters: `n` ranks, `m` numbers in a piece, `p` parameters.

# %% [markdown] tags=["naive"]
# ## The naive way
#
# A program for many ranks is written once, from the view of *one* of them. It knows its own number, how many there are,
# and two verbs: `me.send(x, to=...)`, which goes on at once, and `me.receive(source)`, which waits. That is all of
# `me`.
#
# To sum a tensor over all ranks, the obvious way is to send it to rank 0, which adds up and answers.

# %%
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from dsv3_mini.course.checks import lesson_18 as check
from dsv3_mini.course.lesson import same, show_source
from dsv3_mini.course.ranks import Rank, on_ranks, run


# %%
def sum_at_zero(me: Rank, x: Tensor) -> Tensor:
    """All-reduce, by way of rank 0."""
    if me.number > 0:
        me.send(x, to=0)
        return me.receive(0)
    total = x + sum(me.receive(rank) for rank in range(1, me.count))
    for rank in range(1, me.count):
        me.send(total, to=rank)
    return total


# %% [markdown]
# `run` lets as many ranks run it as there are inputs. They are threads in this notebook that take turns, so that we can
# count what they send. Real processes come later.

# %%
for n in (2, 4, 8):
    xs = [torch.full((1000,), float(rank)) for rank in range(n)]
    ran = run(sum_at_zero, xs)
    right = all(torch.equal(result, sum(xs)) for result in ran.results)
    print(f"{n} ranks: right on all {right}; bytes sent by rank 0 {ran.sent[0]:6}, by each other {ran.sent[1]}")

# %% [markdown]
# The numbers are right, and rank 0's wire carries `n - 1` times what any other does, out and in. With 2,048 ranks the
# others wait for it nearly all of the time.
#
# All-to-all, on the other hand, is just what its name says, and needs no cleverness. `pieces[r]` is for rank `r`.


# %%
def swap(me: Rank, pieces: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    """All-to-all: piece r of every rank goes to rank r."""
    for step in range(1, me.count):
        to = (me.number + step) % me.count  # not all to rank 0 first
        me.send(pieces[to], to)
    return torch.stack([me.receive(r) if r != me.number else pieces[r] for r in range(me.count)])


tables = [10 * rank + torch.arange(4.0)[:, None] for rank in range(4)]
swapped = run(swap, tables)
print("rank 1 had", tables[1].flatten().tolist(), "and has", swapped.results[1].flatten().tolist())
print("pieces sent by each rank:", [sent // 4 for sent in swapped.sent])

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · All-gather on a ring
# ●●○ · 12 minutes
#
# Nobody in the middle: the ranks sit in a **ring**. Each sends only to its right neighbour, `(number + 1) % count`, and
# hears only the left one, `(number - 1) % count`, all at the same time. So all wires are busy, and all alike.
#
# Every rank has one `piece`, `[m]`. In the end every rank has all of them, `[n m]`, in the order of the ranks. In round
# 1 you send your own piece; from then on the one that arrived last. After `n - 1` rounds everything has been
# everywhere.
#
# <details><summary>Hint 1</summary>What arrives in round 1 is the left neighbour's own piece, of rank
# <code>number - 1</code>. In round 2 it is what <em>it</em> had received in round 1.</details>
# <details><summary>Hint 2</summary>In round <code>step</code> the piece of rank <code>(number - step) % count</code>
# arrives.</details>
# <details><summary>Hint 3</summary>Send before you receive. If all wait first, nobody ever sends.</details>


# %%
def ring_all_gather(me: Rank, piece: Float[Tensor, " m"]) -> Float[Tensor, "n m"]:
    """All ranks' pieces, in the order of the ranks."""
    ### BEGIN SOLUTION: n - 1 rounds: send what came last to the right, receive from the left, put it in its place
    right, left = (me.number + 1) % me.count, (me.number - 1) % me.count
    pieces = [piece] * me.count
    for step in range(1, me.count):
        me.send(piece, to=right)
        piece = me.receive(left)
        pieces[(me.number - step) % me.count] = piece
    return torch.stack(pieces)
    ### END SOLUTION


# %%
check.ring_all_gather(ring_all_gather)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Reduce-scatter on a ring
# ●●● · 15 minutes
#
# The same ring, and now the pieces grow on their way. Every rank has `n` pieces, `[n m]`. In the end rank `r` has the
# sum of all ranks' piece `r`, `[m]`, and nothing else.
#
# A partial sum starts somewhere, and travels `n - 1` places to the right. Each rank that it comes to adds its own piece
# *of the same number*. It must end at rank `r`; so where does it start?
#
# <details><summary>Hint 1</summary>The sum for rank <code>r</code> ends at <code>r</code> after <code>n - 1</code>
# steps to the right, so it starts at rank <code>r + 1</code>. Seen from rank <code>number</code>: the first piece that
# you send is piece <code>number - 1</code>.</details>
# <details><summary>Hint 2</summary>What you receive in round 1 comes from <code>number - 1</code>, which has sent its
# piece <code>number - 2</code>. Add your own piece of that number, and send the sum on in round 2.</details>


# %%
def ring_reduce_scatter(me: Rank, pieces: Float[Tensor, "n m"]) -> Float[Tensor, " m"]:
    """The sum of all ranks' piece `me.number`."""
    ### BEGIN SOLUTION: begin with piece number - 1; each round send the sum, receive one, add the own piece of its number
    right, left = (me.number + 1) % me.count, (me.number - 1) % me.count
    partial = pieces[(me.number - 1) % me.count]
    for step in range(2, me.count + 1):
        me.send(partial, to=right)
        partial = me.receive(left) + pieces[(me.number - step) % me.count]
    return partial
    ### END SOLUTION


# %%
check.ring_reduce_scatter(ring_reduce_scatter)

# %% [markdown]
# ## All-reduce is both
#
# Reduce-scatter leaves each rank with one finished piece of the sum, and all-gather hands the pieces round. Together
# that is an all-reduce, and nobody stood in the middle. From here on we use the course's own copies of the two.

# %%
from dsv3_mini.course.ring import all_gather, all_reduce, reduce_scatter

show_source(all_reduce)
pieces = [torch.randn(6) for _ in range(5)]
same(on_ranks(ring_all_gather), on_ranks(all_gather), (pieces,), (pieces[:2],))
same(on_ranks(ring_reduce_scatter), on_ranks(reduce_scatter), ([torch.randn(5, 3) for _ in range(5)],))

# %% [markdown]
# How many bytes leave a rank? In each half `n - 1` rounds with a piece of $1/n$ of the tensor, so $2\frac{n-1}{n}$
# times the tensor in all: never more than twice, however many ranks there are.

# %%
print("ranks   the ring, busiest rank   by rank 0, busiest rank   (in sizes of the tensor)")
for n in (2, 4, 8, 16, 32):
    xs = [torch.ones(32) for _ in range(n)]
    ring, naive = (max(run(way, xs).sent) / (4 * 32) for way in (all_reduce, sum_at_zero))
    assert ring == 2 * (n - 1) / n and naive == n - 1
    print(f"{n:5} {ring:25.3f} {naive:25.0f}")

# %% [markdown]
# ## Four processes
#
# Threads that take turns prove that the numbers are right, not that it works. So start four processes, with nothing in
# common but messages. They meet over **gloo**, torch's library for CPUs; on GPUs it would be NCCL. Starting takes some
# seconds, and happens once. Then the text of your function travels to them, and they run it, unchanged.

# %%
from dsv3_mini.course.processes import Processes, same_on

team = Processes(4)
four = [torch.randn(8) for _ in range(4)]
same_on(team, ring_all_gather, all_gather, four)
same_on(team, ring_reduce_scatter, reduce_scatter, [x.view(4, 2) for x in four])

# %% [markdown]
# And of course you need not write them: torch has all five, for real wires and real sizes.

# %%
from dsv3_mini.course.shared_training import with_torch

show_source(with_torch)
rows = [torch.randn(4, 3) for _ in range(4)]
table, theirs = torch.stack(rows), team.run(with_torch, rows)  # table: sender, receiver, number
right = {
    "broadcast": [table[0]] * 4, "all-reduce": [table.sum(0)] * 4, "reduce-scatter": list(table.sum(0)),
    "all-gather": [table[:, 0]] * 4, "all-to-all": list(rearrange(table, "sender receiver m -> receiver sender m")),
}  # fmt: skip
for name, wanted in right.items():
    print(f"{name:15}", all(torch.allclose(got[name], w) for got, w in zip(theirs, wanted, strict=True)))

# %% [markdown]
# ## A batch that nobody has
#
# Now to what it is for. In **data parallelism** every rank holds all weights and sees its own rows of the batch. Each
# writes its loss as *its share of the whole batch's mean* (lesson 13 showed what a mean of means does), goes backward,
# and all add up their gradients. The sum is the whole batch's gradient, since a derivative of a sum is a sum. So all
# ranks take the same step, and their weights stay equal without ever being compared.
#
# Ten rows for the nano model, on four processes, so that two ranks have three rows and two have two.

# %%
from dsv3_mini.course.shared_training import backward, fresh_model, gradient_of_rows, random_rows

show_source(gradient_of_rows)
batch = random_rows(10)
summed = team.run(gradient_of_rows, [batch] * 4)
model = fresh_model()
backward(model, batch, batch)  # one process, all rows
whole = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
off = max((each - whole).abs().max() for each in summed) / whole.abs().max()
print(f"{len(whole):,} numbers; four processes agree with one to 1e-5 of the largest: {bool(off < 1e-5)}")

# %% [markdown]
# ## What a rank must remember
#
# Data parallelism shares the work. It does not share the memory: every rank keeps *everything*. With weights and
# gradients in BF16, and Adam in FP32, a parameter costs
#
# | | bytes |
# |---|---|
# | weight | 2 |
# | gradient | 2 |
# | optimizer: master weight 4, first moment 4, second moment 4 | 12 |
# | | **16** |
#
# and all ranks keep the same 16. **ZeRO** shares it in three stages, the largest part first. An optimizer treats each
# number on its own, so rank `r` can look after piece `r` of the parameters and no other. It needs the summed gradient
# of its piece: a reduce-scatter. All need all stepped weights: an all-gather. Those are the two halves of the
# all-reduce that data parallelism pays anyway.

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · An optimizer that is shared
# ●●○ · 12 minutes
#
# Write this step, ZeRO's first stage, for gradient descent with momentum. Every rank has the whole `weights`, `[p]`;
# its own `gradient`, `[p]`, a share of the batch's; and `momentum`, `[p/n]`, of its own piece only. On one machine it
# would be
#
#     momentum = beta * momentum + gradient
#     weights = weights - rate * momentum
#
# Return the new weights, whole, `[p]`, and the new momentum of the own piece, `[p/n]`. `reduce_scatter(me, pieces)` and
# `all_gather(me, piece)` are there for you.
#
# <details><summary>Hint 1</summary>Cut into pieces with <code>rearrange(x, "(n m) -> n m", n=me.count)</code>. Your own
# is number <code>me.number</code>.</details>
# <details><summary>Hint 2</summary>Four steps: sum the gradients, of which you get your piece; the momentum; the step
# of your piece of weights; gather.</details>


# %%
def sharded_step(
    me: Rank, weights: Float[Tensor, " p"], gradient: Float[Tensor, " p"], momentum: Float[Tensor, " m"],
    rate: float, beta: float,
) -> tuple[Float[Tensor, " p"], Float[Tensor, " m"]]:  # fmt: skip
    """The whole weights after the step, and this rank's piece of the momentum."""
    ### BEGIN SOLUTION: reduce-scatter the gradients, step the own piece with its momentum, all-gather the pieces
    own = reduce_scatter(me, rearrange(gradient, "(n m) -> n m", n=me.count))
    momentum = beta * momentum + own
    piece = rearrange(weights, "(n m) -> n m", n=me.count)[me.number] - rate * momentum
    return rearrange(all_gather(me, piece), "n m -> (n m)"), momentum
    ### END SOLUTION


# %%
check.sharded_step(sharded_step)

# %% [markdown]
# The same bytes cross the wires as before, and the optimizer's state is there once, not `n` times. The other stages go
# on:
#
# - **stage 2** shares the gradients, too: a rank keeps the sum of its own piece only, and adds up after each
#   micro-batch;
# - **stage 3** shares the weights: a layer's weights are gathered when it runs, forward and again backward, and
#   forgotten behind it.

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · Sixteen bytes
# ●○○ · 6 minutes
#
# How many bytes does each rank keep, at stage 0 (nothing shared), 1, 2 and 3? `parameters` can be divided by `ranks`.
#
# <details><summary>Hint</summary>Each of the three parts, of 2, 2 and 12 bytes, is either whole on each rank or divided
# by <code>ranks</code>. Stage 1 divides the optimizer's, stage 2 the gradients as well, stage 3 the weights as well.
# </details>


# %%
def bytes_per_rank(parameters: int, ranks: int, stage: int) -> float:
    """Bytes of weights, gradients and optimizer state on each rank."""
    ### BEGIN SOLUTION: each of the three parts, divided by the ranks from its stage on
    optimizer = 12 * parameters / (ranks if stage >= 1 else 1)
    gradients = 2 * parameters / (ranks if stage >= 2 else 1)
    weights = 2 * parameters / (ranks if stage >= 3 else 1)
    return weights + gradients + optimizer
    ### END SOLUTION


# %%
check.bytes_per_rank(bytes_per_rank)

# %% [markdown]
# For the 16B model, the size on which the report tried out FP8, over 64 GPUs:

# %%
from dsv3_mini import ModelConfig
from dsv3_mini.ledger import count_parameters
from dsv3_mini.viz.figures.collectives import memory_figure

small = count_parameters(ModelConfig.preset("16b")).main_trainable
held = {
    ("data parallel" if stage == 0 else f"ZeRO-{stage}"): {
        "weights": 2 * small / (64 if stage == 3 else 1),
        "gradients": 2 * small / (64 if stage >= 2 else 1),
        "optimizer": 12 * small / (64 if stage >= 1 else 1),
    }
    for stage in range(4)
}
memory_figure(held, 80e9, f"{small / 1e9:.1f}B parameters on 64 GPUs: from stage 1 on they fit")

# %% [markdown] tags=["package"]
# ## The package's own
#
# In `dsv3_mini` a layout is a plan of a few numbers, and the processes of a plan lie in a **mesh**: a table whose axes
# have names. A collective runs along an axis. `shard` hands the model to torch's `fully_shard` (FSDP2), block by block,
# and the ZeRO stage is nothing but *when* weights are put together and gradients added up.

# %%
from dsv3_mini.parallel.mesh import Mesh
from dsv3_mini.parallel.sharding import before_micro_batch, shard

show_source(Mesh.join, shard, before_micro_batch)

# %% [markdown]
# Four processes as two copies of the weights, each shared by two, with the experts of a layer over two as well:
# `dp_replicate=2, dp_shard=2, ep=2`. With whom does each rank share an axis? (Axes of one rank are left out.)

# %%
from dsv3_mini.course.shared_training import axes

plan = {"dp_replicate": 2, "dp_shard": 2, "ep": 2}
for number, own in enumerate(team.run(axes, [plan] * 4)):
    print(f"rank {number}:", {name: ranks for name, ranks in own.items() if len(ranks) > 1})

# %% [markdown]
# `dp_shard` is where weights are cut: reduce-scatter and all-gather. `dp_replicate` joins those that hold the *same*
# piece: they all-reduce it. For experts the same two processes are an `ep` group, which exchanges tokens; each expert
# is then there twice in all, in the two copies, and these sum its gradients (`expert_replicate`).
#
# Now let four processes take one step of the nano model with `shard`, in two micro-batches, at each stage.

# %%
from dsv3_mini.course.shared_training import shared_step

batch = random_rows(16)
taken = {zero: team.run(shared_step, [zero] * 4, [batch] * 4, [2] * 4) for zero in (1, 2, 3)}
total = sum(p.numel() for p in model.parameters())
print(f"of {total:,} numbers, on each of 4 ranks:")
print("stage  weights after forward  gradients after backward  momentum   gathered   summed  (times in the step)")
for zero, (mine, *_) in taken.items():
    shares = [mine[what] / total for what in ("weights", "gradients", "momentum")]
    print(f"{zero:5} {shares[0]:21.0%} {shares[1]:25.0%} {shares[2]:9.0%} {mine['gathers']:10} {mine['sums']:8}")

# %% [markdown]
# Stage 1 has everything whole but its momentum, gathers once and adds up once. Stage 2 keeps a quarter of the gradients
# and adds up with every micro-batch. Stage 3 keeps few weights (embedding, last norm and head stay put together: the
# package's simplification) and gathers for each micro-batch, forward and backward. That is what its memory costs.
#
# And are its weights those of your step? Give your function the four ranks' gradients, and compare.

# %%
from dsv3_mini.course.shared_training import MOMENTUM, RATE, flat

names = list(dict(model.named_parameters()))
length = -(-total // 4) * 4  # a few zeros, so that it comes out even
gradients = []
for rank in range(4):
    model = fresh_model()
    backward(model, batch[rank::4], batch)
    gradients.append(flat({name: p.grad for name, p in model.named_parameters()}, length))
start = flat(dict(model.named_parameters()), length)


# %%
def yours(zero: int) -> Tensor:
    """By how much the weights move. Any rank will do: all have the same."""
    columns = [start] * 4, gradients, [torch.zeros(length // 4)] * 4, [RATE] * 4, [MOMENTUM] * 4
    return on_ranks(sharded_step)(*columns)[zero][0] - start


def the_packages(zero: int) -> Tensor:
    return flat({name: taken[zero][0]["after"][name] for name in names}, length) - start


same(yours, the_packages, (1,), (2,), (3,))
print(f"the step moves weights by up to {the_packages(1).abs().max():.2f}")

# %% [markdown] tags=["experiment"]
# ## Experiment 1: is the ring the fastest?
#
# It sends the fewest bytes. But it needs $2(n - 1)$ rounds, and each has its latency $\alpha$. There is another way
# with few rounds: **doubling**. Partners one place apart exchange all they have and add it up, then partners two places
# apart, four, eight. After $\log_2 n$ rounds all have the sum, and each round carries the whole tensor.
#
# **What we expect**, from $\alpha + b/s$ for each message of $b$ bytes, for a tensor of $B$ bytes:
#
# | | time |
# |---|---|
# | ring | $2(n-1)\,(\alpha + \frac{B}{n s})$ |
# | doubling | $\log_2 n\,(\alpha + \frac{B}{s})$ |
# | by way of rank 0 | $2\alpha + 2(n-1)\frac{B}{s}$ |
#
# So doubling should win small tensors and the ring large ones. Our ranks have clocks, which know nothing of these
# formulas: a rank's way out and its way in carry one message at a time. If ranks wait for each other in some way that
# we did not think of, simulation and formula will differ.

# %%
import math

from dsv3_mini.course.ranks import Wires
from dsv3_mini.course.ring import all_reduce_at_zero, all_reduce_by_doubling
from dsv3_mini.parallel.traffic import INSIDE_SPEED, NETWORK_SPEED

ALPHA, n = 10e-6, 16
ways = {"ring": all_reduce, "doubling": all_reduce_by_doubling, "by way of rank 0": all_reduce_at_zero}
formulas = {
    "ring": lambda b: 2 * (n - 1) * (ALPHA + b / n / NETWORK_SPEED),
    "doubling": lambda b: math.log2(n) * (ALPHA + b / NETWORK_SPEED),
    "by way of rank 0": lambda b: 2 * ALPHA + 2 * (n - 1) * b / NETWORK_SPEED,
}

# %%
from dsv3_mini.viz.figures.collectives import times_figure


def seconds(way, size: int, wires: Wires, ranks: int = n) -> float:
    """When the last rank is ready. A tensor on "meta" has a size and no numbers."""
    return run(way, [torch.empty(size // 4, device="meta")] * ranks, wires=wires).seconds


# %%
network = Wires(latency=ALPHA, speed=NETWORK_SPEED)
sizes = [2**power for power in range(10, 31, 4)]
times = {name: {size: seconds(way, size, network) for size in sizes} for name, way in ways.items()}
for name, curve in times.items():
    equal = all(math.isclose(time, formulas[name](size), rel_tol=1e-9) for size, time in curve.items())
    print(f"{name:17} simulated = formula at all {len(sizes)} sizes: {equal}")
    assert equal
times_figure(times, "16 ranks: doubling for small tensors, the ring for large ones")

# %% [markdown]
# They agree. (For a kilobyte even rank 0's way is fast: two latencies are all that it waits for.) And there is a size
# at which the two curves cross: where $\log_2 n\,(\alpha + B/s) = 2(n-1)(\alpha + B/(ns))$. A library such as NCCL
# holds several of these ways, and chooses by size.

# %%
cross = ALPHA * NETWORK_SPEED * (2 * (n - 1) - math.log2(n)) / (math.log2(n) - 2 * (n - 1) / n)
print(f"they cross at {cross / 1e6:.1f} MB; the gradients of one expert of 671B are 176 MB in FP32")
for size in (int(cross / 2) // 64 * 64, int(cross * 2) // 64 * 64):
    fastest = min(ways, key=lambda name: seconds(ways[name], size, network))
    print(f"{size / 1e6:5.1f} MB: the fastest is the {fastest}")

# %% [markdown]
# ## Experiment 2: two kinds of wire
#
# Thirty-two GPUs in four nodes. A ring through all of them crosses from node to node in four places, and as all ranks
# send at the same time, in every round all wait for those four. The mesh has two axes: rows of a **node**, columns of
# the same **place** in each node. So:
#
# 1. reduce-scatter inside each node: each GPU has an eighth of its node's sum;
# 2. all-reduce along the columns: only that eighth crosses the network, from all eight GPUs of a node at once;
# 3. all-gather inside.
#
# **What we expect** for a large tensor: the ring takes $2 \cdot \frac{31}{32} \cdot \frac{B}{50}$ (in GB and seconds),
# the two axes $2 \cdot \frac{7}{8} \cdot \frac{B}{160} + 2 \cdot \frac{3}{4} \cdot \frac{B/8}{50}$. That would be 2.6
# times as fast. If it is not, the axes get in each other's way.

# %%
from dsv3_mini.course.ring import all_reduce_in_nodes

show_source(all_reduce_in_nodes)
cluster = Wires(latency=ALPHA, speed=NETWORK_SPEED, node=8, inside=INSIDE_SPEED)
size = 2**32
by_ring = seconds(all_reduce, size, cluster, ranks=32)
by_axes = seconds(lambda me, x: all_reduce_in_nodes(me, x, node=8), size, cluster, ranks=32)
expected = (2 * 31 / 32 / 50) / (2 * 7 / 8 / 160 + 2 * 3 / 4 / 8 / 50)
print(f"one ring {1e3 * by_ring:.0f} ms, two axes {1e3 * by_axes:.0f} ms: {by_ring / by_axes:.2f} times as fast")
print(f"expected without latency: {expected:.2f}")
assert abs(by_ring / by_axes / expected - 1) < 0.02

# %% [markdown]
# You have met this rule before: lesson 10 sends a token once to each node, and hands it on inside. It is the same one,
# that the slow wire carries nothing twice.

# %% [markdown] tags=["interactive"]
# ## The player
#
# Every collective, round by round, on four to eight ranks. Press *play*, or step with the arrow keys. The bars count
# what each rank has sent, in sizes of its tensor.
#
# Things to look for: in all-reduce the rows empty while partial sums travel, and fill again. By way of rank 0 takes as
# many rounds as the ring; look at how large its messages are. In all-to-all every round is a set of swaps.

# %%
from dsv3_mini.viz.widgets.collectives import CollectivePlayer

player = CollectivePlayer()
player.set(name="all-reduce", ranks=6, moment=3)
player

# %%
print("8 ranks                        rounds   largest message   sent by the busiest   (in sizes of a tensor)")
for name in player.facts["names"]:
    player.set(name=name, ranks=8, moment=0)
    film = player.film
    sent = film.sent(len(film.rounds))
    print(f"{name:30} {len(film.rounds):6} {max(film.lengths) / 8:17.3f} {max(sent) / 8:21.3f}")
before = player.figure()
player.set(moment=len(player.film.rounds))
assert player.moment == 8 and player.film.state(8) != player.film.start and before is not None
player.set(name="all-reduce", ranks=6, moment=3)

# %% [markdown]
# `player.save_html("collectives.html")` writes it into one file that plays without Python.
#
# ## Find the bug
#
# Gradients are summed over micro-batches on a rank, and over ranks. Somebody put the two together. With one micro-batch
# it is right. It is right on one rank, too, where all of it had been tested.


# %%
def step_gradient_with_a_bug(me: Rank, gradients: list[Tensor]) -> Tensor:
    """The sum over this rank's micro-batches and over all ranks."""
    total = torch.zeros_like(gradients[0])
    for gradient in gradients:
        total = total + gradient
        total = all_reduce(me, total)
    return total


for ranks, count in ((1, 4), (4, 1), (4, 2), (4, 3)):
    parts = [[torch.ones(4)] * count for _ in range(ranks)]
    print(f"ranks {ranks}, micro-batches {count}: {run(step_gradient_with_a_bug, parts).results[0][0]:.0f}", end=" ")
    print(f"where {ranks * count} is right")

# %% [markdown]
# And one day the batch did not come out even: a rank had one micro-batch less than the others.

# %%
from dsv3_mini.course.ranks import Stuck

try:
    run(step_gradient_with_a_bug, [[torch.ones(4)] * count for count in (3, 3, 2, 3)])
except Stuck as stuck:
    print("Stuck:", str(stuck).replace("; ", ";\n  "))

# %% [markdown]
# Our simulated ranks notice. Real ones do not: they wait for a message that nobody will send, without an error, at full
# price by the hour. All that helps is a limit to their patience, here of one second, after which every rank that waits
# fails. (Torch's own limit is 30 minutes with gloo.)

# %%
from dsv3_mini.course.shared_training import not_all_come

for number, told in enumerate(team.run(not_all_come, [1.0] * 4)):
    print(f"rank {number} {told}")
team.close()

# %% [markdown] tags=["bug"]
# ### Find the bug · Once, and all together
# ●○○ · 8 minutes
#
# Mend it. `gradients` has a tensor `[d]` for each of this rank's micro-batches, and ranks may have different numbers of
# them (each at least one). Return the sum over all micro-batches of all ranks. `all_reduce(me, x)` is there for you.
#
# <details><summary>Hint 1</summary>With 4 ranks and 2 micro-batches it gave 20. The first gradient of each rank went
# through two all-reduces: it is counted 16 times.</details>
# <details><summary>Hint 2</summary>A collective is entered by all ranks, the same number of times, or it never ends.
# How often does each rank enter it if it stands behind the loop?</details>


# %%
def step_gradient(me: Rank, gradients: list[Tensor]) -> Float[Tensor, " d"]:
    """The sum over this rank's micro-batches and over all ranks."""
    ### BEGIN SOLUTION: add up the own micro-batches first, then enter the all-reduce once
    total = torch.zeros_like(gradients[0])
    for gradient in gradients:
        total = total + gradient
    return all_reduce(me, total)
    ### END SOLUTION


# %%
check.step_gradient(step_gradient)

# %% [markdown] tags=["at-671b"]
# ## At 671B
#
# The report's layout, and what each collective costs in it. A GPU belongs to one of 16 pipeline stages. Of its stage it
# shares the routed experts with 64 GPUs, and all else is the same on the stage's 128. First, what is summed after each
# step: gradients in FP32 by reduce-scatter, weights in BF16 by all-gather, all over the slow network. A step takes, by
# the report's GPU hours, about 20 seconds.

# %%
from dsv3_mini.ledger import REPORT_RUN
from dsv3_mini.parallel.plan import ParallelPlan

large, plan = ModelConfig.preset("671b"), ParallelPlan.preset("report")
counted = count_parameters(large)
experts = counted.moe_layers * large.n_routed_experts * counted.expert.trainable
per_gpu = {"experts": experts / plan.pp / plan.ep, "all else": (counted.main_trainable - experts) / plan.pp}
tokens_a_second = 1e12 / (REPORT_RUN.hours_per_trillion * 3600) * REPORT_RUN.gpus
step = 15_360 * 4096 / tokens_a_second

# %%
zero1 = 0.0
for name, shared_by in (("experts", plan.expert_shard), ("all else", plan.dp_shard)):
    share = (shared_by - 1) / shared_by * (4 + 2) * per_gpu[name]
    zero1 += share / NETWORK_SPEED
    print(
        f"{name:9} {per_gpu[name] / 1e6:6.0f}M on a GPU, shared by {shared_by:3}: {share / 1e9:.1f} GB sent in a step"
    )
print(f"together {1e3 * zero1:.0f} ms of a step of {step:.1f} s: {zero1 / step:.1%}")

# %% [markdown]
# One part in a hundred. Why only stage 1, then, and no ZeRO-3, which
# would need no pipeline? Because there weights travel with every micro-batch. Let 2,048 GPUs share everything, one
# sequence a micro-batch:

# %%
sequences = 15_360 / REPORT_RUN.gpus  # on each GPU in a step
weights_and_gradients = (2 + 2 + 4) * counted.main_trainable  # gathered twice in BF16, summed once in FP32
zero3 = sequences * weights_and_gradients / NETWORK_SPEED
print(f"ZeRO-3 memory: {16 * counted.main_trainable / REPORT_RUN.gpus / 1e9:.1f} GB on each GPU")
print(f"ZeRO-3 traffic: {weights_and_gradients / 1e12:.1f} TB for each of {sequences} micro-batches")
print(f"{zero3:.0f} s for a step that takes {step:.1f} s")

# %% [markdown]
# The memory is wonderful and the wires are forty times too slow. What does travel in each layer is activations. Two
# ways, for one second of a GPU's work: all-to-all of tokens to their experts, in FP8 there and BF16 back, forward and
# backward, with 3.5 nodes away from home (lesson 10); and what tensor parallelism over the eight GPUs of a node would
# add, four all-reduces of a token's vector in each layer.

# %%
d, layers = large.hidden_size, large.num_hidden_layers
per_gpu_second = tokens_a_second / REPORT_RUN.gpus
dispatch = 3.5 * d * (1 + 2) * 2 * counted.moe_layers  # bytes of a token over the network
tensor = 4 * 2 * 7 / 8 * d * 2 * layers  # bytes of a token inside the node, on each of its eight GPUs
print(f"{per_gpu_second:.0f} tokens a second and GPU")
print(
    f"experts' all-to-all: {dispatch / 1e6:.1f} MB a token, {per_gpu_second * dispatch / NETWORK_SPEED:.0%} of the time"
)
share = 8 * per_gpu_second * tensor / INSIDE_SPEED
print(f"tensor parallelism: {tensor / 1e6:.1f} MB a token of its group of 8, {share:.0%} of the time")

# %% [markdown]
# So there is a reason for every line of the layout. The all-to-all takes a quarter of the time on the wires, and
# DualPipe hides it behind arithmetic (lesson 20). Tensor parallelism would take nearly half, in the middle of each
# layer where there is little to hide it behind: the report trains without it. ZeRO-1 takes next to nothing. (All this
# is bytes through a wire at full speed: real messages wait for each other as well.)

# %% [markdown] tags=["recap"]
# ## Recap
#
# 1. You double the number of data-parallel ranks. What happens to the bytes that each sends in an all-reduce of the
#    gradients, and to the time?
#    <details><summary>Answer</summary>The bytes hardly change, 2(n-1)/n times the tensor, always less than twice. On a
#    ring the rounds double, and with them the latencies: for large tensors that is nothing, for small ones it is
#    all.</details>
# 2. ZeRO-1 gives up an all-reduce for two other collectives. Why does it cost no more?
#    <details><summary>Answer</summary>An all-reduce on a ring <em>is</em> a reduce-scatter and an all-gather. ZeRO-1
#    steps its own piece between the two halves.</details>
# 3. Rank 17 of 2,048 skips a micro-batch because it is empty. What happens?
#    <details><summary>Answer</summary>If there is a collective in each micro-batch, all others wait for it, until their
#    patience ends. It has to enter, if only with zeros.</details>

# %% [markdown] tags=["next"]
# ## Next
#
# The all-to-all of this lesson had pieces of one size. Tokens choose their experts, so that real ones do not: lesson 19
# sends them, and nobody is dropped. Lesson 20 lays the layers along a line of ranks and hides what lesson 19 sends.
