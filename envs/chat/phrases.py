"""What people say about a reply: small grammars with alternatives, by topic.

Knows only strings. Ignores problems, users and models. A pattern `{a|b|}` stands for its alternatives; a fifth of all
strings that a grammar makes is never trained on (`unseen`, by hash), and hand-written phrasings (`written`) share
no pattern with the grammars at all.

Topics: `ask_<want>` complains and says what is wanted; `hint_<want>` says the same as an instruction (what a judge
distils from it); `reask`, `vague`, `thanks`, `praise`, `agree`, `ambiguous`, `wrong`, `hint_wrong`.
"""

from __future__ import annotations

import itertools
import random
import re
from functools import cache
from typing import Literal

from envs.chat.world import bucket

Phrasing = Literal["train", "unseen", "written"]
Want = Literal["plain", "brief", "steps", "friendly", "neutral", "checked", "unchecked"]
WANTS: tuple[Want, ...] = ("plain", "brief", "steps", "friendly", "neutral", "checked", "unchecked")

GRAMMARS: dict[str, tuple[str, ...]] = {
    "ask_plain": (
        "{Please |Could you |Can you |}{write|put|give} {it|this|that|the reply} in plain {sentences|words|text}"
        "{, without bold| with no lists|, no numbered steps| and without markup|}{.| please.|, thanks.}",
        "{That|This|It} {looks|reads|sounds} {like an AI wrote it|machine-made|like a robot|AI-made|like a bot}"
        "{, no bold please.|; use plain sentences.|. No numbered steps, please.|. Plain words please.}",
        "{Don't|Do not|Never} use {bold|bold text|numbered steps|step lists|boxed answers|bold labels}"
        "{ with me| here| in your replies|}{.|, just write normally.|, write plainly.}",
        "{I|We} {don't want|dislike|can't use|can't hand in|hate}"
        " {bold text|numbered steps|this list format|step lists}"
        "{.|, use plain sentences.|, write it plainly.}",
        "{Too much formatting|Too much markup|So much bold}"
        "{, plain text please.|. Write like a person.|. Plain words.}",
        "{Explain|Tell me|Say|Show me} how you got {it|that|there} in {plain words|a plain sentence|ordinary words}.",
        "{A bare number|Only the answer|Just a number} {won't do|is too little|does not help}"
        "{, explain it in plain words.|. Write a plain sentence with the working.}",
        "{Lose|Remove|Get rid of|Ditch|No more} the {stars|bold|numbering|formatting|step labels|list}"
        "{.|, please.|, I want normal text.|, prose is fine.|, it has to look like mine.}",
        "{I have to|I must|I will} {hand this in|copy this by hand|show this to my teacher}"
        "{, so no bold.|, so write like a person.|, it can't look generated.|, plain sentences please.}",
        "{Nobody|No student|No person} {writes|talks} like {that|this}"
        "{.|, use normal sentences.|, plain words please.}",
        "{You write|This is written|That reads} like a {chatbot|machine|computer|program}"
        "{.|, be more natural.|, I want ordinary prose.|. No layout please.}",
        "{I prefer|I'd rather have|Give me|Use} {ordinary prose|normal sentences|running text|natural language}"
        "{.| with the working.| over lists.|, not a list.|, no formatting.}",
    ),
    "hint_plain": (
        "{Write|Answer in|Use} plain sentences{ that show the working|}{, no bold and no numbered steps.|"
        " without bold or numbered steps.| instead of bold numbered steps.}",
        "{Do not|Don't|Never} use bold{ text|} or numbered steps{.|; write plain sentences.}",
        "{Explain|Show the working|Give the working} in plain words{, no lists and no bold.|, without markup.}",
        "{Write|Answer} {like a person|naturally|as a student would}{, in plain sentences.|, without formatting.}",
        "{Use|Prefer} {ordinary prose|normal sentences|running text}{.|, not a list.| without any markup.}",
    ),
    "ask_brief": (
        "{Too long|That is too long|Too wordy|So many words}{, just the answer please.|. Only the answer.|. Be brief.}",
        "{Please |Could you |Can you |}{just |only }{give|tell} me the {answer|result|final number}{.| please.}",
        "{Keep it|Make it|Be} {short|shorter|brief|briefer}{.| please.|, only the answer.|, I need just the result.}",
        "{I|We} {don't need|can skip|don't want} the {working|explanation|details}{, only the answer.|, be brief.|.}",
        "{Skip|Drop|Leave out} the {working|explanation|details}{, just the answer.|, give the result only.|.}",
        "{All I need|All I want|The only thing I want} is the {number|answer|result}{.|, no more.|, nothing else.}",
        "{One|A single} {word|number|line} {is enough|would do|will do}{.|, don't explain.|, less text please.}",
        "{Less|Fewer words|Less text}{, please.|, I am in a hurry.|, no explanation.}",
    ),
    "hint_brief": (
        "{Give|State|Write} only the {final |}answer{, without any working.|, no working.|, be brief.}",
        "{Be brief|Keep it short}: {only the answer|the answer alone|just the result}.",
        "{Leave out|Skip} the working{ and state only the answer.| and be brief.|, just answer.}",
        "{Reply|Answer} with {the number|the result|one line}{ only.| and nothing more.|, do not explain.}",
    ),
    "ask_steps": (
        "{Please |Could you |Can you |}{show|write|list|give me} {numbered steps|the steps|each step|bold steps}"
        "{.| please.| with bold labels.}",
        "{I|We} {want|need|like|prefer} {numbered steps|a numbered list|the steps in bold|step by step}"
        "{.| here.| please.}",
        "{Break it down|Go|Do it} step by step{.| please.|, with bold steps.}",
        "{Where are the steps?|No steps?|The steps are missing.}{ List them.| Number them please.| Use bold steps.|}",
        "{I|My class} {can't|cannot} follow{ this|}{, number the steps.|, I need steps.|, make it a list.}",
        "{Split|Lay|Set} it {out|up} {as a list|in numbered lines|in steps}{.| please.| with bold.}",
    ),
    "hint_steps": (
        "{Use|Write|Give} {numbered|bold numbered} steps{ with bold labels.|, one per line.| and a bold answer.}",
        "{Go|Work|Show it} step by step{ in bold.|, with numbered bold steps.}",
        "{List|Number} {each step|the steps}{ in bold.|, one per line.}",
        "{Lay out|Split|Set out} the {solution|working} {as a numbered list|in bold steps|line by line in steps}.",
    ),
    "ask_friendly": (
        "{That|This|It} {is|sounds|feels} {cold|so dry|a bit cold|unfriendly|harsh}{.|, be friendlier.|. Be warm.}",
        "{Please |Could you |Can you |}be {friendlier|warmer|kinder|more friendly|nicer}{.| please.| with me.}",
        "{I|We} {want|need|like|prefer} a {friendly|warm|kind|cheerful} {tone|reply|word}{.| please.|, be nice.}",
        "{Add|Say|Give me} {something kind|a kind word|a friendly word|a warm word}{.| please.| too.}",
        "{A bit of|Some|A little} {warmth|kindness|cheer} {would be nice|would help|please}{.|, my class reads this.}",
        "{You are|You sound} {so stiff|like a clerk|grumpy|too formal}{.|, be kind.|, say something nice.|, cheer up.}",
        "{Encourage|Cheer on|Be kind to} {the reader|my pupils|me|my class}{.| please.| a bit.}",
    ),
    "hint_friendly": (
        "{Use|Write in|Take} a {friendly|warm|kind} tone{.|, with a kind word.| and cheer the user on.}",
        "{Be|Sound} {friendly|warm and friendly|kind and warm}{.|, add a kind word.| in the reply.}",
        "{Add|Include} a {kind|friendly|warm} {word|phrase|remark}.",
        "{Encourage|Cheer on} the {reader|user|pupil}{.| with a kind word.| warmly.}",
    ),
    "ask_neutral": (
        "{Drop|Skip|Leave out|Stop} the {cheerful talk|small talk|chatter|cheering|pleasantries}"
        "{.| please.|, be sober.}",
        "{Too|So|That is too} {cheerful|chatty|bubbly|sugary}{.|, be matter of fact.|. Stay neutral.}",
        "{Please |Could you |Can you |}{stay neutral|be matter of fact|be sober|skip the niceties}{.| please.}",
        "{I|We} {don't need|don't want|dislike} the {cheering|chatter|kind words|small talk}{.|, stay neutral.}",
        "{No|Less|Spare me the} {flattery|cheer|sweet talk|jolly words}{.| please.|, facts are enough.|, keep it dry.}",
    ),
    "hint_neutral": (
        "{Leave out|Skip|Drop} the {cheerful phrases|small talk|kind words}{.|, be matter of fact.}",
        "{Be|Stay} {neutral|matter of fact|sober}{.|, no cheerful phrases.|, without small talk.}",
        "{Keep it|Write} {dry|sober|factual}{.|, no cheer.|, no friendly words.}",
    ),
    "ask_checked": (
        "{Please |Could you |Can you |}{add|write|include|give} a {check|check line|closing check}"
        "{.| please.| at the end.| with the numbers.}",
        "{You|The reply} {never checked|did not check|didn't check} {it|the numbers|the result}"
        "{.|, add a check line.|. End with a check.}",
        "{I|We} {miss|want|need} a check {line|at the end|with the numbers}{.| please.|, name the numbers.}",
        "{Where is the check?|No check?|The check is missing.}{ Add one.| End with a check line.| Name the numbers.|}",
        "{Verify|Prove|Test|Double-check} {it|the result|your answer}"
        "{ at the end.| in a last line.| with the numbers.}",
        "{How can I|How do my students} {trust|believe} {this|that}?{ Add a check.| Check it at the end.| Verify it.}",
        "{My students|My class|The pupils} {need|want|expect} {a check|a check line|a last line that checks it}"
        "{.|, please.}",
    ),
    "hint_checked": (
        "{End with|Add|Close with|Finish with} a check line{.| that names the numbers.| with the numbers.}",
        "{Check the result|Check the numbers|Verify the result} {at the end.|in a closing line.|in a check line.}",
        "{Verify|Double-check} the {result|answer} {at the end|in a last line}{.| with the numbers.}",
    ),
    "ask_unchecked": (
        "{Skip|Drop|Leave out|Omit} the check{ line|}{.| please.|, I trust you.}",
        "{Please |Could you |Can you |}{leave out|skip|omit} the check{ line|}{.| please.}",
        "{I|We} {don't need|don't want} {the|a|that} check{ line|}{.| at the end.| please.}",
        "{The check|The check line|That last line} is {useless|not needed|too much}{.|, drop it.|, leave it out.}",
    ),
    "hint_unchecked": (
        "{Leave out|Skip|Drop|Omit} the check line{.| at the end.}",
        "{Do not|Don't} add a check{ line|}{.| at the end.}",
    ),
    "wrong": (
        "{That's|That is|This is} {wrong|not right|incorrect|false}{,|:} {it should be|the answer is|it is} $answer.",
        "{No|Wrong|Nope|Sorry}, {it should be|the book says|the right answer is|I get|we get} $answer.",
        "{You|I think you} {made a mistake|got it wrong|miscounted}, {it should be|it is|I get} $answer.",
        "{My|Our} {result|answer} is {different|another}: $answer.",
        "{Look|Count|Compute} {again|once more|it again}, {I believe it is|it must be|I have} $answer.",
    ),
    "hint_wrong": (
        "The {right|correct} answer is $answer.",
        "{Compute|Count} {again|with care}: it {is|should be} $answer.",
        "{The answer|It} {has to be|must be} $answer.",
    ),
    "reask": (
        "{Again|Once more|Let me ask again|I ask again|Let me repeat}: $question",
        "{I asked|My question was|The question was}: $question",
        "$question {Try again.|Please try again.|Once more please.|Do it again.}",
        "$question",
        "{So|Well|Please|Sorry}{ once again|, again| once more}{:|.|,} $question",
        "{You did not|You didn't} {understand|answer|get it}{.|:} $question",
    ),
    "vague": (
        "{Hmm, |Well, |Sorry, |}{not great|not good|I don't like it|not what I wanted|this is bad|that is poor}.",
        "{I am|I'm} {not happy|unhappy|disappointed}{.| with this.| with that.| about this reply.}",
        "{That|This|It} {is not good|doesn't work for me|is not it|could be better|is no good|does not help}.",
        "{Not|Hardly} {useful|helpful|good enough|what I need}{.| at all.|, sorry.}",
        "{Meh|Ugh|Oh no|Hmm no|Oh dear}{.|, poor.|, really?|, I expected more.|, that is weak.}",
        "{I expected|I hoped for} {more|better|something else|something better}{.| here.| from you.}",
        "{What|Is that all?|Seriously?|Really?}{ Poor.| That is bad.| Not good.| I am not impressed.}",
    ),
    "thanks": (
        "{Thanks|Thank you|Many thanks|Thanks a lot|Cheers}{.|!| for that.| so much.|, that helps.|, very clear.}",
        "{Perfect|Great|Very good|Wonderful|Excellent}{.|!|, thanks.|, thank you!|, that helps.}",
        "{That|This} {helps|is clear|is helpful|works}{.|, thanks.|, thank you.}",
        "{Got it|Understood|All clear|Lovely|Super}"
        "{, thanks.|, thank you!|, that is all.|, you helped a lot.|, great.}",
        "{You|That} {helped|saved} me{.|, thanks!| a lot.|, many thanks.}",
    ),
    "praise": (
        "{I like|I love|Nice,|Good,} {how you wrote it|this style|that it is clear|the way you put it}{.|!|, thanks.}",
        "{Exactly|Just} {what I wanted|how I like it|what I need|as I like it}{.|!|, thanks.}",
        "{That|This} is {written well|well put|how I want it|the right style}{.|!|, keep it so.}",
        "{This|That} is {the way|how} I {like|want|read} it{.|!| best.}",
        "{Good|Lovely|Nice} {style|tone|wording|reply}{.|!|, more of that.|, keep writing so.|, I like it.}",
    ),
    "agree": (
        "{Right|Yes|Correct|Okay yes|True}, {that matches|I get the same|that is right|I see it too|I agree}{.|!}",
        "{Makes sense|I agree|That matches my result|Sounds right}{.|!|, good.}",
        "{I got|I had|I have|My book has|We had} {that|the same|this result} {too|as well}{.|!|, good.}",
    ),
    "ambiguous": (
        "{Hmm|Ok|Okay|Hm|I see|Noted|Aha|Well}{.|...|?}",
        "{One moment|Wait a second|Hold on|Let me think|Give me a minute|Brb}{.|...|, please.}",
        "{My phone rang|It is raining here|I am on the bus|Lunch is soon|My cat is here}{.|...| now.}",
        "{The bell|Someone|My sister|The door} {is here|is calling|rang|needs me}{.|...| now.|, one moment.}",
        "{Let me|I will|I'll} {see|check|look|write that down|get a pen}{.|...| first.}",
    ),
}

