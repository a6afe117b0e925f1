"""The TURN client: allocations on relays, their channels, and the set of relays (RFC 8656; spec turn)."""
