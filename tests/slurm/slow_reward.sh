#!/usr/bin/env bash
# A reward program that gives every completion 0, after $1 seconds.
while IFS= read -r line; do
  [[ $line =~ \"id\":\ ?([0-9]+) ]] || exit 1
  id=${BASH_REMATCH[1]}
  # Once in each sample.
  rest=${line//\"is_truncated\"/}
  count=$(((${#line} - ${#rest}) / 14))
  scores=$(printf '0,%.0s' $(seq "$count"))
  sleep "$1"
  echo "{\"id\": $id, \"scores\": [${scores%,}]}"
done
