# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   dsv3:
#     title: The cluster
#     minutes: 85
#     after: [19_expert_parallel, 20_dualpipe]
#     builds: the memory of a GPU, seconds on the wires, hours and dollars, and a machine of your own
#     tracks: [term]
# ---

# %% [markdown] tags=["why"]
# # 21 · The cluster
#
# 2,048 GPUs for two months: nobody tries that out. Before the first GPU is rented, somebody has to know that the model
# fits, which wire will be the slowest, and what it will cost. All of that can be worked out on a laptop, and in this
# lesson you do it: first with formulas that fit on the back of an envelope, then with a **dry run**, which goes through
# the real training step of every kind of rank, on tensors that have a shape and no memory.
#
# At the end you plan a machine of your own, and reproduce the most quoted number of the report: 2.788 million GPU
# hours, 5.576 million dollars.
#
# The picture is DeepSeek-V3 on clusters from 8 to 16,384 GPUs. On the left, what the fullest GPU would have to hold. On
# the right, the most that can come of the GPUs' arithmetic. **MFU**, model FLOPs utilisation, is the share of the FLOPs
# that the GPUs could do in BF16 which the model really needs. Each measured bar is a dry run that was recorded; we shall
# run one of them again.

# %%
from dsv3_mini.course.cluster import recorded
from dsv3_mini.parallel.dry_run import Machine
from dsv3_mini.viz.figures.cluster import scaling_figure

paper, h800 = recorded(), Machine()
scaling_figure(paper["scaling"], h800)

# %% [markdown] tags=["paper"]
# ## In the report
#
# Section 3.1 to 3.3 for the machine, Table 1 for the bill.
#
# | | | the name here |
# |---|---|---|
# | GPUs | 2,048 H800, 8 in a **node** | `gpus` |
# | pipeline | 16 ranks, two stages on each (lesson 20) | `pp` |
# | data parallel | 128 GPUs run the same stages, each on its own sequences | `data` = `gpus / pp` |
# | experts | a layer's 256 lie on 64 GPUs of 8 nodes (lesson 19) | `ep` |
# | optimizer | its state is shared by those that hold the same parameters, ZeRO-1 (lesson 18) | |
# | wires | NVLink in a node, 160 GB/s; InfiniBand between nodes, 50 GB/s a GPU | |
# | precision | products in FP8; master weights and gradients FP32; Adam's two moments BF16 | |
#
# A **rank** of the pipeline is 128 GPUs here, all with the same layers. The bill:
#
# | | pre-training | context extension | post-training | in all |
# |---|---|---|---|---|
# | thousand GPU hours | 2,664 | 119 | 5 | 2,788 |
# | million dollars, at $2 an hour | 5.328 | 0.238 | 0.01 | 5.576 |

# %% [markdown] tags=["naive"]
# ## The naive way
#
# Share out everything evenly. Each GPU keeps one part in 2,048 of all weights, gradients and moments, and what it needs
# for a layer it gathers from the others: that is ZeRO-3 (lesson 18). Does it fit?

# %%
from dsv3_mini import ModelConfig
from dsv3_mini.ledger import count_parameters, flops_per_token, training_state

large = ModelConfig.preset("671b")
state = training_state(large, weights="bf16", moments="bf16")
print(f"weights, gradients, moments: {state.total / 1e12:.2f} TB, {state.per_parameter:.1f} bytes a parameter")
print(f"on one of 2,048 GPUs: {state.total / 2048 / 1e9:.1f} GB of 80")

# %% [markdown]
# It fits, with ease. Now the wires. In each pass, forward and backward, all weights have to come by, in BF16, through the
# GPU's own NVLink. The arithmetic for a sequence of 4,096 tokens, meanwhile, takes

# %%
weights = 2 * state.parameters  # bytes in BF16
seconds = {
    "arithmetic of one sequence": 4096 * flops_per_token(large).train / h800.bf16,
    "its weights over NVLink, twice": 2 * weights / h800.nvlink,
}
for name, value in seconds.items():
    print(f"{name:32}{value:6.1f} s")

