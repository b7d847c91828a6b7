#!/usr/bin/env bash
# Train on several hosts: the same line on each of them, host 0 among them. Run it where `python -m trainer.run` works (a checkout's .venv, or the trainer image).
# Usage: MASTER=HOST0[:PORT] HOSTS=2 [PROCESSES=8] [RESTARTS=3] [INTERFACE=eth0] ./deploy/train_multinode.sh [RECIPE] --data SOURCE --output SHARED_FOLDER [key=value ...]
#   MASTER     host 0, reachable from all; PORT is 29500 unless given. Where the hosts meet
#   HOSTS      how many hosts; the run begins when all are there
#   PROCESSES  on each: the number of its GPUs, or 1
#   RESTARTS   how often a run in which a process or a host was lost begins anew from the newest checkpoint: then host 0 must be up and --output be shared by all
#   INTERFACE  the network that the processes talk through, where there are several
set -euo pipefail
die() { printf 'train_multinode: %s\n' "$*" >&2; exit 2; }

[ -n "${MASTER:-}" ] || die "MASTER is not set: MASTER=HOST0 names the host where all meet"
[[ ${HOSTS:-} =~ ^[1-9][0-9]*$ ]] || die "HOSTS is '${HOSTS:-}', wanted the number of hosts"
case "${1:-}" in '' | -h | --help) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
python=${PYTHON:-$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)/.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3) || die "no Python found: PYTHON=/path/to/python names it"
processes=${PROCESSES:-$(command -v nvidia-smi > /dev/null && nvidia-smi --list-gpus | wc -l || echo 1)}
address=$MASTER
[[ $address == *:* ]] || address=$address:29500
# torchrun knows host 0 by its host name alone; an address of another interface would leave nobody to meet at.
is_host=false
for one in $(getent ahosts "${address%:*}" | awk '{ print $1 }' | sort -u); do
  case " $(hostname -I) 127.0.0.1 ::1 " in *" $one "*) is_host=true ;; esac
done
if [ -n "${INTERFACE:-}" ]; then export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE; fi

exec "$python" -m torch.distributed.run --nnodes="$HOSTS" --nproc-per-node="$processes" --max-restarts="${RESTARTS:-3}" \
  --rdzv-backend=c10d --rdzv-endpoint="$address" --rdzv-conf="is_host=$is_host" --rdzv-id="${RUN:-invprop}" -m trainer.run "$@"
