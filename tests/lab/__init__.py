"""A Firezone deployment on one machine: portal, relays, NAT routers, resources and clients, each a process of its own.

`python -m tests.lab --help` shows the command line; `scenario.Lab` is the library that tests and benchmarks share.
"""
