"""The log-prob check: what it finds in models that nobody here made, and that a run keeps to what it found."""

import copy
import logging
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import logged, relative_difference, script_generation, tiny_model, tiny_tokenizer, tiny_trainer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, Qwen3Config

from sg_opd_trl import agreement, evaluate_model
from sg_opd_trl.agreement import Agreement, check_for_trl, check_model, made_up_rows, row_length
from sg_opd_trl.errors import SGOPDConfigError
from sg_opd_trl.models.batch import TokenBatch
from sg_opd_trl.models.context import bounds_of
from sg_opd_trl.models.forward import (
    HeadRequest,
    Layouts,
    layouts_of,
    move_left,
    packed_forward,
    padded_forward,
    padding_behind,
    prefixes_to_share,
    restrict_layouts,
)
from sg_opd_trl.models.generate import generate_completions
from sg_opd_trl.models.prefixes import Prefixes
from sg_opd_trl.trl_seam import add_fused_head, fused_forward

CPU = torch.device("cpu")
IDS = list(range(5, 26))
SIZES = {
    "vocab_size": 26, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": 1, "initializer_range": 0.3,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LEARNED = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 16}
LONGROPE = ROPE | {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "rotary": ("llama", SIZES),
    "alibi": ("bloom", {"vocab_size": 26, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}),
    "learned positions": ("gpt2", {"vocab_size": 26, "eos_token_id": 1, "bos_token_id": 1} | LEARNED),
    "sinusoidal positions": (
        "xglm",
        {"vocab_size": 26, "d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "init_std": 0.3},
    ),
    "window of its mask alone": ("phimoe", SIZES | {"num_local_experts": 4, "sliding_window": 3}),
    "window of some layers": (
        "qwen2_moe",
        SIZES
        | EXPERTS
        | {"shared_expert_intermediate_size": 32, "use_sliding_window": True, "sliding_window": 3}
        | {"max_window_layers": 1},
    ),
    "window of every layer": ("mistral", SIZES | {"sliding_window": 30}),
    "recurrent": ("mamba", {"vocab_size": 26, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "recurrent, without a mask": (
        "rwkv",
        {"vocab_size": 26, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
    ),
    "not causal": (
        "bert",
        {"vocab_size": 26, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"intermediate_size": 64, "initializer_range": 0.3},
    ),
    "layers elsewhere": ("llama4_text", SIZES | {"num_local_experts": 2, "head_dim": 8, "intermediate_size_mlp": 64}),
    "head of its own": ("modernbert-decoder", SIZES | {"local_attention": 8, "bos_token_id": 2}),
    "frequencies that follow the row": (
        "phi3",
        SIZES | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16},
    ),
}
PADDED, FLUSH = Layouts(packed=False), Layouts(padded=False)
ONE_LENGTH = Layouts(padded=False, written_together=False)


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).to(dtype).eval()
    add_fused_head(model, 0.8, False)
    return model


def check(model: Any, longest: int = 60) -> Agreement:
    rows = made_up_rows(model.config, IDS, longest, CPU)
    return check_model(model, rows, role="teacher", temperature=0.8, writes=True)


def unequal_rows() -> TokenBatch:
    prompts = [[5, 6, 7, 8, 9, 10, 11], [8], [9, 10, 11]]
    return TokenBatch.from_lists(prompts, [[20, 21, 1], [22, 23, 24, 25, 6, 7], [12]], 0, CPU)


def alone(model: Any, batch: TokenBatch) -> Tensor:
    """Plain logits of each row by itself, with gradient."""
    rows = []
    for i in range(len(batch)):
        prompt, completion = (
            ids[i, mask[i] == 1]
            for ids, mask in ((batch.prompt_ids, batch.prompt_mask), (batch.completion_ids, batch.completion_mask))
        )
        logits = model(input_ids=torch.cat([prompt, completion]).unsqueeze(0), use_cache=False).logits[0] / 0.8
        logps = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, completion.unsqueeze(1)).squeeze(1)
        rows.append(torch.nn.functional.pad(logps, (0, batch.completion_ids.size(1) - len(logps))))
    return torch.stack(rows)


# --- what is found ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "layouts"),
    [
        ("rotary", Layouts()),
        ("alibi", Layouts()),
        ("learned positions", FLUSH),
        ("sinusoidal positions", FLUSH),
        ("window of its mask alone", PADDED),
        ("window of some layers", PADDED),
        ("window of every layer", Layouts()),
        ("recurrent", Layouts()),
    ],
)
def test_a_model_keeps_to_the_layouts_that_agree(
    caplog: pytest.LogCaptureFixture, name: str, layouts: Layouts
) -> None:
    model, batch = build(name), unequal_rows()
    with torch.no_grad():
        expected = alone(model, batch)
    with caplog.at_level(logging.WARNING, logger="sg_opd_trl.agreement"):
        found = check(model)
    assert found.layouts == layouts == layouts_of(model)
    assert found.difference < 1e-4
    # Said once, with the role, the model and the reason, where something was left out.
    said = [r.getMessage() for r in caplog.records if r.name == "sg_opd_trl.agreement"]
    assert len(said) == astuple(layouts).count(False)
    assert all(f"The teacher ({found.model})" in message for message in said)
    assert (found.reason is None) == (layouts == Layouts())
    with torch.no_grad():
        scored = fused_forward(model, *batch.joined(), 6).logps
    assert (scored - expected).abs().max() < 1e-4
    assert expected.min() < -1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("recurrent, without a mask", r"RwkvForCausalLM.*`generate` continues .*use_vllm=True"),
        ("head of its own", "ModernBertDecoderForCausalLM.*last hidden states times its output embedding"),
        ("not causal", "BertLMHeadModel.*tokens that come later .*is_decoder=True"),
        ("frequencies that follow the row", r"Phi3ForCausalLM.*beyond 16 tokens its RoPE.*within 16 tokens"),
    ],
)
def test_a_model_without_a_right_layout_is_refused(name: str, reason: str) -> None:
    with pytest.raises(SGOPDConfigError, match=rf"^`teacher_model` must .*{reason}"):
        check(build(name))


