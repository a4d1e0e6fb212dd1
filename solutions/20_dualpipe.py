# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   dsv3:
#     title: DualPipe
#     minutes: 85
#     after: [10_node_limited_routing]
#     builds: a pipeline simulated, 1F1B and zero-bubble schedules that are run, a backward in two parts
#     tracks: [term]
# ---

# %% [markdown] tags=["why"]
# # 20 · DualPipe
#
# DeepSeek-V3 has 61 layers and does not fit on one GPU, nor on one machine. So its layers are laid along a line: the
# first four on one GPU, the next four on the next, and so on, 16 in a row. Such a row is a **pipeline**, a place in it
# is a **rank**, and the layers that lie there are a **stage**. A token's vector enters at the first stage and leaves at
# the last; then its gradient comes all the way back.
#
# While the first rank works on the first tokens, the other fifteen have nothing to do. What a rank idles is called its
# **bubble**, and it is paid for like any other hour. In this lesson you write two schedules that make it smaller, see why
# it cannot go on like that, and meet the one that DeepSeek-V3 was trained with, DualPipe. It makes the bubble small, and
# hides nearly all of the messages of lesson 10 behind arithmetic as well.
#
# It is all simulated, exactly and in a second: no second GPU is needed to understand it. (A rank stands for all the GPUs
# over which a stage's experts are spread, as in lesson 10.) Below is one step of training, eight ranks and twenty small
# batches, first in the order that most pipelines use, then in DualPipe's. Grey is idle.

# %%
from dsv3_mini.parallel.schedule_simulator import simulate
from dsv3_mini.parallel.schedules import make_schedule
from dsv3_mini.viz.figures.schedule import schedule_figure
from dsv3_mini.viz.widgets.schedule_player import costs_of

as_reported = costs_of(communication=1.0)  # messages take as long as arithmetic, as section 3.2.1 reports
schedule_figure(*(simulate(make_schedule(name, 8, 20), as_reported) for name in ("1F1B", "DualPipe")))

# %% [markdown] tags=["paper"]
# ## In the report
#
# Section 3.2.1. A batch is cut into **microbatches**, which follow each other through the pipeline. What a rank does with
# one of them has a letter:
#
# | | | waits for |
# |---|---|---|
# | F | forward | the activation of the stage before |
# | B | backward | the gradient of the stage behind |
# | I | the part of B that makes the gradient of the stage's *input* | the same |
# | W | the part of B that makes the gradients of its *weights*; B is I and W | its own I, and nobody waits for it |
# | F&B | a forward and a backward of two microbatches in one, which hide each other's messages | both |
#
# (The report has no letter for I; its W is ours.) $F$, $B$, $W$ and $F\&B$ also stand for the time that each takes. With
# $PP$ stages, Table 2 says how long a rank idles in each step, and what it has to keep:
#
# | schedule | bubble | stages on a rank | activations kept |
# |---|---|---|---|
# | 1F1B | $(PP-1)(F+B)$ | 1 | $PP$ |
# | ZB1P | $(PP-1)(F+B-2W)$ | 1 | $PP$ |
# | DualPipe | $(\tfrac{PP}{2}-1)(F\&B+B-3W)$ | 2 | $PP+1$ |
#
# An **activation** here is all that a stage remembers of one microbatch, from its F until its B or W is done. The number
# of microbatches stands nowhere in the table.

# %% [markdown] tags=["naive"]
# ## The naive way
#
# All forwards first, then all backwards. This is GPipe, and so regular that one can write down when everything runs. Let
# F take 1 and B take 2. Microbatch 2 reaches rank `r` after two others and `r` ranks, so its F starts at `2 + r`. The
# backwards start at the last rank when all forwards are done there, and come up.


# %%
def gpipe_by_hand(ranks: int, microbatches: int) -> list[str]:
    """A line for each rank, a place for each unit of time: digits are forwards, letters backwards (a is of 0)."""
    lines = []
    for rank in range(ranks):
        line = ["."] * (3 * (microbatches + ranks - 1))
        for number in range(microbatches):
            line[number + rank] = str(number)
            back = (microbatches + ranks - 1) + 2 * (number + ranks - 1 - rank)
            line[back : back + 2] = 2 * chr(ord("a") + number)
        lines.append("".join(line))
    return lines


# %%
for microbatches in (1, 4, 8):
    lines = gpipe_by_hand(4, microbatches)
    idle = sum(line.count(".") for line in lines) / sum(map(len, lines))
    print(f"{microbatches} microbatches: {idle:.0%} idle", *lines, "", sep="\n")

