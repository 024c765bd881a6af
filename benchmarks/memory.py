"""Peak memory of one optimizer step above the models, at growing completion length: ours against TRL's trainers.

    python benchmarks/memory.py [--lengths 64 128 256] [--vocab 151936] [--hidden 128] [--layers 2]
    python benchmarks/memory.py --by settings [--lengths 256] [--rows 64]
    python benchmarks/memory.py --by length --lengths 2048 4096 8192 16384 --hidden 64

By default the rows are 8 long-tailed ones of one prompt in micro-batches of 4. By setting each of ours has 64, and
what the models take is told too. By length one of the 8 is long, and the others have 16 tokens.

Each case runs in a fresh process. Models and optimizer state are there before the step and do not count; gradients,
activations and whatever the loss builds do. On the CPU it is the growth of the resident memory (sampled every two
milliseconds, and exact where the process passes its highest mark), on a GPU that of the allocator's peak. Large blocks
go back to the system at once, so that resident memory follows use.
"""

import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import psutil
import torch
from harness import ROLLOUTS_PER_PROMPT, Ratio, Shape, arguments, completion_lengths, make_rollouts, progress, show
from peft import LoraConfig
from trainers import Setup, distillation, grpo, ours
from transformers import BitsAndBytesConfig

TRAINERS = {"SG-OPD": ours, "TRL GRPO": grpo, "TRL Distillation": distillation}
MEGABYTE = 2**20
# glibc raises its threshold for blocks of their own with every block that is freed, unless it is set.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(MEGABYTE), "MALLOC_TRIM_THRESHOLD_": str(MEGABYTE)}


def saved(setup: Setup, *roles: str) -> Setup:
    """The same with models of these roles as the path of one folder, the student's; the others are objects."""
    folder = tempfile.mkdtemp()
    setup.student().save_pretrained(folder)
    setup.tokenizer().save_pretrained(folder)
    build = {"student": setup.student, "teacher": setup.teacher} | dict.fromkeys(roles, lambda: folder)
    return replace(setup, build=lambda role: build[role]())


def adapters(setup: Setup, *paths: str, bits: dict | None = None, **settings: Any) -> Any:
    """A student of which adapters on all linear layers are trained; of a quantized one too, where `bits` says how."""
    arguments: dict[str, Any] = {"peft_config": LoraConfig(target_modules="all-linear", r=8, task_type="CAUSAL_LM")}
    if bits:
        arguments["quantization_config"] = BitsAndBytesConfig(**bits)
    return ours(saved(setup, *paths), arguments, **settings)


def fewer_bits(setup: Setup, **bits: Any) -> Any:
    """A teacher in four or eight bits."""
    options = {"quantization_config": {"quant_method": "bitsandbytes", **bits}}
    return ours(saved(setup, "teacher"), teacher_model_init_kwargs=options)


FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
#: Of ours, by what is special about them; those in fewer bits only where bitsandbytes is installed.
SETTINGS: dict[str, Callable[[Setup], Any]] = {
    "sampled_token": ours,
    "topk_logits": partial(ours, distillation_mode="topk_logits"),
    "full_logits": partial(ours, distillation_mode="full_logits"),
    "gradient_checkpointing": partial(ours, gradient_checkpointing=True),
    "LoRA, the base as reference": lambda setup: adapters(setup, "student"),
    "LoRA, the base as reference and teacher": lambda setup: adapters(setup, "student", "teacher"),
}
IN_FEWER_BITS: dict[str, Callable[[Setup], Any]] = {
    "QLoRA, the base as reference": lambda setup: adapters(setup, "student", bits=FOUR_BITS),
    "QLoRA, the base as reference and teacher": lambda setup: adapters(setup, "student", "teacher", bits=FOUR_BITS),
    "teacher in 4 bits": partial(fewer_bits, **FOUR_BITS),
    "teacher in 8 bits": partial(fewer_bits, load_in_8bit=True),
}
SETTINGS |= IN_FEWER_BITS if find_spec("bitsandbytes") else {}


class ResidentPeak:
    """Samples the resident memory of this process in a thread."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.done = threading.Event()
        self.peak = 0

    def measure(self, step: Callable[[], Any]) -> int:
        """Growth in bytes at the step's peak."""
        before, mark = self.process.memory_info().rss, highest_mark()
        thread = threading.Thread(target=self._sample)
        thread.start()
        step()
        self.done.set()
        thread.join()
        # The kernel's own mark misses nothing, but only tells of a peak above all earlier ones.
        passed = highest_mark() if highest_mark() > mark else 0
        return max(self.peak, passed) - before

    def _sample(self) -> None:
        while not self.done.wait(0.002):
            self.peak = max(self.peak, self.process.memory_info().rss)


