#!/bin/sh
# What a container's preStop hook runs: wait until nobody sends requests any more, then do what the user asked for,
# for as long as was said: what it took longer would be missing to requests in flight and to the cache before the kill.
sleep "$1"
exec timeout -k 1 "$2" /bin/sh /etc/kvoffload/postscript.sh
