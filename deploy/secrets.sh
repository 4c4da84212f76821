#!/bin/sh
# Makes the secrets of an installation, once: what is there already is kept.
#   sh deploy/secrets.sh FOLDER POSTGRES_HOST NATS_HOST [STORE_URL]
# FOLDER can be entered by its owner only. The files in it can be read by all, because containers get them one by one
# and run as other users.
set -eu
[ $# -ge 3 ] || { echo "usage: secrets.sh FOLDER POSTGRES_HOST NATS_HOST [STORE_URL]" >&2; exit 2; }
folder=$1 postgres=$2 nats=$3 store=${4:-}

mkdir -p "$folder"
chmod 700 "$folder"
umask 222

random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }
# The content comes from stdin; a file appears as a whole.
make() { [ -e "$folder/$1" ] || { rm -f "$folder/.$1" && cat >"$folder/.$1" && mv "$folder/.$1" "$folder/$1"; }; }
secret() { random | make "$1"; }

secret postgres_password
for service in version preprocess trainer metrics; do
  secret "${service}_password"
  echo "postgresql://$service:$(cat "$folder/${service}_password")@$postgres:5432/detflow" | make "${service}_database_url"
done

secret nats_token
echo "nats://$(cat "$folder/nats_token")@$nats:4222" | make nats_url
echo "authorization { token: \"$(cat "$folder/nats_token")\" }" | make nats_auth.conf

secret service_token # what the services show each other
secret owner_token   # yours: who has it may do everything

# Where objects are: at STORE_URL, else in the store that compose.yaml brings along. For another one add what it needs
# to store.env, such as AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
if [ -n "$store" ]; then
  echo "DETFLOW_STORE_URL=$store" | make store.env
else
  secret store_key
  make s3.json <<END
{"identities": [{"name": "detflow", "credentials": [{"accessKey": "detflow", "secretKey": "$(cat "$folder/store_key")"}],
  "actions": ["Admin", "Read", "Write", "List"]}]}
END
  make store.env <<END
DETFLOW_STORE_URL=s3://detflow/objects
AWS_ENDPOINT_URL=http://store:8333
AWS_ALLOW_HTTP=true
AWS_REGION=us-east-1
AWS_ACCESS_KEY_ID=detflow
AWS_SECRET_ACCESS_KEY=$(cat "$folder/store_key")
END
fi
