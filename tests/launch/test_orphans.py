"""Whose parent was killed is adopted, and leaves no zombie."""

import subprocess
import sys
import textwrap

# In a process of its own: to be the parent of orphans is for life.
SCRIPT = """
import subprocess, sys, time
import psutil
from serve_app.launch import orphans

orphans._PERIOD_S = 0.1
orphans.adopt()
own = subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"])
orphans.own.add(own.pid)
parent = subprocess.Popen(
    [sys.executable, "-c", "import os, time; os.fork(); os.fork(); time.sleep(1)"]
)
orphans.own.add(parent.pid)
until = time.monotonic() + 20
while len(psutil.Process(parent.pid).children(recursive=True)) < 3:
    assert time.monotonic() < until
    time.sleep(0.01)
parent.kill()
assert parent.wait() == -9
me = psutil.Process()
assert {child.pid for child in me.children()} - {own.pid}, "nobody was adopted"
while {child.pid for child in me.children()} - {own.pid}:
    assert time.monotonic() < until, [child.status() for child in me.children()]
    time.sleep(0.05)
# Its own children keep their status for it.
assert own.wait() == 7
"""


def test_orphans_are_reaped_and_own_children_are_not() -> None:
    subprocess.run([sys.executable, "-c", textwrap.dedent(SCRIPT)], check=True, timeout=60)
