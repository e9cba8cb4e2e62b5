#!/bin/sh
# Makes the bucket, or brings it up to date: object lock with a default retention, lifecycle, policy. Needs the AWS CLI
# and an administrator's credentials; run it again after every change of the files beside it.
#
#   BUCKET       mtz by default
#   PREFIX       storage.prefix of params.yaml, if it has one
#   WORKER_ARN   who runs the pipeline,        by default arn:aws:iam::000000000000:user/worker
#   READER_ARN   who may look at everything,   by default arn:aws:iam::000000000000:user/reader
#   AWS_ENDPOINT_URL_S3   the server; AWS itself where it is not set
set -eu

here=$(cd "$(dirname "$0")" && pwd)
bucket=${BUCKET:-mtz}
prefix=${PREFIX:+${PREFIX%/}/}
region=${AWS_REGION:-${AWS_DEFAULT_REGION:-us-east-1}}

if aws s3api head-bucket --bucket "$bucket" >/dev/null 2>&1; then
    echo "bucket $bucket: there already"
elif [ "$region" = us-east-1 ]; then
    # On AWS a bucket can be given object lock at any time, on other servers often only now.
    aws s3api create-bucket --bucket "$bucket" --object-lock-enabled-for-bucket >/dev/null
else
    aws s3api create-bucket --bucket "$bucket" --object-lock-enabled-for-bucket \
        --create-bucket-configuration "LocationConstraint=$region" >/dev/null
fi

aws s3api put-bucket-versioning --bucket "$bucket" --versioning-configuration Status=Enabled
aws s3api put-object-lock-configuration --bucket "$bucket" --object-lock-configuration "file://$here/object-lock.json"
aws s3api put-bucket-lifecycle-configuration --bucket "$bucket" --lifecycle-configuration "file://$here/lifecycle.json" \
    >/dev/null

policy=$(sed \
    -e "s|arn:aws:s3:::mtz/|arn:aws:s3:::$bucket/$prefix|" \
    -e "s|arn:aws:s3:::mtz\"|arn:aws:s3:::$bucket\"|" \
    -e "s|arn:aws:iam::000000000000:user/worker|${WORKER_ARN:-arn:aws:iam::000000000000:user/worker}|" \
    -e "s|arn:aws:iam::000000000000:user/reader|${READER_ARN:-arn:aws:iam::000000000000:user/reader}|" \
    "$here/bucket-policy.json")
aws s3api put-bucket-policy --bucket "$bucket" --policy "$policy"

if [ -z "${AWS_ENDPOINT_URL_S3:-}" ]; then
    aws s3api put-public-access-block --bucket "$bucket" --public-access-block-configuration \
        BlockPublicAcls=true,IgnorePublicAcls=true,BlockPublicPolicy=true,RestrictPublicBuckets=true
fi
echo "bucket $bucket: locked, with lifecycle and policy"
