"""The compatibility number that portals and clients check (specification: portal 3.3)."""

VERSION = "1.6.1"
