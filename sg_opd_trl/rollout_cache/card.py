"""The card of a store, which also tells `datasets` how to read it."""

CARD_FILE = "README.md"

_CARD = """\
---
configs:
- config_name: default
  data_files: rollouts-*.jsonl
dataset_info:
  features:
  - name: context
    dtype: string
  - name: sample
    dtype: int64
  - name: prompt_ids
    list: int64
  - name: completion_ids
    list: int64
  - name: completion
    dtype: string
  - name: verdict
    dtype: float64
  - name: checksum
    dtype: string
tags:
- sg-opd
- teacher-rollouts
---

# Teacher rollouts

Completions that a frozen teacher wrote for the anchor of SG-OPD runs (`sg_opd_trl`). Set `teacher_rollouts_path` to
this folder or data set, and runs that ask for the same rollouts read them here.

| column | meaning |
|---|---|
| `context` | digest of teacher, tokenizer and sampling settings; `contexts/DIGEST.json` lists them |
| `sample` | tells the rollouts of one prompt apart |
| `prompt_ids` | token ids that the teacher read |
| `completion_ids` | token ids that it wrote, the end token included |
| `completion` | the same as text, special tokens left out |
| `verdict` | of the verifier when the rollout was written: 1 right, 0 wrong, null not judged then; runs judge anew |
| `checksum` | of the four columns that matter; a line that does not fit it is passed over |
"""


def store_card() -> str:
    """Markdown with the columns and their types."""
    return _CARD