# %% [markdown]
# The GPU would wait sixteen times as long as it works. (With larger micro-batches it would wait less, and lack the memory
# for them.) Weights are too heavy to travel, so they stay where they are, and the tokens come to them: from stage to
# stage, and from expert to expert. What has to be counted now is what *stays*.

# %%
from dsv3_mini.course.checks import lesson_21 as check
from dsv3_mini.course.lesson import same, show_source

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · What one GPU holds
# ●●○ · 12 minutes
#
# There are two kinds of parameters: `experts`, all routed experts of all layers together, and `others`, all the rest.
# Both are spread over `pp` pipeline ranks (take it as even). Within a rank there are `data` GPUs. All of them hold the
# rank's others, whole. Of the rank's experts each GPU holds one part in `ep`, so that an expert lies on `data / ep` GPUs.
#
# - For each parameter that a GPU *holds*: 2 bytes of weight (BF16) and 4 of gradient (FP32).
# - Its master copy (FP32) and Adam's two moments (BF16) are 8 bytes, *shared* evenly by all GPUs that hold it.
#
# How many bytes is that on a GPU?
#
# <details><summary>Hint 1</summary>A GPU holds <code>others / pp + experts / (pp * ep)</code> parameters.</details>
# <details><summary>Hint 2</summary>Of the others' optimizer it has one part in <code>data</code>. An expert is held by
# <code>data / ep</code> GPUs only: of the optimizer of its own experts a GPU has one part in <code>data / ep</code>. Write
# both out, and something cancels.</details>


# %%
def state_bytes(others: int, experts: int, pp: int, ep: int, data: int) -> float:
    """Bytes of weights, gradients and optimizer on one GPU, with ZeRO-1."""
    ### BEGIN SOLUTION: 6 bytes of each parameter held; 8 of each, divided by the GPUs that hold it
    held = others / pp + experts / (pp * ep)
    optimizer = others / pp / data + experts / (pp * ep) / (data / ep)
    return 6 * held + 8 * optimizer
    ### END SOLUTION


# %%
check.state_bytes(state_bytes)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Seconds on the wires
# ●●○ · 12 minutes
#
# A micro-batch of `tokens` tokens is sent to its experts, on `nodes` nodes of `gpus` GPUs each. A copy of a token is `row`
# bytes. In the mean a token has experts on `nodes_reached` nodes, and there on `gpus_reached` GPUs, counted over all
# nodes. How long does the exchange take?
#
# - A copy goes once to each node over the network, 50e9 bytes a second. One node in `nodes` is the token's own.
# - On the node it is handed on over NVLink, 160e9 bytes a second. It arrived on a GPU of that node, and one expert's GPU
#   in `gpus` is that one.
# - Both wires work at one time.
#
# <details><summary>Hint 1</summary>Over the network go <code>tokens * nodes_reached * (1 - 1 / nodes)</code> copies.
# </details>
# <details><summary>Hint 2</summary>The same for <code>gpus_reached</code> and <code>gpus</code>, on the other wire. The
# exchange is over when the slower wire is done.</details>


# %%
def wire_seconds(tokens: int, row: int, nodes_reached: float, gpus_reached: float, nodes: int, gpus: int) -> float:
    """Seconds in which all copies of a micro-batch have left a GPU."""
    ### BEGIN SOLUTION: bytes that leave over each wire by its speed; the longer of the two
    network = tokens * row * nodes_reached * (1 - 1 / nodes) / 50e9
    inside = tokens * row * gpus_reached * (1 - 1 / gpus) / 160e9
    return max(network, inside)
    ### END SOLUTION


