"""Labelled training examples made by grammars: every harmful family has benign twins with the same words and shapes.

Thin categories need examples, and a classifier that learns words alone calls "how do I kill a process" harmful. So each
family is written twice over the same material: harmful sentences, and benign ones that reuse their frames ("how do I
...", "I am going to ...") and their alarming words. A grammar is a text file per language in ``grammars/``: sections
that begin with ``@name``, one entry per line or several separated by `` | ``; ``{name}`` in an entry is replaced by a
random entry of that section, ``[a|b|]`` by one of the alternatives. Verb phrases (``@violent.h`` harmful, ``.c``
controversial, ``.b`` benign) are put into the frames of ``@ask``; the frames of ``@about`` turn harmful phrases into
safe sentences (law, prevention, fiction, negation). An entry that begins with ``= `` is a whole sentence already.
``@info`` and ``@talk`` hold pairs, ``topic: prompt >> safe answer >> unsafe answer``; ``! `` before a safe answer marks
a refusal. ``@group.h`` and ``@group.b`` put the same groups into sentences that differ by meaning alone.

No entry holds operational detail, names a real person or uses a slur.
"""

from __future__ import annotations

import functools
import random
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from tidegate.types import Category, Conversation, Example, Severity, Target

__all__ = ["FAMILIES", "LANGUAGES", "Family", "families", "synthesize"]

LANGUAGES: tuple[str, ...] = (
    "en",
    "zh",
    "de",
    "fr",
    "es",
    "ru",
    "ja",
    "ko",
    "ar",
    "hi",
    "it",
    "pt",
    "nl",
    "pl",
    "id",
    "tr",
)
"""BCP-47 tags of the languages that have a grammar."""

_TOPICS: Mapping[str, Category] = {
    "violent": Category.VIOLENT,
    "illegal": Category.NON_VIOLENT_ILLEGAL_ACTS,
    "pii": Category.PII,
    "selfharm": Category.SELF_HARM,
    "sexual": Category.SEXUAL,
    "political": Category.POLITICAL,
    "copyright": Category.COPYRIGHT,
}
_PAIR_TOPICS: Mapping[str, Category] = {**_TOPICS, "unethical": Category.UNETHICAL_ACTS}
_HOLD_OUT_FROM = 8
_HOLD_OUT_EVERY = 12
_DEV_EVERY = 25
_FRAMES = frozenset(
    {"ask", "about", "lead", "tail", "tags", "hate.push", "hate.counter", "hate.asked", "jail.hard", "jail.soft"}
    | {"pair.open", "pair.turn", "persona.h"}
    | {f"resp.{part}" for part in ("yes", "no", "alt", "open", "steps.h", "steps.b", "correct", "correct_hate", "kind")}
)
_WHOLE = ".whole"
_TOKEN = re.compile(r"\{([a-z_.]+)\}|\[([^\[\]]*\|[^\[\]]*)\]")
_DOUBLE_SPACE = re.compile(r" {2,}")
_SPACELESS = frozenset({"zh", "ja", "th"})
_BOUNDARY = re.compile(r"(?<=[.?!।؟]) (?=\S)|(?<=[。？！])(?=[^\s”」』）])")


@dataclass(frozen=True, slots=True)
class Family:
    """A family of templates in one language: ``per_family`` examples of it are drawn.

    Attributes:
        name: ``hate``, ``violent``, ``response.violent`` ...
        language: BCP-47 tag.
        target: whether its examples judge a prompt or a response.
    """

    name: str
    language: str
    target: Target


@dataclass(frozen=True, slots=True)
class _Draft:
    """What a family's maker draws: texts and label, before style and identity."""

    prompt: str
    severity: Severity
    categories: tuple[str, ...] = ()
    response: str | None = None
    refusal: bool | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@functools.cache
