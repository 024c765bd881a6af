"""What the baselines lean on in the SFTTrainer and GKDTrainer of TRL 1.16."""

import inspect
from typing import Any

import pytest
from datasets import Dataset
from tiny import tiny_model, tiny_tokenizer
from trl import SFTConfig, SFTTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.*trl.experimental.*")


def test_sft_takes_rows_of_token_ids_and_labels_as_they_are(tmp_path: Any) -> None:
    rows = [{"input_ids": [5, 6, 7, 1], "labels": [-100, -100, 7, 1]}, {"input_ids": [5, 1], "labels": [-100, 1]}]
    args = SFTConfig(str(tmp_path), max_length=None, use_cpu=True, bf16=False, report_to="none")
    trainer = SFTTrainer(tiny_model(0), args, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer())
    assert trainer.train_dataset.to_list() == rows


def test_gkd_reads_prompts_and_writes_what_its_loss_reads() -> None:
    from trl.experimental.gkd import GKDTrainer

    written = inspect.getsource(GKDTrainer.generate_on_policy_outputs)
    assert 'inputs["prompts"]' in written
    assert 'inputs["prompt_attention_mask"]' in written
    step = inspect.getsource(GKDTrainer.training_step)
    assert "self.generation_config" in step
    assert 'inputs["labels"] = new_labels' in step
    assert "random.random() <= self.lmbda" in step  # always with lmbda 1
    assert list(inspect.signature(GKDTrainer.compute_loss).parameters)[1:] == [
        *("model", "inputs", "return_outputs", "num_items_in_batch")
    ]


def test_gkd_divides_by_the_tokens_of_the_data_set_unless_told_that_there_are_none() -> None:
    """Why the baseline sets `model_accepts_loss_kwargs`: the count is taken before the student writes."""
    from transformers import Trainer
    from trl.experimental.gkd import GKDTrainer

    assert "num_items_in_batch=num_items_in_batch" in inspect.getsource(GKDTrainer.compute_loss)
    assert "self.model_accepts_loss_kwargs" in inspect.getsource(Trainer._get_num_items_in_batch)
    assert GKDTrainer.loss_is_scaled_for_ga is None


def test_gkd_refuses_another_vocabulary_by_name() -> None:
    from trl.experimental.gkd import GKDTrainer

    assert "The student model has vocab_size" in inspect.getsource(GKDTrainer.__init__)
