"""The Linux host: TUN, UDP sockets, addresses, routes, nftables, sysctls, capabilities, resolver."""