def highest_mark() -> int:
    """Largest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_peak(step: Callable[[], Any]) -> int:
    """Growth in bytes at the step's peak, of what torch has allocated on the GPU."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure_one(args: Any) -> None:
    """Worker: one trainer or setting, one length; prints megabytes."""
    shape = Shape(args.hidden, args.layers, args.vocab)
    longest = args.lengths[0]
    if args.by == "length":
        lengths = [longest] + [16] * (args.rows - 1)
    else:
        lengths = completion_lengths("long-tailed", args.rows, longest)
    setup = Setup(shape, make_rollouts(lengths, shape.vocab_size))
    stepper = TRAINERS[args.only](setup) if args.only in TRAINERS else SETTINGS[args.only](setup)
    stepper.create_optimizer_state()
    grown = device_peak(stepper) if torch.cuda.is_available() else ResidentPeak().measure(stepper)
    trained = [p for p in stepper.trainer.model.parameters() if p.requires_grad]
    sizes = {"peak": grown, "gradients": size_of(trained), "models": size_of(weights_of(stepper.trainer))}
    print(json.dumps({name: size / MEGABYTE for name, size in sizes.items()}))


def weights_of(trainer: Any) -> list[Any]:
    """All weights that a trainer of ours or TRL's holds on to; those that several models share once."""
    holders = [getattr(trainer, name, None) for name in ("teacher", "reference")]
    models = [trainer.model, *(getattr(holder, "model", None) for holder in holders)]
    return list({id(p): p for model in models if model is not None for p in model.parameters()}.values())


def size_of(tensors: list[Any]) -> int:
    """In bytes."""
    return sum(x.numel() * x.element_size() for x in tensors)


def run_case(args: Any, name: str, length: int) -> dict[str, float]:
    """Megabytes of one case, measured in its own process."""
    flags = {name: getattr(args, name) for name in ("by", "hidden", "layers", "vocab", "threads", "rows")}
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    command = [sys.executable, __file__, "--only", name, "--lengths", str(length), *words]
    done = subprocess.run(command, env=os.environ | ALLOCATOR, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    args = arguments(
        __doc__ or "",
        by=("trainer", "settings", "length"),
        lengths=[64, 128, 256],
        vocab=151_936,
        hidden=128,
        layers=2,
        rows=0,
        only="",
    )
    args.rows = args.rows or (64 if args.by == "settings" else ROLLOUTS_PER_PROMPT)
    if args.only:
        measure_one(args)
    else:
        {"trainer": by_trainer, "settings": by_settings, "length": by_length}[args.by](args)


def by_trainer(args: Any) -> None:
    """Ours over TRL's."""
    cases = [(length, name) for length in args.lengths for name in TRAINERS]
    megabytes: dict[int, dict[str, float]] = {length: {} for length in args.lengths}
    gradients = 0.0
    for length, name in progress(cases, "memory"):
        result = run_case(args, name, length)
        megabytes[length][name], gradients = result["peak"], result["gradients"]
    ratios = [
        Ratio(f"{length} tokens: SG-OPD / {other}", used["SG-OPD"] / used[other], target, detail(used, other))
        for other, target in (("TRL Distillation", "<= 1"), ("TRL GRPO", ""))
        for length, used in megabytes.items()
    ]
    show("memory", ratios, {"megabytes": megabytes, "of_which_gradients": gradients, "settings": vars(args)})


def by_settings(args: Any) -> None:
    """Every setting of ours over the first of them."""
    length = args.lengths[-1]
    results = {name: run_case(args, name, length) for name in progress(list(SETTINGS), "memory")}
    first = next(iter(results.values()))["peak"]
    ratios = [
        Ratio(name, used["peak"] / first, "", f"{used['peak']:.0f} MB above {used['models']:.0f} MB of models")
        for name, used in results.items()
    ]
    show("memory", ratios, {"megabytes": results, "settings": vars(args)})


def by_length(args: Any) -> None:
    """Each length over the one before it."""
    used = {length: run_case(args, "SG-OPD", length) for length in progress(args.lengths, "memory")}
    peaks = {length: result["peak"] for length, result in used.items()}
    ratios = [
        Ratio(
            f"{longer} / {length} tokens",
            peaks[longer] / peaks[length],
            f"<= {longer / length:g}",
            f"{peaks[longer]:.0f} MB / {peaks[length]:.0f} MB, {used[length]['gradients']:.0f} MB are gradients",
        )
        for length, longer in itertools.pairwise(args.lengths)
    ]
    show("memory", ratios, {"megabytes": used, "settings": vars(args)})


def detail(used: dict[str, float], other: str) -> str:
    """Both sides of a ratio."""
    return f"{used['SG-OPD']:.0f} MB / {used[other]:.0f} MB"


if __name__ == "__main__":
    main()
