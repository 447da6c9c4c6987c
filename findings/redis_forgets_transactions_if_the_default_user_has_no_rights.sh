#!/bin/bash
# Redis 7.0.15 (Debian 12: 5:7.0.15) with an append-only file. The user `default` is off and has no rights, and clients log
# in as another user, as the documentation of ACLs suggests. What that user has written in MULTI, or with a script that
# writes more than once, is in the file; but after a restart it is gone. The server logs NOPERM for each command, says
# "DB loaded", and starts. It loads the file as the user `default`, whose rights count only in transactions.
# Valkey 8.1.1 (Debian 13) does the same.
#
# Seen: 4 keys before the restart, 2 after it. With all rights for the user
# `default`, who is still off, nothing is lost, and nobody can be that user.
set -euo pipefail
VERSION=5:7.0.15
folder=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server"; rm -r "$folder"' EXIT
cd "$folder"
apt-get download -qq redis-tools 2>/dev/null
dpkg-deb --field redis-tools_*.deb Version | grep -q "^$VERSION" || { echo "Another version of redis-tools than $VERSION" >&2; exit 1; }
dpkg-deb --extract redis-tools_*.deb root

start() {
  # The package has the server under the name of a tool.
  (exec -a redis-server root/usr/bin/redis-check-rdb --port 0 --unixsocket "$folder/socket" --aclfile "$folder/users" \
    --dir "$1" --appendonly yes --save '' >> "$1/log") &
  server=$!
  for _ in $(seq 50); do ask PING >/dev/null 2>&1 && return; sleep 0.1; done
  cat "$1/log" >&2; exit 1
}
stop() { kill "$server"; wait "$server" || :; server=; }
ask() { REDISCLI_AUTH=secret root/usr/bin/redis-cli -s "$folder/socket" --user app "$@"; }

# keys_after RIGHTS: how many of four keys are there after a restart
keys_after() {
  mkdir "$2"
  printf 'user default off %s\nuser app on >secret ~* +@all\n' "$1" > users
  start "$2"
  ask EVAL "redis.call('SET', 'a', 1) redis.call('SET', 'b', 1)" 0 >/dev/null
  printf 'MULTI\nSET c 1\nEXEC\n' | ask >/dev/null
  ask SET d 1 >/dev/null
  [ "$(ask DBSIZE)" = 4 ]
  stop
  start "$2"
  ask DBSIZE
  stop
}

without=$(keys_after resetpass without) with=$(keys_after '~* +@all' with)
echo "of 4 keys after a restart: $without without rights of the user default, $with with them"
refused=$(grep -c NOPERM without/log)
echo "NOPERM in the log: $refused"
[ "$without" -lt 4 ] && [ "$with" = 4 ] && [ "$refused" -gt 0 ]
