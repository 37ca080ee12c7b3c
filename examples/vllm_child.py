"""The child of vllm_process.VllmProcess: one vLLM engine, driven by lines of JSON on stdin, answering on stdout.

A request is {"id", "op", ...arguments}, an answer {"id", "result"} or {"id", "error"}. Requests run side by side,
so that many can be in flight and one can abort another.
"""

import asyncio
import json
import os
import sys
import time

import prometheus_client
from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM


class Child:
    def __init__(self, engine_args: dict, answers: int):
        transfer = engine_args.pop("kv_transfer_config", None)
        if transfer is not None:
            engine_args["kv_transfer_config"] = KVTransferConfig(**transfer)
        self.llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_args))
        self.answers = answers

    def answer(self, **message) -> None:
        os.write(self.answers, json.dumps(message).encode() + b"\n")

    async def run(self, id: int, op: str, **arguments) -> None:
        try:
            result = await getattr(self, f"op_{op}")(**arguments)
        except (RuntimeError, ValueError, TypeError) as error:  # the engine died, or it refuses the request
            self.answer(id=id, error=f"{type(error).__name__}: {error}")
        else:
            self.answer(id=id, result=result)

    async def op_generate(self, prompt: list[int], max_tokens: int, request_id: str, cache_salt: str | None) -> dict:
        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        inputs = {"prompt_token_ids": prompt}
        if cache_salt is not None:
            inputs["cache_salt"] = cache_salt
        tokens, ttft_s, cached, reason = [], None, 0, None
        started = time.perf_counter()
        async for output in self.llm.generate(inputs, params, request_id):
            (completion,) = output.outputs
            if completion.token_ids and ttft_s is None:
                ttft_s = time.perf_counter() - started
            tokens.extend(completion.token_ids)
            cached, reason = output.num_cached_tokens, completion.finish_reason
        return {
            "request_id": request_id,
            "tokens": tokens,
            "ttft_s": ttft_s,
            "total_s": time.perf_counter() - started,
            "cached_tokens": cached,
            "finish_reason": reason,
        }

    async def op_abort(self, request_id: str) -> None:
        await self.llm.abort(request_id)

    async def op_metrics(self) -> list:
        families = prometheus_client.REGISTRY.collect()
        return [[sample.name, sample.labels, sample.value] for family in families for sample in family.samples]

    async def op_reset_prefix_cache(self) -> bool:
        return await self.llm.reset_prefix_cache()


async def serve(engine_args: dict, answers: int) -> None:
    started = time.perf_counter()
    child = Child(engine_args, answers)
    child.answer(id=0, result={"start_s": time.perf_counter() - started})
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task] = set()
    # The parent ends us by closing the pipe, or by dying: both end this loop.
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        task = asyncio.create_task(child.run(**json.loads(line)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    for task in list(tasks):
        task.cancel()
    child.llm.shutdown(timeout=60)


if __name__ == "__main__":
    # Whatever vLLM or its workers print goes to the log; the pipe carries answers only.
    pipe = os.dup(1)
    os.set_inheritable(pipe, False)
    os.dup2(2, 1)
    asyncio.run(serve(json.loads(sys.stdin.readline()), pipe))
