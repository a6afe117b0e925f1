# cython: language_level=3, boundscheck=True, wraparound=False, cdivision=False, embedsignature=True
"""The packet engine in native code: see `engine.Engine` for the interface and `native/engine.h` for what is inside.

This file is the border: it turns Python's arguments into C's and events into items. Whatever happens per packet is in
`native/*.c`, with the interpreter's lock released.
"""

import errno
import logging
import os
import sys

from fzg.dataplane.engine import Activity, Datagram, FlowReport, InnerPacket, OutboundPacket, SessionConfirmed
from fzg.dataplane.udp_offload import supports_segmentation
from fzg.wire.endpoint import Endpoint

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

include "native/declarations.pxi"
include "native/played_kernel.pxi"

_LOG = logging.getLogger(__name__)


def _load_cipher():
    """Find the libcrypto that the interpreter's own `_ssl` uses, else the system's."""
    candidates = []
    for name in ("_ssl", "_hashlib"):
        try:
            candidates.append(__import__(name).__file__)
        except (ImportError, AttributeError):  # not built, or part of the interpreter
            continue
    for candidate in (*candidates, "libcrypto.so.3", "libcrypto.so"):
        if cipher_load(os.fsencode(candidate)):
            return
    raise ImportError("no libcrypto 3.0 or later with ChaCha20 and Poly1305 was found")


_load_cipher()


cdef int _read_endpoint(object source, endpoint *result) except -1:
    """Fill `result` from an `Endpoint`."""
    ip, port = source
    cdef bytes octets = ip
    cdef Py_ssize_t size = PyBytes_GET_SIZE(octets)
    if size != 4 and size != 16:
        raise ValueError("an IP address has 4 or 16 bytes")
    memset(result, 0, sizeof(endpoint))
    memcpy(result.ip, PyBytes_AS_STRING(octets), size)
    result.size = <uint8_t>size
    result.port = port
    return 0


cdef object _make_endpoint(const endpoint *source):
    return Endpoint(PyBytes_FromStringAndSize(<const char *>source.ip, source.size), source.port)


