"""What may not be written or shown: tokens and keys, by their names, by their look, and those that a process knows.

There is one rule of each kind, and whoever writes or shows anything comes here:

| | names | look | known values |
|---|---|---|---|
| `scrubbed`, `scrubbed_text`: files | x | x | |
| `shown`: a console, a log, a message | x | x | x |

What a process happens to know stays out of files: the same run would write other files beside other variables.
"""

import copy
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import lru_cache
from itertools import pairwise
from typing import Any
from urllib.parse import quote, unquote

HIDDEN = "(hidden)"

# --- names -----------------------------------------------------------------------------------------------------------
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
# `authorization`, `oauth2` and `XAUTHORITY`, but no author.
_SECRET_WORD = re.compile(
    r"x?o?auth(?!or(s|ed|ing|ship)?$)|.*(secret|passw|passphrase|passcode|passfile|credential)|cookies?$|bearer$|"
    r"jwt$|pwd$|otp$|dsn$"
)
# Words that are written apart or together: `api_key`, `X-Api-Key`, `apikey`.
_SECRET_WORDS = re.compile(r"(api|access|private|secret|account|signing)keys?|(api|access|auth|refresh|hub)tokens?")
_SECRET_LAST = {"token", "key", "session", "sessionid", "pat", "sig", "signature"}
_PASSES = (["pass"], ["compass"], ["bypass"])
# `pad_token` is a token of a vocabulary, `sort_key` one of a table.
_NO_SECRETS = re.compile(
    r"(bos|eos|pad|mask|unk|sep|cls|special|image|audio|video|bo[iav]|eo[iavtmh]|stop|start|end|begin|prefix|suffix|"
    r"middle|think|per|next|last|first|previous|new|max|min|num|each|one|any|forced|decoder|"
    r"sort|primary|foreign|dict|column|dataset|group|label|cache|row|map|prompt|text|metric|state|past)$"
)


@lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Whether a setting, a header, a variable of the environment or a part of a URL of this name holds a secret."""
    words = [word.lower() for word in _WORD.findall(name) if not word.isdigit()]
    if any(map(_SECRET_WORD.match, words)) or _SECRET_WORDS.search("".join(words)):
        return True
    if words[-1:] == ["id"] and words[-2:-1] in (["key"], ["session"]):
        words.pop()
    if not words or any(map(_NO_SECRETS.match, words[-2:-1])):
        return False
    return words[-1] in _SECRET_LAST or (words[-1].endswith("pass") and words not in _PASSES)


def _hidden(value: Any) -> Any:
    """What stands under a secret's name, without its texts; `True` asks for the token of the machine and is none."""
    if isinstance(value, (str, bytes)):
        return HIDDEN if value else value
    if isinstance(value, Mapping):
        return {name: _hidden(each) for name, each in value.items()}
    return [_hidden(each) for each in value] if isinstance(value, (list, tuple, set, frozenset)) else value


