#!/bin/sh
# Registers work pools, deployments and the automation with the Prefect server that PREFECT_API_URL names; run again after
# every change of prefect.yaml or of the template. What was paused stays paused. In the project's folder:
#
#   infra/register.sh process       workers that run groups as processes of their own machine
#   infra/register.sh kubernetes    workers that run them as Kubernetes jobs, by kubernetes/work-pool-template.json
set -eu

type=${1:?process or kubernetes}
automation="mtz: mark runs without heartbeat as crashed"
template=
[ "$type" != kubernetes ] || template=infra/kubernetes/work-pool-template.json

export PREFECT_CLI_PROMPT=false
for pool in mtz mtz-fleets; do
    if ! prefect work-pool inspect "$pool" >/dev/null 2>&1; then
        prefect work-pool create "$pool" --type "$type" ${template:+--base-job-template "$template"} >/dev/null
    elif [ -n "$template" ]; then
        prefect work-pool update "$pool" --base-job-template "$template" >/dev/null
    fi
    echo "work pool $pool: ready"
done

prefect deploy --all --prefect-file infra/prefect.yaml

if prefect automation inspect "$automation" >/dev/null 2>&1; then
    echo "automation: there already"
else
    prefect automation create --from-file infra/automations.yaml
fi
