"""Seeded traces of requests, for what a policy does on more than one kind of traffic.

A prompt is the texts that it consists of. Only whole blocks are asked for, and a block's key stands for all text before it, as
vLLM's do: prompts that begin alike share a prefix, and nothing else. Lengths are lognormal, given by their median. None of it was
measured on a service: the kinds are what users say they send, the figures are guesses. A trace is what a
server gets from its start on for an hour or so; what would come later is left out.
"""

from collections.abc import Callable, Iterator
from hashlib import blake2b
from itertools import accumulate
from random import Random
from typing import NamedTuple

from kvoffload.cli.traces import Trace
from kvoffload.types import BlockKey

LONG, SHORT = 512, 16  # tokens in a block
HOUR = 3600.0


class Text(NamedTuple):
    name: str  # two texts of one name are the same
    tokens: int


class Prompt(NamedTuple):
    second: float
    texts: tuple[Text, ...]
    answer: int = 0  # tokens; 0: not said


def keys_of(texts: tuple[Text, ...], block_tokens: int) -> list[BlockKey]:
    """Of the whole blocks."""
    before = blake2b(digest_size=16)
    keys, room = [], block_tokens
    for text in texts:
        begin = 0
        while begin < text.tokens:
            taken = min(room, text.tokens - begin)
            before.update(f"{text.name}:{begin}+{taken};".encode())
            begin += taken
            room -= taken
            if not room:
                keys.append(before.digest())
                room = block_tokens
    return keys


def trace_of(prompts: list[Prompt], block_tokens: int = LONG) -> Trace:
    """In the order in which they come; those shorter than a block are left out."""
    prompts = sorted(prompts, key=lambda prompt: prompt.second)
    requests = [(keys_of(prompt.texts, block_tokens), prompt.second, prompt.answer) for prompt in prompts]
    keys, seconds, answers = (list(column) for column in zip(*(each for each in requests if each[0]), strict=True))
    return Trace(keys, seconds, block_tokens, answers)


def tokens(rng: Random, median: float, spread: float = 0.8) -> int:
    return 1 + int(median * rng.lognormvariate(0, spread))


def zipf(rng: Random, count: int, exponent: float) -> Iterator[int]:
    """Ranks from 0, forever."""
    weights = list(accumulate((rank + 1) ** -exponent for rank in range(count)))
    while True:
        yield rng.choices(range(count), cum_weights=weights)[0]


def conversations(rng: Random, count: int, span: float) -> list[Prompt]:
    """Chats of five turns on average under one of four system prompts. Each prompt is the whole of the last one, with the answer
    and a new question. Most are read in a minute or so; one in ten is left for half an hour on average."""
    systems = [Text(f"system {number}", tokens(rng, 1200)) for number in range(4)]
    kinds = zipf(rng, len(systems), 1)
    prompts = []
    for chat in range(count):
        second, texts, goes_on = rng.uniform(0, span), (systems[next(kinds)],), True
        while goes_on and second < span:
            texts += (Text(f"question {chat} {len(texts)}", tokens(rng, 150, 1)),)
            answer = Text(f"answer {chat} {len(texts)}", tokens(rng, 300))
            prompts.append(Prompt(second, texts, answer.tokens))
            texts += (answer,)
            second += rng.expovariate(1 / (30 * 60)) if rng.random() < 0.1 else 60 * rng.lognormvariate(0, 0.8)
            goes_on = rng.random() < 0.8
    return prompts


def agent_runs(rng: Random, count: int, span: float) -> list[Prompt]:
    """Agents of three kinds, whose system prompts are long with tools. They take twenty steps on average and append what they
    said and what the tool answered; a step takes twenty seconds or so, and one in twenty waits for its user."""
    systems = [Text(f"tools {number}", tokens(rng, 6000, 0.4)) for number in range(3)]
    prompts = []
    for agent in range(count):
        second, texts = rng.uniform(0, span), (rng.choice(systems), Text(f"task {agent}", tokens(rng, 600)))
        steps, step = rng.randint(2, 38), 0
        while step < steps and second < span:
            call = Text(f"call {agent} {step}", tokens(rng, 120))
            prompts.append(Prompt(second, texts, call.tokens))
            texts += (call, Text(f"result {agent} {step}", tokens(rng, 600, 1)))
            second += rng.expovariate(1 / 600 if rng.random() < 0.05 else 1 / 20)
            step += 1
    return prompts