# %%
check.wire_seconds(wire_seconds)

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · The bill
# ●○○ · 6 minutes
#
# A step trains on `batch_tokens` tokens and takes `step_seconds` on `gpus` GPUs. `tokens` are to be read in all, and a GPU
# costs `dollars` an hour. Give the GPU hours and the price.
#
# <details><summary>Hint</summary>How many steps? How many seconds is that? Every GPU is paid for during each of them, and
# an hour has 3,600.</details>


# %%
def run_cost(step_seconds: float, batch_tokens: int, gpus: int, tokens: int, dollars: float) -> tuple[float, float]:
    """(GPU hours, dollars) of reading `tokens` tokens."""
    ### BEGIN SOLUTION: steps x seconds x GPUs / 3600, and that times the price
    hours = tokens / batch_tokens * step_seconds * gpus / 3600
    return hours, hours * dollars
    ### END SOLUTION


# %%
check.run_cost(run_cost)

# %% [markdown] tags=["package"]
# ## The package's own
#
# The first formula is the package's `least_state`: before it measures a layout it asks whether there is any sense in it.
# The second is a part of a `sketch`, a whole layout by arithmetic alone. `reached` counts the nodes and GPUs of a token.

# %%
from dsv3_mini.ledger import training_cost
from dsv3_mini.parallel.dry_run.sketch import lay_out, reached, sketch
from dsv3_mini.parallel.dry_run.sweep import least_state

show_source(least_state, sketch)

# %%
counted = count_parameters(large)
moe_layers = counted.moe_layers + counted.mtp_modules
experts = moe_layers * large.n_routed_experts * counted.expert.trainable
others = counted.live_trainable - experts
print(f"routed experts {experts / 1e9:.1f}B, all the rest {others / 1e9:.1f}B")
print("nodes and GPUs that a token reaches, with 64 GPUs:", *(f"{x:.2f}" for x in reached(large, 64)))


# %%
def state_by_package(others: int, experts: int, pp: int, ep: int, data: int) -> float:
    return float(least_state(large, lay_out(large, pp * data, pp, ep)))


def seconds_by_package(tokens: int, row: int, *reach: float) -> float:
    plan = lay_out(large, 2048, 16, 64)
    whole = sketch(large, plan, paper["kept"]["671b"], length=tokens).travel
    return whole / (4 * moe_layers / plan.pp)  # one exchange of one layer


def cost_by_package(step: float, batch: int, gpus: int, tokens: int, dollars: float) -> tuple[float, float]:
    cost = training_cost(1e12 / batch * step * gpus / 3600, tokens=tokens, gpus=gpus, dollars_per_hour=dollars)
    return cost.gpu_hours, cost.dollars


# %%
same(state_bytes, state_by_package, (others, experts, 16, 64, 128), (others, experts, 8, 8, 8))
same(wire_seconds, seconds_by_package, (4096, 2 * large.hidden_size, *reached(large, 64), 8, 8))
same(run_cost, cost_by_package, (19.9, 15360 * 4096, 2048, 148 * 10**11, 2.0), (99.2, 6291456, 256, 10**12, 1.5))

# %% [markdown]
# ## The dry run
#
# Formulas have to know what counts. A dry run does not: it is the package's own training step, with torch's own FSDP,
# autograd and optimizer, on the **meta** device, where a tensor has a shape and a type and no numbers. The processes are
# torch's fake ones: this process is told that it is rank 512 of 2,048, and what it hands to the others is counted and
# thrown away. Three micro-batches are run for each kind of stage; the schedule of lesson 20 says how many are in flight.
#
# All 671 billion parameters, on this machine. It takes some ten seconds.

# %%
from dsv3_mini.course.cluster import report_run

run = report_run()
plan, full = run.job.plan, run.fullest
print(f"{plan.processes:,} GPUs: pp {plan.pp}, data {plan.data}, ep {plan.ep} on {plan.ep_nodes} nodes")
print(f"{run.job.batch:,} sequences: {run.job.microbatches} micro-batches for each pipeline")
print(f"parameters over all ranks: {run.parameters:,}; equal to the ledger: {run.parameters == counted.live_trainable}")
print(f"fullest GPU: {full.peak / 1e9:.1f} GB of 80")

