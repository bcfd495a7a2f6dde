"""The items of the skills: number pairs, sequences, rewritings and little scenes.

Everything here takes ``held_out``: True draws only items that ``split.is_held_out`` keeps from the
corpus and the training rows, False only the others.
"""

import functools
import itertools
import random
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from tunewright.data.builtin.split import is_held_out

Item = TypeVar("Item")
Pairs = tuple[tuple[int, int], ...]

TOP_NUMBER = 99
TOP_OPERAND = 9
TOP_TERM = 100
TOP_STEP = 5
TERMS = 6


def _split(words: str) -> list[str]:
    return words.split()


WORDS = {
    "en": _split(
        "sun moon star cat dog bird fish tree leaf rose king queen boat ship car bus ball kite "
        "book pen cup bowl door wall road hill lake sand snow rain wind fire gold iron milk tea "
        "rice cake red blue green white black pink one two five ten"
    ),
    "zh": _split(
        "太阳 月亮 星星 猫 狗 鸟 鱼 树 花 草 国王 公主 小船 汽车 火车 球 风筝 书 笔 杯子 碗 门 墙 "
        "路 山 湖 河 沙子 雪 雨 风 火 金 铁 牛奶 茶 米饭 蛋糕 红 蓝 绿 白 黑 一 二 五 十 苹果"
    ),
}
ANIMALS = {
    "en": _split(
        "cat dog fox bear horse cow pig sheep duck hen goat lion tiger rabbit mouse bird frog monkey wolf owl"
    ),
    "zh": _split("猫 狗 马 牛 羊 鸡 鸭 兔子 老虎 狮子 猴子 大象 小鸟 狐狸 熊 狼 老鼠 青蛙 松鼠 鹿"),
}
QUALITIES = {
    "en": _split("red blue green white black big small young happy quiet"),
    "zh": _split("红色的 白色的 黑色的 小小的 可爱的 年轻的 聪明的 勇敢的 安静的 快乐的"),
}
ACTIONS = {
    "en": (
        "ran home",
        "sat by the door",
        "slept under the tree",
        "jumped over the stone",
        "drank some water",
        "walked to the lake",
        "looked at the moon",
        "went into the house",
        "played in the snow",
        "sang a song",
        "came back late",
        "lived on the hill",
    ),
    "zh": (
        "在睡觉",
        "在跑步",
        "在吃东西",
        "跑回家了",
        "在河边喝水",
        "在树下休息",
        "去了森林",
        "在唱歌",
        "在看月亮",
        "坐在门口",
        "跳过了石头",
        "走进了院子",
    ),
}
NAMES = {
    "en": _split("Tom Lily Ben Anna Jack Mia Sam Emma Max Lucy Leo Kate Dan Rose Tim Amy"),
    "zh": _split("小明 小红 小刚 小丽 小华 小军 小芳 小亮 小美 小强 小云 小雨 小东 小林"),
}
COLOURS = {
    "en": _split("red blue green yellow white black pink brown"),
    "zh": _split("红色的 蓝色的 绿色的 黄色的 白色的 黑色的 粉色的 紫色的"),
}
# A thing is the words before the colour and the word after it, for Chinese counts by measure words.
THINGS = {
    "en": [
        ("a", noun) for noun in _split("ball kite hat cup book box bag car boat bell doll drum flag lamp")
    ],
    "zh": [
        ("一个", "球"),
        ("一只", "风筝"),
        ("一顶", "帽子"),
        ("一个", "杯子"),
        ("一本", "书"),
        ("一个", "盒子"),
        ("一个", "书包"),
        ("一辆", "小车"),
        ("一艘", "小船"),
        ("一个", "铃铛"),
        ("一个", "布娃娃"),
        ("一面", "鼓"),
        ("一面", "旗子"),
        ("一盏", "灯"),
    ],
}
PLACES = {
    "en": (
        "in the park",
        "in the garden",
        "in the kitchen",
        "in the library",
        "in the forest",
        "in the house",
        "at the school",
        "at the beach",
        "at the market",
        "at the farm",
        "by the river",
        "on the bridge",
    ),
    "zh": (
        "公园里",
        "花园里",
        "厨房里",
        "图书馆里",
        "森林里",
        "学校里",
        "市场里",
        "农场里",
        "海边",
        "河边",
        "桥上",
        "家里",
    ),
}


