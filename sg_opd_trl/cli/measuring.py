"""What `evaluate` and `demo` share: evaluating a model folder, remembering the result, showing it."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sg_opd_trl import __version__
from sg_opd_trl.errors import DataError

if TYPE_CHECKING:
    from rich.table import Table

    from sg_opd_trl.evaluation import EvaluationResult

logger = logging.getLogger(__name__)


def cached_evaluation(model: str, rows: Any, cache: Path, dataset_name: str, **settings: Any) -> "EvaluationResult":
    """Evaluate a local model folder, or read the result that an earlier run left.

    The name of the stored file hashes everything the result depends on: the bytes of the model's folder, the rows, the
    decoding settings and the version of this package.

    Args:
        model: local folder.
        rows: data set with `prompt` and `solution`.
        cache: folder of stored results.
        dataset_name: what reports call the rows.
        settings: keyword arguments of `evaluate_model`, JSON values only.

    Returns:
        The evaluation.
    """
    from sg_opd_trl.evaluation import EvaluationResult, evaluate_model

    key = hashlib.sha256()
    for path in sorted(Path(model).iterdir()):
        if path.is_file():
            key.update(path.name.encode() + path.read_bytes())
    key.update(json.dumps([list(rows), settings, __version__], sort_keys=True).encode())
    stored = cache / f"{key.hexdigest()[:24]}.json"
    if stored.is_file():
        try:
            return EvaluationResult.from_dict(json.loads(stored.read_text(encoding="utf-8")))
        except (DataError, ValueError, TypeError) as error:
            logger.warning("stored evaluation %s is not readable and is made again: %s", stored, error)
    result = evaluate_model(model, None, rows, dataset_name=dataset_name, **settings)
    result.save(stored)
    return result


def results_table(results: Mapping[str, "EvaluationResult"], title: str) -> "Table":
    """Accuracies in percent with 95% intervals, one row per model."""
    from rich.table import Table

    first = next(iter(results.values()))
    table = Table(title=title, caption="95% intervals: bootstrap over problems")
    table.add_column("")
    for heading in (f"avg@{first.num_samples}", "95% interval", f"pass@{first.k}", "95% interval"):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        table.add_row(
            name,
            _percent(result.avg_at_k),
            " to ".join(map(_percent, result.avg_interval)),
            _percent(result.pass_at_k),
            " to ".join(map(_percent, result.pass_interval)),
        )
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
