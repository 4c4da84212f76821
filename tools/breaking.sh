#!/usr/bin/env bash
# Compares protos/ with the newest commit of main that is not this one's descendant; silent when there is none.
set -euo pipefail
cd "$(dirname "$0")/.."
base=$(git rev-parse --verify --quiet origin/main || git rev-parse --verify --quiet main || true)
if [[ -z "$base" ]] || ! git cat-file -e "$base:protos" 2>/dev/null; then
  echo "buf breaking: no earlier contract to compare with"
  exit 0
fi
old=$(mktemp -d)
trap 'rm -rf "$old"' EXIT
git archive "$base" protos | tar -x -C "$old"
.venv/bin/buf breaking protos --against "$old/protos"
