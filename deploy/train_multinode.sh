#!/usr/bin/env bash
# Train on several hosts: the same line on each of them, host 0 among them. Run it where `python -m trainer.run` works (a checkout's .venv, or the trainer image).
# Usage: MASTER=HOST0[:PORT] HOSTS=2 [PROCESSES=8] [RESTARTS=3] [INTERFACE=eth0] ./deploy/train_multinode.sh [RECIPE] --data SOURCE --output SHARED_FOLDER [key=value ...]
#   MASTER     host 0, reachable from all; PORT is 29500 unless given. Where the hosts meet
#   HOSTS      how many hosts; the run begins when all are there
#   PROCESSES  on each: the number of its GPUs, or 1
#   RESTARTS   how often a run in which a process or a host was lost begins anew from the newest checkpoint: then host 0 must be up and --output be shared by all
#   INTERFACE  the network interface that the processes talk through: the one towards host 0 unless given
set -euo pipefail
die() { printf 'train_multinode: %s\n' "$*" >&2; exit 2; }

[ -n "${MASTER:-}" ] || die "MASTER is not set: MASTER=HOST0 names the host where all meet"
[[ ${HOSTS:-} =~ ^[1-9][0-9]*$ ]] || die "HOSTS is '${HOSTS:-}', wanted the number of hosts"
case "${1:-}" in '' | -h | --help) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
python=${PYTHON:-$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)/.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3) || die "no Python found: PYTHON=/path/to/python names it"
processes=${PROCESSES:-$(command -v nvidia-smi > /dev/null && nvidia-smi --list-gpus | wc -l || echo 1)}
[[ $processes =~ ^[1-9][0-9]*$ ]] || die "PROCESSES is '$processes', wanted a number from 1 on"
# What this host is called by the others: the address it reaches host 0 from, and the network interface that has it. Left to themselves, torchrun and gloo take what the
# host's own name resolves to: on many hosts 127.0.1.1, and a torchrun that does not find its own name in MASTER meets nobody.
facts=$("$python" - "$MASTER" << 'PYTHON'
import fcntl
import socket
import struct
import sys

host, _, port = sys.argv[1].partition(":")
port = port or "29500"
if not (port.isdecimal() and 0 < int(port) < 65536):
    sys.exit(f"train_multinode: the port of MASTER={sys.argv[1]} is no number of 1..65535")
try:
    there = socket.gethostbyname(host)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((there, int(port)))  # sends nothing: asks which way it would go
        here = probe.getsockname()[0]
except OSError as error:
    sys.exit(f"train_multinode: {host} cannot be reached from this host ({error}); wanted a name or IPv4 address that all hosts know")
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    for _, name in socket.if_nameindex():
        try:
            found = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
        except OSError:
            continue  # an interface without an IPv4 address
        if socket.inet_ntoa(found[20:24]) == here or (name == "lo" and here.startswith("127.")):
            print(f"{there}:{port}", here, name, str(here == there).lower())
            break
    else:
        sys.exit(f"train_multinode: no network interface has the address {here}")
PYTHON
) || exit 2
read -r address here interface is_host <<< "$facts"
export GLOO_SOCKET_IFNAME=${INTERFACE:-$interface} NCCL_SOCKET_IFNAME=${INTERFACE:-$interface}
# torchrun (2.14) keeps one store over its rounds and then gives a host that comes back no address: it would wait in vain.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec "$python" -m torch.distributed.run --nnodes="$HOSTS" --nproc-per-node="$processes" --max-restarts="${RESTARTS:-3}" \
  --rdzv-backend=c10d --rdzv-endpoint="$address" --rdzv-conf="is_host=$is_host" --rdzv-id="${RUN:-invprop}" --local-addr="$here" -m trainer.run "$@"
