"""The ledger against the published figures, against built models (ours and transformers'), and against counted FLOPs."""

import copy
import json
import math
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from dsv3_mini import ledger as books
from dsv3_mini.config import PRESETS, ModelConfig
from dsv3_mini.errors import ConfigError
from dsv3_mini.model import DeepSeekV3

RELEASED = ModelConfig.preset("671b")
PARAMETERS = books.count_parameters(RELEASED)


# ---- the released model, figure by figure ----------------------------------------------------------------------------

PUBLISHED_PARAMETERS = {
    "q_a": (PARAMETERS.attention["q_a"], 11_010_048),
    "q_norm": (PARAMETERS.attention["q_norm"], 1_536),
    "q_b": (PARAMETERS.attention["q_b"], 37_748_736),
    "kv_a": (PARAMETERS.attention["kv_a"], 4_128_768),
    "kv_norm": (PARAMETERS.attention["kv_norm"], 512),
    "kv_b": (PARAMETERS.attention["kv_b"], 16_777_216),
    "o": (PARAMETERS.attention["o"], 117_440_512),
    "attention": (PARAMETERS.attention.total, 187_107_328),
    "dense FFN": (PARAMETERS.dense_ffn.total, 396_361_728),
    "expert": (PARAMETERS.expert.total, 44_040_192),
    "gate weight": (PARAMETERS.gate["gate"], 1_835_008),
    "gate bias": (PARAMETERS.gate["gate bias"], 256),
    "dense layers": (PARAMETERS.dense_layers, 3),
    "MoE layers": (PARAMETERS.moe_layers, 58),
    "dense layer": (PARAMETERS.dense_layer.trainable, 583_483_392),
    "MoE layer": (PARAMETERS.moe_layer.trainable, 11_507_286_016),
    "embedding": (PARAMETERS.embedding.total, 926_679_040),
    "head": (PARAMETERS.head.total, 926_679_040),
    "main, trainable": (PARAMETERS.main_trainable, 671_026_404_352),
    "main": (PARAMETERS.main, 671_026_419_200),
    "activated": (PARAMETERS.activated, 37_552_282_624),
    "activated without embedding": (PARAMETERS.activated_without_embedding, 36_625_603_584),
    "eh_proj": (PARAMETERS.mtp_module["eh_proj"], 102_760_448),
    "MTP, unique": (PARAMETERS.mtp_unique, 11_610_068_224),
    "MTP, shipped": (PARAMETERS.mtp_shipped, 13_463_426_304),
    "shipped": (PARAMETERS.shipped, 684_489_845_504),
}


@pytest.mark.parametrize("part", PUBLISHED_PARAMETERS)
def test_parameters_of_the_released_model(part):
    counted, published = PUBLISHED_PARAMETERS[part]
    assert counted == published


def test_flops_of_the_released_model():
    flops, mtp = books.flops_per_token(RELEASED, 4096), books.mtp_flops_per_token(RELEASED, 4096)
    assert round(flops.train / 1e9, 2) == 250.46
    assert round(flops.train_linear / 1e9, 2) == 219.75
    assert round(flops.train_attention / 1e9, 2) == 30.70
    assert round(mtp.train_linear / 1e9, 1) == 9.7  # the quoted figure leaves out this layer's attention, 0.5 more
    assert round(mtp.train_attention / 1e9, 1) == 0.5


def test_cache_of_the_released_model():
    cache = books.cache_per_token(RELEASED)
    assert cache.mla == (512 + 64) * 61 == 35_136
    assert cache.bytes("mla") == 70_272
    assert cache.bytes("mha") == 4_997_120
    assert round(cache.saving) == 71


def test_cost_of_the_released_model():
    cost, run = books.ledger(RELEASED).cost, books.REPORT_RUN
    assert cost.hours_per_trillion == pytest.approx(180_000, rel=1e-12)
    assert cost.gpu_hours == pytest.approx(2_664_000, rel=1e-12) and run.pre_training_hours == 2_664_000
    assert run.hours == 2_788_000 and run.hours * 2.0 == 5_576_000
    assert round(cost.tokens_per_second_per_gpu) == 1543
    assert round(cost.tokens_per_second / 1e6, 2) == 3.16
    assert round(cost.days_per_trillion, 2) == 3.66
    assert round(books.report_flops_per_second() / 1e12, 1) == 386.5
    assert round(100 * books.report_flops_per_second() / books.H800_PEAK, 1) == 39.1


