"""A vLLM engine in a process group of its own: start it, ask it, kill it. Used by the demo and the end-to-end tests.

    with VllmProcess(model, {"nvme_path": "/mnt/nvme", "ssd_kv_offload_gb": 1}, num_gpu_blocks_override=128) as engine:
        (answer,) = engine.generate([prompt], max_tokens=16)
        print(answer.ttft_s, answer.cached_tokens, engine.metrics().sum("vllm:prompt_tokens_cached_by_source_total"))
"""

import atexit
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import psutil

ROOT = Path(__file__).resolve().parent.parent
CHILD = Path(__file__).with_name("vllm_child.py")
CONNECTOR = "KVOffloadConnector"
CONNECTOR_MODULE = "kvoffload.vllm.connector"

ENGINE_DEFAULTS = {
    "dtype": "float32",  # in bfloat16 a small random model answers in ties
    "block_size": 32,  # the CPU attention backend wants a multiple of 32
    "max_model_len": 3072,
    "enforce_eager": True,  # compiling would add minutes to the start
    "seed": 0,
}
START_TIMEOUT_S = 300
ANSWER_TIMEOUT_S = 300
END_TIMEOUT_S = 300
# These only say that some other process failed; the sentence worth showing is that process's.
NOT_THE_CAUSE = ("Engine core initialization failed", "WorkerProc initialization failed", "Worker failed with error")


class EngineError(RuntimeError):
    """The engine did not start, refused a request or died; the message holds its last error sentences."""


@dataclass(frozen=True)
class Answer:
    request_id: str
    tokens: list[int]
    ttft_s: float | None  # None: no token came, the request was aborted
    total_s: float
    cached_tokens: int  # of the prompt, found in the GPU pool or loaded by the connector
    finish_reason: str | None
    margins: list[float] | None  # per token: how much likelier it was than the next, in logarithms; None: not asked for


class Metrics:
    """Prometheus samples of the engine at one moment."""

    def __init__(self, samples: list):
        self.samples: list[tuple[str, dict[str, str], float]] = [tuple(sample) for sample in samples]

    def sum(self, name: str, **labels: str) -> float:
        """Over all samples of that name that carry these labels; 0 if there are none."""
        return sum(
            value
            for sample, its_labels, value in self.samples
            if sample == name and labels.items() <= its_labels.items()
        )

    def names(self) -> set[str]:
        return {name for name, _, _ in self.samples}


def cpu_binding(ranks: int) -> str:
    """An equal share of the CPUs we may use for each rank, for VLLM_CPU_OMP_THREADS_BIND."""
    cpus = sorted(os.sched_getaffinity(0))
    share = len(cpus) // ranks
    if share == 0:
        return "nobind"
    return "|".join(",".join(map(str, cpus[rank * share : (rank + 1) * share])) for rank in range(ranks))


