"""What clients may reach: resources, filters, DNS NAT and the in-tunnel control protocol (spec tunnel)."""