WRITTEN: dict[str, tuple[str, ...]] = {
    "ask_plain": (
        "My teacher would notice a bot did this. Write it like I would, in normal sentences.",
        "Ugh, bold again. Normal sentences would be better.",
        "Can we lose the bold and the numbering?",
        "Write it the way a person would on paper, no fancy layout.",
        "I can't copy this with all that bold in it. Plain writing please.",
        "Stop formatting it like a chatbot, plain sentences please.",
        "No steps and no bold, I have to hand this in as my own.",
        "Could it be normal prose with the working, not a list?",
    ),
    "hint_plain": (
        "Answer in ordinary prose that shows the calculation, with no formatting.",
        "The user wants natural sentences, not bold numbered steps.",
        "Avoid lists and bold; write it like a person would.",
    ),
    "ask_brief": (
        "I only wanted the number, nothing else.",
        "No need to explain, the answer alone is fine.",
        "Shorter! One line with the result.",
        "You talk too much, the answer is enough.",
    ),
    "hint_brief": (
        "Reply with nothing but the answer.",
        "The user wants a very short answer without explanation.",
        "Just state the result, briefly.",
    ),
    "ask_steps": (
        "I can't follow, number the steps for me.",
        "Lay it out one step at a time, with the steps in bold.",
        "Step list please, my class uses those.",
    ),
    "hint_steps": (
        "Lay out the solution as a numbered list of bold steps.",
        "The user wants each step numbered and bold.",
        "Show every step on its own line in bold.",
    ),
    "ask_friendly": (
        "You sound like a machine, a kind word would be nice.",
        "A little warmth, please, my pupils read this.",
        "Could this be less cold and more friendly?",
        "My pupils need cheering on, be warm to them.",
    ),
    "hint_friendly": (
        "Sound warm and cheer the reader on.",
        "The user wants a kind and friendly reply.",
        "Start or end with something friendly.",
    ),
    "ask_neutral": (
        "Enough with the cheering, facts only.",
        "No need to be so cheerful about it.",
        "Please be less chatty, stay sober.",
    ),
    "hint_neutral": ("No cheerful words, only the facts.", "The user wants a sober tone without small talk."),
    "ask_checked": (
        "How do I know it is right? End with a check of the numbers.",
        "A check of the result at the end is missing, name the numbers.",
        "My students need to see a check line too.",
        "Please verify it in a last line, a check with numbers.",
    ),
    "hint_checked": (
        "Finish by checking the result with the numbers in one line.",
        "The user wants a closing check that names the numbers.",
        "The last line should be a check of the result.",
    ),
    "ask_unchecked": ("No check needed at the end.", "The check line is useless to me, drop it."),
    "hint_unchecked": ("The user does not want a check line.", "No check at the end."),
    "wrong": ("I believe it is $answer, look once more.", "My result is $answer, so yours is off."),
    "hint_wrong": ("Make sure that the answer is $answer.",),
    "reask": ("Same question again: $question", "You did not get me. $question", "So, once again. $question"),
    "vague": (
        "This isn't it at all.",
        "I had hoped for rather more than that.",
        "Meh, that does nothing for me.",
        "Really? That is your reply? Poor.",
    ),
    "thanks": (
        "Ah, lovely, thank you very much.",
        "Got it now, thanks for the help.",
        "Super, that is all I needed.",
        "You are a star, thanks!",
    ),
    "praise": ("That is the way I like to read it.", "Good style, keep writing like that.", "I like this one a lot."),
    "agree": ("Yes, that is what I had as well.", "I came to the same result, good."),
    "ambiguous": ("Hmm, the bell just rang.", "Hang on, someone is at the door.", "Okay, let me see."),
}

