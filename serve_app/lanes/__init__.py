"""Two ways to an answer of one engine: vLLM's Rust front end (fast), its Python application (full).

Which requests may take the fast lane is data (capability.py). The door decides once for each
request, before it costs the engine anything (door.py). HAProxy asks it (launch/ask_door.lua), and
then passes the request to the Rust front end, so that no Python touches a token. docs/lanes.md has
the life of a request in both lanes.
"""
