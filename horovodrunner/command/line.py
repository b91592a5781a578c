"""What the command line of ``run`` says. Runs in: the command line.

Nothing heavy is imported here: ``--help`` is immediate.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from horovodrunner.command.horovodrun import HOROVODRUN, Option

__all__ = ["CommandLine", "UsageError", "help_text", "parse"]

_OWN = (
    Option(("-h", "--help"), (), "show this and leave"),
    Option(("-np", "--num-proc"), ("N",), "number of ranks; negative: on this machine, no Spark"),
    Option(("--start-timeout",), ("S",), "seconds that the ranks may take to start (600)"),
    Option(("--output-filename",), ("DIR",), "write DIR/rank.N/stdout and stderr as well"),
    Option(("--verbose",), (), "tell each step of the run on standard error"),
)

_RUNNER = (
    Option(("--code-dir",), ("DIR",), "directory that travels, if it is not the script's"),
    Option(("--checkpoint-dir",), ("DIR",), "where checkpoint.save() keeps checkpoints; or a URL"),
    Option(("--keep-checkpoints",), ("N",), "how many (3)"),
    Option(("--keep-best",), ("WHAT",), "and the best one: val_loss:min; the best 3: acc:max:3"),
    Option(("--keep-every",), ("N",), "and those whose step is a multiple of N"),
    Option(("--no-resume",), (), "do not go on from the newest one"),
    Option(("--max-restarts",), ("N",), "launches after a lost worker or executor (0)"),
    Option(("--sigterm-grace",), ("S",), "on SIGTERM let the ranks save, and end after so long"),
    Option(("--stall-timeout",), ("S",), "end a run whose ranks wait for each other so long"),
    Option(("--run-dir",), ("DIR",), "keep a record of the run there; or a URL"),
    Option(
        ("--run-key",), ("KEY",), "do it once: what --run-dir knows to be done is not done again"
    ),
    Option(("--on-change",), ("WHAT",), "of other code or arguments: refuse (default) or rerun"),
    Option(("--tensorboard-dir",), ("DIR",), "write TensorBoard's event files there"),
    Option(("--env",), ("K=V",), "a variable of the ranks; may be repeated"),
    Option(("--forward",), ("PATTERN",), "variables of here that they get, too: 'AWS_*'; repeat"),
    Option(("--ranks-per-task",), ("K",), "ranks of one Spark task; gpu: one for each of its GPUs"),
    Option(("--preflight",), (), "try the network between the hosts before the script starts"),
)

_SPARK = (
    Option(("--master",), ("MASTER",), "Spark's master: local[4], spark://..., yarn, sc://..."),
    Option(("--conf",), ("K=V",), "a setting of the session; may be repeated"),
)

_USAGE = """\
usage: python -m horovodrunner run -np N [options] [--] [python] SCRIPT [arguments]
       python -m horovodrunner run -np N [options] [--] [python] -m MODULE [arguments]

Run a Python script on every rank: on Spark, or with a negative N as processes of this machine.
Without --master the session is what spark-submit or the environment names, else Spark's default.
"""

_END = """\
exit code: 0, or that of the rank that failed first (128 + its signal); 1 for other failures;
2 for a wrong command line; 75 where trying again makes sense: the ranks did not start in time, an
executor was lost, or another driver has taken over the --run-key; 130 after Ctrl-C, 143 after
SIGTERM."""

_PYTHON = re.compile(r"python(3(\.\d+)?)?")
_BEST = re.compile(r"(.+):(min|max)(?::(\d+))?")
_COLUMN = 34


class UsageError(Exception):
    """The command line cannot be understood."""


@dataclass
class CommandLine:
    """What is to be run, and how."""

    np: int
    script: str
    arguments: list[str]
    output_filename: str | None = None
    verbose: bool = False
    code_dir: str | None = None
    key: dict[str, str] = field(default_factory=dict)
    """``run_key`` and ``on_change`` of run_script, as far as they are given."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keywords of HorovodRunner."""
    master: str | None = None
    conf: dict[str, str] = field(default_factory=dict)


def parse(words: Sequence[str]) -> CommandLine | None:
    """Read the command line; None where it asks for help. Raises UsageError."""
    options, command = _split(words)
    given = _parser().parse_args(options)
    if given.help:
        return None
    if given.np is None:
        raise UsageError("-np lacks: how many ranks are to run? -np 2, or -np -2 on this machine")
    spark = [name for name in ("master", "conf") if getattr(given, name)]
    if given.np < 0 and spark:
        raise UsageError(
            f"--{spark[0]} makes no sense with -np {given.np}, which runs on this machine without "
            f"Spark: leave it out, or give -np {-given.np}"
        )
    named = vars(given)
    keywords = {
        name: named[name]
        for name in (
            *("start_timeout", "checkpoint_dir", "keep_checkpoints", "keep_every", "max_restarts"),
            *("sigterm_grace", "stall_timeout", "run_dir", "tensorboard_dir", "forward"),
        )
        if named[name] is not None
    }
    if given.keep_best is not None:
        keywords["keep_best"] = _best(given.keep_best)
    if given.env:
        keywords["environment"] = _settings("--env", given.env)
    if given.ranks_per_task is not None:
        number = given.ranks_per_task
        keywords["ranks_per_task"] = int(number) if number.isdecimal() else number
    if given.preflight:
        keywords["preflight"] = True
    if given.no_resume:
        keywords["resume"] = False
    if given.horovodrun:
        keywords["horovodrun_args"] = given.horovodrun
    script, arguments = _script(command)
    return CommandLine(
        given.np,
        script,
        arguments,
        given.output_filename,
        given.verbose,
        given.code_dir,
        {name: named[name] for name in ("run_key", "on_change") if named[name] is not None},
        keywords,
        given.master,
        _settings("--conf", given.conf),
    )


