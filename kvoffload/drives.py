"""The drives of the SSD tier: whose slots are whose, and which drive may be read from and written to. Scheduler side, one
thread.

SSD slot `s` lies on drive `s % drives`, on every rank. What fails there fails that drive only, and reads and writes have a
breaker each: a drive that is full, worn out or read-only takes no writes and still serves loads. One that fails loads gets no
writes either, since what it holds cannot be had.
"""

import errno
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from kvoffload.blocks import Block
from kvoffload.breaker import PAUSE_MIN_S, Breaker, BreakerState
from kvoffload.policy import EvictionPolicy
from kvoffload.slots import SlotPool
from kvoffload.types import LATE, BlockKey

logger = logging.getLogger(__name__)

ERRORS_MAX = 3  # failed reads in a row that are the drive's fault; of fewer each is its sector's
DAMAGED_MAX = 64  # the same of reads that brought wrong bytes: each says little about anything but its block
# An idle engine steps for a drive that takes so many bytes a second, and that is silent for no longer than this: while it steps,
# vLLM's processes ask one another for work without pause, which takes processors from whoever else wants them.
BRISK = 100e6
QUIET_S = 1.0
FULL_S = 60.0  # before a full drive is asked for room once more
NOT_ASKED = (errno.ECANCELED, errno.EREMOTEIO)  # the drive was not asked, or the GPU failed


class Drive:
    """One nvme path: its slots, and what it is known of it now."""

    def __init__(self, number: int, name: str, slots: range, clock: Callable[[], float], policy: Callable[[int], EvictionPolicy]):
        self.number, self.name, self._clock = number, name, clock
        self.slots = slots  # by frame
        self.pool = SlotPool(slots)
        self.policy = policy(len(slots))
        self.reads, self.writes = Breaker(clock), Breaker(clock)
        self.loads = self.demotions = 0  # in flight, in blocks
        self.trial: set[BlockKey] = set()  # what lookups of this step promised while reads are half-open
        self.trial_max = 1  # blocks of a trial
        self.awaited_until = 0.0  # by an idle engine, if demotions are in flight
        self.heard = False  # since that was first said: a demotion ended
        self.errors = self.damaged = 0  # since the last good read
        self.full_until = 0.0
        # DRAM slots that late operations may still use, so that they must not be filled again until the drive answers another:
        # the engine would need spare memory for each, and has little.
        self.late_blocks: list[Block] = []  # of blocks whose demotion was late
        self.late_slots: list[tuple[int, int]] = []  # that a late load was to fill, with the number of the late load
        self.late_loads = 0  # blocks, ever

    @property
    def owes(self) -> bool:
        """Whether late operations on it may still use memory of ours."""
        return bool(self.late_blocks or self.late_slots)

    def take_slot(self) -> int | None:
        """A free slot. On a full drive one that held a block before: it has room for these, and younger blocks are worth it."""
        return self.pool.take(used_before=self._clock() < self.full_until)

    def victim(self, spared: Callable[[int], bool]) -> int | None:
        """The slot of the next block to evict, but none that is spared."""
        slots = self.slots
        frame = self.policy.victim(lambda frame: spared(slots[frame]))
        return None if frame is None else slots[frame]

    def may_read(self, key: BlockKey) -> bool:
        """Half-open, it is one block at a time, the first that is asked for; or more, see `forget_trial`."""
        state = self.reads.state
        if state is BreakerState.HALF_OPEN:
            return key in self.trial or self.loads == 0 and len(self.trial) < self.trial_max
        return state is BreakerState.CLOSED

    def set_aside(self, slot: int) -> None:
        """A late load may still fill the DRAM slot."""
        self.late_loads += 1
        self.late_slots.append((self.late_loads, slot))

    def take_back(self, late_loads: int) -> list[int]:
        """Of the slots set aside, those of the first so many late loads: the drive answered what began when there had been
        that many. What began before tells nothing of them, though its end may be told after."""
        back = [slot for number, slot in self.late_slots if number <= late_loads]
        self.late_slots = [(number, slot) for number, slot in self.late_slots if number > late_loads]
        return back

    def promise(self, key: BlockKey) -> None:
        if not self.reads.closed:
            self.trial.add(key)

    def forget_trial(self) -> None:
        """The step ends. What was promised and not loaded was of no use alone: a model with sliding windows, recurrent states or
        a draft model loads several blocks or none. So twice as many are promised in the next step."""
        if self.trial and self.loads == 0:
            self.trial_max = min(2 * self.trial_max, self.pool.count)
        self.trial.clear()

    def next_trial(self) -> Block | None:
        """The block to try writing with; None: any. What the drive did not answer is also its next trial, of several in turn,
        so that one that hangs for good keeps no further DRAM slots. But if a single one was not answered twice it may be the
        only one, of a write that never returns, and then another block is needed to see that the drive works.
        """
        if not self.late_blocks or len(self.late_blocks) == 1 and self.writes.again:
            return None
        self.late_blocks.append(self.late_blocks.pop(0))
        return self.late_blocks[-1]

    @property
    def write_state(self) -> BreakerState:
        return BreakerState.OPEN if self.reads.state is BreakerState.OPEN else self.writes.state

    def may_write(self, demotions_max: int) -> bool:
        if self.reads.closed and self.writes.closed:
            return self.demotions < demotions_max and self.pool.count > 0
        state = self.write_state
        most = demotions_max if state is BreakerState.CLOSED else 1
        return state is not BreakerState.OPEN and self.demotions < most and self.pool.count > 0


