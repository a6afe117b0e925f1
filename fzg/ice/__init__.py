"""The ICE agent (RFC 8445, full, trickle) as specified in connectivity chapter 3."""