def help_text() -> str:
    """Return the help with all options."""
    parts = [_USAGE]
    for title, options in (
        ("options, named as horovodrun's are", _OWN),
        ("the run", _RUNNER),
        ("Spark", _SPARK),
        ("Horovod's own options, which its parser reads", HOROVODRUN),
    ):
        lines = [_help_line(each) for each in options if each.help]
        parts.append("\n".join([f"{title}:", *lines, ""]))
    return "\n".join([*parts, _END])


def _help_line(option: Option) -> str:
    left = "  " + " ".join([", ".join(option.names), *option.values])
    gap = "\n" + " " * _COLUMN if len(left) >= _COLUMN - 1 else " " * (_COLUMN - len(left))
    return f"{left}{gap}{option.help}"


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Find where the options end: at ``--``, or at the first word that is none of theirs."""
    known = {name: each for each in (*_OWN, *_RUNNER, *_SPARK, *HOROVODRUN) for name in each.names}
    place = 0
    while place < len(words):
        word = words[place]
        if word == "--":
            return [*words[:place]], [*words[place + 1 :]]
        if not word.startswith("-") or word == "-m":
            return [*words[:place]], [*words[place:]]
        name, equals, _ = word.partition("=")
        takes = known[name].values if name in known else ()
        place += 1 if equals else 1 + len(takes)
    return [*words], []


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


class _Keep(argparse.Action):
    """Keeps an option as it was given, for Horovod's parser."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        namespace.horovodrun = [*namespace.horovodrun, option_string, *(values or ())]


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="run", add_help=False, allow_abbrev=False)
    types = {"num_proc": int, "max_restarts": int, "keep_checkpoints": int, "keep_every": int}
    spans = ("start_timeout", "stall_timeout", "sigterm_grace")
    types |= dict.fromkeys(spans, float)  # type: ignore[arg-type]
    for option in (*_OWN, *_RUNNER, *_SPARK):
        name = option.names[-1].lstrip("-").replace("-", "_")
        how: dict[str, Any] = {"action": "store_true"}
        if name in {"conf", "env", "forward"}:
            how = {"action": "append"}
        elif option.values:
            how = {"type": types.get(name, str)}
        parser.add_argument(*option.names, dest="np" if name == "num_proc" else name, **how)
    parser.set_defaults(horovodrun=[])
    for option in HOROVODRUN:
        parser.add_argument(
            *option.names, action=_Keep, nargs=len(option.values), dest=argparse.SUPPRESS
        )
    return parser


def _best(text: str) -> tuple[str, str] | tuple[str, str, int]:
    match = _BEST.fullmatch(text)
    if match is None:
        raise UsageError(
            f"--keep-best {text}: give a metric and which end of it is best, val_loss:min or "
            "accuracy:max, and if you like how many are kept, val_loss:min:3"
        )
    metric, mode, count = match.groups()
    return (metric, mode) if count is None else (metric, mode, int(count))


def _settings(option: str, texts: Sequence[str] | None) -> dict[str, str]:
    return dict(_setting(option, text) for text in texts or ())


def _setting(option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"{option} {text}: give a name and its value, {option} NAME=VALUE")
    return name.strip(), value


def _script(command: Sequence[str]) -> tuple[str, list[str]]:
    """Return the script, or "-m", and its arguments."""
    words = [*command]
    if words and _is_python(words[0]):
        del words[0]
        while words and words[0] == "-u":  # output is never held back
            del words[0]
        if words and words[0].startswith("-") and words[0] != "-m":
            raise UsageError(
                f"python {words[0]}: options of Python do not reach the ranks; give a script or -m "
                "MODULE, and set PYTHONOPTIMIZE, PYTHONWARNINGS and the like"
            )
    if not words:
        raise UsageError("the script lacks: python -m horovodrunner run -np 2 -- train.py")
    if words[0] == "-m" and len(words) == 1:
        raise UsageError("-m lacks the module: python -m horovodrunner run -np 2 -- -m pkg.train")
    if words[0] != "-m" and (problem := _not_python(words[0])):
        raise UsageError(problem)
    return words[0], words[1:]


def _is_python(word: str) -> bool:
    # os.path raises nothing where a name is too long
    if "/" in word and os.path.exists(word) and Path(sys.executable).exists():  # noqa: PTH110
        return Path(word).samefile(sys.executable) or Path(word).name.startswith("python")
    return _PYTHON.fullmatch(word) is not None


def _not_python(word: str) -> str:
    """Return why a word is no script, where that can be told without reading Python."""
    advice = (
        "the ranks run Python scripts: give the script itself, `-- train.py --epochs 3`, or `-- -m "
        "package.train`"
    )
    path = Path(word)
    if os.path.isfile(word):  # noqa: PTH113
        try:
            with path.open("rb") as file:
                first = file.readline(200)
        except OSError:
            return ""  # run_script() says why it cannot be read
        is_other = first.startswith(b"#!") and b"python" not in first
        if path.suffix in {".sh", ".bash"} or is_other or first.startswith(b"\x7fELF"):
            return f"{word} is no Python script; {advice}"
        return ""
    if os.path.exists(word) or path.suffix or "/" in word:  # noqa: PTH110
        return ""  # run_script() says what is wrong with it
    return f"there is no file {word[:200]!r} here, and other programs cannot be run; {advice}"
