"""Cards that are saved beside adapters pass the Hub's own checks of names, and hold no path of this machine."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from tiny import save_pair, tiny_trainer

from sg_opd_trl.saved_card import without_local_base

CARD = "---\nbase_model: {base}\ntags:\n- base_model:adapter:{base}\n- lora\n---\n\n# An adapter of {base}\n"


def test_checkpoints_and_students_of_a_local_base(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "teacher_sampling_enable": False}
    base, run = save_pair(tmp_path / "base", 0), tmp_path / "run"
    lora = peft.LoraConfig(target_modules=["q_proj"], r=2)
    trainer = tiny_trainer(run, settings=settings, model=base, peft_config=lora)
    trainer.train()
    trainer.save_model()
    for folder in (run, run / "checkpoint-1"):
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert base not in text
        card = ModelCard(text)
        assert card.data.get("base_model") is None
        assert card.data.library_name == "peft"
        assert "lora" in card.data.tags


def test_a_base_on_the_hub_stays(tmp_path: Path) -> None:
    text = CARD.format(base="owner/name")
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    without_local_base(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == text


def test_no_card_and_a_local_base(tmp_path: Path) -> None:
    without_local_base(tmp_path)
    base = tmp_path / "models" / "mine"
    base.mkdir(parents=True)
    (tmp_path / "README.md").write_text(CARD.format(base=base), encoding="utf-8")
    without_local_base(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.tags == ["lora"]
    assert "An adapter of mine" in card.text