# %% [markdown]
# Each rank idles 9 units, with one microbatch as with eight: that is $(PP-1)(F+B) = 3 \cdot 3$. More microbatches only
# make it a smaller *share* of a longer step. Why not take a thousand, then? Because a batch is only so large (more
# sequences in a step do not teach more), and because of what must be kept. We come to that in exercise 2.
#
# For other orders nobody has a formula at first. We need a simulator.

# %%
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from dsv3_mini.course.checks import lesson_20 as check
from dsv3_mini.course.lesson import same, show_source
from dsv3_mini.course.pipeline_order import order_of, schedule_of

Order = list[list[str]]
print(*order_of(make_schedule("1F1B", 3, 4)), sep="\n")

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · When does it start?
# ●●○ · 15 minutes
#
# An order is a list for each rank, with its ops as texts: `"F3"` is the forward of microbatch 3. Stage `r` lies on rank
# `r`. An op starts as soon as two things are true:
#
# - the op before it on its own rank is done;
# - what it needs has been given. `F3` needs `F3` on the rank above (`rank - 1`), and rank 0 needs nothing. `B3` needs
#   `B3` on the rank below (`rank + 1`), and the last rank needs its own `F3`.
#
# F takes `forward`, B takes `backward`. Return the start of every op, in lists of the same form. The order can be run:
# nobody waits for ever.
#
# <details><summary>Hint 1</summary>Remember when each op has ended, in a dict by op and rank: <code>end["F3", 1]</code>.
# What is not in it yet cannot be waited for yet.</details>
# <details><summary>Hint 2</summary>Go over the ranks again and again. Each time, a rank does as many of its next ops as
# it can, and stops at the first whose need is not in <code>end</code>. Stop when all ops have a start.</details>
# <details><summary>Hint 3</summary><code>start = max(end of the op before, end of what it needs)</code>, and an op that
# has neither starts at 0.</details>


# %%
def start_times(order: Order, forward: int, backward: int) -> list[list[int]]:
    """When each op of each rank starts."""
    ### BEGIN SOLUTION: go over the ranks until all ops have a start; an op waits for its rank and for what it needs
    end: dict[tuple[str, int], int] = {}
    start: list[list[int]] = [[] for _ in order]
    free = [0] * len(order)
    while any(len(done) < len(ops) for done, ops in zip(start, order, strict=True)):
        for rank, ops in enumerate(order):
            for op in ops[len(start[rank]) :]:
                if op[0] == "F":
                    needs = [(op, rank - 1)] if rank > 0 else []
                else:
                    needs = [(op, rank + 1)] if rank < len(order) - 1 else [("F" + op[1:], rank)]
                if any(need not in end for need in needs):
                    break
                start[rank].append(max([free[rank], *(end[need] for need in needs)]))
                free[rank] = end[op, rank] = start[rank][-1] + (forward if op[0] == "F" else backward)
    return start
    ### END SOLUTION


# %%
check.start_times(start_times)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · What is kept
# ●○○ · 6 minutes
#
# `ops` are those of one rank, `["F0", "F1", "B0", ...]`. From its F on, a microbatch's activation is kept, until its B
# is done, or its W where the backward comes in two parts (`"I0"`, later `"W0"`). How many does the rank keep at most at
# one time?
#
# <details><summary>Hint</summary>Count up at an F and down at a B or a W. Remember the highest count on the way.
# </details>


# %%
def most_kept(ops: list[str]) -> int:
    """The most activations that a rank keeps at one time."""
    ### BEGIN SOLUTION: count up at F, down at B and W, remember the most
    kept = most = 0
    for op in ops:
        kept += op[0] == "F"
        most = max(most, kept)
        kept -= op[0] in "BW"
    return most
    ### END SOLUTION


# %%
check.most_kept(most_kept)

# %% [markdown]
# GPipe keeps *all* microbatches of a batch, on every rank. That is what 1F1B, **one forward, one backward**, is made for:
#
# - a rank first runs as many forwards as there are ranks *below* it, so that they have something to do;
# - then one forward and one backward in turn;
# - when the forwards are used up, the backwards that are left.

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · One forward, one backward
# ●●○ · 12 minutes
#
# Write that order, for any number of ranks and microbatches. The check does not compare it with ours: it *runs* it. Can
# it be run at all? Does rank `r` keep at most `ranks - r` activations? Does no rank idle for longer than
# $(PP-1)(F+B)$?
#
# <details><summary>Hint 1</summary>On rank 1 of 3, with four microbatches: <code>F0 F1 B0 F2 B1 F3 B2 B3</code>. One
# rank is below it, so F0 runs ahead; then F1 B0, F2 B1, F3 B2; then B3.</details>
# <details><summary>Hint 2</summary>With <code>first</code> forwards ahead, the turn of backward <code>m</code> begins
# with forward <code>first + m</code>, if there is one.</details>
# <details><summary>Hint 3</summary>There may be fewer microbatches than ranks: <code>first = min(microbatches, ranks - 1
# - rank)</code>.</details>


