"""`dsv3 bench generate`: our decoding beside transformers' `generate`, from the same weights and the same prompts.

One model, one machine, one run, in turns, FP32, greedy. Every side writes `new` tokens after the same openings of held-out
stories, for batches of 1 and of 16, and no token stops it:

    dsv3_mini      dsv3.generate(model, prompts, new)
    with MTP       the same with use_mtp=True
    transformers   DeepseekV3ForCausalLM from the same folder: model.generate(prompts, max_new_tokens=new, do_sample=False)

The sides have to write the same tokens, or nothing is reported.

A second race says why MTP gains what it gains: a pass over the drafted tokens and one more, and the making of the drafts (as many
as a pass had on average), beside a pass over one token, for one row. If the pass costs v and the drafts d of such passes, t tokens a pass come t / (v + d)
times as fast.

A third race asks what a longer context costs: one row, one token at a time, beside caches of 256 to 8,192 tokens (of
random numbers: what is in them does not change the work). The bytes that a step must read of the cache grow in proportion to
the context, so a step's time may grow as much, and no more.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from dsv3_mini.bench.machine import describe
from dsv3_mini.bench.race import BenchError, Lap, Side, Step, race, speed_ratio
from dsv3_mini.config import ModelConfig
from dsv3_mini.data import stories
from dsv3_mini.data.shipped import shipped
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.hub import from_pretrained
from dsv3_mini.inference import generate as write
from dsv3_mini.inference.choosing import Greedy, best
from dsv3_mini.inference.sampling import Sampling
from dsv3_mini.inference.settings import Settings
from dsv3_mini.inference.speculative import Drafter
from dsv3_mini.inference.writing import Reader, Writing
from dsv3_mini.ledger import cache_per_token
from dsv3_mini.model import DeepSeekV3

SPEED_BAR, MTP_BAR, MTP_AIM, ACCEPTANCE_BAR = 4.0, 1.5, 1.8, 0.85
BATCHES = (1, 16)
CONTEXTS = (256, 512, 1024, 2048, 4096, 8192)
STEPS = 16  # tokens decoded beside each context


@dataclass(frozen=True)
class Case:
    """One batch. tokens_per_pass: with MTP's drafts. acceptance: of one draft a pass, over the openings of the largest batch."""

    batch: int
    plain: Lap
    mtp: Lap
    theirs: Lap
    acceptance: float
    tokens_per_pass: float

    @property
    def speed(self) -> float:
        """Ours over transformers, in tokens per second."""
        return speed_ratio(self.plain, self.theirs)

    @property
    def gain(self) -> float:
        """With MTP over without, in tokens per second."""
        return speed_ratio(self.mtp, self.plain)


@dataclass(frozen=True)
class DraftCost:
    """STEPS passes over one token, as many over the drafts and the token before them, and STEPS times the drafts; one row."""

    drafts: int
    one: Lap
    verify: Lap
    draft: Lap

    @property
    def verifying(self) -> float:
        """In passes over one token."""
        return speed_ratio(self.one, self.verify)

    @property
    def drafting(self) -> float:
        return speed_ratio(self.one, self.draft)


@dataclass(frozen=True)
class Result:
    """cost: of drafting, for one row. contexts: the lap of `STEPS` tokens beside a cache of so many tokens; token_bytes: of one token in all layers' caches."""

    machine: str
    model: str
    prompt: int
    new: int
    cases: list[Case]
    cost: DraftCost
    contexts: dict[int, Lap]
    token_bytes: int

    @property
    def growth(self) -> float:
        """The time of a token beside the longest context over that beside the shortest."""
        laps = list(self.contexts.values())
        return speed_ratio(laps[0], laps[-1])