# %%
from dsv3_mini.viz.figures.cluster import memory_figure

memory_figure(run.ranks, h800)

# %% [markdown]
# The yellow part is the surprise. Weights and optimizer are the smaller half of it. What fills a GPU are the activations
# of the micro-batches that are on their way, although norms and up-projections are computed anew. In lesson 20 you saw
# that a deeper pipeline has more of them in flight; each one is of fewer layers, so a GPU always holds those of about
# *one* whole micro-batch of the whole model, whatever `pp` is.
#
# Rank 0 has the first stage and the last, with the embedding, the head and multi-token prediction. It holds *less* than
# the others: fewer of its micro-batches are in flight, since the last stage can begin its backward at once.
#
# ## Experiment 1: is the envelope good enough?

# %% [markdown] tags=["experiment"]
# A sketch takes your formula for the state, and one measured number for what a micro-batch leaves behind, the same for
# every size of cluster. **What we expect.** Activations do not hang on the number of GPUs, so the sketch should follow the
# dry runs to within a tenth, over a factor of 64 in GPUs. It fails if what is received from other GPUs' tokens, or a rank
# that differs from the mean, is more than that.

# %%
print("  GPUs   sketch   dry run (GB)   off by")
worst = 0.0
for row in paper["scaling"]:
    if row.measured:
        on_envelope = sketch(large, lay_out(large, row.gpus, row.pp, row.ep), paper["kept"]["671b"])
        off = on_envelope.peak / row.peak - 1
        worst = max(worst, abs(off))
        print(f"{row.gpus:6,}{on_envelope.peak / 1e9:9.1f}{row.peak / 1e9:10.1f}{off:13.0%}")
print("within a tenth:", worst < 0.1)

# %% [markdown]
# So memory can be planned on an envelope. The largest miss is where `ep` is smallest: with many experts on a GPU the pass
# that runs needs more than where it was measured. Is time as simple? Let us ask what the step is made of. A **roofline** takes
# every product at the GPU's full rate, every byte at the wire's, and lets the schedule do the rest. Nothing is ever late.
# No real run is as good: the roofline is a bound.
#
# ## Experiment 2: what breaks?

# %% [markdown]
# **What we expect.** Few GPUs lack memory. Many GPUs must share the batch, so that each pipeline gets too few micro-batches
# to fill it. In between the tokens' way to 64 GPUs should be what costs most: the report gave 20 of 132 SMs to it.
#
# The table says how much of the step's time is lost, and to what. *Wires*: how much shorter it were if bytes took no
# time. *Uneven*: waiting for the rank with the most to do. *Bubble*: what ranks would idle even if all were alike.

# %%
print("  GPUs  pp  ep micro-batches    GB   MFU wires uneven bubble")
for row in paper["scaling"]:
    print(f"{row.gpus:6,}{row.pp:4}{row.ep:4}{row.microbatches:14,}{row.peak / 1e9:6,.0f}", end="")
    lost = (row.mfu, row.wires, row.uneven, row.bubble)
    print("".join(f"{share:6.0%}" for share in lost) if row.measured else "   does not fit, by its state alone")

# %%
for row in paper["scaling"]:
    print(f"{row.gpus:6,}: {row.limit}")

# %% [markdown]
# Memory and batch break where we expected it. From 1,024 GPUs on traffic is named as well. But up to 4,096 GPUs the largest
# loss is another, and we did not expect it: *uneven*. Somebody has twice as much to do as the others. Who? Seconds of each stage for one micro-batch, forward
# and backward, with free wires:

# %%
from dsv3_mini.parallel.dry_run import Estimate
from dsv3_mini.parallel.dry_run.scaling import row_of

