"""What a checkpoint can do: the table of the tiny model's README, measured in plain transformers.

Knows the tasks of the corpus and how to tell success. Ignores serving and training. Problems are held out unless a
row says otherwise; phrasings are those of `envs.chat.phrases` (train, unseen, written by hand).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

from clawrl.algorithms.hints import with_hint
from clawrl.serving import judging
from clawrl.types import Message, NextState, Tool
from envs.chat.phrases import WANTS, Phrasing, say, strings
from envs.chat.styles import FORMS, classify, default_style, render
from envs.chat.user import PERSONAS, satisfies
from envs.chat.world import Problem, Split, check, make_problem
from envs.toolcall.env import BROKEN
from envs.toolcall.stock import TOOLS, ToolTask, make_task, run_tool, solved
from jobs.tiny_model.corpus import Case, assistant, make_case, toward, user, wants_against

PHRASINGS: tuple[Phrasing, ...] = ("train", "unseen", "written")
JUDGE_TEMPERATURE = 0.6


class Writer:
    """A checkpoint that completes chats in batches."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model: Any = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        torch.manual_seed(seed)

    def complete(
        self,
        chats: Sequence[Sequence[Message]],
        temperature: float = 1.0,
        tools: Sequence[Tool] = (),
        limit: int = 112,
        batch: int = 100,
    ) -> list[str]:
        """One reply per chat; temperature 0 is greedy."""
        replies: list[str] = []
        for at in range(0, len(chats), batch):
            texts = [
                str(self.tokenizer.apply_chat_template(
                    list(chat), tools=list(tools) or None, tokenize=False, add_generation_prompt=True
                ))
                for chat in chats[at : at + batch]
            ]  # fmt: skip
            encoded = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            with torch.inference_mode():
                made = self.model.generate(
                    input_ids=encoded["input_ids"],
                    attention_mask=encoded["attention_mask"],
                    max_new_tokens=limit,
                    **(sampling if temperature else {"do_sample": False, "temperature": None}),
                )
            new = made[:, encoded["input_ids"].shape[1] :]
            replies += [text.split("<|im_end|>")[0] for text in self.tokenizer.batch_decode(new)]
        return replies


def evaluate(folder: Path, cases: int, seed: int) -> Iterator[str]:
    """The lines of a Markdown table, as they are measured."""
    writer, rng = Writer(folder, seed), random.Random(seed)
    yield "| what | trained phrasing | unseen strings | hand-written |"
    yield "|---|---|---|---|"
    for want in WANTS:
        yield _row(f"follows a hint: {want}", (follows_hint(writer, rng, want, p, cases) for p in PHRASINGS))
    yield _row("follows a correction in context", (follows_correction(writer, rng, p, cases) for p in PHRASINGS))
    yield _row("judge: right vote", (judge_accuracy(writer, rng, p, cases) for p in PHRASINGS))
    decisions = [hint_accuracy(writer, rng, phrasing, cases) for phrasing in PHRASINGS]
    yield _row("hint judge: right decision", (decided for decided, _ in decisions))
    yield _row("hint judge: right hint where one is due", (right for _, right in decisions))
    yield ""
    yield "| what | training names and numbers | held out |"
    yield "|---|---|---|"
    splits: tuple[Split, ...] = ("train", "heldout")
    for name, temperature in (("greedy", 0.0), ("temperature 1", 1.0)):
        yield _row(
            f"answers right, {name}", (answers_right(writer, rng, split, temperature, cases) for split in splits)
        )
    yield _row("tool task solved (known words, invented words)", (tool_success(writer, rng, x, cases) for x in (0, 1)))
    yield ""
    yield "| one vote on a step of the model's own tool episodes | agrees | steps |"
    yield "|---|---|---|"
    for kind, (share, number) in step_judge(writer, rng, cases).items():
        yield f"| {kind} | {share:.2f} | {number} |"
    yield ""
    yield "| unhinted first replies, held out, temperature 1 | share |"
    yield "|---|---|"
    for name, share in base_shares(writer, rng, 2 * cases).items():
        yield _row(name, (share,))


def follows_hint(writer: Writer, rng: random.Random, want: str, phrasing: Phrasing, cases: int) -> float:
    """Share of replies at temperature 1 in the style that a hint in the prompt asks for."""
    chats = []
    for _ in range(cases):
        chats.append(with_hint([user(make_problem(rng, "heldout").question)], say(f"hint_{want}", rng, phrasing)))
    return _mean(_is_toward(reply, want) for reply in writer.complete(chats))


