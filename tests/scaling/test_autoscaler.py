"""What Serve's controller gets from the policy: over deploys, restarts and silent replicas."""

from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.scaling import autoscaler
from serve_app.scaling.autoscaler import Autoscaler, OngoingRequests
from serve_app.scaling.memory import Memory
from serve_app.scaling.state import State, resumed
from serve_app.scaling.types import Goal, ReplicaLoad
from tests.examples import examples
from tests.services.loads import BUSY


class DictStore:
    """Memories as the cluster keeps them: as bytes."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def load(self, key: str) -> Memory | None:
        value = self.values.get(key)
        return None if value is None else msgspec.json.decode(value, type=Memory)

    def save(self, key: str, memory: Memory) -> None:
        self.values[key] = msgspec.json.encode(memory)


@dataclass
class Controller:
    """Serve's controller, as far as the policy sees it."""

    store: DictStore = field(default_factory=DictStore)
    minimum: int = 1
    maximum: int = 8
    now_s: float = 1000.0
    target: int = 1
    running: int = 0
    loads: dict[int, ReplicaLoad] = field(default_factory=dict)
    policy: Autoscaler | None = None
    scaled_up_s: float | None = None
    start_s: dict[str, float] = field(default_factory=dict)

    def start(self, release: str = "r", skew_s: float = 0.0) -> Autoscaler:
        """A policy object as a restarted controller makes one, on a clock of its own."""
        goal = asdict(Goal(min_replicas=self.minimum, max_replicas=self.maximum))
        self.policy = Autoscaler(
            goal,
            60.0,
            [{"CPU": 0.0}],
            release=release,
            nodes=lambda: None,
            clock=lambda: self.now_s - skew_s,
            store=self.store,
        )
        return self.policy

    def tick(self, seconds: float = 1.0) -> int:
        assert self.policy is not None
        self.now_s += seconds
        replicas = list(range(self.running))
        raw: dict[str, dict[int, list[Any]]] = {}
        for replica in replicas:
            load = self.loads.get(replica)
            for name, value in autoscaler.report(load, self.start_s).items() if load else ():
                point = SimpleNamespace(timestamp=self.now_s, value=value)
                raw.setdefault(name, {})[replica] = [point]
        context = SimpleNamespace(
            app_name="llm",
            deployment_name="engine",
            target_num_replicas=self.target,
            current_num_replicas=self.running,
            running_replicas=replicas,
            raw_metrics=raw,
            total_queued_requests=0.0,
            capacity_adjusted_min_replicas=self.minimum,
            capacity_adjusted_max_replicas=self.maximum,
            current_time=self.now_s,
            last_scale_up_time=self.scaled_up_s,
            policy_state={},
        )
        wanted, _ = self.policy(context)  # type: ignore[arg-type]
        wanted = max(self.minimum, min(self.maximum, wanted))
        if wanted > self.target:
            self.scaled_up_s = self.now_s
        self.target = wanted
        return wanted

    def serving(self, replicas: int, load: ReplicaLoad = BUSY) -> None:
        self.target = self.running = replicas
        self.loads = dict.fromkeys(range(replicas), load)


@pytest.fixture(autouse=True)
def no_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's gauges need a cluster."""
    monkeypatch.setattr(autoscaler.Gauges, "set", lambda *_: None)


@pytest.mark.parametrize("minimum", [0, 1])
@pytest.mark.parametrize("release", ["r", "another model"])
def test_a_deploy_keeps_what_runs(minimum: int, release: str) -> None:
    controller = Controller(minimum=minimum)
    controller.start()
    controller.serving(4)
    for _ in range(5):
        controller.tick()
    # Serve resets its target, as it does with initial_replicas, and makes another policy.
    controller.target = 1
    controller.start(release)
    assert controller.tick() == 4


def test_a_deploy_keeps_what_starts() -> None:
    controller = Controller()
    controller.start()
    controller.serving(2)
    controller.tick()
    controller.target = 4
    controller.tick()
    controller.target = 1
    controller.start()
    assert controller.tick() == 4


def test_replicas_of_another_day_are_not_started_again() -> None:
    controller = Controller()
    controller.start()
    controller.serving(4)
    controller.tick()
    # The application was deleted, and is deployed again.
    controller.now_s += 86400
    controller.target, controller.running = 1, 0
    controller.start()
    assert controller.tick() == 1


@pytest.mark.parametrize("skew_s", [0.0, 900.0, -1e6])
def test_what_was_learned_outlives_the_controller(skew_s: float) -> None:
    controller = Controller()
    controller.start()
    controller.serving(1)
    controller.tick()
    controller.target = 2
    controller.tick()
    for _ in range(115):
        controller.tick()
        controller.target = 2
    controller.serving(2)
    controller.tick()
    before = controller.policy
    assert before is not None
    assert before._starts.start_s == 116.0
    for _ in range(15):  # Until it was saved.
        controller.tick()
    after = controller.start(skew_s=skew_s)
    controller.tick()
    assert after._starts.start_s == 116.0
    assert after._state.sums[0] > 0
    assert len(after._state.means) == len(before._state.means)
    assert after._state.means == pytest.approx(before._state.means)
    # A start that it does not see the beginning of says nothing.
    controller.target = 3
    after = controller.start(skew_s=skew_s)
    controller.tick()
    controller.serving(3)
    controller.tick()
    assert after._starts.start_s == 116.0


