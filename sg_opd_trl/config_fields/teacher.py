"""Who teaches, and against what the teacher is extrapolated."""

from dataclasses import dataclass, field

from ..teachers.remote.settings import MAX_RETRIES, TIMEOUT


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
            "attention implementation are used unless given here (our choice). With `teacher_model_server_url` only "
            "`dtype`, for `sg-opd serve-teacher`."
        },
    )
    teacher_model_server_url: dict | str | list | None = field(
        default=None,
        metadata={
            "help": "URL of a vLLM server that has the teacher, such as http://localhost:8000; a list of URLs for "
            "replicas of it; or a mapping from names in the column `teacher_id` to either. "
            "`teacher_model_name_or_path` then says which model the server must have. `sg-opd serve-teacher` starts "
            "one (our choice)."
        },
    )
    teacher_request_timeout: float = field(
        default=TIMEOUT,
        metadata={
            "help": "Seconds that a request to a teacher server may take, its retries included, before the run ends "
            "with an error (our choice)."
        },
    )
    teacher_max_retries: int = field(
        default=MAX_RETRIES,
        metadata={
            "help": "How often a request that failed on all replicas of a teacher is sent again, after 0.5, 2, 8, 32, "
            "128 ... seconds as far as `teacher_request_timeout` allows (our choice)."
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
