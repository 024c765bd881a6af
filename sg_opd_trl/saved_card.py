"""The card that PEFT writes beside every adapter, without a base that is a folder of this machine.

The Hub refuses a card whose `base_model` is no id of its own, and a path says more of the machine than of the model.
"""

from pathlib import Path

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

_TAG = "base_model:"


def without_local_base(folder: Path) -> None:
    """Take a base that is no id of the Hub out of the metadata of a folder's card, and out of its tags."""
    path = folder / "README.md"
    if not path.is_file():
        return
    card = ModelCard.load(path, ignore_metadata_errors=True)
    base = card.data.get("base_model")
    if not isinstance(base, str) or _may_be_on_the_hub(base):
        return
    card.data.base_model = None
    card.data.tags = [tag for tag in card.data.get("tags") or () if not (tag.startswith(_TAG) and tag.endswith(base))]
    # The text repeats it, for people who read the source.
    path.write_text(str(card).replace(base, Path(base).name), encoding="utf-8")


def _may_be_on_the_hub(name: str) -> bool:
    """Whether a model of this name could be on the Hub; a folder of this machine is not, whatever it is called."""
    if Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
