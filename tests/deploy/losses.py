"""What is promised when a container dies, a store forgets, or callers dawdle."""

import time
from collections.abc import Callable

from load import Evaluators, Writers, slow_sockets
from stack import ANSWERS_AGAIN_S, ENDED_S, RUNNING, Report, Stack, query

FLUSH = 'REDISCLI_AUTH="$(cat /run/invprop/redis-password)" redis-cli --no-auth-warning flushall'


def losses(stack: Stack, report: Report) -> None:
    """Everything is killed once, Redis forgets all, PostgreSQL is restarted."""
    for service in RUNNING:
        loses(stack, report, f"{service} killed", kill(stack, service))
    loses(stack, report, "postgres restarted", lambda: stack.compose("restart", "postgres"))
    loses(stack, report, "redis flushed", lambda: stack.inside("redis", FLUSH))


def one_loss(stack: Stack, report: Report) -> None:
    """The service is killed."""
    loses(stack, report, "service killed", kill(stack, "service"))


def loses(stack: Stack, report: Report, name: str, blow: Callable[[], object]) -> None:
    """Strike the stack under load; nothing that was answered may be missing afterwards."""
    with Writers(stack, name.replace(" ", "_")) as writers, Evaluators(stack) as evaluators:
        evaluators.until_running()
        before = len(writers.acknowledged)
        began = time.monotonic()
        blow()
        stack.until_answers()
        again = time.monotonic() - began
        while (
            len(writers.acknowledged) <= before + 2
            and time.monotonic() - began < 2 * ANSWERS_AGAIN_S
        ):
            time.sleep(0.1)
        writes = time.monotonic() - began
        time.sleep(1)
    for what, seconds in (("searches answered", again), ("changes taken", writes)):
        report.add(
            f"{name}: {what} again",
            f"{seconds:.1f} s",
            f"<= {ANSWERS_AGAIN_S:.0f} s",
            seconds <= ANSWERS_AGAIN_S,
        )
    ended = stack.until_ended(evaluators.accepted, ENDED_S)
    statuses = sorted(each["status"] for each in ended.values())
    report.add(
        f"{name}: accepted evaluations",
        f"{', '.join(statuses)}; the last {time.monotonic() - began:.0f} s after the blow"
        f" (refused meanwhile: {', '.join(evaluators.refused[-3:]) or 0})",
        "all succeeded",
        len(statuses) == len(evaluators.accepted) > 0 and set(statuses) == {"succeeded"},
    )
    stack.up()
    lost = [item for item in writers.acknowledged if not stack.has(item)]
    report.add(
        f"{name}: answered items lost",
        f"{len(lost)} of {len(writers.acknowledged)} (meanwhile refused: {writers.refused or 0})",
        "0",
        not lost and len(writers.acknowledged) > 0,
    )


def kill(stack: Stack, service: str) -> Callable[[], object]:
    """SIGKILL to all but the init of a container, which then ends: the engine restarts it."""
    return lambda: stack.inside(service, "kill -9 -1", check=False)


def slow_callers(stack: Stack, report: Report, heads: int = 400, bodies: int = 100) -> None:
    """500 sockets that never finish, from the very address of the honest caller."""
    item = stack.first_id()
    quiet: list[float] = []
    beside: list[float] = []
    failed = 0
    for _ in range(3):
        failed += _honest(stack, item, quiet)
        with slow_sockets(stack.port, heads, bodies):
            failed += _honest(stack, item, beside)
    before, after = (sorted(each)[int(0.99 * len(each))] for each in (quiet, beside))
    report.add(
        f"{heads + bodies} slow sockets at the proxy: p99 of {len(beside)} honest searches",
        f"{1e3 * after:.1f} ms, quiet {1e3 * before:.1f} ms: {after / before:.2f} times",
        "<= 2 times",
        after <= 2 * before,
    )
    report.add("honest searches that failed meanwhile", str(failed), "0", failed == 0)


def _honest(stack: Stack, item: str, took: list[float], seconds: float = 15.0) -> int:
    """20 searches a second; appends their durations, returns how many failed."""
    failed, begin = 0, time.monotonic()
    for number in range(int(20 * seconds)):
        time.sleep(max(0.0, begin + number / 20 - time.monotonic()))
        began = time.monotonic()
        try:
            stack.ask("POST", "/neighbours", query(item))
        except (OSError, ValueError):
            failed += 1
        took.append(time.monotonic() - began)
    return failed
