# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   dsv3:
#     title: Serving
#     minutes: 85
#     after: [07_kv_cache, 10_node_limited_routing]
#     builds: replicas of busy experts, their places on GPUs, a queue, and the plan of a service
#     tracks: [term]
# ---

# %% [markdown] tags=["why"]
# # 23 · Serving
#
# A trained model is asked by thousands of people at once. Its experts lie on many GPUs, and in every layer all GPUs wait
# for the one that has the most to do. Balancing (lesson 09) keeps the load even over *all* text. But the people who ask
# tonight may all ask about Python, and then the same few experts are asked again and again.
#
# In this lesson you place experts for the text that really comes: busy ones get more than one place. Then you follow
# requests through a whole service, from their arrival to their last token, and plan one yourself.
#
# Below is a layer of the tiny model that reads Python code. It has 16 experts, and imagine them on eight GPUs. On the
# left they lie in the order of their numbers, two on a GPU. On the right each GPU has room for a third, and busy experts
# fill it.

# %%
import torch

import dsv3_mini as dsv3
from dsv3_mini.data.shipped import shipped
from dsv3_mini.data.stream import held_out_rows
from dsv3_mini.data.tokenizer import Tokenizer

model, tokenizer = dsv3.from_pretrained(shipped("tiny")).eval(), Tokenizer.shipped()


