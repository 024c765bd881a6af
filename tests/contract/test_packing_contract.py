"""What packing leans on in TRL's fused head and in transformers' attention masks."""

import inspect

import torch
from tiny import tiny_model
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head


def test_the_fused_head_scores_shifted_labels_as_they_are() -> None:
    """Packing leans on it: the value at a position is that of its own label, as wide as the labels, 0 at -100."""
    model = tiny_model(0)
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    ids, labels = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[-100, 20, -100, 21, 22]])
    every = (model(ids).logits / 0.7).log_softmax(-1)
    outputs = model(input_ids=ids, shift_labels=labels, fused_lm_head=True)
    kept = labels != -100
    expected = every.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) * kept
    assert outputs.log_probs.shape == outputs.entropy.shape == labels.shape
    assert outputs.log_probs.dtype == outputs.entropy.dtype == torch.float32
    torch.testing.assert_close(outputs.log_probs, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs.entropy, -(every.exp() * every).sum(-1) * kept, atol=1e-5, rtol=0)


def test_positions_that_start_again_keep_rows_apart() -> None:
    """Packing leans on it: without an attention mask, transformers finds the rows by their positions."""
    positions = torch.tensor([[0, 1, 2, 0, 0, 1]])
    assert find_packed_sequence_indices(positions).tolist() == [[0, 0, 0, 1, 2, 2]]
    bounds = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
    assert FlashAttentionKwargs.__annotations__.keys() == bounds


def test_what_the_policy_forward_may_be_asked_for() -> None:
    """Entropies and the auxiliary loss are ours too; anything else is for images, and is not set for plain text."""
    parameters = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
    optional = list(parameters.values())[5:]  # self, model, ids, mask, width
    assert {"compute_entropy", "compute_aux_loss", "pixel_values"} <= {parameter.name for parameter in optional}
    assert all(parameter.default is None or parameter.default is False for parameter in optional)
