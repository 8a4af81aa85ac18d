"""What the fuzz tests share: mutations of inputs, the time limit, and what a reader may do.

A reader may return a result or raise `InputError` or `OSError` with the name of the file. Each test
adds what a result has to be: that of the intact input where the format has checksums, otherwise
that of an independent reader.

`LIT_DISTILL_FUZZ=10 pytest tests/fuzz` tries ten times as many inputs. A fault that it finds
becomes a line of `corpus.py`.
"""

import json
import os
import signal
import warnings
from contextlib import contextmanager

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from lit_distill.errors import InputError

FACTOR = int(os.environ.get("LIT_DISTILL_FUZZ", "1"))

SECONDS = 10
"""Limit of one input; intact ones take a few milliseconds."""

COUNTS = {
    "csv": 2500,
    "json": 1500,
    "jsonl": 1000,
    "metadata": 1000,
    "prompts": 1500,
    "png": 2500,
    "pictures": 2000,
    "latents": 1500,
    "lora bytes": 1500,
    "lora tensors": 1500,
    "lora settings": 1500,
    "checkpoint bytes": 2000,
    "checkpoint content": 1500,
    "student": 100,
}
"""Number of inputs of each test."""

REFUSED = object()
"""What `attempt` returns if the reader refuses the input."""


class HangError(BaseException):
    """A reader took too long; not an Exception, so that no reader catches it."""


@contextmanager
def time_limit():
    def stop(*_):
        raise HangError(f"no result after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(read, path, *arguments, beside=(), **options):
    """Return the reader's result, or `REFUSED` after a permitted error; all else is a failure.

    The error names the file at `path`, or one of those `beside` it that are read with it.
    """
    try:
        with time_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read(path, *arguments, **options)
    except (InputError, OSError) as error:
        message = str(error)
        message.encode()  # it can be printed
        named = any(str(each) in message for each in (path, *beside))
        assert named, f"the message does not name the file: {message!r}"
        assert len(message) < 50_000, f"a message of {len(message)} characters"
        return REFUSED


def fuzz(name, check, **strategies):
    """Call `check` with `COUNTS[name]` inputs or more, the same ones in every run."""
    tried = 0

    @seed(0)
    @settings(
        max_examples=COUNTS[name] * FACTOR,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(**strategies)
    def many(**values):
        nonlocal tried
        tried += 1
        check(**values)

    many()
    assert tried >= COUNTS[name] * FACTOR


# Bytes

TOKENS = [
    *(
        b"\0",
        b"\r",
        b"\n",
        b"\r\n",
        b'"',
        b'""',
        b",",
        b"\t",
        b";",
        b"'",
        b"\\",
        b"{",
        b"}",
        b"[",
        b"]",
    ),
    *(b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf", b"\xc3\x28", b"\xed\xa0\xbd", b"\x1a", b"\x85"),
    *(b"NaN", b"-Infinity", b"1e999", b"-1", b"0x10", b"true", b"null", b"5.0", b"9" * 400),
    *(
        "\u2028\u00a0\u0663😀\x0b\x0c\x1c".encode(),
        b"\\ud83d",
        b"\\u0000",
        b"a.png",
        b"../",
        b"/dev/zero",
    ),
    *(b"[" * 5000, b'{"a":' * 3000, b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"x" * 200_000),
]

CODECS = ["utf-16", "utf-16-le", "utf-32", "latin-1", "cp037", "utf-7"]

_places = st.integers(0, 2**24 - 1)

edits = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), _places, st.integers(0, 7)),
        st.tuples(st.just("set"), _places, st.integers(0, 255)),
        st.tuples(st.just("cut"), _places, st.just(0)),
        st.tuples(st.just("delete"), _places, st.integers(1, 40)),
        st.tuples(st.just("repeat"), _places, st.integers(1, 40)),
        st.tuples(st.just("token"), _places, st.integers(0, len(TOKENS) - 1)),
        st.tuples(st.just("insert"), _places, st.binary(min_size=1, max_size=12)),
        st.tuples(st.just("number"), _places, st.sampled_from([0, 1, 2**31 - 1, 2**32 - 1])),
        st.tuples(st.just("recode"), st.just(0), st.sampled_from(CODECS)),
    ),
    min_size=1,
    max_size=3,
)
"""Changes to bytes: kind, place (modulo the length), and what it takes."""


