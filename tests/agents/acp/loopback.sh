# Runs a command in a new network namespace, where the loopback is down at first.
ip link set lo up && exec "$@"
