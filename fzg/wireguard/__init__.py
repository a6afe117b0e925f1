"""WireGuard without its data path: handshakes, load limiter, sessions and timers."""
