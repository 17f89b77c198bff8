#!/bin/bash
# Packs the guest agent into the guests' initramfs. Equal inputs give
# byte-identical outputs. The last line printed is "initramfs=PATH".
#
# usage: build.sh [--file HOST:GUESTPATH]...
#
# environment: MSHARE_CACHE  where results are kept (default ~/.cache/mshare)
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
agent=$(cargo build -q -p guest-agent --message-format=json-render-diagnostics |
	sed -n 's/.*"name":"guest-agent".*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
[ -n "$agent" ] || { echo "initramfs: error: guest-agent was not built" >&2; exit 1; }
exec cargo run -q -p mshare-tests --bin mkinitramfs -- --agent "$agent" "$@"
