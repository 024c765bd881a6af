"""pass@k by hand and by enumeration, intervals against a slow loop, results as files."""

import itertools
import json
import random
import statistics
import subprocess
import sys

import pytest
from datasets import Dataset, DatasetDict
from repository import PATIENCE

from sg_opd_trl.errors import DataError, SGOPDConfigError
from sg_opd_trl.evaluation import EvaluationResult, bootstrap_interval, evaluate_model, pass_at_k

# --- pass@k -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_samples", "num_correct", "k", "expected"),
    [
        (4, 1, 2, 0.5),  # 1 - C(3,2)/C(4,2) = 1 - 3/6
        (8, 2, 4, 1 - 15 / 70),  # C(6,4) = 15, C(8,4) = 70
        (10, 3, 1, 0.3),  # pass@1 is the share of right samples
        (5, 0, 3, 0.0),
        (5, 3, 3, 1.0),  # only 2 wrong ones: a draw of 3 cannot miss
        (8, 1, 8, 1.0),
        (8, 0, 8, 0.0),
    ],
)
def test_pass_at_k_by_hand(num_samples, num_correct, k, expected):
    assert pass_at_k(num_samples, num_correct, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_the_share_of_draws_with_a_right_sample():
    for num_samples, num_correct, k in [(6, 2, 3), (7, 1, 5), (5, 4, 2)]:
        draws = list(itertools.combinations([1] * num_correct + [0] * (num_samples - num_correct), k))
        assert pass_at_k(num_samples, num_correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((4, 1, 5), "`k` must be between"), ((4, 1, 0), "`k` must be between"), ((0, 0, 1), "`k` must be between"),
     ((4, 5, 1), "`num_correct` must be between"), ((4, -1, 1), "`num_correct` must be between")],
)  # fmt: skip
def test_pass_at_k_refuses_impossible_counts(arguments, message):
    with pytest.raises(SGOPDConfigError, match=message):
        pass_at_k(*arguments)


# --- intervals --------------------------------------------------------------------------------------------------


def slow_interval(values, num_resamples, seed):
    """The same interval by resampling one problem at a time with the standard library."""
    source = random.Random(seed)
    means = sorted(statistics.fmean(source.choices(values, k=len(values))) for _ in range(num_resamples))
    cuts = statistics.quantiles(means, n=40)  # 40 parts of 2.5%
    return cuts[0], cuts[-1]


def test_interval_agrees_with_a_slow_loop():
    source = random.Random(4)
    values = [source.choice([0.0, 0.125, 0.5, 0.875, 1.0]) for _ in range(60)]
    low, high = bootstrap_interval(values, num_resamples=8000, seed=1)
    slow_low, slow_high = slow_interval(values, 8000, 2)
    # The standard error of a 2.5% quantile of 8000 resamples is about 2.67 * sd / sqrt(8000) = 0.03 sd of the mean.
    tolerance = 5 * 0.03 * statistics.pstdev(values) / 60**0.5 * 2**0.5
    assert abs(low - slow_low) < tolerance
    assert abs(high - slow_high) < tolerance
    assert low < statistics.fmean(values) < high


def test_interval_covers_the_truth_about_as_often_as_it_says():
    source = random.Random(0)
    hits = 0
    for trial in range(300):
        values = [float(source.random() < 0.4) for _ in range(50)]
        low, high = bootstrap_interval(values, num_resamples=2000, seed=trial)
        hits += low <= 0.4 <= high
    # 95% of 300 is 285; five standard errors (3.8 each) below is 266.
    assert 266 <= hits <= 299


def test_interval_is_the_same_in_pieces(monkeypatch):
    values = [0.0, 0.25, 1.0, 0.5]
    whole = bootstrap_interval(values, seed=3)
    monkeypatch.setattr("sg_opd_trl.evaluation._RESAMPLED_AT_ONCE", 64)
    assert bootstrap_interval(values, seed=3) == whole


@pytest.mark.parametrize("values", [[0.3], [1.0] * 20, [0.0] * 5])
def test_interval_without_spread_has_no_width(values):
    assert bootstrap_interval(values) == (values[0], values[0])


def test_interval_of_nothing_is_refused():
    with pytest.raises(DataError, match="got none"):
        bootstrap_interval([])


# --- the result as a file ---------------------------------------------------------------------------------------


@pytest.fixture
def result():
    return EvaluationResult(
        model="student", num_problems=4, num_samples=8, k=8, avg_at_k=0.25, avg_interval=(0.125, 0.5), pass_at_k=0.75,
        pass_interval=(0.25, 1.0), abstained=1, truncated=2, mean_length=5.5, temperature=0.7, top_p=0.9,
        max_new_tokens=6, seed=3, seconds=1.5,
    )  # fmt: skip


def test_result_survives_a_file(result, tmp_path):
    path = result.save(tmp_path / "new" / "result.json")
    assert EvaluationResult.from_dict(json.loads(path.read_text())) == result
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


def test_dict_holds_every_field_under_its_name(result):
    values = result.to_dict()
    assert values["avg_interval"] == [0.125, 0.5]
    assert (values["model"], values["k"], values["max_new_tokens"]) == ("student", 8, 6)
    assert len(values) == 23


def test_results_of_an_earlier_version(result):
    old = {name: value for name, value in result.to_dict().items() if name not in ("avg_bounds", "generation_kwargs")}
    assert EvaluationResult.from_dict(old | {"abstained": 0}).abstained == 0
    with pytest.raises(DataError, match=r"counted them as wrong.*Evaluate again"):
        EvaluationResult.from_dict(old | {"abstained": 1})


def test_other_files_are_refused():
    with pytest.raises(DataError, match="must have the fields"):
        EvaluationResult.from_dict({"accuracy": 1.0})


def test_import_is_light():
    code = "import sys, sg_opd_trl.evaluation as evaluation; evaluation.pass_at_k(4, 1, 2); print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE)
    assert {"torch", "transformers", "trl", "datasets"}.isdisjoint(shown.stdout.split())


BAD_SETTINGS = [
    ({"k": 9}, "`k` must be between 1 and `num_samples`, got 9"),
    ({"num_samples": 0}, "`k` must be"),
    ({"temperature": -1.0}, "`temperature` must be"),
    ({"temperature": float("nan")}, "`temperature` must be"),
    ({"top_p": 0.0}, "`top_p` must be"),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be"),
    ({"batch_size": 0}, "`batch_size` must be"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_SETTINGS)
def test_settings_out_of_range_before_anything_is_loaded(changes, message):
    with pytest.raises(SGOPDConfigError, match=message):
        evaluate_model(None, None, [{"prompt": "2+2="}], **changes)


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "must have rows, got none"), ([{"question": "w1"}], r"column `prompt`, got \['question'\]"),
     ([{"prompt": "w1"}, {"prompt": ""}], "not empty, got '' in row 1"), ([{"prompt": None}], "got None in row 0"),
     ([{"prompt": "w1", "solution": 1}, {"prompt": "w2"}], "same columns"),
     (DatasetDict({"test": Dataset.from_dict({"prompt": ["w1"]})}), r"one split, got the splits \['test'\]")],
)  # fmt: skip
def test_unusable_data_before_anything_is_loaded(rows, message):
    with pytest.raises(DataError, match=message):
        evaluate_model(None, None, rows)
