# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   dsv3:
#     title: Pre-training
#     minutes: 90
#     after: [12_whole_model]
#     builds: schedules by tokens, AdamW and clipping by hand, a run that survives a kill, and a board to watch it on
#     tracks: [two-days, term]
# ---

# %% [markdown] tags=["why"]
# # 13 · Pre-training
#
# The model of lesson 12 is complete and knows nothing. Pre-training is what makes it something: a loop of a few lines,
# run for as long as one can pay for. Of DeepSeek-V3's 2.8 million GPU hours, 96% were this loop. The lines are easy.
# What takes care is all around them: settings that change on the way, an optimizer with a memory, a loss that means
# the same however a batch is cut, and a run that goes on after the power failed as if nothing had happened.
#
# In this lesson you write these parts and train a small model while you watch. This is the board of a run that is
# over: the one that made the course's tiny model. Look at it for a moment. At the end you can read every panel.

# %%
import torch

import dsv3_mini as dsv3
from dsv3_mini.course.pretrain_run import shipped_run
from dsv3_mini.data.shipped import shipped
from dsv3_mini.train.balance import routers
from dsv3_mini.viz.figures.pretrain import board_figure

lines = shipped_run()
steps, evaluations = ([line for line in lines if line["kind"] == kind] for kind in ("step", "evaluation"))
tiny = dsv3.from_pretrained(shipped("tiny")).eval()
bias = {router.layer: router.e_score_correction_bias.tolist() for router in routers(tiny)}
title = f"The run that made tiny: {steps[-1]['tokens'] / 1e6:.0f} million tokens"
board_figure(steps, evaluations, title, bias, words=f"It writes: {evaluations[-1]['sample']}")

# %% [markdown] tags=["paper"]
# ## In the report
#
# Section 4.2. Four of its settings change while the model trains, and the changes are told in *tokens*, all but one:
#
# | setting | at first | then |
# |---|---|---|
# | learning rate | from 0 to $2.2 \cdot 10^{-4}$ in 2,000 steps | flat to 10T tokens, half a cosine down to a tenth over 4.3T, flat for 333B, then $7.3 \cdot 10^{-6}$ for 167B |
# | sequences in a batch | 3,072 | growing to 15,360 over the first 469B tokens |
# | $\gamma$, speed of the gate biases (lesson 09) | 0.001 | 0 for the last 500B |
# | $\lambda$, weight of MTP's loss (lesson 11) | 0.3 | 0.1 from 10T on |
#
# T is a trillion, $10^{12}$, and B a billion, $10^9$; the whole is 14.8T. What stays as it is: sequences of 4,096 tokens;
# AdamW with $\beta_1 = 0.9$, $\beta_2 = 0.95$ and a weight decay of 0.1; gradients clipped to a norm of 1; first weights
# from a normal distribution with a standard deviation of 0.006. Section 3.2.3 adds a moving average of the weights. You
# will meet all of these below.

# %% [markdown] tags=["naive"]
# ## The naive way
#
# Most training scripts count steps: so many to warm up, flat until here, down until there. Take such a schedule of 300
# steps, and train with it twice. Once with 8 sequences of 64 tokens in each step. And once as large runs do, with
# small batches first and large ones later.


# %%
def naive_rate(step: int) -> float:
    """Share of the full rate: up in 20 steps, flat to step 200, then in a straight line to a tenth at step 300."""
    if step < 20:
        return step / 20
    return max(0.1, 1 - 0.9 * max(0, step - 200) / 100)


