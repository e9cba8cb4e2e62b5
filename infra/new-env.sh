#!/bin/sh
# Writes infra/.env, readable by its owner only: .env.example with a random value for each password and key.
set -eu

cd "$(dirname "$0")"
[ ! -e .env ] || { echo "infra/.env is there already; remove it first, or change single values by hand" >&2; exit 1; }
umask 077
while IFS= read -r line; do
    case $line in
        *_PASSWORD= | *_KEY=) echo "$line$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')" ;;
        *) echo "$line" ;;
    esac
done < .env.example > .env.partial
mv .env.partial .env
echo "infra/.env written"