# --- look ------------------------------------------------------------------------------------------------------------
_TOKEN = re.compile(
    r"\b(hf_(oauth_)?[A-Za-z0-9]{12,}|api_org_[A-Za-z0-9]{12,}|sk-(?=[\w-]{0,99}\d)[\w-]{12,}|[rs]k_(live|test)_\w{12,}|"
    r"gh[oprsu]_\w{12,}|github_pat_\w{12,}|glpat-[\w-]{12,}|xox[a-z]-[\w-]{10,}|A[KS]IA[0-9A-Z]{12,}|"
    r"AIza[\w-]{20,}|ya29\.[\w-]{12,}|nvapi-[\w-]{12,}|gsk_\w{12,}|npm_\w{12,}|pypi-[\w-]{12,}|"
    r"eyJ[\w-]{8,400}\.[\w-]{8,}(\.[\w-]*)?)"
)
_SCHEME = re.compile(
    r"\b(Bearer\s+(?!tokens?\b|auth)[\w.~+/=-]{6,}|Basic\s+(?=[\w+/]*[\d=])[\w+/]{8,}=*)", re.IGNORECASE
)
_URL = re.compile(r"\b(?!file:)[a-z][a-z0-9+.-]{0,20}://[^\s\"'<>`]+", re.IGNORECASE)
_REQUEST = re.compile(r"(?<=\b(?:GET|PUT) )/\S*|(?<=\b(?:POST|HEAD) )/\S*|(?<=\bPATCH )/\S*|(?<=\bDELETE )/\S*")
_UUID = re.compile(r"[0-9a-f]{8}(-?[0-9a-f]{4}){3}-?[0-9a-f]{12}", re.IGNORECASE)
# A commit of the Hub is public, and what an address of it is about.
_BEFORE_A_COMMIT = {"commit", "commits", "resolve", "tree", "blob", "raw"}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(
    r"(?P<quote>\\*[\"'`]?)(?P<name>(?<![\w.])[A-Za-z_][\w.-]{0,80})(?P=quote)\s*[:=]\s*|"
    r"--(?P<flag>[A-Za-z][\w-]{0,80})\s+(?!--)"
)
_QUOTED = re.compile(r"(?P<open>[bf]?(?P<mark>\\*[\"'`]))(?P<inside>(?:(?!(?P=mark))(?:\\.|[^\\\n]))*)(?P=mark)")
_UNCLOSED = re.compile(r"(?P<open>\\*[\"'`])(?P<inside>[^\n]+)")
_BARE = re.compile(r"(?P<inside>[^\s\"'`,;&)}\]]+)(?P<rest>[^\r\n\"'`]*)")
_PLAIN = re.compile(r"(None|null|True|False|true|false|[-+.\d]+|\(hidden|\$\w+|\$?\{\w+\}|<\w+>)$")


def scrubbed_text(text: str) -> str:
    """A text without what looks like a secret: tokens, users and keys in URLs, values behind the name of a secret."""
    if "/" in text:
        text = _URL.sub(lambda found: _scrubbed_url(found[0]), text)
        text = _REQUEST.sub(lambda found: _scrubbed_path(found[0]), text)
    text = _SCHEME.sub(lambda found: f"{found[0].split()[0]} {HIDDEN}", _TOKEN.sub(HIDDEN, text))
    return "".join(_without_named_values(text))


def _without_named_values(text: str) -> Iterator[str]:
    """`hub_token='...'`, `"api_key": "..."`, `Authorization: Bearer ...`, `--hub_token ...`; quotes of any depth."""
    end = 0
    for found in _NAME.finditer(text):
        name = found["name"] or found["flag"]
        if found.start() < end or not is_secret_name(name):
            continue
        value = _value_at(text, found.end())
        if value is None or _says_nothing(name, value, flag=found["flag"] is not None):
            continue
        yield text[end : value.start("inside")] + HIDDEN
        end = value.end("inside")
        if value.re is _BARE and re.search(r"auth|cookie", name, re.IGNORECASE):
            # A header has its value to the end of the line.
            end = value.end("rest")
    yield text[end:]


def _value_at(text: str, place: int) -> re.Match[str] | None:
    found = (pattern.match(text, place) for pattern in (_QUOTED, _UNCLOSED, _BARE))
    return next((value for value in found if value is not None), None)


def _says_nothing(name: str, value: re.Match[str], *, flag: bool) -> bool:
    """Whether no secret stands behind a name: nothing, a number, the next word (`Missing key: prompt`)."""
    inside = value["inside"]
    if not inside or _PLAIN.match(inside) or inside == HIDDEN:
        return True
    alone = len(_WORD.findall(name)) == 1 and name.lower() in _SECRET_LAST
    return value.re is _BARE and (alone or flag) and not _is_random(inside, 8)