TOPICS = tuple(GRAMMARS)


def say(topic: str, rng: random.Random, phrasing: Phrasing = "train") -> str:
    """One phrase of a topic. `$question` and `$answer` are left for the caller to fill in."""
    if phrasing == "written":
        return rng.choice(WRITTEN[topic])
    unseen = phrasing == "unseen"
    pattern = rng.choice(GRAMMARS[topic])
    for _ in range(100):
        text = _tidy(re.sub(r"\{([^{}]*)\}", lambda found: rng.choice(found.group(1).split("|")), pattern))
        if (bucket(text) == "heldout") == unseen:
            return text
        if unseen:
            pattern = rng.choice(GRAMMARS[topic])
    return rng.choice(strings(topic, phrasing))


@cache
def strings(topic: str, phrasing: Phrasing = "train") -> tuple[str, ...]:
    """All phrases of a topic in their order of making; train and unseen never share one."""
    if phrasing == "written":
        return WRITTEN[topic]
    made = dict.fromkeys(text for pattern in GRAMMARS[topic] for text in _expand(pattern))
    return tuple(text for text in made if (bucket(text) == "heldout") == (phrasing == "unseen"))


def _expand(pattern: str) -> list[str]:
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [part.split("|") if at % 2 else [part] for at, part in enumerate(parts)]
    return [_tidy("".join(combination)) for combination in itertools.product(*choices)]


def _tidy(text: str) -> str:
    """One space between words, a capital at the start, unless a placeholder stands there."""
    text = re.sub(r"\s+", " ", text).strip()
    return text if text.startswith("$") else text[:1].upper() + text[1:]