def test_released_files_are_the_ledgers_bytes_and_their_headers():
    """The hub's 163 weight files have 688,586,727,753 bytes in all. A safetensors header takes about 130 a tensor."""
    tensors = 0
    for block, times in PARAMETERS.shipped_blocks:
        tensors += times * sum(tensor.copies * (2 if tensor.kind == "linear" else 1) for tensor in block.tensors)
    headers = 688_586_727_753 - books.checkpoint_bytes(RELEASED, weights="fp8")
    assert 115 * tensors < headers < 145 * tensors


# ---- any config: the tensors of two models that were written apart from the ledger -----------------------------------


@st.composite
def configs(draw, **fixed):
    """Small configs of every shape: no query compression, no or two shared experts, all dense, all MoE, MTP 0 to 2."""
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(2, 5))
    topk_group = draw(st.integers(1, groups))
    layers = draw(st.integers(1, 4))
    values = dict(
        vocab_size=draw(st.integers(1, 300)),
        hidden_size=draw(st.integers(1, 150)),
        num_hidden_layers=layers,
        first_k_dense_replace=draw(st.integers(0, layers)),
        intermediate_size=draw(st.integers(1, 200)),
        moe_intermediate_size=draw(st.integers(1, 150)),
        n_routed_experts=groups * per_group,
        n_shared_experts=draw(st.integers(0, 2)),
        num_experts_per_tok=draw(st.integers(1, topk_group * per_group)),
        n_group=groups,
        topk_group=topk_group,
        topk_method=draw(st.sampled_from(["noaux_tc", "aux_loss"])),
        num_attention_heads=draw(st.integers(1, 6)),
        q_lora_rank=draw(st.none() | st.integers(1, 40)),
        kv_lora_rank=draw(st.integers(1, 40)),
        qk_nope_head_dim=draw(st.integers(1, 20)),
        qk_rope_head_dim=2 * draw(st.integers(1, 8)),
        v_head_dim=draw(st.integers(1, 20)),
        num_nextn_predict_layers=draw(st.integers(0, 2)),
        max_position_embeddings=64,
        rope_scaling=None,
    )
    return ModelConfig(**{**values, **fixed})