def edited(data, changes):
    """Return bytes with `edits` made to them."""
    for kind, place, value in changes:
        at = place % (len(data) + 1)
        if kind == "flip" and data:
            at %= len(data)
            data = data[:at] + bytes([data[at] ^ 1 << value]) + data[at + 1 :]
        elif kind == "set":
            data = data[:at] + bytes([value]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "delete":
            data = data[:at] + data[at + value :]
        elif kind == "repeat":
            data = data[: at + value] + data[at:]
        elif kind == "insert":
            data = data[:at] + value + data[at:]
        elif kind == "token":
            data = data[:at] + TOKENS[value] + data[at:]
        elif kind == "number":
            order = "little" if place % 2 else "big"
            data = data[:at] + value.to_bytes(4, order) + data[at + 4 :]
        elif kind == "recode":
            data = data.decode(errors="replace").encode(value, errors="replace")
    return data


def files(*samples):
    """A strategy: one of the samples, mutated, or random bytes."""
    mutated = st.builds(edited, st.sampled_from(samples), edits)
    return st.one_of(mutated, mutated, mutated, st.binary(max_size=300))


# Values

ODD = [
    *(None, True, False, 0, 1, -1, 7, 2**31, 2**63, 10**25, 0.5, -2.5, 1e308),
    *(
        float("nan"),
        float("inf"),
        float("-inf"),
        "",
        " ",
        "x",
        "0",
        "1",
        "true",
        "nan",
        "\0",
        "\ud83d",
    ),
    *("none", "../a.png", "/dev/zero", "s3://b/a", "file:///etc/hosts", "[", "(a+)+$", "x" * 5000),
    *(
        "\r",
        "\n",
        '"',
        "😀",
        "\u2028",
        "٣",
        [],
        [1],
        [None],
        ["x"],
        {},
        {"x": 1},
        {"": None},
        [[[]]],
    ),
]

changes = st.lists(
    st.tuples(
        st.sampled_from(["value", "value", "value", "remove", "rename", "copy", "add", "twice"]),
        _places,
        st.integers(0, len(ODD) - 1),
    ),
    min_size=1,
    max_size=3,
)
"""Changes to a value made of dictionaries and lists: kind, place, and a new value."""


class Pairs(dict):
    """A dictionary that is written with one of its keys twice."""

    def items(self):
        items = list(super().items())
        return items + [(key, "other") for key, _ in items[:1]]


def containers(value):
    """All dictionaries and lists in a value that are not empty."""
    nested = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    here = [value] if isinstance(value, dict | list) and len(value) else []
    return here + [each for child in nested for each in containers(child)]


def changed(value, changes):
    """Return a deep copy with `changes` made to it."""
    top = [json_copy(value)]
    for kind, place, number in changes:
        odd = json_copy(ODD[number])
        inside = containers(top)
        target = inside[place % len(inside)]
        keys = list(target) if isinstance(target, dict) else list(range(len(target)))
        key = keys[place // len(inside) % len(keys)]
        if kind == "value":
            target[key] = odd
        elif kind == "remove" and target is not top:
            del target[key]
        elif kind == "copy":
            target[key] = json_copy(target[keys[place // 97 % len(keys)]])
        elif kind in ("rename", "add") and isinstance(target, dict):
            kept = target.pop(key) if kind == "rename" else target[key]
            target[odd if isinstance(odd, str) else f"{key}_"] = kept
        elif kind == "twice" and target is not top and isinstance(target[key], dict):
            target[key] = Pairs(target[key])
    return top[0] if top else None


def json_copy(value):
    """A deep copy that shares leaves: tensors are not copied."""
    if isinstance(value, dict):
        return type(value)({k: json_copy(v) for k, v in dict.items(value)})
    return [json_copy(v) for v in value] if isinstance(value, list) else value


def json_text(value):
    """JSON with what Python can't write: repeated keys and lone surrogates."""
    if isinstance(value, dict):
        pairs = (f"{json.dumps(str(k))}: {json_text(v)}" for k, v in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(json_text(v) for v in value) + "]"
    return json.dumps(value)
