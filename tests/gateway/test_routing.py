"""Who is chosen: a bound that nothing overrules, affinity within it, a memory that stays small."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.simulation import routing as bench
from serve_app.errors import ConfigError
from serve_app.gateway import routing
from serve_app.gateway.routing import BLOCK_BYTES, Candidate, PrefixRouter, make, prefix_keys
from serve_app.settings import Settings

BUSY = 1_000_000


def fleet(*outstanding: int) -> list[Candidate]:
    """Replicas a, b, c, ... with so many tokens, and a request for each hundred."""
    return [Candidate("abcdefghij"[i], n, -(-n // 100)) for i, n in enumerate(outstanding)]


def prefix_router(seed: int = 0, **options: float) -> PrefixRouter:
    return PrefixRouter(random.Random(seed), **options)  # type: ignore[arg-type]


def keys_of(name: str, blocks: int, begins: Sequence[int] = ()) -> tuple[int, ...]:
    """A chain of its own after what it begins with."""
    return (*begins, *(hash((name, i)) for i in range(blocks - len(begins))))


def taught(router: PrefixRouter, name: str, keys: Sequence[int]) -> None:
    """Let a replica have been sent a prompt."""
    assert router.choose([Candidate(name, 0, 0)], keys, None).name == name


# --- keys -----------------------------------------------------------------------------------


@given(st.binary(max_size=300), st.binary(max_size=300), st.integers(1, 40), st.integers(0, 12))
def test_keys_are_equal_as_far_as_the_prompts_are_and_no_further(
    first: bytes, other: bytes, block: int, maximum: int
) -> None:
    keys, others = prefix_keys(first, block, maximum), prefix_keys(other, block, maximum)
    assert len(keys) == min(len(first) // block, maximum)
    for i, (key, another) in enumerate(zip(keys, others, strict=False)):
        covered = (i + 1) * block
        assert (key == another) == (first[:covered] == other[:covered])


def test_the_same_block_has_another_key_after_another_beginning() -> None:
    block = b"x" * BLOCK_BYTES
    first, other = prefix_keys(b"a" * BLOCK_BYTES + block), prefix_keys(b"b" * BLOCK_BYTES + block)
    assert first[1] != other[1]
    assert len(set(prefix_keys(block * 5))) == 5


def test_the_length_of_a_chain_is_bounded() -> None:
    assert len(prefix_keys(bytes(400 * BLOCK_BYTES))) == 256


# --- whatever was sent before ---------------------------------------------------------------

CHAINS = [keys_of(name, 3 + 5 * i) for i, name in enumerate("pqr")]
CHAINS += [keys_of("s", 20, CHAINS[2][:9]), ()]
# From 10 on, so that no estimate is odd beside the others: the router counts those as less.
outstanding_tokens = st.just(0) | st.integers(10, 5000)
decisions = st.lists(
    st.tuples(
        st.lists(outstanding_tokens, min_size=1, max_size=6),
        st.sampled_from(CHAINS),
        st.sampled_from([None, "one", "two"]),
    ),
    max_size=60,
)


@given(decisions, st.integers(0, 100), st.sampled_from([1.0, 1.5]), st.sampled_from([0.0, 3.0]))
def test_no_replica_exceeds_the_bound_and_the_best_of_the_others_is_chosen(
    history: list[tuple[list[int], tuple[int, ...], str | None]],
    seed: int,
    factor: float,
    slack_requests: float,
) -> None:
    router = prefix_router(seed, factor=factor, slack_requests=slack_requests)
    homes: dict[str, str] = {}
    for outstanding, keys, session in history:
        candidates = fleet(*outstanding)
        believed = {each.name: router.shared(each.name, keys) for each in candidates}
        choice = router.choose(candidates, keys, session)
        tokens, requests = sum(outstanding), sum(each.requests for each in candidates)
        slack_tokens = slack_requests * tokens / max(requests, 1)
        limit = factor * (tokens / len(candidates)) + slack_tokens
        idle = {each.name: each for each in candidates if each.outstanding <= limit}
        assert choice.name in idle
        assert choice.shared == believed[choice.name]
        assert router.shared(choice.name, keys) == len(keys) * BLOCK_BYTES
        longest = max(believed[name] for name in idle)
        if session is not None and homes.get(session) in idle:
            assert (choice.name, choice.reason) == (homes[session], "session")
        elif choice.reason == "prefix":
            rivals = [idle[name].outstanding for name in idle if believed[name] == longest]
            assert choice.shared == longest > 0
            assert idle[choice.name].outstanding == min(rivals)
        elif choice.reason == "spread":
            assert 0 < 2 * longest < len(keys) * BLOCK_BYTES
        else:
            followed = any(believed.values()) or homes.get(str(session)) in believed
            assert choice.reason == ("busy" if followed else "balance")
            assert longest == 0
        if session is not None:
            homes[session] = choice.name


@given(decisions, st.integers(0, 100), st.integers(0, 60), st.integers(0, 40))
def test_the_memory_is_bounded_and_counted(
    history: list[tuple[list[int], tuple[int, ...], str | None]],
    seed: int,
    max_keys: int,
    waiting: int,
) -> None:
    router = prefix_router(seed, max_keys=max_keys, held_bytes=waiting * BLOCK_BYTES)
    for outstanding, keys, session in history:
        router.choose(fleet(*outstanding), keys, session)
        sizes = [memory.size for memory in router._memories.values()]
        assert router.keys == sum(sizes) <= max_keys
        assert max(sizes, default=0) <= 2 * waiting
    for name in "abcdef":
        router.forget(name)
    assert router.keys == 0


@given(st.sampled_from(list(routing.ROUTERS)), decisions, st.integers(0, 100))
def test_every_router_chooses_a_candidate_and_the_same_one_again(
    name: str, history: list[tuple[list[int], tuple[int, ...], str | None]], seed: int
) -> None:
    first, again = make(name, random.Random(seed)), make(name, random.Random(seed))
    for outstanding, keys, session in history:
        candidates = fleet(*outstanding)
        choice = first.choose(candidates, keys, session)
        assert choice == again.choose(candidates, keys, session)
        assert choice.name in [candidate.name for candidate in candidates]
    first.forget("nobody")
    with pytest.raises(ValueError, match="no candidates"):
        first.choose([], (), None)


# --- prefixes -------------------------------------------------------------------------------


def test_a_prompt_goes_where_its_beginning_is() -> None:
    router = prefix_router()
    shared = keys_of("document", 8)
    first = router.choose(fleet(0, 0, 0, 0), keys_of("first", 10, shared), None)
    assert (first.reason, first.shared) == ("balance", 0)
    for name in map(str, range(20)):
        choice = router.choose(fleet(0, 0, 0, 0), keys_of(name, 10, shared), None)
        assert (choice.name, choice.reason) == (first.name, "prefix")
        assert choice.shared == 8 * BLOCK_BYTES


def test_the_longest_beginning_wins_and_among_as_long_ones_the_least_busy() -> None:
    router = prefix_router()
    keys = keys_of("document", 10)
    taught(router, "a", keys[:6])
    taught(router, "b", keys[:8])
    taught(router, "c", keys[:8])
    taught(router, "d", keys[:7])
    assert router.choose(fleet(0, 500, 400, 0), keys, None).name == "c"
    # Which now holds more than b does.
    assert router.choose(fleet(0, 300, 400, 0), keys, None).name == "c"


def test_a_prompt_shorter_than_a_block_has_no_affinity() -> None:
    router = prefix_router()
    keys = prefix_keys(b"You are a helpful assistant." * 10)
    names = {router.choose(fleet(0, 0, 0), keys, None).name for _ in range(50)}
    assert names == {"a", "b", "c"}
    assert router.keys == 0


def test_a_busy_holder_is_left_and_another_one_is_made() -> None:
    router = prefix_router()
    keys = keys_of("hot", 4)
    taught(router, "a", keys)
    # At the bound, all requests being of 100 tokens: 1.5 * (2000 + x) / 2 + 3 * 100 = x.
    assert router.choose(fleet(7200, 2000), keys, None).name == "a"
    choice = router.choose(fleet(7300, 2000), keys, None)
    assert (choice.name, choice.reason, choice.shared) == ("b", "busy", 0)
    assert router.choose(fleet(100, 50), keys, None).name == "b"
    assert router.choose(fleet(50, 100), keys, None).name == "a"


@pytest.mark.parametrize("tokens", [10, 10_000])
def test_in_an_idle_fleet_a_few_requests_at_once_are_followed_however_long_they_are(
    tokens: int,
) -> None:
    router = prefix_router()
    keys = keys_of("document", 4)
    taught(router, "a", keys)
    reasons = [
        router.choose([Candidate("a", count * tokens, count), *fleet(*[0] * 9)[1:]], keys, None)
        for count in range(5)
    ]
    assert [choice.reason for choice in reasons] == ["prefix"] * 4 + ["busy"]


def test_behind_a_busy_holder_the_next_longest_is_followed() -> None:
    router = prefix_router()
    keys = keys_of("document", 10)
    taught(router, "a", keys)
    taught(router, "b", keys[:8])
    choice = router.choose(fleet(BUSY, 0, 0, 0, 0), keys, None)
    assert (choice.name, choice.reason, choice.shared) == ("b", "prefix", 8 * BLOCK_BYTES)


def test_one_system_prompt_does_not_keep_everything_on_one_replica() -> None:
    """Of an idle fleet, where no load bound would ever help."""
    router = prefix_router()
    system = keys_of("system", 3)
    counts = dict.fromkeys("abcd", 0)
    for number in range(400):
        counts[router.choose(fleet(0, 0, 0, 0), keys_of(str(number), 10, system), None).name] += 1
    assert min(counts.values()) > 50
    # But what is most of the prompt is followed always.
    router = prefix_router()
    names = {
        router.choose(fleet(0, 0, 0, 0), keys_of(str(number), 6, system), None).name
        for number in range(400)
    }
    assert len(names) == 1


@pytest.mark.parametrize("odd", [10**5, 10**9, 10**12])
def test_one_odd_estimate_does_not_gather_everything_on_one_replica(odd: int) -> None:
    def spread_of(extra: int) -> list[int]:
        router, sent = prefix_router(), dict.fromkeys("abcd", 0)
        for _ in range(400):
            more = {"d": extra} if extra else {}
            candidates = [
                Candidate(name, count * 300 + more.get(name, 0), count + (name in more))
                for name, count in sent.items()
            ]
            sent[router.choose(candidates, keys_of("system", 11), None).name] += 1
        return sorted(sent.values())

    # One of the four may be left alone, with the odd request or without it.
    assert min(spread_of(odd)[1:]) >= 0.9 * min(spread_of(0)[1:]) > 100


def test_what_an_engine_has_lost_is_not_followed() -> None:
    router = prefix_router(held_bytes=20 * BLOCK_BYTES)
    old, used = keys_of("old", 8), keys_of("used", 8)
    taught(router, "a", old)
    for number in range(20):
        taught(router, "a", used)
        taught(router, "a", keys_of(str(number), 2))
    assert router.shared("a", old) == 0
    assert router.shared("a", used) == 8 * BLOCK_BYTES
    # What fits is not lost.
    router = prefix_router(held_bytes=20 * BLOCK_BYTES)
    taught(router, "a", old)
    taught(router, "a", keys_of("more", 12))
    assert router.shared("a", old) == 8 * BLOCK_BYTES


def test_of_a_prompt_larger_than_the_cache_the_beginning_is_remembered() -> None:
    router = prefix_router(held_bytes=5 * BLOCK_BYTES)
    taught(router, "a", keys := keys_of("long", 100))
    assert router.shared("a", keys) == 5 * BLOCK_BYTES


def test_a_replica_that_died_is_not_followed_and_others_are() -> None:
    router = prefix_router()
    keys = keys_of("document", 8)
    taught(router, "a", keys)
    taught(router, "b", keys[:6])
    router.forget("a")
    choice = router.choose(fleet(0, 0, 0), keys, None)
    assert (choice.name, choice.shared) == ("b", 6 * BLOCK_BYTES)


def test_replicas_that_vanish_are_forgotten_but_not_those_left_out_for_a_while() -> None:
    router = prefix_router()
    keys = keys_of("document", 8)
    taught(router, "a", keys)
    taught(router, "gone", keys)
    for number in range(10_000):
        # a is left out half of the time, in turns.
        router.choose(fleet(0, 0)[number // 1000 % 2 :], (), None)
    assert router.shared("a", keys) == 8 * BLOCK_BYTES
    assert router.shared("gone", keys) == 0
    assert router.keys == 8


# --- sessions -------------------------------------------------------------------------------


def test_a_session_stays_where_it_is() -> None:
    router = prefix_router()
    first = router.choose(fleet(0, 0, 0, 0), (), "alice").name
    for number in range(20):
        keys = keys_of(str(number), 4)
        taught(router, next(name for name in "abcd" if name != first), keys)
        choice = router.choose(fleet(0, 0, 0, 0), keys, "alice")
        assert (choice.name, choice.reason) == (first, "session")
    names = {router.choose(fleet(0, 0, 0, 0), (), str(number)).name for number in range(100)}
    assert names == set("abcd")


def test_a_session_moves_for_good_when_its_replica_is_busy_or_gone() -> None:
    router = prefix_router()
    router.choose(fleet(0), (), "alice")
    choice = router.choose(fleet(BUSY, 0), (), "alice")
    assert (choice.name, choice.reason) == ("b", "busy")
    assert router.choose(fleet(0, 0), (), "alice").name == "b"
    assert router.choose(fleet(0), (), "alice").name == "a"
    assert router.choose(fleet(0, 0), (), "alice").name == "a"


def test_sessions_are_bounded_and_the_ones_in_use_are_kept() -> None:
    router = prefix_router()
    router.choose(fleet(0), (), "alice")
    for number in range(3 * routing._MAX_SESSIONS):
        router.choose(fleet(0), (), str(number))
        if number % 1000 == 0:
            assert router.choose(fleet(0), (), "alice").reason == "session"
    assert len(router._sessions) <= routing._MAX_SESSIONS
    assert router.choose(fleet(0), (), "0").reason == "balance"


# --- the others -----------------------------------------------------------------------------


def counts(name: str, candidates: list[Candidate], times: int = 600) -> dict[str, int]:
    router = make(name, random.Random(0))
    values = {candidate.name: 0 for candidate in candidates}
    for _ in range(times):
        values[router.choose(candidates, (), None).name] += 1
    return values


@pytest.mark.parametrize("name", list(routing.ROUTERS))
def test_equal_replicas_are_sent_equally_much(name: str) -> None:
    for sent in counts(name, fleet(0, 0, 0)).values():
        assert 140 < sent < 260


def test_what_each_looks_at() -> None:
    # a has the fewest requests, b the fewest tokens.
    candidates = [Candidate("a", 300, 1), Candidate("b", 200, 2), Candidate("c", 400, 3)]
    assert counts("least_connections", candidates)["a"] == 600
    assert counts("least_outstanding", candidates)["b"] == 600
    of_two = counts("power_of_two", candidates)
    # Of three pairs b wins two and a one: the busiest is never sent anything.
    assert of_two["c"] == 0
    assert 350 < of_two["b"] < 450
    assert set(counts("round_robin", candidates).values()) == {200}
    assert min(counts("random", candidates).values()) > 140


@pytest.mark.parametrize("wrong", ["prefixes", "least_conections", "round-robin"])
def test_an_unknown_router_names_the_nearest(wrong: str) -> None:
    nearest = {"p": "prefix", "l": "least_connections", "r": "round_robin"}[wrong[0]]
    with pytest.raises(ValueError, match=f"did you mean '{nearest}'"):
        make(wrong, random.Random(0))


@pytest.mark.parametrize("options", [{"factor": 0.9}, {"slack_requests": -1}])
def test_a_bound_that_could_exclude_every_replica_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        prefix_router(**options)


# --- together -------------------------------------------------------------------------------


@pytest.mark.parametrize("zipf", [False, True])
@pytest.mark.parametrize("replicas", [2, 4])
def test_on_a_modelled_fleet_prefixes_are_read_once_and_the_load_is_even(
    zipf: bool, replicas: int
) -> None:
    load = bench.Load(requests=200, rate=3.0, zipf=zipf)
    engine = bench.engine_for(load, cache=0.6)

    def run(made: Callable[..., routing.Router], **options: int) -> bench.Outcome:
        return bench.simulate(lambda rng: made(rng, **options), load, engine, replicas)

    ours = run(PrefixRouter, held_bytes=bench.held_bytes(engine))
    theirs = run(routing.ROUTERS["least_connections"])
    assert ours.hit_share > theirs.hit_share
    assert ours.hit_share > 0.85
    # By Zipf half of all requests are for the few prefixes that everybody holds anyway.
    assert ours.ttft_p50_s < (0.9 if zipf else 0.7) * theirs.ttft_p50_s
    assert ours.queue_max_over_mean < 1.5
    assert ours.work_max_over_mean < 1.5
    # Without room for anything to be remembered it is power of two choices.
    blind = run(PrefixRouter, held_bytes=0)
    assert blind.hit_share < ours.hit_share


def test_the_model_counts_what_is_outstanding_as_it_goes() -> None:
    """Requests on one engine: nothing is left in the end, and nothing is negative on the way."""
    load = replace(bench.Load(), requests=50)
    engine = bench.engine_for(load, cache=1.0)
    router = Watching()
    bench.simulate(lambda rng: router, load, engine, 1)
    assert min(router.seen) >= 0
    assert max(router.seen) > load.shared


class Watching(routing.Router):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def choose(
        self, candidates: Sequence[Candidate], keys: Sequence[int], session: str | None
    ) -> routing.Choice:
        self.seen.append(candidates[0].outstanding)
        return routing.Choice(candidates[0].name, "blind")


def test_a_registered_policy_can_be_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(routing.ROUTERS, "first", routing.RoundRobin)
    assert Settings.parse({"gateway": {"routing": "first"}}).gateway.routing == "first"
    with pytest.raises(ConfigError, match="'frst': no such routing policy; did you mean 'first'"):
        Settings.parse({"gateway": {"routing": "frst"}})