at_full_rate = [step for step in range(300) if naive_rate(step) == 1.0]
batches = {"8 sequences": lambda step: 8, "4, growing to 24": lambda step: min(24, 4 + step // 10)}
for name, batch in batches.items():
    seen = [64 * sum(batch(step) for step in range(until)) for until in (at_full_rate[0], at_full_rate[-1], 300)]
    falls = seen[1] / seen[2]
    print(f"{name:17} {seen[0]:>6,} tokens to warm up, {seen[2]:>7,} in all; the rate falls after {falls:.0%} of them")

# %% [markdown]
# The "same" recipe is two recipes: about half as much text to warm up, and the last third of the *steps* is nearly half
# of the *text*. Change the batch because a machine has less memory, or more, and everything else has moved, too. Counted in
# tokens a recipe says what happens at which point of the text, whoever reads it in whatever portions.

# %%
import math

from einops import rearrange
from torch import Tensor, nn

from dsv3_mini.course.checks import lesson_13 as check
from dsv3_mini.course.lesson import same, show_source

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · A schedule in pieces
# ●●○ · 12 minutes
#
# A schedule is a list of pieces in order. A piece `(until, start, end, shape)` begins where the one before it ends (the
# first at 0 tokens) and lasts *until* so many tokens have been seen; at exactly `until` the next one is in charge. While
# it lasts the value goes from `start` to `end`:
#
# - `"linear"`: in a straight line. With the share $p$ of the piece that is done, $start + p\,(end - start)$.
# - `"cosine"`: along half a wave, flat at both ends. $p$ gives way to $(1 - \cos \pi p) / 2$.
#
# After the last piece its end value stays.
#
# <details><summary>Hint 1</summary>Walk through the pieces and remember where the last one ended; return as soon as
# <code>tokens &lt; until</code>.</details>
# <details><summary>Hint 2</summary>The share is <code>(tokens - begin) / (until - begin)</code>, not <code>tokens /
# until</code>.</details>


# %%
def scheduled(tokens: float, pieces: list[tuple[float, float, float, str]]) -> float:
    """The value once `tokens` tokens have been seen; a piece is (until, start, end, shape)."""
    ### BEGIN SOLUTION: find the piece that is in charge, its share that is done, and the value there; the last end value after all
    begin = 0.0
    for until, start, end, shape in pieces:
        if tokens < until:
            share = (tokens - begin) / (until - begin)
            if shape == "cosine":
                share = (1 - math.cos(math.pi * share)) / 2
            return start + (end - start) * share
        begin = until
    return pieces[-1][2]
    ### END SOLUTION


# %%
check.scheduled(scheduled)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · How far are 2,000 steps?
# ●○○ · 8 minutes
#
# One number of the report is in steps: the warm-up. To make all of the recipe a function of tokens it has to be
# translated, and the batch grows meanwhile. How many tokens have been seen after `steps` steps?
#
# `batch_size` is a schedule, a function from the tokens seen to a number of sequences. A batch holds a whole number of
# them, so round. Each sequence has `context` tokens.
#
# <details><summary>Hint 1</summary>Take the steps one after the other: the batch of each depends on what was seen
# before it.</details>
# <details><summary>Hint 2</summary>The schedule wants tokens, not the number of the step.</details>


# %%
def tokens_after(steps: int, batch_size, context: int) -> int:
    """Tokens seen after so many steps; batch_size: tokens seen -> sequences of the next step."""
    ### BEGIN SOLUTION: for each step add its batch, rounded, times the context, asked with the tokens seen so far
    tokens = 0
    for _ in range(steps):
        tokens += round(batch_size(tokens)) * context
    return tokens
    ### END SOLUTION


# %%
check.tokens_after(tokens_after)

# %% [markdown]
# Now the curves. In the package a recipe is an object with one schedule for each setting, and the report's is a preset.
# Beside it stands the recipe of the tiny model: the same shapes, a million times shorter.

# %%
from dsv3_mini.train.recipe import Recipe
from dsv3_mini.viz.figures.pretrain import schedules_figure

report, own = Recipe.preset("deepseek-v3"), Recipe.preset("tiny")
schedules_figure({"deepseek-v3": report, "tiny": own})

# %% [markdown]
# Each of these has a reason. The rate *warms up*, because the first gradients point anywhere. It falls at the end,
# because small steps settle what large ones leave in motion. The batch grows, because early gradients agree with each
# other, so few sequences suffice, and late ones hardly do. $\gamma$ stops, so that the experts keep what they have
# at the end.
#
# And tiny deviates, with reasons of its own. Its rates are ten times higher: small models take larger steps. Its $\gamma$
# begins higher, because its biases have thousands of steps to find their place and not hundreds of thousands. If its
# $\lambda$ is 0 at first, then because MTP takes two fifths of the arithmetic at this size, and a model that cannot yet
# say the next token gains little from being asked for the one after.


# %%
def pieces_of(schedule) -> list[tuple[float, float, float, str]]:
    return [(piece.until, piece.start, piece.end, piece.shape) for piece in schedule.pieces]


def my_rate(recipe: Recipe, share: float) -> float:
    return 1e4 * scheduled(share * recipe.total_tokens, pieces_of(recipe.learning_rate))


def package_rate(recipe: Recipe, share: float) -> float:
    return 1e4 * recipe.learning_rate(share * recipe.total_tokens)


# %%
from dsv3_mini.train import schedules

same(my_rate, package_rate, *[(recipe, i / 40) for recipe in (report, own) for i in range(41)])
same(tokens_after, lambda n, batch, s: schedules.tokens_after(n, batch, schedules.constant("context", s)),
     (2000, report.batch_size, 4096), (500, own.batch_size, round(own.context(0))))  # fmt: skip

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · One step of AdamW
# ●●○ · 15 minutes
#
# Plain descent subtracts the gradient $g$ times a rate $\eta$. AdamW keeps two moving averages for each single weight:
# $m$ of its gradients, and $v$ of their squares. Its step is $m$, divided by the root of $v$: about as long for a weight
# whose gradients are tiny as for one whose gradients are large, and longer where they agree on a direction. With step
# number $t$, counted from 1:
#
# $$m \leftarrow \beta_1 m + (1 - \beta_1)\, g \qquad v \leftarrow \beta_2 v + (1 - \beta_2)\, g^2$$
# $$w \leftarrow (1 - \eta\,\delta)\, w - \eta\; \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}$$
#
# $m$ and $v$ begin at 0, so they are too small at first; the two divisions make up for that. $\delta$ is the *weight
# decay*: each step draws the weight a little towards 0. Matrices decay. What has one axis only, as the weight of a norm,
# does not: there is no reason to draw it to 0. All tensors have the shape of the weight. Return the new $w$, $m$ and
# $v$.
#
# <details><summary>Hint 1</summary><code>decay = weight_decay if weight.ndim > 1 else 0.0</code></details>
# <details><summary>Hint 2</summary>The corrected averages are used for this step only: return the uncorrected
# ones.</details>
# <details><summary>Hint 3</summary>Make new tensors: <code>first * beta</code>, not <code>first *= beta</code>.</details>


# %%
def adamw(weight, gradient, first, second, step, learning_rate, weight_decay, betas, eps):
    """All tensors of one shape, step from 1 -> the new weight, first (m) and second (v)."""
    ### BEGIN SOLUTION: both averages with this gradient in them; their corrections; decay of what has two axes or more; the step
    one, two = betas
    first = one * first + (1 - one) * gradient
    second = two * second + (1 - two) * gradient**2
    direction, spread = first / (1 - one**step), second / (1 - two**step)
    decay = weight_decay if weight.ndim > 1 else 0.0
    weight = (1 - learning_rate * decay) * weight - learning_rate * direction / (spread.sqrt() + eps)
    return weight, first, second
    ### END SOLUTION


# %%
check.adamw(adamw)

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · Clip the whole
# ●○○ · 8 minutes
#
# Now and then a batch has a gradient many times as large as usual: a strange document, a loss that jumps. Its step would
# spoil what many before it have built. So the gradient is *clipped*: taken together as one long vector, all tensors of
# the model one behind the other, it has a norm, the root of the sum of all squares. If that is above `largest`, all
# of it is scaled down to `largest`. Otherwise it stays as it is.
#
# Return the new gradients and the norm *before*. That number is on every board: it rises before a loss breaks.
#
# <details><summary>Hint 1</summary>One norm and one factor for all tensors: their directions stay as they are.</details>
# <details><summary>Hint 2</summary><code>min(1.0, largest / norm)</code></details>


# %%
def clip(gradients: list[Tensor], largest: float) -> tuple[list[Tensor], float]:
    """The gradients, scaled down together to a norm of at most `largest`; and their norm before."""
    ### BEGIN SOLUTION: the root of the sum of all squares of all tensors; one factor, at most 1, for all of them
    norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients))
    factor = min(1.0, largest / norm)
    return [gradient * factor for gradient in gradients], norm
    ### END SOLUTION


