"""Who teaches, and against what the teacher is extrapolated."""

from dataclasses import dataclass, field


@dataclass
class TeacherFields:
    """Who teaches, and against what the teacher is extrapolated."""

    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Teacher model, a local folder or a Hub id, unless `teacher_model` is given to the trainer."
        },
    )
    teacher_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of `teacher_model_name_or_path`."}
    )
    teacher_model_init_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for `from_pretrained` of the teacher. The student's dtype and attention "
            "implementation are used unless given here (our choice)."
        },
    )

    reference_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Reference model of the extrapolation. Default: the student's initial weights (paper, section 3). "
            "The teacher's base model before RL gives G-OPD's reward correction (arXiv:2602.12125)."
        },
    )
    reference_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of `reference_model_name_or_path`."}
    )
    reference_model_init_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Keyword arguments for `from_pretrained` of the reference."}
    )
