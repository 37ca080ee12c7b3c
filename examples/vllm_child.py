"""The child of vllm_process.VllmProcess: one vLLM engine, driven by lines of JSON on stdin, answering on stdout.

A request is {"id", "op", ...arguments}, an answer {"id", "result"} or {"id", "error"}. Requests run side by side,
so that many can be in flight and one can abort another.
"""

import asyncio
import json
import multiprocessing.context as contexts
import os
import sys
import time

# Whatever vLLM or its workers print goes to the log, also what older versions print while they are imported; the pipe carries
# answers only.
PIPE = os.dup(1)
os.set_inheritable(PIPE, False)
os.dup2(2, 1)

import prometheus_client  # noqa: E402
from vllm import SamplingParams  # noqa: E402
from vllm.config import KVTransferConfig  # noqa: E402
from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: E402
from vllm.sampling_params import RequestOutputKind  # noqa: E402
from vllm.v1.engine.async_llm import AsyncLLM  # noqa: E402


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

    async def op_reset_prefix_cache(self) -> bool:
        return await self.llm.reset_prefix_cache()


def margin(candidates: dict) -> float:
    """By how much the likeliest token's logarithm of probability exceeds the next one's."""
    first, second = sorted((candidate.logprob for candidate in candidates.values()), reverse=True)[:2]
    return first - second


async def serve(engine_args: dict, answers: int) -> None:
    started = time.perf_counter()
    child = Child(engine_args, answers)
    child.answer(id=0, result={"start_s": time.perf_counter() - started})
    loop = asyncio.get_running_loop()
    # The parent ends us by closing the pipe, or by dying: both end this loop.
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        child.start(**json.loads(line))
    for task in child.tasks:
        task.cancel()
    child.llm.shutdown(timeout=60)


def fork_instead_of_spawning() -> None:
    """On CPUs vLLM starts its engine core and its workers by spawning, so that each imports vLLM anew, which takes two
    thirds of a start. Elsewhere it forks them, and so do we."""
    contexts.SpawnProcess._Popen = staticmethod(contexts.ForkProcess._Popen)


if __name__ == "__main__":
    fork_instead_of_spawning()
    asyncio.run(serve(json.loads(sys.stdin.readline()), PIPE))
