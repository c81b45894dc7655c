#!/bin/sh
# retry.sh ATTEMPTS COMMAND...: run a command again after failures that another attempt may mend.
# KubeRay and `ray job submit` know only success and failure, so they would also repeat what cannot succeed.
# Exit codes of cage: 2 is the configuration, input or model; 3 is more failed rows than errors.budget allows.
attempts=$1
shift
attempt=1
while :; do
    "$@"
    code=$?
    case $code in
        0 | 2 | 3) exit $code ;;
    esac
    if [ "$attempt" -ge "$attempts" ]; then
        exit $code
    fi
    attempt=$((attempt + 1))
    echo "exit code $code: attempt $attempt of $attempts" >&2
    sleep "${RETRY_WAIT_S:-10}"
done
