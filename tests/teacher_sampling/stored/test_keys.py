"""Every ingredient of a rollout changes its context, and nothing else does. No model is loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sg_opd_trl.teacher_sampling.stored import keys
from sg_opd_trl.teacher_sampling.stored.keys import (
    context_facts,
    differences,
    digest,
    folder_digest,
    tokenizer_facts,
)

TEACHER = {"model": {"contents": "abc"}, "dtype": "torch.float32"}
SAMPLING = {
    "max_new_tokens": 6,
    "eos_token_ids": (1, 5),
    "pad_token_id": 0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "generation_kwargs": {"suppress_tokens": [25]},
}


class Tokens:
    bos_token_id, eos_token_id, pad_token_id = None, 1, 0

    def __init__(self, vocab: dict[str, int] | None = None) -> None:
        self.vocab = vocab or {"a": 0, "b": 1, "c": 2}

    def get_vocab(self) -> dict[str, int]:
        return dict(self.vocab)


def context(teacher: Any = TEACHER, tokenizer: Any = None, **sampling: Any) -> str:
    return digest(context_facts(teacher, tokenizer_facts(tokenizer or Tokens()), SAMPLING | sampling))


def ended_by_two() -> Tokens:
    tokens = Tokens()
    tokens.eos_token_id = 2
    return tokens


CHANGES: dict[str, Callable[[], str]] = {
    "weights": lambda: context({"model": {"contents": "abd"}, "dtype": "torch.float32"}),
    "dtype": lambda: context(TEACHER | {"dtype": "torch.bfloat16"}),
    "a Hub id in place of a folder": lambda: context({"model": {"id": "a/b", "commit": "abc"}}),
    "another commit": lambda: context({"model": {"id": "a/b", "commit": "abd"}}),
    "the adapter on the same base": lambda: context(TEACHER | {"adapter": {"contents": "abc"}}),
    "the model of a server": lambda: context({"identity": {"name": "a/b", "fingerprint": None}}),
    "a token": lambda: context(tokenizer=Tokens({"a": 0, "b": 1, "d": 2})),
    "two tokens exchanged": lambda: context(tokenizer=Tokens({"b": 0, "a": 1, "c": 2})),
    "the end token": lambda: context(tokenizer=ended_by_two()),
    "length": lambda: context(max_new_tokens=7),
    "end ids": lambda: context(eos_token_ids=(1,)),
    "temperature": lambda: context(temperature=0.7),
    "top_p": lambda: context(top_p=0.95),
    "top_k": lambda: context(top_k=20),
    "min_p": lambda: context(min_p=0.1),
    "repetition_penalty": lambda: context(repetition_penalty=1.1),
    "suppressed ids": lambda: context(generation_kwargs={"suppress_tokens": [24, 25]}),
    "a further setting": lambda: context(generation_kwargs={"suppress_tokens": [25], "num_beams": 2}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_ingredient_changes_the_context(change: str) -> None:
    assert CHANGES[change]() != context()


def test_all_contexts_differ() -> None:
    made = [context(), *(change() for change in CHANGES.values())]
    assert len(set(made)) == len(made)


def test_what_is_the_same_has_the_same_context() -> None:
    assert context() == context(dict(reversed(TEACHER.items())))
    assert context() == context(tokenizer=Tokens({"c": 2, "a": 0, "b": 1}))
    assert context() == context(temperature=1, top_p=1, repetition_penalty=1), "YAML writes 1 for 1.0"
    assert context() == context(eos_token_ids=[1, 5])
    assert len(context()) == keys.DIGEST_LENGTH


def test_another_format_is_another_context(monkeypatch: pytest.MonkeyPatch) -> None:
    before = context()
    monkeypatch.setattr(keys, "FORMAT", keys.FORMAT + 1)
    assert context() != before


def test_digests_stay_as_they_are(tmp_path: Path) -> None:
    """Another digest would have every stored rollout written again."""
    assert context() == "6d3f59fa23cc32b280186568"
    assert folder_digest(model_folder(tmp_path / "a", MODEL)) == "fcac31d289f587c97cad43ad"


def test_facts_survive_a_file() -> None:
    facts = context_facts(TEACHER, tokenizer_facts(Tokens()), SAMPLING | {"generation_kwargs": {"watermark": object}})
    assert json.loads(json.dumps(facts)) == facts


def model_folder(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


MODEL = {"config.json": "{}", "model.safetensors": "weights"}


@pytest.mark.parametrize(
    "changed",
    [
        {"model.safetensors": "weightz"},
        {"config.json": '{"rope": 1}'},
        {"modeling.py": "x = 1"},
        {"pytorch_model.bin": "old"},
        {"model-00002.safetensors": "more"},
        {"adapter_config.json": "{}"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_folder_is_known_by_what_is_loaded_from_it(tmp_path: Path, changed: dict) -> None:
    assert folder_digest(model_folder(tmp_path / "b", MODEL | changed)) != folder_digest(
        model_folder(tmp_path / "a", MODEL)
    )


def test_a_folder_may_be_moved_and_have_other_files(tmp_path: Path) -> None:
    other = {"README.md": "text", "training_args.bin": "x", "tokenizer.json": "{}"}
    assert folder_digest(model_folder(tmp_path / "b", MODEL | other)) == folder_digest(
        model_folder(tmp_path / "a", MODEL)
    )


def test_weights_under_another_name_are_another_folder(tmp_path: Path) -> None:
    one, two = {"a.safetensors": "x"}, {"b.safetensors": "x"}
    assert folder_digest(model_folder(tmp_path / "a", one)) != folder_digest(model_folder(tmp_path / "b", two))


def test_a_folder_without_weights_says_nothing_of_them(tmp_path: Path) -> None:
    assert folder_digest(model_folder(tmp_path / "a", {"config.json": "{}", "weights.pt": "x"})) is None
    below = model_folder(tmp_path / "b", {"config.json": "{}"})
    model_folder(below / "sub", MODEL)
    assert folder_digest(below) is None
    assert folder_digest(below, "sub") is not None


def test_weights_in_a_subfolder_and_in_a_gguf_file_count(tmp_path: Path) -> None:
    made = []
    for name, text in (("a", "weights"), ("b", "weights"), ("c", "weightz")):
        folder = model_folder(tmp_path / name, MODEL | {"modeling.py": "x = 1"})
        model_folder(folder / "sub", MODEL | {"model.safetensors": text, "model.gguf": text})
        made.append([folder_digest(folder), folder_digest(folder, "sub"), folder_digest(folder, "sub", "model.gguf")])
        made[-1].append(folder_digest(tmp_path / "a", "", str(folder / "sub" / "model.gguf")))
    assert made[0] == made[1]
    assert made[0][0] == made[2][0]
    assert all(left != right for left, right in zip(made[0][1:], made[2][1:], strict=True))
    assert made[0][1] != made[0][2]
    assert folder_digest(tmp_path / "a", "", "no.gguf") is None
    before = folder_digest(tmp_path / "a", "sub")
    (tmp_path / "a" / "modeling.py").write_text("x = 2", encoding="utf-8")
    assert folder_digest(tmp_path / "a", "sub") != before, "code lies in the folder itself"


def test_differences_are_named() -> None:
    left = context_facts(TEACHER, {}, SAMPLING)
    right = context_facts(TEACHER | {"dtype": "torch.bfloat16"}, {}, SAMPLING | {"temperature": 0.7})
    assert list(differences(left, right)) == [
        "sampling.temperature: 1.0 and 0.7",
        "teacher.dtype: 'torch.float32' and 'torch.bfloat16'",
    ]
    assert list(differences(left, left)) == []