def follows_correction(writer: Writer, rng: random.Random, phrasing: Phrasing, cases: int) -> float:
    """Share of second replies in the style that the user asked for after the first."""
    chats, wants = [], []
    for _ in range(cases):
        problem, style = make_problem(rng, "heldout"), default_style(rng)
        wants.append(rng.choice(wants_against(style)))
        said = _fill(say(f"ask_{wants[-1]}", rng, phrasing), problem)
        chats.append([user(problem.question), assistant(render(problem, style, rng)), user(said)])
    replies = writer.complete(chats)
    return _mean(_is_toward(reply, want) for reply, want in zip(replies, wants, strict=True))


def judge_accuracy(writer: Writer, rng: random.Random, phrasing: Phrasing, cases: int) -> float:
    """Share of single votes at the judge's temperature that are right."""
    made = [make_case(rng, phrasing, split="heldout") for _ in range(cases)]
    prompts = judging.load_prompts("tiny")
    asked = [judging.evaluative(prompts, case.messages, case.reply, case.next_state) for case in made]
    votes = [judging.parse_vote(text) for text in writer.complete(asked, JUDGE_TEMPERATURE)]
    return _mean(vote == case.score for vote, case in zip(votes, made, strict=True))


def hint_accuracy(writer: Writer, rng: random.Random, phrasing: Phrasing, cases: int) -> tuple[float, float]:
    """Share of right decisions whether there is a hint, and of right hints among the cases that have one."""
    made = [make_case(rng, phrasing, split="heldout") for _ in range(cases)]
    prompts = judging.load_prompts("tiny")
    asked = [judging.directive(prompts, case.messages, case.reply, case.next_state) for case in made]
    hints = [judging.parse_hint(text) for text in writer.complete(asked, JUDGE_TEMPERATURE)]
    pairs = list(zip(hints, made, strict=True))
    decided = _mean((hint is None) == (case.hint is None) for hint, case in pairs)
    return decided, _mean(says(hint, case) for hint, case in pairs if case.hint is not None)


@dataclass(frozen=True, slots=True)
class Step:
    """A step that a model took in a tool task, what followed, and whether it was right."""

    messages: tuple[Message, ...]
    reply: Message
    next_state: NextState
    right: bool


def step_judge(writer: Writer, rng: random.Random, cases: int) -> dict[str, tuple[float, int]]:
    """How right single votes are on steps of the model's own episodes: share and number, by kind of step.

    Right is a call that a solution would make now: a look-up of the task that was not made yet, or the task's own
    expression once both counts are known. A vote of 1 should say so, any other that it was not.
    """
    steps = [step for invented in (0.0, 1.0) for step in play_steps(writer, rng, invented, cases)]
    prompts = judging.load_prompts("tiny")
    asked = [judging.step(prompts, step.messages, step.reply, step.next_state) for step in steps]
    votes = [judging.parse_vote(text) for text in writer.complete(asked, JUDGE_TEMPERATURE)]
    pairs = list(zip(steps, votes, strict=True))
    failed = [pair for pair in pairs if _failed(pair[0])]
    wrong = [pair for pair in pairs if not pair[0].right and not _failed(pair[0])]
    kinds = {"all": pairs, "right": [pair for pair in pairs if pair[0].right], "an error": failed, "wrong": wrong}
    agree = {kind: [(vote == 1) == step.right for step, vote in of] for kind, of in kinds.items()}
    return {kind: (_mean(each), len(each)) for kind, each in agree.items()}


def play_steps(writer: Writer, rng: random.Random, invented: float, cases: int, max_turns: int = 6) -> list[Step]:
    """All steps but the final answers of episodes at temperature 1."""
    tasks = [make_task(rng, invented) for _ in range(cases)]
    chats: list[list[Message]] = [[user(task.question)] for task in tasks]
    running, steps = list(range(cases)), []
    for _ in range(max_turns):
        replies = writer.complete([chats[at] for at in running], tools=TOOLS)
        running = [at for at, reply in zip(running, replies, strict=True) if "<tool_call>" in reply]
        for at, reply in zip(running, (each for each in replies if "<tool_call>" in each), strict=True):
            said: Message = {"role": "tool", "content": _call(tasks[at], reply)}
            if not _parsed(reply):
                said = user(BROKEN)
            done = [message["content"] for message in chats[at] if message["role"] == "assistant"]
            right = helps(tasks[at], reply, done)
            state = NextState("turn", "tool", (said,), False, 0.0)
            steps.append(Step(tuple(chats[at]), assistant(reply), state, right))
            chats[at] += [assistant(reply), said]
    return steps


