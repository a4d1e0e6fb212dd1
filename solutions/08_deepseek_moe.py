# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   dsv3:
#     title: DeepSeekMoE
#     minutes: 85
#     after: [04_transformer]
#     builds: "the sigmoid gate, fine-grained and shared experts; their work as a loop, a sort, a grouped GEMM"
#     tracks: [half-day, two-days, term]
# ---

# %% [markdown] tags=["why"]
# # 08 · DeepSeekMoE
#
# Most of what a language model knows stands in its feed-forwards. Make them four times as wide and the model can know
# more, but every token pays for all of it: a word of a story drags the whole of what the model knows about Python
# through the processor. A **mixture of experts** cuts the wide feed-forward into pieces, the experts, and sends each
# token to a few of them. The model grows, the work for a token does not.
#
# How to cut is a question of its own, and the picture is DeepSeek's answer in three steps. All four rows do the same
# work for a token, the coloured width. From the second row on, the model holds four times as much. What changes from
# there is how finely a token can choose, and that one expert may be there for everybody.
#
# In this lesson you build the gate that chooses, cut a feed-forward into experts, and compute them in three ways that
# give the same numbers. Then you let the four rows race, and look into a trained model while it routes a text of yours.

# %%
from dsv3_mini.course.next_byte import LADDER
from dsv3_mini.viz.figures.deepseek_moe import ladder_figure

ladder_figure(LADDER)

# %% [markdown] tags=["paper"]
# ## In the report
#
# Section 2.1.2 of the DeepSeek-V3 technical report, equations 12 to 15. For one token with the vector $u$ (as it enters
# the feed-forward of a sparse layer):
#
# $$h' = u + \sum_{i=1}^{N_s} \mathrm{FFN}^{(s)}_i(u) + \sum_{i=1}^{N_r} g_i\, \mathrm{FFN}^{(r)}_i(u) \qquad (12)$$
#
# $$g_i = \frac{g'_i}{\sum_j g'_j} \quad (13) \qquad
# g'_i = \begin{cases} s_i & \text{if } s_i \text{ is among the } K_r \text{ largest} \\ 0 & \text{otherwise} \end{cases}
# \quad (14) \qquad s_i = \mathrm{sigmoid}(u^\top e_i) \quad (15)$$
#
# | in the report | what it is | in code |
# |---|---|---|
# | $\mathrm{FFN}^{(s)}_i$, $N_s$ | shared experts and their number: every token visits them | `n_shared_experts` |
# | $\mathrm{FFN}^{(r)}_i$, $N_r$ | routed experts and their number | axis `e`, `n_routed_experts` |
# | $K_r$ | how many routed experts a token visits | axis `k`, `num_experts_per_tok` |
# | $e_i$ | the **centroid** of expert $i$: a learned vector, the direction of the tokens it wants | a row of the `[e d]` weight |
# | $s_i$ | **affinity** of the token to expert $i$, between 0 and 1 | `scores` |
# | $g_i$ | **gate value**: how much the expert's answer weighs | `gates` |
#
# Two things more. The released configuration multiplies all gate values by a factor (`routed_scaling_factor`, 2.5) that
# the report does not mention. And equation 16 adds a bias to the affinities when it chooses, so that experts stay
# equally busy: that is lesson 09. That a token's experts must live on few machines is lesson 10.
#
# Our letters: `T` tokens (batch and positions in one), `d` width of the stream, `e` experts, `k` chosen ones, `f` inner
# width of one expert.

# %% [markdown] tags=["naive"]
# ## The naive way
#
# Equations 12 to 15 for one token, in plain Python. The residual `u +` is left to the block, as in lesson 04.

# %%
import math
from operator import mul


def naive_moe(u: list, centroids: list, experts: list, shared, k: int) -> list:
    """What a sparse layer adds to the stream of one token."""
    affinity = [1 / (1 + math.exp(-sum(map(mul, u, centroid)))) for centroid in centroids]
    chosen = sorted(range(len(experts)), key=affinity.__getitem__, reverse=True)[:k]
    total = sum(affinity[i] for i in chosen)
    out = shared(u)
    for i in chosen:
        gate, answer = affinity[i] / total, experts[i](u)
        out = [o + gate * a for o, a in zip(out, answer, strict=True)]
    return out


# %% [markdown]
# To see the gate at work, take four experts that ignore their input: expert `i` answers with a 1 at place `i`. Then the
# sum *is* the gate values. Expert `i` likes tokens that are large at place `i`.


