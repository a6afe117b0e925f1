"""The packet engine: what happens to every data packet, behind one interface with a pure and a native implementation."""