def _scrubbed_url(url: str) -> str:
    # What closes a sentence or a bracket around it.
    core = url.rstrip(".,;:!?)]}")
    core += ")" if core.endswith(HIDDEN[:-1]) else ""
    rest, hash_mark, fragment = core.partition("#")
    rest, question_mark, query = rest.partition("?")
    scheme, _, rest = rest.partition("://")
    host, slash, path = rest.partition("/")
    query = re.sub(r"([^&;=]+)=([^&;]*)", _scrubbed_parameter, query)
    fragment = re.sub(r"([^&;=]+)=([^&;]*)", _scrubbed_parameter, fragment)
    fragment = HIDDEN if "=" not in fragment and _looks_like_a_key(fragment) else fragment
    where = f"{scheme}://{host.rpartition('@')[2]}{_scrubbed_path(slash + path)}"
    return f"{where}{question_mark}{query}{hash_mark}{fragment}{url[len(core) :]}"


def _scrubbed_parameter(found: re.Match[str]) -> str:
    hidden = found[2] and (is_secret_name(unquote(found[1])) or _looks_like_a_key(found[2]))
    return f"{found[1]}={HIDDEN}" if hidden else found[0]


def _scrubbed_path(path: str) -> str:
    return "/".join(HIDDEN if is_key else segment for segment, is_key in _segments(path))


def _segments(path: str) -> Iterator[tuple[str, bool]]:
    """Parts of a path between slashes, and whether each looks like a key.

    Names of models and of versions are made of short pieces (`Qwen2.5-7B-Instruct`, `2024-07-18`); a key has a long
    one, or several, in which letters and digits alternate. A UUID counts as a key: gateways use them as such, and
    where it is only a name, a reader loses little. A part whose name says so (`key=...`, `/token/...`) need not be
    long.
    """
    before = ""
    for segment in path.split("/"):
        named = is_secret_name(unquote(before)) and len(segment) >= 6 and _is_random(segment, 6)
        public = before in _BEFORE_A_COMMIT and _COMMIT.fullmatch(segment) is not None
        yield segment, not public and (named or _looks_like_a_key(segment))
        before = segment


def _looks_like_a_key(part: str) -> bool:
    part = unquote(part)
    named = re.match(r"(\w+?)([=:]|[-.~](?=[A-Za-z]*\d)(?=\d*[A-Za-z]))\S", part)
    if (named and is_secret_name(named[1])) or _UUID.search(part) or _TOKEN.search(part):
        return True
    pieces = re.findall(r"[A-Za-z0-9]+", part)
    return any(map(_is_random, pieces)) or sum(len(piece) >= 5 and _changes(piece) > 0 for piece in pieces) >= 3


def _is_random(piece: str, mixed: int = 16) -> bool:
    """Whether a piece is no word: letters among digits, or more letters than a word has, or than it has capitals."""
    if re.search(r"[A-Za-z]", piece) and re.search(r"\d", piece):
        return len(piece) >= mixed or (len(piece) >= 12 and _changes(piece) >= 3)
    capitals = sum(one.isupper() != two.isupper() for one, two in pairwise(piece))
    longest = 16 if piece.isdigit() else 20 if 4 * capitals >= len(piece) else 32
    return len(piece) >= longest


def _changes(piece: str) -> int:
    return sum(one.isdigit() != two.isdigit() for one, two in pairwise(piece))


# --- known values ----------------------------------------------------------------------------------------------------
_known: set[str] = set()
_SHORTEST = 6  # letters of a value that is looked for: shorter ones are in many words


def remember(value: Any, name: str = "") -> None:
    """Keep the secrets among some settings, so that `shown` finds them in whatever form a message quotes them.

    Args:
        value: settings by name, a text (JSON too), or lists of either.
        name: of a single setting.
    """
    _known.update(secret for secret in _secrets_in(value, is_secret_name(name)) if len(secret) >= _SHORTEST)


