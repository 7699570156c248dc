#!/usr/bin/env bash
# torchrun on several hosts: run this on every one of them, with the same arguments.
#
#   HEAD_HOST=host-0 NNODES=2 RANKS_PER_NODE=4 launch/examples/multi_host.sh config.yaml ...
#
# A rank that fails starts all ranks again, on all hosts, from the newest checkpoint in run.dir,
# which every host must see. NETWORK_INTERFACE chooses the network for gloo and NCCL,
# LOCAL_ADDRESS is where the others find this host if its name does not tell them; HEAD_HOST is
# then an address as well.
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: HEAD_HOST=... NNODES=... RANKS_PER_NODE=... $0 CONFIG.yaml [key.sub=value ...]" >&2
    exit 2
fi
: "${HEAD_HOST:?name or address of one of the hosts}" "${NNODES:?number of hosts}"
if [ -n "${NETWORK_INTERFACE:-}" ]; then
    export GLOO_SOCKET_IFNAME="$NETWORK_INTERFACE" NCCL_SOCKET_IFNAME="$NETWORK_INTERFACE"
fi
address=()
if [ -n "${LOCAL_ADDRESS:-}" ]; then
    is_head=0
    [ "$LOCAL_ADDRESS" != "$HEAD_HOST" ] || is_head=1
    address=(--local-addr "$LOCAL_ADDRESS" --rdzv-conf "is_host=$is_head")
fi
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "$NNODES" \
    --nproc_per_node "${RANKS_PER_NODE:-1}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$HEAD_HOST:${PORT:-29400}" \
    --rdzv-id "${RUN_ID:-${SLURM_JOB_ID:-gnnpipe}}" \
    --max-restarts "${MAX_RESTARTS:-3}" \
    "${address[@]}" \
    -m gnnpipe train "$@"
