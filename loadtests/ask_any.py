"""Whether `cwg ask --any` answers from the right window: ten facts are planted in ten of fifty windows.

    python -m loadtests.ask_any [--windows 50] [--data-dir DIR] [--out FILE]

Starts `cwg up` with the talking demo model, and needs no engine to be running. Each window is frozen from a
conversation about another topic; ten of them mention a fact. Each fact is then asked for without naming a window.
The first answer must come from the right window; whether it has the fact in it depends on the model as well.
"""

import argparse
import signal
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import httpx

from loadtests.machine import describe
from tests.support.up_process import Up

_TIMEOUT_S = 300


class _Fact(NamedTuple):
    """What was said, the question it answers, and what the answer must contain."""

    said: str
    question: str
    answer: str


_FACTS = (
    _Fact("We decided that billing goes by the hour.", "What did we decide about billing?", "hour"),
    _Fact("The launch of the rocket is on Friday.", "On which day is the launch of the rocket?", "Friday"),
    _Fact("The dog of our neighbour is called Bruno.", "What is the name of the neighbour's dog?", "Bruno"),
    _Fact("The printer needs a bottle of ink.", "What does the printer need?", "ink"),
    _Fact("The dentist appointment is at nine.", "At what time is the dentist appointment?", "nine"),
    _Fact("The rent for the studio is 900 dollars.", "What is the rent for the studio?", "900"),
    _Fact("The budget for marketing is 5000 dollars.", "What is the budget for marketing?", "5000"),
    _Fact("The concert of the choir is on Sunday.", "On which day is the concert of the choir?", "Sunday"),
    _Fact("The soup needs a spoon of paprika.", "What does the soup need?", "paprika"),
    _Fact("The violin lesson is at seven.", "At what time is the violin lesson?", "seven"),
)
_TOPICS = (
    "the weather", "a garden", "old trains", "a museum", "bread", "the moon", "a bicycle", "mountains", "chess", "tea",
    "rivers", "a library", "bees", "clouds", "islands", "a market", "paint", "windmills", "apples", "a lighthouse",
    "stones", "a theatre", "bridges", "wool", "horses", "a harbour", "glass", "forests", "a clock", "salt",
    "a village", "kites", "snow", "honey", "a castle", "tulips", "fish", "a tower", "candles", "rain",
)  # fmt: skip


def _said(number: int) -> tuple[str, str]:
    """What the user says in a conversation, and the session's name."""
    if number % 5 == 2 and number // 5 < len(_FACTS):
        return f"Please remember this: {_FACTS[number // 5].said}", f"fact-{number // 5}"
    return f"Please tell me something about {_TOPICS[number % len(_TOPICS)]}.", f"talk-{number}"


def _stock(http: httpx.Client, windows: int) -> None:
    for number in range(windows):
        said, session = _said(number)
        body = {"model": "demo", "messages": [{"role": "user", "content": said}], "max_tokens": 12, "temperature": 0}
        body["model"] = http.get("/v1/models").json()["data"][0]["id"]
        http.post("/v1/chat/completions", json=body, headers={"x-session-id": session}).raise_for_status()
        frozen = {"session_id": session, "window_name": f"w-{session}"}
        http.post("/admin/windows", json=frozen).raise_for_status()


class _Asked(NamedTuple):
    question: str
    windows: list[str]
    answer: str
    from_right_window: bool
    has_fact: bool
    seconds: float


def _ask(http: httpx.Client, number: int) -> _Asked:
    fact, started = _FACTS[number], time.monotonic()
    answered = http.post("/admin/ask", json={"question": fact.question, "max_tokens": 24, "timeout_seconds": 300})
    answers = answered.raise_for_status().json()["answers"]
    windows = [one["window_name"] for one in answers]
    text = (answers[0]["answer"] or "") if answers else ""
    is_right, has_fact = windows[:1] == [f"w-fact-{number}"], fact.answer.lower() in text.lower()
    return _Asked(fact.question, windows, " ".join(text.split()), is_right, has_fact, time.monotonic() - started)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _table(asked: list[_Asked], windows: int) -> str:
    right, facts = sum(one.from_right_window for one in asked), sum(one.has_fact for one in asked)
    rows = [
        f"| {one.question} | {', '.join(one.windows)} | {one.answer.replace('|', '/')} "
        f"| {_yes(one.from_right_window)} | {_yes(one.has_fact)} | {one.seconds:.1f} |"
        for one in asked
    ]
    head = ["| question | windows asked, best first | first answer | right window | has the fact | seconds |"]
    head.append("|---|---|---|---|---|---|")
    about = f"{windows} windows; {', '.join(describe().values())}"
    count = (
        f"From the right window: {right} of {len(asked)}; with the fact: {facts}. The model has 135 million parameters."
    )
    return "\n".join(["# Questions to any window", "", about, "", count, "", *head, *rows, ""])


def main() -> None:
    """Ask, and print the table; exit code 1 unless every first answer is from the right window."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=50)
    parser.add_argument("--data-dir", type=Path, help="where the demo model is already, to save making it")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        up = Up(options.data_dir or Path(folder), "smollm2")
        try:
            up.wait_ready()
            with httpx.Client(base_url=up.url, timeout=_TIMEOUT_S) as http:
                _stock(http, options.windows)
                asked = [_ask(http, number) for number in range(len(_FACTS))]
        finally:
            up.end(signal.SIGTERM)
    table = _table(asked, options.windows)
    print(table)
    if options.out:
        options.out.write_text(table)
    raise SystemExit(0 if all(one.from_right_window for one in asked) else 1)


if __name__ == "__main__":
    main()
