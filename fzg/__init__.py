"""A Firezone gateway: portal signalling, ICE, TURN, WireGuard, policy and NAT in one process."""
