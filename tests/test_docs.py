"""README and docs: commands that parse, links and keys that exist, messages that the code prints, scripts that explain themselves.

The commands of docs/paper_tables.md are judged by what they set, in test_paper_tables.py.
"""
from __future__ import annotations

import ast
import configparser
import fnmatch
import importlib
import importlib.util
import re
import resource
import shlex
import subprocess
import sys
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts")]

import read_settings  # noqa: E402
from read_settings import RunSettings  # noqa: E402

from dtg_core.engine.study import Study  # noqa: E402
from dtg_core.settings_text import flatten  # noqa: E402

PAGES = [ROOT / "README.md", ROOT / "RESULTS.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.py") if "main_guard(main)" in path.read_text())
#: Files of a reader's own that the pages speak of.
OWN = ("own.json", "all.json", "val.json", "hidden.json", "list.json", "check.json", "views.png", "data.yaml", "photos", "more_photos", "folder",
       "splits", "splits/*", "mine", "guidance", "predictions", "comparison", "labels", "[A-Z]*")  # fmt: skip
#: What COCO, other data sets and training bring, in the places where the pages put them; commands with them need those.
BROUGHT = ("data/coco/*", "data/bccd/*", "data/splits/*", "runs/*", "RUN*", "build/*")
SECTIONS = "backbone|data|views|guidance|optim|run|gfl|faster_rcnn"


# Commands --------------------------------------------------------------------------------------------------------------