@pytest.mark.parametrize("name", ["head of its own", "frequencies that follow the row"])
def test_in_bfloat16_it_is_refused_too(name: str) -> None:
    with pytest.raises(SGOPDConfigError, match=r"rounding: up to 0\.2"):
        check(build(name, torch.bfloat16))


def test_a_model_that_only_scores_is_not_asked_to_write() -> None:
    model = build("recurrent, without a mask")
    rows = made_up_rows(model.config, IDS, 60, CPU)
    assert check_model(model, rows, role="reference", temperature=0.8).layouts == FLUSH


def test_an_error_of_the_models_own_code_names_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("rotary")
    monkeypatch.setattr(model.model.norm, "forward", lambda states: states.nothing)
    with pytest.raises(SGOPDConfigError, match=r"^`teacher_model` must run .*LlamaForCausalLM.*AttributeError"):
        check(model)


LAYERS_ELSEWHERE = r"got the {} Llama4ForCausalLM, which has no `language_model`.*Use another model{}"


def test_a_model_whose_layers_the_head_does_not_find_is_refused() -> None:
    """Llama 4. Both roles at construction, with another way out for a teacher."""
    with pytest.raises(SGOPDConfigError, match=LAYERS_ELSEWHERE.format("teacher", ", .*teacher_model_server_url")):
        check(build("layers elsewhere"))


@pytest.mark.parametrize(("setting", "role", "more"), [("model", "student", r"\."), ("teacher_model", "teacher", ",")])
def test_it_is_refused_before_training_starts(setting: str, role: str, more: str, tmp_path: Path) -> None:
    kind, settings = MODELS["layers elsewhere"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).float()
    with pytest.raises(SGOPDConfigError, match=f"^`{setting}` must keep .*" + LAYERS_ELSEWHERE.format(role, more)):
        tiny_trainer(tmp_path, settings={"preflight": False}, **{setting: model})


