"""The pretraining text: short documents that only state, in English and in Chinese."""

import functools
import random
from collections.abc import Callable, Iterator

from tunewright.data.builtin.facts import facts, fill
from tunewright.data.builtin.skills import (
    Child,
    additions,
    pick,
    rewrite,
    scene,
    sequences,
    subtractions,
    tell,
    terms,
)
from tunewright.data.builtin.wording import INLINE, LINES, RELATION_WEIGHTS

Statements = tuple[tuple[str, ...], ...]

# Operators as words, with {a}, {b} the operands and {c} the result.
SUMS = {
    "symbol": ("{a} + {b} = {c}", "{a} + {b} =\n{c}"),
    "en": ("{a} plus {b} is {c}.", "{a} plus {b}:\n{c}"),
    "zh": ("{a}加{b}等于{c}。", "{a}加{b}：\n{c}"),
}
DIFFERENCES = {
    "symbol": ("{a} - {b} = {c}", "{a} - {b} =\n{c}"),
    "en": ("{a} minus {b} is {c}.", "{a} minus {b}:\n{c}"),
    "zh": ("{a}减{b}等于{c}。", "{a}减{b}：\n{c}"),
}
# {all} is all terms, {head} the terms before {next}, {by} the size of the step.
RUNS = {
    "en": (
        "{all}",
        "{head}, {next}",
        "After {head} comes {next}.",
        "{head}, then:\n{next}",
        "The number after {head} is {next}.",
    ),
    "zh": (
        "{all}",
        "{head}、{next}",
        "{head}的后面是{next}。",
        "{head}，接着：\n{next}",
        "{head}之后的数是{next}。",
    ),
}
STEPS = {
    (True, "en"): "Up in steps of {by}: {all}",
    (False, "en"): "Down in steps of {by}: {all}",
    (True, "zh"): "每次加{by}：{all}",
    (False, "zh"): "每次减{by}：{all}",
}
# {s} is the source, {t} the result, {o} and {n} the old and the new word.
REWRITES = {
    ("replace", "en"): (
        '{s} With "{n}" for "{o}": {t}',
        '{s}\nWith "{n}" in place of "{o}":\n{t}',
        '"{o}" turns into "{n}": {s}\n{t}',
        'Putting "{n}" for "{o}" in "{s}" gives "{t}"',
    ),
    ("replace", "zh"): (
        "“{s}”里的“{o}”换作“{n}”，就成了“{t}”",
        "{s}\n“{o}”换成“{n}”以后：\n{t}",
        "“{o}”变成“{n}”：{s}\n{t}",
        "{s}用“{n}”代替“{o}”，得到：{t}",
    ),
    ("reverse", "en"): (
        "{s}, in reverse order: {t}",
        "{s}\nIn reverse order:\n{t}",
        'The words "{s}" from last to first are "{t}".',
        "Reverse order of {s}:\n{t}",
    ),
    ("reverse", "zh"): (
        "{s}，倒过来是：{t}",
        "{s}\n倒过来的顺序：\n{t}",
        "“{s}”倒过来就是“{t}”。",
        "倒着排列{s}：\n{t}",
    ),
    ("drop", "en"): (
        "{s}, without the first word: {t}",
        "{s}\nWithout the first word:\n{t}",
        '"{s}" less its first word is "{t}".',
    ),
    ("drop", "zh"): (
        "{s}，去掉第一个词是：{t}",
        "{s}\n去掉第一个词以后：\n{t}",
        "“{s}”去掉第一个词就是“{t}”。",
    ),
    ("join", "en"): (
        "{s}, joined with dashes: {t}",
        "{s}\nJoined with dashes:\n{t}",
        'With dashes, "{s}" becomes "{t}".',
    ),
    ("join", "zh"): (
        "{s}，连在一起是：{t}",
        "{s}\n连在一起以后：\n{t}",
        "“{s}”连起来就是“{t}”。",
    ),
}
OPENERS = {
    "en": ("", "", "It was a sunny day. ", "The children met again. ", "School was over. "),
    "zh": ("", "", "今天天气很好。", "孩子们又见面了。", "放学了。"),
}
# What a story says again at its end: in the running text, and on lines of their own.
RECAPS = {
    ("have", "en"): (
        "In the end {name} still had {named}.",
        "The one who has {named} is {name}.",
        "So {name} has {thing}.",
    ),
    ("have", "zh"): (
        "最后，{named}还在{name}手里。",
        "有{named}的人是{name}。",
        "所以{name}有{thing}。",
    ),
    ("place", "en"): (
        "So {name} is {place}.",
        "The child {place} is {name}.",
        "{name} was still {place}.",
    ),
    ("place", "zh"): (
        "所以{name}在{place}。",
        "在{place}的人是{name}。",
        "最后，{name}还在{place}。",
    ),
}
RECAP_LINES = {
    ("have", "en"): (
        "The owner of {named}:\n{name}",
        "The thing {name} has:\n{thing}",
        "{name}:\n{thing}",
    ),
    ("have", "zh"): (
        "有{named}的人：\n{name}",
        "{name}有的东西：\n{thing}",
        "{name}：\n{thing}",
    ),
    ("place", "en"): (
        "The child {place}:\n{name}",
        "The place of {name}:\n{place}",
        "{name}:\n{place}",
    ),
    ("place", "zh"): (
        "在{place}的人：\n{name}",
        "{name}所在的地方：\n{place}",
        "{name}：\n{place}",
    ),
}