def test_a_deploy_right_after_a_start_keeps_its_time() -> None:
    controller = Controller(start_s={"code": 2.0})
    controller.start()
    controller.serving(1)
    controller.tick()
    for took_s in (5, 9):
        for _ in range(took_s):
            controller.target = controller.running + 1
            controller.tick()
        controller.serving(controller.target)
        controller.tick()
        before = controller.policy
        assert before is not None
        after = controller.start()
        controller.tick()
        assert (after._starts.took_s, after._starts.parts_s) == (
            before._starts.took_s,
            before._starts.parts_s,
        )


def test_what_replicas_say_of_their_starts_outlives_the_controller() -> None:
    controller = Controller(start_s={"code": 20.0, "kernels": 10.0})
    controller.start()
    controller.serving(1)
    controller.tick()
    for _ in range(50):
        controller.target = 2
        controller.tick()
    controller.serving(2)
    for _ in range(15):
        controller.tick()
    before = controller.policy
    assert before is not None
    # Not that of the replica that was there.
    assert [parts["code"] for parts in before._starts.parts_s] == [20.0]
    after = controller.start()
    controller.tick()
    assert after._starts.parts_s == before._starts.parts_s
    assert after._starts.quantile_s(1.0) == pytest.approx(before._starts.took_s[0])


def test_of_another_model_nothing_is_taken_over_but_the_replicas() -> None:
    controller = Controller()
    controller.start()
    controller.serving(3)
    for _ in range(30):
        controller.tick()
    after = controller.start("another model")
    controller.tick()
    assert after._starts.start_s == 60.0
    assert after._state.now_s == after._state.began_s


def test_a_memory_that_cannot_be_read_costs_no_replica() -> None:
    class Broken(DictStore):
        def load(self, key: str) -> Memory | None:
            raise OSError("the store is away")

        def save(self, key: str, memory: Memory) -> None:
            raise OSError("the store is away")

    controller = Controller(store=Broken())
    controller.start()
    controller.serving(3)
    assert [controller.tick() for _ in range(3)] == [3, 3, 3]


def test_a_replica_too_busy_to_report_is_not_idle() -> None:
    controller = Controller(minimum=0)
    controller.start()
    controller.serving(2)
    for _ in range(90):
        controller.tick()
    assert controller.target == 2
    controller.loads = {}  # Both event loops stand still; the engines are at work.
    assert {controller.tick() for _ in range(1000)} == {2}


def test_a_new_controller_waits_for_the_first_reports() -> None:
    controller = Controller(minimum=0)
    controller.start()
    controller.serving(2)
    controller.loads = {}
    assert {controller.tick() for _ in range(1000)} == {2}


def test_an_idle_application_still_goes() -> None:
    controller = Controller(minimum=0)
    controller.start()
    controller.serving(2, ReplicaLoad(max_running=64))
    wanted = []
    for _ in range(1500):
        wanted.append(controller.tick())
        controller.running = min(controller.running, controller.target)
    assert wanted[-1] == 0


@pytest.mark.parametrize(("release", "wanted"), [("r", 0), ("another model", 1)])
def test_a_deploy_shows_that_a_replica_can_start_and_wakes_nothing_else(
    release: str, wanted: int
) -> None:
    controller = Controller(minimum=0, target=0)
    controller.start()
    assert [controller.tick() for _ in range(3)] == [1, 1, 1]
    controller.serving(1, ReplicaLoad(max_running=64))
    while controller.tick():
        pass
    controller.running = 0
    assert controller.tick() == 0
    controller.tick(20)  # It is saved.
    controller.start(release)
    assert controller.tick() == wanted


numbers = st.floats(0, 1e9, allow_nan=False)


@examples(50)
@given(
    began_s=numbers,
    wishes=st.lists(st.tuples(numbers, st.integers(0, 99)), max_size=5),
    means=st.lists(numbers, max_size=5),
    later_s=st.floats(-1e9, 1e9),
)
def test_a_state_survives_the_store_and_another_clock(
    began_s: float, wishes: list[tuple[float, int]], means: list[float], later_s: float
) -> None:
    state = State(began_s=began_s, now_s=began_s + 5, wishes=tuple(wishes), means=tuple(means))
    store = DictStore()
    store.save("k", Memory("r", 1.0, True, 2, (3.0,), state))
    memory = store.load("k")
    assert memory is not None
    assert memory.state == state
    there = resumed(state, later_s)
    assert there.now_s == later_s
    assert there.means == state.means
    assert [n for _, n in there.wishes] == [n for _, n in state.wishes]


def test_serves_own_policy_starts_one_replica_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        autoscaler, "replica_queue_length_autoscaling_policy", lambda context: (0, {})
    )
    policy = OngoingRequests()
    asleep = SimpleNamespace(current_num_replicas=0, policy_state={})
    awake = SimpleNamespace(current_num_replicas=1, policy_state={})
    wanted = [policy(each)[0] for each in (asleep, asleep, awake, asleep)]  # type: ignore[arg-type]
    assert wanted == [1, 1, 0, 0]
