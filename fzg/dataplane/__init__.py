"""The packet engine: what happens to every data packet, behind one interface with pure and native implementations."""
