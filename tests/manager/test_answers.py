"""Who learns how long a request's answer was, and when."""

from kvoffload.manager import BlockManager, NoJournal
from kvoffload.policy.lru import LRU

BLOCKS = [bytes([number]) * 8 for number in range(3)]
PLACES = {key: place for place, key in enumerate(BLOCKS)}


class Told(LRU):
    def __init__(self, capacity: int):
        super().__init__(capacity)
        self.calls: list[tuple[str, bytes, bool, int]] = []

    def enter(self, frame, key, used, answer):
        self.calls.append(("enter", key, False, answer))
        super().enter(frame, key, used, answer)

    def use(self, frame, key, now, again, answer):
        self.calls.append(("use", key, again, answer))
        super().use(frame, key, now, again, answer)

    def take(self):
        calls, self.calls = self.calls, []
        return calls


def made() -> tuple[BlockManager, Told]:
    """With the policy of the SSD, the one that is chosen; DRAM has another beside it."""
    policies = []

    def policy(capacity: int) -> Told:
        policies.append(Told(capacity))
        return policies[-1]

    manager = BlockManager(4, 8, 1, NoJournal(), block_bytes=0, dram_is_tier=True, policy=policy)
    (of_ssd,) = policies
    return manager, of_ssd


def store(manager: BlockManager, keys: list[bytes], owner: str) -> None:
    manager.store([(key, 0) for key in keys], owner, PLACES)
    manager.store_done(keys)


def demote(manager: BlockManager) -> None:
    for demotion in manager.plan():
        manager.ack(demotion.id, 1)


def test_a_block_that_is_written_after_its_request_ended_comes_with_the_answer():
    manager, of_ssd = made()
    store(manager, BLOCKS, "r")
    manager.touch(BLOCKS, "r", 7)
    demote(manager)
    assert of_ssd.take() == [("enter", key, False, 7) for key in reversed(BLOCKS)]


def test_a_block_on_ssd_is_used_without_answer_when_it_is_loaded_and_with_it_when_that_request_ends():
    manager, of_ssd = made()
    store(manager, BLOCKS, "r")
    demote(manager)
    manager.touch(BLOCKS, "r", 7)
    others = [bytes([number]) * 8 for number in range(10, 14)]
    manager.store([(key, 0) for key in others], "other", {})  # takes the DRAM slots
    manager.store_done(others)
    demote(manager)
    of_ssd.take()
    manager.load(BLOCKS, "s")
    manager.load_done(BLOCKS, "s")
    assert [call for call in of_ssd.take() if call[0] == "use"] == [("use", key, False, 0) for key in reversed(BLOCKS)]
    manager.touch(BLOCKS, "s", 300)
    assert of_ssd.take() == [("use", key, True, 300) for key in reversed(BLOCKS)]
