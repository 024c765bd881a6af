"""Who teaches, and against what the teacher is extrapolated."""

from dataclasses import dataclass, field


@dataclass
class TeacherFields:
    """Who teaches, and against what the teacher is extrapolated."""

    teacher_model_name_or_path: dict | str | None = field(
        default=None,
        metadata={
            "help": "Teacher model, a local folder or a Hub id, unless `teacher_model` is given to the trainer. A "
            "mapping from names to these gives several teachers: each row of the data set is taught by the one that "
            "its column `teacher_id` names (G-OPD, arXiv:2602.12125). A PEFT adapter on the base of a student that is "
            "trained with LoRA shares the student's weights."
        },
    )
    teacher_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of `teacher_model_name_or_path`, of all of them."}
    )
    teacher_model_init_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for `from_pretrained` of the teacher, of all of them. The student's dtype and "
            "attention implementation are used unless given here (our choice)."
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