estimate = Estimate(run, Machine(nvlink=1e30, ib=1e30), fused=True)
for stage in (0, 1, 2, 15, 30, 31):
    costs, layers = estimate.stages[stage].costs, run.stages[stage].layers
    print(f"stage {stage:2}: {layers} layers, {1e3 * (costs.forward + costs.backward):5.1f} ms")
again = row_of(run, h800)
print("the recorded row, run anew, is the same:", again in paper["scaling"])

# %% [markdown]
# Stage 31, on rank 0. It has one layer of the model, the layer of multi-token prediction, and the output head, *twice*: for
# the next token and for the one after it. The head is 7,168 times 129,280, it stays in BF16 (lesson 16), and each pass
# through it costs as much as two layers. Our split counts layers, and not the head. The report does not say how it split; a
# line of arithmetic says that it matters:

# %%
head = 2 * 3 * 2 * 4096 * counted.head.trainable  # two passes, forward and backward, FLOPs
layer = 3 * 2 * 4096 * counted.moe_layer.activated
print(
    f"the head, twice: {1e3 * head / h800.bf16:.0f} ms in BF16; a layer's products: {1e3 * layer / h800.fp8:.0f} ms in FP8"
)
print(f"so the head weighs as much as {head / h800.bf16 / (layer / h800.fp8):.0f} layers of {large.num_hidden_layers}")

# %% [markdown]
# ## Experiment 3: is the report's layout the best one?
#
# **What we expect.** The report's authors chose 16 and 64. On the same 2,048 GPUs a search over layouts should find no
# other that fits and is faster; else either they, or our roofline, have overlooked something.

# %%
print(" pp  ep    GB  fits   thousand h / T tokens")
measured = [row for row in paper["layouts"] if "seconds" in row]
for row in measured:
    mark = "   the report's" if (row["pp"], row["ep"]) == (16, 64) else ""
    fits = "yes" if row["fits"] else "no"
    print(
        f"{row['pp']:3}{row['ep']:4}{row['peak_bytes'] / 1e9:6.0f}{fits:>6}{row['hours_per_trillion'] / 1e3:14.0f}{mark}"
    )
fitting = [row for row in measured if row["fits"]]
print(f"{len(measured)} layouts measured, {len(fitting)} fit")

# %% [markdown]
# The report's layout is the only one that fits. It is also the slowest of them, if only time counts: with fewer and longer
# pipeline ranks the head weighs less, and with experts on fewer GPUs tokens travel less far. All of that would need GPUs
# with more memory. So memory chose this layout, and it has hardly any to spare. (A roofline knows only what it is told:
# it leaves out what is late, and a search among ten layouts is no proof.)
#
# ## A machine of your own

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · Choose a layout
# ●●○ · 15 minutes
#
# Now the search. A model has `layers` layers with `experts` experts in each, and there are `gpus` GPUs. `fits(pp, ep)`
# says whether a layout has room in memory. A layout must obey three rules:
#
# - `pp` divides `gpus`;
# - above `pp = 1` each rank has two stages with a layer or more, so `2 * pp` is at most `layers`;
# - `ep` divides `experts`, and the `gpus // pp` GPUs of a rank.
#
# Of those that fit, return `(pp, ep)` with the smallest `ep`, so that few wires carry a token; of these the smallest `pp`,
# for a short bubble. Return `None` if nothing fits. Numbers need not be powers of two.
#
# <details><summary>Hint 1</summary>Two loops, over <code>ep</code> outside and over <code>pp</code> inside, both upwards:
# the first layout that obeys the rules and fits is the one.</details>
# <details><summary>Hint 2</summary><code>ep</code> runs from 1 to <code>experts</code>, <code>pp</code> from 1 to
# <code>layers</code>.</details>


# %%
from collections.abc import Callable