def asked_documents(rng: Random, count: int, documents: int, span: float, drift: float = 0) -> list[Prompt]:
    """Questions to documents, of which some are popular. `drift`: the share of them by which popularity moves on in the span."""
    texts = [Text(f"document {number}", tokens(rng, 6000)) for number in range(documents)]
    popular = zipf(rng, documents, 0.9)
    prompts = []
    for number in range(count):
        second = rng.uniform(0, span)
        document = (next(popular) + int(second / span * drift * documents)) % documents
        prompts.append(Prompt(second, (texts[document], Text(f"about {number}", tokens(rng, 100)))))
    return prompts


def read_once(rng: Random, count: int, span: float) -> list[Prompt]:
    return [Prompt(rng.uniform(0, span), (Text(f"once {number}", tokens(rng, 28_000, 0.4)),)) for number in range(count)]


def chats(rng: Random, size: float) -> Trace:
    """People who chat."""
    return trace_of(conversations(rng, int(2200 * size), HOUR))


def short_chats(rng: Random, size: float) -> Trace:
    """The same in blocks as short as vLLM's own: fewer people, each of many blocks."""
    return trace_of(conversations(rng, int(130 * size) + 1, HOUR / 2), SHORT)


def agents(rng: Random, size: float) -> Trace:
    """Programs that call tools until their task is done."""
    return trace_of(agent_runs(rng, int(150 * size) + 1, HOUR))


def documents(rng: Random, size: float) -> Trace:
    """A library that answers questions to its documents, the popular ones most."""
    return trace_of(asked_documents(rng, int(5000 * size), int(1000 * size) + 1, HOUR))


def drifting(rng: Random, size: float) -> Trace:
    """The same where interest moves on, as with news: what is popular at the beginning is not at the end."""
    return trace_of(asked_documents(rng, int(5000 * size), int(1000 * size) + 1, HOUR, drift=0.5))


def scans(rng: Random, size: float) -> Trace:
    """People who chat, and a job beside them that has each of many long texts summarised once."""
    return trace_of(conversations(rng, int(1300 * size), HOUR) + read_once(rng, int(600 * size), HOUR))


def evaluation(rng: Random, size: float) -> Trace:
    """Somebody who tunes a program and lets it answer the same long test questions after each change, in the same order."""
    rules = Text("rules", 1000)
    asked = [(rules, Text(f"test {number}", tokens(rng, 8000, 0.6))) for number in range(int(500 * size) + 1)]
    rounds = 9
    return trace_of([Prompt(float(second), texts) for second, texts in enumerate(asked * rounds)])


def bursts(rng: Random, size: float) -> Trace:
    """People who chat, and now and then a text that everybody asks about for some minutes, and then nobody."""
    prompts = conversations(rng, int(700 * size), HOUR)
    for text in range(int(120 * size) + 1):
        begun, texts = rng.uniform(0, HOUR), (Text(f"news {text}", tokens(rng, 8000, 0.4)),)
        for number in range(rng.randint(10, 50)):
            asked = texts + (Text(f"to news {text} {number}", tokens(rng, 100)),)
            prompts.append(Prompt(begun + rng.expovariate(1 / 180), asked))
    return trace_of([prompt for prompt in prompts if prompt.second < HOUR])


def mixture(rng: Random, size: float) -> Trace:
    """One server for chats, agents, documents and jobs that read once."""
    prompts = conversations(rng, int(700 * size), HOUR) + agent_runs(rng, int(30 * size) + 1, HOUR)
    prompts += asked_documents(rng, int(1200 * size), int(400 * size) + 1, HOUR) + read_once(rng, int(250 * size), HOUR)
    return trace_of(prompts)


WORKLOADS: dict[str, Callable[[Random, float], Trace]] = {
    "chats": chats,
    "short chats": short_chats,
    "agents": agents,
    "documents": documents,
    "drifting": drifting,
    "scans": scans,
    "evaluation": evaluation,
    "bursts": bursts,
    "mixture": mixture,
}


def generated(name: str, seed: int, size: float = 1.0) -> Trace:
    """`size`: 1 is tens of thousands of blocks used."""
    return WORKLOADS[name](Random(f"{name} {seed}"), size)


def halves(trace: Trace) -> tuple[Trace, Trace]:
    """As if each were all that came."""

    def part(which: slice) -> Trace:
        return Trace(trace.requests[which], trace.seconds[which], trace.block_tokens, trace.answers[which])

    middle = len(trace.requests) // 2
    return part(slice(middle)), part(slice(middle, None))
