#!/usr/bin/env bash
# Trains on a Ray cluster that is running, as a Ray job: survives the end of this shell.
#
#   RAY_ADDRESS=http://HEAD:8265 launch/examples/ray_job.sh config.yaml run.dir=/shared/runs/deep
#
# config.yaml and data sets must have paths that every host sees, and so must run.dir. The same
# command goes on with a run that was stopped or failed.
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: $0 CONFIG.yaml [key.sub=value ...]" >&2
    exit 2
fi
: "${RAY_ADDRESS:?set it to the dashboard of the cluster, such as http://head:8265}"
exec ray job submit --address "$RAY_ADDRESS" -- python -m launch ray --address auto "$@"
