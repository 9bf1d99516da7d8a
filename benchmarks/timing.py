"""Timing calls on a GPU: in turns, so that a clock that falls with the heat falls for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[int], Any]  # takes the number of the call, by which it picks its inputs


def those_that_run(calls: dict[str, Call]) -> dict[str, Call]:
    """The calls that work here; says why of those that do not."""
    runnable: dict[str, Call] = {}
    for name, call in calls.items():
        try:
            call(0)
            torch.cuda.synchronize()
            runnable[name] = call
        except (ImportError, RuntimeError, AttributeError, TypeError, ValueError, AssertionError) as error:
            print(f"{name} left out: {type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}")
    return runnable


def take_turns(calls: dict[str, Call], rounds: int, per_round: int) -> dict[str, list[float]]:
    """Milliseconds of a call, once per round and name; the first call of a turn is not timed."""
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            call(0)
            start.record()
            for i in range(per_round):
                call(i + 1)
            stop.record()
            events[name].append((start, stop))
    torch.cuda.synchronize()
    return {
        name: [start.elapsed_time(stop) / per_round for start, stop in of_rounds] for name, of_rounds in events.items()
    }


def host_microseconds(call: Call, count: int = 50) -> float:
    """Time the host spends on a call, with the device left behind."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(count):
        call(i)
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return spent / count * 1e6


def graph_milliseconds(call: Call, replays: int = 20) -> float:
    """Time of a call replayed in a CUDA graph: the kernel without the host."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(0)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(4):
            call(i)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    start.record()
    for _ in range(replays):
        graph.replay()
    stop.record()
    torch.cuda.synchronize()
    return round(start.elapsed_time(stop) / replays / 4, 5)


def peak_mib(call: Call) -> float:
    """Device memory a call takes at most, its output included, on top of its inputs."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(0)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