cdef class NativeEngine:
    """Implements `engine.Engine`. Not thread-safe: one greenlet at a time, and no call switches."""

    cdef engine *_engine
    cdef list _kept
    cdef list _played

    def __cinit__(self):
        cdef seed random_seed
        cdef bytes octets = os.urandom(sizeof(seed))
        memcpy(&random_seed, PyBytes_AS_STRING(octets), sizeof(seed))
        self._kept = [None, None]  # sockets
        self._played = []
        self._engine = <engine *>calloc(1, sizeof(engine))
        if self._engine is NULL or not engine_init(self._engine, &random_seed):
            raise MemoryError

    def __dealloc__(self):
        if self._engine is not NULL:
            engine_free(self._engine)
            free(self._engine)

    # -- descriptors.

    def attach_udp(self, int family, udp, *, int port, bint segmentation=True):
        """See `Engine`."""
        self._attach_udp(family, udp, port, segmentation)

    def attach_tun(self, int descriptor, *, bint vnet_hdr=True, bint offloads=True):
        """See `Engine`."""
        cdef tun_port *tun = &self._engine.tun
        tun.attached = True
        tun.descriptor = descriptor
        tun.vnet_hdr = vnet_hdr
        tun.coalesce = offloads and vnet_hdr
        tun.calls = &tun_kernel

    def play_udp(self, int family, udp, *, int port, bint segmentation=True):
        """For tests: `attach_udp` with an object whose `sendmsg` and `recvmsg_into` stand in for the kernel's."""
        cdef udp_port *attached = self._attach_udp(family, udp, port, segmentation)
        played = PlayedKernel(udp)
        self._played.append(played)
        attached.calls = &udp_played
        attached.calls_context = <void *>played

    def play_tun(self, calls):
        """For tests: `calls.readv` and `calls.writev`, as in `os`, stand in for the kernel's."""
        played = PlayedKernel(calls)
        self._played.append(played)
        self._engine.tun.calls = &tun_played
        self._engine.tun.calls_context = <void *>played

    def limit(self, **limits):
        """For tests: smaller tables, queues and turns than usual, and turns that do not wait for verdicts."""
        for name, value in limits.items():
            if name == "flows":
                self._engine.state.max_flows = value
            elif name == "tun_packets":
                self._engine.tun.max_queued = value
            elif name == "data":
                self._engine.udp[0].max_data = self._engine.udp[1].max_data = value
            elif name == "control":
                self._engine.udp[0].max_control = self._engine.udp[1].max_control = value
            elif name == "turn":
                self._engine.turn_packets = value
            elif name == "urgent":
                self._engine.urgent_packets = value
            elif name == "judged":
                self._engine.turn_judged = value
            elif name == "flush":
                self._engine.flush_packets = value
            elif name == "awaits_verdicts":
                self._engine.awaits_verdicts = value
            elif name == "backlog":
                self._engine.from_udp.max_cost = self._engine.from_tun.max_cost = value
            elif name == "quantum":
                self._engine.from_udp.quantum = self._engine.from_tun.quantum = value
            elif name == "lanes" and 0 < value <= LANES:
                self._engine.from_udp.lanes_used = self._engine.from_tun.lanes_used = value
            else:
                raise TypeError(f"no limit of the name {name}")

    cdef udp_port *_attach_udp(self, int family, udp, int port, bint segmentation) except NULL:
        is_ipv4 = family == AF_INET
        cdef udp_port *attached = engine_udp(self._engine, is_ipv4)
        attached.segmentation = segmentation and supports_segmentation(udp)
        attached.family = family
        attached.descriptor = udp.fileno()
        attached.number = port
        attached.calls = &udp_kernel
        attached.attached = True
        self._kept[0 if is_ipv4 else 1] = udp
        return attached

    # -- sessions.

    def add_session(
        self, int64_t peer, uint32_t local_index, uint32_t remote_index, *, bytes receive_key, bytes send_key, double now
    ):
        """See `Engine`."""
        if len(receive_key) != KEY_SIZE or len(send_key) != KEY_SIZE:
            raise ValueError("a key has 32 bytes")
        if not state_add_session(
            &self._engine.state, self._make_peer(peer), local_index, remote_index,
            <const uint8_t *>PyBytes_AS_STRING(receive_key), <const uint8_t *>PyBytes_AS_STRING(send_key),
        ):
            raise MemoryError

    def use_session(self, int64_t peer, local_index):
        """See `Engine`."""
        cdef engine_peer *owner = self._make_peer(peer)
        cdef session *used
        if local_index is None:
            owner.current = NULL
            return
        used = state_session(&self._engine.state, local_index)
        if used is NULL or used.peer is not owner:
            raise KeyError(local_index)
        owner.current = used

    def remove_session(self, uint32_t local_index):
        """See `Engine`."""
        cdef session *removed = state_session(&self._engine.state, local_index)
        if removed is not NULL:
            state_remove_session(&self._engine.state, removed)

    def seal(self, int64_t peer, bytes packet, double now):
        """See `Engine`. A packet above the MTU is refused like one without a session."""
        cdef engine_peer *owner = state_peer(&self._engine.state, peer)
        cdef Py_ssize_t size = PyBytes_GET_SIZE(packet)
        if owner is NULL or size > MTU:
            return None
        message = PyBytes_FromStringAndSize(NULL, size + DATA_OVERHEAD)
        if engine_seal(
            self._engine, owner, <const uint8_t *>PyBytes_AS_STRING(packet), <uint32_t>size, now,
            <uint8_t *>PyBytes_AS_STRING(message),
        ):
            return message
        return None

    def activity(self, int64_t peer):
        """See `Engine`."""
        cdef engine_peer *owner = state_peer(&self._engine.state, peer)
        if owner is NULL:
            return Activity(0.0, 0.0, 0.0, 0.0, 0.0, False, False)
        return Activity(
            owner.first_unanswered_sent,
            owner.first_unanswered_received,
            owner.last_sent,
            owner.last_received,
            owner.last_data,
            owner.current is not NULL and owner.current.sent_data,
            owner.current is not NULL and owner.current.received_data,
        )

    def note_handshake(self, int64_t peer, *, bint sent, double now):
        """See `Engine`."""
        if sent:
            peer_note_sent(self._make_peer(peer), now)
        else:
            peer_note_received(self._make_peer(peer), now)

    def remove_peer(self, int64_t peer):
        """See `Engine`."""
        cdef engine_peer *owner = state_peer(&self._engine.state, peer)
        if owner is not NULL:
            engine_revoke(self._engine, owner)
            state_remove_peer(&self._engine.state, owner)

    cdef engine_peer *_make_peer(self, int64_t handle) except NULL:
        cdef engine_peer *owner = state_make_peer(&self._engine.state, handle)
        if owner is NULL:
            raise MemoryError
        return owner

    # -- paths.

    def set_path(self, int64_t peer, source, destination, channel):
        """See `Engine`."""
        cdef engine_path changed
        cdef bytes octets
        memset(&changed, 0, sizeof(changed))
        changed.known = True
        _read_endpoint(destination, &changed.destination)
        changed.channel = -1 if channel is None else <uint16_t>channel
        if source is not None and len(source) == changed.destination.size:  # else the kernel chooses
            octets = source
            changed.has_source = True
            memcpy(changed.source, PyBytes_AS_STRING(octets), changed.destination.size)
        self._make_peer(peer).path = changed

    def clear_path(self, int64_t peer):
        """See `Engine`."""
        self._make_peer(peer).path.known = False

    def set_channel(self, relay, uint16_t number, *, bint usable):
        """See `Engine`."""
        cdef endpoint socket
        _read_endpoint(relay, &socket)
        if not state_set_channel(&self._engine.state, &socket, number, usable):
            raise MemoryError

    # -- flows.

    def install_flow(self, int64_t peer, key, *, bint inbound, rewrite, double valid_until, int64_t token):
        """See `Engine`."""
        protocol, source, destination, source_port, destination_port = key
        cdef bytes octets = source + destination + source_port.to_bytes(2, "big") + destination_port.to_bytes(2, "big")
        cdef flow verdict
        cdef install result
        cdef bytes ip
        memset(&verdict, 0, sizeof(verdict))
        if len(source) != len(destination) or len(source) not in (4, 16):
            raise ValueError("a flow has two addresses of one family")
        memcpy(verdict.key.octets, PyBytes_AS_STRING(octets), PyBytes_GET_SIZE(octets))
        verdict.key.size = <uint8_t>(PyBytes_GET_SIZE(octets) + 1)
        verdict.key.octets[verdict.key.size - 1] = protocol
        verdict.peer = self._make_peer(peer)
        verdict.inbound = inbound
        verdict.is_tcp = protocol == PROTOCOL_TCP
        verdict.l4_offset = <uint8_t>key_l4_offset(&verdict.key)
        verdict.valid_until = valid_until
        verdict.token = token
        verdict.translated_key = verdict.key
        if rewrite is not None:
            ip, port = rewrite
            if len(ip) != len(source):
                raise ValueError("a rewrite cannot change the IP family")
            verdict.is_translated = True
            translation_init(
                &verdict.translation, &verdict.key, <const uint8_t *>PyBytes_AS_STRING(ip), port, inbound,
                &verdict.translated_key,
            )
        result = engine_install_flow(self._engine, &verdict)
        if result == INSTALL_TABLE_FULL:
            self._engine.counters.flow_table_full += 1
        elif result == INSTALL_NO_MEMORY:
            raise MemoryError

    def revoke(self, int64_t peer):
        """See `Engine`."""
        cdef engine_peer *owner = state_peer(&self._engine.state, peer)
        if owner is not NULL:
            engine_revoke(self._engine, owner)

    def sweep(self, double now):
        """See `Engine`."""
        cdef reports swept
        memset(&swept, 0, sizeof(swept))
        try:
            if not state_sweep(&self._engine.state, now, &swept):
                raise MemoryError
            return [_make_report(&swept.entries[i]) for i in range(swept.count)]
        finally:
            free(swept.entries)

    # -- packets.

    def receive_udp(self, int family, double now):
        """See `Engine`."""
        cdef int result
        cdef bint is_ipv4 = family == AF_INET
        if not engine_udp(self._engine, is_ipv4).attached:
            raise KeyError(family)
        with nogil:
            result = engine_receive_udp(self._engine, is_ipv4, now)
        return self._items(result)

    def handle_datagram(self, datagram, double now):
        """See `Engine`."""
        payload, source, local, ecn = datagram
        cdef bytes octets = bytes(payload)
        cdef arrival arrived
        memset(&arrived, 0, sizeof(arrived))
        arrived.octets = <uint8_t *>PyBytes_AS_STRING(octets)  # which are not written to
        arrived.length = arrived.stride = <uint32_t>PyBytes_GET_SIZE(octets)
        arrived.ecn = ecn
        _read_endpoint(source, &arrived.source)
        _read_endpoint(local, &arrived.local)
        with nogil:
            engine_handle_datagram(self._engine, &arrived, now)
        return self._items(0)

    def receive_tun(self, double now):
        """See `Engine`."""
        cdef int result
        with nogil:
            result = engine_receive_tun(self._engine, now)
        if result == -errno.ENODEV:
            engine_end_turn(self._engine)
            raise OSError(errno.ENODEV, "the TUN device is gone")
        return self._items(result)

    def handle_packet(self, bytes packet, double now):
        """See `Engine`."""
        cdef const uint8_t *octets = <const uint8_t *>PyBytes_AS_STRING(packet)
        cdef uint32_t size = <uint32_t>PyBytes_GET_SIZE(packet)
        with nogil:
            engine_handle_packet(self._engine, octets, size, now)
        return self._items(0)

    def has_backlog(self, family):
        """See `Engine`."""
        return engine_has_backlog(self._engine, family is None)

    def write_tun(self, packet, peer=None):
        """See `Engine`."""
        cdef bytes octets = bytes(packet)
        engine_write_tun(
            self._engine, <const uint8_t *>PyBytes_AS_STRING(octets), <uint32_t>PyBytes_GET_SIZE(octets),
            CORE if peer is None else peer,
        )

    def transmit(self, transmit):
        """See `Engine`."""
        cdef endpoint destination
        cdef bytes payload = transmit.payload
        cdef bytes source = transmit.source
        cdef const uint8_t *from_ip = NULL
        _read_endpoint(transmit.destination, &destination)
        if source is not None and PyBytes_GET_SIZE(source) == destination.size:  # else the kernel chooses
            from_ip = <const uint8_t *>PyBytes_AS_STRING(source)
        engine_transmit(
            self._engine, &destination, from_ip, transmit.ecn,
            <const uint8_t *>PyBytes_AS_STRING(payload), <uint32_t>PyBytes_GET_SIZE(payload),
            CORE if transmit.peer is None else transmit.peer,
        )

    def flush(self):
        """See `Engine`."""
        cdef bint done
        with nogil:
            done = engine_flush(self._engine)
        self._tell()
        return done

    def congested(self):
        """See `Engine`."""
        descriptors = [self._engine.udp[i].descriptor for i in range(2) if self._engine.udp[i].queued]
        if self._engine.tun.queued:
            descriptors.append(self._engine.tun.descriptor)
        return descriptors

    def counters(self):
        """See `Engine`."""
        return _counters(self._engine)

    cdef list _items(self, int result):
        """The items of the turn, which ends here; raises what went wrong in it."""
        cdef turn *ended = &self._engine.turn
        try:
            self._tell()
            if result < 0:
                raise OSError(-result, os.strerror(-result))
            return [_make_item(&ended.events[i]) for i in range(ended.event_count)]
        finally:
            engine_end_turn(self._engine)

    cdef object _tell(self):
        """Say once what the kernel refuses, and raise what a played kernel raised."""
        cdef int i
        if self._engine.tun.refused:
            name = errno.errorcode.get(self._engine.tun.refused)
            self._engine.tun.refused = 0
            _LOG.info("packets for the TUN are no longer merged, the kernel refuses merged ones (%s)", name)
        for i in range(2):
            if self._engine.udp[i].refused:
                name = errno.errorcode.get(self._engine.udp[i].refused)
                self._engine.udp[i].refused = 0
                _LOG.info("UDP segmentation offload is off, the kernel refuses it (%s)", name)
        for played in self._played:
            played.raise_failure()