def choose_layout(gpus: int, layers: int, experts: int, fits: Callable[[int, int], bool]) -> tuple[int, int] | None:
    """(pp, ep) of the layout that fits with the smallest ep, and of these the smallest pp; None if none fits."""
    ### BEGIN SOLUTION: loop over ep, then pp; return the first that obeys the rules and fits
    for ep in range(1, experts + 1):
        for pp in range(1, max(1, layers // 2) + 1):
            lawful = gpus % pp == 0 and experts % ep == 0 and (gpus // pp) % ep == 0
            if lawful and fits(pp, ep):
                return pp, ep
    return None
    ### END SOLUTION


# %%
check.choose_layout(choose_layout)

# %% [markdown] tags=["interactive"]
# ### The planner
#
# A whole layout on an envelope: memory, time, batch. Begin with 256 GPUs, for which nothing of 80 GB is enough. What helps:
# more memory, deeper pipelines, wider experts, or only more GPUs? Then take the 16B model and a single node of eight.
# Wires may take as long as arithmetic, for DualPipe hides them behind it; when they take longer, they are what one waits
# for.

# %%
from dsv3_mini.viz.widgets.cluster import Planner

planner = Planner(paper["kept"])
planner

# %%
tried = {}
for name, moves in {
    "256 GPUs of 80 GB": {},
    "of 141 GB": {"memory": 141},
    "2,048 of 80 GB, ep 64": {"memory": 80, "gpus": 2048, "ep": 64},
    "16B on one node": {"model": "16b", "gpus": 8, "pp": 1, "ep": 8},
}.items():
    planner.set(**moves)
    tried[name] = planner.sketch.room
    print(f"{name:26}{planner.sketch.peak / 1e9:7.1f} GB: {'fits' if planner.sketch.room > 0 else 'does not fit'}")
assert tried["256 GPUs of 80 GB"] < 0 < min(list(tried.values())[1:])
planner.set(model="671b", gpus=256, pp=16, ep=16)  # your turn

# %% [markdown]
# And the bill, with the report's run to begin with. Context extension and post-training were measured by the report; at
# another speed they are taken to change in proportion.

# %%
from dsv3_mini.viz.widgets.cluster import bill, bill_explorer

slider = bill_explorer()
slider

# %%
before = slider.picture.value
slider.set(dollars=3.0)
assert slider.picture.value != before
slider.set(dollars=2.0)
stages = bill(tokens=14_800_000_000_000, gpus=2048, hours_per_trillion=180_000, dollars=2.0)
for name, cost in stages.items():
    print(f"{name:18}{cost.gpu_hours / 1e3:8,.0f}K h{cost.dollars / 1e6:8.3f}M $")
hours = sum(cost.gpu_hours for cost in stages.values())
assert (round(hours), round(2 * hours)) == (2_788_000, 5_576_000)
print(f"{'in all':18}{hours / 1e3:8,.0f}K h{2 * hours / 1e6:8.3f}M $")

# %% [markdown]
# What is *not* in it, the report says itself: earlier research, and runs for trying things out. Nor staff, nor the price of
# owning a cluster in the months when it does something else.
#
# ## Find the bug
#
# How good was the run? MFU says it: the FLOPs that the model needs, of those that the GPUs could have done. A colleague
# computes it from the report's 180,000 GPU hours for a trillion tokens. The GPUs seem to be better than their maker says.


# %%
def mfu_with_a_bug(hours: float, total: int, activated: int, attention: float, peak: float) -> float:
    """MFU of a run that takes `hours` GPU hours for 10^12 tokens."""
    flops = 6 * total * 10**12
    return flops / (hours * 3600 * peak)


flops = flops_per_token(large, 4096)
measured_run = (180_000, counted.main, counted.activated_without_embedding, flops.train_attention, h800.bf16)
print(f"MFU {mfu_with_a_bug(*measured_run):.0%}")

# %% [markdown] tags=["bug"]
# ### Find the bug · Six times as fast as itself
# ●○○ · 6 minutes
#
# Mend it. `total` are all parameters, `activated` those that one token is multiplied with, `attention` the FLOPs of
# attention for one token, forward and backward, and `peak` is FLOPs a second of one GPU. Return the share.
#
# <details><summary>Hint 1</summary>For how many of its 256 experts does a token stand in a layer?</details>
# <details><summary>Hint 2</summary>6 FLOPs for each <em>activated</em> parameter, and <code>attention</code> besides: its
# products are of activations with activations, so that no parameter stands for them.</details>


# %%
def mfu(hours: float, total: int, activated: int, attention: float, peak: float) -> float:
    """MFU of a run that takes `hours` GPU hours for 10^12 tokens, as a share."""
    ### BEGIN SOLUTION: 6 x activated + attention for each token, over what a GPU could do in those hours
    flops = (6 * activated + attention) * 10**12
    return flops / (hours * 3600 * peak)
    ### END SOLUTION


# %%
check.mfu(mfu)

# %% [markdown] tags=["at-671b"]
# ## At 671B
#
# All of this lesson is at 671B. What is left is to put the two ends together: our bound, and what was measured.

# %%
from dsv3_mini.ledger import REPORT_RUN, sustained_flops

bound = Estimate(run, h800, fused=True)
reached_rate = sustained_flops(flops.train, REPORT_RUN.hours_per_trillion)
steps = REPORT_RUN.tokens / run.job.tokens
print(f"the report: {REPORT_RUN.hours_per_trillion:,} GPU hours per trillion, MFU {reached_rate / h800.bf16:.1%}")
print(f"the roofline of our layout: {bound.hours_per_trillion:,.0f}, MFU {bound.mfu:.1%}")
unfused = Estimate(run, h800, fused=False)
print(f"and of our code pass by pass: {unfused.hours_per_trillion:,.0f}, MFU {unfused.mfu:.1%}")
print(
    f"{REPORT_RUN.pre_training_hours / 2048 / 24:.1f} days of pre-training, some {steps / 1e3:,.0f} thousand steps of this size"
)

# %% [markdown]
# The report lies between the two, nearer to the bound. Its kernels are fused, its messages hidden; ours leave every
# normalisation, every rounding to FP8 and every sum as a pass of its own over memory, which is easy to read and slow.
# `dsv3 dry-run` prints all of this for any model and any layout, and `--sweep` and `--scaling` make the two tables.
#
# And what crosses the wires? In one step, and in the whole of pre-training, over all GPUs:

# %%
from dsv3_mini.parallel.dry_run import step_wires

for kind, wires in step_wires(run, full.rank, 8).items():
    if wires.inside + wires.network > 1e9:
        total = 2048 * steps * wires.network / 1e18
        ours = f"NVLink {wires.inside / 1e9:5.1f} GB, InfiniBand {wires.network / 1e9:5.1f} GB a GPU and step"
        print(f"{kind:15}{ours}; {total:6.1f} EB over the network")

# %% [markdown] tags=["recap"]
# ## Recap
#
# 1. You double the pipeline's ranks and keep the number of GPUs. What happens to the weights on a GPU, to the activations,
#    and to the number of micro-batches that a pipeline gets?
#    <details><summary>Answer</summary>A GPU holds half as many layers. Twice as many micro-batches are in flight, each of
#    half as many layers, so that activations stay about the same. There are half as many pipelines, so each gets twice as
#    many micro-batches, and needs twice as many to be full.</details>
# 2. How many GPUs can a batch of 15,360 sequences keep busy, with one sequence in a micro-batch?
#    <details><summary>Answer</summary>Each pipeline needs 2 pp micro-batches, and there are gpus / pp pipelines: 2 gpus
#    sequences, whatever pp is. So 7,680 GPUs.</details>
# 3. Why is MFU counted with activated parameters and not with all?
#    <details><summary>Answer</summary>It asks which of the FLOPs done were needed for the model's result. A token is never
#    multiplied with the experts that it did not choose.</details>

# %% [markdown] tags=["next"]
# ## Next
#
# The model is trained, on paper. Lesson 22 lets it write faster than one token at a time, and lesson 23 puts it before
# people who ask.