def pick(rng: random.Random, items: tuple[Item, ...] | list[Item]) -> Item:
    """One item; like ``rng.choice``, in a fraction of its time."""
    return items[int(rng.random() * len(items))]


# Numbers ------------------------------------------------------------


def addition_key(a: int, b: int) -> str:
    """One key for a+b and b+a, else each would give the other away."""
    return f"add:{min(a, b)}:{max(a, b)}"


@functools.cache
def additions(held_out: bool) -> Pairs:
    """Operands (a, b) with b of one digit and a sum of at most 99."""
    pairs = ((a, b) for a in range(TOP_NUMBER + 1) for b in range(TOP_OPERAND + 1) if a + b <= TOP_NUMBER)
    return tuple(pair for pair in pairs if is_held_out(addition_key(*pair)) == held_out)


@functools.cache
def subtractions(held_out: bool) -> Pairs:
    """Operands (a, b) with b of one digit and b <= a <= 99."""
    pairs = ((a, b) for a in range(TOP_NUMBER + 1) for b in range(TOP_OPERAND + 1) if b <= a)
    return tuple((a, b) for a, b in pairs if is_held_out(f"sub:{a}:{b}") == held_out)


@functools.cache
def sequences(held_out: bool) -> Pairs:
    """(start, step) of six terms within 0 to 100; the step is 1 to 5, or as much below 0."""
    reach = TERMS - 1
    rising = ((a, s) for s in range(1, TOP_STEP + 1) for a in range(TOP_TERM - reach * s + 1))
    falling = ((a, -s) for s in range(1, TOP_STEP + 1) for a in range(reach * s, TOP_TERM + 1))
    every = itertools.chain(rising, falling)
    return tuple((a, s) for a, s in every if is_held_out(f"seq:{a}:{s}") == held_out)


def terms(start: int, step: int) -> list[str]:
    """The six terms as text."""
    return [str(start + step * index) for index in range(TERMS)]


# Rewriting ------------------------------------------------------------


class Rewrite(NamedTuple):
    """``source`` becomes ``result``; ``old`` and ``new`` are set where ``kind`` is "replace"."""

    kind: str
    source: str
    result: str
    old: str = ""
    new: str = ""


@functools.cache
def _swaps(lang: str, table: str, held_out: bool) -> tuple[tuple[str, str], ...]:
    words = ANIMALS[lang] if table == "animals" else QUALITIES[lang]
    pairs = itertools.permutations(words, 2)
    return tuple(pair for pair in pairs if is_held_out("replace:" + ":".join(pair)) == held_out)


def _sentence(lang: str, quality: str, animal: str, action: str) -> str:
    if lang == "en":
        return f"The {quality} {animal} {action}."
    return f"{quality}{animal}{action}。"


def _replace(rng: random.Random, lang: str, held_out: bool) -> Rewrite:
    action = pick(rng, ACTIONS[lang])
    if rng.random() < 0.6:
        quality = pick(rng, QUALITIES[lang])
        old, new = pick(rng, _swaps(lang, "animals", held_out))
        before = _sentence(lang, quality, old, action)
        return Rewrite("replace", before, _sentence(lang, quality, new, action), old, new)
    animal = pick(rng, ANIMALS[lang])
    old, new = pick(rng, _swaps(lang, "qualities", held_out))
    before = _sentence(lang, old, animal, action)
    return Rewrite("replace", before, _sentence(lang, new, animal, action), old, new)


