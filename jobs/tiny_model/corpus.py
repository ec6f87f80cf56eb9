"""What the tiny model is taught: an endless, seeded stream of generated conversations. No external text.

Knows the chat environment's grammars, the judge's prompts, the tool task and the terminal's drills. Ignores tokens and
training. Each example says which of its assistant messages are worth imitating; the others (a wrong answer, a style
that the user then rejects) are only read.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from string import Template
from typing import Literal

from clawrl.algorithms.hints import with_hint
from clawrl.serving import judging
from clawrl.types import Message, NextState, Tool
from envs.chat.phrases import WANTS, Phrasing, Want, say
from envs.chat.styles import FORMS, Form, Style, default_style, render
from envs.chat.world import HELDOUT_NAMES, ITEMS, TRAIN_NAMES, Problem, Split, make_problem
from envs.terminal.drill import TOOLS as SHELL_TOOLS
from envs.terminal.tasks.drills import drill_of, words
from envs.toolcall.stock import TOOLS, invented_word, make_task, run_tool
from jobs.tiny_model.shell import demonstrate_drill, right_steps, wrong_step
from jobs.tiny_model.tools import FLAW_SHARES, call_message, demonstrate

Task = Literal["chat", "hinted", "corrected", "judge", "hint", "tools", "shell", "drill", "recall", "copy"]
SHARES: dict[Task, float] = {
    "chat": 0.20, "hinted": 0.17, "corrected": 0.10, "judge": 0.12, "hint": 0.11, "tools": 0.08, "shell": 0.06,
    "drill": 0.09, "recall": 0.04, "copy": 0.03,
}  # fmt: skip

CASES = {
    "ask": 0.34, "wrong": 0.08, "reask": 0.13, "vague": 0.09, "thanks": 0.08, "praise": 0.06, "agree": 0.04,
    "next": 0.08, "ambiguous": 0.06, "tool": 0.04,
}  # fmt: skip
THOUGHTS = {
    "wrong": "The user corrects the answer.",
    "reask": "The user asks the same again.",
    "vague": "The user is not happy.",
    "thanks": "The user says thanks.",
    "praise": "The user likes it.",
    "agree": "The user agrees.",
    "next": "The user moves on.",
    "ambiguous": "This says nothing about the reply.",
    "tool": "The tool worked.",
    "tool_error": "The tool failed.",
    "plain": "The user wants plain sentences.",
    "brief": "The user wants only the answer.",
    "steps": "The user wants numbered steps.",
    "friendly": "The user wants a friendly tone.",
    "neutral": "The user wants a neutral tone.",
    "checked": "The user wants a check line.",
    "unchecked": "The user wants no check line.",
}
SMALL_TALK = {
    "thanks": ("You're welcome.", "Gladly.", "Any time."),
    "praise": ("I am pleased.", "Good to hear.", "I will keep it so."),
    "agree": ("Good.", "Then we agree.", "Fine."),
    "ambiguous": ("Okay.", "I am here.", "Tell me when you are ready."),
}
SYSTEM = ("You are a helpful assistant.", "You help with sums.", "You are a careful assistant.")


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation; `silent` lists the indexes of assistant messages that are read but not imitated."""

    task: Task
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    silent: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Case:
    """A judged turn with the right verdict: what the judge's two tasks are made of and measured on."""

    messages: tuple[Message, ...]
    reply: Message
    next_state: NextState
    thought: str
    score: int
    want: Want | Literal["wrong"] | None  # what a hint would have to say
    hint: str | None


def examples(seed: int) -> Iterator[Example]:
    """The stream: tasks by share, everything from one seed."""
    rng = random.Random(seed)
    while True:
        task = rng.choices(list(SHARES), list(SHARES.values()))[0]
        yield _MAKERS[task](rng)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def toward(style: Style, want: Want) -> Style:
    """The style with one side changed as wanted."""
    if want in FORMS:
        return replace(style, form=want)
    if want in ("friendly", "neutral"):
        return replace(style, friendly=want == "friendly")
    return replace(style, checked=want == "checked")


def wants_against(style: Style) -> list[Want]:
    """What somebody could still want of a reply in this style; forms twice, since most wishes are about them."""
    return [want for want in (*WANTS, *FORMS) if toward(style, want) != style]


