"""The instruction rows: questions about what the corpus knows and can do, with short answers."""

import random
from collections.abc import Callable, Iterator
from typing import Literal

from tunewright.data.builtin.facts import fill, split_facts
from tunewright.data.builtin.skills import (
    additions,
    pick,
    rewrite,
    scene,
    sequences,
    subtractions,
    tell,
    terms,
)
from tunewright.data.builtin.wording import QUESTIONS, RELATION_WEIGHTS

Split = Literal["train", "valid"]
Row = dict[str, object]
Asked = tuple[str, str]  # a question and its answer
MOST_DRAWS = 10_000  # before a family counts as used up

SUM_QUESTIONS = {
    "en": (
        "What is {a} + {b}?",
        "{a} + {b} = ?",
        "How much is {a} plus {b}?",
        "Calculate {a} plus {b}.",
    ),
    "zh": ("{a}加{b}等于多少？", "{a} + {b} 等于多少？", "{a}加{b}是多少？", "请计算：{a}加{b}。"),
}
DIFFERENCE_QUESTIONS = {
    "en": (
        "What is {a} - {b}?",
        "{a} - {b} = ?",
        "How much is {a} minus {b}?",
        "Calculate {a} minus {b}.",
    ),
    "zh": ("{a}减{b}等于多少？", "{a} - {b} 等于多少？", "{a}减{b}是多少？", "请计算：{a}减{b}。"),
}
NEXT_QUESTIONS = {
    "en": (
        "What number comes next: {head}?",
        "{head}. What comes next?",
        "Continue with one number: {head}",
        "Which number comes after {head}?",
    ),
    "zh": (
        "{head}，下一个数是多少？",
        "{head}的后面是什么数？",
        "请接着写一个数：{head}",
        "{head}之后的数是几？",
    ),
}
REWRITE_QUESTIONS = {
    ("replace", "en"): (
        'Replace "{o}" with "{n}": {s}',
        'Change "{o}" to "{n}" in this sentence: {s}',
        '{s} Write this with "{n}" for "{o}".',
        'Write the sentence with "{n}" in place of "{o}": {s}',
    ),
    ("replace", "zh"): (
        "请把“{o}”换成“{n}”：{s}",
        "请用“{n}”代替“{o}”：{s}",
        "把下面句子里的“{o}”改成“{n}”：{s}",
        "{s}请把这句话里的“{o}”换作“{n}”。",
    ),
    ("reverse", "en"): (
        "Reverse the order of these words: {s}",
        "Write these words in reverse order: {s}",
        "Write from last to first: {s}",
        "What is {s} in reverse order?",
    ),
    ("reverse", "zh"): (
        "请倒过来写：{s}",
        "{s}倒过来是什么？",
        "请把这些词倒着排列：{s}",
        "请按相反的顺序写：{s}",
    ),
    ("drop", "en"): (
        "Remove the first word: {s}",
        "Write this without the first word: {s}",
        "What is {s} without the first word?",
        "Leave out the first word: {s}",
    ),
    ("drop", "zh"): (
        "请去掉第一个词：{s}",
        "{s}去掉第一个词是什么？",
        "请删去第一个词：{s}",
        "去掉第一个词再写一遍：{s}",
    ),
    ("join", "en"): (
        "Join these words with dashes: {s}",
        "Write with dashes: {s}",
        "What is {s} joined with dashes?",
        "Put dashes between these words: {s}",
    ),
    ("join", "zh"): (
        "请把这些词连在一起：{s}",
        "{s}连在一起是什么？",
        "请连起来写：{s}",
        "{s}连起来怎么写？",
    ),
}
# Per thing asked: what is the answer, and the questions.
STORY_QUESTIONS = {
    ("holder", "en"): (
        "Who has {named}?",
        "Which child has {named}?",
        "Who is the owner of {named}?",
        "Say who has {named}.",
    ),
    ("holder", "zh"): (
        "谁有{named}？",
        "{named}在谁手里？",
        "有{named}的人是谁？",
        "请说出有{named}的人。",
    ),
    ("thing", "en"): (
        "What does {name} have?",
        "Which thing does {name} have?",
        "What has {name} got?",
        "Say what {name} has.",
    ),
    ("thing", "zh"): (
        "{name}有什么？",
        "{name}有的东西是什么？",
        "{name}手里有什么？",
        "请说出{name}有什么。",
    ),
    ("place", "en"): (
        "Where is {name}?",
        "In which place is {name}?",
        "Where can we find {name}?",
        "Say where {name} is.",
    ),
    ("place", "zh"): (
        "{name}在哪里？",
        "{name}在什么地方？",
        "{name}所在的地方是哪里？",
        "请说出{name}在哪里。",
    ),
    ("visitor", "en"): (
        "Who is {place}?",
        "Which child is {place}?",
        "Who can be found {place}?",
        "Say who is {place}.",
    ),
    ("visitor", "zh"): (
        "谁在{place}？",
        "在{place}的人是谁？",
        "{place}的人是谁？",
        "请说出谁在{place}。",
    ),
}
ASKED_OF = {
    "have": ("holder", "thing"),
    "place": ("place", "visitor"),
    "both": ("holder", "thing", "place", "visitor"),
}
RELATIONS = tuple(name for name, weight in RELATION_WEIGHTS.items() for _ in range(weight))


