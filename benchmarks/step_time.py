"""Time of one optimizer step on the same rows: ours against TRL's trainers.

    python benchmarks/step_time.py [--case all|long-tailed|fixed|shared-prompts|one-row|large-vocabulary]
        [--repeats 3] [--longest 384] [--hidden 256] [--layers 4] [--vocab 8192] [--against OTHER_CHECKOUT]

Cases, in micro-batches of 4 rows, 8 rollouts of each prompt:

- `long-tailed`: 32 rows of log-normal lengths. Also our own step on as many tokens in rows of one length, where
  nothing is padded: the limit of what trimming and ordering can reach.
- `fixed`: 32 completions of one length, so that there is no padding to save.
- `shared-prompts`: the same with prompts as long as the completions.
- `one-row`: the long-tailed rows in micro-batches of 1, where neither padding nor a prompt can be saved in training.
- `large-vocabulary`: 16 long-tailed rows, vocabulary 151,936, against TRL's DistillationTrainer alone.

All but the last also have our own step with every row computing its own prompt, in the same layouts otherwise.

A ratio above 1 means that the one named last is faster. Generation is not part of any time. Every trainer takes the
same rows through its own code, see `trainers.py`. GKD's collator needs chats and is left out; its step takes the
tensors that it would make. IW-OPD and GKD have no verifier and no reference model, and pad each micro-batch to its own
longest row. `padded_tokens` says how many tokens, padding included, one pass over the rows costs in our order;
`forwarded_tokens` how many of them each of our models was really run on in one step, and `least` how many different
ones there are: tokens with another past.

With `--against`, both checkouts measure in turns, see `against.py`; TRL's own trainers are then the control, whose
ratio should be 1.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

from against import compare_checkouts
from harness import (
    PROMPT_TOKENS,
    Ratio,
    Shape,
    arguments,
    completion_lengths,
    interleaved_medians,
    make_rollouts,
    show,
    versus,
)
from harness import without_padding as fixed_layout
from trainers import Setup, bare_scoring, distillation, gkd, grpo, iw_opd, opd, ours

from sg_opd_trl.models.forward import layouts_of, restrict_layouts

CASES = ("long-tailed", "fixed", "shared-prompts", "one-row", "large-vocabulary")
SG_OPD, OPD, ZERO_PADDING = "SG-OPD", "OPD", "SG-OPD without padding"
OWN_PROMPTS = "SG-OPD, prompts not shared"
GRPO, GRPO_SCORED = "TRL GRPO", "TRL GRPO + teacher + reference"
DISTILLATION, IW_OPD, GKD = "TRL Distillation", "TRL IW-OPD", "TRL GKD"


def measure(case: str, setup: Setup, repeats: int) -> tuple[dict[str, float], dict[str, int]]:
    """Median seconds by trainer, and the tokens that our models were run on in one step."""
    steps = {SG_OPD: ours(setup), OPD: opd(setup)}
    tokens = forwarded_tokens(steps[SG_OPD])
    if case != "large-vocabulary":
        steps[OWN_PROMPTS] = ours(setup)
        for model in models_of(steps[OWN_PROMPTS].trainer).values():
            restrict_layouts(model, replace(layouts_of(model), shared=False))
        own = forwarded_tokens(steps[OWN_PROMPTS])
        tokens |= {f"{name}, prompts not shared": count for name, count in own.items()}
    if case == "long-tailed":
        limit = fixed_layout(setup.rollouts, setup.shape.vocab_size)
        steps[ZERO_PADDING] = ours(Setup(setup.shape, limit, setup.micro_batch))
    if case == "fixed":
        steps[GRPO_SCORED] = bare_scoring(grpo(setup), setup)
    if case != "large-vocabulary":
        steps[GRPO] = grpo(setup)
    if case in ("long-tailed", "fixed"):
        steps |= {IW_OPD: iw_opd(setup), GKD: gkd(setup)}
    if case in ("long-tailed", "fixed", "large-vocabulary"):
        steps[DISTILLATION] = distillation(setup)
    return interleaved_medians(steps, repeats, case), tokens


def models_of(trainer: Any) -> dict[str, Any]:
    """Those of our trainer that run in a step."""
    return {"student": trainer.model, "teacher": trainer.teacher.model, "reference": trainer.reference.model}


def forwarded_tokens(stepper: Any) -> dict[str, int]:
    """Tokens, padding included, that each model is run on in one optimizer step."""
    counts, hooks = Counter[str](), []
    for name, model in models_of(stepper.trainer).items():

        def record(module: Any, args: tuple, inputs: dict, name: str = name) -> None:
            counts[name] += inputs["input_ids"].numel()

        hooks.append(model.register_forward_pre_hook(record, with_kwargs=True))
    stepper()
    for hook in hooks:
        hook.remove()
    return dict(counts)


def ratios(case: str, seconds: dict[str, float]) -> list[Ratio]:
    """What is compared, and with which target."""
    prefix = f"{case}: "
    if case == "large-vocabulary":
        return [versus(seconds, DISTILLATION, name, prefix, ">= 2") for name in (SG_OPD, OPD)]
    own = versus(seconds, OWN_PROMPTS, SG_OPD, prefix, ">= 1.3" if case == "shared-prompts" else "")
    if case in ("shared-prompts", "one-row"):
        return [own, versus(seconds, GRPO, SG_OPD, prefix), versus(seconds, GRPO, OPD, prefix)]
    others = [versus(seconds, slow, fast, prefix) for slow in (DISTILLATION, IW_OPD, GKD) for fast in (SG_OPD, OPD)]
    if case == "fixed":
        return [
            own,
            versus(seconds, SG_OPD, GRPO_SCORED, prefix, "<= 1.05"),
            versus(seconds, GRPO, SG_OPD, prefix),
            versus(seconds, GRPO, OPD, prefix),
            *others,
        ]
    return [
        own,
        versus(seconds, GRPO, SG_OPD, prefix, ">= 1.5"),
        versus(seconds, GRPO, OPD, prefix, ">= 1.8"),
        versus(seconds, SG_OPD, ZERO_PADDING, prefix, "<= 1.2"),
        *others,
    ]


def padded_tokens(setup: Setup) -> int:
    """Tokens of a pass over the rows, ordered by length, each micro-batch trimmed to its own longest rows."""
    rollouts = setup.rollouts
    rows = sorted(zip(rollouts.prompt_tokens, map(len, rollouts.completion_ids), strict=True), key=sum)
    total = 0
    for start in range(0, len(rows), setup.micro_batch):
        prompts, completions = zip(*rows[start : start + setup.micro_batch], strict=True)
        total += len(prompts) * (max(prompts) + max(completions))
    return total


def least_tokens(setup: Setup) -> int:
    """Different tokens of a pass over the rows: a prompt once, and all completions."""
    return sum(len(prompt.split()) for prompt in setup.rollouts.prompts) + setup.rollouts.tokens


def setups(args: Any) -> dict[str, Setup]:
    """Rows and models of every case."""
    shape = Shape(args.hidden, args.layers, args.vocab)
    large = Shape(args.large_hidden, args.layers, args.large_vocab)
    width = completion_lengths("fixed", 32, args.longest)[0]
    chosen: dict[str, tuple] = {
        "long-tailed": (shape, "long-tailed", 32, args.longest),
        "fixed": (shape, "fixed", 32, args.longest),
        "shared-prompts": (shape, "fixed", 32, args.longest, (width, width + 1)),
        "one-row": (shape, "long-tailed", 32, args.longest),
        "large-vocabulary": (large, "long-tailed", 16, args.large_longest),
    }

    def setup(shape: Shape, kind: str, rows: int, longest: int, prompts: tuple[int, int] = PROMPT_TOKENS) -> Setup:
        lengths = completion_lengths(kind, rows, longest)
        return Setup(shape, make_rollouts(lengths, shape.vocab_size, prompt_tokens=prompts))

    built = {case: setup(*facts) for case, facts in chosen.items() if args.case in (case, "all")}
    return {case: replace(made, micro_batch=1) if case == "one-row" else made for case, made in built.items()}


def seconds_by_trainer(result: dict) -> dict[str, float]:
    """The medians in a JSON line of this benchmark."""
    return {f"{case}: {name}": time for case, times in result["seconds"].items() for name, time in times.items()}


def main() -> None:
    args = arguments(
        __doc__ or "",
        case=("all", *CASES),
        repeats=3,
        longest=384,
        hidden=256,
        layers=4,
        vocab=8192,
        large_vocab=151_936,
        large_hidden=128,
        large_longest=96,
        against="",
    )
    if args.against:
        compare_checkouts("step_time", args, seconds_by_trainer)
        return
    lines: list[Ratio] = []
    data: dict = {"seconds": {}, "rows": {}}
    for case, setup in setups(args).items():
        seconds, forwarded = measure(case, setup, args.repeats)
        lines += ratios(case, seconds)
        rollouts = setup.rollouts
        data["seconds"][case] = seconds
        data["rows"][case] = {
            "rows": len(rollouts.completion_ids),
            "completion_tokens": rollouts.tokens,
            "prompt_tokens": sum(rollouts.prompt_tokens),
            "padding": rollouts.padding,
            "padded_tokens": padded_tokens(setup),
            "forwarded_tokens": forwarded,
            "least": least_tokens(setup),
            "shape": vars(setup.shape),
        }
    show("step_time", lines, data | {"settings": vars(args)})


if __name__ == "__main__":
    main()
