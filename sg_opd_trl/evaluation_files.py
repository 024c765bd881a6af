"""What an evaluation leaves on disk: each sample as soon as it is judged, and the result.

Lines and results say which evaluation they are of (`Identity`). So a call that was interrupted goes on where it
stopped, one that had ended is not made again, and a file of another evaluation is neither mixed with nor overwritten.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .errors import SGOPDConfigError
from .evaluation_plan import Identity
from .files import check_file, write_atomically

_MARK = "evaluation"
_BEGINNING = '{"problem": '  # of a line


class EvaluationFiles:
    """The samples' file and the result's, each of which there may be.

    Args:
        samples_path: JSON Lines file of all samples; None keeps them beside the result until that is there.
        output_path: JSON file of the result, None for none.

    Attributes:
        lasting: whether the samples are to stay.
        output: path of the result, or None.

    Raises:
        SGOPDConfigError: a path that cannot be written, or one path for both.
    """

    def __init__(
        self, samples_path: str | os.PathLike[str] | None, output_path: str | os.PathLike[str] | None
    ) -> None:
        check_file("output", output_path)
        check_file("samples_path", samples_path)
        self.output = None if output_path is None else Path(output_path)
        self.lasting = samples_path is not None
        self._samples = None if samples_path is None else Path(samples_path)
        if self.output is not None and self._samples is None:
            self._samples = self.output.with_name(f"{self.output.name}.samples.jsonl")
        elif self.output is not None and self.output.absolute() == Path(samples_path or "").absolute():
            raise SGOPDConfigError(
                f"`samples_path` must be another file than `output`, got {str(samples_path)!r} for both. One would "
                "overwrite the other. Set another."
            )

    @property
    def there(self) -> bool:
        """Whether there is any file, and so whether anything has to say whose it is."""
        return self._samples is not None

    def check(self, identity: Identity) -> None:
        """Refuse files of another evaluation; before a model is loaded, as far as it is known by then.

        Raises:
            SGOPDConfigError: names the file and what is different.
        """
        self.result(identity)
        self.samples(identity)

    def result(self, identity: Identity) -> dict[str, Any] | None:
        """The result of this evaluation; None where there is none yet."""
        if self.output is None or not self.output.exists():
            return None
        values = _read_json(self.output.read_text(encoding="utf-8", errors="replace"))
        mark = values.get("identity") if isinstance(values, dict) else None
        _refuse_others("output", self.output, identity.differences(mark))
        return values

    def samples(self, identity: Identity) -> list[dict[str, Any]]:
        """All samples of this evaluation so far, as `Sample.to_dict` wrote them."""
        if self._samples is None or not self._samples.exists():
            return []
        # Not `splitlines`: a completion may hold what that takes for the end of a line (U+2028, U+0085).
        *lines, unfinished = self._samples.read_text(encoding="utf-8", errors="replace").split("\n")
        found = []
        for number, line in enumerate([*lines, unfinished] if unfinished else lines):
            values = _read_json(line)
            if values is None and number == len(lines) and _BEGINNING.startswith(line[: len(_BEGINNING)]):
                break  # the line that an interrupted call did not end
            mark = values.pop(_MARK, None) if isinstance(values, dict) else None
            _refuse_others("samples_path" if self.lasting else "output", self._samples, identity.differences(mark))
            found.append(values)
        return found

    def restart(self, identity: Identity, samples: Iterable[Mapping[str, Any]]) -> None:
        """Leave these samples in the file and nothing else."""
        if self._samples is not None:
            write_atomically(self._samples, "".join(_line(sample, identity) for sample in samples))

    def add(self, identity: Identity, samples: Iterable[Mapping[str, Any]]) -> None:
        """Append samples; they are on disk when this returns, whatever becomes of the process."""
        if self._samples is not None:
            with self._samples.open("a", encoding="utf-8") as file:
                file.write("".join(_line(sample, identity) for sample in samples))

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the result; samples that were only kept to go on are no longer needed."""
        if self.output is not None:
            write_atomically(self.output, json.dumps(result, indent=2) + "\n")
            if not self.lasting and self._samples is not None:
                self._samples.unlink(missing_ok=True)


def _line(sample: Mapping[str, Any], identity: Identity) -> str:
    # A solution of any type must not end an evaluation: what JSON does not know is written as text.
    return json.dumps({**sample, _MARK: asdict(identity)}, ensure_ascii=False, default=str) + "\n"


def _read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _refuse_others(setting: str, path: Path, differences: list[str]) -> None:
    if differences:
        raise SGOPDConfigError(
            f"`{setting}` must be a new file, or one of this evaluation to go on with, got {str(path)!r}, which has "
            f"{' and '.join(differences)}. It would be mixed or overwritten. Set another path, or delete it."
        )
