# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   dsv3:
#     title: Speculative decoding
#     minutes: 85
#     after: [07_kv_cache, 11_mtp]
#     builds: a lossless rule for drafted tokens, greedy and drawn, what it saves, and a cache that forgets
#     tracks: [two-days, term]
# ---

# %% [markdown] tags=["why"]
# # 22 · Speculative decoding
#
# A model writes one token a pass, and reads all of its weights for it. Reading is what takes the time, and it could feed
# more than one token. If only the next ones were known! So let somebody guess them: a small **drafter** writes a few
# tokens ahead, the model reads them all in *one* pass, keeps those that it would have written itself, and goes on from
# there. The drafter is the MTP module of lesson 11, which has been trained to say the second token all along.
#
# In this lesson you build the rule that decides which drafts stay. It has to be **lossless**: the text is just what the
# model alone would have written, at temperature 0 token for token, and drawn at random with the same distribution. You
# prove that, test it, count what it saves, and find out where a pass over two tokens costs as much as a pass over one.
#
# Here the course's trained model writes. Each pass gives the drafts that were accepted, and one token of its own.

# %%
import torch

import dsv3_mini as dsv3
from dsv3_mini.data.shipped import shipped
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.inference.watching import watch
from dsv3_mini.viz.figures.marked_text import marked_text_figure
from dsv3_mini.viz.widgets.speculative import marked

model, tokenizer = dsv3.from_pretrained(shipped("tiny")).eval(), Tokenizer.shipped()
opening = "One rainy morning, Nora"
prompt = [tokenizer.eos_id, *tokenizer.encode(opening)]
passes = list(watch(model, prompt, max_new_tokens=60, stop_id=tokenizer.eos_id, use_mtp=True))

# %%
words, kinds = marked(tokenizer, passes)
written = sum(len(each.written) for each in passes)
marked_text_figure([opening, *words], ["given", *kinds], f"{written} tokens in {len(passes)} passes")

# %% [markdown] tags=["paper"]
# ## In the report
#
# Section 2.2 says what MTP modules are for after training: they may be thrown away, or be used for speculative decoding.
# Section 5.4.3 measures it: between 85% and 90% of the second tokens are accepted, over topics of all kinds, and decoding
# becomes 1.8 times as fast, in tokens per second. The rule itself is older (Leviathan and others, 2023, and Chen and
# others, 2023). With $p(x)$, what the model says of token $x$, and $q(x)$, what the drafter said when it drew the draft:
#
# | what | rule |
# |---|---|
# | greedy | a draft holds if it is the model's likeliest token |
# | drawn | draft $x$ holds with probability $\min(1,\ p(x)/q(x))$ |
# | a draft falls | the token in its place is drawn from $\max(p - q, 0)$, divided by its sum: the **residual** |
# | all hold | one more token comes from the model's last prediction, for nothing |
# | tokens per pass | $1 + a_1 + a_1 a_2 + \dots$, where $a_j$ is the share of drafts $j$ that hold where those before them held |
#
# Speed is tokens per pass, divided by what a pass with drafts costs more than a plain one. Both matter.

# %% [markdown] tags=["naive"]
# ## The naive way
#
# Why can one pass judge several drafts? A model that reads a text predicts the next token at *every* position of it, and
# attention is causal: a position does not see what stands behind it. So what it says behind the text, with drafts that
# follow, is what it would say without them. Draft two tokens, put them behind the text, and read once:

# %%
text = torch.tensor([prompt + [token for each in passes[:6] for token in each.written]])
with torch.no_grad():
    alone = model(text).logits[0, -1]
    wild_guess = torch.tensor([[5, 9]])
    together = model(torch.cat([text, wild_guess], dim=1)).logits[0]
print("behind the text, with and without two tokens after it: equal", torch.allclose(together[-3], alone, atol=1e-4))
print("predictions that the pass has made beside it:", 2)
assert torch.allclose(together[-3], alone, atol=1e-4)

# %% [markdown]
# The naive rule would be: draft, look whether the draft is *plausible*, and keep it if so. That is faster still, and
# wrong: it changes what is written, in a way that nobody notices in a single text. A model that was judged by its answers
# must not answer differently because it is in a hurry.
#
# Now build the rule that changes nothing.

# %%
from torch import Tensor