def child_environment(ranks: int) -> dict[str, str]:
    ours = {
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",  # engines share cores: threads that wait by spinning take them from the others
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": cpu_binding(ranks),
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "36000",  # the time it is stopped counts, see awake()
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    return {**os.environ, **ours}


def transfer_config(connector_config: dict, with_module_path: bool) -> dict:
    config = {"kv_connector": CONNECTOR, "kv_role": "kv_both", "kv_connector_extra_config": connector_config}
    if with_module_path:
        config["kv_connector_module_path"] = CONNECTOR_MODULE
    return config


class Zygote:
    """A process that has imported vLLM in an environment, and forks engines. Thread-safe."""

    def __init__(self, environment: dict[str, str], log: BinaryIO):
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(START_TIMEOUT_S)
        command = [sys.executable, str(CHILD), str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )
        atexit.register(self._close)

    def fork(self, questions: int, answers: int, log: int) -> int:
        """The number of an engine's first process, which is that of its process group. OSError: vLLM cannot be imported, or not in
        START_TIMEOUT_S; then this process is at its end."""
        number = b""
        with self._lock:
            try:
                socket.send_fds(self._socket, [b"f"], [questions, answers, log])
                number = self._socket.recv(32)
            finally:
                if not number:  # else the next one would be told the number of this one
                    self._close()
        if not number:
            raise ConnectionError
        return int(number)

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def _close(self) -> None:
        """What it forked lives on."""
        self._socket.close()
        self._process.kill()
        self._process.wait()


# What an engine reads from its environment only after vLLM is imported. The rest, which many read when they are loaded, must be as
# it is where vLLM was.
READ_LATE = ("KVO", "PYTEST_", "VLLM_CPU_")
zygotes: dict[frozenset, Zygote] = {}  # by the rest of their environments
zygotes_lock = threading.Lock()


def zygote(environment: dict[str, str], log: BinaryIO) -> Zygote:
    """One for engines with this environment. The log of the first of them is its log, too."""
    key = frozenset(variable for variable in environment.items() if not variable[0].startswith(READ_LATE))
    with zygotes_lock:
        if key not in zygotes or zygotes[key].has_ended():
            zygotes[key] = Zygote(environment, log)
        return zygotes[key]


class VllmProcess:
    def __init__(
        self,
        model: Path,
        connector_config: dict | None = None,  # None: vLLM without kvoffload
        *,
        with_module_path: bool = False,  # the plugin makes the connector's name enough
        env: dict[str, str] | None = None,
        log: Path | None = None,
        shares_cores: bool = False,  # with other engines that are asked at the same time
        **engine_args,
    ):
        self.engine_args = {**ENGINE_DEFAULTS, "model": str(model), **engine_args}
        if connector_config is not None:
            self.engine_args["kv_transfer_config"] = transfer_config(connector_config, with_module_path)
        self.log = log or Path(tempfile.mkstemp(prefix="vllm-", suffix=".log")[1])
        self._env = {**child_environment(engine_args.get("tensor_parallel_size", 1)), **(env or {})}
        self._shares_cores = shares_cores
        self._lock = threading.Lock()
        self._waiting: dict[int, Future] = {}
        self._last_id = 0
        self._requests = 0
        self._ended = False
        self._start()

    # Life

    def _start(self) -> None:
        their_questions, our_questions = os.pipe()
        our_answers, their_answers = os.pipe()
        self._questions, self._answers = open(our_questions, "wb"), open(our_answers, "rb")
        self.log.write_bytes(b"")
        with self.log.open("ab") as log:  # appending, for what its zygote says later goes there, too
            try:
                self._group = zygote(self._env, log).fork(their_questions, their_answers, log.fileno())
            except OSError:
                self._ended = True
                self._questions.close()
                self._answers.close()
                late = f"vLLM cannot be imported within {START_TIMEOUT_S} s, see {self.log}"
                raise EngineError("\n".join(self.error_sentences()) or late) from None
            finally:
                os.close(their_questions)
                os.close(their_answers)
        atexit.register(self.kill9)
        started = self._waiting[0] = Future()
        self._reader = threading.Thread(target=self._read_answers, daemon=True)
        self._reader.start()
        self._send({"environment": self._env, "engine_args": self.engine_args, "shares_cores": self._shares_cores})
        try:
            self.start_s = started.result(START_TIMEOUT_S)["start_s"]
        except TimeoutError:
            self.kill9()
            raise EngineError(f"vLLM did not start within {START_TIMEOUT_S} s, see {self.log}") from None
        except EngineError:
            self.kill9()
            raise

    def shutdown(self) -> None:
        """Let the engine end in order: the connector is told, and what it must write it can write."""
        if self._ended:
            return
        with contextlib.suppress(BrokenPipeError):
            self._questions.close()
        self._reader.join(END_TIMEOUT_S)
        late = self._reader.is_alive()
        self.kill9()  # stragglers
        if late:
            raise EngineError(f"vLLM did not end within {END_TIMEOUT_S} s, see {self.log}")

    def kill9(self) -> None:
        """SIGKILL to the front end, the engine core and every worker at once."""
        if self._ended:
            return
        self._ended = True
        atexit.unregister(self.kill9)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._group, signal.SIGKILL)
        self._wait_for_group()
        self._reader.join()
        with contextlib.suppress(BrokenPipeError):
            self._questions.close()
        self._answers.close()

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Stops all processes of the engine except within this context: an idle vLLM keeps a quarter of a core busy."""
        os.killpg(self._group, signal.SIGCONT)
        try:
            yield
        finally:
            os.killpg(self._group, signal.SIGSTOP)

    def _wait_for_group(self) -> None:
        """Grandchildren are reaped by init; until then they may hold locks and files."""
        deadline = time.monotonic() + END_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                os.killpg(self._group, 0)
            except ProcessLookupError:
                return
            if not any(_in_group(process, self._group) for process in psutil.process_iter(["status"])):
                return
            time.sleep(0.02)
        raise EngineError(f"processes of group {self._group} outlived SIGKILL")

    def __enter__(self) -> "VllmProcess":
        return self

    def __exit__(self, *exception) -> None:
        self.shutdown()

    # Questions

    def submit(
        self,
        prompt: list[int],
        max_tokens: int = 16,
        request_id: str | None = None,
        cache_salt: str | None = None,
        kv_transfer_params: dict | None = None,
        with_margins: bool = False,
    ) -> "Future[dict]":
        """Start one request and return at once; `answer(future)` waits for it."""
        with self._lock:
            self._requests += 1
            request_id = request_id or f"request-{self._requests}"
        arguments = {"prompt": list(prompt), "max_tokens": max_tokens, "cache_salt": cache_salt}
        options = {"kv_transfer_params": kv_transfer_params, "with_margins": with_margins}
        return self._ask("generate", request_id=request_id, **arguments, **options)

    @staticmethod
    def answer(future: "Future[dict]", timeout_s: float = ANSWER_TIMEOUT_S) -> Answer:
        return Answer(**future.result(timeout_s))

    def generate(self, prompts: list[list[int]], max_tokens: int = 16, concurrency: int = 1, **options) -> list[Answer]:
        """Answers in the order of `prompts`, at most `concurrency` of them in flight."""
        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(lambda prompt: self.answer(self.submit(prompt, max_tokens, **options)), prompts))

    def abort(self, request_id: str) -> None:
        self._ask("abort", request_id=request_id).result(ANSWER_TIMEOUT_S)

    def metrics(self) -> Metrics:
        return Metrics(self._ask("metrics").result(ANSWER_TIMEOUT_S))

    def reset_gpu_prefix_cache(self, timeout_s: float = 10) -> None:
        """Forget the prefixes in GPU memory; what the connector holds stays. Refused while blocks are being read."""
        deadline = time.monotonic() + timeout_s
        while not self._ask("reset_prefix_cache").result(ANSWER_TIMEOUT_S):
            if time.monotonic() > deadline:
                raise EngineError("vLLM would not reset its prefix cache: blocks are still in use")
            time.sleep(0.05)

    def reset_preempting(self) -> bool:
        """Forget the prefixes in GPU memory, and have requests that are at work compute, or load, theirs again."""
        return self._ask("reset_prefix_cache", reset_running_requests=True).result(ANSWER_TIMEOUT_S)

    def processes(self) -> list[psutil.Process]:
        """The front end first, then the engine core, workers and helpers."""
        parent = psutil.Process(self._group)
        return [parent, *parent.children(recursive=True)]

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def error_sentences(self) -> list[str]:
        """What exceptions said in the log, the root cause first, each once."""
        found = re.findall(r"(?:^|\] |\) )((?:\w+\.)*\w*(?:Error|Exception): .+)$", self.log_text(), re.MULTILINE)
        causes = [line for line in dict.fromkeys(found) if not any(phrase in line for phrase in NOT_THE_CAUSE)]
        return causes or found

    # The pipe

    def _ask(self, op: str, **arguments) -> Future:
        future: Future = Future()
        with self._lock:
            self._last_id += 1
            request = self._last_id
            if self._ended:
                raise EngineError("the engine has been shut down")
            self._waiting[request] = future
        self._send({"id": request, "op": op, **arguments})
        return future

    def _send(self, message: dict) -> None:
        line = json.dumps(message).encode() + b"\n"
        with self._lock, contextlib.suppress(BrokenPipeError):  # the reader reports why the child has gone
            self._questions.write(line)
            self._questions.flush()

    def _read_answers(self) -> None:
        for line in self._answers:
            message = json.loads(line)
            with self._lock:
                future = self._waiting.pop(message["id"])
            if "error" in message:
                future.set_exception(EngineError(message["error"]))
            else:
                future.set_result(message["result"])
        with self._lock:
            waiting, self._waiting = list(self._waiting.values()), {}
        sentences = "\n".join(self.error_sentences()) or f"vLLM ended, see {self.log}"
        for future in waiting:
            future.set_exception(EngineError(sentences))


def _in_group(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE
    except ProcessLookupError:
        return False