# %%
check.clip(clip)

# %% [markdown] tags=["package"]
# ## The package's own
#
# Your two halves of a step stand in `train/optimizer.py`, with torch's fused AdamW in the middle. What is new there is
# about precision. A BF16 number has 8 significant bits: add a thousandth of it, and it stays what it was. So the
# optimizer keeps *masters* of all weights in FP32, steps on those, and rounds the result into the model. The last lines of
# `step` keep the moving average of the weights, which is what gets evaluated.

# %%
from dsv3_mini.train.optimizer import MasterAdamW

show_source(MasterAdamW.clip_gradients, MasterAdamW.step)


# %%
def package_adamw(weight, gradient, first, second, step, learning_rate, weight_decay, betas, eps):
    """The package's optimizer on a model of one weight, before its first step."""
    model = nn.ParameterDict({"weight": nn.Parameter(weight.clone())})
    optimizer = MasterAdamW(model, betas, weight_decay, ema_decay=0.0)
    model["weight"].grad = gradient.clone()
    optimizer.step(learning_rate)
    state = optimizer.adamw.state[model["weight"]]
    return model["weight"].detach(), state["exp_avg"], state["exp_avg_sq"]


# %%
def package_clip(gradients, largest):
    model = nn.ParameterDict({str(i): nn.Parameter(torch.zeros_like(g)) for i, g in enumerate(gradients)})
    for parameter, gradient in zip(model.values(), gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = MasterAdamW(model, (0.9, 0.95), 0.1, 0.0).clip_gradients(largest)
    return [parameter.grad for parameter in model.values()], norm.item()


# %%
torch.manual_seed(0)
matrix, vector = torch.randn(4, 6), torch.randn(6)
settings = (1, 0.01, 0.1, (0.9, 0.95), 1e-8)
nothing = [torch.zeros_like(x) for x in (matrix, vector)]
same(adamw, package_adamw, *[(x, torch.randn_like(x), zero, zero, *settings)
                             for x, zero in zip((matrix, vector), nothing, strict=True)])  # fmt: skip
same(clip, package_clip, ([matrix, vector], 1.0), ([0.01 * matrix, 0.01 * vector], 1.0))

# %% [markdown]
# And this is the loop. One step is a page: ask the schedules, read a batch, go through it in micro-batches, clip, step,
# and move the biases. Find your four functions in it. (`halves` are the rows of a micro-batch as two, learnt from at one
# time where a processor has threads for both; `replicas` are other processes with rows of their own, here none.)

# %%
from dsv3_mini.train.trainer import Trainer

show_source(Trainer.train_step)

# %% [markdown] tags=["experiment"]
# ## Experiment: pull the plug
#
# A run of weeks on thousands of machines is interrupted again and again. So is one on a laptop. What must be on the
# disk, so that the run goes on as if nothing had happened? Not *about* as if: the same weights, to the last bit. Then
# nobody has to wonder later whether a strange curve came from the interruption.
#
# Here is the run that you will watch below, in a folder of its own. One goes through 48 steps without a break. The
# other saves a checkpoint at step 40, goes on for three more steps, and is gone, as if somebody had pulled the plug.

# %%
import tempfile
from pathlib import Path

from dsv3_mini.course.pretrain_run import SHAPE, run_recipe
from dsv3_mini.data.tokenizer import Tokenizer

scratch, tokenizer = tempfile.TemporaryDirectory(), Tokenizer.shipped()
STOPPED, END = 40, 48


def open_run(name: str) -> Trainer:
    """The run in this folder: from its beginning or, where there is one, from its last checkpoint."""
    return Trainer(Path(scratch.name) / name, SHAPE, run_recipe(), tokenizer)


# %%
unbroken = open_run("unbroken")
beginning = unbroken.stream.state_dict()  # where the data begin
whole = [unbroken.train_step().loss for _ in range(END)]

killed = open_run("killed")
for _ in range(STOPPED):
    killed.train_step()
folder = killed.save()
for _ in range(3):
    killed.train_step()
killed.stream.close()
del killed

# %% [markdown]
# What is in the checkpoint? For each weight its master, its moving average, and AdamW's two averages with their step
# count; the gate biases, which are no weights; the state of the random numbers. And in a small JSON the place in the data.

# %%
from collections import Counter

from dsv3_mini.train.checkpoint import load_checkpoint

checkpoint = load_checkpoint(folder)
print(dict(Counter(name.split(".")[0] for name in checkpoint.tensors)))
print({name: value for name, value in checkpoint.state.items() if name in ("step", "tokens", "context")})
print("of the data:", ", ".join(checkpoint.state["stream"]))

# %% [markdown]
# **What we expect.** A run that goes on from all of this ends equal to the unbroken one, in every bit of every tensor.
# And nothing in it is idle: a run that forgets one part, be it as small as a few biases or a position in a file, ends
# elsewhere. If any forgetful run is equal as well, that part need not have been saved; if the full one is not, something
# is missing.


# %%
def forget_biases(run: Trainer) -> None:
    for router in routers(run.model):
        router.e_score_correction_bias.zero_()


FORGETS = {
    "nothing": lambda run: None,
    "AdamW's averages": lambda run: run.optimizer.adamw.state.clear(),
    "the place in the data": lambda run: run.stream.load_state_dict(beginning),
    "the gate biases": forget_biases,
    "the tokens seen": lambda run: setattr(run, "tokens", 0),
}


# %%
def all_of(run: Trainer) -> dict[str, Tensor]:
    biases = {f"bias of layer {router.layer}": router.e_score_correction_bias for router in routers(run.model)}
    return {**run.optimizer.tensors(), **biases}


resumed, equal = {}, {}
for what, forget in FORGETS.items():
    run = open_run("killed")
    forget(run)
    resumed[what] = [run.train_step().loss for _ in range(END - STOPPED)]
    ended = all_of(run)
    equal[what] = all(torch.equal(tensor, ended[name]) for name, tensor in all_of(unbroken).items())
    run.stream.close()
    print(f"forgets {what:22} {'equal to the bit' if equal[what] else 'another run'}")
assert equal.pop("nothing") and not any(equal.values())

# %%
from dsv3_mini.viz.figures.pretrain import resume_figure

resume_figure(whole, resumed, STOPPED)

# %% [markdown]
# The line at 0 is the run that forgot nothing. Of the others none raises an error, and most hide in the noise of an
# ordinary curve, where batches differ by more than this. That is why equality is tested to the bit: a tolerance would
# let all of them pass.
#
# Which is the worst? The one that looks best. A run that has lost its *place in the data* reads the same text again. Over
# a long run its training loss gets better for it, and only held-out text tells.
#
# In the package's tests such runs are really killed, by signal 9, at random moments: in the middle of a step, in the
# middle of writing a checkpoint. A checkpoint is therefore written under another name and renamed when it is whole.

# %% [markdown] tags=["interactive"]
# ## The board
#
# Now train, and watch: `nano`, three layers, on stories, sums, code and prose. The button trains until you press it
# again; Python stays free meanwhile (the run has a thread of its own, and goes in steps), so you can run other cells
# while it learns. *One step* takes one. Point at a curve to look into the past: then the two tables show load and bias of
# that moment, and the line below says everything about it. The arrow keys walk, space trains and pauses. The number on
# the right is your machine's: tokens a second.
#
# The whole recipe is stretched to the length that you choose, all five pieces of it. The shortest takes about half a
# minute on one core, the tenfold one minutes.

# %%
from dsv3_mini.viz.widgets.pretrain import TrainingBoard

RUN_TOKENS = 100_000  # 1_000_000 takes minutes and pays for it
board = TrainingBoard(RUN_TOKENS)
board.train(steps=30)
board

# %% [markdown]
# A cell can press the buttons too. This one trains to the end; each measurement on the way takes some held-out rows of
# each domain, lets the model write, and has the grammar of the stories (lesson 03) read every sentence.
#
# **What to expect before you run it.** A model that knows nothing pays about $\ln 4096 = 8.3$ nats for each token. All
# four domains get better, stories and sums first: few words, strict rules. The gradient norm starts high and falls. And
# the biases see to it that no expert is left without work.

# %%
board.train()
history, measured = board.history
first, last = measured[0], measured[-1]
better = {domain: first["bits_per_byte"][domain] > last["bits_per_byte"][domain] for domain in last["bits_per_byte"]}
print("before the first step, nats per token lie within one of ln v:", end=" ")
print(all(abs(loss - math.log(SHAPE.vocab_size)) < 1 for loss in first["validation_loss"].values()))
print("bits per byte fell in every domain:", all(better.values()))
late = {layer: [sum(n) for n in zip(*(line["load"][layer] for line in history[-20:]), strict=True)] for layer in "123"}
least = min(min(load) * len(load) / sum(load) for load in late.values())
print("in the last 20 steps every expert has at least a quarter of an even share:", least > 0.25)
assert board.ended and all(better.values())

# %%
board.figure()

# %% [markdown]
# Read it panel by panel.
#
# - **Loss** and **held-out text** show the same thing in two units. Before the first step all domains cost the same per
#   *token*, about $\ln v$: a model that knows nothing is as wrong about everything. Per *byte* they lie far apart, because
#   a token of a story is a word and one of a sum a digit. Only bytes are the same to every tokenizer, so that models can be
#   compared by them (section 4.4). The dotted line is MTP's loss, which counts only in training.
# - **Judged** asks the grammar, sentence by sentence. The losses fall smoothly from the first step on; this stays near 0
#   for half of the run and then climbs, since a sentence with one wrong word is wrong.
# - **Learning rate** has the five pieces. Compare it with *judged*: the sentences come right while the rate falls.
# - **Gradient norm**: above the line every step is cut; here that is most of the run.
# - **Load**, **bias**, **MaxVio** are lesson 09's. When the loss falls fast, routers change fast, and balance is worst.
#
# Now go back to the top of this notebook. The long run, a hundred times longer, has two more curves in *judged*: questions
# about stories that are answered, and sums that come out. Look at the sums: near 0 for long, while their loss
# falls; then within a few more nearly all of them. And what takes longest is not grammar, but to keep in mind where
# things are.

# %%
from dsv3_mini.viz.figures import png

board.set(step=20)
early = png(board.figure())
board.set(step=-1)
assert png(board.figure()) != early
ran = {line["step"]: line for line in history}
falls = next(line["step"] for line in history if line["gamma"] == 0)
print("the batch grew from", history[0]["batch_size"], "to", history[-1]["batch_size"], "sequences")
print("the biases stand still after gamma became 0:", ran[falls]["bias"] == history[-1]["bias"])
print("lambda at first and at the end:", history[0]["mtp_lambda"], history[-1]["mtp_lambda"])

# %% [markdown]
# ### Who serves whom, before and after
#
# In lesson 08 you saw that the experts of the tiny model have divided the work. Did they before they had learnt
# anything? A fresh router is random, but not blind: the words of sums are few, so the few experts that they happen to
# reach get all of them. Compare the same model at the first step of its run and at the end, on held-out text of each
# domain.
#
# **What we expect.** Random tastes differ from word to word, trained ones from domain to domain: the loads of two
# domains should be farther apart after training, in every layer. *Apart* is lesson 09's: the share of visits that would
# have to move.

# %%
from dsv3_mini.course.pretrain_run import apart, at_the_start, domain_loads, reference_rows

rows = reference_rows(tokenizer)
moments = {"before training": at_the_start(tiny.cfg), "after training": tiny}
loads = {moment: domain_loads(model, rows, tokenizer.pad_id) for moment, model in moments.items()}
before, after = (apart(load) for load in loads.values())
for layer, (b, a) in enumerate(zip(before.tolist(), after.tolist(), strict=True), tiny.cfg.first_k_dense_replace):
    print(f"layer {layer}: two domains are {b:.0%} apart before training, {a:.0%} after")
assert after[-1] > before[-1]

# %% [markdown]
# The last layer does what we expected. Not so the first: there the domains are *nearer* to each other than before. Its
# router reads little more than the word itself, and "the" or a comma is the same word in a story and in prose. What a
# word means where it stands, attention has to bring together, and each layer has more of it. Look at both layers below.

# %%
from dsv3_mini.viz.widgets.pretrain import specialisation_explorer

experts = specialisation_explorer(loads, list(rows), tiny.cfg.first_k_dense_replace)
experts

# %%
picture = experts.picture.value
experts.set(layer=tiny.cfg.first_k_dense_replace, sort=False)
assert experts.picture.value != picture

# %% [markdown]
# ## Find the bug
#
# A batch is too large for the memory, so it goes through in micro-batches: loss and gradient of each, and the gradients
# add up. A colleague writes the losses. Each is a mean; the mean of all is the mean of the means. Is it?

# %%
from torch.nn.functional import cross_entropy

from dsv3_mini.data.packing import IGNORED


def parts_badly(logits: Tensor, targets: Tensor, micro_batch: int) -> list[Tensor]:
    """A loss for each micro-batch of so many rows; their sum is to be the loss of the batch."""
    parts = list(zip(logits.split(micro_batch), targets.split(micro_batch), strict=True))
    flat = [(rearrange(z, "b s v -> (b s) v"), rearrange(t, "b s -> (b s)")) for z, t in parts]
    return [cross_entropy(z, t, ignore_index=IGNORED) / len(parts) for z, t in flat]


# %%
torch.manual_seed(0)
logits, targets = 2 * torch.randn(8, 32, 50), torch.randint(50, (8, 32))
for row, kept in enumerate((32, 32, 32, 32, 32, 32, 4, 1)):
    targets[row, kept:] = IGNORED
for micro_batch in (8, 4, 2, 1):
    total = sum(parts_badly(logits, targets, micro_batch))
    print(f"the same batch, {micro_batch} rows at a time: loss {total:.3f}")

# %% [markdown] tags=["bug"]
# ### Find the bug · The mean of means
# ●●○ · 12 minutes
#
# Four losses for one batch, and four gradients. The last row has one target that counts, the first has 32. With one
# row at a time that single token weighs as much as the 32. In pre-training rows are packed full and the harm is small;
# in fine-tuning, where answers are short and long, it is not. Much-used training code had this bug for years.
#
# Write it as it should be: one loss for each micro-batch, in order, whose sum is the mean over all targets of the
# *batch* that count. `logits` is `[b s v]`, `targets` `[b s]`; the last micro-batch may have fewer rows, and one may be all
# padding.
#
# <details><summary>Hint 1</summary>By what does each part have to be divided so that the parts add up? It is known
# before the first part is computed: it needs no logits.</details>
# <details><summary>Hint 2</summary><code>cross_entropy(..., reduction="sum")</code></details>


# %%
def part_losses(logits: Tensor, targets: Tensor, micro_batch: int) -> list[Tensor]:
    """One loss for each micro-batch, whose sum is the mean over the batch's targets that are not IGNORED."""
    ### BEGIN SOLUTION: the sum of nats of each part, divided by the number of targets that count in the whole batch
    kept = (targets != IGNORED).sum()
    parts = zip(logits.split(micro_batch), targets.split(micro_batch), strict=True)
    flat = [(rearrange(z, "b s v -> (b s) v"), rearrange(t, "b s -> (b s)")) for z, t in parts]
    return [cross_entropy(z, t, ignore_index=IGNORED, reduction="sum") / kept for z, t in flat]
    ### END SOLUTION


# %%
check.part_losses(part_losses)

# %% [markdown]
# In `train_step` above this is `batch_targets=all_targets`. The same count goes through all machines when a batch is
# spread over many. Three relatives of this bug: the balance loss of each part (it has to be weighed by rows, since it is
# a mean over sequences), clipping each part (clip the sum, once), and moving the biases after each part (lesson 09).

# %%
from dsv3_mini.train import losses


def package_parts(logits: Tensor, targets: Tensor, micro_batch: int) -> list[Tensor]:
    head, count = torch.eye(logits.shape[-1]), losses.kept_targets(targets)
    parts = zip(logits.split(micro_batch), targets.split(micro_batch), strict=True)
    return [losses.cross_entropy(z, head, t, count) for z, t in parts]


same(part_losses, package_parts, *[(logits, targets, rows_at_a_time) for rows_at_a_time in (8, 3, 1)])

# %% [markdown] tags=["at-671b"]
# ## At 671B
#
# How many steps is the whole pre-training? Take them, one after the other, as in exercise 2.

# %%
from dsv3_mini.ledger import training_cost

tokens = taken = growing = 0
full = round(report.batch_size(report.total_tokens))
while tokens < report.total_tokens:
    now = round(report.batch_size(tokens))
    growing += now < full
    tokens, taken = tokens + now * 4096, taken + 1
cost = training_cost()
for name, seqs in (("first", round(report.batch_size(0))), ("last", full)):
    in_step = seqs * 4096
    print(f"the {name} step: {in_step / 1e6:.1f} million tokens, {in_step / cost.tokens_per_second:.0f} seconds")
print(f"{taken:,} steps, {growing:,} of them with a growing batch")
warm = report.learning_rate.pieces[0].until
print(f"the 2,000 steps of the warm-up: {warm / 1e9:.1f} billion tokens, {warm / report.total_tokens:.2%} of the run")

# %%
from dsv3_mini.ledger import H800_PEAK, REPORT_RUN, flops_per_token, sustained_flops

large = dsv3.ModelConfig.preset("671b")
print(
    f"{cost.gpu_hours / 1e3:,.0f} thousand hours on {cost.gpus:,} H800: {cost.days:.0f} days, {cost.dollars / 1e6:.2f}M dollars"
)
print(
    f"that is {cost.gpu_hours / REPORT_RUN.hours:.0%} of all hours of the report, and {cost.days_per_trillion:.2f} days a trillion tokens"
)
speed = sustained_flops(flops_per_token(large).train, cost.hours_per_trillion)
print(
    f"a GPU trains {cost.tokens_per_second_per_gpu:,.0f} tokens/s, {speed / 1e12:.0f} TFLOP/s: {speed / H800_PEAK:.0%} of its BF16 peak"
)

# %% [markdown]
# The board says what *your* machine does: with a model six orders of magnitude smaller, a few times as many tokens a
# second as one of those GPUs. Now the plug. What would a checkpoint of this run hold, and what does a failure cost?

# %%
from dsv3_mini.ledger import training_state

state = training_state(large)
print(f"masters in FP32 and AdamW's averages in BF16: {(state.master + state.moments) / 1e12:.1f} TB")
seconds = full * 4096 / cost.tokens_per_second
for every in (100, 1000, 10_000):
    lost = every / 2 * seconds * cost.gpus / 3600
    print(
        f"a checkpoint every {every:>6,} steps ({every * seconds / 3600:4.1f} hours): a failure costs {lost:>6,.0f} GPU hours"
    )

# %% [markdown] tags=["recap"]
# ## Recap
#
# 1. Somebody trains with half of the batch, on the same recipe. The schedules are functions of tokens. What stays as it
#    was, and what does not?
#    <details><summary>Answer</summary>Rate, gamma and lambda are the same at each point of the text. But there are twice
#    as many steps: AdamW's averages reach half as far back in the text, weights decay twice as often, and biases move twice
#    as often (lesson 09). A warm-up that was told in steps, and was translated with the old batch, is now twice as many
#    steps.</details>
# 2. After a resume, the training loss is a little lower than before, and stays so. Good news?
#    <details><summary>Answer</summary>Look at held-out text. If that has not moved, the run has lost its place in the
#    data, and reads again what it knows already.</details>
# 3. A checkpoint holds all parameters of the model. Name four things without which the run does not go on as it was.
#    <details><summary>Answer</summary>AdamW's two averages (and how many steps they are old), the gate biases, which are
#    no parameters, the tokens seen, on which every schedule depends, and the place in the data. With dropout or sampling
#    also the state of the random numbers; and in BF16 the FP32 masters.</details>

# %% [markdown] tags=["next"]
# ## Next
#
# A run of your own that lasts, outlives its terminal, and can be stopped with Ctrl-C is one command: `dsv3 train --preset
# tiny --processes 2`, the same again to go on. Its log can be drawn by `board_figure`, as above.
#
# You have a model, a recipe and a board. Which part of the model brings how much? Lesson 14 takes them away, one at a
# time.
