#!/usr/bin/env bash
# Generates detflow/v1 and buf/validate from protos/. With --check: fails if the committed stubs differ.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
export PATH="$PWD/.venv/bin:$PATH"
python -m grpc_tools.protoc -Iprotos -Iprotos/third_party \
  --python_out="$out" --mypy_out="$out" --grpc_python_out="$out" --mypy_grpc_out="$out" \
  protos/detflow/v1/*.proto
python -m grpc_tools.protoc -Iprotos/third_party --python_out="$out" --mypy_out="$out" \
  protos/third_party/buf/validate/validate.proto
# Files without a service get empty gRPC stubs; they are noise.
grep -L '^class .*Servicer' "$out"/detflow/v1/*_pb2_grpc.py | while read -r f; do rm -f "$f" "${f}i"; done
touch "$out/detflow/v1/__init__.py" "$out/buf/__init__.py" "$out/buf/validate/__init__.py"
if [[ "${1:-}" == --check ]]; then
  diff -r --exclude=__pycache__ "$out/detflow/v1" detflow/v1
  diff -r --exclude=__pycache__ "$out/buf" buf
else
  rm -rf detflow/v1 buf
  cp -r "$out/detflow/v1" detflow/v1
  cp -r "$out/buf" buf
fi
