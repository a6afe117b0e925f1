"""WireGuard handshakes, cookies and timers; session keys go to the packet engine (spec connectivity chapter 5)."""