from dsv3_mini.course.checks import lesson_22 as check
from dsv3_mini.course.lesson import same, show_source

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Up to the first refusal
# ●●○ · 12 minutes
#
# At temperature 0. `drafts` are `j` drafted tokens of each row, `[b j]`. The model has read the newest token and then all
# drafts, so that `logits` is `[b j+1 v]`: `logits[:, 0]` says what it wants in the place of draft 0, `logits[:, 1]` in the
# place of draft 1 (if draft 0 stands before it), and the last what follows all of them.
#
# Give two tensors `[b]`: how many drafts hold in each row, and the token that comes after those. A draft holds if it is the
# model's likeliest token, and all drafts before it hold.
#
# <details><summary>Hint 1</summary>Drafts that hold are the leading ones of <code>drafts == best[:, :-1]</code>.
# <code>cumprod</code> of ones and zeros stays 1 up to the first 0.</details>
# <details><summary>Hint 2</summary>The next token is the model's likeliest at place <code>held</code>, a place of its own
# in each row: <code>best[torch.arange(len(best)), held]</code>.</details>


# %%
def verify_greedy(drafts: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """drafts [b j], logits [b j+1 v] -> how many hold [b], and the token that comes after those [b]."""
    ### BEGIN SOLUTION: the likeliest token everywhere; count the leading drafts that are it; take the one at that place
    best = logits.argmax(dim=-1)
    held = (drafts == best[:, :-1]).long().cumprod(dim=1).sum(dim=1)
    return held, best[torch.arange(len(best)), held]
    ### END SOLUTION


# %%
check.verify_greedy(verify_greedy)

# %% [markdown]
# Text that is drawn is harder. Say that the model gives "lamp" and "scarf" one half each, and the drafter always says
# "lamp". Keeping every "lamp" writes too many of them. Keeping none wastes the draft. Half of the time is right: keep "lamp"
# every second time, and say "scarf" otherwise. In general, over a few tokens:

# %%
from dsv3_mini.viz.figures.speculative import rule_figure

things = ["lamp", "scarf", "pouch", "ball", "boot"]
p = torch.tensor([0.40, 0.25, 0.20, 0.10, 0.05])  # the model
q = torch.tensor([0.60, 0.10, 0.22, 0.03, 0.05])  # the drafter
rule_figure(things, p.tolist(), q.tolist())

# %% [markdown]
# The drafter offers $x$ with probability $q(x)$. If we keep it with probability $\min(1, p(x)/q(x))$, then
# $q(x) \min(1, p(x)/q(x)) = \min(p(x), q(x))$ of all passes end with this draft kept: the green part. What falls is the
# hatched part, $\sum_x \max(q - p, 0)$. What is lacking is the blue part, $\sum_x \max(p - q, 0)$. Since $p$ and $q$ both
# sum to 1, the two are equal. So draw the replacement from the blue part, made whole, and every token has its $p$:
#
# $$ \min(p, q) + \underbrace{\textstyle\sum \max(q - p, 0)}_{\text{how often a draft falls}} \cdot
#    \frac{\max(p - q, 0)}{\sum \max(p - q, 0)} \;=\; \min(p, q) + \max(p - q, 0) \;=\; p $$
#
# That is the whole proof. It asks nothing of $q$: a bad drafter costs time, never the text.

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · The verdict on a drawn draft
# ●●○ · 12 minutes
#
# `p` and `q` are distributions over the vocabulary, `[v]`, and `draft` is a token that was drawn from `q`. Give the
# probability with which it is kept, a number, and the distribution `[v]` that the token in its place is drawn from if it
# falls. Where `p` and `q` are the same nothing ever falls, and the residual is all zeros: give `p` then.
#
# <details><summary>Hint 1</summary>A probability is at most 1: <code>min(1.0, ...)</code>.</details>
# <details><summary>Hint 2</summary><code>(p - q).clamp(min=0)</code>, divided by its sum, unless that is 0.</details>


# %%
def verdict(p: Tensor, q: Tensor, draft: int) -> tuple[float, Tensor]:
    """p, q [v], draft drawn from q -> how likely it is kept, and the distribution [v] of what replaces it."""
    ### BEGIN SOLUTION: the ratio of the two at the draft, at most 1; what q lacks of p, made whole (p, where it lacks nothing)
    keep = min(1.0, float(p[draft] / q[draft]))
    lacking = (p - q).clamp(min=0)
    return keep, lacking / lacking.sum() if lacking.sum() > 0 else p
    ### END SOLUTION


# %%
check.verdict(verdict)

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · Tokens per pass
# ●○○ · 8 minutes
#
# A pass gives one token at least. `acceptances[0]` is the share of first drafts that hold, `acceptances[1]` the share of
# second drafts that hold *where the first one held*, and so on. How many tokens does a pass give, on average?
#
# <details><summary>Hint 1</summary>Two drafts are kept in a share a1 a2 of all passes. Each draft adds one token in the
# passes in which it is kept.</details>


# %%
def tokens_per_pass(acceptances: list[float]) -> float:
    """Shares of drafts that hold, each where those before it held -> tokens that a pass gives on average."""
    ### BEGIN SOLUTION: one, and for each draft the product of the shares up to it
    tokens = kept_so_far = 1.0
    for share in acceptances:
        kept_so_far *= share
        tokens += kept_so_far
    return tokens
    ### END SOLUTION


# %%
check.tokens_per_pass(tokens_per_pass)

# %% [markdown] tags=["package"]
# ## The package's own
#
# `Greedy.verify` is your first exercise. `Drawn.verify` is the second for whole batches and several drafts: `uniform * q <
# p` throws the coin without dividing, and where all drafts hold, $q$ is 0 behind the last of them, so that the "residual"
# is $p$ itself. `missing` leaves the dividing to the dice, which take any weights.

# %%
from dsv3_mini.inference.choosing import Drafted, Drawn, Greedy, missing
from dsv3_mini.inference.sampling import Sampling

show_source(Greedy.verify, Drawn.verify, missing)


# %%
def package_greedy(drafts, logits):
    greedy = Greedy(Sampling(), [[]] * len(drafts), logits.shape[-1], torch.device("cpu"))
    return tuple(map(torch.tensor, greedy.verify(logits, Drafted(drafts.tolist(), []))))


torch.manual_seed(0)
logits = torch.randn(64, 4, 3)
same(verify_greedy, package_greedy, (torch.randint(3, (64, 3)), logits), (logits[:, :-1].argmax(-1), logits))


# %%
def package_verdict(p, q, draft):
    lacking = missing(p[None], q[None])[0]
    return min(1.0, (p[draft] / q[draft]).item()), lacking / lacking.sum()


pairs = torch.randn(4, 2, 50).mul(2).softmax(-1)
same(verdict, package_verdict, *[(p_, q_, int(q_.argmax())) for p_, q_ in pairs], (p, p.clone(), 0))

# %% [markdown]
# And the drafts? `Drafter` runs the chain of lesson 11 on the model's *own* text: depth 1 reads the newest token beside
# the state before it. A released model has one depth. Whoever wants more drafts lets the last module go on, beside its own
# states, which pre-training never showed it. So the course's model went to school once more (`train/draft_chain.py`): the
# main model rests, the module drafts four tokens behind every place of a text, and learns to say what the main model says
# there. Here is what became of it on the openings of eight stories that the model has not seen, greedy. `Counts` says of
# each draft how often it was judged and how often it held.

# %%
from dsv3_mini.data.stories import HELD_OUT_SEED, generate_story
from dsv3_mini.inference.settings import Settings
from dsv3_mini.inference.writing import Counts, Writing

stories = [generate_story(HELD_OUT_SEED, number).text for number in range(8)]
openings = [[tokenizer.eos_id, *tokenizer.encode(story)][:16] for story in stories]


def counted(drafts: int | None) -> Counts:
    settings = Settings(max_new_tokens=64, stop_id=tokenizer.eos_id, use_mtp=True, drafts=drafts)
    return Writing(model, openings, settings).finish().counts


# %%
from dsv3_mini.viz.figures.speculative import tokens_per_pass_figure


def expected(counts: Counts) -> float:
    """1 + a1 + a1 a2 + ..., with the acceptances that were counted."""
    shares = torch.tensor([counts.acceptance_at(depth + 1) for depth in range(len(counts.checked))])
    return 1 + shares.cumprod(0).sum().item()


by_drafts = {drafts: counted(drafts) for drafts in (1, 2, 3, 4)}
tokens_per_pass_figure(
    {n: c.tokens_per_pass for n, c in by_drafts.items()}, {n: expected(c) for n, c in by_drafts.items()}
)

# %%
print(f"one draft: {by_drafts[1].acceptance:.0%} of them hold, {by_drafts[1].tokens_per_pass:.2f} tokens a pass")
for depth in (2, 3, 4):
    share = by_drafts[4].acceptance_at(depth)
    print(f"draft {depth} of four holds in {share:.0%} of the passes in which those before it do")
assert by_drafts[1].acceptance > 0.85 and min(by_drafts[4].acceptance_at(depth) for depth in (2, 3, 4)) > 0.8
assert all(0.9 < c.tokens_per_pass / expected(c) <= 1.001 for c in by_drafts.values())

# %% [markdown]
# The formula says a little more than was counted, for a text ends in the middle of a pass. Each further draft gives less:
# what a fourth one adds is the product of four shares. And without the school? `python -m dsv3_mini.train.draft_chain`
# prints from its first step on how often each depth agrees with the main model; at first the second one does about half as
# often as the first.
#
# How many drafts should a pass have, then? That depends on the place: the rest of a name that has begun is certain, and
# what the next sentence is about is not. The module knows: it says with which share it drafts. Who asks for no number gets
# a chain that goes on while the shares of its drafts, multiplied, are a half or more.


# %%
def alone(drafts: int | None) -> tuple[float, float, float]:
    """Drafts a pass, tokens a pass, and the share of the drafts that held, of the eight texts one by one."""
    settings = Settings(max_new_tokens=64, stop_id=tokenizer.eos_id, use_mtp=True, drafts=drafts)
    each = [Writing(model, [opening], settings).finish().counts for opening in openings]
    passes, tokens, drafted = (sum(getattr(c, name) for c in each) for name in ("passes", "tokens", "drafted"))
    return drafted / passes, tokens / passes, sum(sum(c.held) for c in each) / drafted


for name, drafts in (("four in each pass", 4), ("while likely", None)):
    made, gained, share = alone(drafts)
    print(f"{name:18} {made:.2f} drafts and {gained:.2f} tokens a pass; {share:.0%} of the drafts hold")
assert alone(None)[2] > alone(4)[2]

# %% [markdown] tags=["experiment"]
# ## Experiment: is it lossless?
#
# A proof is about the rule, not about the code. First find a place where the two disagree: in stories that the model has not
# seen, positions whose token is nearly certain (so that most texts come by it), and behind which $p$ and $q$ share about
# half of their mass. 600 texts are then begun with the same words, and drawn at temperature 1 with drafts. In those that
# came by the certain token, the token after it was *drafted*, and about half of the drafts should have fallen.
#
# **What we expect.** The counts could come from $p$, what the model says there in one plain pass: Pearson's chi-square
# test, over classes of tokens that each are expected at least 10 times, gives a chance above 1%. The same test has to be
# able to say no. So it also judges two tempting rules, with the same $p$ and $q$: *keep the draft if it is the likeliest
# token, else draw from $p$*, and *keep with $\min(1, p/q)$, else draw from $p$* instead of the residual. We expect both to
# be refused, at a chance below one in a thousand. If the right rule fails or a wrong one passes, then the code is broken
# or the test is.

# %%
rows = torch.tensor([[tokenizer.eos_id, *tokenizer.encode(story)][:32] for story in stories])
with torch.no_grad():
    read = model(rows)
said, drafted = read.logits.double().softmax(-1), read.mtp_logits[0].double().softmax(-1)
shared = torch.minimum(said[:, 1:], drafted).sum(-1)  # at [b, i]: what both give to the token after token i + 1
certain = said[:, :-1].gather(-1, rows[:, 1:, None])[..., 0] > 0.7
place = (shared - 0.5).abs().masked_fill(~certain, 1.0).argmin().item()
row, i = divmod(place, shared.shape[1])
p, q = said[row, i + 1], drafted[row, i]
print("p and q share between 30% and 70%:", 0.3 < shared[row, i].item() < 0.7)

# %%
dice = torch.Generator().manual_seed(1)
settings = Settings(max_new_tokens=3, temperature=1.0, use_mtp=True, drafts=1, generator=dice)
drawn = Writing(model, [rows[row, : i + 1].tolist()] * 600, settings).finish()
came_by = rows[row, i + 1].item()
after = torch.tensor([tokens[1] for tokens in drawn.rows if tokens[0] == came_by])
print("more than 400 of 600 texts came by the certain token:", len(after) > 400)
print("between 30% and 70% of the drafts held:", 0.3 < drawn.counts.acceptance < 0.7)


# %%
def chance(tokens: Tensor) -> float:
    """How likely a sample from p is at least so far off: tokens in classes of 10 expected or more, the rest together."""
    order = p.argsort(descending=True)
    classes = order[p[order] * len(tokens) >= 10]
    counts = (tokens == classes[:, None]).sum(1)
    counts = torch.cat([counts, (len(tokens) - counts.sum())[None]])
    wanted = torch.cat([p[classes], 1 - p[classes].sum()[None]]) * len(tokens)
    chi2 = ((counts - wanted).square() / wanted).sum()
    return 1 - torch.special.gammainc(torch.tensor(len(classes) / 2).double(), chi2 / 2).item()


# %%
def by_rule(keeps, instead, count: int = 4000) -> Tensor:
    """Tokens that a rule lets come: keeps(draft, coin) [n] bool, instead [v] the weights of the replacement."""
    dice = torch.Generator().manual_seed(2)
    drafts = torch.multinomial(q, count, replacement=True, generator=dice)
    coin = torch.rand(count, generator=dice, dtype=torch.float64)
    replaced = torch.multinomial(instead, count, replacement=True, generator=dice)
    return torch.where(keeps(drafts, coin), drafts, replaced)


# %%
def lossless(draft: Tensor, coin: Tensor) -> Tensor:
    return coin * q[draft] < p[draft]


chances = {
    "the package, on the whole model": chance(after),
    "min(1, p/q), else the residual": chance(by_rule(lossless, (p - q).clamp(min=0))),
    "the likeliest, else p": chance(by_rule(lambda draft, _: draft == p.argmax(), p)),
    "min(1, p/q), else p": chance(by_rule(lossless, p)),
}
for rule, c in chances.items():
    print(f"{rule:32} {'could come from p' if c > 0.01 else 'is something else' if c < 0.001 else 'undecided'}")
right, rule, greedy_rule, from_p = chances.values()
assert min(right, rule) > 0.01 and max(greedy_rule, from_p) < 0.001

# %% [markdown]
# Neither wrong rule looks wrong. Their texts read well; they are a little less varied, or say a little too often what the
# drafter likes. A test of the distribution is what tells them apart.
#
# ## What does a pass over two tokens cost?
#
# Tokens per pass are half of the story. The other half is a race between two peaks (lesson 07): a pass takes as long as its
# products, or as long as the bytes that it reads, whichever is longer. Where weights are read for one row only, two tokens
# read the same bytes as one. Is the second token free, then? The ledger counts it for the full model on one large machine
# with an H800's peaks.

# %%
from dsv3_mini.ledger.decode import H800, decode_step
from dsv3_mini.viz.figures.speculative import pass_cost_figure

large = dsv3.ModelConfig.preset("671b")
BATCHES = (1, 4, 16, 64, 256, 1024, 4096)


def price(batch: int, context: int) -> float:
    """Time of a pass over two new tokens in each row, as a multiple of a pass over one."""
    one, two = (sum(w.seconds(H800) for w in decode_step(large, batch, context, new)) for new in (1, 2))
    return two / one


curves = {f"{context:,} tokens of context": [price(b, context) for b in BATCHES] for context in (1024, 4096, 32768)}
pass_cost_figure(BATCHES, curves, "The second token is cheapest in the middle")

# %% [markdown]
# Three regions, and only the middle one is nearly free.
#
# - **Few rows.** A dense model's second token would cost nothing here. In a mixture of experts it wakes experts of its own:
#   one token visits 8 of 256, two visit almost 16, and those weights have to be read as well.
# - **Some hundreds of rows.** All experts are awake anyway, and every weight is read once, for all.
# - **Thousands of rows, or long contexts.** Now the products take the time, and two tokens make twice as many. Absorbed
#   attention is the first to get there: its 128 heads share one latent, so that it does many products for each byte.

# %%
one, two = (decode_step(large, 256, 4096, new) for new in (1, 2))
for a, b in zip(one, two, strict=True):
    print(
        f"{a.name:24} {b.seconds(H800) / a.seconds(H800):.2f} times as long, limited by {a.limit(H800)} -> {b.limit(H800)}"
    )

# %% [markdown]
# And on the machine in front of you? A processor has few products for each byte too, but its caches hold a small model
# whole, and a call of a kernel costs as much as what it computes. Whether two tokens are nearly free there is a question for
# a clock, and no clock belongs into a lesson whose results should be the same twice. `dsv3 bench generate` asks it: with
# drafts and without, in turns.

# %% [markdown] tags=["interactive"]
# ## Drafts as they come
#
# Each step of *passes* is one pass of the model. Green was drafted and accepted; yellow is the model's own, one in each
# pass; what was refused is struck through, in front of what stands in its place. Below is the speed that it makes.
#
# - Raise *drafts a pass*. Which words still hold when three were guessed? What is refused first?
# - Raise the *temperature*. What is drawn is less certain, for the drafter as well.
# - Raise the *price of a pass with drafts*. When is it better to draft nothing at all?

# %%
from dsv3_mini.viz.widgets.speculative import draft_explorer, judged

explorer = draft_explorer(model, tokenizer, opening)
explorer

# %%
before = explorer.picture.value
explorer.set(passes=20, drafts=3)
assert explorer.picture.value != before
one, three = (
    list(watch(model, prompt, max_new_tokens=72, stop_id=tokenizer.eos_id, use_mtp=True, drafts=drafts))
    for drafts in (1, 3)
)
print("with three drafts fewer passes write the text:", len(three) < len(one))
print("drafts that held, of those that were judged:  ", *judged(three))
assert len(three) < len(one)

# %% [markdown]
# You can also talk with the model. It was not trained to chat; it knows stories with questions behind them. A line that
# ends in a question mark is put as such a question, any other line is told on from.

# %%
from dsv3_mini.viz.widgets.chat import Chat

chat = Chat(model, tokenizer, story="One rainy morning, Nora had a red lamp. Nora gave the lamp to Tom.")
answer = chat.say("Who has the lamp?")
chat

# %%
chat.set(temperature=0.0)
with_drafts = chat.text
chat.set(drafts=0)
assert chat.text == with_drafts
print("at temperature 0 the answer is the same without drafts:", chat.text == with_drafts)

# %% [markdown]
# ## Find the bug
#
# A friend has built it all: drafts, verdict, latent cache. The first words are fine. Then the text goes astray, and the
# stranger the more drafts fall. The pass reads, in each row, the newest token and then the drafts. The friend's function
# says how many tokens each row's cache keeps afterwards.


# %%
def friends_kept(before: list[int], drafts: int, held: list[int]) -> list[int]:
    """Lengths of the rows' caches before the pass, drafts in it, drafts that hold [b] -> lengths to keep [b]."""
    return [length + 1 + drafts for length in before]  # everything that was read


# %%
@torch.no_grad()
def greedy_with(kept, new: int = 40) -> list[int]:
    """Greedy text with one *random* draft a pass, which nearly always falls; `kept` says what the cache keeps."""
    dice, row = torch.Generator().manual_seed(0), list(prompt)
    cache = LatentCache.for_model(model.cfg, 1, 256, torch.float32, torch.device("cpu"))
    row.append(int(model(torch.tensor([row]), cache=cache).logits[0, -1].argmax()))
    while len(row) < len(prompt) + new:
        length = cache[0].length
        draft = torch.randint(model.cfg.vocab_size, (1, 1), generator=dice)
        logits = model(torch.cat([torch.tensor([row[-1:]]), draft], dim=1), cache=cache).logits
        held, token = package_greedy(draft, logits)
        row += [*draft[0, : held[0]].tolist(), int(token)]
        for layer in cache:
            layer.truncate(kept([length], 1, held.tolist()))
    return row[: len(prompt) + new]


# %%
from dsv3_mini.inference.cache import LatentCache

plain = dsv3.generate(model, torch.tensor([prompt]), 40)[0].tolist()
astray = greedy_with(friends_kept)
agree = next((place for place, pair in enumerate(zip(plain, astray, strict=True)) if pair[0] != pair[1]), len(plain))
print("the friend's text is that of plain decoding:", astray == plain)
print("it leaves it early, within 20 new tokens:   ", agree < len(prompt) + 20)
assert agree < len(prompt) + 20

# %% [markdown] tags=["bug"]
# ### Find the bug · Ghosts in the cache
# ●●○ · 10 minutes
#
# Nothing raised an error. The words that fell are still in the cache, and later tokens look at them as if they had been
# written. Write the function as it should be: `before` are the tokens in each row's cache before the pass, `drafts` how many
# were drafted in it, `held` how many of them hold in each row. A row's first `kept` tokens stay; what lies behind is
# written over.
#
# <details><summary>Hint 1</summary>What does a pass read in a row? Which of that is certain once the verdict is
# there?</details>
# <details><summary>Hint 2</summary>The token that the model puts after the drafts that hold has not been read yet: it is the
# first that the next pass reads.</details>


# %%
def kept(before: list[int], drafts: int, held: list[int]) -> list[int]:
    """Lengths of the rows' caches before the pass, drafts in it, drafts that hold [b] -> lengths to keep [b]."""
    ### BEGIN SOLUTION: the newest token is certain, and so are the drafts that hold, in each row its own
    return [length + 1 + count for length, count in zip(before, held, strict=True)]
    ### END SOLUTION


# %%
check.kept(kept)


# %%
def text_of_yours(new: int) -> list[int]:
    """The friend's loop with your function."""
    return greedy_with(kept, new)


same(text_of_yours, lambda new: plain[: len(prompt) + new], (24,))

# %% [markdown]
# Forgetting is one number for each row: in lesson 07's cache a slot is a position, and what lies beyond a row's length is
# seen by nobody. MTP's own cache forgets in the same way, what it had read of drafts that fell.

# %% [markdown] tags=["at-671b"]
# ## At 671B
#
# The report accepts 85% to 90% of the second tokens and gains a factor of 1.8. Do these fit together? One draft gives $1 +
# a$ tokens a pass. So the price of a pass with a draft, the MTP module's own work included, has been:

# %%
for a in (0.85, 0.90):
    print(
        f"{a:.0%} accepted: {1 + a:.2f} tokens a pass, 1.8 times as fast: a pass costs {(1 + a) / 1.8:.3f} plain ones"
    )

# %% [markdown]
# Three to six per cent more than a plain pass. What does the ledger say? A draft costs one more layer and one more pass
# through the head (the module reads the newest token beside a state), and the main model reads two tokens. The report's
# decode unit, 320 GPUs with 80 groups of rows, comes from lesson 23's `serving`: its rates are peaks, so take the shares,
# not the seconds.

# %%
from dsv3_mini.ledger import count_parameters
from dsv3_mini.serving.cost import UnitCost
from dsv3_mini.serving.unit import DECODE

unit, counts = UnitCost(large, DECODE), count_parameters(large)
layer_share = 1 / large.num_hidden_layers
print(f"MTP module: {counts.mtp_unique / counts.main:.1%} of the weights, {layer_share:.1%} of the layers")
for rows_each in (8, 32, 64, 128):
    rows = rows_each * DECODE.dp
    verify = unit.decode(rows, rows * 4096, new=2) / unit.decode(rows, rows * 4096, new=1)
    cost = verify + layer_share
    gains = [f"{(1 + a) / cost:.2f}" for a in (0.85, 0.90)]
    print(f"{rows_each:4} rows a group of 4 GPUs: a pass costs {cost:.2f}, speed {' to '.join(gains)}")

# %% [markdown]
# With few rows on each group the ledger agrees with the report: about 1.8. The more rows, the dearer the second token, for
# attention over the cache passes from waiting for memory to computing. There the gain in tokens per second shrinks, and
# what is left of it is mostly a shorter wait for each reader. Whoever serves many has to choose: a larger batch or drafts.

# %% [markdown] tags=["recap"]
# ## Recap
#
# 1. The drafter is replaced by one that draws tokens evenly from the whole vocabulary. What becomes of the text, and of its
#    speed?
#    <details><summary>Answer</summary>The text keeps its distribution: the proof asks nothing of q. Nearly all drafts fall,
#    so that a pass gives one token and costs more than a plain one: it is slower than without drafts.</details>
# 2. Of two drafts the first holds in 90% and the second in 50% of the passes in which the first does. How many tokens does a
#    pass give?
#    <details><summary>Answer</summary>1 + 0.9 + 0.9 * 0.5 = 2.35.</details>
# 3. Why does a second token cost more at batch 1 than at batch 256 in DeepSeek-V3, and not in a dense model?
#    <details><summary>Answer</summary>It visits experts of its own, whose weights nobody else has read. At batch 256 all
#    experts have been read anyway. In a dense model every token reads the same weights.</details>

# %% [markdown] tags=["next"]
# ## Next
#
# One model, one text at a time, as fast as it goes. Lesson 23 serves thousands of readers: where experts lie, who reads
# prompts and who writes, and what a service of hundreds of GPUs gives in tokens per second.