# %%
def raises_a_flag(i: int):
    return lambda u: [float(place == i) for place in range(4)]


flags, axes = [raises_a_flag(i) for i in range(4)], [raises_a_flag(i)(None) for i in range(4)]
for u in ([3.0, 0.0, -3.0, 0.5], [0.2, 0.1, 0.0, -0.1], [0.0, -9.0, -9.0, -9.0]):
    gates = naive_moe(u, centroids=axes, experts=flags, shared=lambda u: [0.0] * 4, k=2)
    print(f"{u!s:24} -> gate values {[round(gate, 2) for gate in gates]}")

# %% [markdown]
# The second token has no favourite, and its two experts share about evenly. The third is close to none of the last
# three: one of them gets in all the same, because two places are to be filled, but its gate value is next to 0.
#
# All else in this lesson is the same function for many tokens at once. That is harder than it sounds: tokens of one row
# go to different experts, so there is no one matrix that all of them are multiplied with.

# %%
import torch
from einops import einsum, rearrange, reduce
from torch import Tensor

from dsv3_mini.course.checks import lesson_08 as check
from dsv3_mini.course.lesson import same, show_source

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · The gate
# ●●○ · 12 minutes
#
# Equations 13 to 15 for `T` tokens: a table `[T e]` of gate values that is 0 wherever a token does not visit an expert.
# `centroids` is `[e d]`, one row an expert. `scale` is the configuration's factor: after the division every row of the
# table sums to 1, and after the scaling to `scale`.
#
# <details><summary>Hint 1</summary>Affinities: <code>einsum(x, centroids, "T d, e d -> T e").sigmoid()</code>.</details>
# <details><summary>Hint 2</summary><code>affinity.topk(k, dim=-1)</code> has <code>values</code> and
# <code>indices</code>, both <code>[T k]</code>. <code>torch.zeros_like(affinity).scatter(-1, indices, values)</code>
# puts each value into its expert's column, as in lesson 01.</details>
# <details><summary>Hint 3</summary><code>reduce(kept, "T e -> T 1", "sum")</code> keeps an axis to divide by.</details>


# %%
def gate_values(x: Tensor, centroids: Tensor, k: int, scale: float) -> Tensor:
    """x [T d], centroids [e d] -> [T e]: sigmoid affinities of the k best, divided by their sum, times scale; else 0."""
    ### BEGIN SOLUTION: sigmoid of x times centroids; keep each token's k largest; divide by their sum; times scale
    affinity = einsum(x, centroids, "T d, e d -> T e").sigmoid()
    best = affinity.topk(k, dim=-1)
    kept = torch.zeros_like(affinity).scatter(-1, best.indices, best.values)
    return scale * kept / reduce(kept, "T e -> T 1", "sum")
    ### END SOLUTION


# %%
check.gate_values(gate_values)

# %% [markdown]
# Why a sigmoid? The older way is a softmax over the experts: it hands out a fixed sum, so what one expert gains all
# others lose, whether they have become less suitable or not. A sigmoid judges each expert by itself, and the division
# comes later, among the chosen. (What both are taken of, $u^\top e_i$, is called the expert's *logit*.)
#
# Pull at the logit of expert 2 and watch the *other* bars of the first two panels. Then add something to all logits: the
# softmax does not notice; the sigmoids do, and near 1 they all become alike, so that the gate values even out.

# %%
from dsv3_mini.viz.widgets.deepseek_moe import PULLED, gate_explorer, logits_with

gates_pulled = gate_explorer()
gates_pulled

# %%
before = gates_pulled.picture.value
gates_pulled.set(pulled=3.0, shift=-1.0)
assert gates_pulled.picture.value != before
low, high = logits_with(-0.5, 0.0), logits_with(3.0, 0.0)
others = torch.arange(len(low)) != PULLED
for name, score in {"softmax": lambda z: z.softmax(-1), "sigmoid": torch.sigmoid}.items():
    moved = (score(high) - score(low))[others].abs().max()
    print(f"{name}: pulling at one expert moves the affinities of the others: {bool(moved > 1e-6)}")

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Cut into experts
# ●●○ · 12 minutes
#
# A feed-forward is a sum already. Its inner vector has `w` numbers, its *units*, and each unit computes alone: it reads
# `x` through one row of `gate` and one row of `up`, and writes through one column of `down`. So a feed-forward of `w`
# units can be cut into `e` experts of `f = w / e` units without changing what they compute together.
#
# Cut it: `gate_up` is `[2w, d]`, the rows of gate above the rows of up, as `SwiGLU` in lesson 04 keeps them; `down` is
# `[d, w]`. Expert 0 takes the first `f` units, expert 1 the next, and so on. Every expert is a SwiGLU again, so *its*
# gate rows stand above *its* up rows: the result is `[e, 2f, d]` and `[e, d, f]`.
#
# <details><summary>Hint 1</summary>The first axis of <code>gate_up</code> is three letters in parentheses: which half,
# which expert, which of its units.</details>
# <details><summary>Hint 2</summary><code>(two e f) d</code>, with <code>two=2, e=n_experts</code>; on the right the
# expert stands in front, and <code>(two f)</code> stay together.</details>