def spoil(problem: Problem, reply: str, rng: random.Random) -> str:
    """The reply with another number for an answer."""
    wrong = max(1, problem.number + rng.choice((-10, -3, -2, -1, 1, 2, 3, 10)))
    return re.sub(rf"\b{problem.number}\b", str(wrong), reply)


def any_style(rng: random.Random) -> Style:
    return Style(rng.choice(FORMS), rng.random() < 0.3, rng.random() < 0.3)


def make_case(
    rng: random.Random, phrasing: Phrasing = "train", kind: str | None = None, split: Split = "train"
) -> Case:
    """A turn, what followed it and the right verdict."""
    kind = kind or rng.choices(list(CASES), list(CASES.values()))[0]
    if kind == "tool":
        return _tool_case(rng)
    problem = make_problem(rng, split)
    style = default_style(rng) if rng.random() < 0.5 else any_style(rng)
    reply = render(problem, style, rng)
    request = problem.question
    if kind == "wrong":
        reply = spoil(problem, reply, rng)
    elif rng.random() < 0.3:
        request = _feedback_request(rng, phrasing, problem)
    elif rng.random() < 0.1 and kind in ("next", "ambiguous"):
        topic = rng.choice(list(SMALL_TALK))
        request, reply = say(topic, rng, phrasing), rng.choice(SMALL_TALK[topic])
    want = rng.choice(wants_against(style)) if kind == "ask" else None
    text = _next_text(kind, want, problem, rng, phrasing, split)
    hint = None
    if want or kind == "wrong":
        hint = Template(say(f"hint_{want or kind}", rng)).safe_substitute(answer=problem.answer)
    score = 1 if kind in ("thanks", "praise", "agree", "next") else 0 if kind == "ambiguous" else -1
    state = NextState("turn", "user", (user(text),), False, 0.0)
    return Case((user(request),), assistant(reply), state, THOUGHTS[want or kind], score, want or _wrong(kind), hint)


def verdict(case: Case) -> str:
    """The judge's right answer."""
    return f"{case.thought} \\boxed{{{case.score}}}"


def advice(case: Case) -> str:
    """The hint judge's right answer."""
    if case.hint is None:
        return f"{case.thought} \\boxed{{-1}}"
    return f"{case.thought} \\boxed{{1}}\n[HINT_START]{case.hint}[HINT_END]"


def _wrong(kind: str) -> Literal["wrong"] | None:
    return "wrong" if kind == "wrong" else None


def _next_text(
    kind: str, want: Want | None, problem: Problem, rng: random.Random, phrasing: Phrasing, split: Split
) -> str:
    """What the user said next."""
    other = make_problem(rng, split).question
    if kind == "next":
        return other
    text = say(f"ask_{want}" if want else kind, rng, phrasing)
    text = Template(text).safe_substitute(question=problem.question, answer=problem.answer)
    goes_on = {"ask": 0.25, "thanks": 0.2, "praise": 0.1, "agree": 0.1}.get(kind, 0.0)
    return f"{text} {other}" if rng.random() < goes_on else text


def _feedback_request(rng: random.Random, phrasing: Phrasing, problem: Problem) -> str:
    """A request that is itself feedback on an earlier reply."""
    topic = rng.choice(("ask", "ask", "reask", "vague"))
    text = say(f"ask_{rng.choice(WANTS)}" if topic == "ask" else topic, rng, phrasing)
    return Template(text).safe_substitute(question=problem.question, answer=problem.answer)


def _tool_case(rng: random.Random) -> Case:
    """A tool call and its result: a success is good, an error is bad, and neither makes a hint."""
    if rng.random() < 0.4:
        return _shell_case(rng)
    task = make_task(rng)
    fails = rng.random() < 0.4
    if rng.random() < 0.6:
        arguments = {"item": task.item, "place": invented_word(rng) if fails else rng.choice(task.places)}
        name = "lookup"
    else:
        first, second = task.counts
        name, arguments = "calc", {"expression": f"{first} {'and' if fails else task.sign} {second}"}
    said = run_tool(task, name, arguments)
    state = NextState("turn", "tool", ({"role": "tool", "content": said},), False, 0.0)
    thought = THOUGHTS["tool_error" if fails else "tool"]
    return Case((user(task.question),), call_message(name, arguments), state, thought, -1 if fails else 1, None, None)


