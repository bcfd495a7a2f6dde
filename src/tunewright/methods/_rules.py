"""Rules that choose an adapter by what a prompt says, as token ids: once compiled they need no tokenizer.

Shapes: B rows, T positions, V words of the vocabulary, M and N patterns, L tokens of the longest.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tunewright.core.errors import Problem, RecipeError
from tunewright.data.rows import Message
from tunewright.data.template import ChatCodec

SCRIPTS = {
    "script:han": re.compile(r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003134f]"),
    "script:latin": re.compile(r"[A-Za-z\u00c0-\u024f]"),
}
"""A prompt is of the script that most of its tokens are written in."""
_ANY, _NONE = -1, -2
"""What stands for any token in a pattern, and for what is no token of the prompt."""


class Rules(nn.Module):
    """For each adapter the words and scripts that ask for it, and how an answer begins.

    ``opening`` [L] are the tokens that the template puts before an answer; for each adapter, ``single_NAME`` [M]
    are tokens that hold one of its words and ``several_NAME`` [N, L] words of many tokens, filled up with -1;
    ``script`` [V] is 1 for Chinese characters, 2 for Latin letters, 0 for others and the template's own.
    """

    def __init__(self, rules: Mapping[str, tuple[str, ...]], like: Tensor) -> None:
        super().__init__()
        self.rules = dict(rules)
        none: Any = {"dtype": torch.int64, "device": like.device}
        self.register_buffer("opening", torch.empty(0, **none))
        for name in self.rules:
            self.register_buffer(f"single_{name}", torch.empty(0, **none))
            self.register_buffer(f"several_{name}", torch.empty(0, 0, **none))
        if any(word in SCRIPTS for words in self.rules.values() for word in words):
            self.register_buffer("script", like.new_zeros(len(like), dtype=torch.uint8))

    def compile(self, codec: ChatCodec) -> None:
        """Find the tokens. RecipeError for words that every prompt holds, or that the tokenizer cannot write."""
        frame = codec.prompt((Message("user", ""),)) if codec.has_template else []
        self._set("opening", _opening(codec))
        words = {name: [w for w in words if w not in SCRIPTS] for name, words in self.rules.items()}
        texts = _texts(codec.tokenizer) if self.rules else {}
        problems: list[Problem] = []
        for name, wanted in words.items():
            single, several = _patterns(codec.tokenizer, texts, wanted)
            self._set(f"single_{name}", sorted(single))
            longest = max(map(len, several), default=0)
            self._set(f"several_{name}", [[*s, *[_ANY] * (longest - len(s))] for s in sorted(several)])
            problems += _useless(codec.tokenizer, texts, wanted, frame, name)
        if problems:
            raise RecipeError(problems)
        if hasattr(self, "script"):
            self._set_scripts(texts, frame)

    def _set(self, name: str, ids: list[Any]) -> None:
        old = self.get_buffer(name)
        found = torch.tensor(ids, dtype=old.dtype, device=old.device)
        setattr(self, name, found if found.ndim == old.ndim else found.reshape(old.shape))

    def _set_scripts(self, texts: Mapping[int, str], frame: Iterable[int]) -> None:
        kinds = [0] * len(self.get_buffer("script"))
        own = {token: text for token, text in texts.items() if token not in set(frame)}
        for token, text in own.items():
            kinds[token] = next((n for n, s in enumerate(SCRIPTS.values(), 1) if s.search(text)), 0)
        self._set("script", kinds)

    def first_question(self, ids_BT: Tensor, real_BT: Tensor) -> Tensor:
        """True [B, T] for what comes before the first answer of a conversation, the answer's opening included."""
        opening = self.get_buffer("opening")
        if not len(opening):
            return real_BT
        begun_BT = _starts(ids_BT.where(real_BT, _NONE), opening).cumsum(1) > 0
        before_BT = ~begun_BT.roll(len(opening), 1)
        before_BT[:, : len(opening)] = True
        return real_BT & before_BT

    def match(self, name: str, ids_BT: Tensor, prompt_BT: Tensor) -> Tensor:
        """True [B] for prompts that ask for this adapter."""
        ids_BT = ids_BT.where(prompt_BT, _NONE)
        found_BT = torch.isin(ids_BT, self.get_buffer(f"single_{name}"))
        for pattern_L in self.get_buffer(f"several_{name}"):
            found_BT |= _starts(ids_BT, pattern_L)
        found_B = found_BT.any(1)
        for kind, script in enumerate(SCRIPTS, 1):
            if script in self.rules[name]:
                found_B |= self._script(ids_BT, prompt_BT) == kind
        return found_B

    def _script(self, ids_BT: Tensor, prompt_BT: Tensor) -> Tensor:
        """The script [B] of most tokens; 0 where none has any."""
        kinds_BT = self.get_buffer("script")[ids_BT.clamp(min=0)].where(prompt_BT, 0)
        counts_BS = torch.stack([(kinds_BT == n).sum(1) for n in range(1, len(SCRIPTS) + 1)], dim=1)
        return (counts_BS.argmax(1) + 1).where(counts_BS.any(1), 0)

    def wrong(self, header: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """What is wrong with saved rules, told from their header."""
        own = dict(self.named_buffers())
        if set(header) != set(own):
            return [f"holds the rules {sorted(header)[:5]}, expected {sorted(own)[:5]}"]
        bad = [
            n
            for n, b in own.items()
            if len(header[n]["shape"]) != b.ndim or header[n]["dtype"] != _DTYPES[b.dtype]
        ]
        if "script" in own and header["script"]["shape"] != list(own["script"].shape):
            bad.append("script")
        return [f"{name} is not shaped as a rule is" for name in bad]

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Put saved rules back."""
        for name, tensor in tensors.items():
            setattr(self, name, tensor.to(self.get_buffer(name).device))


_DTYPES = {torch.int64: "I64", torch.uint8: "U8"}


def _starts(ids_BT: Tensor, pattern_L: Tensor) -> Tensor:
    """True [B, T] where the pattern begins."""
    hit_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    for i, token in enumerate(pattern_L):
        at_BT = torch.full_like(ids_BT, _NONE)
        at_BT[:, : max(0, ids_BT.shape[1] - i)] = ids_BT[:, i:]
        hit_BT &= (at_BT == token) | (token == _ANY)
    return hit_BT


def _opening(codec: ChatCodec) -> list[int]:
    """What the template puts before an answer, if it stands by itself among a prompt's tokens."""
    if not codec.has_template:
        return []
    asked = (Message("user", "a"),)
    without, whole = codec.render(asked), codec.render(asked, prompt=True)
    added = whole[len(without) :] if whole.startswith(without) else ""
    ids = list(codec.tokenizer(added, add_special_tokens=False)["input_ids"])
    return ids if ids and codec.prompt(asked)[-len(ids) :] == ids else []


def _texts(tokenizer: Any) -> dict[int, str]:
    """What each token of the vocabulary says by itself; markers say nothing."""
    ids = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder))
    return dict(zip(ids, tokenizer.batch_decode([[i] for i in ids]), strict=True))