cdef object _make_report(const report *source):
    return FlowReport(source.token, source.packets, source.payload_octets, source.last_packet)


cdef object _make_item(const event *source):
    octets = PyBytes_FromStringAndSize(<const char *>source.octets, source.size)
    if source.kind == EVENT_DATAGRAM:
        return Datagram(octets, _make_endpoint(&source.source), _make_endpoint(&source.local), source.ecn)
    if source.kind == EVENT_INNER_PACKET:
        return InnerPacket(
            source.peer, octets, source.ecn, _make_endpoint(&source.source), _make_endpoint(&source.local)
        )
    if source.kind == EVENT_OUTBOUND_PACKET:
        return OutboundPacket(octets)
    if source.kind == EVENT_FLOW_REPORT:
        return _make_report(&source.report)
    return SessionConfirmed(source.local_index)


cdef dict _counters(engine *source):
    cdef engine_counters *own = &source.counters
    cdef tun_counters *tun = &source.tun.counters
    cdef udp_counters *one = &source.udp[0].counters
    cdef udp_counters *other = &source.udp[1].counters
    totals = {
        "udp_rx_calls": own.udp_rx_calls,
        "udp_rx_packets": own.udp_rx_packets,
        "udp_rx_bytes": own.udp_rx_bytes,
        "udp_tx_calls": one.calls + other.calls,
        "udp_tx_packets": one.packets + other.packets,
        "udp_tx_bytes": one.octets + other.octets,
        "udp_icmp_errors": one.icmp_errors + other.icmp_errors,
        "udp_receive_errors": one.receive_errors + other.receive_errors,
        "tun_rx_calls": own.tun_rx_calls,
        "tun_rx_packets": own.tun_rx_packets,
        "tun_rx_bytes": own.tun_rx_bytes,
        "tun_tx_calls": tun.calls,
        "tun_tx_packets": tun.packets,
        "tun_tx_bytes": tun.octets,
        "drop_udp_oversized": own.drop_udp_oversized + one.oversized + other.oversized,
        "drop_udp_without_local_address": one.without_local_address + other.without_local_address,
        "drop_udp_no_socket": own.drop_udp_no_socket,
        "drop_udp_queue_full": one.queue_full + other.queue_full,
        "drop_tun_queue_full": tun.queue_full,
        "drop_tun_malformed": own.drop_tun_malformed,
        "drop_tun_not_attached": own.drop_tun_not_attached,
        "drop_replayed": own.drop_replayed,
        "drop_undecryptable": own.drop_undecryptable,
        "drop_inner_not_ip": own.drop_inner_not_ip,
        "drop_inner_truncated": own.drop_inner_truncated,
        "drop_inner_oversized": own.drop_inner_oversized,
        "drop_udp_backlog_full": source.from_udp.dropped,
        "drop_tun_backlog_full": source.from_tun.dropped,
        "drop_revoked": own.drop_revoked,
        "drop_no_memory": own.drop_no_memory,
        "flow_table_full": own.flow_table_full,
    }
    for code in range(ERRNO_LIMIT):
        name = errno.errorcode.get(code, "unknown").lower()
        totals[f"drop_tun_write_{name}"] = totals.get(f"drop_tun_write_{name}", 0) + tun.errors[code]
        totals[f"drop_udp_send_{name}"] = (
            totals.get(f"drop_udp_send_{name}", 0) + one.errors[code] + other.errors[code]
        )
    return {name: total for name, total in totals.items() if total}
