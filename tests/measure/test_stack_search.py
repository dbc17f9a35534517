"""The search for a stack, on made-up fronts whose best is known."""

import random

import pytest

from tessera.methods.measure.stack_search import GAIN, Goal, Stack, Tried, best, front, search

LADDERS = {
    "cache": [[{"name": f"c{n}", "n": n} for n in (2, 3, 4, 5, 6, 8)]],
    "attention": [[{"name": f"s{n}", "n": n} for n in (2, 3, 5)], [{"name": f"w{n}", "n": n} for n in (2, 3, 4)]],
}


def made(stack: Stack, attention_helps: bool = True) -> Tried:
    """Costs and losses that grow along every ladder."""
    cache, attention = (stack.parts.get(kind, {}).get("n", 1) for kind in ("cache", "attention"))
    gain = 1 + 0.2 * (attention - 1) if attention_helps else 1 - 0.05 * (attention - 1)
    return Tried(stack, cache**0.8 * gain, 0.02 * (cache - 1) + 0.03 * (attention - 1))


def walked(goal: Goal, budget: int, **how) -> list[Tried]:
    tried = [Tried(Stack(), 1.0, 0.0)]
    walk = search(goal, LADDERS)
    answer = None
    while len(tried) <= budget:
        try:
            stack = walk.send(answer) if tried[1:] else next(walk)
        except StopIteration:
            break
        answer = made(stack, **how)
        tried.append(answer)
    return tried


@pytest.mark.parametrize("most", [0.01, 0.03, 0.05, 0.1, 0.2, 0.9])
def test_within_a_loss(most):
    tried = walked(Goal(loss=most), 10)
    found = best(tried, Goal(loss=most))
    assert found.loss <= most and len({t.stack.name for t in tried}) == len(tried) <= 11
    alone = max((made(Stack().with_part("cache", s)) for s in LADDERS["cache"][0]),
                key=lambda t: t.ratio if t.loss <= most else 0)  # fmt: skip
    if alone.loss <= most:
        assert found.ratio >= alone.ratio
    else:
        assert found.stack.name == "plain"
    if most == 0.9:
        assert set(found.stack.parts) == {"cache", "attention"}


@pytest.mark.parametrize("wanted", [1.5, 2.0, 3.0, 5.0])
def test_a_wanted_speed(wanted):
    goal = Goal(ratio=wanted)
    found = best(walked(goal, 10), goal)
    assert found.ratio >= wanted
    milder = [made(Stack().with_part("cache", s)) for s in LADDERS["cache"][0]]
    enough = [t.loss for t in milder if t.ratio >= wanted]
    assert not enough or found.loss <= min(enough)


def test_what_does_not_help_is_left():
    goal = Goal(loss=0.1)
    tried = walked(goal, 10, attention_helps=False)
    assert set(best(tried, goal).stack.parts) == {"cache"}
    assert sum("attention" in t.stack.parts for t in tried) == 2  # one of each method


def test_nothing_is_slower_than_plain():
    goal = Goal(ratio=2.0)
    slow = [Tried(Stack(), 1.0, 0.0), Tried(Stack().with_part("cache", {"name": "c"}), 0.8, 0.1)]
    assert best(slow, goal) is slow[0] and best(slow, Goal(loss=0.5)) is slow[0]
    near = Tried(Stack().with_part("cache", {"name": "d"}), GAIN - 0.01, 0.0)
    assert best([*slow, near], Goal(loss=0.5)) is slow[0]
    unreached = Tried(Stack().with_part("cache", {"name": "e"}), 1.6, 0.3)
    assert best([*slow, unreached], goal) is unreached


def test_the_front_is_that_of_all_pairs():
    rng = random.Random(3)
    tried = [Tried(Stack({"cache": {"name": str(n)}}), rng.random() * 4, rng.random()) for n in range(40)]
    leading = front(tried)
    for t in tried:
        beaten = any(o.ratio >= t.ratio and o.loss <= t.loss and o is not t for o in tried)
        assert (t in leading) != beaten
    assert [t.ratio for t in leading] == sorted(t.ratio for t in leading)


def test_empty_ladders_end_at_once():
    assert list(search(Goal(loss=0.1), {})) == []
    assert list(search(Goal(loss=0.1), {"cache": [[]]})) == []
