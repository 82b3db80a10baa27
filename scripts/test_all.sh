#!/usr/bin/env bash
# Runs all tests, the slow ones and all slow cases too; takes about an hour.
exec bash "$(dirname "${BASH_SOURCE[0]}")/test.sh" --slow "$@"