def _shell_case(rng: random.Random) -> Case:
    """The same of a command; one that goes wrong without a word is no case, since nothing shows it."""
    while True:
        names = words(rng, 3)
        drill = drill_of(names, rng)
        fails = rng.random() < 0.5
        command, said = wrong_step(drill, names, rng) if fails else rng.choice(right_steps(drill, names))
        if fails == ("exit status" in said):
            state = NextState("turn", "tool", ({"role": "tool", "content": said},), False, 0.0)
            call, thought = call_message("run", {"command": command}), THOUGHTS["tool_error" if fails else "tool"]
            return Case((user(drill.instruction),), call, state, thought, -1 if fails else 1, None, None)


def _opened(rng: random.Random) -> list[Message]:
    """Most conversations start without a system message."""
    return [{"role": "system", "content": rng.choice(SYSTEM)}] if rng.random() < 0.1 else []


def _chat(rng: random.Random) -> Example:
    """First replies in the default mix, sometimes with a question more after thanks or without."""
    messages = _opened(rng)
    problem, style = make_problem(rng), default_style(rng)
    messages += [user(problem.question), assistant(render(problem, style, rng))]
    while len(messages) < 6 and rng.random() < 0.3:
        if rng.random() < 0.5:
            topic = rng.choice(list(SMALL_TALK))
            messages += [user(say(topic, rng)), assistant(rng.choice(SMALL_TALK[topic]))]
        else:
            problem = make_problem(rng)
            messages += [user(problem.question), assistant(render(problem, style, rng))]
    return Example("chat", tuple(messages))


def _hinted(rng: random.Random) -> Example:
    """A reply that follows the hint in its prompt, at the first turn or after a reply that did not please."""
    messages = _opened(rng)
    problem, style = make_problem(rng), default_style(rng)
    silent: frozenset[int] = frozenset()
    if rng.random() < 0.08:
        hinted = with_hint([*messages, user(problem.question)], _fill(say("hint_wrong", rng), problem))
        return Example("hinted", (*hinted, assistant(render(problem, style, rng))))
    wishes: list[Want] = [*WANTS, *FORMS, "plain", "checked", "friendly"]
    want = rng.choice(wishes)
    if rng.random() < 0.25:
        silent = frozenset([len(messages) + 1])
        messages += [user(problem.question), assistant(render(problem, style, rng))]
        topic = rng.choice((f"ask_{want}", "reask", "vague", "next"))
        problem = make_problem(rng) if topic == "next" else problem
        messages.append(user(problem.question if topic == "next" else _fill(say(topic, rng), problem)))
    else:
        messages.append(user(problem.question))
    hint, target = say(f"{'hint' if rng.random() < 0.75 else 'ask'}_{want}", rng), toward(style, want)
    if rng.random() < 0.1:
        fitting: list[Want] = [other for other in WANTS if toward(toward(target, other), want) == toward(target, other)]
        second = rng.choice(fitting)
        hint, target = f"{hint} {say(f'hint_{second}', rng)}", toward(target, second)
    messages = with_hint(messages, hint)
    return Example("hinted", (*messages, assistant(render(problem, target, rng))), silent=silent)


def _corrected(rng: random.Random) -> Example:
    """A reply, what the user says of it, the reply that follows this, and often a next question in the same style."""
    messages = _opened(rng)
    problem, style = make_problem(rng), default_style(rng)
    first = render(problem, style, rng)
    kind = rng.choices(("ask", "wrong", "reask", "vague"), (0.7, 0.12, 0.1, 0.08))[0]
    silent = frozenset([len(messages) + 1])
    if kind == "ask":
        want = rng.choice(wants_against(style))
        said, style = say(f"ask_{want}", rng), toward(style, want)
    else:
        said = _fill(say(kind, rng), problem)
        first = spoil(problem, first, rng) if kind == "wrong" else first
        style = style if kind == "wrong" else replace(style, form=_other_form(style, rng))
    messages += [user(problem.question), assistant(first)]
    if kind == "ask" and rng.random() < 0.2:
        problem = make_problem(rng)
        said = f"{said} {problem.question}"
    messages += [user(said), assistant(render(problem, style, rng))]
    if rng.random() < 0.35:
        problem = make_problem(rng)
        messages += [user(problem.question), assistant(render(problem, style, rng))]
    return Example("corrected", tuple(messages), silent=silent)


