"""The cache in a run: what is generated, what is read, and that training is the same either way."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import ANCHOR, logged, tiny_data, tiny_model, tiny_tokenizer, tiny_trainer

from sg_opd_trl import SGOPDConfigError, TeacherAnchorCallback
from sg_opd_trl.teacher_sampling.stored.store import RolloutStore

SMALL = ANCHOR | {
    "per_device_train_batch_size": 4,
    "num_generations": 2,
    "max_completion_length": 4,
    "lambda_high": 1.0,
    "teacher_sampling_ratio": 0.5,
    "max_steps": 3,
}


def run(folder: Path, path: Path | None, *, settings: dict | None = None, **arguments: Any) -> Any:
    """A finished run of three steps with two teacher prompts each."""
    cached = {} if path is None else {"teacher_rollouts_path": str(path)}
    trainer = tiny_trainer(folder, settings=SMALL | cached | (settings or {}), **arguments)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rollouts of one run."""
    folder = tmp_path_factory.mktemp("filled")
    run(folder, folder / "cache")
    return folder / "cache"


@pytest.fixture
def cache(filled: Path, tmp_path: Path) -> Path:
    """A copy of them for one test."""
    return Path(shutil.copytree(filled, tmp_path / "cache"))


def lines(path: Path) -> list[str]:
    return [line for file in sorted(path.glob("rollouts-*.jsonl")) for line in file.read_text().splitlines()]


def same_training(left: Any, right: Any) -> bool:
    curves = all(logged(left, name) == logged(right, name) for name in ("loss", "grad_norm", "anchor/loss"))
    pairs = zip(left.model.parameters(), right.model.parameters(), strict=True)
    return curves and all(torch.equal(one, other) for one, other in pairs)


def test_the_second_run_generates_no_teacher_token_and_trains_the_same(tmp_path: Path) -> None:
    plain, first, second = (run(tmp_path, path) for path in (None, tmp_path / "cache", tmp_path / "cache"))
    assert plain.teacher.tokens_generated == first.teacher.tokens_generated > 0
    assert second.teacher.tokens_generated == 0
    assert logged(second, "teacher/generated_tokens") == [0, 0, 0]
    assert second.rollout_cache.tokens_reused == first.teacher.tokens_generated
    assert same_training(plain, first)
    assert same_training(plain, second)
    assert max(logged(plain, "anchor/loss")) > 0
    assert logged(first, "anchor/cache_hits") == logged(second, "anchor/cache_misses") == [0.0] * 3
    assert logged(first, "anchor/cache_misses") == logged(second, "anchor/cache_hits") == [2.0] * 3
    assert logged(plain, "anchor/cache_hits") == logged(plain, "anchor/cache_misses") == []
    assert len(lines(tmp_path / "cache")) == 6


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 1e-2, "stability_tau": None},
        {"teacher_sampling_filter_correct": False, "teacher_sft_phi": "none", "teacher_sft_alpha_start": 0.7},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"teacher_sampling_ratio": 0.2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_runs_of_a_sweep_share_rollouts(tmp_path: Path, cache: Path, settings: dict) -> None:
    assert run(tmp_path, cache, settings=settings).teacher.tokens_generated == 0


def moved(model: Any) -> Any:
    """The model with its last weight changed by one part in a million, which no short fingerprint sees."""
    with torch.no_grad():
        model.lm_head.weight.view(-1)[-2] += 1e-6
    return model