def order_key(kind: str, words: list[str]) -> str:
    """The key of a list of words; a list and its reverse share one, as each shows the other."""
    return f"{kind}:" + ":".join(min(words, words[::-1]))


def _draw_words(rng: random.Random, lang: str, kind: str, held_out: bool) -> list[str]:
    count = 3 if rng.random() < 0.7 else 4
    while True:
        words = [pick(rng, WORDS[lang]) for _ in range(count)]
        if len(set(words)) == count and is_held_out(order_key(kind, words)) == held_out:
            return words


def _reorder(rng: random.Random, lang: str, kind: str, held_out: bool) -> Rewrite:
    words = _draw_words(rng, lang, kind, held_out)
    space = " " if lang == "en" else "、"
    if kind == "join":
        comma, link = (", ", "-") if lang == "en" else ("、", "")
        return Rewrite(kind, comma.join(words), link.join(words))
    result = words[::-1] if kind == "reverse" else words[1:]
    return Rewrite(kind, space.join(words), space.join(result))


def rewrite(rng: random.Random, lang: str, held_out: bool) -> Rewrite:
    """One rewriting: a replaced word, a reversed list, a dropped first word or joined words."""
    draw = rng.random()
    if draw < 0.4:
        return _replace(rng, lang, held_out)
    kind = "reverse" if draw < 0.7 else "drop" if draw < 0.86 else "join"
    return _reorder(rng, lang, kind, held_out)


# Scenes ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Child:
    """A child in a story and what it holds.

    "Tom" has "a red ball" (``thing``), which is "the red ball" (``named``) from then on, a "ball"
    (``noun``); ``places`` is where it may be.
    """

    name: str
    thing: str
    named: str
    noun: str
    places: tuple[str, ...]


@functools.cache
def _places(lang: str, name: str, held_out: bool) -> tuple[str, ...]:
    keep = (place for place in PLACES[lang] if is_held_out(f"place:{name}:{place}") == held_out)
    return tuple(keep)


def _child(lang: str, name: str, colour: str, thing: tuple[str, str], held_out: bool) -> Child:
    article, noun = thing
    space = " " if lang == "en" else ""
    owned = space.join((article, colour, noun))
    named = space.join(("the", colour, noun)) if lang == "en" else colour + noun
    return Child(name, owned, named, noun, _places(lang, name, held_out))


@functools.cache
def children(lang: str, held_out: bool) -> tuple[Child, ...]:
    """Every child with every thing it may hold and the places where it may be."""
    combos = itertools.product(NAMES[lang], COLOURS[lang], THINGS[lang])
    return tuple(
        _child(lang, name, colour, thing, held_out)
        for name, colour, thing in combos
        if is_held_out(f"story:{name}:{colour}:{thing[1]}") == held_out and _places(lang, name, held_out)
    )


Scene = list[tuple[Child, str]]


def scene(rng: random.Random, lang: str, held_out: bool, size: int) -> Scene:
    """``size`` children with their places; no name, thing or place comes up twice."""
    every = children(lang, held_out)
    found: Scene = []
    taken: set[str] = set()
    while len(found) < size:
        child = pick(rng, every)
        place = pick(rng, child.places)
        marks = {child.name, child.noun, place}
        if taken.isdisjoint(marks):
            taken |= marks
            found.append((child, place))
    return found


TELLING = {
    ("have", "en"): "{name} has {thing}.",
    ("place", "en"): "{name} is {place}.",
    ("both", "en"): "{name} is {place} with {thing}.",
    ("have", "zh"): "{name}有{thing}。",
    ("place", "zh"): "{name}在{place}。",
    ("both", "zh"): "{name}在{place}，手里有{thing}。",
}


def tell(style: str, lang: str, told: Scene) -> str:
    """One sentence per child; ``style`` is have, place or both."""
    form = TELLING[style, lang]
    told_each = (form.format(name=c.name, thing=c.thing, place=place) for c, place in told)
    return (" " if lang == "en" else "").join(told_each)