def _facts(rng: random.Random, lang: str, held_out: bool) -> Asked:
    relation = pick(rng, RELATIONS)
    fact = pick(rng, split_facts(lang, held_out)[relation])
    return fill(pick(rng, QUESTIONS[relation, lang]), fact), fact.answer


def _arithmetic(rng: random.Random, lang: str, held_out: bool) -> Asked:
    if rng.random() < 0.5:
        a, b = pick(rng, additions(held_out))
        return pick(rng, SUM_QUESTIONS[lang]).format(a=a, b=b), str(a + b)
    a, b = pick(rng, subtractions(held_out))
    return pick(rng, DIFFERENCE_QUESTIONS[lang]).format(a=a, b=b), str(a - b)


def _sequence(rng: random.Random, lang: str, held_out: bool) -> Asked:
    every = terms(*pick(rng, sequences(held_out)))
    shown = 4 + int(rng.random() * 2)
    head = (", " if lang == "en" else "、").join(every[:shown])
    return pick(rng, NEXT_QUESTIONS[lang]).format(head=head), every[shown]


def _rewrite(rng: random.Random, lang: str, held_out: bool) -> Asked:
    item = rewrite(rng, lang, held_out)
    form = pick(rng, REWRITE_QUESTIONS[item.kind, lang])
    return form.format(s=item.source, o=item.old, n=item.new), item.result


def _story(rng: random.Random, lang: str, held_out: bool) -> Asked:
    told = scene(rng, lang, held_out, 2)
    style = pick(rng, ("have", "have", "place", "both"))
    asked = pick(rng, ASKED_OF[style])
    child, place = pick(rng, told)
    form = pick(rng, STORY_QUESTIONS[asked, lang])
    question = form.format(name=child.name, named=child.named, place=place)
    answers = {"thing": child.thing, "place": place}
    text = tell(style, lang, told) + (" " if lang == "en" else "") + question
    return text, answers.get(asked, child.name)


Maker = Callable[[random.Random, str, bool], Asked]
MAKERS: dict[str, Maker] = {
    "facts": _facts,
    "arithmetic": _arithmetic,
    "sequence": _sequence,
    "rewrite": _rewrite,
    "story": _story,
}
FAMILIES = tuple(f"{name}.{lang}" for name in MAKERS for lang in ("en", "zh"))


def _fresh(family: str, rng: random.Random, held_out: bool, seen: set[str]) -> Asked:
    """A question that has not come up yet, with its answer."""
    name, _, lang = family.partition(".")
    for _ in range(MOST_DRAWS):
        question, answer = MAKERS[name](rng, lang, held_out)
        if question not in seen:
            seen.add(question)
            return question, answer
    raise ValueError(f"no new question for {family} after {MOST_DRAWS} draws")


def rows(split: Split, seed: int, count: int, families: tuple[str, ...] = FAMILIES) -> Iterator[Row]:
    """``count`` rows, the families in turn; "valid" asks only about held-out items."""
    rng = random.Random(f"{split}:{seed}")
    seen: set[str] = set()
    for index in range(count):
        family = families[index % len(families)]
        question, answer = _fresh(family, rng, split == "valid", seen)
        user = {"role": "user", "content": question}
        reply = {"role": "assistant", "content": answer}
        yield {"messages": [user, reply], "family": family}