@pytest.mark.parametrize("length", [6, 10, 20])
def test_rope_that_follows_the_row_is_written_as_generate_writes_it(length: int) -> None:
    """Beyond the original context, here 16 tokens, the cached keys of earlier tokens are not those of longer rows."""
    model = build("frequencies that follow the row")
    prompt = [5 + i % 20 for i in range(length)]
    config = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=1, pad_token_id=0)
    ids = torch.tensor([prompt])
    expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    assert generate_completions(model, [prompt], config) == [expected[0, length:].tolist()]


def test_within_the_original_context_rope_that_follows_the_row_agrees() -> None:
    model = build("frequencies that follow the row")
    rows = TokenBatch.from_lists([[5, 6, 7], [8]], [[9, 10], [11, 12, 13, 14]], 0, CPU)
    assert check_model(model, rows, role="student", temperature=0.8).layouts == Layouts(up_to=16)


@pytest.mark.parametrize("name", ["rotary", "learned positions", "window of some layers"])
def test_in_bfloat16_the_same_is_found(name: str) -> None:
    assert check(build(name, torch.bfloat16)).layouts == check(build(name)).layouts


def padded_with_error(monkeypatch: pytest.MonkeyPatch, left: float, behind: float) -> None:
    """Have padded rows differ by so much from those of each row alone."""

    def forward(*args: Any, flush_left: bool = False, **options: Any) -> Any:
        output = padded_forward(*args, flush_left=flush_left, **options)
        return output._replace(logps=output.logps + (behind if flush_left else left))

    monkeypatch.setattr(agreement, "padded_forward", forward)


def test_in_bfloat16_the_rows_that_count_have_their_padding_behind_them(monkeypatch: pytest.MonkeyPatch) -> None:
    padded_with_error(monkeypatch, left=0.15, behind=0.0)
    found = check(build("rotary", torch.bfloat16))
    assert found.layouts == Layouts()
    assert found.difference < 0.1
    # In float32 it is the others, whose error is beyond the tolerance there.
    assert check(build("rotary")).layouts == FLUSH


def test_in_bfloat16_a_model_may_keep_its_padding_on_the_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    padded_with_error(monkeypatch, left=0.0, behind=1.0)
    model = build("rotary", torch.bfloat16)
    with caplog.at_level(logging.WARNING, logger="sg_opd_trl.agreement"):
        assert check(model).layouts == Layouts(behind=False) == layouts_of(model)
    assert "rows with all padding behind them other log-probs" in caplog.text
    assert not padding_behind(model, CPU)
    # Nobody looks at it in float32.
    assert check(build("rotary")).layouts == Layouts()


def test_in_bfloat16_a_model_without_a_right_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    padded_with_error(monkeypatch, left=1.0, behind=1.0)
    with pytest.raises(SGOPDConfigError, match="must give rows that are run together"):
        check(build("rotary", torch.bfloat16))