def _other_form(style: Style, rng: random.Random) -> Form:
    return rng.choice([form for form in FORMS if form != style.form])


def _fill(text: str, problem: Problem) -> str:
    return Template(text).safe_substitute(question=problem.question, answer=problem.answer)


def _judge(rng: random.Random) -> Example:
    case = make_case(rng)
    asked = judging.evaluative(judging.load_prompts("tiny"), case.messages, case.reply, case.next_state)
    return Example("judge", (*asked, assistant(verdict(case))))


def _hint(rng: random.Random) -> Example:
    case = make_case(rng)
    asked = judging.directive(judging.load_prompts("tiny"), case.messages, case.reply, case.next_state)
    return Example("hint", (*asked, assistant(advice(case))))


def _tools(rng: random.Random) -> Example:
    flaw = rng.choices(list(FLAW_SHARES), list(FLAW_SHARES.values()))[0]
    return Example("tools", tuple(demonstrate(make_task(rng), flaw, rng)), tuple(TOOLS))


def _shell(rng: random.Random) -> Example:
    return Example("shell", tuple(demonstrate_drill(rng)), SHELL_TOOLS)


def _drill(rng: random.Random) -> Example:
    """Sums as they come up in the problems, a few at once; half of them ask for the bare result."""
    messages: list[Message] = []
    for _ in range(rng.randint(1, 3)):
        sign = rng.choice("++--x/")
        if sign == "+":
            left, right = rng.randint(1, 81), rng.randint(1, 49)
        elif sign == "-":
            left = rng.randint(3, 90)
            right = rng.randint(1, min(left - 1, 60))
        else:
            left, right = rng.randint(2, 9), rng.randint(2, 9)
        value = {"+": left + right, "-": left - right, "x": left * right, "/": left}[sign]
        sum_ = f"{left * right} / {right}" if sign == "/" else f"{left} {sign} {right}"
        bare = rng.random() < 0.5
        ask = f"{sum_} = ?" if bare else rng.choice((f"What is {sum_}?", f"Compute {sum_}."))
        messages += [user(ask), assistant(str(value) if bare else f"{sum_} = {value}")]
    return Example("drill", tuple(messages))


def _recall(rng: random.Random) -> Example:
    """Who has what, with known and invented names: trains the look-up circuit."""
    count = rng.randint(2, 5)
    names = [_name(rng) for _ in range(count)]
    things = [f"{rng.randint(2, 60)} {rng.choice(ITEMS) if rng.random() < 0.7 else invented_word(rng)}" for _ in names]
    facts = ", ".join(f"{name} has {thing}" for name, thing in zip(names, things, strict=True))
    at = rng.randrange(count)
    if rng.random() < 0.5:
        return Example("recall", (user(f"{facts}. What does {names[at]} have?"), assistant(f"{things[at]}.")))
    return Example("recall", (user(f"{facts}. Who has {things[at]}?"), assistant(f"{names[at]}.")))


def _copy(rng: random.Random) -> Example:
    """Repeat, reverse or put into JSON a string that cannot be known: trains the copying circuit."""
    way = rng.choice(("repeat", "repeat", "reverse", "json"))
    words = [invented_word(rng) if rng.random() < 0.7 else _name(rng) for _ in range(rng.randint(2, 5))]
    if way == "repeat":
        return Example("copy", (user("Repeat: " + " ".join(words)), assistant(" ".join(words))))
    if way == "reverse":
        return Example("copy", (user("Reverse: " + " ".join(words)), assistant(" ".join(reversed(words)))))
    asked = user(f"Call lookup for {words[0]} at the {words[1]}.")
    return Example("copy", (asked, call_message("lookup", {"item": words[0], "place": words[1]})))


def _name(rng: random.Random) -> str:
    """A training name, or one that nobody has; never a held-out one."""
    if rng.random() < 0.5:
        return rng.choice(TRAIN_NAMES)
    while True:
        name = invented_word(rng).capitalize()
        if name not in HELDOUT_NAMES:
            return name


_MAKERS = {
    "chat": _chat,
    "hinted": _hinted,
    "corrected": _corrected,
    "judge": _judge,
    "hint": _hint,
    "tools": _tools,
    "shell": _shell,
    "drill": _drill,
    "recall": _recall,
    "copy": _copy,
}
