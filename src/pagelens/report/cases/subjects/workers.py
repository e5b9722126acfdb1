"""A parent with many objects forks workers, one after the other; each says what it copied. Plain Python."""

import array
import gc
import os
import resource
import sys


def dirty():
    with open("/proc/self/smaps_rollup") as stream:
        return sum(int(line.split()[1]) for line in stream if line.startswith("Private_Dirty"))


def read_objects():
    for _ in data:
        pass


def read_array():
    sum(numbers)


def worker(name, action):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        gc.disable()
        before, faults = dirty(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        action()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        os.write(1, f"worker {name} {os.getpid()} {dirty() - before} {after - faults}\n".encode())
        os._exit(0)
    os.waitpid(pid, 0)


n = int(sys.argv[1])
gc.disable()
data = [[i] for i in range(n)]
numbers = array.array("q", range(n * 4))
with open("/proc/self/smaps_rollup") as stream:
    rss = next(int(line.split()[1]) for line in stream if line.startswith("Rss"))
print("parent", rss, flush=True)
worker("read", read_objects)
worker("collect", gc.collect)
worker("array", read_array)
gc.freeze()
worker("read+freeze", read_objects)
worker("collect+freeze", gc.collect)
os._exit(0)