def _patterns(
    tokenizer: Any, texts: Mapping[int, str], words: Iterable[str]
) -> tuple[set[int], set[tuple[int, ...]]]:
    """Tokens that hold one of the words, and the words of several tokens, however they are capitalised."""
    single: set[int] = set()
    several: set[tuple[int, ...]] = set()
    for word in words:
        whole = re.compile(rf"(?<![a-z]){re.escape(word.lower())}(?![a-z])")
        single |= {token for token, text in texts.items() if whole.search(text.lower())}
        forms = {word, word.lower(), word.upper(), word.capitalize()}
        encoded = tokenizer([f"{gap}{form}" for form in forms for gap in ("", " ")], add_special_tokens=False)
        several |= {tuple(ids) for ids in encoded["input_ids"] if len(ids) > 1}
    unknown = tokenizer.unk_token_id
    return single, {ids for ids in several if unknown not in ids}


def _useless(
    tokenizer: Any, texts: Mapping[int, str], words: Iterable[str], frame: list[int], name: str
) -> list[Problem]:
    """Words that decide nothing."""
    where, found = f"method.rules.{name}", []
    for word in words:
        single, several = _patterns(tokenizer, texts, [word])
        if not single and not several:
            found.append(Problem(where, f"the tokenizer has no tokens for {word!r}", "choose another word"))
        runs = {tuple(frame[i : i + len(ids)]) for ids in several for i in range(len(frame))}
        if single & set(frame) or several & runs:
            what = f"the chat template puts {word!r} into every prompt"
            found.append(Problem(where, what, "choose another word"))
    return found