# %%
def one_forward_one_backward(ranks: int, microbatches: int) -> Order:
    """The order of 1F1B: for each rank its ops, such as "F0" and "B0"."""
    ### BEGIN SOLUTION: for each rank the forwards that run ahead, then F and B in turn, then the backwards that are left
    order = []
    for rank in range(ranks):
        first = min(microbatches, ranks - 1 - rank)
        ops = [f"F{number}" for number in range(first)]
        for number in range(microbatches):
            if first + number < microbatches:
                ops.append(f"F{first + number}")
            ops.append(f"B{number}")
        order.append(ops)
    return order
    ### END SOLUTION


# %%
check.one_forward_one_backward(one_forward_one_backward)

# %%
gpipe, plain = (simulate(make_schedule(name, 4, 12)) for name in ("GPipe", "1F1B"))
assert gpipe.bubble == plain.bubble and max(gpipe.schedule.peak_activations) == 12
schedule_figure(gpipe, plain)

# %% [markdown] tags=["package"]
# ## The package's own
#
# In the package a schedule is data: for each rank its **slots** in their order, a slot being one op, or an F and a B that
# overlap. It says nothing about time. `simulate` says when each slot runs, `check` whether it can be run at all, and
# `peak_activations` what it keeps. All of this can be asked of every schedule here, torch's own included.

# %%
from dsv3_mini.parallel.schedule_checker import check as check_schedule
from dsv3_mini.parallel.schedule_costs import PhaseCosts
from dsv3_mini.parallel.schedules.one_f_one_b import one_f_one_b

show_source(simulate, one_f_one_b)