# %%
def batches(domain: str) -> list[torch.Tensor]:
    """Held-out text in full rows of 256 tokens, two rows to a batch."""
    rows = held_out_rows(domain, tokenizer, seq_len=256, rows=16).tokens
    tokens = rows[rows != tokenizer.pad_id]
    return list(tokens[: len(tokens) // 512 * 512].view(-1, 2, 256))


# %%
from dsv3_mini.inference.live_load import LoadWindow
from dsv3_mini.inference.placement import place_experts
from dsv3_mini.viz.figures.serving import placement_figure
from dsv3_mini.viz.widgets.serving import in_order

routings, loads = {}, {}
with torch.no_grad():
    for domain in ("code", "stories", "sums", "prose"):
        routings[domain] = [model(batch).routing for batch in batches(domain)]
        window = LoadWindow(len(routings[domain]))
        for routing in routings[domain]:
            window.add(routing)
        loads[domain] = window.load
layers, e = loads["code"].shape

# %%
both = {"In order": in_order(layers, e, 8), "24 slots": place_experts(loads["code"], 24, 8)}
placement_figure(both, loads["code"], layer=int(loads["code"].amax(dim=1).argmax()))

# %% [markdown] tags=["paper"]
# ## In the report
#
# Section 3.4 describes how DeepSeek-V3 is deployed. Reading a prompt (**prefill**) and writing an answer (**decode**)
# are different work: reading is limited by products, writing by memory (lesson 07). So each has units of its own, and a
# request travels from one to the other together with its cache.
#
# | | prefill unit | decode unit |
# |---|---|---|
# | GPUs | 32, four nodes | 320, forty nodes |
# | attention | split over 4 GPUs, 8 such groups | split over 4 GPUs, 80 such groups |
# | experts | 9 on a GPU: 256, and 32 *redundant* ones | one on a GPU; 64 GPUs for redundant and shared experts |
# | redundancy renewed | about every 10 minutes, from the load in use | |
# | overlap | two micro-batches in turn | |
#
# A **redundant** expert is a second place for an expert that has one already; the places of one expert are its
# **replicas**. All of it is about one quantity, how long the busiest GPU keeps the others waiting. With
# $\ell_i$ for the load of expert $i$, $r_i$ for its replicas, and $S_g$ for the slots (places) of GPU $g$:
#
# $$ \text{time of a layer} \propto \max_g \sum_{i \in S_g} \frac{\ell_i}{r_i} $$
#
# A sum over slots: an expert with two replicas on one GPU counts twice there. What may be chosen is $r$ and $S$.

# %% [markdown] tags=["naive"]
# ## The naive way
#
# Six experts, three GPUs, two slots on each: everybody where the number says. `load` counts the tokens that chose each
# expert.

# %%
load = [40, 10, 70, 20, 5, 5]
by_gpu = [sum(load[2 * gpu : 2 * gpu + 2]) for gpu in range(3)]
print("load of each GPU:", by_gpu, " mean:", sum(load) / 3, " all wait for:", max(by_gpu))
exchanged = [load[2] + load[5], load[0] + load[4], load[3] + load[1]]
print("other neighbours:", exchanged, " all wait for:", max(exchanged))
with_a_copy = [load[2] / 2 + load[1], load[2] / 2 + load[4], load[0], load[3] + load[5]]
print("a fourth GPU, and expert 2 on two of them:", with_a_copy, " all wait for:", max(with_a_copy))

# %% [markdown]
# However experts are exchanged, expert 2 alone is busier than a mean GPU. Only a replica helps: two slots of 35 each.
# Letters in shapes: `e` experts, `l` layers, `T` tokens, `k` choices of a token; `slots` and `gpu` are written out.

# %%
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor

from dsv3_mini.course.checks import lesson_23 as check
from dsv3_mini.course.lesson import same, show_source

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · What falls on each GPU
# ●○○ · 10 minutes
#
# First the measure. `load` is `[e]`, tokens for each expert. `expert` is `[slots]`: the number of the expert that lies
# in each slot. Slots are numbered GPU by GPU, equally many on each. The load of an expert is shared evenly by its
# replicas. Give the load of each GPU.
#
# <details><summary>Hint 1</summary>How many replicas has each expert? <code>torch.bincount(expert)</code>.</details>
# <details><summary>Hint 2</summary>A table of shares by expert, indexed with <code>expert</code>, is a row of shares by
# slot. The rest is one <code>reduce</code>.</details>


# %%
def gpu_load(load: Int[Tensor, " e"], expert: Int[Tensor, " slots"], gpus: int) -> Float[Tensor, " gpu"]:
    """The load of each GPU; slots lie GPU by GPU, and an expert's replicas share its load evenly."""
    ### BEGIN SOLUTION: divide each expert's load by its replicas, look it up for each slot, sum the slots of a GPU
    share = load / torch.bincount(expert, minlength=len(load))
    return reduce(share[expert], "(gpu m) -> gpu", "sum", gpu=gpus)
    ### END SOLUTION


# %%
check.gpu_load(gpu_load)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Who gets another replica?
# ●●○ · 12 minutes
#
# There are `slots` places, at least one for each expert, and all are to be filled. Give the number of replicas of each
# expert so that the busiest *replica* has as little to do as possible. It can be done one slot at a time: whose replicas
# are the busiest now?
#
# <details><summary>Hint 1</summary>Begin with one replica each. Then repeat <code>slots - e</code> times: find the
# largest <code>load / replicas</code>, and give that expert one more.</details>
# <details><summary>Hint 2</summary><code>argmax</code> gives its number.</details>


# %%
def replicas(load: Float[Tensor, " e"], slots: int) -> Int[Tensor, " e"]:
    """How many of the slots each expert fills, at least one, so that the busiest replica is as quiet as possible."""
    ### BEGIN SOLUTION: one each; then, slot by slot, one more for the expert whose replicas are the busiest
    count = torch.ones(len(load), dtype=torch.long)
    for _ in range(slots - len(load)):
        count[(load / count).argmax()] += 1
    return count
    ### END SOLUTION


# %%
check.replicas(replicas)

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · Sort onto GPUs
# ●●○ · 15 minutes
#
# Now the replicas have to lie somewhere. `weight` is `[slots]`, the load of each replica. Go through them from the
# heaviest to the lightest, and give each to the GPU that is the lightest so far and still has room: a GPU holds
# `slots / gpus` of them. Of equally light GPUs take the first. Give the number of each replica's GPU, in the order of
# `weight`.
#
# <details><summary>Hint 1</summary>Keep two tensors of length <code>gpus</code>: what each GPU carries, and how many
# replicas it holds.</details>
# <details><summary>Hint 2</summary>A full GPU must not be found: <code>torch.where(held &lt; room, carried,
# torch.inf).argmin()</code>.</details>


# %%
def sort_onto_gpus(weight: Float[Tensor, " slots"], gpus: int) -> Int[Tensor, " slots"]:
    """The GPU of each replica: the heaviest first, each to the lightest GPU with room."""
    ### BEGIN SOLUTION: from the heaviest on, find the lightest GPU that is not full, note it, add the weight to it
    carried, held = torch.zeros(gpus), torch.zeros(gpus, dtype=torch.long)
    gpu_of = torch.zeros(len(weight), dtype=torch.long)
    for item in weight.argsort(descending=True).tolist():
        gpu = torch.where(held < len(weight) // gpus, carried, torch.inf).argmin()
        gpu_of[item] = gpu
        carried[gpu] += weight[item]
        held[gpu] += 1
    return gpu_of
    ### END SOLUTION


# %%
check.sort_onto_gpus(sort_onto_gpus)

# %% [markdown] tags=["package"]
# ## The package's own
#
# The package does the same for all layers at once: its loops run over slots, never over layers. Then it does more than
# sorting. `exchange` trades replicas between the busiest GPU and others for as long as that helps; and where a layer is
# still above what no placement can beat, other counts of replicas are tried.

# %%
from dsv3_mini.inference import bins
from dsv3_mini.inference.placement import Placement, replicate

show_source(Placement.gpu_load, replicate, bins.sort_greedily, bins.exchange)


# %%
def load_by_package(load: Tensor, expert: Tensor, gpus: int) -> Tensor:
    return Placement(expert[None], len(load), gpus).gpu_load(load[None])[0]


def gpus_by_package(weight: Tensor, gpus: int) -> Tensor:
    held = bins.sort_greedily(weight[None].double(), gpus)[0]
    return torch.zeros(len(weight), dtype=torch.long).scatter(
        0, held.flatten(), torch.arange(len(weight)) * gpus // len(weight)
    )


# %%
torch.manual_seed(0)
some, twice = torch.randn(16).exp(), torch.cat((torch.arange(16), torch.arange(8)))
same(gpu_load, load_by_package, (some, twice, 8), (loads["code"][0], twice, 4))
same(replicas, lambda load, slots: replicate(load[None], slots)[0], (some, 24), (loads["sums"][0].float(), 20))
same(sort_onto_gpus, gpus_by_package, (some, 4), (torch.rand(24), 8))

# %% [markdown]
# What is each step worth? The busiest GPU over the mean GPU, for each sparse layer of the tiny model on code: experts in
# order; sorted, without redundancy; with replicas, sorted; and traded as well. (The last layer is the one of multi-token
# prediction.)


# %%
def sorted_only(load: Tensor, slots: int, gpus: int) -> Placement:
    """Replicas and sorting, nothing further."""
    count = replicate(load, slots)
    expert = torch.stack([torch.repeat_interleave(torch.arange(load.shape[1]), row) for row in count])
    share = (load / count).gather(1, expert)
    return Placement(expert.gather(1, bins.sort_greedily(share, gpus).flatten(1)), load.shape[1], gpus)


code = loads["code"].double()
steps = {"in order": in_order(layers, e, 8), "16 slots, sorted": sorted_only(code, 16, 8)}
steps |= {"24 slots, sorted": sorted_only(code, 24, 8), "24 slots, traded": place_experts(code, 24, 8)}
for name, placement in steps.items():
    print(f"{name:17}", *(f"{x:5.2f}" for x in placement.imbalance(code).tolist()))

# %% [markdown]
# Without redundancy the busiest expert sets a limit that no order beats. Sorting with replicas comes close to 1, and
# trades take what is left.
#
# Try other texts and numbers of GPUs. With *groups stay on a node* the experts of a group remain together, so that a token
# still visits few nodes (lesson 10): first groups are placed on nodes of two GPUs, then each node places its own. What
# does that cost?

# %%
from dsv3_mini.viz.widgets.serving import placement_explorer

explorer = placement_explorer(loads, groups=model.cfg.n_group)
explorer

# %%
before = explorer.picture.value
explorer.set(text="sums", redundant=2)
assert explorer.picture.value != before
anywhere = [place_experts(loads[text], 24, 8).imbalance(loads[text]).max() for text in loads]
on_nodes = [place_experts(loads[text], 24, 8, nodes=4, groups=4).imbalance(loads[text]).max() for text in loads]
print("groups kept on nodes are never better:", all(a <= b + 1e-6 for a, b in zip(anywhere, on_nodes, strict=True)))

# %% [markdown] tags=["experiment"]
# ## Experiment: does yesterday's placement fit today?
#
# A placement is made from text that has been read, and used for text that has not. We let batches come in: first code,
# then sums, then stories. Three services read them, each with eight GPUs: one with experts in order; one placed on the
# first half of the code, once; and one whose placement is renewed after each batch, from the load of the last three.
#
# **What we expect.** Code that comes later is code: the placement made on the first half holds on the second. When the
# text changes, it fits no longer, and replicas of the wrong experts take the place of the right ones. The renewed one
# stumbles at each change and then recovers. If the one that was placed once is as good on sums and stories as the renewed,
# then experts are equally busy on any text, and renewal is for nothing.

# %%
from dsv3_mini.inference.placement import refresh

half = len(routings["code"]) // 2
stream = [("code", r) for r in routings["code"][half:]]
stream += [(text, r) for text in ("sums", "stories") for r in routings[text]]
history = LoadWindow(batches=3)
for routing in routings["code"][:half]:
    history.add(routing)
once = place_experts(history.load, 24, 8)
services = {"in order": in_order(layers, e, 8), "placed once": once, "renewed": once}


# %%
curves = {name: [] for name in services}
for _, routing in stream:
    now = torch.stack([layer.load for layer in routing])
    for name, placement in services.items():
        curves[name].append(placement.imbalance(now).mean().item())
    history.add(routing)
    services["renewed"] = refresh(services["renewed"], place_experts(history.load, 24, 8), history.load)

# %%
from dsv3_mini.viz.figures.serving import refresh_figure

texts = [text for text, _ in stream]
refresh_figure(curves, texts)


# %%
def mean_on(name: str, *wanted: str) -> float:
    values = [value for value, text in zip(curves[name], texts, strict=True) if text in wanted]
    return sum(values) / len(values)


for name in curves:
    print(f"{name:12}", *(f"{text} {mean_on(name, text):.2f}  " for text in ("code", "sums", "stories")))
other = ("sums", "stories")
print("on later code the placement holds:", mean_on("placed once", "code") < mean_on("in order", "code"))
print("on other text it is worse than none:", mean_on("placed once", *other) > mean_on("in order", *other))
print("and worse than the renewed one:", mean_on("placed once", *other) > mean_on("renewed", *other))

# %% [markdown]
# A placement that was made for other text can be worse than none: replicas of experts that nobody wants fill the slots, and
# those that are wanted lie together as chance would have it. Look at the first batch after a change as well, where renewal
# does not help: it knows only what has been.
#
# `refresh` has a threshold: a layer keeps its placement unless the new one makes its busiest GPU quieter by more than 5%.
# Moving an expert costs bandwidth, and the load of three batches is only a sample.
#
# ## A service in time
#
# Balance makes a layer quick. What do people see of it? Two times. **Time to first token** is from asking to the first
# word: the wait in a queue, and the reading of the prompt. **Time per output token** is the rhythm of the rest.

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · The time to the first token
# ●○○ · 10 minutes
#
# One prefill unit reads one prompt after the other, first come, first served. `arrival` is `[n]`, in seconds and in
# order; `reading` is `[n]`, the seconds that each prompt takes to read. Give each request's time to first token, from its
# *arrival* until it has been read.
#
# <details><summary>Hint 1</summary>Carry one number along: when does the unit get free?</details>
# <details><summary>Hint 2</summary>It begins with a request when both are there, the unit and the request:
# <code>max(free, came)</code>.</details>


# %%
def first_tokens(arrival: Float[Tensor, " n"], reading: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Seconds from each request's arrival until its prompt has been read, by one unit, in order."""
    ### BEGIN SOLUTION: carry along when the unit is free; it begins at max(free, arrival) and reads; subtract the arrival
    free, waited = 0.0, []
    for came, takes in zip(arrival.tolist(), reading.tolist(), strict=True):
        free = max(free, came) + takes
        waited.append(free - came)
    return torch.tensor(waited, dtype=arrival.dtype)
    ### END SOLUTION


# %%
check.first_tokens(first_tokens)

# %% [markdown]
# The simulator does that with many units, batches, and a decode pool behind. How long a step takes comes from the ledger:
# FLOPs and bytes of each part (lesson 07), divided by the rates of a card. With units that read one prompt at a time, it
# must give your numbers.

# %%
from dataclasses import replace

from dsv3_mini.serving import DECODE, PREFILL, Lengths, UnitCost, poisson, simulate

large = dsv3.ModelConfig.preset("671b")
reader = UnitCost(large, PREFILL)
asked = poisson(rate=30, count=200, prompt=Lengths(4096, spread=0.5), answer=Lengths(1), seed=23)


def by_simulator(arrival: Tensor, reading: Tensor) -> Tensor:
    return torch.from_numpy(simulate(large, asked, prefill_tokens=1).time_to_first_token)


alone = torch.tensor([reader.prefill([n]) for n in asked.prompt.tolist()], dtype=torch.float64)
same(first_tokens, by_simulator, (torch.from_numpy(asked.arrival), alone))

# %% [markdown]
# Why is a step as fast as it is? In a prefill unit a layer's vectors travel to their experts and back, over the network.
# The report's unit works on two halves of a batch in turn: while one half computes, the other one's vectors are on their
# way. Here are the first two layers of 128 prompts of 4,096 tokens.

# %%
from dsv3_mini.ledger import flops_per_token
from dsv3_mini.ledger.decode import Work
from dsv3_mini.serving.overlap import timetable
from dsv3_mini.viz.figures.serving import timetable_figure

tokens = 64 * 4096  # a half
core = Work("attention's core", tokens * flops_per_token(large, 4096).attention / PREFILL.n_gpus, 0)
layer = reader.layer(tokens, core)
print(f"card: attention {1e3 * layer.attention:.1f} ms, experts {1e3 * layer.experts:.1f} ms for a half")
print(f"network: dispatch {1e3 * layer.dispatch:.1f} ms, combine {1e3 * layer.combine:.1f} ms")
timetable_figure(timetable(layer, layers=2), alone=4 * layer.alone)

# %% [markdown]
# Combine takes twice as long as dispatch: results come back in BF16, two bytes a number, while vectors go out in FP8.
#
# ### Do the books balance?
#
# A simulator is easily wrong in a way that looks right. Some laws hold for any service, whatever its rules. Every token
# that was asked for is written once. Every place in the cache is given back. And **Little's law**: the mean number of
# requests in the system is the rate of arrivals times the mean time that each one stays.

# %%
asked = poisson(rate=150, count=600, prompt=Lengths(2048, 0.5), answer=Lengths(200, 0.5), seed=1)
served = simulate(large, asked, PREFILL, DECODE, prefill_units=2)
stay = (served.finished - asked.arrival).mean()
by_law = len(asked) / served.seconds * stay
print("every token once:", bool((served.written == asked.answer).all()))
print(
    "cache given back:",
    served.cache_left == 0,
    "and never above what there is:",
    served.cache_peak <= served.cache_tokens,
)
print(f"in the system: counted {served.mean_in_system:.1f}, by Little's law {by_law:.1f}")
assert abs(served.mean_in_system / by_law - 1) < 1e-6

# %% [markdown] tags=["interactive"]
# ## The deployment planner
#
# Now plan. The first service is the released model on the report's units: 32 GPUs to read, 320 to write. The second one is
# smaller: the 16b model on nodes of eight. The picture shows what share of the requests waited no longer than a time, and
# how long the pools were at work. Some questions to try:
#
# - From how many requests a second on does one prefill unit no longer keep up? What happens to the first token then, and
#   what to the rhythm?
# - Longer answers, or more requests: which of them fills the decode unit?
# - What is the overlap worth with a fast network, and with a slow one?
# - With drafts by multi-token prediction (lesson 11) a step may write two tokens, and 85% of the drafts are accepted.

# %%
from dsv3_mini.viz.widgets.serving import Planner

planner = Planner()
planner

# %%
import numpy as np

calm = np.median(planner.served.time_to_first_token)
planner.set(rate=400)
crowded = np.median(planner.served.time_to_first_token)
planner.set(prefill_units=4)
print("400 requests a second instead of 100, one prefill unit: a longer wait:", bool(crowded > 2 * calm))
helped = np.median(planner.served.time_to_first_token)
print("four prefill units instead of one: most of it is gone:", bool(helped < crowded / 2))
rhythm = np.median(planner.served.time_per_output_token)
planner.set(drafts=True)
print("drafts make the rhythm faster:", bool(np.median(planner.served.time_per_output_token) < rhythm))

# %% [markdown]
# The planner takes services of your own: `Planner({"mine": (cfg, prefill_unit, decode_unit)})`. A `Unit` has nodes, cards, slots,
# and a `Card` with rates and memory.
#
# ## Find the bug
#
# Replicas are placed, and the picture of loads is even. Somebody writes the line that sends each choice to a slot: a
# dictionary from experts to their slots would do, but `(expert == choice).nonzero()[0]` is shorter. The service is as
# slow as before.


# %%
def choose_slots_with_a_bug(chosen: Tensor, expert: Tensor) -> Int[Tensor, "T k"]:
    slots = [(expert == choice).nonzero()[0, 0] for choice in chosen.flatten()]
    return torch.stack(slots).view(chosen.shape)


SPARSE = 2  # counted from 0
chosen = rearrange(torch.cat([r[SPARSE].chosen for r in routings["code"]]), "b s k -> (b s) k")
placed = place_experts(loads["code"], 24, 8)
sent = torch.bincount(choose_slots_with_a_bug(chosen, placed.expert[SPARSE]).flatten(), minlength=24)
real = reduce(sent.float(), "(gpu m) -> gpu", "sum", gpu=8)
print(f"busiest GPU over the mean, planned: {placed.imbalance(loads['code'])[SPARSE]:.2f}")
print(f"and real: {real.max() / real.mean():.2f}; slots that nobody was sent to: {int((sent == 0).sum())}")

# %% [markdown] tags=["bug"]
# ### Find the bug · The copies that nobody called
# ●●○ · 12 minutes
#
# Write the choice of slots so that replicas take turns. Choices come token by token, from left to right. The first choice
# of an expert goes to its first replica (in the order of slots), the second to its second, and after the last one it
# begins again. `chosen` is `[T k]`, `expert` is `[slots]`; give the slot of each choice, `[T k]`.
#
# <details><summary>Hint 1</summary>How many choices of the same expert came before this one? You counted that in lesson 10:
# <code>one_hot(...).cumsum(0)</code>, and the own column. The turn is that number modulo the expert's replicas.</details>
# <details><summary>Hint 2</summary><code>expert.argsort(stable=True)</code> lists the slots expert by expert. Where in it
# do an expert's replicas begin? After those of all experts before: a <code>cumsum</code>.</details>


# %%
def choose_slots(chosen: Int[Tensor, "T k"], expert: Int[Tensor, " slots"]) -> Int[Tensor, "T k"]:
    """The slot of each choice; the replicas of an expert take turns."""
    ### BEGIN SOLUTION: count the earlier choices of the same expert, modulo its replicas; find that replica's slot
    choices, count = rearrange(chosen, "T k -> (T k)"), torch.bincount(expert)
    come = torch.nn.functional.one_hot(choices, len(count)).cumsum(0).gather(1, choices[:, None])[:, 0] - 1
    begin = count.cumsum(0) - count
    slots = expert.argsort(stable=True)[begin[choices] + come % count[choices]]
    return rearrange(slots, "(T k) -> T k", k=chosen.shape[1])
    ### END SOLUTION


# %%
check.choose_slots(choose_slots)

# %% [markdown] tags=["at-671b"]
# ## At 671B
#
# 58 sparse layers of 256 experts, on the report's two units. How unevenly the released experts are loaded in use we do not
# know, so we invent a load in which the busiest expert of a layer has some seven times the mean.

# %%
from dsv3_mini.ledger import count_parameters

torch.manual_seed(0)
sparse = large.num_hidden_layers - large.first_k_dense_replace
invented = (0.8 * torch.randn(sparse, large.n_routed_experts)).exp()
print(f"busiest expert over the mean: {(invented.amax(1) / invented.mean(1)).mean():.1f}")
prefill_placed = place_experts(invented, PREFILL.slots, PREFILL.n_gpus)
decode_placed = place_experts(invented, DECODE.slots, DECODE.n_gpus)
plain = in_order(sparse, large.n_routed_experts, PREFILL.n_gpus)
print(f"prefill, 32 GPUs: in order {plain.imbalance(invented).mean():.2f}, ", end="")
print(f"with 32 redundant experts {prefill_placed.imbalance(invented).mean():.2f}")
print(f"decode, one expert on each of 320 GPUs: {decode_placed.imbalance(invented).mean():.2f}")

# %% [markdown]
# Nine slots on a GPU are enough to be even to the percent. One slot on a GPU is not: there is nothing to put beside a
# quiet expert, so that 64 more places only cut the peaks. A decode step minds it less, as long as it waits for memory.
#
# What would a whole new placement have to move, every ten minutes? An expert's weights are one byte a number.

# %%
later = place_experts(invented * (0.2 * torch.randn_like(invented)).exp(), PREFILL.slots, PREFILL.n_gpus)
moved = later.moved(prefill_placed)
size = moved * count_parameters(large).expert.total / PREFILL.n_gpus
print(f"{moved:,} of {sparse * PREFILL.slots:,} places change: {size / 1e9:.0f} GB for each GPU,", end=" ")
print(f"{size / PREFILL.card.network:.1f} s of its network, if nothing else is sent")

# %% [markdown]
# Published production figures are 73.7 thousand tokens read and 14.8 thousand tokens written in a second, by each node of
# eight GPUs. What do the report's units do here, at 4,096 tokens of context and with caches full?

# %%
PUBLISHED = {"read": 73_700, "written": 14_800}


def per_node(context: int, halves: int) -> dict[str, float]:
    """Tokens a second and node, with 128 prompts to read at a time and as many answers as the caches hold."""
    prefill, decode = (UnitCost(large, replace(unit, micro_batches=halves)) for unit in (PREFILL, DECODE))
    rows = decode.cache_tokens // context
    read = 128 * context / prefill.prefill([context] * 128)
    written = rows / decode.decode(rows, rows * context)
    return {"read": read / PREFILL.nodes, "written": written / DECODE.nodes}


# %%
for name, context, halves in (
    ("in turn", 4096, 2),
    ("no overlap", 4096, 1),
    ("in turn", 2048, 2),
    ("in turn", 8192, 2),
):
    rates = per_node(context, halves)
    told = [f"{what} {rate:6,.0f} ({rate / PUBLISHED[what]:.2f} of published)" for what, rate in rates.items()]
    print(f"{context:,} tokens, {name:10}: ", *told, sep="  ")

# %% [markdown]
# At 4,096 tokens the simulator is faster than the service was, by about a quarter when it reads and by a few per cent when
# it writes. It should be faster: its rates are peaks that no kernel reaches, its requests never run out, and its experts
# are even. Two things that pull either way are not in this lesson's sources: how long the contexts of that day were, which
# decides what a decode step reads (see the last two lines), and what share of its prompts a service finds already in a cache.

# %% [markdown] tags=["recap"]
# ## Recap
#
# 1. A layer has 16 experts on 8 GPUs, and one expert gets a quarter of all choices. How busy is the busiest GPU at least,
#    in loads of a mean GPU, without replicas? And with three replicas of it?
#    <details><summary>Answer</summary>A mean GPU has an eighth of the load, so that a quarter is 2 means, whatever lies
#    beside it. With three replicas each carries a twelfth, 0.67 means, and leaves room for a lighter neighbour.</details>
# 2. Requests wait long for their first token, and then the words come quickly. Which pool needs more units?
#    <details><summary>Answer</summary>The prefill pool: the wait before the first token is its queue. A decode pool that is
#    too small shows in the rhythm, and, once its cache is full, in a wait between the first token and the second.</details>
# 3. Why does the decode unit have 320 GPUs when 32 could hold the weights?
#    <details><summary>Answer</summary>With one expert on a GPU, a step reads few weights on each, and many requests share
#    the reading of one expert. And 320 GPUs have room for the caches of all those requests.</details>

# %% [markdown] tags=["next"]
# ## Next
#
# This ends the part about inference: a model that is trained, writes, and is served. What it writes goes on with a text,
# as it was trained to do. Lesson 24 begins to teach it to answer: supervised fine-tuning.