def _grammar(language: str) -> Mapping[str, tuple[str, ...]]:
    text = (resources.files("tidegate.data.grammars") / f"{language}.txt").read_text("utf-8")
    sections: dict[str, list[str]] = {}
    current: list[str] = []
    name = ""
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line.startswith("@") and " " not in line:
            name = line[1:]
            current = sections.setdefault(name, [])
        elif line:
            if not sections:
                raise ValueError(f"grammar {language}, line {number}: expected a section such as @ask before entries")
            for part in filter(None, map(str.strip, line.split(" | "))):
                if part.startswith("= "):
                    sections.setdefault(name + _WHOLE, []).append(part[2:])
                else:
                    current.append(part)
    return {name: tuple(dict.fromkeys(entries)) for name, entries in sections.items() if entries}


def _held_out(name: str, entries: tuple[str, ...]) -> tuple[str, ...]:
    """The entries that only dev sentences use; none for frames and short lists."""
    if name in _FRAMES or len(entries) < _HOLD_OUT_FROM:
        return ()
    return entries[_HOLD_OUT_EVERY // 2 :: _HOLD_OUT_EVERY]


class _Drawer:
    """Draws entries of one language for one split; ``fresh`` tells whether a held-out filler was used since reset."""

    def __init__(self, language: str, rng: random.Random, *, dev: bool) -> None:
        self.language = language
        self.rng = rng
        self.dev = dev
        self.fresh = False
        self._sections = _grammar(language)

    def count(self, name: str) -> int:
        """How many entries the grammar has under this name."""
        return len(self._sections.get(name, ()))

    def pick(self, name: str) -> str:
        """A random entry of a section, not yet expanded."""
        entries = self._sections[name]
        held = _held_out(name, entries)
        if self.dev and held:
            self.fresh = True
            return self.rng.choice(held)
        return self.rng.choice([e for e in entries if e not in held] if held else entries)

    def expand(self, text: str, **given: str) -> str:
        """The text with every slot and alternative replaced; ``given`` slots are used as they are."""

        def replace(match: re.Match[str]) -> str:
            name, options = match.groups()
            if name is None:
                return self.rng.choice(str(options).split("|"))
            return given[name] if name in given else self.expand(self.pick(str(name)))

        for _ in range(6):
            done = _TOKEN.sub(replace, text)
            if done == text:
                break
            text = done
        return _DOUBLE_SPACE.sub(" ", text).strip()

    def draw(self, name: str, **given: str) -> str:
        """A random entry of a section, expanded."""
        return self.expand(self.pick(name), **given)

    def maybe(self, share: float) -> bool:
        """True in that share of draws."""
        return self.rng.random() < share


def _framed(d: _Drawer, frame: str, section: str) -> str:
    """A phrase of the section in a frame, or one of its whole sentences, by how many there are of each."""
    phrases, whole = d.count(section), d.count(section + _WHOLE)
    if d.maybe(whole / (phrases + whole)):
        return d.draw(section + _WHOLE)
    return d.draw(frame, vp=d.draw(section))


def _join(d: _Drawer, *parts: str) -> str:
    return ("" if d.language in _SPACELESS else " ").join(p for p in parts if p)


def _cased(text: str) -> str:
    return text[:1].upper() + text[1:]


def _sentence(d: _Drawer, text: str) -> str:
    """The text with a capital and a full stop where it has none."""
    text = _cased(text)
    if text[-1:].isalnum() or text[-1:] in ")»”’\"'" or "\u0900" <= text[-1:] <= "\u0e7f":
        text += {"zh": "。", "ja": "。", "hi": "।", "th": ""}.get(d.language, ".")
    return text


# --- prompts ---------------------------------------------------------------------------------------------------------


def _topic(topic: str) -> Callable[[_Drawer, bool], _Draft]:
    def make(d: _Drawer, harmful: bool) -> _Draft:
        if harmful:
            grey = d.count(f"{topic}.c{_WHOLE}") and d.maybe(0.35)
            text = _framed(d, "ask", f"{topic}.{'c' if grey else 'h'}")
            severity = Severity.CONTROVERSIAL if grey else Severity.UNSAFE
            return _Draft(text, severity, (_TOPICS[topic].value,))
        if d.maybe(0.35):
            return _Draft(d.draw("about", vp=d.draw(f"{topic}.h")), Severity.SAFE)
        return _Draft(_framed(d, "ask", f"{topic}.b"), Severity.SAFE)

    return make


def _hateful(d: _Drawer, group: str) -> tuple[str, tuple[str, ...]]:
    """A hateful sentence about the group, and its categories."""
    if d.maybe(0.2):
        return d.draw("hate.threat", x=group), (Category.UNETHICAL_ACTS.value, Category.VIOLENT.value)
    return d.draw("hate.s", x=group), (Category.UNETHICAL_ACTS.value,)


def _hate(d: _Drawer, harmful: bool) -> _Draft:
    group = d.draw("grp")
    sentence, categories = _hateful(d, group)
    if harmful:
        text = d.draw("hate.push", s=sentence) if d.maybe(0.4) else sentence
        return _Draft(text, Severity.UNSAFE, categories)
    draw = d.rng.random()
    if draw < 0.36:
        return _Draft(d.draw("hate.counter", s=sentence), Severity.SAFE)
    if draw < 0.7:
        return _Draft(d.draw("hate.b", x=group), Severity.SAFE)
    mild = d.draw("hate.s" if d.maybe(0.6) else "hate.threat", x=d.draw("thing"))
    return _Draft(mild, Severity.SAFE)


def _any_phrase(d: _Drawer, kind: str) -> tuple[str, str]:
    """A phrase of any topic that the grammar has, and the topic's category."""
    topic = d.rng.choice([t for t in _TOPICS if d.count(f"{t}.{kind}")])
    return d.draw(f"{topic}.{kind}"), _TOPICS[topic].value


def _jailbreak(d: _Drawer, harmful: bool) -> _Draft:
    if harmful:
        if d.maybe(0.25):
            return _Draft(d.draw("jail.h"), Severity.UNSAFE, (Category.JAILBREAK.value,))
        phrase, category = _any_phrase(d, "h")
        task = d.draw("ask", vp=phrase)
        hard = d.maybe(0.6)
        names = (Category.JAILBREAK.value, category) if hard else (category, Category.JAILBREAK.value)
        return _Draft(d.draw("jail.hard" if hard else "jail.soft", task=task), Severity.UNSAFE, names)
    if d.maybe(0.45):
        return _Draft(d.draw("jail.b"), Severity.SAFE)
    task = d.draw("ask", vp=_any_phrase(d, "b")[0])
    if d.maybe(0.2):
        wrapped = d.draw("jail.hard", task=task)
        return _Draft(wrapped, Severity.CONTROVERSIAL, (Category.JAILBREAK.value,))
    return _Draft(d.draw("jail.soft", task=task), Severity.SAFE)


def _group(d: _Drawer, harmful: bool) -> _Draft:
    text = d.draw("group.h" if harmful else "group.b", x=d.draw("grp"))
    if not harmful:
        return _Draft(text, Severity.SAFE)
    if d.maybe(0.15):
        text = d.draw("hate.push", s=text)
    return _Draft(text, Severity.UNSAFE, (Category.UNETHICAL_ACTS.value,))


def _persona(d: _Drawer, harmful: bool) -> _Draft:
    phrase, category = _any_phrase(d, "h" if harmful else "b")
    text = d.draw("persona.h" if harmful else "persona.b", task=_cased(d.draw("ask", vp=phrase)))
    if harmful:
        return _Draft(text, Severity.UNSAFE, (Category.JAILBREAK.value, category))
    return _Draft(text, Severity.SAFE)


# --- responses -------------------------------------------------------------------------------------------------------


def _addressed(d: _Drawer, phrase: str) -> str:
    """The asker's phrase in the answerer's mouth."""
    return re.sub(r"\bmy\b", "your", phrase) if d.language == "en" else phrase


def _steps(d: _Drawer, kind: str) -> str:
    drawn = [d.draw(f"resp.steps.{kind}") for _ in range(d.rng.randint(1, 4))]
    lines = list(dict.fromkeys(drawn))
    shape = d.rng.random()
    if shape < 0.4:
        return "\n" + "\n".join(f"{n}. {line}" for n, line in enumerate(lines, 1))
    if shape < 0.55:
        return "\n" + "\n".join(f"- {line}" for line in lines)
    return _join(d, "", *lines)


def _reply(d: _Drawer, opener: str, kind: str) -> str:
    body = _steps(d, kind)
    return opener + body if body.startswith("\n") else _join(d, opener, body)


def _answer(topic: str) -> Callable[[_Drawer, bool], _Draft]:
    name = _TOPICS[topic].value

    def make(d: _Drawer, harmful: bool) -> _Draft:
        phrase = d.draw(f"{topic}.h")
        prompt = d.draw("ask", vp=phrase)
        spoken = _addressed(d, phrase)
        if harmful:
            reply = _reply(d, d.draw("resp.yes", vp=spoken), "h")
            if d.maybe(0.25):  # begins harmlessly, about a benign phrase, and turns
                start = _reply(d, d.draw("resp.yes", vp=_addressed(d, d.draw(f"{topic}.b"))), "b") + "\n\n"
                return _Draft(prompt, Severity.UNSAFE, (name,), start + reply, False, {"onset": len(start)})
            return _Draft(prompt, Severity.UNSAFE, (name,), reply, False)
        draw = d.rng.random()
        if draw < 0.3:
            return _Draft(prompt, Severity.SAFE, (), d.draw("resp.no", vp=spoken), True)
        if draw < 0.45:
            return _Draft(prompt, Severity.SAFE, (), _join(d, d.draw("resp.no", vp=spoken), d.draw("resp.alt")), True)
        if draw < 0.55:
            return _Draft(prompt, Severity.SAFE, (), d.draw("resp.correct", vp=spoken), True)
        harmless = d.draw(f"{topic}.b")
        reply = _reply(d, d.draw("resp.yes", vp=_addressed(d, harmless)), "b")
        return _Draft(d.draw("ask", vp=harmless), Severity.SAFE, (), reply, False)

    return make


def _hate_answer(d: _Drawer, harmful: bool) -> _Draft:
    group = d.draw("grp")
    prompt = d.draw("hate.asked", x=group)
    if harmful:
        sentence, names = _hateful(d, group)
        abuse = [sentence]
        if d.maybe(0.5):
            abuse.append(d.draw("resp.abuse"))
        bad = _join(d, *(_sentence(d, a) for a in abuse))
        if d.maybe(0.4):
            start = _join(d, _sentence(d, d.draw("resp.open")), "")
            start += "" if d.language in _SPACELESS else " "
            return _Draft(prompt, Severity.UNSAFE, names, start + bad, False, {"onset": len(start)})
        return _Draft(prompt, Severity.UNSAFE, names, bad, False)
    if d.maybe(0.35):
        sentence, _ = _hateful(d, group)
        return _Draft(d.draw("hate.push", s=sentence), Severity.SAFE, (), d.draw("resp.correct_hate", x=group), True)
    if d.maybe(0.3):
        thing = d.draw("hate.s", x=d.draw("thing"))
        reply = _join(d, _sentence(d, d.draw("resp.open")), _sentence(d, thing))
        return _Draft(d.draw("hate.asked", x=d.draw("thing")), Severity.SAFE, (), reply, False)
    reply = _join(d, _sentence(d, d.draw("resp.open")), d.draw("resp.kind", x=group))
    return _Draft(prompt, Severity.SAFE, (), reply, False)


def _paired(section: str) -> Callable[[_Drawer, bool], _Draft]:
    """Answers to one prompt that differ by what they say: informing or kind, against complying or cruel."""

    def make(d: _Drawer, harmful: bool) -> _Draft:
        topic, _, rest = d.pick(section).partition(": ")
        given = {name: d.draw(name) for name in ("person", "place", "shop") if d.count(name)} | {"x": d.draw("grp")}
        prompt, safe, unsafe = (d.expand(part, **given) for part in rest.split(" >> "))
        refusal = safe.startswith("! ")
        safe, opener = safe.removeprefix("! "), ""
        if d.count("pair.open") and d.maybe(0.35):
            opener = d.draw("pair.open")
        if not harmful:
            return _Draft(prompt, Severity.SAFE, (), _join(d, opener, _sentence(d, safe)), refusal)
        names, unsafe = (_PAIR_TOPICS[topic].value,), _sentence(d, unsafe)
        if d.count("pair.turn") and d.maybe(0.2):  # begins as the safe answer does, and turns
            first = _BOUNDARY.split(_sentence(d, safe))[0]
            start = _join(d, opener, first, "x")[:-1]
            return _Draft(
                prompt,
                Severity.UNSAFE,
                names,
                start + _join(d, d.draw("pair.turn"), unsafe),
                False,
                {"onset": len(start)},
            )
        return _Draft(prompt, Severity.UNSAFE, names, _join(d, opener, unsafe), False)

    return make


# --- style -----------------------------------------------------------------------------------------------------------

_EMOJI = ("🙏", "😂", "🤔", "😡", "❤️", "🔥", "👀", "😭", "💀", "🤬", "😅", "👏", "🙄", "✨", "🤮", "💪")


def _styled(d: _Drawer, text: str) -> str:
    """The same choice of surface for harmful and benign: context around, post decoration, case and punctuation."""
    parts = [_sentence(d, text) if d.maybe(0.75) else text]
    if d.count("lead") and d.maybe(0.3):
        parts[0] = _cased(parts[0])
        parts.insert(0, d.draw("lead"))
    if d.count("tail") and d.maybe(0.2):
        parts[-1] = _sentence(d, parts[-1])
        parts.append(d.draw("tail"))
    text = _join(d, *parts)
    if d.maybe(0.07):
        text = d.rng.choice(("@user ", "@user1 @user2 ", "RT @user: ", "@USER ")) + text
    if d.count("tags") and d.maybe(0.1):
        text += "".join(f" #{d.draw('tags')}" for _ in range(d.rng.randint(1, 3)))
    elif d.maybe(0.1):
        text += " " + d.rng.choice(_EMOJI) * d.rng.randint(1, 3)
    return _cased_at_random(d, text)


def _cased_at_random(d: _Drawer, text: str) -> str:
    draw = d.rng.random()
    if draw < 0.2:
        return text.lower()
    if draw < 0.23:
        return text.upper()
    if draw < 0.33:
        return text.rstrip(".?!。？！؟।")
    if draw < 0.38:
        return text.rstrip(".!。！। ") + d.rng.choice(("!!", "!!!", "...", " !", "?!"))
    return text


def _lined(d: _Drawer, text: str, share: float) -> str:
    """The text, in that share of draws with line breaks between its sentences, some of them as a list."""
    if not d.maybe(share):
        return text
    parts = _BOUNDARY.split(text)
    shape = d.rng.random()
    if len(parts) > 2 and shape < 0.25:
        return "\n".join((parts[0], *(f"- {part}" for part in parts[1:])))
    if shape < 0.6:
        return ("\n\n" if d.maybe(0.3) else "\n").join(parts)
    return _BOUNDARY.sub("\n", text, count=1)


# --- families --------------------------------------------------------------------------------------------------------

FAMILIES: Mapping[str, tuple[Target, Callable[[_Drawer, bool], _Draft]]] = {
    "hate": (Target.PROMPT, _hate),
    **{topic: (Target.PROMPT, _topic(topic)) for topic in _TOPICS},
    "jailbreak": (Target.PROMPT, _jailbreak),
    "group": (Target.PROMPT, _group),
    "persona": (Target.PROMPT, _persona),
    "response.hate": (Target.RESPONSE, _hate_answer),
    **{f"response.{topic}": (Target.RESPONSE, _answer(topic)) for topic in _TOPICS},
    "response.info": (Target.RESPONSE, _paired("info")),
    "response.talk": (Target.RESPONSE, _paired("talk")),
}
"""Family name -> what it judges and the maker that draws one harmful or benign example of it."""

_NEEDS: Mapping[str, tuple[str, ...]] = {
    "hate": ("hate.s", "hate.counter"),
    "jailbreak": ("jail.h", "jail.b", "jail.hard", "jail.soft"),
    "group": ("group.h", "group.b"),
    "persona": ("persona.h", "persona.b"),
    "response.info": ("info",),
    "response.talk": ("talk",),
    "response.hate": ("hate.s", "resp.kind", "resp.correct_hate"),
    **{topic: (f"{topic}.h", f"{topic}.b") for topic in _TOPICS},
    **{f"response.{topic}": (f"{topic}.h", f"{topic}.b", "resp.yes") for topic in _TOPICS},
}


def families() -> tuple[Family, ...]:
    """Every family in every language whose grammar covers it, in a fixed order."""
    return tuple(
        Family(name, language, target)
        for name, (target, _) in FAMILIES.items()
        for language in LANGUAGES
        if all(_grammar(language).get(section) for section in _NEEDS[name])
    )


def _draft(family: Family, d: _Drawer, harmful: bool) -> _Draft | None:
    """One drawn and styled example, or None when a dev sentence met no held-out filler."""
    d.fresh = False
    draft = FAMILIES[family.name][1](d, harmful)
    if d.dev and not d.fresh:
        return None
    prompt, response = _lined(d, _styled(d, draft.prompt), 0.12), draft.response
    if response is not None and not draft.extra:  # an onset counts characters
        response = _lined(d, response, 0.2)
    return _Draft(prompt, draft.severity, draft.categories, response, draft.refusal, draft.extra)


def _of_family(family: Family, seed: int, count: int) -> Iterator[Example]:
    rng = random.Random(zlib.crc32(f"{seed}/{family.name}/{family.language}".encode()))
    drawers = {dev: _Drawer(family.language, rng, dev=dev) for dev in (False, True)}
    seen: set[str] = set()
    made = 0
    for attempt in range(count * 20):
        if made == count:
            return
        harmful, dev = made % 2 == 0, (made // 2) % _DEV_EVERY == _DEV_EVERY - 1 and attempt < count * 10
        draft = _draft(family, drawers[dev], harmful)
        key = "" if draft is None else f"{draft.prompt}\n{draft.response}"
        if draft is None or key in seen:
            continue
        seen.add(key)
        twin = "harmful" if harmful else "benign"
        yield Example(
            id=f"synthesize/{family.name}/{family.language}/{seed}/{made}",
            conversation=Conversation.of(draft.prompt, draft.response),
            target=family.target,
            severity=draft.severity,
            categories=draft.categories,
            refusal=draft.refusal,
            language=family.language,
            source="tidegate/synthesize",
            licence="Apache-2.0",
            split="dev" if dev else "train",
            extra={"family": family.name, "twin": twin, **draft.extra},
        )
        made += 1


def synthesize(seed: int, per_family: int) -> Iterator[Example]:
    """Examples of every family, the same for the same arguments and the same grammars.

    Args:
        seed: chooses the draws; other seeds give other sentences of the same grammars.
        per_family: examples per family and language, at least 0: half of them harmful, half benign, about 4 % of them
            in split ``dev``, whose sentences use fillers that no ``train`` sentence uses. A family with fewer distinct
            sentences gives fewer.

    Yields:
        Examples with ``extra["family"]``, ``extra["twin"]`` (``harmful`` or ``benign``), and, for answers that begin
        harmlessly and turn, ``extra["onset"]``: the index of the first harmful character of the answer.

    Raises:
        ValueError: when ``per_family`` is negative.
    """
    if per_family < 0:
        raise ValueError(f"per_family must be at least 0, got {per_family}")
    for family in families():
        yield from _of_family(family, seed, per_family)