# %%
def package_times(order: Order, forward: int, backward: int) -> list[list[int]]:
    costs = PhaseCosts(forward, backward, 0)
    return [list(times) for times in simulate(schedule_of(order, len(order[0]) // 2), costs).start]


plain_order = order_of(one_f_one_b(5, 12))
same(start_times, package_times, (plain_order, 1, 2), (plain_order, 7, 3))
same(most_kept, lambda ops: max(schedule_of([ops], 12).peak_activations), (plain_order[0],), (plain_order[3],))
same(one_forward_one_backward, lambda ranks, m: order_of(one_f_one_b(ranks, m)), (4, 9), (8, 8), (6, 2))

# %% [markdown]
# And a schedule that cannot be run? Let the last rank ask for microbatch 2 before it gives back microbatch 0: the rank
# above will not send 2 before it has 0. On a cluster all ranks would now wait for ever, without an error message. The
# checker finds the ring.

# %%
from dataclasses import replace

from dsv3_mini.parallel.schedule_ir import ScheduleError

good = one_f_one_b(3, 4)
last = list(good.order[2])
last.insert(1, last.pop(4))  # F2 right after F0
try:
    check_schedule(replace(good, order=(*good.order[:2], tuple(last))))
except ScheduleError as refused:
    print(str(refused).replace("; ", ";\n"))

# %% [markdown] tags=["experiment"]
# ## Experiment 1: smaller stages
#
# The way down the pipeline takes $PP - 1$ stages. Suppose that a rank holds not one stage but $v$ smaller ones, with all
# microbatches going round the ranks $v$ times. This is **interleaved** 1F1B. The first microbatch reaches the last rank
# after $PP - 1$ *small* stages.
#
# **What we expect.** A bubble $v$ times shorter, if the rounds do not make ranks wait for each other. If they do, it
# falls more slowly than $1/v$. And something must be paid for it, or everybody would take the largest $v$. (So that
# numbers can be compared, a stage of half a rank's layers takes half the time and keeps half as much.)

# %%
from dsv3_mini.parallel.schedules.interleaved import interleaved
from dsv3_mini.viz.widgets.schedule_player import stage_costs

unit = PhaseCosts(forward=1, input=1, weight=1)  # of a rank's share of the model, so B takes 2
print("stages on a rank   bubble   kept   messages for a microbatch")
for v in (1, 2, 4, 8):
    small = one_f_one_b(8, 32) if v == 1 else interleaved(8, 32, stages_per_rank=v)
    timeline = simulate(small, stage_costs(small, unit))
    assert timeline.bubble == 7 * 3 / v
    kept, sent = max(small.peak_activations) / v, 2 * (small.n_stages - 1)
    print(f"{v:16} {timeline.bubble:8.3f} {kept:6.1f} {sent:12}")

# %% [markdown]
# The bubble falls as $1/v$, exactly. It costs memory, half as much again with two stages, and less with many. And it
# costs messages from stage to stage, which our simulator lets travel in no time: on a cluster they are what ends it.
#
# So this is one way. Another is to look into the backward itself.
#
# ## A backward is two things
#
# A linear layer computes $y = x W^T$, for `T` tokens of width `d`, with a weight `[f d]`. Going back, `grad` is the
# gradient of `y`, `[T f]`. The layer makes two products of it, and one of them only is waited for.

# %%
T, d, f = 6, 4, 3
torch.manual_seed(0)
x, weight, grad = torch.randn(T, d), torch.randn(f, d), torch.randn(T, f)

input_grad = einsum(grad, weight, "T f, f d -> T d")  # I: the stage before waits for it
weight_grad = einsum(grad, x, "T f, T d -> f d")  # W: nobody waits for it until the optimizer's step

leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
einsum(*leaves, "T d, f d -> T f").backward(grad)
print(
    "as autograd has it:",
    *(torch.allclose(*each) for each in ((input_grad, leaves[0].grad), (weight_grad, leaves[1].grad))),
)
print(f"multiplications: forward {T * d * f}, I {T * f * d}, W {f * T * d}")

# %% [markdown]
# All three cost the same, so $F = I = W$ is a fair first guess, and $B = 2F$. Cut in two, the backward's I runs where B
# ran, and the rank above can start earlier. Its W can wait for a time when there is nothing else to do: the end of the
# step, where 1F1B's lower ranks are idle. This is **ZB1P**, zero bubble, of which ours is the kind that keeps no more
# than 1F1B's fullest rank does.
#
# How many W may wait? A microbatch's activation is kept until its W is done. Rank `r` of 1F1B keeps `ranks - r`, so it has
# room for `r` more.

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · Nearly no bubble
# ●●○ · 12 minutes
#
# Write the order of ZB1P: 1F1B with `I` in the place of `B`. After each `I` follows one `W`, the oldest that waits, but
# only if more than `r` wait on rank `r`. At the end the rest. There are at least as many microbatches as ranks. The
# check runs it: no rank may keep more than `ranks` activations or idle for longer than $(PP-1)(F+B-2W)$.
#
# <details><summary>Hint 1</summary>On rank 1 of 3, with four microbatches: <code>F0 F1 I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
# </code>. From I1 on, one W follows each I, and one always waits.</details>
# <details><summary>Hint 2</summary>After <code>I{m}</code> comes <code>W{m - rank}</code>, from <code>m = rank</code>
# on. What is left then?</details>


# %%
def zero_bubble(ranks: int, microbatches: int) -> Order:
    """The order of ZB1P: for each rank its ops, such as "F0", "I0" and "W0"."""
    ### BEGIN SOLUTION: 1F1B with I for B; behind each I the W of `rank` microbatches before; at the end those that wait
    order = []
    for rank in range(ranks):
        first = min(microbatches, ranks - 1 - rank)
        ops = [f"F{number}" for number in range(first)]
        for number in range(microbatches):
            if first + number < microbatches:
                ops.append(f"F{first + number}")
            ops.append(f"I{number}")
            if number >= rank:
                ops.append(f"W{number - rank}")
        ops += [f"W{number}" for number in range(max(0, microbatches - rank), microbatches)]
        order.append(ops)
    return order
    ### END SOLUTION


# %%
check.zero_bubble(zero_bubble)

# %%
from dsv3_mini.parallel.schedules.zero_bubble import zb1p

same(zero_bubble, lambda ranks, microbatches: order_of(zb1p(ranks, microbatches)), (3, 4), (8, 20))
schedule_figure(plain, simulate(zb1p(4, 12)))

# %% [markdown]
# A third of the bubble is left, for the same memory.
#
# ## Both directions at once
#
# So far messages were free. They are not: with experts on 64 GPUs each layer sends its tokens to their experts
# (**dispatch**) and the results home (**combine**), and by section 3.2.1 that takes about as long as the arithmetic. A
# rank that waits for a message is as idle as one in the bubble, and no order of F and B by itself helps against it.
#
# But a forward and a backward of *different* microbatches have nothing to do with each other. While one computes, the
# other can communicate. That is a pair, F&B, and this is the report's Figure 4: attention, dispatch, MLP and combine of
# a forward and of a backward, laid over each other. Every part of arithmetic has unit 1 here, and so has every message.

# %%
from dsv3_mini.parallel.schedule_costs import ChunkCosts, Part
from dsv3_mini.viz.figures.schedule import overlap_figure

part = Part(forward=1, input=1, weight=1)
chunk = ChunkCosts(attention=part, mlp=part, dispatch=1, combine=1, layers=2)
alone = chunk.phases()
hidden = 1 - (alone.both - 3 * 2 * chunk.layers) / (4 * chunk.layers)
print(f"F alone {alone.forward}, B alone {alone.backward}, F&B {alone.both}; arithmetic {3 * 2 * chunk.layers}")
print(f"messages that cost no time: {hidden:.0%}")
overlap_figure(chunk)

# %% [markdown]
# Every message travels while something else is computed. It is W that makes it come out: it waits for no message, so it is
# put where the backward's own would be waited for.
#
# Now a pipeline needs pairs: on one rank, at one time, a forward and a backward that do not wait for each other. In the
# 1F1B that you wrote the last rank has none, for its next backward is of the microbatch whose forward it has just done.
# So give a rank *two* stages, an early one and a late one: then a forward of the one goes with a backward of the other.
#
# - **DualPipeV** lays the stages down the ranks and up again, like the letter: of eight stages on four ranks, rank 0
#   has stages 0 and 7.
# - **DualPipe**, the report's, lets half of the microbatches enter at each *end*. Every stage lies on two ranks, once for
#   each direction, so that all weights are there twice.
#
# Fold a DualPipe of eight ranks in the middle, and you have two DualPipeVs of four. So one rule writes both. On a rank
# with the early stage 0 and the late stage 1, with `i` ranks between it and the turn of the V:
#
# | phase | what | how often |
# |---|---|---|
# | fill | F0; then F0 F1 | 2i times; until the turn |
# | the first backwards, cut | I1 W1 F1 | i |
# | the long middle | F0&B1 F1&B0 | until the microbatches are used up |
# | drain | B1, then pairs F1&B0; B1 B0; I and W at the end, as ZB1P does | |

# %%
dual, dual_v = make_schedule("DualPipe", 4, 10), make_schedule("DualPipeV", 4, 10)
print("Rank 0 of DualPipe: stage, op, microbatch, and a ' in the other direction.", dual.lines()[0], sep="\n")
schedule_figure(simulate(dual, unit), simulate(dual_v, stage_costs(dual_v, unit)))

# %% [markdown] tags=["interactive"]
# ## The player
#
# All six schedules, 4 to 16 ranks, and messages from nothing to as long as arithmetic. Press *play*, or drag the time;
# on the picture, left and right go from event to event, and space plays. Point at a box to see the way of its microbatch
# down and up the ranks. The bars on the right are the activations that are kept at that moment.
#
# Things to look for: GPipe's bars grow to the top. In 1F1B the bars are a staircase, in ZB1P they are level. In DualPipe
# follow one microbatch down and another one up, and see where they meet.

# %%
from dsv3_mini.viz.widgets.schedule_player import SchedulePlayer

player = SchedulePlayer()
player.set(name="DualPipe", ranks=8, microbatches=24, costs="100%", share=0.5)
player

# %%
seen = {}
for name in player.facts["names"]:
    for costs in ("0%", "100%"):
        player.set(name=name, ranks=8, microbatches=24, costs=costs)
        seen[name, costs] = player.timeline
assert player.figure() is not None and len({timeline.span for timeline in seen.values()}) > 6
print("8 ranks, 24 microbatches   step without messages   with them   idle with them    kept")
for name in player.facts["names"]:
    free, paid = seen[name, "0%"], seen[name, "100%"]
    kept = max(paid.schedule.peak_activations) * 8 / paid.schedule.n_stages  # in shares of a rank
    print(f"{name:27}{free.span:21.1f}{paid.span:12.1f}{paid.bubble_share:17.0%}{kept:8.1f}")

# %% [markdown]
# Without messages DualPipe is hardly better than ZB1P. With them the two that have pairs need a quarter less time than
# anybody else, or less than that. (DualPipeV keeps 17 activations, Table 2's $PP + 1$, of stages half as large.)
# `player.save_html("player.html")` writes the player into one file that plays without Python.
#
# ## Experiment 2: is Table 2 right?
#
# The simulator knows nothing of Table 2. It lets every slot start when it can, and no more.
#
# **What we expect.** The table's bubbles, to the last digit, for every size and for any costs with $F = I$, $W \le F$ and
# a pair that takes no less than its backward and no more than both. If F&B hid nothing, DualPipe would still have to
# idle for exactly $(PP/2 - 1)(F\&B + B - 3W)$. And beyond these conditions? With $W > F$ the formula of ZB1P can fall below
# zero, so there it must be wrong.

# %%
import random
from fractions import Fraction

from dsv3_mini.parallel.schedules import bubble_formula

dice = random.Random(20)


def any_costs() -> PhaseCosts:
    """Times as fractions, so that sums are exact: F = I, W no longer, F&B between B and F + B."""
    forward = Fraction(dice.randint(1, 60), 60)
    weight = forward * Fraction(dice.randint(0, 60), 60)
    return PhaseCosts(forward, forward, weight, 2 * forward + weight - forward * Fraction(dice.randint(0, 60), 60))


# %%
names = ("GPipe", "1F1B", "interleaved", "ZB1P", "DualPipeV", "DualPipe")
trials = {name: 0 for name in names}
for _ in range(40):
    for name in names:
        ranks = 2 * dice.randint(1, 4)
        schedule, costs = make_schedule(name, ranks, ranks * dice.randint(2, 4)), any_costs()
        trials[name] += simulate(schedule, costs).bubble == bubble_formula(schedule, costs)
print("trials of 40 in which simulation and formula are equal:", trials)
assert set(trials.values()) == {40}

# %%
for pp in (8, 16):
    bubbles = {simulate(make_schedule("DualPipe", pp, m)).bubble for m in (2 * pp, 3 * pp, 6 * pp)}
    bubbles |= {simulate(make_schedule("DualPipeV", pp // 2, m)).bubble for m in (pp, 2 * pp, 5 * pp)}
    print(f"PP = {pp}, F = I = W = 1: the bubbles of three sizes of DualPipe, three of DualPipeV are {bubbles}")
long_weights = PhaseCosts(forward=1, input=1, weight=3)
real = simulate(zb1p(8, 24), long_weights).bubble
print(f"ZB1P with W = 3F: {real} by simulation, {bubble_formula(zb1p(8, 24), long_weights)} by the formula")

# %% [markdown]
# The table holds, whatever the number of microbatches, and it holds only where W is short. Now its other two columns,
# and the share of a step that is idle when microbatches get more.

# %%
print(f"{'PP = 16':10} {'stages on a rank':>17} {'activations kept':>17}")
for name, ranks in (("1F1B", 16), ("ZB1P", 16), ("DualPipeV", 8), ("DualPipe", 16)):
    schedule = make_schedule(name, ranks, 48)
    print(f"{name:10} {len(schedule.stages_on(0)):17} {max(schedule.peak_activations):17}")

# %%
from dsv3_mini.viz.figures.schedule import shares_figure


def idle_share(name: str, microbatches: int) -> float:
    """Of eight ranks' time, with messages as long as arithmetic."""
    schedule = make_schedule(name, 8, microbatches)
    return simulate(schedule, stage_costs(schedule, as_reported)).bubble_share


counts = (16, 24, 32, 48, 64, 96)
shares = {name: {m: idle_share(name, m) for m in counts} for name in ("1F1B", "interleaved", "ZB1P", "DualPipe")}
assert all(list(row.values()) == sorted(row.values(), reverse=True) for row in shares.values())
shares_figure(shares, "More microbatches: the same bubble, a smaller share")

# %% [markdown]
# ## Experiment 3: how much can be hidden?
#
# Let messages take longer and longer: no time, half of the arithmetic, as long, twice as long.
#
# **What we expect.** 1F1B hides nothing, so its step grows with the messages from the start. A pair has three units of
# arithmetic (F, I, W) over two units of messages times their share: up to a share of 1.5 they could all disappear, if the
# order of Figure 4 is a good one. What cannot be hidden are messages at the two ends of a step, where there are no pairs.

# %%
print("messages | F&B  | step of 1F1B | of DualPipe")
steps = {}
for share in (0.0, 0.5, 1.0, 1.5, 2.0):
    costs = costs_of(share)
    steps[share] = [simulate(make_schedule(name, 8, 48), costs).span for name in ("1F1B", "DualPipe")]
    print(f"{share:8} | {costs.both:.2f} | {steps[share][0]:12.1f} | {steps[share][1]:11.1f}")
growth = [steps[1.0][i] / steps[0.0][i] for i in (0, 1)]
print(f"messages as long as arithmetic make the step longer by {growth[0] - 1:.0%} and by {growth[1] - 1:.0%}")
assert growth[0] > 1.5 and growth[1] < 1.2 and costs_of(1.5).both < 1.05 * costs_of(0.0).both

# %% [markdown]
# Up to 1.5 the pair stays as long as its arithmetic, nearly; at 2 the network is what one waits for, and no order
# helps. So the limit to four nodes of lesson 10 and DualPipe belong together: the first makes messages short enough for
# the second to hide.
#
# ## Torch has them, too
#
# You need not write your own: torch has schedules, DualPipeV among them though not the two-directional DualPipe, and runs
# them on real ranks. `dsv3_mini.parallel.stages` cuts the model into stages for them; its tests let two and four
# processes take the steps of one. The package also reads them into its own form, so that all questions can be asked of
# them as well. Four of them are ours to the slot.

# %%
from dsv3_mini.parallel.schedules.from_torch import TORCH_SCHEDULES, from_torch

ours = {"GPipe": "GPipe", "1F1B": "1F1B", "Interleaved1F1B": "interleaved", "DualPipeV": "DualPipeV"}
print("8 ranks, 24 microbatches     stages  bubble   kept (in shares of a rank)")
for name in TORCH_SCHEDULES:
    theirs = from_torch(name, 8, 24)
    check_schedule(theirs)
    part_of_rank = 8 / theirs.n_stages
    bubble = simulate(theirs, stage_costs(theirs, unit)).bubble
    equal = name in ours and make_schedule(ours[name], 8, 24).lines() == theirs.lines()
    kept = max(theirs.peak_activations) * part_of_rank
    print(
        f"torch {name:23}{theirs.n_stages:6}{bubble:8.1f}{kept:7.1f}   {'ours to the slot' if equal else ''}".rstrip()
    )

# %% [markdown]
# The two whose names say it come close to no bubble, a sixth of 1F1B's, and keep no more than it does: they join smaller
# stages and backwards cut in two. But they have no pairs, and hide no message.
#
# ## Find the bug
#
# To let W wait, a rank has to remember what W will need. Here is a linear layer that does I at once and puts a little
# function in a queue for W. With one microbatch its gradients are autograd's. It was put on a pipeline, nothing failed,
# and the model learnt badly.


# %%
def split_backward_with_a_bug(weight: Tensor, inputs: list[Tensor], grads: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The inputs' gradients, one for each microbatch, and the weight's, which comes last."""
    input_grads, later = [], []
    for x, grad in zip(inputs, grads, strict=True):
        input_grads.append(einsum(grad, weight, "T f, f d -> T d"))
        later.append(lambda: einsum(grad, x, "T f, T d -> f d"))  # noqa: B023
    return input_grads, sum(run() for run in later)


for n in (1, 2, 8):
    xs, grads = torch.randn(n, 6, 4), torch.randn(n, 6, 3)
    right = einsum(grads, xs, "n T f, n T d -> f d")
    _, got = split_backward_with_a_bug(weight, list(xs), list(grads))
    print(f"{n} microbatches: the weight's gradient is off by {(got - right).norm() / right.norm():.0%}")

# %% [markdown] tags=["bug"]
# ### Find the bug · Eight times the last one
# ●○○ · 8 minutes
#
# Mend it. `inputs` and `output_grads` have a tensor for each microbatch, `[T d]` and `[T f]`, and `weight` is `[f d]`.
# Return the list of the inputs' gradients, `[T d]` each, and the weight's gradient `[f d]`, summed over the microbatches.
#
# <details><summary>Hint 1</summary>Print <code>x[0, 0]</code> inside the lambda. How often does it change while the queue
# is emptied?</details>
# <details><summary>Hint 2</summary>A function looks its names up when it <em>runs</em>. By then the loop is over. Put the
# tensors themselves into the queue, or bind them where the function is made: <code>lambda grad=grad, x=x: ...</code>,
# <code>functools.partial</code>.</details>


# %%
def split_backward(
    weight: Float[Tensor, "f d"], inputs: list[Tensor], output_grads: list[Tensor]
) -> tuple[list[Tensor], Float[Tensor, "f d"]]:
    """The inputs' gradients, one for each microbatch, and the weight's, summed over the microbatches."""
    ### BEGIN SOLUTION: each I at once, each pair of tensors in a queue; then the sum of the W
    input_grads, later = [], []
    for x, grad in zip(inputs, output_grads, strict=True):
        input_grads.append(einsum(grad, weight, "T f, f d -> T d"))
        later.append((grad, x))
    return input_grads, sum(einsum(grad, x, "T f, T d -> f d") for grad, x in later)
    ### END SOLUTION


# %%
check.split_backward(split_backward)

# %% [markdown] tags=["at-671b"]
# ## At 671B
#
# 2,048 GPUs, 16 ranks in a pipeline: 128 pipelines side by side. At its largest a batch has 15,360 sequences. The report
# does not say how large a microbatch is; we take one sequence, the smallest, so that each pipeline has 120 of them.

# %%
from dsv3_mini import ModelConfig
from dsv3_mini.ledger import count_parameters

large = ModelConfig.preset("671b")
pp, gpus, sequences, sequence = 16, 2048, 15_360, 4096
microbatches = sequences // (gpus // pp)
at_scale = {}
for name in ("1F1B", "ZB1P", "DualPipe"):
    at_scale[name] = simulate(make_schedule(name, pp, microbatches), as_reported)
    print(f"{name:9}{microbatches} microbatches: {at_scale[name].bubble_share:5.1%} idle", end=", ")
    print(f"step {at_scale[name].span / at_scale['1F1B'].span:.0%} of 1F1B's")

# %% [markdown]
# With so many microbatches the bubble is small under any schedule. What DualPipe saves is the waiting for messages. At
# the report's price of pre-training that is:

# %%
from dsv3_mini.ledger import REPORT_RUN

hours = REPORT_RUN.pre_training_hours
for name in ("1F1B", "ZB1P"):
    longer = hours * at_scale[name].span / at_scale["DualPipe"].span
    print(f"with {name}: {longer / 1e6:.1f} million GPU hours in place of {hours / 1e6:.1f}")

# %% [markdown]
# If only pairs hid messages, that is: a real 1F1B would hide a part of them inside a layer. Take it as what is at stake.
#
# And what does it cost? Two stages a rank, so twice the weights; but nearly all weights are experts, and those are
# spread over 64 GPUs anyway. And one activation more than 1F1B. Of each, the least that must be kept is what its four
# layers were given, if all the rest is computed anew.

# %%
parameters = count_parameters(large)
experts = parameters.moe_layers * large.n_routed_experts * parameters.expert.trainable
on_a_gpu = experts / pp / 64
print(f"routed experts: {experts / parameters.main_trainable:.0%} of all; of one stage {on_a_gpu / 1e6:.0f}M on a GPU")
print(f"a second stage of them: {on_a_gpu / 1e9:.2f} GB more in FP8, {2 * on_a_gpu / 1e9:.2f} GB in BF16")
one = large.num_hidden_layers / pp * sequence * large.hidden_size * 2  # BF16
print(
    f"an activation: at least {one / 1e6:.0f} MB; 1F1B {pp * one / 1e9:.1f} GB, DualPipe {(pp + 1) * one / 1e9:.1f} GB"
)
print(f"GPipe: {microbatches * one / 1e9:.0f} GB")

# %% [markdown]
# The last line is why nobody runs GPipe at this size. There is one more reason for two directions, or for a V: the first
# stage and the last lie on one rank. So the embedding and the output head are together there, and the MTP module, which
# needs both (lesson 11), shares them without sending anything (section 3.2.3).

# %% [markdown] tags=["recap"]
# ## Recap
#
# 1. You double the number of microbatches. What happens to the bubble, to its share of the step, and to what 1F1B keeps?
#    <details><summary>Answer</summary>The bubble stays as long as it was. The step is nearly twice as long, so its share
#    nearly halves. 1F1B keeps what it kept, PP on its first rank; GPipe keeps twice as much.</details>
# 2. Why may W wait and I not, and what is the price of waiting?
#    <details><summary>Answer</summary>The rank above needs the gradient of the stage's input, which I makes. The gradients
#    of weights are needed by the optimizer only, after the step. Until W has run, its activation is kept.</details>
# 3. What does DualPipe need two stages on each rank for?
#    <details><summary>Answer</summary>For pairs: a forward at one of them and a backward at the other are ready at the same
#    time, belong to different microbatches, and hide each other's messages behind arithmetic.</details>

# %% [markdown] tags=["next"]
# ## Next
#
# You know what each rank does and when. Lesson 21 puts the parts together: which rank of 2,048 holds what, how many bytes
# cross which wire, and what the whole of it costs.
