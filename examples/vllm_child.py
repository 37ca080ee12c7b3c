"""The children of vllm_process: a process that has imported vLLM, which takes longer than the rest of an engine's start, and
forks engines, each driven by lines of JSON on one pipe and answering on another.

A request is {"id", "op", ...arguments}, an answer {"id", "result"} or {"id", "error"}. Requests run side by side,
so that many can be in flight and one can abort another.
"""

import asyncio
import gc
import json
import multiprocessing.context as contexts
import os
import socket
import sys
import time
from typing import TextIO

import prometheus_client
from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

SHORT_SPIN_S = 0.002


class Child:
    def __init__(self, engine_args: dict, answers: int):
        transfer = engine_args.pop("kv_transfer_config", None)
        if transfer is not None:
            engine_args["kv_transfer_config"] = KVTransferConfig(**transfer)
        self.llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_args))
        self.answers = answers
        self.tasks: set[asyncio.Task] = set()
        self.accepted: dict[str, asyncio.Event] = {}  # by request id: vLLM knows the request, or has refused it

    def answer(self, **message) -> None:
        os.write(self.answers, json.dumps(message).encode() + b"\n")

    def start(self, id: int, op: str, **arguments) -> None:
        task = asyncio.create_task(getattr(self, f"op_{op}")(**arguments))
        self.tasks.add(task)
        task.add_done_callback(lambda task: self.finish(id, task))

    def finish(self, id: int, task: asyncio.Task) -> None:
        self.tasks.discard(task)
        if task.cancelled():
            return
        if error := task.exception():  # the engine died, or it refused the request
            self.answer(id=id, error=f"{type(error).__name__}: {error}")
        else:
            self.answer(id=id, result=task.result())

    async def op_generate(
        self,
        prompt: list[int],
        max_tokens: int,
        request_id: str,
        cache_salt: str | None,
        kv_transfer_params: dict | None,
        with_margins: bool,
    ) -> dict:
        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA,
            extra_args=kv_transfer_params and {"kv_transfer_params": kv_transfer_params}, logprobs=2 if with_margins else None,
        )  # fmt: skip
        inputs = {"prompt_token_ids": prompt}
        if cache_salt is not None:
            inputs["cache_salt"] = cache_salt
        tokens, margins, ttft_s = [], [], None
        self.accepted[request_id] = asyncio.Event()
        started = time.perf_counter()
        try:
            outputs = await self.llm.add_request(request_id, inputs, params)
        finally:
            self.accepted[request_id].set()
        finished = False
        while not finished:
            output = outputs.get_nowait() or await outputs.get()
            (completion,) = output.outputs
            if completion.token_ids and ttft_s is None:
                ttft_s = time.perf_counter() - started
            tokens.extend(completion.token_ids)
            margins.extend(margin(candidates) for candidates in completion.logprobs or ())
            finished = output.finished
        outputs.close()
        return {
            "request_id": request_id,
            "tokens": tokens,
            "ttft_s": ttft_s,
            "total_s": time.perf_counter() - started,
            "cached_tokens": output.num_cached_tokens,
            "finish_reason": completion.finish_reason,
            "margins": margins if with_margins else None,
        }

    async def op_abort(self, request_id: str) -> None:
        await self.accepted[request_id].wait()  # vLLM ignores an abort of a request it has not seen yet
        await self.llm.abort(request_id)

    async def op_metrics(self) -> list:
        families = prometheus_client.REGISTRY.collect()
        return [[sample.name, sample.labels, sample.value] for family in families for sample in family.samples]

    async def op_reset_prefix_cache(self, **options) -> bool:
        return await self.llm.reset_prefix_cache(**options)


def margin(candidates: dict) -> float:
    """By how much the likeliest token's logarithm of probability exceeds the next one's."""
    first, second = sorted((candidate.logprob for candidate in candidates.values()), reverse=True)[:2]
    return first - second


async def serve(first: dict, questions: TextIO, answers: int) -> None:
    if first["shares_cores"]:
        sleep_between_messages()
    started = time.perf_counter()
    child = Child(first["engine_args"], answers)
    child.answer(id=0, result={"start_s": time.perf_counter() - started})
    loop = asyncio.get_running_loop()
    # The parent ends us by closing the pipe, or by dying: both end this loop.
    while line := await loop.run_in_executor(None, questions.readline):
        child.start(**json.loads(line))
    for task in child.tasks:
        task.cancel()
    child.llm.shutdown(timeout=60)


def fork_instead_of_spawning() -> None:
    """On CPUs vLLM starts its engine core and its workers by spawning, so that each imports vLLM anew, which takes two
    thirds of a start. Elsewhere it forks them, and so do we; it must know, to close what a worker inherits."""
    contexts._concrete_contexts["spawn"] = contexts._concrete_contexts["fork"]


def sleep_between_messages() -> None:
    """For a second after each message vLLM's processes ask for the next one all the time, which takes a core. Those that come one
    after the other while a prompt is computed still find them awake."""
    SpinCondition.__init__.__defaults__ = (SHORT_SPIN_S,)


def become_engine(parent: socket.socket, questions: int, answers: int, log: int) -> None:
    """What a new process would have from its parent: a process group, a log and an environment of its own."""
    os.setsid()
    os.dup2(log, 1)  # whatever vLLM or its workers print
    os.dup2(log, 2)
    os.close(log)
    front_end = os.getpid()
    with parent:
        parent.send(str(front_end).encode())

    def close_answers() -> None:
        if os.getppid() == front_end:  # those that it forks have something else under this number when they fork
            os.close(answers)

    os.register_at_fork(after_in_child=close_answers)  # the pipe ends with this process
    with open(questions) as lines:
        first = json.loads(lines.readline())
        environment = first["environment"]
        for variable in os.environ.keys() - environment.keys():
            del os.environ[variable]
        for variable, value in environment.items() - os.environ.items():  # the others stay where setproctitle looks for them
            os.environ[variable] = value
        asyncio.run(serve(first, lines, answers))


def main() -> None:
    fork_instead_of_spawning()
    gc.freeze()  # collecting would write to pages that are shared
    parent = socket.socket(fileno=int(sys.argv[1]))
    while True:
        asked, files, *_ = socket.recv_fds(parent, 1, 3)
        if not asked:
            return
        for file in files:
            os.set_inheritable(file, False)
        # Engines that ended are not waited for: until this process ends, their numbers are given to nobody else.
        if os.fork() == 0:
            become_engine(parent, *files)
            return
        for file in files:
            os.close(file)


if __name__ == "__main__":
    main()
