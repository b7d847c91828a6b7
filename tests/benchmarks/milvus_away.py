"""How soon a client of Milvus notices that its server is back, when that was away without a word.

    python tests/benchmarks/milvus_away.py [--rounds 3]  as root, with iproute2 and iptables

A gRPC server in a network namespace of its own, and two channels to it: with pymilvus' options, and
with what service.gallery.milvus adds. Each calls five times a second. Again and again every packet
is dropped, the server is killed, another one started, and the packets let through. Printed: seconds
from that moment to the first answer on each channel, both of the same outage.
"""

import argparse
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import grpc

from service.gallery.milvus import GRPC_OPTIONS

AWAY_S = (20, 60, 180)
HOST, SERVER, PORT = "10.77.9.1", "10.77.9.2", 50051
GIVE_UP_S = 150.0
# What pymilvus sets on its own; pings of an idle client are refused by servers with gRPC's limits.
PYMILVUS = {
    "grpc.keepalive_time_ms": 10_000,
    "grpc.keepalive_timeout_ms": 5_000,
    "grpc.keepalive_permit_without_calls": False,
}
# Else two channels of one process to one server may share what connects.
ALONE = {"grpc.use_local_subchannel_pool": 1}
PROGRAM = f"""
from concurrent import futures
import grpc
class Echo(grpc.GenericRpcHandler):
    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(lambda request, context: request)
server = grpc.server(futures.ThreadPoolExecutor(4))
server.add_generic_rpc_handlers((Echo(),))
server.add_insecure_port("0.0.0.0:{PORT}")
server.start()
print("up", flush=True)
server.wait_for_termination()
"""


class Caller:
    """One channel, and when its calls were answered."""

    def __init__(self, options: dict[str, object]) -> None:
        self._channel = grpc.insecure_channel(f"{SERVER}:{PORT}", options=list(options.items()))
        self._call = self._channel.unary_unary("/milvus/echo")
        self._call(b"", timeout=10)
        self._ending = threading.Event()
        self._answers: list[float] = []  # when
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ending.wait(0.2):
            with suppress(grpc.RpcError):  # the server is away: that is what is measured
                self._call(b"", timeout=10)
                self._answers.append(time.monotonic())

    def answers_after_s(self, moment: float) -> float:
        """Seconds from a moment to the first answer after it."""
        while time.monotonic() - moment < GIVE_UP_S:
            for answered in self._answers:
                if answered > moment:
                    return answered - moment
            time.sleep(0.01)
        return float("inf")

    def close(self) -> None:
        self._ending.set()
        self._thread.join()
        self._channel.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    kinds = {"pymilvus": PYMILVUS | ALONE, "ours": PYMILVUS | ALONE | dict(GRPC_OPTIONS)}
    took: dict[str, list[float]] = {name: [] for name in kinds}
    with another_host() as namespace:
        server = serve(namespace)
        callers = {name: Caller(dict(options)) for name, options in kinds.items()}
        try:
            for away_s in AWAY_S * rounds:
                time.sleep(3)
                drop(namespace, "-A")
                server.kill()
                server.wait()
                time.sleep(away_s)
                server = serve(namespace)
                drop(namespace, "-D")
                moment = time.monotonic()
                for name, caller in callers.items():
                    took[name].append(caller.answers_after_s(moment))
                seen = ", ".join(f"{name} {took[name][-1]:.1f} s" for name in kinds)
                print(f"away for {away_s} s: answered after {seen}", flush=True)
        finally:
            for caller in callers.values():
                caller.close()
            server.kill()
            server.wait()
    for name, seconds in took.items():
        print(f"{name}: median {statistics.median(seconds):.1f} s, longest {max(seconds):.1f} s")


@contextmanager
def another_host() -> Iterator[str]:
    """A network namespace behind a cable."""
    name = f"away-{uuid.uuid4().hex[:6]}"
    ours, theirs = f"{name[-6:]}-a", f"{name[-6:]}-b"
    ip("netns", "add", name)
    try:
        ip("link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", name)
        ip("addr", "add", f"{HOST}/24", "dev", ours)
        ip("link", "set", ours, "up")
        ip("-n", name, "addr", "add", f"{SERVER}/24", "dev", theirs)
        ip("-n", name, "link", "set", theirs, "up")
        yield name
    finally:
        ip("netns", "del", name)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def drop(namespace: str, how: str) -> None:
    """Drop every packet, in (`-A`), or no longer (`-D`)."""
    for chain in ("INPUT", "OUTPUT"):
        ip("netns", "exec", namespace, "iptables", how, chain, "-j", "DROP")


def serve(namespace: str) -> "subprocess.Popen[str]":
    command = ["ip", "netns", "exec", namespace, sys.executable, "-c", PROGRAM]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert server.stdout.readline() == "up\n"
    return server


if __name__ == "__main__":
    main()
