"""`distillation_mode` -> its objective, refused where the models of the run cannot serve it."""

from typing import Any

from ..errors import SGOPDConfigError
from .asymmetric import Asymmetric
from .base import Objective, SupportObjective
from .full_logits import FullLogits
from .topk_logits import TopKLogits

OBJECTIVES: dict[str, type[Objective]] = {
    "sampled_token": Objective,
    "topk_logits": TopKLogits,
    "full_logits": FullLogits,
    "asymmetric": Asymmetric,
}

_WHY = {
    "full_logits": "It takes hidden states and an output head that is whole in this process, which a server or a "
    "sharded model has not. Set distillation_mode='topk_logits', which needs neither.",
    "topk_logits": "It takes the likeliest tokens of each position. Set distillation_mode='sampled_token'.",
    "asymmetric": "It takes the likeliest tokens of each position. Set distillation_mode='sampled_token'.",
    "sampled_token": "It cannot score tokens. Choose another teacher.",
}


def build_objective(trainer: Any) -> Objective:
    """The objective of a trainer whose teacher and reference are known.

    Raises:
        SGOPDConfigError: names the model that cannot serve it, or a support wider than the vocabulary.
    """
    args, teacher, reference = trainer.args, trainer.teacher, trainer.reference
    mode = args.distillation_mode
    asked = {"teacher": teacher} | ({"reference": reference} if reference is not None else {})
    for role, model in asked.items():
        if mode not in model.distillation_modes:
            raise SGOPDConfigError(
                f"`distillation_mode={mode!r}` is not supported with this {role}, which can serve "
                f"{', '.join(map(repr, sorted(model.distillation_modes)))}. {_WHY[mode]}"
            )
    student = trainer.model.config.get_text_config().vocab_size
    vocab_size = min([student, *(model.vocab_size for model in asked.values())])
    kind = OBJECTIVES[mode]
    if issubclass(kind, SupportObjective) and args.support_size > vocab_size:
        raise SGOPDConfigError(
            f"`distillation_topk` must not exceed the {vocab_size} ids that all models have, got "
            f"{args.support_size}. There are no more tokens. Set distillation_topk to at most {vocab_size}."
        )
    check_objective(type(trainer), kind, mode)
    return kind(args, teacher, reference, vocab_size)


def check_objective(trainer_class: type, kind: type[Objective], mode: str) -> None:
    """Refuse a subclass whose own routes the objective would pass over.

    Raises:
        SGOPDConfigError: `route_advantages` is overridden and `route_lambdas` is not.
    """

    def author(name: str) -> type:
        return next(owner for owner in trainer_class.__mro__ if name in vars(owner))

    passed_over = author("route_advantages") is not author("route_lambdas")
    passed_over = passed_over and issubclass(author("route_advantages"), author("route_lambdas"))
    if kind.routes_targets and passed_over:
        raise SGOPDConfigError(
            f"`{trainer_class.__name__}.route_advantages` is not used under distillation_mode={mode!r}: the routes "
            "pick the target of whole distributions there. Override `route_lambdas` (too), or set "
            "distillation_mode='sampled_token'."
        )
