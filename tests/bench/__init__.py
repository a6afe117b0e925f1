"""Figures of the gateway in namespaces, beside wireguard-go and plain routing in one run: `python -m tests.bench`."""