def _secrets_in(value: Any, named: bool = False) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _secrets_in(each, named or is_secret_name(str(name)))
    elif isinstance(value, (list, tuple, set, frozenset)):
        for each in value:
            yield from _secrets_in(each, named)
    elif isinstance(value, (str, bytes)):
        text = value if isinstance(value, str) else value.decode("latin-1")
        if named and not _PLAIN.match(text):
            yield from (text, text.strip(), text.strip("\"' "))
        yield from _secrets_of_a_text(text)


def _secrets_of_a_text(text: str) -> Iterator[str]:
    for url in _URL.findall(text):
        yield from (part for part, is_key in _segments(url.partition("://")[2].partition("?")[0]) if is_key)
    # JSON that cannot be read is quoted by the message that says so.
    for found in _NAME.finditer(text):
        if is_secret_name(found["name"] or found["flag"]):
            inside = _value_at(text, found.end())
            yield from (inside["inside"],) if inside is not None else ()
    try:
        parsed = json.loads(text) if text.lstrip().startswith(("{", "[")) else None
    except ValueError:
        return
    yield from _secrets_in(parsed)


def shown(text: str) -> str:
    """A text as it may be shown: as for a file, and without the secrets of the settings and of the environment."""
    named = {value.strip() for name, value in os.environ.items() if len(value) >= 8 and is_secret_name(name)}
    secrets = _known | {value for value in named if not value.startswith("/")}
    for form in sorted({form for secret in secrets for form in _forms(secret)}, key=len, reverse=True):
        text = text.replace(form, HIDDEN)
    return scrubbed_text(text)


def _forms(secret: str) -> set[str]:
    """A secret as it is, and as `repr`, JSON and URLs write it."""
    return {secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], quote(secret, safe=""), unquote(secret)}


# --- values ----------------------------------------------------------------------------------------------------------
def scrubbed(value: Any) -> Any:
    """A value without secrets, itself where it has none; entries of mappings go by their names too."""
    if isinstance(value, str):
        # An enumeration of strings stays what it is.
        return scrubbed_text(value) if type(value) is str else value
    if isinstance(value, Mapping):
        return {name: _hidden(each) if is_secret_name(str(name)) else scrubbed(each) for name, each in value.items()}
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(map(scrubbed, value))
    return value


def without_secrets(value: Any) -> Any:
    """A value as an identity has it: entries with the name of a secret are left out, as a run goes on with another."""
    if isinstance(value, Mapping):
        return {name: without_secrets(each) for name, each in value.items() if not is_secret_name(str(name))}
    if type(value) in (list, tuple):
        return type(value)(map(without_secrets, value))
    return scrubbed(value)


class WrittenWithoutSecrets:
    """A base for configurations, which transformers pickles into every checkpoint and pushes.

    Pickles, `repr` and `to_dict` hold no secrets; the configuration itself and its copies do, and the Hub gets them.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A dataclass writes its own otherwise, with every value.
        cls.__repr__ = WrittenWithoutSecrets.__repr__  # type: ignore[method-assign]

    def __getstate__(self) -> dict[str, Any]:
        # None: who loads it and pushes takes the token of the machine.
        return {
            name: None if isinstance(value, str) and is_secret_name(name) else value
            for name, value in scrubbed(dict(self.__dict__)).items()
        }

    def __copy__(self) -> Any:
        made = self.__class__.__new__(self.__class__)
        made.__dict__.update(self.__dict__)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = memo[id(self)] = self.__class__.__new__(self.__class__)
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __repr__(self) -> str:
        shown = scrubbed({field.name: getattr(self, field.name, None) for field in fields(self) if field.repr})  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def __str__(self) -> str:
        return repr(self)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for trackers, cards and reports."""
        values: dict[str, Any] = super().to_dict()  # type: ignore[misc]  # of transformers' TrainingArguments
        # Transformers takes whatever ends in `_token` for a secret, `pad_token` too.
        tokens = {name: getattr(self, name) for name in values if name.endswith("_token")}
        return scrubbed(values | tokens)
