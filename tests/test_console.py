"""What is printed and logged is text: nobody's name is taken for markup or commands to the terminal."""

from __future__ import annotations

import io
import json
import logging
import unicodedata
from pathlib import Path

import pytest

from mgtrain.console import HarmlessConsole, counts_table, harmless, out, start_logging

# A title for the window, a screen cleared, a CSI of C1, a line drawn over, a name that reads backwards, a broken byte.
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\rok\u202egpj.exe\u2066\u2028\udcff\0\x7f[red]x[/red] :smile: <b>"
SHOWN = (
    r"\u001b]0;owned\u0007\u001b[2J\u009b31m\u000dok\u202egpj.exe\u2066\u2028\udcff\u0000\u007f[red]x[/red] :smile: <b>"
)


def test_what_a_terminal_acts_on_is_shown_as_its_number() -> None:
    assert harmless(HOSTILE) == SHOWN
    assert harmless(SHOWN) == SHOWN
    controls = [chr(n) for n in range(0x10000) if unicodedata.category(chr(n)) in ("Cc", "Cs", "Zl", "Zp")]
    turns = [chr(n) for n in range(0x10000) if unicodedata.bidirectional(chr(n)) in
             ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")]  # fmt: skip
    assert {c for c in controls + turns if harmless(c) == c} == {"\t", "\n"}


@pytest.mark.parametrize("text", ["größer, 8x16², ±1 %", "走る", "كتابة", "a\tb\nc", "👩‍🚒", "C:\\new"])
def test_other_text_stays_as_it_is(text: str) -> None:
    assert harmless(text) == text


def test_names_are_neither_markup_nor_commands_to_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    console = HarmlessConsole(soft_wrap=True)
    console.file = io.StringIO()
    console.print(HOSTILE)
    console.print(counts_table("class", {HOSTILE: {"[blue]videos": 3}}))
    first, head, row = console.file.getvalue().splitlines()
    assert first == SHOWN
    assert head.split() == ["class", "[blue]videos"]
    assert row.startswith(f"{SHOWN}  ")
    assert harmless(console.file.getvalue()) == console.file.getvalue()


def test_json_stays_what_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    value = {HOSTILE: [HOSTILE, "größer"]}
    out.print_json(json.dumps(value))
    printed = capsys.readouterr().out
    assert json.loads(printed) == value
    assert harmless(printed) == printed


def test_a_logged_message_is_one_harmless_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("mgtrain.test")
    (tmp_path / "run").mkdir()
    start_logging(tmp_path / "run/log.txt")
    log.info("%s\nstep 9/9, top-1 100.0 %%", HOSTILE)
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        log.exception("failed")
    start_logging(None)
    for text in (capsys.readouterr().err, (tmp_path / "run/log.txt").read_text()):
        first, *rest = text.splitlines()
        assert first.endswith(rf"{SHOWN}\nstep 9/9, top-1 100.0 %")
        assert rest[1].startswith("Traceback")
        assert harmless(text) == text


def test_nothing_is_logged_to_a_folder_that_is_gone(tmp_path: Path) -> None:
    log = logging.getLogger("mgtrain.test")
    start_logging(tmp_path / "run/log.txt")
    log.info("early")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    log.info("late")
    start_logging(None)
    assert [line.split()[-1] for line in (tmp_path / "run/log.txt").read_text().splitlines()] == ["late"]