def test_prompts_that_begin_alike_are_looked_at(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A model that gives shared prompts something else keeps its packed rows, each with its own prompt."""
    seen: list[Prefixes | None] = []

    def forward(*args: Any, prefixes: Prefixes | None = None, **options: Any) -> Any:
        seen.append(prefixes)
        output = packed_forward(*args, prefixes=prefixes, **options)
        return output if prefixes is None else output._replace(logps=output.logps + 0.01)

    monkeypatch.setattr(agreement, "packed_forward", forward)
    model, batch = build("rotary"), TokenBatch.from_lists([[5, 6, 7, 8]] * 2, [[9, 1], [10, 11, 1]], 0, CPU)
    assert prefixes_to_share(model, *batch.joined(), 3) is not None
    with caplog.at_level(logging.WARNING, logger="sg_opd_trl.agreement"):
        assert check(model).layouts == Layouts(shared=False) == layouts_of(model)
    assert "packed rows that share the beginning of their prompts other log-probs" in caplog.text
    assert prefixes_to_share(model, *batch.joined(), 3) is None
    unshared, shared = seen
    assert unshared is None
    assert shared is not None
    assert sum(shared.lengths) >= 8, "a prompt that begins as another one"


def test_a_model_that_gives_nan_is_refused() -> None:
    model = build("rotary")
    with torch.no_grad():
        model.lm_head.weight[7, 0] = torch.nan
    with pytest.raises(SGOPDConfigError, match="must give finite log-probs"):
        check(model)


def test_a_base_of_several_roles_keeps_to_what_is_right_for_all() -> None:
    model = build("learned positions")
    check(model)
    rows = TokenBatch.from_lists([[5, 6]] * 2, [[7, 8]] * 2, 0, CPU)  # without padding every layout agrees
    assert check_model(model, rows, role="reference", temperature=0.8).layouts == FLUSH


def test_a_model_that_is_only_evaluated_is_asked_to_write() -> None:
    """Its completions of prompts of unequal length are those of each prompt alone, or it is refused."""
    rows = [{"prompt": "1+1=", "solution": "2"}, {"prompt": "12+12+12=", "solution": "36"}]
    tokenizer = tiny_tokenizer()
    model = build("recurrent, without a mask")
    with pytest.raises(SGOPDConfigError, match=r"RwkvForCausalLM.*`generate` continues"):
        evaluate_model(model, tokenizer, rows, num_samples=1, max_new_tokens=2)
    peft = pytest.importorskip("peft")
    prompted = peft.get_peft_model(
        tiny_model(0), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ).eval()
    evaluate_model(prompted, tokenizer, rows, num_samples=1, max_new_tokens=2)
    assert not layouts_of(prompted).written_together


def long_rows(length: int) -> TokenBatch:
    """One long row beside two short ones, so that most of a padded batch is padding."""
    row = [5 + (7 * i + i * i % 13) % 20 for i in range(length)]
    return TokenBatch.from_lists([row[:-6], [8], [9, 10]], [row[-6:], [22, 23], [12, 13, 14]], 0, CPU)


def test_rows_longer_than_those_of_the_check_are_right(caplog: pytest.LogCaptureFixture) -> None:
    """A stream brings prompts that nobody saw before; the check saw rows within the window alone."""
    kind, settings = MODELS["window of its mask alone"]
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings | {"sliding_window": 30}))
    add_fused_head(model.eval(), 0.8, False)
    assert check(model, longest=20).layouts == Layouts(up_to=30)
    batch = long_rows(50)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        logps = fused_forward(model, *batch.joined(), 6).logps
        assert (logps - alone(model, batch)).abs().max() < 1e-4
    assert "Rows of more than 30 tokens" in caplog.text
    # A later run with longer rows sees what the window does.
    assert check(model, longest=60).layouts == PADDED


def test_rows_longer_than_those_of_the_check_are_refused_where_rope_follows_them() -> None:
    model = build("frequencies that follow the row")
    rows = TokenBatch.from_lists([[5, 6, 7], [8]], [[9, 10], [11, 12, 13, 14]], 0, CPU)
    check_model(model, rows, role="student", temperature=0.8)
    with torch.no_grad():
        # Wider than the original context, and no row longer: the padding must not count.
        wide = TokenBatch.from_lists([[5] * 12, [8]], [[9], [10] * 10], 0, CPU)
        logps = fused_forward(model, *wide.joined(), 10).logps
        assert (logps - alone(model, wide)).abs().max() < 1e-4
        with pytest.raises(SGOPDConfigError, match=r"16 tokens .* RoPE of Phi3ForCausalLM .* row 0 .* 30 tokens"):
            fused_forward(model, *long_rows(30).joined(), 6)


@pytest.mark.parametrize("column", ["prompt", "teacher_prompt"])
def test_the_longest_prompts_count_wherever_they_stand(tmp_path: Path, column: str) -> None:
    """The first prompts are short; a much later one passes the window of the model, or what the teacher reads."""
    kind, settings = MODELS["window of its mask alone"]
    torch.manual_seed(0)
    student = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings | {"sliding_window": 30}))
    prompts = ["1+1="] * 15 + ["12345678" * 5]
    columns = {"prompt": ["1+1="] * 16, "solution": ["1"] * 16} | {column: prompts}
    settings = {"teacher_sampling_enable": False, "router_aux_loss_coef": 0.0}
    trainer = tiny_trainer(tmp_path, model=student, settings=settings, train_dataset=Dataset.from_dict(columns))
    assert trainer.agreements[0].layouts == PADDED


# --- the rows --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "longest", "length"),
    [
        ({"sliding_window": 40, "use_sliding_window": True}, 100, 56),
        ({"sliding_window": 40, "use_sliding_window": True}, 40, 24),  # no row of the run passes it
        ({"max_position_embeddings": 20}, 100, 20),
        ({}, 100, 24),
    ],
)
def test_the_longest_row_passes_the_windows_of_the_run(settings: dict, longest: int, length: int) -> None:
    config = Qwen3Config(**{"max_position_embeddings": 4096, "sliding_window": 4096} | settings)
    assert row_length(config, longest) == length
    rows = made_up_rows(config, IDS, longest, CPU)
    lengths = (rows.prompt_mask.sum(1) + rows.completion_mask.sum(1)).tolist()
    assert max(lengths) == length
    assert len(set(lengths)) == 4


def test_bounds_of_a_configuration() -> None:
    config = Qwen3Config(sliding_window=7, use_sliding_window=True, max_window_layers=3, max_position_embeddings=64)
    assert bounds_of(config) == [7]
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert bounds_of(config) == [7, 64]


# --- all padding behind the rows -------------------------------------------------------------------------------------
def test_rows_moved_to_the_left() -> None:
    batch = TokenBatch.from_lists([[5, 6], [7], []], [[8], [9, 10, 11], [12, 13]], 0, CPU)
    moved = move_left(*batch.joined(), 3)
    assert moved.model_inputs["input_ids"].tolist() == [[5, 6, 8, 0], [7, 9, 10, 11], [12, 13, 0, 0]]
    assert moved.model_inputs["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    # Position 1 of the first row predicts its 8; nothing predicts the 12 that a row begins with.
    assert moved.unpack(values).tolist() == [[2.0, 0.0, 0.0], [4.0, 5.0, 6.0], [0.0, 7.0, 0.0]]
    chosen = torch.tensor([[True, False, False], [False, True, True], [False, True, False]])
    assert moved.pick(values, chosen).tolist() == [2.0, 5.0, 6.0, 7.0]


def test_gradients_of_rows_moved_to_the_left_are_those_of_plain_logits() -> None:
    model, batch = build("learned positions"), unequal_rows()
    weights = torch.linspace(-1.0, 2.0, batch.completion_ids.numel()).view(batch.completion_ids.shape)
    weights = weights * batch.completion_mask
    gradients = []
    for logps in (alone(model, batch), padded_forward(model, *batch.joined(), 6, flush_left=True).logps):
        model.zero_grad()
        (weights * logps).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert relative_difference(gradients[1], gradients[0]) < 1e-5


def test_a_request_reads_the_same_hidden_states_in_every_layout() -> None:
    model, batch = build("rotary"), unequal_rows()
    chosen = batch.completion_mask != 0
    request = HeadRequest(chosen, lambda hidden_states, head, logps: (hidden_states, logps))
    outputs = [padded_forward(model, *batch.joined(), 6, request, flush_left=flush) for flush in (False, True)]
    for padded, moved in zip(outputs[0].answer, outputs[1].answer, strict=True):
        assert (padded - moved).abs().max() < 1e-5
    assert (outputs[1].answer[1] - outputs[1].logps[chosen]).abs().max() == 0


# --- in a run --------------------------------------------------------------------------------------------------------
def test_a_run_keeps_to_what_was_found(tmp_path: Path) -> None:
    """A student that learns its positions, taught by itself: every token is neutral, which padding would hide."""
    student = build("learned positions")
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    config = AutoConfig.for_model("gpt2", **MODELS["learned positions"][1])
    teacher = AutoModelForCausalLM.from_config(config)
    teacher.load_state_dict(student.state_dict())
    settings = {"teacher_sampling_enable": False, "max_steps": 1, "disable_dropout": True}
    trainer = tiny_trainer(tmp_path, model=student, teacher_model=teacher, settings=settings)
    assert [(a.role, a.layouts) for a in trainer.agreements] == [
        ("student", FLUSH),
        ("teacher", FLUSH),
        ("reference", FLUSH),
    ]
    trainer.train()
    assert logged(trainer, "gate/neutral") == [1.0]


def test_the_check_changes_nothing(tmp_path: Path) -> None:
    """Neither the random state nor a model's mode or weights."""
    trainer = tiny_trainer(tmp_path, settings={"teacher_sampling_enable": False})
    before = copy.deepcopy(trainer.model.state_dict())
    training, state = trainer.model.training, torch.get_rng_state()
    from sg_opd_trl.preflight import check_log_probs

    check_log_probs(trainer)
    assert len(trainer.agreements) == 3
    assert trainer.model.training == training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert all(p.grad is None for p in trainer.model.parameters())


def test_a_student_that_cannot_be_scored_is_refused_when_the_trainer_is_built(tmp_path: Path) -> None:
    kind, settings = MODELS["head of its own"]
    student = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    with pytest.raises(SGOPDConfigError, match=r"`model` must give rows .*ModernBertDecoderForCausalLM"):
        tiny_trainer(tmp_path, model=student)


def test_prompt_tuning_has_its_virtual_tokens_in_front_of_the_text(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = tiny_trainer(
        tmp_path,
        model=tiny_model(0),
        peft_config=config,
        settings={"teacher_sampling_enable": False, "max_steps": 1, "lambda_high": 1.0},
    )
    with torch.no_grad():
        for parameter in trainer.model.prompt_encoder.parameters():
            parameter.normal_()
    batch = unequal_rows()
    assert layouts_of(trainer.model) == ONE_LENGTH
    trainer.model.eval()
    with torch.no_grad():
        scored = trainer.run_policy(trainer.model, *batch.joined(), 6).logps
        for row in range(len(batch)):
            prompt = batch.prompt_ids[row, batch.prompt_mask[row] == 1]
            completion = batch.completion_ids[row, batch.completion_mask[row] == 1]
            logits = trainer.model(input_ids=torch.cat([prompt, completion]).unsqueeze(0)).logits[0]
            logps = logits[-len(completion) - 1 : -1].log_softmax(-1).gather(1, completion.unsqueeze(1)).squeeze(1)
            assert (scored[row, : len(completion)] - logps).abs().max() < 1e-4
    # Greedy completions are those of each prompt alone, whatever is written beside it.
    prompts = [[5, 6, 7, 8, 9], [10], [11, 12], [13]]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=1, pad_token_id=0)
    alone = [generate_completions(trainer.model, [prompt], config)[0] for prompt in prompts]
    assert generate_completions(trainer.model, prompts, config) == alone
    restrict_layouts(trainer.model, FLUSH)
    assert generate_completions(trainer.model, prompts, config) != alone


def test_trls_own_loop_does_not_write_for_a_student_that_must_not_see_padding(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    with pytest.raises(SGOPDConfigError, match=r"`use_transformers_continuous_batching` .*student Qwen3ForCausalLM"):
        tiny_trainer(
            tmp_path,
            model=tiny_model(0),
            peft_config=peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
            settings={
                "teacher_sampling_enable": False,
                "lambda_high": 1.0,
                "use_transformers_continuous_batching": True,
            },
        )


@pytest.mark.parametrize("name", ["learned positions", "sinusoidal positions"])
def test_trls_own_trainers_do_not_take_a_model_that_counts_padding(name: str) -> None:
    with pytest.raises(SGOPDConfigError, match=r"`method: gkd` is not supported with the teacher .* pads prompts"):
        check_for_trl(build(name), tiny_tokenizer(), role="teacher", method="gkd")
    check_for_trl(build("rotary"), tiny_tokenizer(), role="teacher", method="gkd")


def test_a_generate_of_the_callers_own_is_left_alone_and_told(caplog: pytest.LogCaptureFixture) -> None:
    model = script_generation(build("rotary"))
    with caplog.at_level(logging.WARNING, logger="sg_opd_trl.agreement"):
        assert check(model).layouts == Layouts()
    assert "has a `generate` of the caller's own" in caplog.text