def block_commands(text: str) -> Iterator[str]:
    """Command lines of fenced and indented blocks; a backslash continues one."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    blocks += re.findall(r"(?:^ {4,}\S.*\n)+", outside, re.MULTILINE)
    for block in blocks:
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            line = line.split(" #")[0].strip()
            yield from filter(None, re.split(r" && |; do\b ?|; done", line))


def inline_commands(text: str) -> Iterator[str]:
    """Commands in the running text and in tables, which may leave parts out."""
    for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text):
        if re.match(r"(?:python |accelerate launch |ACCELERATE\w+=|\w+\.py -)", code):
            yield code


#: A loop's frame, shell that is checked elsewhere (paper_tables), the function ``train`` there, and fences of other things.
NO_COMMANDS = re.compile(r"(for |done$|do$|FOLD=|train\(\)|mkdir |ln -s |cd |\}|data/)")


def parsed(command: str, whole: bool) -> None:
    """Fails unless the command names scripts, files and flags that exist; ``whole``: it has to be complete, too."""
    tokens = shlex.split(command.replace("$detector", "gfl").replace("$paradigm", "dense").replace("$seed", "0"))
    while "=" in tokens[0] and not tokens[0].startswith("-"):
        tokens.pop(0)
    program, *rest = tokens[0].rpartition("/")[2], *tokens[1:]
    if program == "pip":
        return pip(rest)
    if program == "pdoc":
        return [check_module(name) for word in rest[4:] for name in braces(word)] and None
    if program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        bare = [] if whole or any(word.endswith(".py") for word in rest) else ["scripts/train.py", "--dry-run"]
        launched = launch_command_parser().parse_args([*rest[1:], *bare])
        program, rest = launched.training_script, launched.training_script_args
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        launched = get_args_parser().parse_args(rest)
        program, rest = launched.training_script, launched.training_script_args
    elif program.startswith("python"):
        if rest[0] == "-m":
            assert rest[1] in ("pytest", "venv"), command
            return [check_file(word) for word in rest[2:] if "/" in word] and None
        program, *rest = rest
    if program.startswith("examples/"):
        assert (ROOT / program).is_file(), command
        return None
    name = program.rpartition("/")[2]
    assert name in SCRIPTS, f"no such script: {command}"
    assert program == name or program.startswith("scripts/"), command
    return script(name, rest, command, whole)


def script(name: str, words: list[str], command: str, whole: bool) -> None:
    parser = parser_of(name)
    known = {flag for action in parser._actions for flag in action.option_strings}
    for word in words:
        if word.startswith("--"):
            assert word.partition("=")[0] in known, f"{name} has no {word}: {command}"
    if not whole or "..." in words:
        return
    options = parser.parse(words)  # type: ignore[attr-defined]
    for word in words:
        if re.search(r"\.(json|ya?ml|png|py)$|/", word) and "=" not in word:
            check_file(word)
    if name == "train.py" and not options.replay:
        options.config = options.config and ROOT / options.config
        read_settings.load_settings(options)


def check_file(name: str) -> None:
    patterns = (*OWN, *BROUGHT)
    plain = name.rstrip("/")
    assert (ROOT / name).exists() or any(fnmatch.fnmatch(plain, pattern) for pattern in patterns), f"no such file: {name}"


def check_module(name: str) -> None:
    assert importlib.util.find_spec(name) is not None, name


def pip(words: list[str]) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = re.findall(r"\[([\w,]+)\]", " ".join(words))
    assert extras or "-e" not in words or words[-1] == "."
    for extra in ",".join(extras).split(","):
        assert not extra or extra in setup["options.extras_require"], extra


def braces(word: str) -> list[str]:
    """a.{b,c} as a shell takes it."""
    match = re.fullmatch(r"(.*)\{(.*)\}", word)
    return [match[1] + part for part in match[2].split(",")] if match else [word]


@cache
def parser_of(name: str) -> ArgumentParser:
    if name == "train.py":
        return read_settings.train_parser()
    return importlib.import_module(name.removesuffix(".py")).parser()


COMMANDS = [(page.name, command) for page in PAGES for command in block_commands(page.read_text(encoding="utf-8"))
            if not NO_COMMANDS.match(command) and not (page.name == "README.md" and command.startswith("runs/"))]
INLINE = [(page.name, command) for page in PAGES for command in inline_commands(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands_parse(page, command):
    parsed(command, whole=True)


@pytest.mark.parametrize(("page", "command"), INLINE)
def test_commands_in_the_text_name_what_exists(page, command):
    parsed(command, whole=False)


def test_commands_are_found():
    assert len(COMMANDS) > 20
    assert len(INLINE) > 10
    assert {page for page, _ in COMMANDS} >= {"README.md", "own_data.md", "coco.md", "backbones.md", "new_detector.md", "index.md",
                                              "troubleshooting.md"}  # fmt: skip


@pytest.mark.parametrize("command", [
    "python scripts/trian.py", "python scripts/train.py --detector gfl --stepz 3", "python scripts/compare.py", "pip install -e '.[nothing]'",
    "python scripts/train.py --detector gfl --set guidance.tau=0.3", "accelerate launch --gpus 3 scripts/train.py", "pdoc -d a -o b gfl_dtg.hat",
    "python scripts/train.py --detector gfl --config configs/none.yaml", "torchrun --processes 2 scripts/train.py --detector gfl",
    "python scripts/predict.py runs/a missing/b.json --output DIR",
])  # fmt: skip
def test_a_wrong_command_is_noticed(command, capsys):
    with pytest.raises((AssertionError, SystemExit, read_settings.UserError)):
        parsed(command, whole=True)


# Links, keys and messages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_exist(page):
    keys = [*flatten(RunSettings()), *flatten(Study())]
    for code in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
        for key in re.findall(rf"(?<![\w./])(?:{SECTIONS})\.[a-z_*<>|]+(?:\.[a-z_*<>|]+)*", code):
            if key.endswith((".py", ".yaml", ".json")):
                continue
            pattern = re.sub(r"<[^>]*>", "*", key)
            parts = [name for name in keys if fnmatch.fnmatch(name, pattern) or name.startswith(f"{pattern}.")]
            assert parts, f"no setting {key}"


@cache
def program_text() -> str:
    """All text that the program may print, one literal a line; what is filled in is "..."."""
    found = []
    for folder in ("dtg_core", "gfl_dtg", "faster_rcnn_dtg", "scripts"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


MESSAGES = re.findall(r"^\| `((?:error|warning|skipped:|stopped|losses|memory:|batch:)[^`]*)`",
                      (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_are_those_of_the_program(message):
    """Each part between dots stands in one piece in the code; the colon after a file's name may stand elsewhere."""
    parts = [part.strip().removeprefix(": ") for part in re.sub(r"^(error|warning): ", "", message).split("...")]
    parts = [part for part in parts if len(part) > 3]
    assert parts
    for part in parts:
        assert part in program_text(), part


def test_messages_are_found():
    assert sum(message.startswith("error: ") for message in MESSAGES) > 15
    assert sum(message.startswith("warning: ") for message in MESSAGES) > 10


# The scripts' own help -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_argument_is_explained(name):
    for action in parser_of(name)._actions:
        assert action.help, f"{name} {action.option_strings or action.dest}"
        assert action.help != SUPPRESS


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_fast(name):
    """By the time of the processor, so that other work on the machine has no part in it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = subprocess.run([sys.executable, str(ROOT / "scripts" / name), "--help"], capture_output=True, text=True, timeout=100)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "--debug" in shown.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3


def test_reference_of_the_code_is_made_without_warnings(tmp_path):
    pytest.importorskip("pdoc")
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    (command,) = (line for line in block_commands(text) if line.startswith("pdoc "))
    command = command.replace("pdoc ", f"{shlex.quote(sys.executable)} -m pdoc ", 1).replace("build/api", shlex.quote(str(tmp_path)))
    made = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert (made.returncode, made.stderr) == (0, "")
    for page in ("dtg_core/guidance/paradigms.html", "dtg_core/engine/report.html", "gfl_dtg/stage.html", "faster_rcnn_dtg/rpn.html"):
        assert (tmp_path / page).is_file(), page