def run(
    folder: str | Path | None = None, prompt: int = 24, new: int = 128, drafts: int | None = None, rounds: int = 7,
    threads: int | None = None, batches: tuple[int, ...] = BATCHES, contexts: tuple[int, ...] = CONTEXTS,
) -> Result:  # fmt: skip
    """Measure a model folder (None: the tiny model that ships).

    Raises:
        BenchError: transformers is not installed, a side fails, or two sides write different tokens.
    """
    if find_spec("transformers") is None:
        raise BenchError("bench generate compares with transformers, which is not installed: pip install transformers")
    folder = Path(folder or shipped("tiny"))
    threads = threads or torch.get_num_threads()
    model = from_pretrained(folder).eval()
    settings = Settings(max_new_tokens=new, use_mtp=True, drafts=drafts)
    # The report's rate: of a single draft. Behind a chain of them a pass begins where one was refused, at the hard places.
    single = Settings(max_new_tokens=new, use_mtp=True, drafts=1)
    acceptance = Writing(model, openings(max(batches), prompt), single).finish().counts.acceptance
    cases = []
    for batch in batches:
        shape = dict(folder=str(folder), batch=batch, prompt=prompt, new=new)
        sides = [
            Side("dsv3_mini", f"{__name__}:our_step", shape),
            Side("with MTP", f"{__name__}:our_step", {**shape, "use_mtp": True, "drafts": drafts}),
            Side("transformers", f"{__name__}:their_step", shape),
        ]
        plain, mtp, theirs = race(sides, rounds, threads)
        for lap in (mtp, theirs):
            if lap.values[0] != plain.values[0]:
                raise BenchError(f"batch {batch}: {lap.name} writes other tokens than dsv3_mini does")
        counts = Writing(model, openings(batch, prompt), settings).finish().counts
        cases.append(Case(batch, plain, mtp, theirs, acceptance, counts.tokens_per_pass))
    shape = dict(folder=str(folder), prompt=prompt)
    counts = Writing(model, openings(1, prompt), settings).finish().counts
    drafts = max(1, round(counts.drafts_per_pass))
    sides = [
        Side("a token", f"{__name__}:step_over", {**shape, "tokens": 1}),
        Side("drafts and one more", f"{__name__}:step_over", {**shape, "tokens": 1 + drafts}),
        Side("drafting", f"{__name__}:step_drafting", {**shape, "drafts": drafts}),
    ]
    cost = DraftCost(drafts, *race(sides, rounds, threads))
    sides = [Side(f"{n:,} tokens", f"{__name__}:step_beside", dict(folder=str(folder), context=n)) for n in contexts]
    laps = dict(zip(contexts, race(sides, rounds, threads), strict=True))
    token_bytes = cache_per_token(model.cfg, dtype="fp32").bytes("mla")
    return Result(describe(threads), folder.name, prompt, new, cases, cost, laps, token_bytes)


def render(result: Result) -> str:
    lines = [
        f"Greedy decoding, model {result.model}, FP32: {result.new} tokens after openings of {result.prompt}",
        result.machine,
        "",
        f"{'batch':>5}{'dsv3_mini':>13}{'with MTP':>13}{'transformers':>14}   tokens/s, all rows together",
    ]
    for case in result.cases:
        rates = (case.batch * result.new / lap.median for lap in (case.plain, case.mtp, case.theirs))
        ours, mtp, theirs = (f"{rate:,.0f}" for rate in rates)
        lines.append(f"{case.batch:5}{ours:>13}{mtp:>13}{theirs:>14}")
    lines.append("")
    for case in result.cases:
        lines += [
            f"batch {case.batch}: {case.speed:.2f}x transformers' tokens/s"
            + (f"   bar {SPEED_BAR:.0f}x {_verdict(case.speed >= SPEED_BAR)}" if case.batch == 1 else ""),
            f"   MTP {case.gain:.2f}x that without   bar {MTP_BAR}x {_verdict(case.gain >= MTP_BAR)}, aim {MTP_AIM}x;"
            f" single drafts held {case.acceptance:.0%}   bar {ACCEPTANCE_BAR:.0%} {_verdict(case.acceptance >= ACCEPTANCE_BAR)};"
            f" {case.tokens_per_pass:.2f} tokens a pass",
        ]
    verify, draft = result.cost.verifying, result.cost.drafting
    lines += [
        "",
        f"one row: reading {result.cost.drafts} drafts and one token more costs {verify:.2f} of reading one token, drafting {draft:.2f};",
        f"   so {result.cases[0].tokens_per_pass:.2f} tokens a pass come "
        f"{result.cases[0].tokens_per_pass / (verify + draft):.2f}x as fast as one by one",
    ]
    shortest, longest = min(result.contexts), max(result.contexts)
    lines += ["", f"{'context':>9}{'cache':>12}{'a token':>12}   one row"]
    for context, lap in result.contexts.items():
        size, milliseconds = context * result.token_bytes / 1e6, lap.median / STEPS * 1e3
        lines.append(f"{context:9,}{size:9,.2f} MB{milliseconds:9,.2f} ms")
    lines.append(
        f"from {shortest:,} to {longest:,} tokens the cache's bytes grow {longest / shortest:.0f}x, a token's time "
        f"{result.growth:.1f}x   bar: no more {_verdict(result.growth <= longest / shortest)}"
    )
    return "\n".join(lines)


def openings(batch: int, length: int) -> Int[Tensor, "b s"]:
    """The first `length` tokens of held-out stories, the token that begins a document included."""
    tokenizer, rows, index = Tokenizer.shipped(), [], 0
    while len(rows) < batch:
        ids = [tokenizer.eos_id, *tokenizer.encode(stories.generate_story(stories.HELD_OUT_SEED, index).text)]
        index += 1
        if len(ids) >= length:
            rows.append(ids[:length])
    return torch.tensor(rows)