@functools.cache
def _statements(lang: str, lines: bool) -> dict[str, Statements]:
    """Every statement in advance: relation to, per fact, its wordings."""
    pool: dict[str, Statements] = {}
    for relation, found in facts(lang).items():
        forms = INLINE[relation, lang]
        if lines:
            # Twice the weight for the answers that open a line.
            forms = forms + LINES[relation, lang] * 2
        pool[relation] = tuple(tuple(fill(form, fact) for form in forms) for fact in found)
    return pool


RELATIONS = tuple(name for name, weight in RELATION_WEIGHTS.items() for _ in range(weight))


def _facts(rng: random.Random, lang: str) -> str:
    """Three to five statements, of one relation in half of the documents."""
    lines = rng.random() < 0.6
    pool = _statements(lang, lines)
    relation = pick(rng, RELATIONS)
    mixed = rng.random() < 0.5
    parts = []
    for _ in range(3 + int(rng.random() * 3)):
        parts.append(pick(rng, pick(rng, pool[relation])))
        if mixed:
            relation = pick(rng, RELATIONS)
    return ("\n" if lines else " " if lang == "en" else "").join(parts)


def _calculation(rng: random.Random, style: str) -> str:
    if rng.random() < 0.55:
        a, b = pick(rng, additions(False))
        return pick(rng, SUMS[style]).format(a=a, b=b, c=a + b)
    a, b = pick(rng, subtractions(False))
    return pick(rng, DIFFERENCES[style]).format(a=a, b=b, c=a - b)


def _arithmetic(rng: random.Random, lang: str) -> str:
    """Four to seven calculations; half of the documents write them in symbols."""
    style = "symbol" if rng.random() < 0.5 else lang
    return "\n".join(_calculation(rng, style) for _ in range(4 + int(rng.random() * 4)))


def _run(rng: random.Random, lang: str) -> str:
    start, step = pick(rng, sequences(False))
    every, comma = terms(start, step), ", " if lang == "en" else "、"
    shown = 4 + int(rng.random() * 2)
    named = rng.random() < 0.15
    form = STEPS[step > 0, lang] if named else pick(rng, RUNS[lang])
    head = comma.join(every[:shown])
    return form.format(all=comma.join(every), head=head, next=every[shown], by=abs(step))


def _sequence(rng: random.Random, lang: str) -> str:
    return "\n".join(_run(rng, lang) for _ in range(2 + int(rng.random() * 2)))


def _rewrite(rng: random.Random, lang: str) -> str:
    parts = []
    for _ in range(2):
        item = rewrite(rng, lang, False)
        form = pick(rng, REWRITES[item.kind, lang])
        parts.append(form.format(s=item.source, t=item.result, o=item.old, n=item.new))
    return "\n".join(parts)


def _recap(rng: random.Random, style: str, lang: str, lines: bool, told: tuple[Child, str]) -> str:
    asked = style if style != "both" else "have" if rng.random() < 0.5 else "place"
    child, place = told
    form = pick(rng, (RECAP_LINES if lines else RECAPS)[asked, lang])
    return form.format(name=child.name, thing=child.thing, named=child.named, place=place)


def _story(rng: random.Random, lang: str) -> str:
    """Two children with things and places; the end repeats it, in any order."""
    told = scene(rng, lang, False, 2)
    style = pick(rng, ("have", "have", "place", "both"))
    body = pick(rng, OPENERS[lang]) + tell(style, lang, told)
    rng.shuffle(told)
    lines = rng.random() < 0.5
    ends = [_recap(rng, style, lang, lines, one) for one in told]
    return ("\n" if lines else " " if lang == "en" else "").join([body, *ends])


Maker = Callable[[random.Random, str], str]
# Out of a hundred documents.
SHARES: tuple[tuple[Maker, int], ...] = (
    (_facts, 25),
    (_arithmetic, 25),
    (_sequence, 12),
    (_rewrite, 18),
    (_story, 20),
)
MAKERS = tuple(maker for maker, share in SHARES for _ in range(share))


def document(seed: int, index: int) -> str:
    """The ``index``-th document of ``seed``, whatever else is drawn."""
    rng = random.Random(f"{seed}:{index}")
    maker = pick(rng, MAKERS)
    return maker(rng, "en" if rng.random() < 0.5 else "zh")


def documents(seed: int, count: int) -> Iterator[str]:
    """The first ``count`` documents of ``seed``."""
    for index in range(count):
        yield document(seed, index)