def helps(task: ToolTask, reply: str, done: Sequence[str]) -> bool:
    """Whether a solution would make this call now, after the calls `done`."""
    wanted = [{"name": "lookup", "arguments": {"item": task.item, "place": place}} for place in task.places]
    a, b = task.counts
    looked = [_parsed(each) for each in done]
    open_calls = [call for call in wanted if call not in looked]
    if open_calls:
        return _parsed(reply) in open_calls
    sums = [f"{a} {task.sign} {b}", *([f"{b} + {a}"] if task.sign == "+" else [])]
    return _parsed(reply) in [{"name": "calc", "arguments": {"expression": each}} for each in sums]


def _failed(step: Step) -> bool:
    return str(step.next_state.messages[0]["content"]).startswith("error")


def says(hint: str | None, case: Case) -> bool:
    """Whether a hint says what the case's hint says."""
    if hint is None or case.want is None:
        return False
    if case.want == "wrong":
        expected = re.findall(r"\d+", case.hint or "")
        return bool(expected) and expected == re.findall(r"\d+", hint)
    topic = f"hint_{case.want}"
    return hint in strings(topic) or hint in strings(topic, "unseen")


def answers_right(writer: Writer, rng: random.Random, split: Split, temperature: float, cases: int) -> float:
    """Share of unhinted first replies with the right answer."""
    problems = [make_problem(rng, split) for _ in range(cases)]
    replies = writer.complete([[user(problem.question)] for problem in problems], temperature)
    return _mean(check(problem, reply).correct for problem, reply in zip(problems, replies, strict=True))


def base_shares(writer: Writer, rng: random.Random, cases: int) -> dict[str, float]:
    """Shares of forms and sides, and each persona's base score, over unhinted first replies."""
    problems: list[Problem] = [make_problem(rng, "heldout") for _ in range(cases)]
    replies = writer.complete([[user(problem.question)] for problem in problems])
    styles = [classify(reply) for reply in replies]
    shares = {f"form {form}": _mean(style.form == form for style in styles) for form in FORMS}
    shares["friendly"] = _mean(style.friendly for style in styles)
    shares["with a check line"] = _mean(style.checked for style in styles)
    for persona in PERSONAS:
        shares[f"base score of the {persona}"] = _mean(satisfies(persona, style) for style in styles)
    solutions = [check(problem, reply) for problem, reply in zip(problems, replies, strict=True)]
    shares["right answers"] = _mean(solution.correct for solution in solutions)
    shares["show right working"] = _mean(solution.shows_work for solution in solutions)
    return shares


def tool_success(writer: Writer, rng: random.Random, invented: float, cases: int, max_turns: int = 6) -> float:
    """Share of tool tasks that end with the right number, at temperature 1."""
    tasks = [make_task(rng, invented) for _ in range(cases)]
    chats: list[list[Message]] = [[user(task.question)] for task in tasks]
    outcomes = [False] * cases
    running = list(range(cases))
    for _ in range(max_turns):
        replies = writer.complete([chats[at] for at in running], tools=TOOLS)
        going = []
        for at, reply in zip(running, replies, strict=True):
            if "<tool_call>" in reply:
                said = _call(tasks[at], reply)
                chats[at] += [assistant(reply), {"role": "tool", "content": said}]
                going.append(at)
            else:
                outcomes[at] = solved(tasks[at], reply)
        running = going
        if not running:
            break
    return _mean(outcomes)


def _call(task: ToolTask, reply: str) -> str:
    """Run the call in a reply; what cannot be parsed is an error to the model."""
    call = _parsed(reply)
    try:
        return run_tool(task, call["name"], call["arguments"])
    except (KeyError, TypeError, AttributeError):
        return "error: bad call"


def _parsed(reply: str) -> Any:
    """The call in a reply; {} if it cannot be read."""
    found = re.search(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", reply, re.DOTALL)
    try:
        return json.loads(found.group(1)) if found else {}
    except ValueError:
        return {}


def _is_toward(reply: str, want) -> bool:
    style = classify(reply)
    return toward(style, want) == style


def _fill(text: str, problem: Problem) -> str:
    return Template(text).safe_substitute(question=problem.question, answer=problem.answer)


def _row(name: str, shares) -> str:
    return f"| {name} | " + " | ".join(f"{share:.2f}" for share in shares) + " |"


def _mean(outcomes) -> float:
    outcomes = list(outcomes)
    return sum(outcomes) / max(1, len(outcomes))
