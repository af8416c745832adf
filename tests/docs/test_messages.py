"""docs/messages.md lists every message of the code and no other; docs/troubleshooting.md explains some of them."""

from __future__ import annotations

import pytest

from scripts import messages as script


def test_the_pages_and_the_code_have_the_same_messages() -> None:
    assert script.problems() == [], "run: python scripts/messages.py --write"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def f(n):\n raise ValueError(f'n is {n}; it must be at least {1}')", "n is …; it must be at least …"),
        ("def f():\n text = 'one ' + str(2) + ' three'\n raise OSError(text)", "one … three"),
        ("def f(p):\n raise RecipeError(f'{p}.load', f'is {p}; leave it out')", "….load: is …; leave it out"),
        ("def f():\n log.warning('step %d has %.3g GiB', 1, 2)", "step … has … GiB"),
        ("def f():\n return complain(name, 'no such run' if x else 'no such file')", "no such file"),
        ("def f():\n print('it is gone', file=sys.stderr)", "it is gone"),
        ("def describe_missing(error):\n return f'{error} is not here'", "… is not here"),
    ],
)
def test_a_message_is_found_however_it_is_made(code: str, words: str) -> None:
    assert words in [message.words for message in script.messages_in(code, "data/one.py")]


def test_a_message_without_repair_or_explanation_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "messages", lambda: [script.Message("the moon is full", "data/moon.py")])
    monkeypatch.setattr(script, "explained", lambda: {"words of yesterday": "Data"})
    text = "\n".join(script.problems())
    assert "says no repair, and is not explained: the moon is full" in text
    assert "explained, and in no file: words of yesterday" in text
    assert "not in docs/messages.md: | `the moon is full`" in text
    assert "gone from the code, and in docs/messages.md:" in text
