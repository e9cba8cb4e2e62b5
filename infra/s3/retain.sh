#!/bin/sh
# Keeps a release for so many days, in COMPLIANCE mode: until then nobody can delete it, administrators included, and the
# time can be made longer but never shorter. Needs the AWS CLI and an administrator's credentials.
#
#   retain.sh releases/MODEL/DIGEST DAYS
#
#   BUCKET, AWS_ENDPOINT_URL_S3   as in setup.sh; the folder is relative to the bucket, storage.prefix included
set -eu

[ $# -eq 2 ] || { echo "usage: $0 releases/MODEL/DIGEST DAYS" >&2; exit 2; }
folder=${1%/}/
bucket=${BUCKET:-mtz}
until=$(date -u -d "@$(($(date +%s) + $2 * 86400))" +%Y-%m-%dT%H:%M:%SZ)

versions=$(aws s3api list-object-versions --bucket "$bucket" --prefix "$folder" \
    --query 'Versions[].[Key,VersionId]' --output text)
[ "$versions" != None ] || { echo "there is nothing at s3://$bucket/$folder" >&2; exit 1; }

tab=$(printf '\t')
echo "$versions" | while IFS=$tab read -r key version; do
    aws s3api put-object-retention --bucket "$bucket" --key "$key" --version-id "$version" \
        --retention "Mode=COMPLIANCE,RetainUntilDate=$until" --bypass-governance-retention
    echo "$key: kept until $until"
done