# %%
def cut_into_experts(gate_up: Tensor, down: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """gate_up [2w d], down [d w] -> [e 2f d], [e d f]: runs of f = w / e units, each expert a SwiGLU of its own."""
    ### BEGIN SOLUTION: one rearrange for gate_up, whose first axis is (two e f), and one for down, whose second is (e f)
    wide = rearrange(gate_up, "(two e f) d -> e (two f) d", two=2, e=n_experts)
    return wide, rearrange(down, "d (e f) -> e d f", e=n_experts)
    ### END SOLUTION


# %%
check.cut_into_experts(cut_into_experts)

# %% [markdown]
# With a gate value of 1 for every expert nothing is lost: the experts together are the feed-forward that they were cut
# from. So the step from dense to sparse is only this: leave most gate values at 0.

# %%
from dsv3_mini.model.feed_forward import swiglu


def all_your_experts(x: Tensor, gate_up: Tensor, down: Tensor, n_experts: int) -> Tensor:
    experts = zip(*cut_into_experts(gate_up, down, n_experts), strict=True)
    return sum(swiglu(x @ wide.T) @ narrow.T for wide, narrow in experts)


def in_one_piece(x: Tensor, gate_up: Tensor, down: Tensor, n_experts: int) -> Tensor:
    return swiglu(x @ gate_up.T) @ down.T


torch.manual_seed(0)
whole = torch.randn(5, 6), torch.randn(24, 6), torch.randn(6, 12)
same(all_your_experts, in_one_piece, (*whole, 3), (*whole, 12))

# %% [markdown]
# ### Why cut finely
#
# Take 8 experts of which a token visits 2. Cut each of them into `m` smaller ones, and let the token visit `2 m`: it
# meets the same number of units, of the same total. But the sets of experts that it can meet become very many. With few
# large experts, each must be good at several things at once, because only so many combinations exist; with many small
# ones, a token can put together what it needs.

# %%
for m in (1, 2, 4, 8):
    print(f"{8 * m:3} experts, {2 * m:2} chosen: {math.comb(8 * m, 2 * m):>19,} different sets")

# %% [markdown]
# ### Why share one
#
# Some things every token needs: which letters follow a space, what a sentence is. Without a shared expert, each routed
# expert must learn them anew, since any of them may be the only one that a token meets. One expert that *all* tokens
# visit can take that load off the others. It is not routed: no affinity, no gate value, no choice.

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · Expert by expert
# ●●○ · 12 minutes
#
# Now compute equation 12's second sum for many tokens. The loop over *tokens* multiplies one vector at a time, and a
# processor is bad at that. Turn the loops around: for each *expert*, gather the tokens that chose it, run it once on all
# of them, weigh each result with its gate value, and add it to what the token has so far.
#
# `gates` is the table `[T e]` from exercise 1, `gate_up` `[e, 2f, d]`, `down` `[e, d, f]`. `swiglu` (imported above)
# makes `[..., f]` of `[..., 2f]`. An expert must not touch tokens that did not choose it: the check counts your
# multiplications.
#
# <details><summary>Hint 1</summary><code>mine = gates[:, e].nonzero()[:, 0]</code> are the numbers of the tokens that
# chose expert <code>e</code>; <code>x[mine]</code> are their rows.</details>
# <details><summary>Hint 2</summary><code>gates[mine, e, None]</code> is a column: it weighs row by row.</details>
# <details><summary>Hint 3</summary>A token stands in <code>mine</code> at most once, so <code>out[mine] += ...</code> is
# safe here. (Remember this sentence.)</details>


# %%
def experts_in_a_loop(x: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """x [T d], gates [T e], gate_up [e 2f d], down [e d f] -> [T d]: for each token, its experts' outputs times gate."""
    ### BEGIN SOLUTION: for each expert: pick the rows of the tokens that chose it, run it on them, weigh, add
    out = torch.zeros_like(x)
    for e in range(len(gate_up)):
        mine = gates[:, e].nonzero()[:, 0]
        inner = swiglu(einsum(x[mine], gate_up[e], "T d, ff d -> T ff"))
        out[mine] += gates[mine, e, None] * einsum(inner, down[e], "T f, d f -> T d")
    return out
    ### END SOLUTION


# %%
check.experts_in_a_loop(experts_in_a_loop)

# %% [markdown]
# ### Sort, then multiply
#
# With 256 experts that loop makes 256 small products, and searches all tokens 256 times. A GPU wants one call. Write
# each token once for every expert that it visits, which gives `T * k` rows, and *sort these rows by expert*. Now every
# expert's rows lie side by side, and one **grouped GEMM** does all of it: it walks through the rows and changes the
# weight where a new expert begins. (GEMM is the general matrix product.) Here are six tokens that visit two of four
# experts each; the number is the token, the colour the expert.

# %%
from dsv3_mini.viz.figures.deepseek_moe import sort_figure

picked = torch.tensor([[2, 0], [1, 3], [0, 1], [2, 3], [1, 2], [0, 2]])  # [T k]
sort_figure(picked, n_experts=4)

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · The sort
# ●●● · 15 minutes
#
# `chosen` is `[T k]`: the experts of each token. Flattened, it is a list of `T * k` choices; the place of a choice in
# that list is its **slot**. Token 3's first choice, above, has slot 6. Give three lists back:
#
# - `slot` `[T*k]`: the slots in the order of their experts; choices of the same expert keep their order (a *stable*
#   sort). In the picture it begins 1, 4, 10: the choices of expert 0.
# - `token` `[T*k]`: whose row each of these is.
# - `ends` `[e]`: where each expert's run of rows ends, so that expert `e` has the rows from `ends[e - 1]` up to, and not
#   with, `ends[e]`. An expert that nobody chose has an empty run, not a missing one.
#
# <details><summary>Hint 1</summary><code>argsort(stable=True)</code> says in which order to take things, which is what
# <code>slot</code> is.</details>
# <details><summary>Hint 2</summary>A token has <code>k</code> slots side by side. Which division takes slots 0 and 1 to
# token 0, and 6 and 7 to token 3?</details>
# <details><summary>Hint 3</summary><code>torch.bincount</code> with <code>minlength</code> counts (lesson 00);
# <code>cumsum(0)</code> makes ends of counts.</details>


# %%
def dispatch(chosen: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """chosen [T k] -> slot [T*k], token [T*k], ends [e]: choices sorted by expert, whose they are, where runs end."""
    ### BEGIN SOLUTION: a stable argsort of the flat choices; the token of each slot; running totals of visits per expert
    slot = chosen.flatten().argsort(stable=True)
    token = slot // chosen.shape[1]
    ends = torch.bincount(chosen.flatten(), minlength=n_experts).cumsum(0)
    return slot, token, ends
    ### END SOLUTION


# %%
check.dispatch(dispatch)

# %% [markdown] tags=["package"]
# ## The package's own
#
# The gate first. Your four lines are in it; the bias and the groups around them are those of lessons 09 and 10. It
# computes in FP32 whatever the model is in, and the sum has a tiny number added so that it is never 0.

# %%
from dsv3_mini.model.experts import GroupedExperts, LoopExperts, gated, grouped_gemm
from dsv3_mini.model.moe import MoE
from dsv3_mini.model.router import Router

show_source(Router.forward)

# %% [markdown]
# Then the experts, in three steps: dispatch, compute, combine. A cluster run or an FP8 run replaces one of them and
# leaves the rest. The gate value is multiplied in before the last product, where a row has `f` numbers and not `d`: a
# factor may be pulled through a linear map.

# %%
show_source(GroupedExperts.dispatch, GroupedExperts.compute, GroupedExperts.combine, gated, grouped_gemm, MoE.forward)

# %% [markdown]
# To compare, a small layer with weights of its own, without bias and groups.

# %%
import dsv3_mini as dsv3

torch.manual_seed(0)
plain = dsv3.ModelConfig.preset("nano", n_group=1, topk_group=1, initializer_range=0.3)
moe = dsv3.DeepSeekV3(plain).layers[1].mlp.requires_grad_(False)
x = torch.randn(24, plain.hidden_size)
routing = moe.gate(rearrange(x, "T d -> 1 T d"))
chosen, gates, load = routing.chosen[0], routing.gates[0], routing.load


# %%
def gates_of_the_package(x: Tensor, centroids: Tensor, k: int, scale: float) -> Tensor:
    return torch.zeros(len(x), len(centroids)).scatter(1, chosen, gates)


def experts_of_the_package(x: Tensor, gates_table: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return moe.experts(x, chosen, gates, load)


weights = moe.experts.gate_up_proj, moe.experts.down_proj
table = gates_of_the_package(x, moe.gate.weight, plain.num_experts_per_tok, plain.routed_scaling_factor)
same(gate_values, gates_of_the_package, (x, moe.gate.weight, plain.num_experts_per_tok, plain.routed_scaling_factor))
same(experts_in_a_loop, experts_of_the_package, (x, table, *weights))

# %% [markdown]
# And your sort, with torch's grouped GEMM behind it. `index_add` adds each row to its token.


# %%
def experts_with_your_sort(x: Tensor, chosen: Tensor, gates: Tensor, load: Tensor) -> Tensor:
    slot, token, ends = dispatch(chosen, len(load))
    wide, narrow = (rearrange(weight, "e o i -> e i o").contiguous() for weight in weights)
    inner = swiglu(grouped_gemm(x[token], wide, ends.int())) * gates.flatten()[slot, None]
    return torch.zeros_like(x).index_add(0, token, grouped_gemm(inner, narrow, ends.int()))


same(experts_with_your_sort, moe.experts, (x, chosen, gates, load))
loop = LoopExperts(plain)
loop.load_state_dict(moe.experts.state_dict())
assert torch.allclose(loop(x, chosen, gates, load), moe.experts(x, chosen, gates, load), atol=1e-5)
print(f"products, token by token: {2 * chosen.numel()}; expert by expert: {2 * len(load)}; grouped: 2")

# %% [markdown]
# Same numbers, other speed. On a GPU the gap is what makes mixtures of experts possible at all; on a processor it can
# be felt too. Here are 2,048 tokens of that layer, one product at a time and in two grouped ones.

# %%
from time import perf_counter

many = torch.randn(2048, plain.hidden_size)
route = moe.gate(rearrange(many, "T d -> 1 T d"))
picks = route.chosen[0]
start = perf_counter()
for token, experts in enumerate(picks.tolist()):
    for e in experts:
        weights[1][e] @ swiglu(weights[0][e] @ many[token])
by_token = perf_counter() - start
start = perf_counter()
moe.experts(many, picks, route.gates[0], route.load)
print("two grouped products are more than three times as fast:", by_token > 3 * (perf_counter() - start))

# %% [markdown] tags=["experiment"]
# ## Experiment: the race
#
# The four rows of the first picture, as models. Each predicts the next byte of a text from the eight bytes before it,
# in two layers that are nothing but a feed-forward beside a stream; there is no attention. They read the same batches:
# stories, sums, Python code and prose, a quarter each. First weights follow the same distribution, and a token meets 64
# inner units in every one of them. (Behind the scenes a bias keeps the experts equally busy; lesson 09 builds it.)
#
# **What we expect.** All three mixtures hold four times the parameters, so all should end below the dense model by a
# margin that is no accident: at least 0.02 bits per byte, averaged over the four kinds of text. Between the mixtures the
# difference should be smaller: finer experts somewhat better than coarse ones, and a shared one at least no worse. If
# the mixtures do not beat the dense model, parameters that only some tokens use are worth nothing here.

# %%
from dsv3_mini.course.next_byte import NextByte, byte_batches, train_bytes

racers, losses = {}, {}
for arrangement in LADDER:
    torch.manual_seed(0)
    racers[arrangement.name] = NextByte(arrangement)
    losses[arrangement.name] = train_bytes(racers[arrangement.name], byte_batches(), steps=200)
    inside = racers[arrangement.name].feed_forward_parameters()
    print(f"{arrangement.name:26} {inside:>7,} parameters in its feed-forwards, routers included")

# %%
from dsv3_mini.course.next_byte import bits_per_byte
from dsv3_mini.data.corpora import DOMAINS
from dsv3_mini.viz.figures.deepseek_moe import race_figure

held_out = {name: {domain: bits_per_byte(racer, domain) for domain in DOMAINS} for name, racer in racers.items()}
race_figure(losses, held_out, dense="dense")

# %%
mean = {name: sum(bits.values()) / len(bits) for name, bits in held_out.items()}
coarse, fine, shared = mixtures = [mean[arrangement.name] for arrangement in LADDER[1:]]
print("every mixture is ahead of the dense model by 0.02 bits or more:", max(mixtures) < mean["dense"] - 0.02)
print("fine-grained experts are ahead of coarse ones:", fine < coarse)
print("sharing one of them makes it better still:", shared < fine)
print("among themselves they differ by less than that:", max(mixtures) - min(mixtures) < mean["dense"] - max(mixtures))
assert max(mixtures) < mean["dense"] - 0.02

# %% [markdown]
# The first expectation holds: parameters that only a few tokens use are worth having. The picture says where: most where
# the text has words to know, as stories and prose do; little in the sums, whose few rules the dense model has learnt as
# well. Finer experts beat coarse ones, by less. The shared expert is a disappointment: two more seeds, tried when this
# lesson was written, gave the same order, with the shared one never in front. A likely reason, which we did not test:
# sharing takes one choice from the router, and what *all* bytes need can be learnt by the tables and the head, which
# every byte meets anyway, so that little is left to share. And two hundred steps are few. What a shared expert does in a
# model that was trained for longer can be asked of one; the last part of the next section does.

# %% [markdown] tags=["interactive"]
# ## The routing explorer
#
# Now a model that has learnt for longer: the course's tiny one, with 16 routed experts a layer, of which a token visits
# 4, and one shared. Its three sparse layers stand one above the other; the lowest is the first that a token meets.
#
# - **The text** on top is tinted by the domain that a token's experts serve in the chosen layer; no tint: no domain in
#   particular. Point at a token and see its experts.
# - **A tile** is an expert, the darker the larger the gate value. The bar below it says whom the expert serves: of the
#   tokens that it gets, which part comes from stories, sums, code and prose, when all four are read equally often.
# - **The strip** at the bottom shows the chosen layer for the whole text: a column a token, a row an expert. Point at it
#   or at a tile to see which words an expert gets.
#
# Arrow keys step through tokens (left, right) and layers (up, down), space plays. Choose another of the texts, or type
# one of your own.

# %%
from dsv3_mini.data.shipped import shipped
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.viz.widgets.routing_explorer import RoutingExplorer

model = dsv3.from_pretrained(shipped("tiny")).eval().requires_grad_(False)
cfg, tokenizer = model.cfg, Tokenizer.shipped()
explorer = RoutingExplorer(model, tokenizer)
explorer

# %% [markdown]
# A cell can do what your hand does. This one gives it a story, goes to a token and a layer, and compares what is shown
# with what the model did.

# %%
from dsv3_mini.data.stories import HELD_OUT_SEED, generate_story
from dsv3_mini.viz.figures import png

before = png(explorer.figure())
text = generate_story(HELD_OUT_SEED, 5).text
explorer.read(text)
explorer.set(token=10, layer=cfg.first_k_dense_replace + 1)
assert png(explorer.figure()) != before
routed = model(torch.tensor([[tokenizer.eos_id, *tokenizer.encode(text)]])).routing[1]
assert set(explorer.experts_here) == set(routed.chosen[0, 11].tolist())  # position 0 begins the document
print(
    f"{len(explorer.shown.words)} tokens; in layer {routed.layer} token 10 visits {len(explorer.experts_here)} experts"
)

# %% [markdown]
# Do the experts divide the world as we would, one for stories, one for code? Look for an expert whose bar has one
# colour, then for the words that it often gets (they stand below the picture when you point at its tile). Many experts
# care for a *kind of token*, such as digits, names, or what follows a line break, rather than for a topic.

# %%
favourite = reduce(explorer.profile.shares, "l e n -> l e", "max")  # of each expert: the domain that it serves most
for layer, row in zip(explorer.layers, favourite, strict=True):
    print(f"layer {layer}: {row.mean():.0%} of an expert's tokens come from its favourite domain, on average;", end=" ")
    print(f"for {int((row > 0.5).sum())} of {len(row)} experts more than half")
print("an expert that served all four alike would get 25% from each")

# %% [markdown]
# ### What the shared expert is worth
#
# A shared expert has as many parameters as a routed one. Silence one of the two (set its last matrix to zero, in all
# three layers) and measure what the model loses on text that it never saw.
#
# **What we expect.** Every token passes through the shared expert, and only some through a routed one, be it the
# busiest. If the shared expert does what it is there for, the model misses it more than any routed one. If it does not,
# it is a plain expert with a free pass.

# %%
from dsv3_mini.data.packing import inputs_and_targets
from dsv3_mini.data.stream import held_out_rows
from dsv3_mini.train.losses import token_losses

rows = torch.cat([held_out_rows(domain, tokenizer, seq_len=256, rows=2).tokens for domain in DOMAINS])
inputs, targets = inputs_and_targets(rows, tokenizer.pad_id)


# %%
def nats_without(*matrices: Tensor) -> float:
    """Nats per token on held-out text while these matrices are zero."""
    kept = [matrix.clone() for matrix in matrices]
    for matrix in matrices:
        matrix.zero_()
    losses = token_losses(model.main_states(inputs)[0], model.lm_head.weight, targets)
    for matrix, before in zip(matrices, kept, strict=True):
        matrix.copy_(before)
    return float(losses.sum() / (targets >= 0).sum())


# %%
sparse = [block.mlp for block in model.layers if isinstance(block.mlp, MoE)]
busiest = [int(layer.load.argmax()) for layer in model.main_states(inputs)[1]]
whole = nats_without()
no_shared = nats_without(*(part.shared_experts.down_proj.weight for part in sparse)) - whole
no_routed = nats_without(*(part.experts.down_proj[e] for part, e in zip(sparse, busiest, strict=True))) - whole
print(f"without the shared expert of each layer, a token costs {no_shared:.2f} nats more")
print(f"without the busiest routed expert of each layer, {no_routed:.2f} nats more")
print("the shared one is missed more:", no_shared > no_routed)

# %% [markdown]
# ## Find the bug
#
# Somebody rewrites the last step, *combine*: the sorted rows, weighed already, are to be added up token by token. It is
# one line shorter, it looks like exercise 3, and the model still trains. It only never becomes as good as it should.


# %%
def add_up_badly(results: Tensor, token: Tensor, n_tokens: int) -> Tensor:
    out = torch.zeros(n_tokens, results.shape[1])
    out[token] += results
    return out


sent = moe.experts.dispatch(x, chosen, load)
results = moe.experts.compute(sent, gates.flatten()[sent.slot])
wrong, right = add_up_badly(results, sent.token, len(x)), moe.experts(x, chosen, gates, load)
print("same shape:", wrong.shape == right.shape, "· same numbers:", torch.allclose(wrong, right, atol=1e-5))
print("adding up ones:", add_up_badly(torch.ones(6, 1), torch.tensor([0, 1, 0, 1, 0, 2]), 3).flatten().tolist())

# %% [markdown] tags=["bug"]
# ### Find the bug · The sum that forgets
# ●●○ · 8 minutes
#
# Three rows belong to token 0, two to token 1, one to token 2, and the sums of ones come out as 1, 1, 1. Write the
# function as it should be: `results` is `[T*k, d]`, row `i` belongs to token `token[i]`, the result is `[T, d]`. Do not
# count on `k` rows for every token: on a cluster a machine has only some of a token's experts, so a token may have any
# number of rows here.
#
# <details><summary>Hint 1</summary><code>out[token] += results</code> means <code>out[token] = out[token] +
# results</code>. How often is <code>out[0]</code> read, and how often is it written?</details>
# <details><summary>Hint 2</summary>In exercise 3 no token stood twice in <code>mine</code>. Here tokens do.</details>
# <details><summary>Hint 3</summary><code>index_add</code> adds row after row. (<code>scatter_add</code>, or a product
# with a table of zeros and ones, does it as well.)</details>


# %%
def add_up(results: Tensor, token: Tensor, n_tokens: int) -> Tensor:
    """results [T*k d], token [T*k] -> [T d]: for each token the sum of its rows."""
    ### BEGIN SOLUTION: zeros, to which every row is added at its token's place, each addition kept
    return results.new_zeros(n_tokens, results.shape[1]).index_add(0, token, results)
    ### END SOLUTION


# %%
check.add_up(add_up)

# %% [markdown] tags=["at-671b"]
# ## At 671B
#
# The released model has 58 sparse layers above 3 dense ones. Compare what one token meets in each kind.

# %%
from dsv3_mini.ledger import count_parameters

large = dsv3.ModelConfig.preset("671b")
parts = count_parameters(large)
met = (large.num_experts_per_tok + large.n_shared_experts) * large.moe_intermediate_size
held = (large.n_routed_experts + large.n_shared_experts) * large.moe_intermediate_size
print(f"inner units: dense layer {large.intermediate_size:,}; sparse layer {met:,} for a token, {held:,} in all")
router = parts.gate["gate"]
print(f"one expert {parts.expert.total:,} parameters, the router {router:,}: 1 in {parts.moe_layer.total // router:,}")
share = parts.moe_layers * large.n_routed_experts * parts.expert.total / parts.main_trainable
print(f"{share:.1%} of all parameters are routed experts; a token meets 1 in {held / met:.1f} of these layers' units")
assert met == large.intermediate_size

# %% [markdown]
# The picture at the top of this lesson is no toy, then: in the released model, too, a token meets exactly as many units
# in a sparse layer as in a dense one. Now the choice, against experts four times as large, and what it means for a
# machine that answers requests: how many of a layer's experts are awake when few tokens are decoded at a time? (We
# assume that tokens choose independently and evenly.)

# %%
e, k = large.n_routed_experts, large.num_experts_per_tok
print(f"{k} of {e}: {math.comb(e, k):,} sets; {k // 4} of {e // 4}, four times as large: {math.comb(e // 4, k // 4):,}")
expert_mb = parts.expert.total / 1e6  # in FP8, a byte a parameter
for tokens in (1, 32, 256, 4096):
    awake = e * (1 - (1 - k / e) ** tokens)
    print(f"{tokens:4} tokens: {awake:3.0f} experts of a layer awake, {awake * expert_mb / 1e3:4.1f} GB read,", end=" ")
    print(f"{tokens * k / awake:.1f} rows for each")

# %% [markdown]
# Thirty-two tokens wake most of the experts, and give each of them a row or two to do. So such a model is served to
# many people at once, on many machines (lesson 23).
#
# Last, a number about precision. The gate is computed in FP32, whatever the rest is in; it is a tiny part of the work.
# Affinities of 256 experts lie close together; let us round them as BF16 does, on random tokens of the full width, and
# count the tokens whose set of experts changes.

# %%
torch.manual_seed(0)
tokens = torch.randn(512, large.hidden_size)
centroids = torch.randn(e, large.hidden_size) * large.hidden_size**-0.5
exact = einsum(tokens, centroids, "T d, e d -> T e").sigmoid()
sets = [affinity.topk(k).indices.sort().values for affinity in (exact, exact.bfloat16().float())]
changed = (sets[0] != sets[1]).any(-1).float().mean()
gap = (exact.sort(dim=-1).values[:, -k] - exact.sort(dim=-1).values[:, -k - 1]).median()
print(f"the last one in and the first one out differ by {gap:.3f} (median); BF16 steps there are {2**-8:.3f}")
print("more than one token in twenty changes an expert:", bool(changed > 0.05))

# %% [markdown] tags=["recap"]
# ## Recap
#
# 1. Two models have the same activated parameters. One has 64 experts of which a token visits 2, the other 256, a
#    quarter as large, of which it visits 8. What does the second have that the first has not, and what does it cost?
#    <details><summary>Answer</summary>Many more sets of experts that a token can meet, so that experts can be narrower
#    and still be combined. It costs a router four times as large, four times as many rows to sort and send, and smaller
#    matrix products.</details>
# 2. The gate values are divided by the sum over the chosen experts. What would happen if a token visited one expert
#    only?
#    <details><summary>Answer</summary>Its gate value would be 1 (times the scale) whatever its affinity: no gradient
#    would reach the router through it, and it could not learn whom to choose. With two or more, raising one lowers the
#    other.</details>
# 3. In which of the three steps (dispatch, compute, combine) may a token stand more than once in an index, and why does
#    it matter?
#    <details><summary>Answer</summary>In dispatch, which only reads (a row may be copied any number of times), and in
#    combine, which writes: there, `out[index] += rows` keeps one row of each token, and `index_add` keeps all.</details>

# %% [markdown] tags=["next"]
# ## Next
#
# `explorer.save_html("routing.html")` writes the explorer, with your text, into one file that works without Python and
# without a network.
#
# The race was run with a hand on the shoulders of the experts: a bias that keeps them equally busy. Take it away, and a
# few experts draw ever more tokens while others fall idle. Lesson 09 lets that happen, cures it in two
# ways, and measures what each cure costs.