@pytest.mark.parametrize(
    ("settings", "arguments", "named"),
    [
        ({"temperature": 0.9}, {}, "sampling.temperature: 0.9 and 1.0"),
        ({"top_p": 0.8}, {}, "sampling.top_p"),
        ({"teacher_max_completion_length": 3}, {}, "sampling.max_new_tokens: 3 and 4"),
        ({}, {"teacher_model": lambda: moved(tiny_model(1))}, "teacher.weights"),
        ({}, {"teacher_model": lambda: tiny_model(1).bfloat16()}, "teacher.dtype"),
        ({}, {"teacher_model": lambda: tiny_model(1, rms_norm_eps=1e-5)}, "teacher.config.rms_norm_eps"),
        ({}, {"processing_class": lambda: tiny_tokenizer("0123456789+=abcdefhg ")}, "tokenizer.vocabulary"),
    ],
    ids=["temperature", "top_p", "length", "one weight", "dtype", "config", "tokenizer"],
)
def test_what_changes_the_rollouts_is_a_miss_and_is_named(
    tmp_path: Path, filled: Path, settings: dict, arguments: dict, named: str, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = {name: make() for name, make in arguments.items()}
    if "processing_class" in arguments:
        arguments["teacher_processing_class"] = arguments["processing_class"]
    path = {"teacher_rollouts_path": str(filled)}
    assert len(tiny_trainer(tmp_path, settings=SMALL | path).rollout_cache.store) == 6
    with caplog.at_level(logging.WARNING, logger="sg_opd_trl"):
        trainer = tiny_trainer(tmp_path, settings=SMALL | path | settings, **arguments)
    assert len(trainer.rollout_cache.store) == 0
    (message,) = [text for text in caplog.messages if "none of this run's teacher and settings" in text]
    assert named in message


def test_a_stale_store_is_added_to(tmp_path: Path, cache: Path) -> None:
    trainer = run(tmp_path, cache, settings={"temperature": 0.9, "max_steps": 1})
    assert trainer.teacher.tokens_generated > 0
    assert logged(trainer, "anchor/cache_hits") == [0.0]
    assert len(lines(cache)) == 8


def test_a_teacher_is_known_by_its_weights_and_not_by_its_place(tmp_path: Path) -> None:
    for name in ("here", "there"):
        tiny_model(1).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    paths = [{"teacher_model": str(tmp_path / name), "teacher_processing_class": None} for name in ("here", "there")]
    run(tmp_path, tmp_path / "cache", **paths[0])
    assert run(tmp_path, tmp_path / "cache", **paths[1]).teacher.tokens_generated == 0
    moved(tiny_model(1)).save_pretrained(tmp_path / "there")
    assert run(tmp_path, tmp_path / "cache", **paths[1]).teacher.tokens_generated > 0


def test_a_verifier_may_change_between_runs(tmp_path: Path, cache: Path) -> None:
    def all_wrong(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [0.0] * len(completion_ids)

    trainer = run(tmp_path, cache, reward_funcs=all_wrong)
    assert trainer.teacher.tokens_generated == 0
    assert logged(trainer, "anchor/verified_share") == [0.0] * 3


def test_shared_prompts_are_cached_too(tmp_path: Path) -> None:
    settings = {"teacher_sampling_prompts": "share", "teacher_num_generations": 2}
    first, second = (run(tmp_path, tmp_path / "cache", settings=settings) for _ in range(2))
    assert (first.teacher.tokens_generated > 0, second.teacher.tokens_generated) == (True, 0)
    assert same_training(first, second)
    assert len(lines(tmp_path / "cache")) == len(set(lines(tmp_path / "cache"))) == 12


def test_every_visit_of_a_prompt_has_rollouts_of_its_own(tmp_path: Path) -> None:
    """Two prompts, two rollouts each, three permutations: 12 rollouts and not 4."""
    arguments = {"train_dataset": tiny_data(2), "settings": {"teacher_num_generations": 2}}
    first = run(tmp_path, tmp_path / "cache", **arguments)
    assert logged(first, "anchor/cache_misses") == [4.0] * 3
    assert sorted(line.split('"prompt_ids"')[0][-5:] for line in lines(tmp_path / "cache")) == sorted(
        f": {sample}, " for sample in (*range(6), *range(6))
    )
    assert run(tmp_path, tmp_path / "cache", **arguments).teacher.tokens_generated == 0


def test_prompts_of_a_subclass_are_drawn_anew_in_every_step(tmp_path: Path) -> None:
    class OnePrompt(TeacherAnchorCallback):
        def reserved_examples(self, trainer: Any, step: int, prompts: int) -> list[dict]:
            return [trainer.train_dataset[0]] * prompts

    trainers = [run(tmp_path, tmp_path / "cache", callbacks=[OnePrompt()]) for _ in range(2)]
    assert logged(trainers[0], "anchor/cache_misses") == [2.0] * 3
    assert trainers[1].teacher.tokens_generated == 0


def test_a_damaged_line_costs_one_rollout(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    (file,) = cache.glob("rollouts-*.jsonl")
    *others, last = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*others, last.replace(b"checksum", b"checkson")]))
    trainer = run(tmp_path, cache)
    assert logged(trainer, "anchor/cache_misses") == [0.0, 0.0, 1.0]
    assert any(str(file) in message for message in caplog.messages)
    assert run(tmp_path, cache).teacher.tokens_generated == 0


@pytest.mark.parametrize("cut", [20, 1, 0], ids=["in a line", "at the end", "between two lines"])
def test_a_store_that_was_cut_trains_as_if_it_were_whole(tmp_path: Path, cache: Path, cut: int) -> None:
    """The last step's rollouts were drawn together, and are drawn together again."""
    (file,) = cache.glob("rollouts-*.jsonl")
    content = file.read_bytes()
    last = content.splitlines(keepends=True)[-1]
    file.write_bytes(content[:-cut] if cut else content.removesuffix(last))
    trainer = run(tmp_path, cache)
    assert logged(trainer, "anchor/cache_misses") == [0.0, 0.0, 0.0 if cut == 1 else 2.0]
    assert same_training(trainer, run(tmp_path, None))
    assert run(tmp_path, cache).teacher.tokens_generated == 0