many = settings(max_examples=16, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def counted(tensors) -> int:
    return sum(tensor.numel() for tensor in tensors)


def gate_biases(model: nn.Module) -> int:
    return counted(buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias"))


def oracle(cfg: ModelConfig, **changes) -> DeepseekV3ForCausalLM:
    return DeepseekV3ForCausalLM(DeepseekV3Config(**cfg.to_hf(), **changes))


@many
@given(configs())
def test_equals_the_counted_tensors_of_our_model(cfg):
    with torch.device("meta"):
        model = DeepSeekV3(cfg)
    parameters = books.count_parameters(cfg)
    assert parameters.live_trainable == counted(model.parameters())
    assert parameters.live - parameters.live_trainable == gate_biases(model)
    shared = counted([*model.embed_tokens.parameters(), *model.lm_head.parameters()])
    assert parameters.shipped == parameters.live + len(model.mtp) * shared


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # no shared expert is one of width 0 there
@many
@given(configs())
def test_equals_the_counted_tensors_of_transformers(cfg):
    parameters = books.count_parameters(cfg)
    with torch.device("meta"):
        main = oracle(cfg)
        mtp = MtpModel(copy.deepcopy(main), cfg.num_nextn_predict_layers)
    assert parameters.main_trainable == counted(main.parameters())
    assert parameters.mtp_modules * parameters.mtp_module.trainable == counted(mtp.layers.parameters())
    if cfg.topk_method == "noaux_tc":  # transformers has no other method and always makes the biases
        assert parameters.gate_biases == gate_biases(main)
        assert parameters.mtp_unique == counted(mtp.layers.parameters()) + gate_biases(mtp)
    else:
        assert parameters.live == parameters.live_trainable


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@many
@given(configs())
def test_activated_is_all_but_the_experts_that_a_token_does_not_meet(cfg):
    with torch.device("meta"):
        model = oracle(cfg)
        mtp = MtpModel(copy.deepcopy(model), cfg.num_nextn_predict_layers)

    def met(module: nn.Module) -> int:
        idle = cfg.n_routed_experts - cfg.num_experts_per_tok
        stacks = [weight for name, weight in module.named_parameters() if ".experts." in name]  # [experts, out, in]
        return counted(module.parameters()) - sum(idle * weight[0].numel() for weight in stacks)

    parameters = books.count_parameters(cfg)
    assert parameters.activated == books.activated(cfg) == met(model)
    assert books.activated(cfg, embedding=False) == met(model) - model.model.embed_tokens.weight.numel()
    assert parameters.activated_mtp == met(mtp.layers) + len(mtp.layers) * model.lm_head.weight.numel()


@many
@given(configs(topk_method="noaux_tc"))
def test_fp8_bytes_equal_a_walk_over_the_matrices(cfg):
    """Cut each matrix of a built model into 128 x 128 blocks, the ragged ones at the edge too, and weigh the pieces."""
    with torch.device("meta"):
        model = DeepSeekV3(cfg)
    size = 4 * gate_biases(model)
    for name, weight in model.named_parameters():
        kept = any(part in name for part in ("embed_tokens", "lm_head", "norm", "mlp.gate.weight", "eh_proj"))
        if kept or weight.ndim == 1:
            size += 2 * weight.numel()
            continue
        for matrix in separate(name, weight, cfg):
            blocks = [block for rows in matrix.split(128, 0) for block in rows.split(128, 1)]
            size += counted(blocks) + 4 * len(blocks)
    assert books.training_state(cfg, weights="fp8").weights == size


def separate(name: str, weight: torch.Tensor, cfg: ModelConfig) -> list[torch.Tensor]:
    """The matrices as a checkpoint stores them: one an expert, SwiGLU's gate and up apart."""
    matrices = list(weight) if weight.ndim == 3 else [weight]
    if "gate_up" in name:
        matrices = [half for matrix in matrices for half in matrix.chunk(2, 0)]
    return matrices


# ---- FLOPs, counted by torch while a model runs ----------------------------------------------------------------------

NANO = ModelConfig.preset("nano")
FLOP_CONFIGS = {
    "nano": NANO,
    "no query compression": NANO.replace(q_lora_rank=None, n_shared_experts=2, v_head_dim=24),
    "all dense": NANO.replace(first_k_dense_replace=3),
}


def eager(cfg: ModelConfig) -> DeepseekV3ForCausalLM:
    """transformers' model with plain products: a loop over experts, scores as a matrix. Fused kernels count as none."""
    torch.manual_seed(0)
    return oracle(cfg, attn_implementation="eager", experts_implementation="eager")


@pytest.mark.parametrize("name", FLOP_CONFIGS)
def test_matmul_flops_equal_what_torch_counts(name):
    cfg, sequence = FLOP_CONFIGS[name], 24
    model = eager(cfg)
    tokens = torch.randint(cfg.vocab_size, (2, sequence), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as forward:
        logits = model(tokens, use_cache=False).logits
    with FlopCounterMode(display=False) as backward:
        logits.square().mean().backward()
    flops = books.matmul_flops_per_token(cfg, sequence)
    assert forward.get_total_flops() == tokens.numel() * flops.forward
    assert backward.get_total_flops() == tokens.numel() * flops.backward


@pytest.mark.parametrize("name", FLOP_CONFIGS)
def test_quoted_flops_are_the_products_with_norms_and_half_of_the_scores(name):
    cfg = FLOP_CONFIGS[name]
    with torch.device("meta"):
        norms = counted(weight for weight in oracle(cfg).parameters() if weight.ndim == 1)
    products, quoted = books.matmul_flops_per_token(cfg, 64), books.flops_per_token(cfg, 64)
    assert quoted.linear == products.linear + 2 * norms
    assert 2 * quoted.attention == products.attention


@pytest.mark.parametrize("name", FLOP_CONFIGS)
def test_decoding_with_a_latent_cache_equals_what_torch_counts(name):
    """transformers caches the latent and up-projects all of it at every step: the ledger's `re_expanded`."""
    cfg, context = FLOP_CONFIGS[name], 17
    model = eager(cfg)
    tokens = torch.randint(cfg.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cached = model(tokens[:, :-1], use_cache=True).past_key_values
        numbers = sum(layer.keys.numel() + layer.values.numel() for layer in cached.layers)
        with FlopCounterMode(display=False) as counter:
            model(tokens[:, -1:], past_key_values=cached)
    assert numbers == (context - 1) * books.cache_per_token(cfg).mla
    norms = books.decode_flops_per_token(cfg, context).linear - 2 * books.count_parameters(cfg).multiplied
    assert counter.get_total_flops() == books.decode_flops_per_token(cfg, context).re_expanded - norms


@pytest.mark.parametrize("context", [1, 40])
def test_absorbed_and_expanded_attention_equal_what_torch_counts(context):
    """Both ways by hand for one layer and one query. Absorbed, kv_b's two halves fold into query and output."""
    heads, nope, rope, value, latent = 3, 5, 4, 7, 11
    cfg = NANO.replace(num_attention_heads=heads, qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=value,
                       kv_lora_rank=latent, num_hidden_layers=1, first_k_dense_replace=1)  # fmt: skip
    decode = books.decode_flops_per_token(cfg, context)

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device="meta")

    cache = zeros(latent + rope, context)
    with FlopCounterMode(display=False) as absorbed:
        query = torch.cat([zeros(heads, 1, nope) @ zeros(heads, nope, latent), zeros(heads, 1, rope)], -1)
        scores = query @ cache.expand(heads, -1, -1)
        _ = scores @ cache[:latent].T.expand(heads, -1, -1) @ zeros(heads, latent, value)
    with FlopCounterMode(display=False) as expanded:
        _ = zeros(1, latent) @ zeros(latent, heads * (nope + value))  # the new token's own key and value
        scores = zeros(heads, 1, nope + rope) @ zeros(heads, nope + rope, context)
        _ = scores @ zeros(heads, context, value)
    kv_b = 2 * books.count_parameters(cfg).attention["kv_b"]  # stands in `linear`
    assert absorbed.get_total_flops() == kv_b + decode.absorbed_attention
    assert expanded.get_total_flops() == kv_b + decode.expanded_attention


def test_causal_half_is_the_mean_over_positions():
    """Position i attends to i tokens, 1 to s: on average (s + 1) / 2. The quoted s / 2 is short by half a token."""
    sequence, whole = 64, books.matmul_flops_per_token(NANO, 1).attention
    mean = sum(whole * seen for seen in range(1, sequence + 1)) / sequence
    assert books.flops_per_token(NANO, sequence).attention == mean - whole / 2


# ---- cache, training state, cost -------------------------------------------------------------------------------------


def test_gqa_lies_between_mqa_and_mha():
    for groups in (1, 2, 4):
        cache = books.cache_per_token(NANO, groups=groups, dtype="fp32")
        width = NANO.qk_nope_head_dim + NANO.qk_rope_head_dim + NANO.v_head_dim
        assert cache.bytes("gqa") == 4 * sum(width for _ in range(groups) for _ in range(NANO.num_hidden_layers))
    assert cache.gqa == cache.mha and books.cache_per_token(NANO, groups=1).gqa == cache.mqa


def test_training_state_equals_the_tensors_of_a_real_step():
    """FP32 throughout: weights, gradients and AdamW's moments of a model that has taken a step."""
    torch.manual_seed(0)
    model = DeepSeekV3(NANO)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    parameters = list(model.parameters())
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    held = [*parameters, *(parameter.grad for parameter in parameters), *moments]
    state = books.training_state(NANO, weights="fp32", moments="fp32")
    assert state.total == sum(tensor.nbytes for tensor in held) + 4 * gate_biases(model)


def test_training_state_per_parameter():
    """The recipe: 4 master + 4 gradient + 2 x 2 moments, and 2 for BF16 weights or 1 and its scales for FP8."""
    assert books.training_state(RELEASED).per_parameter == pytest.approx(14, abs=1e-6)
    assert books.training_state(RELEASED, moments="fp32").per_parameter == pytest.approx(18, abs=1e-6)
    fp8 = books.training_state(RELEASED, weights="fp8").per_parameter
    assert 13 + 4 / 128**2 < fp8 < 13.01


def test_speed_and_back():
    hours = books.hours_per_trillion(2e9, 5e12)  # 2500 tokens a second
    assert books.sustained_flops(2e9, hours) == pytest.approx(5e12)
    cost = books.training_cost(hours, tokens=9 * 10**9, gpus=4, dollars_per_hour=3.0)
    assert cost.tokens_per_second == pytest.approx(10_000)
    assert cost.days == pytest.approx(900_000 / 86_400)
    assert cost.dollars == pytest.approx(4 * 250 * 3)


# ---- the table -------------------------------------------------------------------------------------------------------

PRINTED = [
    "11,010,048", "1,536", "37,748,736", "4,128,768", "512", "16,777,216", "117,440,512", "187,107,328",
    "396,361,728", "44,040,192", "1,835,008", "583,483,392", "11,507,286,016", "926,679,040", "671,026,404,352",
    "671,026,419,200", "37,552,282,624", "36,625,603,584", "102,760,448", "11,610,068,224", "13,463,426,304",
    "684,489,845,504", "250.46", "219.75", "30.70", "9.69", "35,136", "70,272", "4,997,120", "71.11x", "2,664,000",
    "180,000", "119,000", "5,000", "2,788,000", "$5,576,000", "1,543", "3,160,494", "3.66", "386.51", "39.1%",
    "129280", "7168", "18432", "163840",
]  # fmt: skip


@pytest.mark.parametrize("figure", PRINTED)
def test_every_published_figure_is_on_the_page(figure):
    text = books.ledger_text(RELEASED, context=4096, dollars_per_hour=2.0)
    assert re.search(rf"(?<![\d,.]){re.escape(figure)}(?![\d,.]\d)", text)


@pytest.mark.parametrize("preset", PRESETS)
def test_table_and_json_of_every_preset(preset):
    book = books.ledger(ModelConfig.preset(preset), 1000, dollars_per_hour=0.5)
    assert max(map(len, books.render(book).splitlines())) <= 100
    figures = json.loads(json.dumps(books.to_dict(book)))
    assert figures["config"]["vocab_size"] == PRESETS[preset].get("vocab_size", 129280)
    assert figures["parameters"]["main"] == books.count_parameters(book.cfg).main
    assert figures["flops"]["train_1000"] == figures["flops"]["forward_1000"] + figures["flops"]["backward_1000"]
    assert math.isclose(figures["cost"]["dollars"], figures["cost"]["gpu_hours"] * 0.5)


@given(configs())
@settings(max_examples=20, deadline=None, derandomize=True)
def test_any_config_has_a_table(cfg):
    assert books.ledger_text(cfg, 7)


BAD = {
    "context": lambda: books.ledger_text(RELEASED, 0),
    "dollars_per_hour": lambda: books.ledger_text(RELEASED, dollars_per_hour=-1.0),
    "groups": lambda: books.cache_per_token(RELEASED, groups=7),
    "dtype": lambda: books.cache_per_token(RELEASED, dtype="int3"),
    "weights": lambda: books.training_state(RELEASED, weights="fp4"),
    "moments": lambda: books.training_state(RELEASED, moments="fp8"),
    "gpus": lambda: books.training_cost(gpus=0),
    "hours_per_trillion": lambda: books.training_cost(math.nan),
    "flops_per_second": lambda: books.ledger(RELEASED, flops_per_second=math.inf),
}


@pytest.mark.parametrize("field", BAD)
def test_a_bad_figure_is_named_in_one_line(field):
    with pytest.raises(ConfigError, match=f"^{field} = ") as error:
        BAD[field]()
    assert "\n" not in str(error.value)
