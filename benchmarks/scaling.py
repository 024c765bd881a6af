"""Cost of our step against batch, length, vocabulary and model size, one factor at a time, doubled.

    python benchmarks/scaling.py [--doublings 2] [--repeats 3] [--rows 16] [--length 128] [--vocab 4096] [--hidden 128]
        [--layers 2]

A whole SG-OPD step with teacher and reference, long-tailed rows in micro-batches of 4. The ratio is the step's time
over the time before the last doubling of one factor; `exponent` is that of a power law through the first and the last
time: 1 is linear. Rows, layers and vocabulary should come out at 1 or below (below, where a part of the step does not
depend on the factor), length too until attention outweighs the rest, and hidden size between 1 and 2.
"""

import math
from typing import Any

from harness import Ratio, Shape, arguments, completion_lengths, interleaved_medians, make_rollouts, show
from trainers import Setup, ours

FACTORS = ("rows", "length", "vocab", "hidden", "layers")


def setup_of(sizes: dict[str, int]) -> Setup:
    """Rows and models of given sizes."""
    shape = Shape(sizes["hidden"], sizes["layers"], sizes["vocab"])
    # The same eight lengths again and again: more draws with the same longest row would be shorter on average.
    lengths = completion_lengths("long-tailed", 8, sizes["length"]) * (sizes["rows"] // 8)
    return Setup(shape, make_rollouts(lengths, shape.vocab_size))


def measure(factor: str, sizes: dict[str, int], doublings: int, repeats: int) -> dict[int, float]:
    """Median seconds by size of one factor."""
    values = [sizes[factor] * 2**i for i in range(doublings + 1)]
    steps = {str(value): ours(setup_of(sizes | {factor: value})) for value in values}
    return {int(value): seconds for value, seconds in interleaved_medians(steps, repeats, factor).items()}


def summary(factor: str, seconds: dict[int, float]) -> Ratio:
    """The last doubling, and the exponent over all of them."""
    *_, before, last = values = list(seconds)
    exponent = math.log(seconds[last] / seconds[values[0]]) / math.log(last / values[0])
    course = ", ".join(f"{value}: {time * 1000:.0f} ms" for value, time in seconds.items())
    return Ratio(
        f"{factor} {before} -> {last}", seconds[last] / seconds[before], "", f"{course}; exponent {exponent:.2f}"
    )


def main() -> None:
    args: Any = arguments(__doc__ or "", doublings=2, repeats=3, rows=16, length=128, vocab=4096, hidden=128, layers=2)
    sizes = {factor: getattr(args, factor) for factor in FACTORS}
    seconds = {factor: measure(factor, sizes, args.doublings, args.repeats) for factor in FACTORS}
    show("scaling", [summary(*item) for item in seconds.items()], {"seconds": seconds, "settings": vars(args)})


if __name__ == "__main__":
    main()