def test_a_data_set_on_the_hub_is_only_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, tmp_path / "cache", settings={"max_steps": 1})
    store = lines(tmp_path / "cache")
    monkeypatch.setattr("sg_opd_trl.teacher_sampling.stored.store._download", lambda path: tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    trainer = run(tmp_path, Path("user/rollouts"))
    assert logged(trainer, "anchor/cache_hits") == [2.0, 0.0, 0.0]
    assert trainer.teacher.tokens_generated > 0
    assert lines(tmp_path / "cache") == store
    assert len([text for text in caplog.messages if "are not in the data set user/rollouts" in text]) == 1


def test_a_resumed_run_reads_what_the_killed_one_wrote(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", None)
    settings = {"save_strategy": "steps", "save_steps": 1}
    run(tmp_path / "killed", tmp_path / "cache", settings=settings)
    trainer = tiny_trainer(
        tmp_path / "killed", settings=SMALL | settings | {"teacher_rollouts_path": str(tmp_path / "cache")}
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-1"))
    assert trainer.teacher.tokens_generated == 0
    assert logged(trainer, "loss") == logged(whole, "loss")


def test_ranks_that_lack_nothing_take_part_where_a_teacher_is_sharded(tmp_path: Path, cache: Path) -> None:
    trainer = tiny_trainer(tmp_path, settings=SMALL | {"teacher_rollouts_path": str(cache)})
    calls: list[int] = []
    generate = trainer.teacher.generate
    trainer.teacher.generate = lambda prompts, *rest: calls.append(len(prompts)) or generate(prompts, *rest)
    trainer.agree_on_calls = lambda calls: max(calls, 1)
    trainer.train()
    assert calls == [0, 0, 0]
    assert trainer.teacher.tokens_generated == 0


def taught(rows: int = 16) -> Dataset:
    return tiny_data(rows).add_column("teacher_id", ["one" if row % 2 else "two" for row in range(rows)])


def test_every_teacher_of_several_has_its_own_rollouts(tmp_path: Path) -> None:
    def trained(two: int) -> Any:
        teachers = {"one": tiny_model(1), "two": tiny_model(two)}
        return run(tmp_path, tmp_path / "cache", teacher_model=teachers, train_dataset=taught())

    first, same, other = trained(2), trained(2), trained(3)
    assert (first.teacher.tokens_generated > 0, same.teacher.tokens_generated) == (True, 0)
    assert same_training(first, same)
    one, two = (other.teacher.teachers[name].tokens_generated for name in ("one", "two"))
    assert (one, two > 0) == (0, True)
    assert len(list((tmp_path / "cache" / "contexts").glob("*.json"))) == 3


def test_the_prompt_that_the_teacher_reads_is_in_the_key(tmp_path: Path, cache: Path) -> None:
    data = tiny_data()
    hints = [[{"role": "user", "content": "1" + row["content"]}] for (row,) in data["prompt"]]
    trainer = run(tmp_path, cache, train_dataset=data.add_column("teacher_prompt", hints))
    assert logged(trainer, "anchor/cache_misses") == [2.0] * 3


def test_a_file_is_refused_at_construction(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SGOPDConfigError, match="`teacher_rollouts_path` must be a folder"):
        tiny_trainer(tmp_path, settings={"teacher_rollouts_path": str(tmp_path / "file")})


def test_a_path_without_an_anchor_is_refused_at_construction(tmp_path: Path) -> None:
    with pytest.raises(SGOPDConfigError, match="teacher_sampling_enable=True"):
        tiny_trainer(tmp_path, settings={"teacher_rollouts_path": "cache", "teacher_sampling_enable": False})


def test_a_sharded_model_without_a_path_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sg_opd_trl.teacher_sampling.stored.identity.is_sharded", lambda accelerator: True)
    with pytest.raises(SGOPDConfigError, match="Give the teacher as a path with weights of its own"):
        tiny_trainer(tmp_path, settings={"teacher_rollouts_path": str(tmp_path / "cache")})


def test_the_store_holds_text_and_no_verdict_of_a_training_run(tmp_path: Path) -> None:
    trainer = run(tmp_path, tmp_path / "cache", settings={"max_steps": 1})
    store = RolloutStore(tmp_path / "cache")
    assert '"verdict": null' in lines(tmp_path / "cache")[0]
    assert store.other_contexts().keys() == set(trainer.rollout_cache._contexts.values())


def test_folders_of_each_machines_own_are_told(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sg_opd_trl.teacher_sampling.stored.cache.machines_without", lambda folder: ["node-b"])
    tiny_trainer(tmp_path, settings=SMALL | {"teacher_rollouts_path": str(cache)})
    assert "`teacher_rollouts_path`" in caplog.text
    assert "is not one folder: ['node-b'] have one of their own" in caplog.text
