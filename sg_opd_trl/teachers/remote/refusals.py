"""What to do about a request that a server refused: the words are ours, its own are only searched for."""

from ...errors import TeacherError
from .settings import API_KEY_VARIABLE
from .transport import Reply, status_text

TOO_MANY_LOGPROBS = "too many log-probs"

# A word in the body of HTTP 400 or 422 -> what it asks for.
_REASONS = (
    (
        ("max_logprobs", "max logprobs", "logprobs of", "requested sample logprobs", "requested prompt logprobs"),
        TOO_MANY_LOGPROBS,
        "It allows fewer log-probs at a position than asked for. Start it with --max-logprobs -1, or lower "
        "`distillation_topk`.",
    ),
    (
        ("context length", "max_model_len", "maximum model length", "longer than"),
        "too long",
        "The sequence and the one token that scoring adds are longer than it takes. Start it with a larger "
        "--max-model-len, or lower `max_completion_length`.",
    ),
    (
        ("out of vocabulary", "out-of-vocab"),
        "unknown ids",
        "It lacks some of the student's token ids. Serve a teacher of the student's family.",
    ),
)
_WAYS_OUT = {
    401: f"It asks for a key. Set the environment variable {API_KEY_VARIABLE}.",
    403: f"It does not take this key, or none. Set the environment variable {API_KEY_VARIABLE}.",
    404: "It has no such path or model. Point `teacher_model_server_url` at vLLM, without /v1/completions at its end.",
    405: "It does not take such requests. Point `teacher_model_server_url` at vLLM's own address.",
    413: "The request is too large for it or for a proxy before it. Raise that limit.",
}
_OTHERWISE = "It does not take the request. Serve the teacher with vLLM, as `sg-opd serve-teacher` does."
_REDIRECTED = "It sends the request elsewhere, which is not followed. Set the URL that it leads to."


class RefusedRequest(TeacherError):
    """A request that a server will not take another time either.

    Attributes:
        kind: why, where it is known.
    """

    kind: str | None = None


def refusal(where: str, reply: Reply) -> RefusedRequest:
    """The error for a response whose status is not 200."""
    kind, way_out = None, _WAYS_OUT.get(reply.status, _OTHERWISE)
    if 300 <= reply.status < 400:
        way_out = _REDIRECTED
    if reply.status in (400, 422):
        text = reply.body[:10_000].decode("utf-8", errors="replace").lower()
        for words, name, advice in _REASONS:
            if any(word in text for word in words):
                kind, way_out = name, advice
                break
    error = RefusedRequest(
        f"`teacher_model_server_url` must name a server that takes the teacher's requests, got "
        f"{status_text(reply.status)} from {where}. Nothing was updated. {way_out}"
    )
    error.kind = kind
    return error