def _verdict(met: bool) -> str:
    return "met" if met else "NOT met"


# ---- the sides; each runs in a process of its own ----------------------------------------------------------------------


def our_step(
    folder: str, batch: int, prompt: int, new: int, use_mtp: bool = False, drafts: int | None = None
) -> Step:  # fmt: skip
    model, prompts = from_pretrained(folder, mtp=use_mtp).eval(), openings(batch, prompt)
    return lambda: checksum(write(model, prompts, new, use_mtp=use_mtp, drafts=drafts), prompt + new)


def their_step(folder: str, batch: int, prompt: int, new: int) -> Step:
    """transformers, as its documentation generates."""
    from transformers import AutoModelForCausalLM

    model, prompts = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), openings(batch, prompt)
    mask = torch.ones_like(prompts)

    def step() -> float:
        tokens = model.generate(
            input_ids=prompts,
            attention_mask=mask,
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return checksum(tokens, prompt + new)

    return step


def step_over(folder: str, prompt: int, tokens: int) -> Step:
    """`STEPS` passes over so many tokens, each behind the same opening, and the likeliest token behind each."""
    model, opening = from_pretrained(folder, mtp=False).eval(), openings(1, prompt)
    reader, read = _read_opening(model, opening, tokens)

    @torch.inference_mode()
    def step() -> float:
        for _ in range(STEPS):
            chosen = best(reader.logits(reader.read(read)))
            reader.keep([0])
        return float(sum(chosen[0]))

    return step


def step_drafting(folder: str, prompt: int, drafts: int) -> Step:
    """`STEPS` times the drafts behind the same opening, as they are made after a pass whose drafts all held."""
    model, opening = from_pretrained(folder).eval(), openings(1, prompt)
    reader, read = _read_opening(model, opening, 1 + drafts)
    drafter = Drafter(model, drafts, 1, prompt + STEPS, reader.few)
    text, greedy = opening[0].tolist(), Greedy(Sampling(), [[]], model.cfg.vocab_size, opening.device)
    with torch.inference_mode():
        states = reader.read(read)
        drafter.draft([text], model.main_states(opening)[0], [prompt], text[:1], drafts, greedy)
    held, carried = [cache.lengths for cache in drafter.caches], drafter.carried

    @torch.inference_mode()
    def step() -> float:
        for _ in range(STEPS):
            drafted = drafter.draft(read.tolist(), states, [1 + drafts], text[:1], drafts, greedy)
            drafter.carried = carried
            for cache, length in zip(drafter.caches, held, strict=True):
                cache.truncate(length)
        return float(sum(drafted.tokens[0]))

    return step


@torch.inference_mode()
def _read_opening(
    model: DeepSeekV3, opening: Int[Tensor, "1 s"], tokens: int
) -> tuple[Reader, Int[Tensor, "1 tokens"]]:
    """A reader that has read it, and so many tokens to read next: the same again, from its beginning."""
    reader = Reader.with_room(model, 1, opening.shape[1] + tokens)
    reader.read(opening)
    reader.keep([opening.shape[1]])
    return reader, opening.repeat(1, tokens)[:, :tokens]


def step_beside(folder: str, context: int) -> Step:
    """`STEPS` tokens, one after the other, with `context` tokens in the cache before the first."""
    cfg = ModelConfig.from_hf(folder).replace(max_position_embeddings=context + STEPS)
    model = from_pretrained(folder, mtp=False).eval()
    model.cfg = cfg.replace(
        num_nextn_predict_layers=0
    )  # the tiny model's context is shorter: here only the time matters
    reader = Reader.with_room(model, 1, context + STEPS)
    torch.manual_seed(0)
    for layer in reader.cache:
        layer.extend(torch.randn(1, context, cfg.kv_lora_rank), torch.randn(1, context, cfg.qk_rope_head_dim))
    reader.keep([context])
    tokens = torch.arange(STEPS)[:, None, None] % cfg.vocab_size

    @torch.inference_mode()
    def step() -> float:
        for token in tokens:
            states = reader.read(token)
            model.lm_head(states)
            reader.keep([1])
        reader.lengths = [context]
        reader.keep([0])
        return float(states.norm())

    return step


def checksum(tokens: Int[Tensor, "b s"], length: int) -> float:
    """One number for all tokens, if each row has `length` of them."""
    if tokens.shape[1] != length:
        raise BenchError(f"rows of {tokens.shape[1]} tokens were written instead of {length}")
    return float(zlib.crc32(tokens.to(torch.int64).contiguous().numpy().tobytes()))