class Drives:
    """`names`: of the drives, for people. `block_bytes`: of a slot, on all ranks. `demotions_max`: in flight on all drives
    together; each gets its share, so that one that hangs does not hold all of them."""

    def __init__(
        self,
        names: Sequence[str],
        slot_count: int,
        block_bytes: int,
        demotions_max: int,
        clock: Callable[[], float],
        policy: Callable[[int], EvictionPolicy],
        counters: Counter[tuple[str, ...]],
    ):
        count = len(names)
        self._clock, self._counters = clock, counters
        self._drives = [Drive(i, name, range(i, slot_count, count), clock, policy) for i, name in enumerate(names)]
        self._demotions_max = max(1, demotions_max // count)
        self._brisk_s = block_bytes / BRISK
        self._turn = 0
        self.all_well = self.writing = True  # see _look
        self._look()

    def __iter__(self) -> Iterator[Drive]:
        return iter(self._drives)

    def __len__(self) -> int:
        return len(self._drives)

    def of(self, slot: int) -> Drive:
        return self._drives[slot % len(self._drives)]

    def frame(self, slot: int) -> tuple[EvictionPolicy, int]:
        """The policy of the slot's drive, and the slot's frame there."""
        frame, number = divmod(slot, len(self._drives))
        return self._drives[number].policy, frame

    # -- questions ---------------------------------------------------------------------------------------------

    def to_write(self) -> list[Drive]:
        """Those that take a demotion now, first the one whose turn it is."""
        in_turn = self._drives[self._turn :] + self._drives[: self._turn]
        return [drive for drive in in_turn if drive.may_write(self._demotions_max)]

    def take_stores(self) -> bool:
        """Whether a block stored now could be written to some drive, be it as its trial."""
        return any(drive.write_state is not BreakerState.OPEN and drive.pool.count > 0 for drive in self._drives)

    def writes_soon(self) -> bool:
        """Whether some drive that writes nothing takes a demotion now or, after its first and shortest pause, soon."""
        return any(
            drive.may_write(self._demotions_max)
            or 0 < max(drive.reads.left_s(), drive.writes.left_s()) <= PAUSE_MIN_S
            and drive.pool.count > 0
            for drive in self._drives
            if drive.demotions == 0  # else see `answering`
        )

    def answering(self) -> bool:
        """Whether demotions are in flight on a drive that is worth an idle engine's steps: for QUIET_S at first, then for each
        block that it takes as long as a brisk drive needs for one, but never longer ahead than QUIET_S. If that is used up and
        requests bring more to write, once more from the beginning, unless the drive was silent."""
        now = self._clock()
        return any(drive.demotions and now < drive.awaited_until for drive in self._drives)

    def states(self) -> Iterator[tuple[tuple[str, str], BreakerState]]:
        """By drive and direction."""
        for drive in self._drives:
            yield (str(drive.number), "read"), drive.reads.state
            yield (str(drive.number), "write"), drive.write_state

    # -- what happened -----------------------------------------------------------------------------------------

    def begin_demotion(self, drive: Drive) -> None:
        now = self._clock()
        if drive.demotions == 0 or drive.heard and now >= drive.awaited_until:
            drive.awaited_until, drive.heard = now + QUIET_S, False
        drive.demotions += 1
        drive.writes.begin()
        self._turn = (drive.number + 1) % len(self._drives)

    def end_demotion(self, drive: Drive, error: int) -> bool:
        """Returns whether the drive answered now, so that it has let go of earlier writes, late ones too.

        Any failed write stops writes to the drive, for the block can go to another. But not EBADMSG: the DRAM slot did not
        hold the block.
        """
        drive.demotions -= 1
        now = self._clock()
        drive.awaited_until, drive.heard = min(max(drive.awaited_until, now) + self._brisk_s, now + QUIET_S), True
        if error == errno.EBADMSG or error in NOT_ASKED or not drive.writes.counts:
            return False
        if error == errno.ENOSPC:
            drive.full_until = self._clock() + FULL_S
        if error:
            self._open(drive, "write", error)
        elif not drive.writes.closed:
            self._close(drive, "write")
        return error != errno.ETIMEDOUT

    def begin_load(self, drive: Drive) -> None:
        drive.loads += 1
        if not drive.reads.closed:
            drive.reads.begin()

    def end_load(self, drive: Drive, error: int) -> tuple[bool, bool]:
        """Returns whether the drive answered now, as `end_demotion`, and whether the block is to be forgotten.

        A late load stops reads at once: it cost its request seconds. One whose drive answered others (ETIME) says only that it is
        slow, unless it was a trial. An error stops them when it repeats. A block that the
        drive failed is kept, for it may be sound; but not one that failed as a trial or soon after one: if it were the cause,
        and much wanted, the drive would never be taken back.
        """
        drive.loads -= 1
        if error in NOT_ASKED:
            return False, False
        if error == errno.ETIME and drive.reads.closed:
            return False, False
        if not drive.reads.counts:
            return False, error == errno.EBADMSG
        if not error:
            drive.errors = drive.damaged = 0
            if not drive.reads.closed:
                self._close(drive, "read")
            return True, False
        answers = error not in LATE
        if answers and drive.reads.closed:
            drive.damaged += error == errno.EBADMSG
            drive.errors += error != errno.EBADMSG
            if drive.damaged < DAMAGED_MAX and drive.errors < ERRORS_MAX:
                return True, True
        self._open(drive, "read", error)
        return answers, drive.reads.again or error == errno.EBADMSG

    def forget_trials(self) -> None:
        if not self.all_well:
            for drive in self._drives:
                drive.forget_trial()

    def never_use(self) -> None:
        for drive in self._drives:
            drive.reads.never_close()
            drive.writes.never_close()
        self._look()

    def _open(self, drive: Drive, direction: str, error: int) -> None:
        reads = direction == "read"
        breaker = drive.reads if reads else drive.writes
        reason = errno.errorcode.get(error, str(error))
        if breaker.closed:  # else it is the trial that failed, and what there is to say was said
            then = "its blocks count as misses and nothing is written to it" if reads else "nothing is written to it"
            logger.warning("kvoffload: drive %s: %ss fail (%s): %s until a trial succeeds", drive.name, direction, reason, then)
        self._counters["kvoffload_drive_openings_total", str(drive.number), direction, reason] += 1
        breaker.trip()
        if reads:
            drive.trial_max = 1
        if reads and drive.writes.state is not BreakerState.OPEN:
            drive.writes.trip()
        drive.errors = drive.damaged = 0
        self._look()

    def _close(self, drive: Drive, direction: str) -> None:
        (drive.reads if direction == "read" else drive.writes).close()
        logger.warning("kvoffload: drive %s: %ss succeed again", drive.name, direction)
        self._look()

    def _look(self) -> None:
        """What hot paths ask: whether every breaker is closed, and whether some drive is written to without reserve."""
        self.all_well = all(drive.reads.closed and drive.writes.closed for drive in self._drives)
        self.writing = any(drive.writes.closed and drive.pool.count > 0 for drive in self._drives)
